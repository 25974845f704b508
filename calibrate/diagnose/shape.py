"""What two loss curves say to each other: how far apart, how many times behind, and whether that grows.

A curve is pairs (x, nats per token); x counts optimizer steps, or samples where the batches differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, nan, sqrt
from statistics import fmean, median

from lora_planner.ledger import FITTED, Estimate

Curve = Sequence[tuple[float, float]]

#: Student's t, 95 % one-sided, by degrees of freedom; between rows the one above holds (wider)
T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 8: 1.860, 10: 1.812, 15: 1.753, 30: 1.697}
#: the part of a run that "late" means: its last two doublings
LATE = 1 / 4
#: no loss in nats per token is larger
MOST = 1e6
#: averages a noisy late part is cut into
BINS = 6
#: held-out points after the first step that make a curve
FEWEST = 4


def usable(curve: Curve) -> list[tuple[float, float]]:
    """Points whose loss is a number that a loss can be.

    >>> usable([(1, 2.0), (2, nan), (3, 1e300)])
    [(1, 2.0)]
    """
    return [(x, v) for x, v in curve if isfinite(x) and abs(v) < MOST]


def quantile_t(dof: int) -> float:
    """
    >>> quantile_t(3), quantile_t(12)
    (2.353, 1.812)
    """
    return T95[max(k for k in T95 if k <= dof)] if dof >= 1 else inf


def noise(values: Sequence[float]) -> float:
    """Standard deviation around a slow trend, robust against jumps.

        1.4826 median |v_i-1 - 2 v_i + v_i+1| / sqrt 6

    Source: second differences of independent values have the variance 1 + 4 + 1; median absolute deviation.

    >>> noise([1.0, 2.0, 3.0, 4.0]), round(noise([0.0, 1.0] * 20), 2)
    (0.0, 1.21)
    """
    bends = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return 1.4826 * median(abs(d) for d in bends) / sqrt(6) if len(bends) > 1 else nan


def line(x: Sequence[float], y: Sequence[float], at: float) -> tuple[Estimate, Estimate] | None:
    """Least squares: the value at `at` and the slope, each with a 90 % interval. None below three points.

    >>> value, slope = line([0, 1, 2, 3], [0.0, 1.1, 1.9, 3.0], 3)
    >>> round(value.value, 2), round(slope.low, 2) <= 0.98 <= round(slope.high, 2)
    (2.97, True)
    """
    n = len(x)
    if n < 3:
        return None
    mx, my = fmean(x), fmean(y)
    sxx = sum((v - mx) ** 2 for v in x)
    if sxx == 0:
        return None
    slope = sum((v - mx) * (w - my) for v, w in zip(x, y, strict=True)) / sxx
    rest = sum((w - my - slope * (v - mx)) ** 2 for v, w in zip(x, y, strict=True))
    sigma, t = sqrt(max(rest, 0.0) / (n - 2)), quantile_t(n - 2)
    value = my + slope * (at - mx)
    half = t * sigma * sqrt(1 / n + (at - mx) ** 2 / sxx)
    steep = t * sigma / sqrt(sxx)
    return (
        Estimate(value - half, value, value + half, "", FITTED),
        Estimate(slope - steep, slope, slope + steep, "", FITTED),
    )


def falling(curve: Curve) -> list[tuple[float, float]]:
    """The closest curve that never rises: neighbours that do are pooled.

    Source: pool adjacent violators (Ayer et al. 1955).

    >>> falling([(1, 3.0), (2, 1.0), (3, 2.0), (4, 1.0)])
    [(1, 3.0), (2, 1.5), (3, 1.5), (4, 1.0)]
    """
    pools: list[list[float]] = []  # mean, count
    for _, loss in curve:
        pools.append([loss, 1])
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    level = [mean for mean, count in pools for _ in range(int(count))]
    return [(x, loss) for (x, _), loss in zip(curve, level, strict=True)]


def at(curve: Curve, x: float) -> float | None:
    """Straight lines between points; None outside of them.

    >>> at([(1, 4.0), (3, 2.0)], 2), at([(1, 4.0)], 2)
    (3.0, None)
    """
    for (a, v), (b, w) in itertools.pairwise(curve):
        if a <= x <= b:
            return v if a == b else v + (w - v) * (x - a) / (b - a)
    return curve[0][1] if curve and curve[0][0] == x else None


def binned(curve: Curve, low: float, high: float, bins: int = BINS) -> list[tuple[float, float]]:
    """Means over equal parts of ln x between `low` and `high`; parts without points are left out.

    >>> binned([(1, 1.0), (2, 2.0), (3, 4.0), (4, 6.0)], 1, 4, bins=2)
    [(1.0, 1.0), (2.8844991406148166, 4.0)]
    """
    parts: dict[int, list[tuple[float, float]]] = {}
    for x, y in curve:
        if low <= x <= high and x > 0 and isfinite(y):
            parts.setdefault(min(bins - 1, int(bins * log(x / low) / log(high / low))), []).append((x, y))
    return [(exp(fmean(log(x) for x, _ in some)), fmean(y for _, y in some)) for _, some in sorted(parts.items())]


@dataclass(frozen=True, slots=True)
class Gap:
    """How a run stands to its reference over shared x.

    channel    "held-out" or "training" loss
    axis       "steps" or "samples"
    end        the last x that both have
    nats       run - reference there, with interval; `relative`: over the reference's loss
    early      run - reference in the first tenth: mean
    lag        x over the x at which the reference had this loss, at the end; None where it never had it
    growth     d ln(lag) / d ln(x) over the late part: 0 where the lag stays as it is
    points     (x, gap) of the late part
    reference, run  the curves that were compared
    """

    channel: str
    axis: str
    end: float
    nats: Estimate
    relative: float
    early: float | None
    lag: Estimate | None
    growth: Estimate | None
    points: tuple[tuple[float, float], ...]
    reference: tuple[tuple[float, float], ...]
    run: tuple[tuple[float, float], ...]


def lag(reference: Curve, x: float, loss: float) -> float | None:
    """How many times longer the run took: x over the x at which the reference first had this loss.

        x / x_ref,   loss_ref(x_ref) = loss, straight lines in ln x        [1]

    A learning rate that is k times too low stretches time and lags by a constant; an adapter that is full lags more
    and more. Measured on our runs of one small base: reports/diagnose.md. None outside the reference's losses.

    >>> reference = [(1, 4.0), (10, 3.0), (100, 2.0)]
    >>> round(lag(reference, 40, 3.0), 9), lag(reference, 40, 5.0)
    (4.0, None)
    """
    points = [(max(a, 0.5), v) for a, v in falling(reference)]
    for (a, v), (b, w) in itertools.pairwise(points):
        if w <= loss <= v and v > w:
            return x / exp(log(a) + (v - loss) / (v - w) * log(b / a))
    return None


def gap(run: Curve, reference: Curve, channel: str, axis: str = "steps") -> Gap | None:
    """Everything two curves say about each other; None with too few shared points."""
    run, reference = (usable(curve) for curve in (run, reference))
    if len(run) < 2 or len(reference) < 2:
        return None
    end = min(run[-1][0], reference[-1][0])
    shared = [(x, v, r) for x, v in run if x <= end and (r := at(reference, x)) is not None]
    late = [(x, v - r) for x, v, r in shared if x >= LATE * end]
    noisy = channel == "training"
    if noisy:
        late = binned(late, LATE * end, end)
    if len(late) < 3:
        return None
    smooth = falling(_smooth(reference, end) if noisy else [p for p in reference if p[0] <= reference[-1][0]])
    found = line([log(x) for x, _ in late], [g for _, g in late], log(end))
    if found is None:
        return None
    nats = found[0]
    level = at(smooth, end) or smooth[-1][1]
    early = [v - r for x, v, r in shared if 0 < x <= end / 10]
    lags = [
        (x, k) for x, g in late if (base := at(smooth, x)) is not None and (k := lag(smooth, x, base + g)) is not None
    ]
    last = slope = None
    if len(lags) >= FEWEST - 1 and lags[-1][0] == late[-1][0]:
        fitted = line([log(x) for x, _ in lags], [log(k) for _, k in lags], log(end))
        if fitted is not None:
            ends, slope = fitted
            last = Estimate(exp(ends.low), exp(ends.value), exp(min(ends.high, 50.0)), "x", FITTED)
    return Gap(channel, axis, end, Estimate(nats.low, nats.value, nats.high, "nats", FITTED), nats.value / level if level > 0 else nan,
               fmean(early) if early else None, last, slope, tuple(late), tuple(reference), tuple(run))  # fmt: skip


def _smooth(curve: Curve, end: float) -> list[tuple[float, float]]:
    """A noisy curve as a parabola in ln x, which a loss that falls linearly in ln x nearly is; as points."""
    points = [(log(x), v) for x, v in curve if x > 0 and isfinite(v)]
    a, b, c = _parabola([x for x, _ in points], [v for _, v in points])
    low, high = points[0][0], log(max(end, curve[-1][0]))
    grid = [low + (high - low) * i / 60 for i in range(61)]
    return [(exp(x), a + b * x + c * x * x) for x in grid]


def _parabola(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Least squares of a + b x + c x^2, by orthogonal polynomials.

    >>> [round(v, 9) for v in _parabola([0, 1, 2, 3], [1, 2, 5, 10])]
    [1.0, 0.0, 1.0]
    """
    m = fmean(x)
    u = [v - m for v in x]
    s2 = fmean(v * v for v in u) or 1.0
    s3 = fmean(v**3 for v in u)
    p = [v * v - s3 / s2 * v - s2 for v in u]  # orthogonal to 1 and u
    norm = fmean(v * v for v in p)
    a, b = fmean(y), fmean(v * w for v, w in zip(u, y, strict=True)) / s2
    c = fmean(v * w for v, w in zip(p, y, strict=True)) / norm if norm > 1e-12 else 0.0
    # back from u and p to powers of x
    b1, a1 = b - c * s3 / s2, a - c * s2
    return a1 - b1 * m + c * m * m, b1 - 2 * c * m, c
