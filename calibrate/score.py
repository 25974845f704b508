"""Predicted when planned, against measured: every run counts, also those that went wrong."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_planner.errors import UnknownName
from lora_planner.facts import CPU, gpu
from lora_planner.ledger import Estimate
from lora_planner.predict import PROBE
from lora_planner.record import DIVERGED, FINISHED, OOM, RunRecord, Score
from lora_planner.throughput import OWN_STACK
from lora_planner.units import GIB

QUANTITIES = ("trainable", "peak_bytes", "step_s", "tokens_per_s")
#: these steps warm caches and allocators up
WARM_UP = 2
#: below this share of the wall clock another process had the core for a part of the step
OWN_SHARE = 0.9
#: how many of its own half-widths a prediction may be off before it contradicts the measurement
MISS = 3.0
MODEL_MISS = "E-MODEL-MISS"
WORST = 10


def step_seconds(run: RunRecord) -> tuple[float, str] | None:
    """Median seconds of a step and which clock they are of, or None where a run took no step after the warm-up.

    On a CPU that other processes share, wall clock measures them too: where processor time is below 0.9 of it,
    processor time is what a step takes.
    """
    wall = run.measured.get("step_s", [])[WARM_UP:]
    if not wall:
        return None
    seconds = statistics.median(wall)
    own = run.measured.get("step_cpu_s", [])[WARM_UP:]
    if run.spec.device == CPU and own and 0 < statistics.median(own) < OWN_SHARE * seconds:
        return statistics.median(own), "processor time"
    return (seconds, "wall clock") if seconds > 0 else None


def training_peak(run: RunRecord) -> float | None:
    """Bytes of the largest phase of a training step; an evaluation without gradients is none."""
    phases = {name: size for name, size in (run.measured.get("peak_bytes") or {}).items() if name != "evaluate"}
    return float(max(phases.values())) if phases else None


def measured(run: RunRecord) -> dict[str, float]:
    """What a run came to, by the names of its prediction; without what it did not get to."""
    found: dict[str, float | None] = {"trainable": run.measured.get("trainable"), "peak_bytes": training_peak(run)}
    seconds = step_seconds(run)
    if seconds:
        tokens = run.measured.get("tokens_per_step")
        found |= {"step_s": seconds[0], "tokens_per_s": tokens / seconds[0] if tokens else None}
    return {name: float(value) for name, value in found.items() if value is not None}


def device_name(run: RunRecord) -> str:
    """The planner's name of the device, or what it calls itself."""
    reported = str(run.env.get("device") or run.spec.device)
    try:
        return gpu(reported).name
    except UnknownName:
        return reported


def scores(runs: Iterable[RunRecord]) -> list[Score]:
    """Every quantity that was predicted and measured, of runs that finished or diverged."""
    return [
        Score(name, OWN_STACK, device_name(run), run.key, run.spec.label(), run.predicted[name], value,
              run.spec.task == PROBE)
        for run in runs
        if run.status in (FINISHED, DIVERGED)
        for name, value in measured(run).items()
        if name in run.predicted
    ]  # fmt: skip


def error(score: Score) -> float:
    """|measured / predicted - 1|"""
    return abs(score.ratio - 1)


def half_widths(predicted: Estimate, value: float) -> float:
    """How many of its own half-widths a prediction is off, on the side where it is off and on a log scale.

        ln(measured / predicted) / ln(high / predicted),   or with low where it is too large

    >>> round(half_widths(Estimate(50, 100, 200, "s", "fitted"), 800), 6)
    3.0
    """
    if value == predicted.value:
        return 0.0
    if min(predicted.low, predicted.value, value) <= 0:
        return 0.0 if predicted.low <= value <= predicted.high else math.inf
    end = predicted.high if value > predicted.value else predicted.low
    width = abs(math.log(end / predicted.value))
    return abs(math.log(value / predicted.value)) / width if width else math.inf


def model_miss(score: Score) -> bool:
    """Off by more than 3 times its own interval: the formula is wrong here, not the noise."""
    return half_widths(score.predicted, score.measured) > MISS * (1 + 1e-9)


