"""Intervals and tests on a handful of seeds. A seed is one replication; what it is measured on many times is not.

They stay honest at the ends: one value has an infinite interval, n < 2 shows nothing, and values without any spread
are compared as they are (p is 0 or 1), not divided by zero. A value that is not finite is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

from lora_planner.ledger import FITTED, Estimate

#: of every test here
ALPHA = 0.05


def _finite(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"a sample needs values, all of them finite, not {list(values)}")
    return x


def _mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and s / sqrt(n), infinite for one value. Taken from the first value: equal ones leave exact zeros."""
    x = _finite(values)
    above = x - x[0]
    se = float(above.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return float(x[0] + above.mean()), se


def _half(se: float, dof: int, level: float) -> float:
    return float(student.ppf((1 + level) / 2, dof)) * se if dof > 0 else math.inf


def _p_above(value: float, se: float, dof: int) -> float:
    """P(T >= value / se): small where `value` is surely positive. Without spread 0 if it is positive, else 1."""
    if dof < 1:
        return 1.0
    if se == 0:
        return 0.0 if value > 0 else 1.0
    return float(student.sf(value / se, dof))


def mean_interval(values: Sequence[float], level: float = 0.95, unit: str = "") -> Estimate:
    """Mean of independent values with Student's interval (Student 1908, Biometrika 6); infinite for one value.

        mean -+ t[(1 + level) / 2, n - 1] * s / sqrt(n)        [unit of the values]

    >>> e = mean_interval([1.0, 2.0, 3.0])
    >>> round(e.low, 3), e.value, round(e.high, 3)
    (-0.484, 2.0, 4.484)
    """
    mean, se = _mean_se(values)
    half = _half(se, len(values) - 1, level)
    source = f"mean of {len(values)}, {100 * level:g} % t interval"
    return Estimate(mean - half, mean, mean + half, unit, FITTED, source)


def ratio_interval(log_ratios: Sequence[float], level: float = 0.95) -> Estimate:
    """Geometric mean of ratios, given as natural logs, with the interval of their mean: exp(mean -+ t s / sqrt(n)).

    >>> e = ratio_interval([math.log(5), math.log(10), math.log(20)])
    >>> round(e.low, 2), round(e.value, 2), round(e.high, 2)
    (1.79, 10.0, 55.95)
    """
    e = mean_interval(log_ratios, level)
    with np.errstate(over="ignore"):  # two wild seeds: an upper end beyond the floats is infinity
        low, value, high = (float(end) for end in np.exp([e.low, e.value, e.high]))
    return Estimate(low, value, high, "ratio", FITTED, f"geometric {e.source}")


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Paired differences against a margin. `low`, `high`: their 90 % interval, inside the margin where `equivalent`.

    `different`: the 95 % interval excludes 0. Both hold for a difference that is sure and too small to matter;
    neither holds where too little is known.
    """

    mean: float
    low: float
    high: float
    p: float
    equivalent: bool
    different: bool


def equivalence(differences: Sequence[float], margin: float) -> Equivalence:
    """Two one-sided paired t tests at 5 % (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15): |mean| < margin?

        p = max( P(T >= (mean + margin) / se),  P(T >= (margin - mean) / se) ),   n - 1 degrees of freedom

    >>> equivalence([0.01, -0.01, 0.02, -0.02], margin=0.1).equivalent
    True
    >>> equivalence([0.01], margin=0.1).p
    1.0
    """
    if not margin > 0:
        raise ValueError(f"a margin is positive, not {margin}")
    if not len(differences):
        return Equivalence(math.nan, -math.inf, math.inf, 1.0, False, False)
    mean, se = _mean_se(differences)
    dof = len(differences) - 1
    half = _half(se, dof, 1 - 2 * ALPHA)
    p = max(_p_above(mean + margin, se, dof), _p_above(margin - mean, se, dof))
    return Equivalence(mean, mean - half, mean + half, p, p <= ALPHA, abs(mean) > _half(se, dof, 1 - ALPHA))


def one_sided(values: Sequence[float], at: float = 0.0, greater: bool = True) -> float:
    """p of the t test that the mean is greater (or less) than `at`: P(T >= (mean - at) / se). 1 for n < 2.

    >>> round(one_sided([1.0, 2.0, 3.0]), 4)
    0.0371
    """
    if len(values) < 2:
        return 1.0
    mean, se = _mean_se(values)
    return _p_above(mean - at if greater else at - mean, se, len(values) - 1)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float, float]:
    """Ordinary least squares: (intercept, slope, s.e. of the slope, r2). Draper and Smith 1998, ch. 1.

        slope = Sxy / Sxx,   se = sqrt(SSE / (n - 2) / Sxx), infinite for n = 2,   r2 = 1 - SSE / Syy, nan for Syy = 0

    >>> fit_line([0, 1, 2], [1, 3, 5])
    (1.0, 2.0, 0.0, 1.0)
    """
    xs, ys = _finite(x), _finite(y)
    if len(xs) != len(ys) or xs.min() == xs.max():
        raise ValueError(f"a line needs two different x and as many y, not {list(x)} and {list(y)}")
    x0, y0 = _mean_se(x)[0], _mean_se(y)[0]
    dx, dy = xs - x0, ys - y0
    sxx, syy = float(dx @ dx), float(dy @ dy)
    slope = float(dx @ dy) / sxx
    sse = float(((dy - slope * dx) ** 2).sum())
    se = math.sqrt(sse / (len(xs) - 2) / sxx) if len(xs) > 2 else math.inf
    return y0 - slope * x0, slope, se, 1 - sse / syy if syy else math.nan


def slope_by_group(groups: Sequence[tuple[Sequence[float], Sequence[float]]], level: float = 0.95) -> Estimate:
    """Mean of the seeds' own slopes, with the interval between seeds. `groups`: (x, y) of each seed.

    One line through the points of all seeds would count each point as a replication and be sure too soon.

    >>> slope_by_group([([0, 1], [0, 1]), ([0, 1], [5, 7]), ([0, 1], [-1, 2])]).value
    2.0
    """
    return mean_interval([fit_line(x, y)[1] for x, y in groups], level)


def holm(p_values: Mapping[str, float], level: float = 0.05) -> dict[str, tuple[float, bool]]:
    """Correction over a family of m tests (Holm 1979, Scand. J. Statist. 6): name -> (adjusted p, rejected).

        adjusted p(k) = max over j <= k of min(1, (m - j + 1) p(j)),   p(1) <= ... <= p(m)

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.02})
    {'a': (0.03, True), 'b': (0.04, True), 'c': (0.04, True)}
    """
    if not all(0 <= p <= 1 for p in p_values.values()):
        raise ValueError(f"a p lies between 0 and 1: {dict(p_values)}")
    adjusted, so_far = {}, 0.0
    for j, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        so_far = max(so_far, min(1.0, (len(p_values) - j) * p_values[name]))
        adjusted[name] = so_far
    return {name: (adjusted[name], adjusted[name] <= level) for name in p_values}


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Correlation of ranks, ties sharing their mean rank (Spearman 1904); nan where one side is constant.

    Ranks are halves of whole numbers, so agreement in every rank is 1.0 to the last bit.

    >>> spearman([1, 2, 3], [10, 100, 1000])
    1.0
    """
    a, b = (rankdata(_finite(v)) - (len(v) + 1) / 2 for v in (x, y))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else math.nan
