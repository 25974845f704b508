"""Step time of our loop, side by side in one run with transformers' Trainer and TRL's SFTTrainer.

    python -m benchmarks.loops [--steps N] [--rounds N]            writes reports/loops.md

All three train the same module (weights and adapter from one seed) on the same samples in the same order, with the
same AdamW, at one precision, without clipping, evaluation or checkpoints. They take turns, round after round, so
that a change of the machine hits all alike. Where counts, samples or losses differ the comparison is void: exit 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_planner.arch import from_config
from lora_planner.model import Model
from lora_planner.record import RunSpec
from runner import adapt, base, measure
from runner.tasks import Task, probe
from runner.train import BETAS, Progress, Supervised, optimizer_for, train

ROOT = Path(__file__).parents[1]
WARM_UP = 2  # steps of each round that are not counted
AGREE = 1e-4  # nats a token
STEP, TURN = "step", "begin to begin"
OURS, TRAINER, SFT = "runner.train", "transformers Trainer", "TRL SFTTrainer"
# fmt: off
SIZES = {
    "hidden 128": base.Recipe("qwen3", 128, 4, 4, 2, 384, steps=20, batch=8, seq_len=128, vocab=2048),
    "hidden 512": base.Recipe("qwen3", 512, 4, 8, 4, 1536, steps=7, batch=8, seq_len=256, vocab=4096),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Case:
    """What every loop is given: random weights on disk as a config, and random tokens."""

    name: str
    spec: RunSpec
    model: Model
    source: base.Base
    task: Task

    def module(self) -> Any:
        """A new module for each round, always the same weights, and an adapter where the spec asks for one."""
        device = torch.device(self.spec.device)
        module, _ = base.load(self.source, self.spec, device)
        return adapt.attach(module, self.model, self.spec.plan_method(), self.spec.seed)

    def rows(self) -> list[dict[str, list[int]]]:
        """The samples in the order in which our loop takes them."""
        stream = Supervised(self.spec, None, self.task, torch.device("cpu"))
        chosen = [s for step in range(self.spec.steps) for micro in stream.micro_batches(step) for s in micro]
        return [{"input_ids": list(s.tokens), "labels": list(s.labels)} for s in chosen]


@dataclass(slots=True)
class Lap:
    """One loop's turn: when its steps began and ended, and what it trained, to compare."""

    begun: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    trainable: int = 0
    strange: str = ""  # why it cannot be compared

    def median(self, kind: str) -> float:
        """Seconds of the median step after the warm-up, alone or with all that a loop does until the next begins."""
        turns = [later - earlier for earlier, later in zip(self.begun, self.begun[1:], strict=False)]
        return measure.summary(self.step_s if kind == STEP else turns, WARM_UP)[0]