def scoreboard(found: Sequence[Score], runs: Iterable[RunRecord]) -> str:
    """A page of Markdown. The same records give the same bytes, in whatever order they come."""
    every = sorted(runs, key=lambda run: run.key)
    ordered = sorted(found, key=lambda s: (QUANTITIES.index(s.quantity), s.stack, s.gpu, s.key))
    return "\n".join([
        "# Predicted before the run, measured after it", "",
        "`ratio` is measured / predicted, `error` is |ratio - 1|, `covered` is the share of measurements inside the "
        "90 % interval. `fed a fit`: runs whose measurements later fed the constants; all predictions are those "
        "written before the run started.", "",
        *_table(ordered), "",
        "## Runs by status", "", *_statuses(every), "",
        "## Worst misses", "", *_misses(ordered, every), "",
    ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One quantity on one device: measured / predicted from the 5 to the 95 % quantile, and errors."""

    quantity: str
    stack: str
    device: str
    n: int
    ratio: Estimate
    median_error: float
    worst_error: float
    covered: int
    fitted: int


def accuracy(found: Iterable[Score]) -> list[Accuracy]:
    """Rows in the order of the scoreboard."""
    groups: dict[tuple[int, str, str], list[Score]] = defaultdict(list)
    for score in found:
        groups[QUANTITIES.index(score.quantity), score.stack, score.gpu].append(score)
    rows = []
    for (place, stack, device), some in sorted(groups.items()):
        ratios, errors = [s.ratio for s in some], [error(s) for s in some]
        low, high = ends(ratios)
        middle = Estimate(low, statistics.median(ratios), high, "measured / predicted", "exact")
        rows.append(Accuracy(QUANTITIES[place], stack, device, len(some), middle, statistics.median(errors), max(errors),
                             sum(s.covered for s in some), sum(s.fitted for s in some)))  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True)
class Miss:
    """A measurement outside its interval. `widths`: how many of the interval's half-widths it is off."""

    score: Score
    widths: float
    contradicts: bool


def misses(found: Sequence[Score]) -> tuple[list[Miss], int]:
    """The worst ones, with every one that contradicts its prediction; and how many more there are."""
    every = [Miss(s, half_widths(s.predicted, s.measured), model_miss(s)) for s in found if not s.covered]
    every.sort(key=lambda m: (-m.widths, m.score.key))
    shown = every[: max(WORST, sum(m.contradicts for m in every))]
    return shown, len(every) - len(shown)


def ends(ratios: Sequence[float]) -> tuple[float, float]:
    """The 5 and 95 % quantiles, straight between measurements.

    >>> ends([1.0]), ends([0.0, 1.0])
    ((1.0, 1.0), (0.05, 0.95))
    """
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    cuts = statistics.quantiles(ratios, n=20, method="inclusive")
    return cuts[0], cuts[-1]


def _table(found: Sequence[Score]) -> list[str]:
    lines = [
        "| quantity | stack | device | n | median ratio | median error | worst error | covered | fed a fit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = accuracy(found)
    lines += [
        f"| {a.quantity} | {a.stack} | {a.device} | {a.n} | {a.ratio.value:.3f} | {a.median_error:.1%} | {a.worst_error:.1%} "
        f"| {a.covered} of {a.n} | {a.fitted} of {a.n} |"
        for a in rows
    ]
    return lines if rows else ["Nothing was both predicted and measured."]


def _statuses(runs: Sequence[RunRecord]) -> list[str]:
    counted = Counter(run.status for run in runs)
    rows = [f"| {status} | {n} |" for status, n in sorted(counted.items())]
    return ["| status | runs |", "|---|---|", *rows, f"| all | {len(runs)} |"]


def _misses(found: Sequence[Score], runs: Sequence[RunRecord]) -> list[str]:
    """Contradictions first, then what is farthest outside its interval, then runs that died for memory."""
    shown, more = misses(found)
    lines = [
        f"- {MODEL_MISS + ' ' if m.contradicts else ''}`{m.score.key}` {m.score.label}: {m.score.quantity} predicted "
        f"{_number(m.score.quantity, m.score.predicted.value)} [{_number(m.score.quantity, m.score.predicted.low)}, "
        f"{_number(m.score.quantity, m.score.predicted.high)}], measured {_number(m.score.quantity, m.score.measured)}"
        for m in shown
    ]
    if more:
        lines.append(f"- and {more} more outside their interval")
    for run in runs:
        if run.status == OOM:
            peak = run.predicted.get("peak_bytes")
            foretold = (
                f"a peak of {_number('peak_bytes', peak.value)} was predicted" if peak else "no peak was predicted"
            )
            lines.append(f"- `{run.key}` {run.spec.label()}: out of memory, {foretold}")
    return lines or ["None: every measurement lies inside its interval."]


def _number(quantity: str, value: float) -> str:
    if quantity == "peak_bytes":
        return f"{value / GIB:.4g} GiB"
    return f"{value:,.0f}" if quantity == "trainable" else f"{value:.4g}"
