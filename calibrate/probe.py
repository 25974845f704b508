"""From the probe to constants of one device: what a plan uses instead of the packaged guesses.

A probe is eight short runs, {LoRA, full} x two lengths x two micro-batches, of one model on one device. Their
seconds determine the efficiencies of throughput.step_time, their peaks what memory.memory leaves unexplained.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.stats import t as student

from calibrate.score import measured, step_seconds
from lora_planner.arch import from_config
from lora_planner.errors import BadInput
from lora_planner.facts import CPU, Constant, Gpu
from lora_planner.ledger import FITTED, Estimate
from lora_planner.predict import PROBE, memory_plan, step_work
from lora_planner.record import FINISHED, RunRecord
from lora_planner.throughput import OWN_STACK, Stack, Work, stack, step_time

#: fitted names with the range in which a value means something. Efficiencies are relative to a peak; traffic
#: is relative to unfused kernels, so that caches may beat the bandwidth of main memory
RANGES = {
    "matmul_efficiency": (1e-3, 1.0), "attention_efficiency": (1e-3, 1.0), "adapter_efficiency": (1e-3, 1.0),
    "memory_efficiency": (1e-3, 10.0), "launch_s": (1e-8, 1e-2),
}  # fmt: skip
#: fewer runs than this determine nothing beside the prior
LEAST = 4
#: s.d. of ln(seconds) of one run that is repeated: how much a run weighs against the priors
NOISE = 0.03
#: no interval is narrower: the same run an hour later. A virtual machine's core took 0.098 s and 0.119 s for one
#: step within half an hour; a GPU of one's own has clocks, but no neighbours
FLOOR = {True: math.log(1.2), False: math.log(1.05)}  # by: is it a CPU
BYTES_FLOOR = math.log(1.03)  # bytes do not depend on the hour
Z90 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class Timed:
    """One probe run: what it asked of the device, and the seconds that it took."""

    key: str
    work: Work
    seconds: float
    clock: str


def usable(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Finished probe runs, of which there must be enough."""
    found = [run for run in runs if run.spec.task == PROBE and run.status == FINISHED]
    if len(found) < LEAST:
        raise BadInput(f"{len(found)} finished probe runs determine no constants", "calibrate",
                       f"Run the probe again: at least {LEAST} of its runs must finish.")  # fmt: skip
    return found


def fit(runs: Sequence[RunRecord], gpu: Gpu, stack_name: str = OWN_STACK) -> list[Constant]:
    """Efficiencies, seconds a launch, and the spread of one device, each with a 90 % interval.

        min over theta  sum ((ln seconds - ln step_time(theta)) / NOISE)^2 + sum ((theta - prior) / sd)^2

    theta are the logs of the five constants of RANGES; prior and sd come from the packaged row, whose
    interval is read as the 90 % of a log-normal distribution, so that eight runs determine five numbers, and what they leave
    open stays as wide as it was. Intervals: the Jacobian at the optimum, times the residuals' s.d. over NOISE
    where that is above 1. The spread is that of runs left out of the fit, one at a time, never of its own
    residuals.
    """
    timed = [_timed(run, gpu) for run in usable(runs)]
    prior = stack(stack_name, gpu)
    theta, half = _solve(timed, gpu, prior)
    keys = ", ".join(t.key for t in timed)
    clock = "processor time: other processes ran; " if any(t.clock != "wall clock" for t in timed) else ""
    source = f"{clock}probe of {len(timed)} runs: {keys}"
    rows = []
    for (name, (least, most)), x, h in zip(RANGES.items(), theta, half, strict=True):
        low, high = max(least, math.exp(x - h)), min(most, math.exp(x + h))
        rows.append(Constant(name, stack_name, gpu.name, math.exp(x), low, high, FITTED, len(timed), source))
    left_out = []
    for i, one in enumerate(timed):
        rest, _ = _solve([*timed[:i], *timed[i + 1 :]], gpu, prior)
        left_out.append(math.log(one.seconds / _seconds(one.work, gpu, prior, rest)))
    band = _band(left_out, FLOOR[gpu.form == CPU])
    how = f"each run left out of the fit once: r.m.s. log error {_rms(left_out):.3f}; {source}"
    rows.append(Constant("spread", stack_name, gpu.name, 1.0, 1 / band, band, FITTED, len(timed), how))
    return rows