class Quiet:
    """Hooks of our loop that note when a step begins; on CUDA phases wait for the device, as in a run."""

    def __init__(self, lap: Lap, device: torch.device) -> None:
        self.lap, self.peaks = lap, measure.Peaks(device)

    def phase(self, name: str) -> AbstractContextManager[None]:
        if name == "gradients":
            self.lap.begun.append(perf_counter())
        return self.peaks.phase(name)

    def stepped(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None: ...


def ours(case: Case, directory: Path) -> Lap:
    spec, device, lap, progress = case.spec, torch.device(case.spec.device), Lap(), Progress()
    module = case.module()
    objective = Supervised(spec, module, case.task, device)
    optimizer = optimizer_for(module, spec)
    train(spec, module, objective, optimizer, Quiet(lap, device), progress, case.model.vocab_size)
    lap.step_s, lap.losses = progress.step_s, progress.losses
    lap.trainable = sum(p.numel() for p in adapt.trained(module).values())
    return lap


class Clock(TrainerCallback):
    """Begin and end of each step of a Trainer."""

    def __init__(self, lap: Lap, device: torch.device) -> None:
        self.lap, self.device = lap, device

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        measure.synchronize(self.device)
        self.lap.begun.append(perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        measure.synchronize(self.device)
        self.lap.step_s.append(perf_counter() - self.lap.begun[-1])


def pinned(kind: type[Trainer]) -> Any:
    """The same Trainer, which takes its rows in their order and keeps the tokens and the loss of each step."""

    class Pinned(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **words: Any) -> None:
            self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
            self.losses: list[torch.Tensor] = []
            super().__init__(*args, **words)

        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **words: Any) -> torch.Tensor:
            self.seen.append((inputs["input_ids"], inputs["labels"]))
            loss: torch.Tensor = super().training_step(model, inputs, *args, **words)
            self.losses.append(loss)
            return loss

    return Pinned


def arguments(spec: RunSpec, directory: Path) -> dict[str, Any]:
    """Our loop's settings in the words of TrainingArguments; `adamw_torch` is the optimizer that we build."""
    return {
        "output_dir": str(directory / "out"), "max_steps": spec.steps, "seed": spec.seed,
        "per_device_train_batch_size": spec.micro_batch, "learning_rate": spec.lr, "lr_scheduler_type": "constant", "optim": "adamw_torch", "weight_decay": 0.0,
        "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "adam_epsilon": spec.adam_eps, "max_grad_norm": 0.0,
        "use_cpu": spec.device == "cpu", "bf16": spec.precision == "bf16", "gradient_checkpointing": False,
        "remove_unused_columns": False, "dataloader_pin_memory": False, "report_to": "none",
        "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def theirs(case: Case, kind: type[Trainer], args: TrainingArguments, data: Any, **words: Any) -> Lap:
    lap, module = Lap(), case.module()
    trainer = pinned(kind)(model=module, args=args, train_dataset=data, **words)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Clock(lap, torch.device(case.spec.device)))
    trainer.train()
    lap.losses = [float(loss) for loss in trainer.losses]
    lap.trainable = sum(p.numel() for p in adapt.trained(trainer.model).values())
    for column, batches in zip(("input_ids", "labels"), zip(*trainer.seen, strict=True), strict=True):
        if torch.cat(batches).tolist() != [row[column] for row in case.rows()]:
            lap.strange = f"its {column} are not those it was given"
    return lap


def transformers_trainer(case: Case, directory: Path) -> Lap:
    return theirs(case, Trainer, TrainingArguments(**arguments(case.spec, directory)), case.rows())


def trl_trainer(case: Case, directory: Path) -> Lap:
    """SFTTrainer on tokens: a `labels` column is used as it is, nothing is cut, packed or shuffled."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**arguments(case.spec, directory), packing=False, max_length=None)
    return theirs(case, SFTTrainer, args, Dataset.from_list(case.rows()), processing_class=words_for(case.model))


def words_for(model: Model) -> PreTrainedTokenizerFast:
    """A tokenizer of numbers: SFTTrainer wants one also where the data is tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {str(i): i for i in range(model.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="0")), pad_token="0")


def make_case(size: str, method: str, steps: int | None, device: torch.device, directory: Path) -> Case:
    recipe = SIZES[size]
    path = directory / size.replace(" ", "-")
    path.mkdir(exist_ok=True)
    config = base.hf_config(recipe, recipe.vocab)
    (path / "config.json").write_text(json.dumps(config))
    spec = RunSpec(
        base=path.name, task="probe", init="random", method=method, rank=8, steps=steps or recipe.steps,
        micro_batch=recipe.batch, seq_len=recipe.seq_len, device=device.type,
        precision="bf16" if device.type == "cuda" else "fp32",
    )  # fmt: skip
    task = probe.build(None, recipe.seq_len, 0, n=64, vocab_size=recipe.vocab)
    label = "full" if method == "full" else f"LoRA r{spec.rank} all-linear"
    return Case(f"{size}, {label}", spec, from_config(config), base.Base(path.name, path), task)


def run(
    case: Case, loops: dict[str, Callable[[Case, Path], Lap]], rounds: int, directory: Path
) -> dict[str, list[Lap]]:
    """Laps of each loop, one a round, in turns; a round before them, cold for whoever is first, is dropped."""
    laps: dict[str, list[Lap]] = {name: [] for name in loops}
    for _ in range(1 + rounds):
        for name, loop in loops.items():
            gc.collect()
            laps[name].append(loop(case, directory))
    return {name: turns[1:] for name, turns in laps.items()}


def differences(case: Case, laps: dict[str, list[Lap]]) -> list[str]:
    """Why the loops did not do the same work; empty where they did."""
    reference, found = laps[OURS][0], []
    for name, turns in laps.items():
        for lap in turns:
            if lap.strange:
                found.append(f"{case.name}: {name}: {lap.strange}")
            if lap.trainable != reference.trainable:
                found.append(f"{case.name}: {name} trains {lap.trainable:,} parameters, not {reference.trainable:,}")
            if len(lap.losses) != case.spec.steps:
                found.append(f"{case.name}: {name} took {len(lap.losses)} steps, not {case.spec.steps}")
                continue
            for which, i in (("first", 0), ("last", -1)):
                if not math.isclose(lap.losses[i], reference.losses[i], rel_tol=0.0, abs_tol=AGREE):
                    found.append(f"{case.name}: {name}: {which} loss {lap.losses[i]:.6f}, not {reference.losses[i]:.6f}")  # fmt: skip
    return list(dict.fromkeys(found))


