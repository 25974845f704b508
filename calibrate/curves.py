"""Loss over the learning rate (a U) and over steps. A diverged run is None: it has no loss, only a place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.stats import fit_line

#: finite rates on each side of the best one before it is reported
BESIDE = 2
#: neighbouring rates closer than this factor tell nothing apart
CLOSEST = 1.25
Points = Mapping[float, float | None]
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best learning rate. `log_rate`: natural log; `curvature`: d2 loss / d(ln rate)2, nan where nothing was fitted.

    finite_left, finite_right   finite rates below and above the grid minimum, as far as the nearest diverged one
    bracketed                   two or more on each side, and the fitted vertex lies among them
    at_edge                     "low" or "high" where the grid minimum is the lowest or highest rate tried, else ""
    ceiling                     a diverged rate is what keeps a second finite one from lying above
    """

    log_rate: float
    loss: float
    curvature: float
    finite_left: int
    finite_right: int
    bracketed: bool
    at_edge: str
    ceiling: bool

    @property
    def rate(self) -> float:
        return math.exp(self.log_rate)


def _stretch(points: Points) -> tuple[list[tuple[float, float]], int, float | None, float | None] | None:
    """Finite (rate, loss) around the grid minimum, its index, and the diverged rates that wall them in."""
    rates = sorted(points)
    loss = {r: v for r, v in points.items() if v is not None and math.isfinite(v)}
    if not loss:
        return None
    first = last = best = min((i for i, r in enumerate(rates) if r in loss), key=lambda i: loss[rates[i]])
    while first > 0 and rates[first - 1] in loss:
        first -= 1
    while last + 1 < len(rates) and rates[last + 1] in loss:
        last += 1
    floor = rates[first - 1] if first > 0 else None
    ceiling = rates[last + 1] if last + 1 < len(rates) else None
    return [(r, loss[r]) for r in rates[first : last + 1]], best - first, floor, ceiling


def best_rate(points: Points, window: float | None = None) -> Optimum | None:
    """Vertex of the parabola in ln(rate) through the grid minimum and up to two finite neighbours each side.

        loss = c + b x + a x^2,   x = ln(rate / best of the grid);   vertex -b / 2a, curvature 2a

    `points`: learning rate -> loss, None where it diverged. With a `window` (nats) neighbours further above the
    minimum are left out where three points remain: far from its minimum a loss is no parabola. A vertex outside
    of the points used, or none, leaves the grid minimum, not bracketed. None where every rate diverged.

    >>> best = best_rate({1e-4: 2.04, 2e-4: 2.01, 4e-4: 2.0, 8e-4: 2.01, 1.6e-3: 2.04})
    >>> round(best.rate, 9), best.bracketed
    (0.0004, True)
    """
    if (found := _stretch(points)) is None:
        return None
    near, left, floor, wall = found
    (rate, loss), right = near[left], len(near) - 1 - left
    used = near[max(0, left - BESIDE) : left + BESIDE + 1]
    close = [p for p in used if window is None or p[1] <= loss + window]
    used = close if len(close) >= 3 else used
    shift, depth, curvature, inside = 0.0, 0.0, math.nan, False
    if len(used) >= 3:
        # relative to the minimum, so that equal losses give a parabola that is exactly flat
        x = np.array([math.log(r / rate) for r, _ in used])
        c, b, a = np.polynomial.polynomial.polyfit(x, [v - loss for _, v in used], 2)
        curvature = float(2 * a)
        if a > 0 and x[0] <= -b / (2 * a) <= x[-1]:
            shift, depth, inside = float(-b / (2 * a)), float(c - b * b / (4 * a)), True
    edge = "low" if left == 0 and floor is None else "high" if right == 0 and wall is None else ""
    return Optimum(
        math.log(rate) + shift, loss + depth, curvature, left, right, inside and min(left, right) >= BESIDE,
        edge, wall is not None and right < BESIDE,
    )  # fmt: skip


