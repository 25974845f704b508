"""The runs behind `lora-plan verify` and `lora-plan calibrate`: which base, which data, which specs, in one directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_planner import __version__, facts
from lora_planner.arch import from_config
from lora_planner.errors import BadInput
from lora_planner.facts import Gpu
from lora_planner.learning_rate import advise
from lora_planner.predict import predict
from lora_planner.record import Json, RunRecord, RunSpec
from runner import base, measure, tasks
from runner.board import Board
from runner.execute import Place
from runner.sweep import Planned, Workers, slots, sweep
from runner.tasks import Sample
from runner.train import padded_lengths

#: half a decade: a parabola through three such points finds an optimum within a factor of 1.5
GRID = 10**0.5
EXTENSIONS = 3
DEFAULT_BASE = {"cpu": "qwen3-1m", "cuda": "qwen3-30m"}


@dataclass(frozen=True, slots=True)
class Scene:
    """One base on one task on one device, and where things lie."""

    out: Path
    source: base.Base
    task: str
    task_args: tuple[tuple[str, Any], ...]
    device: str
    gpu: Gpu
    place: Place
    workers: tuple[dict[str, str], ...]
    widths: tuple[base.Base, ...]  # untrained siblings: one for the probe, one for the check
    seq_len: int
    micro_batch: int

    @property
    def config(self) -> Json:
        return self.source.config()

    def spec(self, **words: Any) -> RunSpec:
        """The arm that all others differ from."""
        precision = "bf16" if self.device == "cuda" else "fp32"
        plain = RunSpec(base=self.source.key, task=self.task, task_args=self.task_args, device=self.device,
                        precision=precision, seq_len=self.seq_len, micro_batch=self.micro_batch)  # fmt: skip
        return replace(plain, **words)


def device() -> tuple[str, Gpu]:
    """CUDA where present, by its driver's exact name, else this processor with one thread a run."""
    if torch.cuda.is_available():
        return "cuda", facts.gpu(torch.cuda.get_device_name(0))
    name = measure.cpu_name(1)
    known = [g for g in facts.gpus() if g.name == name]
    return "cpu", known[0] if known else measure.cpu_device(1)


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(out: Path, home: Path, model: str | None, data: str | None, base_name: str | None,
            offline: bool = False) -> Scene:  # fmt: skip
    """Base, data and device of a verification; a base of our own is made here if the cache has none."""
    kind, gpu = device()
    cores = core_count()
    workers = slots(kind, torch.cuda.device_count(), cores)
    if model and base_name:
        raise BadInput("--model and --base are two bases", "verify", "Give one of them.")
    source = (
        base.of_user(model, home, offline) if model else own_base(base_name or DEFAULT_BASE[kind], home, kind, cores)
    )
    widths = tuple(b for b in (base.sibling(source, home, factor) for factor in (2.0, 1.5)) if b)
    place = Place(out, {b.key: b.path for b in (source, *widths)})
    task, arguments, seq_len, micro = "shift", {}, 128, 8
    if data:
        from runner.tasks import jsonl

        sha256 = jsonl.register(data)
        place = replace(place, data={sha256: Path(data).absolute()})
        task, arguments = "jsonl", {"sha256": sha256}
    if model:
        seq_len, micro = (512, 4) if kind == "cuda" else (256, 4)
    config_limit = source.config().get("max_position_embeddings") or seq_len
    seq_len = min(seq_len, int(config_limit))
    words = tuple(sorted(arguments.items()))
    return Scene(out, source, task, words, kind, gpu, place, tuple(workers), widths, seq_len, micro)


def own_base(name: str, home: Path, kind: str, cores: int) -> base.Base:
    """A small base from the cache, or pre-trained now by one worker that has all cores; resumes where it stopped."""

    def train(spec: RunSpec, start: base.Base, work: Path, out: Path) -> Json:
        place = Place(work, {start.key: start.path})
        workers = Workers(slots(kind, 1, cores, cores)[:1], place.to_json(), save_to=out)
        board = Board()
        # all cores work on this one run: a device of its own
        gpu = measure.cpu_device(cores) if kind == facts.CPU else device()[1]
        forecast = predict(spec, start.config(), gpu)
        tokens = spec.steps * spec.batch * spec.seq_len
        board.console.print(f"pre-training {start.key} on {tokens:,} tokens of source code", highlight=False)
        [run] = sweep(work, [Planned(spec, start.config(), forecast)], workers, board)
        from runner.sweep import require_finished

        require_finished([run])
        return run.measured

    return base.ensure(name, home, kind, train)


def planned(scene: Scene, specs: Sequence[RunSpec]) -> list[Planned]:
    """Specs with the planner's predictions as of now; of the user's data it knows the lengths and the order."""
    configs = {key: scene.place.base(key).config() for key in {spec.base for spec in specs}}
    data: dict[int, list[Sample]] = {}

    def lengths(spec: RunSpec) -> tuple[float, float] | None:
        if spec.task != "jsonl":
            return None
        if spec.seq_len not in data:
            words = base.tokenizer(scene.source)
            data[spec.seq_len] = tasks.build(spec.task, words, spec.seq_len, 0, dict(spec.task_args)).train
        return padded_lengths(spec, data[spec.seq_len])

    stamp = f"lora-plan {__version__}"
    return [
        Planned(spec, config, predict(spec, config, scene.gpu, lengths=lengths(spec)), stamp)
        for spec in specs
        for config in (configs[spec.base],)
    ]