def spread(values: list[float], unit: float = 1.0, form: str = ".1f") -> str:
    """Median over the rounds, with their 10 % and 90 % points."""
    middle, low, high = (format(v / unit, form) for v in measure.summary(values, skip=0))
    return f"{middle} [{low}, {high}]"


def table(case: Case, laps: dict[str, list[Lap]]) -> list[str]:
    spec, mine = case.spec, laps[OURS]
    lines = [
        f"## {case.name}", "",
        f"{mine[0].trainable:,} trained parameters, {spec.batch} x {spec.seq_len} tokens, {spec.precision}, "
        f"{spec.steps} steps a round.", "",
        "| loop | step, ms | over ours | begin to begin, ms | over ours | first loss | last loss |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, turns in laps.items():
        cells = []
        for kind in (STEP, TURN):
            seconds = [lap.median(kind) for lap in turns]
            ratios = [s / lap.median(kind) for s, lap in zip(seconds, mine, strict=True)]
            cells += [spread(seconds, 1e-3), "1" if name == OURS else spread(ratios, form=".3f")]
        first, last = (statistics.median(lap.losses[i] for lap in turns) for i in (0, -1))
        lines.append(f"| {name} | {' | '.join(cells)} | {first:.6f} | {last:.6f} |")
    return [*lines, ""]


def report(tables: list[str], device: torch.device, rounds: int, left_out: str) -> str:
    stamp = measure.environment(device)
    used = ("torch", "transformers", "peft", *(() if left_out else ("trl",)))
    packages = ", ".join(f"{name} {version(name)}" for name in used)
    lines = [
        "# Our loop beside Trainer and SFTTrainer", "",
        f"{stamp['device']}, Python {stamp['python']}, {packages}, commit {stamp['commit']}; one run of "
        f"`python -m benchmarks.loops`, the loops in turns, rounds: {rounds}.",
        "",
        f"Seconds of a round are those of its median step, the first {WARM_UP} left out; the table has the median of "
        "the rounds, after one to warm up, with their 10 % and 90 % points, and of the ratio within a round. Every loop was seen to train the "
        f"same tokens and as many parameters, and its first and last losses are ours to {AGREE:g} nats a token.",
        "",
        "`step`: forward, backward, norm of the gradients and update; ours also picks and collates its samples in it, "
        "which Trainer does before `on_step_begin`. `begin to begin` is all of a step in every loop.",
        "",
        "Random weights and tokens, AdamW of torch (`adamw_torch`, not the fused one), constant learning rate, no "
        "clipping, no logging, no checkpoints. "
        + (left_out or "SFTTrainer also counts entropy and token accuracy in each step."),
        "",
    ]  # fmt: skip
    return "\n".join([*lines, *tables]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time of our loop beside Trainer and SFTTrainer.")
    parser.add_argument("--steps", type=int, help="steps of each loop in a round; default: 20, of the larger model 7")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each loop (default: 9)")
    options = parser.parse_args()
    if options.rounds < 1 or (options.steps is not None and options.steps < WARM_UP + 2):
        parser.error(f"--rounds from 1, --steps from {WARM_UP + 2}: the first {WARM_UP} are not counted")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # as in a sweep, where each run has one

    loops: dict[str, Callable[[Case, Path], Lap]] = {OURS: ours, TRAINER: transformers_trainer}
    missing = [name for name in ("trl", "datasets") if find_spec(name) is None]
    left_out = f"{SFT} was left out: {' and '.join(missing)} not installed." if missing else ""
    if missing:
        print(left_out)
    else:
        import datasets

        datasets.disable_progress_bars()
        loops[SFT] = trl_trainer

    tables, void = [], []
    with TemporaryDirectory() as directory:
        for size in SIZES:
            for method in ("lora", "full"):
                case = make_case(size, method, options.steps, device, Path(directory))
                laps = run(case, loops, options.rounds, Path(directory))
                void += differences(case, laps)
                rows = table(case, laps)
                print("\n".join(rows), flush=True)
                tables += rows
    if void:
        sys.exit("The comparison is void, nothing was written:\n" + "\n".join(void))
    (ROOT / "reports/loops.md").write_text(report(tables, device, options.rounds, left_out))


if __name__ == "__main__":
    main()
