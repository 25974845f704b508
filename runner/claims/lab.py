"""Where claims are run: bases made on demand, specs from designs, and the loop that runs what is missing.

A design names a base ("qwen3-1m"); a spec names what made it ("qwen3-1m-77ced89e0ea8"). Claims speak in designs:
a `RunSpec` whose `base` is the bare name and whose learning rate and seed are left open, called an arm.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from calibrate import curves
from calibrate.curves import Optimum
from lora_planner import __version__
from lora_planner.errors import BadInput
from lora_planner.facts import Gpu
from lora_planner.predict import predict
from lora_planner.record import DIVERGED, FINAL, FINISHED, RunRecord, RunSpec
from runner import base, verify
from runner.board import Board
from runner.execute import Place
from runner.sweep import Planned, Workers, slots, sweep

#: neighbouring learning rates of a grid: a parabola through five spans a factor of 6.5. With factors of 2 the upper
#: neighbours of full fine-tuning diverge, a factor of 4 above its best rate
STEP = 1.6
#: points of a parabola have lost at most this share of the best gain
NEAR = 0.3
#: rounds of extension; `curves.missing_rates` needs fewer, this is a belt
ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Size:
    """Everything that differs between a claim on two cores and on a data-centre GPU.

    base, narrow, wide, moe, sums    names of bases: the main one, half and twice its width, a mixture, one for RL
    ranks           of the shared sweep; at most a quarter of the width
    steps           of its runs, `micro_batch` windows of `seq_len` tokens each
    eval_at         steps with a held-out loss, besides the first and the last
    short           a run of so many steps is short: its optimum is read off the same runs, whose rate is constant
    compared_at     step at which widths are compared
    full_rates, lora_rates    the grids to begin with
    """

    base: str
    narrow: str
    wide: str
    moe: str
    sums: str
    ranks: tuple[int, ...]
    steps: int
    micro_batch: int
    seq_len: int
    eval_at: tuple[int, ...]
    short: int
    compared_at: int
    full_rates: tuple[float, ...]
    lora_rates: tuple[float, ...]
    precision: str = "fp32"


# fmt: off
SIZES = {
    "cpu": Size("qwen3-1m", "qwen3-w64", "qwen3-w256", "moe-2m", "qwen3-1m-sums", (1, 4, 16, 32), 200, 4, 128,
                (5, 10, 20, 30, 50, 75, 100, 150), 30, 100,
                (4e-4, 6.3e-4, 1e-3, 1.6e-3, 2.5e-3), (8e-4, 1.25e-3, 2e-3, 3.2e-3, 5e-3)),
    "gpu": Size("qwen3-30m", "qwen3-30m-w256", "qwen3-30m-w768", "moe-2m", "qwen3-30m-sums", (1, 4, 16, 64, 128), 1000, 16, 256,
                (5, 10, 20, 50, 100, 200, 400, 700), 50, 400,
                (5e-5, 8e-5, 1.25e-4, 2e-4, 3.2e-4), (5e-4, 8e-4, 1.25e-3, 2e-3, 3.2e-3), "bf16"),
}
# fmt: on
#: of what is judged; designs were tried out, and rules mended, with the seeds before them
SEEDS = (6, 7, 8, 9, 10)
#: of designs that are dear and whose effects are large
FEW = SEEDS[:3]
#: what tells two arms apart: all that is not open in a design
_ARM = operator.attrgetter(*(f.name for f in fields(RunSpec) if f.name not in ("base", "lr", "seed", "device")))


def arm(size: Size, method: str = "full", rank: int = 0, **words: Any) -> RunSpec:
    """A design: full fine-tuning of the main base on the domain shift, or LoRA with the unembedding, as in the paper."""
    lora = {} if method == "full" else {"targets": ("all-linear", "unembed")}
    plain = RunSpec(
        base=size.base, task="shift", method=method, rank=rank, alpha=0.0 if method == "full" else 32.0, lr=0.0,
        steps=size.steps, micro_batch=size.micro_batch, seq_len=size.seq_len, eval_at=size.eval_at,
        precision=size.precision, **lora,
    )  # fmt: skip
    return replace(plain, **words)


def base_name(key: str) -> str:
    """
    >>> base_name("qwen3-1m-77ced89e0ea8")
    'qwen3-1m'
    """
    return key.rpartition("-")[0]


def is_of(run: RunRecord, design: RunSpec) -> bool:
    """Whether a run is one of this arm: equal in all but the open fields. Reruns of a seed are not."""
    return base_name(run.spec.base) == design.base and bool(_ARM(run.spec) == _ARM(design))


def as_design(spec: RunSpec) -> RunSpec:
    """What was asked for when this spec was made: the base by its name, the device open."""
    return replace(spec, base=base_name(spec.base), device="cpu")


def of_arm(runs: Iterable[RunRecord], design: RunSpec) -> list[RunRecord]:
    """Runs of one arm. Two bases of one name (other libraries, another text, another processor's last bits) are two
    studies and are refused."""
    found = [run for run in runs if is_of(run, design)]
    bases = {(run.spec.base, w) for run in found if (w := run.measured.get("base", {}).get("weights"))}
    if len({run.spec.base for run in found}) > 1 or len(bases) > 1:
        raise BadInput(f"runs of two bases called {design.base}", "journal",
                       "They were made by other libraries, text or processors: give one journal for each.")  # fmt: skip
    return found


def loss_at(run: RunRecord, step: int | None) -> float | None:
    """Held-out nats (or reward) after `step` (None: the last one); None where the run did not get there."""
    points = {int(s): value for s, value in run.measured.get("held_out") or []}
    return points.get(run.spec.steps if step is None else step)


def points(runs: Sequence[RunRecord], design: RunSpec, seed: int, step: int | None = None) -> dict[float, float | None]:
    """Learning rate -> held-out nats of an arm; None: diverged before that step. Runs that ended otherwise (out of
    memory, invalid) or not yet say nothing about a loss and are left out."""
    found: dict[float, float | None] = {}
    for run in of_arm(runs, design):
        if run.spec.seed == seed and run.status in (FINISHED, DIVERGED):
            found[run.spec.lr] = loss_at(run, step)
    return dict(sorted(found.items()))


def mean_points(runs: Sequence[RunRecord], design: RunSpec, seeds: Sequence[int], step: int | None = None,
                ) -> dict[float, float | None]:  # fmt: skip
    """Means over seeds of the rates that every seed has; None where one seed diverged."""
    every = [points(runs, design, seed, step) for seed in seeds]
    shared = sorted(set.intersection(*(set(p) for p in every))) if every else []
    found: dict[float, float | None] = {}
    for rate in shared:
        losses = [p[rate] for p in every]
        known = [loss for loss in losses if loss is not None]
        found[rate] = sum(known) / len(known) if len(known) == len(losses) else None
    return found


def negated(found: Mapping[float, float | None]) -> dict[float, float | None]:
    """Rewards as something to minimise."""
    return {rate: None if value is None else -value for rate, value in found.items()}


def optimum(runs: Sequence[RunRecord], design: RunSpec, seed: int, step: int | None = None) -> Optimum | None:
    """The fitted optimum of one seed. The parabola goes through points that have most of the best gain, since far from
    the best rate the curve is none; where that one has no lowest point among them, through all neighbours."""
    known = points(runs, design, seed, step)
    losses = [loss for loss in known.values() if loss is not None]
    if not losses:
        return None
    if design.objective == "rl":
        known = negated(known)
        window = NEAR * (max(losses) - start(runs, design))
    else:
        window = NEAR * (start(runs, design) - min(losses))
    near = curves.best_rate(known, window if window > 0 else None)
    return near if near is None or near.bracketed else curves.best_rate(known)


def start(runs: Sequence[RunRecord], design: RunSpec) -> float:
    """Held-out nats (or reward) before the first step; the same for every run of a base and task. nan where none
    got so far."""
    known = (float(run.measured["held_out"][0][1]) for run in of_arm(runs, design) if run.measured.get("held_out"))
    return next(known, math.nan)


def why_not(runs: Sequence[RunRecord], design: RunSpec, seeds: Sequence[int] = SEEDS, step: int | None = None) -> str:
    """What keeps these seeds from an optimum with two finite points on each side, for a verdict of undecided; "" if
    nothing does."""
    name = f"{design.method} r{design.rank}" if design.method != "full" else "full"
    for seed in seeds:
        if not points(runs, design, seed, step):
            return f"{name} on {design.base} has no run of seed {seed}"
        best = optimum(runs, design, seed, step)
        if best is None:
            return f"every rate of {name} diverged"
        if not best.bracketed and min(best.finite_left, best.finite_right) >= curves.BESIDE:
            return f"{name}, seed {seed}: no parabola has its lowest point among the rates around the best"
        if not best.bracketed:
            return (f"the best rate of {name}, seed {seed}, has {best.finite_left} finite points below and "
                    f"{best.finite_right} above, two are needed")  # fmt: skip
    return ""


def grid(runs: Sequence[RunRecord], design: RunSpec, rates: Sequence[float], seeds: Sequence[int] = SEEDS,
         steps: Sequence[int | None] = (None,), rewards: bool = False) -> list[RunSpec]:  # fmt: skip
    """An arm at all rates wanted so far: those to begin with, and, once these have ended, what lies beyond an end
    at which the best of any seed lies, read at each of `steps`."""
    wanted = set(rates)
    tried = {(run.spec.seed, run.spec.lr) for run in of_arm(runs, design) if run.is_final}
    if tried >= {(seed, rate) for seed in seeds for rate in rates}:
        for step in steps:
            for seed in seeds:
                known = points(runs, design, seed, step)
                wanted |= set(known) | set(curves.missing_rates(negated(known) if rewards else known, STEP))
    return [replace(design, lr=rate, seed=seed) for seed in seeds for rate in sorted(wanted)]


@dataclass(slots=True)
class Lab:
    """A machine with a journal, on which designs become runs."""

    out: Path
    home: Path
    size_name: str
    kind: str
    gpu: Gpu
    cores: int
    bases: dict[str, base.Base] = field(default_factory=dict)

    @classmethod
    def here(cls, out: Path, home: Path, size: str | None) -> Lab:
        kind, gpu = verify.device()
        chosen = size or ("gpu" if kind == "cuda" else "cpu")
        if chosen not in SIZES:
            raise BadInput(f"no size is called {chosen!r}", "--size", f"Known: {', '.join(SIZES)}.")
        return cls(out, home, chosen, kind, gpu, verify.core_count())

    @property
    def size(self) -> Size:
        return SIZES[self.size_name]

    def spec(self, design: RunSpec) -> RunSpec:
        """The design on this device, with its base made or found."""
        if design.base not in self.bases:
            self.bases[design.base] = verify.own_base(design.base, self.home, self.kind, self.cores)
        return replace(design, base=self.bases[design.base].key, device=self.kind)

    def run(self, designs: Sequence[RunSpec]) -> list[RunRecord]:
        """Sweep them; what has ended before is not repeated."""
        specs = [self.spec(design) for design in designs]
        place = Place(self.out, {b.key: b.path for b in self.bases.values()})
        stamp = f"lora-plan {__version__}"
        planned = [Planned(s, c, predict(s, c, self.gpu), stamp) for s in specs for c in (place.base(s.base).config(),)]
        workers = slots(self.kind, torch.cuda.device_count(), self.cores)
        board = Board(len(workers))
        try:
            return sweep(self.out, planned, Workers(workers, place.to_json()), board)
        finally:
            board.close()


def complete(lab: Lab, read: Callable[[], list[RunRecord]], wanted: Callable[[list[RunRecord]], list[RunSpec]]) -> None:
    """Run what a claim wants, look, and run what it wants then, until it wants nothing that has not ended."""
    for _ in range(ROUNDS):
        runs = read()
        done = {run.spec for run in runs if run.status in FINAL}
        left = [d for d in dict.fromkeys(wanted(runs)) if lab.spec(d) not in done]
        if not left:
            return
        lab.run(left)