def missing_rates(points: Points, step: float, most: int = 16) -> list[float]:
    """Rates still to be run before two finite ones lie on each side of the grid minimum, ascending.

    Beyond an open end: multiples of `step`. Towards a diverged rate, past which nothing is asked for: the geometric
    mean of it and the nearest finite one, once. Where every rate diverged: two below the lowest.

    Running what is asked for until nothing is ends, whatever the losses: each rate is new (a factor of `step`
    beyond the ends, or of CLOSEST from both neighbours, which rounding to 3 digits cannot undo) and there are never
    more than `most` in all. On a U it ends by itself: past a minimum two steps suffice, and a gap of one step to a
    diverged rate, once halved, is below step^(3/4) and not halved again: the gap itself remembers what was asked,
    and 3/4 leaves room for grids that were rounded.

    >>> missing_rates({1e-4: 2.0, 2e-4: 1.9, 4e-4: 1.8}, step=2)
    [0.0008, 0.0016]
    >>> missing_rates({1e-4: 2.0, 2e-4: 1.9, 4e-4: 1.8, 8e-4: None}, step=2)
    [0.000566]
    """
    if step < CLOSEST:
        raise ValueError(f"a step of {step} is below {CLOSEST}")
    if (found := _stretch(points)) is None:
        asked = [min(points) / step**k for k in range(1, BESIDE + 1)] if points else []
    else:
        near, left, floor, ceiling = found
        asked = []
        sides = (left, near[0][0], floor, 1 / step), (len(near) - 1 - left, near[-1][0], ceiling, step)
        for count, end, wall, factor in sides:
            if count < BESIDE and wall is None:
                asked += [end * factor**k for k in range(1, BESIDE - count + 1)]
            elif count < BESIDE and max(wall / end, end / wall) >= max(step**0.75, CLOSEST**2):
                asked.append(math.sqrt(wall * end))
    return sorted(float(f"{rate:.3g}") for rate in asked[: max(0, most - len(points))])


@dataclass(frozen=True, slots=True)
class Band:
    """Rates from `low` to `high`. An open end is that of the grid: there the width is only a lower bound."""

    octaves: float
    low: float
    high: float
    open_low: bool
    open_high: bool


def band(points: Points, share: float = 0.9, *, start: float) -> Band | None:
    """The range of rates around the best whose gain is at least `share` of the best gain; None where none gains.

        gain = max(0, start - loss), 0 where it diverged;   straight lines in log2(rate);   width [octaves]

    `start`: loss before training. For a score that rises, pass its negative.

    >>> band({1: 1.0, 2: 0.5, 4: 0.0, 8: 0.5, 16: None}, share=0.75, start=1.0)
    Band(octaves=1.0, low=2.8284271247461903, high=5.656854249492381, open_low=False, open_high=False)
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share lies between 0 and 1, not {share}")
    rates = sorted(points)
    gains = [max(0.0, start - v) if (v := points[r]) is not None and math.isfinite(v) else 0.0 for r in rates]
    least = share * max(gains, default=0.0)
    if least <= 0:
        return None
    best = gains.index(max(gains))

    def end(way: int) -> tuple[float, bool]:
        """log2 of the rate where the gain falls below `least` on one side, and whether the grid ends before."""
        i = best
        while 0 <= i + way < len(rates):
            if gains[i + way] < least:
                part = (gains[i] - least) / (gains[i] - gains[i + way])
                return math.log2(rates[i]) + part * math.log2(rates[i + way] / rates[i]), False
            i += way
        return math.log2(rates[i]), True

    (low, open_low), (high, open_high) = end(-1), end(1)
    return Band(high - low, 2**low, 2**high, open_low, open_high)


def envelope(curves: Sequence[Curve]) -> list[tuple[int, float]]:
    """Lowest loss of any curve at each step that all have, as published: a curve that no single run need have.

    Leave diverged runs out: the steps that one lacks, or at which it has no number, are missing for all.

    >>> envelope([[(1, 3.0), (2, 1.0)], [(1, 2.0), (2, 2.0), (3, 0.0)]])
    [(1, 2.0), (2, 1.0)]
    """
    known = [{step: loss for step, loss in curve if math.isfinite(loss)} for curve in curves]
    shared = set(known[0]).intersection(*known[1:]) if known else set()
    return [(step, min(curve[step] for curve in known)) for step in sorted(shared)]


def departure(reference: Curve, other: Curve, delta: float) -> int | None:
    """First shared step from which `other` is worse than `reference` by more than `delta` nats, to the last one.

    >>> departure([(1, 2.0), (2, 1.5), (3, 1.0)], [(1, 2.5), (2, 1.5), (3, 1.2)], 0.1)
    3
    """
    one, two = dict(reference), dict(other)
    found = None
    for step in sorted(one.keys() & two.keys(), reverse=True):
        if not two[step] - one[step] > delta:
            break
        found = step
    return found


def log_linear(steps: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of loss = intercept + slope ln(step): (intercept [nats], slope [nats per e-fold], r2).

    >>> [round(v, 9) for v in log_linear([1, 10, 100], [3.0, 2.0, 1.0])]
    [3.0, -0.434294482, 1.0]
    """
    intercept, slope, _, r2 = fit_line([math.log(step) for step in steps], losses)
    return intercept, slope, r2