def fit_memory(runs: Sequence[RunRecord], gpu: Gpu, stack_name: str = OWN_STACK) -> list[Constant]:
    """What the formulas leave unexplained, the interval of a peak, and on CUDA workspace and allocator.

        min  sum (((1 + unexplained) allocated + workspace) / measured - 1)^2,  workspace >= 0, and 0 on a CPU
        peak_ratio          measured / predicted by the fit of the other runs
        allocator_fraction  (reserved - measured) / (measured - base), the median

    Intervals of the fitted ones: the ends over fits that leave one run out.
    """
    found = []
    for run in usable(runs):
        peak = measured(run).get("peak_bytes")
        if peak:
            found.append((run, memory_plan(run.spec, from_config(run.config), gpu), peak))
    if len(found) < LEAST:
        return []
    counted, peaks = np.array([plan.allocated for _, plan, _ in found]), np.array([peak for *_, peak in found])
    context = gpu.form != CPU
    best = _line(counted, peaks, context)
    others = [_line(np.delete(counted, i), np.delete(peaks, i), context) for i in range(len(found))]
    off = [math.log(y / (line[0] * x + line[1])) for x, y, line in zip(counted, peaks, others, strict=True)]
    source = f"probe of {len(found)} runs: {', '.join(run.key for run, _, _ in found)}"

    def row(name: str, value: float, every: Sequence[float], how: str = "") -> Constant:
        low, high = min(value, *every), max(value, *every)
        return Constant(name, stack_name, gpu.name, value, low, high, FITTED, len(found), how + source)

    band = _band(off, BYTES_FLOOR)
    rows = [
        row("unexplained", best[0] - 1, [line[0] - 1 for line in others]),
        row("peak_ratio", 1.0, (1 / band, band), "each run left out of the fit once; "),
    ]
    if context:
        rows.append(row("workspace_bytes", best[1], [line[1] for line in others]))
    reserved = [
        (run.measured["reserved_bytes"] - peak) / (peak - plan.phases["load"]["weights"])
        for run, plan, peak in found
        if run.measured.get("reserved_bytes") and peak > plan.phases["load"]["weights"]
    ]
    if reserved:
        rows.append(row("allocator_fraction", statistics.median(reserved), reserved))
    return rows


def _line(counted: np.ndarray, peaks: np.ndarray, workspace: bool) -> tuple[float, float]:
    """Slope and intercept of measured over counted bytes, both >= 0, every run of the same relative weight."""
    columns = [counted / peaks, 1 / peaks] if workspace else [counted / peaks]
    scale = [float(np.max(column)) for column in columns]
    solved, _ = nnls(np.array(columns).T / scale, np.ones(len(peaks)))
    slope, *rest = (float(x / s) for x, s in zip(solved, scale, strict=True))
    return slope, rest[0] if rest else 0.0


def _timed(run: RunRecord, gpu: Gpu) -> Timed:
    seconds = step_seconds(run)
    if seconds is None:
        raise BadInput("a probe run without timed steps", run.key, "A probe needs more than two steps.")
    return Timed(run.key, step_work(run.spec, from_config(run.config), gpu), *seconds)


def _seconds(work: Work, gpu: Gpu, prior: Stack, theta: np.ndarray) -> float:
    own = {name: replace(prior.rows[name], value=math.exp(x)) for name, x in zip(RANGES, theta, strict=True)}
    return step_time(work, gpu, Stack(prior.name, prior.gpu, prior.rows | own)).total


def _solve(timed: Sequence[Timed], gpu: Gpu, prior: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Logs of the constants at the optimum, and the half-widths of their 90 % intervals."""
    rows = [prior.rows[name] for name in RANGES]
    centre = np.log([row.value for row in rows])
    sd = np.array([math.log(row.high / row.low) / (2 * Z90) for row in rows])
    bounds = np.log(list(RANGES.values())).T
    seconds = np.log([t.seconds for t in timed])

    def residuals(theta: np.ndarray) -> np.ndarray:
        model = np.log([_seconds(t.work, gpu, prior, theta) for t in timed])
        return np.concatenate([(seconds - model) / NOISE, (theta - centre) / sd])

    start = np.clip(centre, bounds[0] + 1e-6, bounds[1] - 1e-6)
    found = least_squares(residuals, start, bounds=(bounds[0], bounds[1]), x_scale="jac")
    scale = max(1.0, _rms(found.fun[: len(timed)]))
    covariance = np.linalg.inv(found.jac.T @ found.jac)
    return found.x, Z90 * scale * np.sqrt(np.diag(covariance))


def _rms(errors: Sequence[float] | np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


def _band(errors: Sequence[float], floor: float) -> float:
    """The factor that 90 % of further errors of this r.m.s. stay within: Student's t, and at least e^floor."""
    return math.exp(max(floor, float(student.ppf(0.95, len(errors))) * _rms(errors)))


# ---------------------------------------------------------------- did it help


@dataclass(frozen=True, slots=True)
class Errors:
    """|measured / predicted - 1| of one quantity over runs that no constant was fitted on."""

    quantity: str
    n: int
    median_before: float
    worst_before: float
    covered_before: int
    median_after: float
    worst_after: float
    covered_after: int


Predictions = Mapping[str, Mapping[str, Estimate]]


def errors(runs: Sequence[RunRecord], before: Predictions, after: Predictions) -> list[Errors]:
    """By quantity, for finished runs outside the probe, predictions by run key before and after the fit."""
    held_out = [run for run in runs if run.spec.task != PROBE and run.status == FINISHED]
    by_quantity: dict[str, list[tuple[float, Estimate, Estimate]]] = {}
    for run in held_out:
        for name, value in measured(run).items():
            old, new = before.get(run.key, {}).get(name), after.get(run.key, {}).get(name)
            if old and new:
                by_quantity.setdefault(name, []).append((value, old, new))
    return [
        Errors(
            name, len(rows), *_quality([(v, old) for v, old, _ in rows]), *_quality([(v, new) for v, _, new in rows])
        )
        for name, rows in by_quantity.items()
    ]


def _quality(rows: Sequence[tuple[float, Estimate]]) -> tuple[float, float, int]:
    """Median and worst error, and how many lie inside their interval."""
    every = [abs(value / e.value - 1) for value, e in rows]
    return statistics.median(every), max(every), sum(e.low <= value <= e.high for value, e in rows)