def run(scene: Scene, specs: Sequence[RunSpec]) -> list[RunRecord]:
    """Sweep them on all devices of this machine."""
    board = Board(len(scene.workers))
    try:
        return sweep(scene.out, planned(scene, specs), Workers(scene.workers, scene.place.to_json()), board)
    finally:
        board.close()


def run_arms(scene: Scene, ranks: Sequence[int], steps: int, seeds: int, points: int) -> list[RunRecord]:
    """The arms; where the best rate of one is at the end of its grid, a rate beyond that end, up to three times."""
    specs = arms(scene, ranks, steps, seeds, points)
    runs = run(scene, specs)
    for _ in range(EXTENSIONS):
        more = beyond(runs)
        if not more:
            break
        specs += more
        runs = run(scene, specs)
    return runs


def beyond(runs: Sequence[RunRecord]) -> list[RunSpec]:
    """Specs one grid step past the end at which an arm's best mean loss lies; a diverged run counts as worse."""
    groups: dict[tuple[str, int, str], list[RunRecord]] = {}
    for found in runs:
        if not found.spec.repeat:
            groups.setdefault((found.spec.method, found.spec.rank, found.spec.init), []).append(found)
    more = []
    for some in groups.values():
        losses: dict[float, list[float]] = {}
        for found in some:
            loss = found.final_loss
            losses.setdefault(found.spec.lr, []).append(float("inf") if loss is None else loss)
        mean = {rate: sum(values) / len(values) for rate, values in losses.items()}
        best = min(mean, key=lambda rate: mean[rate])
        if mean[best] == float("inf") or min(mean) < best < max(mean):
            continue
        rate = float(f"{best * (GRID if best == max(mean) else 1 / GRID):.2g}")
        more += [replace(found.spec, lr=rate) for found in some if found.spec.lr == best]
    return more


def arms(scene: Scene, ranks: Sequence[int], steps: int, seeds: int, points: int) -> list[RunSpec]:
    """Full fine-tuning and each rank on a grid of learning rates around the planner's advice.

    Besides: full training from random weights (what the base is worth), and one rerun of the same seed (noise).
    """
    total, model_type = from_config(scene.config).total, str(scene.config["model_type"])

    def grid(method: str, rank: int) -> list[float]:
        centre = advise(total, model_type, method, rank, 32.0, steps, "sft", scene.micro_batch).lr.value
        return [float(f"{centre * GRID**i:.2g}") for i in range(-1, points - 1)]

    middle = max(ranks)
    full = [scene.spec(method="full", rank=0, alpha=0.0, lr=lr, steps=steps, seed=s)
            for s in range(seeds) for lr in grid("full", 1)]  # fmt: skip
    lora = [scene.spec(rank=r, lr=lr, steps=steps, seed=s)
            for s in range(seeds) for r in ranks for lr in grid("lora", middle)]  # fmt: skip
    again = replace(next(s for s in lora if s.rank == middle), repeat=1)
    scratch = []
    if scene.task != "jsonl":
        scratch = [replace(full[i], init="random") for i in range(1, points)]
    return [*full, *lora, again, *scratch]


def probes(scene: Scene) -> list[RunSpec]:
    """Two lengths x two micro-batches, LoRA and full: what `calibrate` fits its constants on.

    LoRA's rank is small in one half and large in the other, which tells its products from its traffic.
    On a small base of our own also at twice its width, since constants of one width say little about others.
    """
    short, long = max(16, scene.seq_len // 2), scene.seq_len * 2
    few, many = max(1, scene.micro_batch // 4), scene.micro_batch
    steps = 12 if scene.device == "cpu" else 24
    plain = replace(scene.spec(), task="probe", task_args=(("n", many * 4),), steps=steps, lr=1e-4)
    bases: list[dict[str, Any]] = [{}, *({"base": b.key, "init": "random"} for b in scene.widths[:1])]
    return [
        replace(plain, seq_len=length, micro_batch=micro, **arm, **words)
        for words in bases
        for length in (short, long)
        for micro in (few, many)
        for arm in (
            {"method": "full", "rank": 0, "alpha": 0.0},
            {"rank": 4 if (length == short) == (micro == few) else 32},
        )
    ]


def checks(scene: Scene) -> list[RunSpec]:
    """Shapes that the probe has not seen, on real data: ranks, lengths, batches, checkpointing, accumulation, width."""
    steps = 12 if scene.device == "cpu" else 24
    plain = scene.spec(steps=steps, lr=1e-4)
    length = scene.seq_len
    full = {"method": "full", "rank": 0, "alpha": 0.0}
    shapes: list[dict[str, Any]] = [
        {"rank": 1}, {"rank": 32}, full,
        {"rank": 8, "seq_len": length * 3 // 2, "micro_batch": max(1, scene.micro_batch // 2)},
        {**full, "seq_len": length * 3 // 2, "micro_batch": max(1, scene.micro_batch // 2)},
        {"rank": 8, "checkpointing": "full"}, {**full, "checkpointing": "full"},
        {"rank": 8, "micro_batch": max(1, scene.micro_batch // 2), "accumulation": 3},
        {"rank": 8, "targets": ("mlp",)}, {"rank": 8, "targets": ("attention",)},
    ]  # fmt: skip
    for other in scene.widths[1:]:
        shapes += [{"rank": 8, "base": other.key, "init": "random"}, {**full, "base": other.key, "init": "random"}]
    return [replace(plain, **shape) for shape in shapes]
