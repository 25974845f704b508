"""C10. A low rank follows the others, then leaves them at a step that grows with the rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate import curves
from calibrate.stats import mean_interval, one_sided, slope_by_group
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, SIZES, Size, of_arm
from runner.claims.shared import LWR, best_run, count, full, held_out, lora, name, unready
from runner.claims.shared import specs as sweep

#: nats by which a curve has left another
LEFT = 0.02
#: ways to fail, each with a test of its own
CHANCES = 3
SENTENCE = ("Each rank follows the curve of the largest until a step that grows with the rank, and goes on learning "
            "more slowly after it; before that the loss falls linearly in the log of the steps.")  # fmt: skip
SOURCE = LWR + ", 'LoRA rank'"
PUBLISHED = "ranks fall off the minimum-loss curve at steps that correlate with the rank; no numbers"
UNIT = "d ln(step) / d ln(rank)"
METRIC = ("slope of ln(departure step) over ln(rank), departure from the largest rank's curve by 0.02 nats for good; "
          "curves are the pointwise minimum over learning rates, as in the paper")  # fmt: skip
RULE = ("Holds if the slope over seeds is above 0 (one-sided t test, 5 %) and each rank that left still improves by the "
        "last step on average; fails if the slope is below 0, if a rank gets worse (one-sided t tests over seeds, corrected for "
        "the ranks), or if two ranks have left for good by the first evaluation, step 5, in every seed and are then more than "
        "0.02 nats behind (one-sided t tests over seeds, the second smallest p times the ranks less one); p times three for "
        "these three; undecided where fewer than two ranks leave. Control: rank 1 must leave.")  # fmt: skip
TRAPS = (1, 5, 10, 13)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return sweep(size, runs, size.ranks)


def enveloped(runs: Sequence[RunRecord], design: RunSpec, seed: int) -> list[tuple[int, float]]:
    """Pointwise minimum over the rates of this arm and seed, which no single run need follow."""
    paths = [held_out(run)[1:] for run in of_arm(runs, design) if run.spec.seed == seed and run.final_loss is not None]
    return curves.envelope(paths)


def crossing(reference: curves.Curve, other: curves.Curve) -> float | None:
    """Step at which `other` leaves for good, between two evaluations by the straight line of the gap over ln(step).

    The last evaluation would do for an answer, but seeds that agree on it to the step would look free of noise.
    """
    step = curves.departure(reference, other, LEFT)
    if step is None:
        return None
    known = dict(reference)
    gaps = [(at, loss - known[at]) for at, loss in other if at in known and at <= step]
    if len(gaps) < 2 or gaps[-2][1] >= gaps[-1][1]:
        return float(step)
    (before, low), (after, high) = gaps[-2:]
    share = (LEFT - low) / (high - low)
    return before * (after / before) ** min(max(share, 0.0), 1.0)


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    designs = [lora(s, rank) for rank in s.ranks]
    if (missing := unready("C10", runs, designs)) is not None:
        return missing
    left: dict[int, list[float | None]] = {}
    later: dict[int, list[float]] = {}  # last loss minus that at the first evaluation after leaving
    for rank in s.ranks[:-1]:
        left[rank], later[rank] = [], []
        for seed in SEEDS:
            path = enveloped(runs, lora(s, rank), seed)
            step = crossing(enveloped(runs, designs[-1], seed), path)
            left[rank].append(step)
            after = [loss for at, loss in path if step is not None and at >= step]
            if len(after) > 1:
                later[rank].append(after[-1] - after[0])
    always = [rank for rank in left if all(step is not None for step in left[rank])]
    first = s.eval_at[0]
    listed = ", ".join(f"rank {rank} at {', '.join(f'{step:.0f}' if step else 'never' for step in steps)}"
                       for rank, steps in left.items())  # fmt: skip
    sentence = f"left rank {s.ranks[-1]} by {LEFT} nats: {listed} (by seed)" + line(runs, s)
    seen = s.ranks[0] in always
    control = f"rank {s.ranks[0]} leaves in every seed: {'found' if seen else 'not found'}"
    plot = picture(runs, s)
    at_once = [rank for rank in always if all(step == first for step in left[rank] if step)]
    never = min(1.0, CHANCES * leaving_at_once(runs, s)) if len(at_once) > 1 else 1.0
    if seen and never < 0.05:
        sentence += f"; ranks {', '.join(map(str, at_once))} have left by the first evaluation, so they never follow"
        return Verdict("C10", FAILS, sentence, n=count(runs, designs), p=never, control=control, plot=plot)
    if not seen or len(always) < 2:
        return Verdict("C10", UNDECIDED, sentence, n=count(runs, designs), control=control, plot=plot)
    x = [math.log(rank) for rank in always]
    groups = [(x, [math.log(left[rank][i] or 1) for rank in always]) for i in range(len(SEEDS))]
    effect = replace(slope_by_group(groups), unit=UNIT)
    slopes = [slope_by_group([group]).value for group in groups]
    above, below = one_sided(slopes), one_sided(slopes, greater=False)
    stalled = {rank: one_sided(changes) for rank, changes in later.items() if len(changes) == len(SEEDS)}
    worse = min([1.0, *(p * len(stalled) for p in stalled.values())])
    better = all(mean_interval(changes).value < 0 for changes in later.values() if changes)
    holds, fails = above if better else 1.0, min(1.0, CHANCES * min(below, worse))
    status = HOLDS if holds < 0.05 else FAILS if fails < 0.05 else UNDECIDED
    told = ", ".join(f"rank {rank} {mean_interval(c).value:+.3f}" for rank, c in later.items() if c)
    return Verdict("C10", status, f"{sentence}; change in nats from then to the end: {told}", effect, count(runs, designs),
                   p=min(holds, fails), control=control, plot=plot)  # fmt: skip


def leaving_at_once(runs: Sequence[RunRecord], size: Size) -> float:
    """p that fewer than two of the ranks are behind the largest by more than LEFT at the first evaluation.

    (m - 1) p(2) of m one-sided t tests over seeds      (partial conjunction: Benjamini and Heller 2008, Biometrics 64)
    """
    p_values = []
    for rank in size.ranks[:-1]:
        paths = ((enveloped(runs, lora(size, r), seed) for r in (rank, size.ranks[-1])) for seed in SEEDS)
        p_values.append(one_sided([one[0][1] - most[0][1] for one, most in paths], LEFT))
    return min(1.0, (len(p_values) - 1) * sorted(p_values)[1])


def line(runs: Sequence[RunRecord], size: Size) -> str:
    """How straight the loss of full fine-tuning is over the log of the steps."""
    if unready("C10", runs, [full(size)]) is not None:
        return ""
    fits = []
    for seed in SEEDS:
        path = held_out(best_run(runs, full(size), seed))[1:]
        fits.append(curves.log_linear([step for step, _ in path], [loss for _, loss in path]))
    slope, r2 = mean_interval([f[1] for f in fits]), mean_interval([f[2] for f in fits])
    return f"; full fine-tuning falls by {-slope.value:.2f} nats a factor of e in steps, R2 {r2.value:.3f}"


def picture(runs: Sequence[RunRecord], size: Size) -> Plot:
    series = []
    for design in (*(lora(size, rank) for rank in size.ranks), full(size)):
        path = enveloped(runs, design, SEEDS[0])
        series.append(Series(name(design), tuple(float(step) for step, _ in path), tuple(loss for _, loss in path)))
    return Plot(
        f"pointwise minimum over learning rates, seed {SEEDS[0]}",
        "step",
        "held-out nats per token",
        tuple(series),
        True,
    )
