"""Intervals, tests and curves against textbooks, closed forms, scipy and planted truths."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calibrate.curves import band, best_rate, departure, envelope, log_linear, missing_rates
from calibrate.stats import (
    equivalence,
    fit_line,
    holm,
    mean_interval,
    one_sided,
    ratio_interval,
    slope_by_group,
    spearman,
)

#: Student 1908: extra hours of sleep, paired; R's `sleep`, and `t.test(..., paired = TRUE)` on it
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
SLEEP_CI, SLEEP_P = (0.7001142, 2.4598858), 0.002833
#: Anscombe 1973, first set; R's `summary(lm(y1 ~ x1, anscombe))`
ANSCOMBE_X = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
ANSCOMBE_Y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]

#: a busy machine fails no test
UNHURRIED = settings(max_examples=150, deadline=None)
samples = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


# ---------------------------------------------------------------- intervals


def test_the_interval_of_student_s_own_data() -> None:
    """Mean and 95 % interval of the paper's sleeping patients, as R prints them."""
    e = mean_interval(SLEEP, unit="h")
    assert (e.low, e.value, e.high) == pytest.approx((SLEEP_CI[0], 1.58, SLEEP_CI[1]), abs=1e-6)
    assert (e.unit, e.basis) == ("h", "fitted")
    assert "95 %" in e.source


@pytest.mark.parametrize(("n", "level", "t"), [(2, 0.95, 12.706), (3, 0.95, 4.303), (3, 0.90, 2.920), (5, 0.99, 4.604)])
def test_half_widths_follow_the_printed_t_table(n: int, level: float, t: float) -> None:
    """For -1, 1 and zeros, whose s / sqrt(n) is sqrt(2 / (n (n - 1))), the half-width is the table's t times that."""
    e = mean_interval([-1.0, 1.0, *[0.0] * (n - 2)], level)
    assert e.high == pytest.approx(t * math.sqrt(2 / (n * (n - 1))), rel=1e-3)
    assert e.low == pytest.approx(-e.high)


def test_one_seed_has_an_infinite_interval() -> None:
    """No interval is made up from a single value: not of a mean, a ratio or a slope; nor has a line of two points."""
    assert (mean_interval([3.0]).low, mean_interval([3.0]).high) == (-math.inf, math.inf)
    ratio = ratio_interval([math.log(9.8)])
    assert (ratio.low, ratio.value, ratio.high) == (0.0, pytest.approx(9.8), math.inf)
    one = slope_by_group([([1, 2, 3], [1, 2, 4])])
    assert (one.low, one.value, one.high) == (-math.inf, 1.5, math.inf)
    assert fit_line([1, 2], [1, 2]) == (0.0, 1.0, math.inf, 1.0)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf]])
def test_a_sample_without_a_mean_is_refused(values: list[float]) -> None:
    """Nothing, nan and infinity have no interval: a diverged run cannot slip into a mean."""
    with pytest.raises(ValueError, match="finite"):
        mean_interval(values)


def test_equal_values_have_no_spread_whatever_their_binary_digits() -> None:
    """Three times 0.1, whose sum is not 0.3 in floating point, has exactly no interval and a decided test."""
    e = mean_interval([0.1] * 3)
    assert e.low == e.value == e.high == 0.1
    assert (one_sided([0.1] * 3, at=0.1), one_sided([0.1] * 3), one_sided([0.1] * 3, greater=False)) == (1.0, 0.0, 1.0)
    flat = slope_by_group([([0.1, 0.2, 0.7], [0.1] * 3)] * 3)
    assert flat.low == flat.value == flat.high == 0.0
    assert fit_line([0.1, 0.2, 0.7], [0.1] * 3)[:3] == (0.1, 0.0, 0.0)


def test_a_ratio_is_the_geometric_mean_and_symmetric_in_logs() -> None:
    """Ratios 5 and 20 average to 10, with as much above as below; wild ones end at infinity without a crash."""
    e = ratio_interval([math.log(5), math.log(20)])
    assert e.value == pytest.approx(10)
    assert e.low * e.high == pytest.approx(e.value**2)
    assert ratio_interval([-300.0, 300.0]).high == math.inf


def test_ninety_five_percent_means_ninety_five_percent() -> None:
    """Of 3000 samples of three normals 95 % hold the true mean, within 3 binomial s.d.; 1.96 s.e. would hold 81 %."""
    rng, n = np.random.default_rng(0), 3000
    found = [mean_interval(list(row)) for row in rng.normal(5.0, 2.0, (n, 3))]
    share = sum(e.low <= 5.0 <= e.high for e in found) / n
    assert share == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / n))


# ---------------------------------------------------------------- tests


@UNHURRIED
@given(samples, st.floats(0.01, 5))
def test_equivalence_is_two_one_sided_t_tests(differences: list[float], margin: float) -> None:
    """p is the larger of scipy's two one-sided p; the 90 % interval tells the same, the 95 % one tells `different`."""
    assume(np.std(differences) > 1e-6)
    found = equivalence(differences, margin)
    above = scipy.stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = scipy.stats.ttest_1samp(differences, margin, alternative="less").pvalue
    assert found.p == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)
    if abs(found.p - 0.05) > 1e-6:
        assert found.equivalent == (-margin < found.low and found.high < margin) == (found.p < 0.05)
    both = scipy.stats.ttest_1samp(differences, 0.0)
    if abs(both.pvalue - 0.05) > 1e-6:
        assert found.different == (both.pvalue < 0.05)


def test_sure_and_small_is_both_different_and_equivalent() -> None:
    """A tiny sure difference is both, a large sure one only different, a noisy one neither."""
    small = equivalence([0.010, 0.011, 0.012], 0.05)
    large = equivalence([0.10, 0.11, 0.12], 0.05)
    noisy = equivalence([-0.3, 0.1, 0.25], 0.05)
    assert [(e.equivalent, e.different) for e in (small, large, noisy)] == [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize(
    ("value", "p", "equivalent", "different"),
    [(0.0, 0.0, True, False), (0.04, 0.0, True, True), (0.05, 1.0, False, True), (-0.06, 1.0, False, True)],
)
def test_equivalence_without_spread(value: float, p: float, equivalent: bool, different: bool) -> None:
    """Equal differences are compared with the margin as they are; on the margin is not inside it."""
    found = equivalence([value] * 4, 0.05)
    assert (found.p, found.equivalent, found.different, found.low) == (p, equivalent, different, value)


@pytest.mark.parametrize("differences", [[], [0.0]])
def test_fewer_than_two_seeds_show_nothing(differences: list[float]) -> None:
    """Neither equivalence nor difference, and p is 1."""
    found = equivalence(differences, 0.05)
    assert (found.p, found.equivalent, found.different, found.high) == (1.0, False, False, math.inf)
    assert one_sided(differences) == 1.0


def test_a_margin_must_be_positive() -> None:
    """A margin of zero or nan is an error, not a test that never passes."""
    for margin in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="margin"):
            equivalence([0.1, 0.2], margin)


def test_equivalence_on_the_margin_is_found_in_five_percent() -> None:
    """Where the true difference is the margin, TOST is wrong in at most about 5 % of 2000 samples of four."""
    rows = np.random.default_rng(1).normal(0.1, 0.02, (2000, 4))
    share = sum(equivalence(list(row), 0.1).equivalent for row in rows) / len(rows)
    assert share == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / len(rows)))


def test_one_sided_p_of_student_s_own_data() -> None:
    """Half of the two-sided p that R prints, and its complement in the other direction."""
    assert one_sided(SLEEP) == pytest.approx(SLEEP_P / 2, rel=1e-3)
    assert one_sided(SLEEP, greater=False) == pytest.approx(1 - SLEEP_P / 2, rel=1e-3)
    assert one_sided([v + 7 for v in SLEEP], at=7) == pytest.approx(one_sided(SLEEP))


def test_the_line_through_anscombe_s_first_set() -> None:
    """Intercept, slope, its standard error and r2 as R prints them."""
    assert fit_line(ANSCOMBE_X, ANSCOMBE_Y) == pytest.approx((3.0001, 0.5001, 0.1179, 0.6665), abs=1e-4)


def test_a_line_needs_two_different_x() -> None:
    """One x, or unequal lengths, have no slope."""
    for x, y in (([2, 2, 2], [1, 2, 3]), ([1, 2], [1, 2, 3])):
        with pytest.raises(ValueError, match="two different x"):
            fit_line(x, y)


def test_seeds_replicate_and_points_do_not() -> None:
    """The interval is that of the seeds' own slopes. Every seed's points ten times over leave it alone, though the line
    through all of them would be surer."""
    groups = [([0, 1, 2], [0.0, 1.1, 1.9]), ([0, 1, 2], [3.0, 5.0, 7.2]), ([0, 1, 2], [-1.0, -0.5, 0.1])]
    once, often = slope_by_group(groups), slope_by_group([(x * 10, y * 10) for x, y in groups])
    own = [scipy.stats.linregress(x, y).slope for x, y in groups]
    theirs = scipy.stats.ttest_1samp(own, 0.0).confidence_interval(0.95)
    assert (once.low, once.value, once.high) == pytest.approx((theirs.low, np.mean(own), theirs.high))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    pooled = [[v for group in groups for v in group[i]] for i in (0, 1)]
    assert fit_line(pooled[0] * 10, pooled[1] * 10)[2] < fit_line(pooled[0], pooled[1])[2] / 3


def test_holm_s_worked_example() -> None:
    """Four p at 5 %: H4 and H1 are rejected, H3 stops it and takes H2 along (Wikipedia, "Holm-Bonferroni method")."""
    found = holm({"H1": 0.01, "H2": 0.04, "H3": 0.03, "H4": 0.005})
    assert list(found) == ["H1", "H2", "H3", "H4"]
    assert {name: p for name, (p, _) in found.items()} == pytest.approx(
        {"H1": 0.03, "H2": 0.06, "H3": 0.06, "H4": 0.02}
    )
    assert [name for name, (_, rejected) in found.items() if rejected] == ["H1", "H4"]
    assert holm({}) == {}
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm({"a": math.nan})


@UNHURRIED
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_lies_between_no_correction_and_bonferroni(ps: list[float]) -> None:
    """An adjusted p is at least the p itself, at most m times it or 1, and keeps the order."""
    found = holm({str(i): p for i, p in enumerate(ps)})
    assert all(p <= found[str(i)][0] <= min(1.0, len(ps) * p) for i, p in enumerate(ps))
    adjusted = [found[str(i)][0] for i in sorted(range(len(ps)), key=ps.__getitem__)]
    assert adjusted == sorted(adjusted)


@UNHURRIED
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=9))
def test_spearman_is_scipy_s(pairs: list[tuple[int, int]]) -> None:
    """Also with ties; a constant side has no correlation."""
    x, y = ([p[i] for p in pairs] for i in (0, 1))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-12)


@UNHURRIED
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9, unique=True))
def test_full_agreement_of_ranks_is_exactly_one(x: list[float]) -> None:
    """A rule that asks for a correlation of 1 can compare with ==."""
    assert spearman(sorted(x), list(range(len(x)))) == 1.0
    assert spearman(sorted(x), list(range(len(x)))[::-1]) == -1.0


# ---------------------------------------------------------------- the best rate

GRID = [1e-4 * 2**k for k in range(7)]


def parabola(rates: list[float], best: float, depth: float = 2.0, a: float = 0.05) -> dict[float, float | None]:
    return {rate: depth + a * math.log(rate / best) ** 2 for rate in rates}


@UNHURRIED
@given(st.floats(2.1e-4, 3.1e-3), st.floats(0.1, 5), st.floats(1e-3, 1))
def test_a_planted_parabola_gives_back_its_optimum(best: float, depth: float, a: float) -> None:
    """Vertex, loss and curvature (2a) of an exact parabola, wherever the optimum lies between grid points."""
    found = best_rate(parabola(GRID, best, depth, a))
    assert found is not None
    assert (found.log_rate, found.loss) == pytest.approx((math.log(best), depth), abs=1e-9)
    assert found.curvature == pytest.approx(2 * a, rel=1e-6)
    assert found.rate == pytest.approx(best)
    assert found.finite_left + found.finite_right == len(GRID) - 1
    assert found.bracketed == (min(found.finite_left, found.finite_right) >= 2)


def test_what_diverged_enters_no_fit() -> None:
    """None, nan and infinity are the same: the optimum is that of the finite points, and a ceiling is said."""
    finite = parabola(GRID[:5], 5e-4)
    plain = best_rate(finite)
    for bad in (None, math.nan, math.inf):
        found = best_rate({**finite, GRID[5]: bad, GRID[6]: bad})
        assert found == plain
        assert found is not None and found.bracketed and not found.ceiling
    assert best_rate({1e-4: None, 1e-3: math.nan}) is None
    assert best_rate({}) is None


def test_a_ceiling_is_what_keeps_the_second_point_away() -> None:
    """With none or one finite rate between the best and the diverged one it is a ceiling and no bracket."""
    none = best_rate({**parabola(GRID[:4], GRID[3]), GRID[4]: None})
    one = best_rate({**parabola(GRID[:4], GRID[2]), GRID[4]: None})
    assert none is not None and (none.ceiling, none.bracketed, none.finite_right, none.at_edge) == (True, False, 0, "")
    assert one is not None and (one.ceiling, one.bracketed, one.finite_right, one.at_edge) == (True, False, 1, "")


def test_a_lucky_survivor_beyond_a_diverged_rate_is_no_bracket() -> None:
    """Finite points on the far side of a diverged one are not counted, and not fitted."""
    near = parabola(GRID[:4], GRID[2])
    found, without = best_rate({**near, GRID[4]: None, GRID[5]: 2.1, GRID[6]: 2.2}), best_rate({**near, GRID[4]: None})
    assert found == without
    above = best_rate({GRID[0]: 2.5, GRID[1]: None, GRID[2]: 2.0, GRID[3]: 2.1, GRID[4]: 2.2})
    assert above is not None and (above.finite_left, above.at_edge, above.bracketed) == (0, "", False)


@pytest.mark.parametrize(("best", "edge", "left", "right"), [(5e-5, "low", 0, 6), (2e-2, "high", 6, 0)])
def test_an_optimum_beyond_the_grid_is_its_edge(best: float, edge: str, left: int, right: int) -> None:
    """No extrapolation: the grid minimum at the edge, not bracketed, though the parabola knows better."""
    found = best_rate(parabola(GRID, best))
    assert found is not None
    assert (found.at_edge, found.finite_left, found.finite_right, found.bracketed) == (edge, left, right, False)
    assert found.rate == pytest.approx(GRID[0] if edge == "low" else GRID[-1])


def test_without_a_minimum_in_the_fit_the_grid_minimum_stands() -> None:
    """Equal losses, two points, or points that bend downwards leave the grid's own best, not bracketed."""
    flat = best_rate(dict.fromkeys(GRID, 1.7))
    assert flat is not None and not flat.bracketed and (flat.rate, flat.loss) == (pytest.approx(GRID[0]), 1.7)
    two = best_rate({1e-4: 2.0, 2e-4: 1.9})
    assert two is not None and math.isnan(two.curvature) and (two.at_edge, two.loss) == ("high", 1.9)
    bent = best_rate({1: 2.00, 2: 3.0, 4: 1.99, 8: 3.0, 16: 2.0})
    assert bent is not None and bent.curvature < 0 and not bent.bracketed and bent.rate == pytest.approx(4)


def test_only_two_neighbours_on_each_side_are_fitted() -> None:
    """Whatever the third ones do: the parabola through five points of a plain one is that one."""
    points = {**parabola(GRID, GRID[3]), GRID[0]: 9.0, GRID[6]: 2.6}
    found = best_rate(points)
    assert found is not None and found.log_rate == pytest.approx(math.log(GRID[3]), abs=1e-9)


def test_a_window_keeps_a_cliff_out_of_the_fit() -> None:
    """A point on a cliff pulls the vertex away from it; within 0.1 nats of the minimum the parabola is exact."""
    points = parabola(GRID, 4.5e-4)
    points[GRID[4]] = 4.0
    pulled, kept = best_rate(points), best_rate(points, window=0.1)
    assert pulled is not None and kept is not None
    assert kept.log_rate == pytest.approx(math.log(4.5e-4), abs=1e-9)
    assert pulled.log_rate < kept.log_rate - 0.1
    assert best_rate(points, window=1e-9) == pulled  # fewer than three would remain
    assert kept.bracketed


noisy_grids = st.lists(st.integers(0, 64), min_size=3, max_size=9).map(
    lambda levels: {1e-4 * 2**k: (None if v == 64 else v / 64) for k, v in enumerate(levels)}
)


@UNHURRIED
@given(noisy_grids, st.integers(-8, 8))
def test_shifting_all_losses_moves_no_optimum(points: dict[float, float | None], shift: int) -> None:
    """The same rate, flags and curvature; the loss moves by the shift."""
    one, two = (best_rate({r: None if v is None else v + s for r, v in points.items()}) for s in (0, shift))
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        assert two.loss == pytest.approx(one.loss + shift)
        assert (two.log_rate, two.curvature) == (one.log_rate, pytest.approx(one.curvature, nan_ok=True))
        assert (two.bracketed, two.at_edge, two.ceiling) == (one.bracketed, one.at_edge, one.ceiling)


@UNHURRIED
@given(noisy_grids, st.floats(0.01, 100))
def test_scaling_all_rates_shifts_the_log_of_the_best(points: dict[float, float | None], c: float) -> None:
    """By ln c, and changes nothing else."""
    one, two = best_rate(points), best_rate({r * c: v for r, v in points.items()})
    assert (one is None) == (two is None)
    if one is not None and two is not None and abs(one.curvature) > 1e-9:
        assert two.log_rate == pytest.approx(one.log_rate + math.log(c), abs=1e-6)
        assert (two.finite_left, two.at_edge, two.ceiling) == (one.finite_left, one.at_edge, one.ceiling)


# ---------------------------------------------------------------- the grid that grows


@pytest.mark.parametrize(
    ("losses", "asked"),
    [
        ([2.2, 2.1, 2.0, 2.1, 2.2], []),
        ([2.0, 2.1, 2.2], [2.5e-5, 5e-5]),
        ([2.1, 2.0, 2.1], [5e-5, 8e-4]),
        ([2.2, 2.1, 2.0], [8e-4, 1.6e-3]),
        ([2.2, 2.1, 2.0, None], [5.66e-4]),
        ([2.3, 2.2, 2.1, 2.2, None], [1.13e-3]),
        ([2.2, 2.1, 2.0, 2.1, 2.2, None], []),
        ([2.0, None], [2.5e-5, 5e-5, 1.41e-4]),
        ([None, 2.0, 2.1, 2.2], [1.41e-4]),
        ([None, None], [2.5e-5, 5e-5]),
    ],
)
def test_what_is_missing_beside_the_minimum(losses: list[float | None], asked: list[float]) -> None:
    """Steps beyond an open end, the middle towards a diverged rate, nothing past it, below where all diverged."""
    assert missing_rates(dict(zip(GRID, losses, strict=False)), 2.0) == pytest.approx(asked)


def test_the_middle_towards_a_diverged_rate_is_asked_for_once() -> None:
    """Whether it was finite or diverged, and also on a grid that was rounded to two digits; not below 1.25."""
    tried: dict[float, float | None] = {1e-4: 2.2, 1.8e-4: 2.1, 3.2e-4: 2.0, 5.6e-4: None}
    middle = missing_rates(tried, 1.778)
    assert middle == [4.23e-4]
    for outcome in (None, 1.9, 2.3):
        assert missing_rates({**tried, middle[0]: outcome}, 1.778) == []
    coarse: dict[float, float | None] = {1e-5: 2.2, 3.2e-5: 2.1, 1e-4: 2.0, 3.2e-4: None}
    assert missing_rates(coarse, 3.16) == [1.79e-4]
    assert missing_rates({**coarse, 1.79e-4: None}, 3.16) == []
    assert missing_rates({1e-4: 2.2, 1.5e-4: 2.1, 2.25e-4: 2.0, 3.3e-4: None}, 1.5) == []
    with pytest.raises(ValueError, match="step"):
        missing_rates(tried, 1.1)
    assert missing_rates({}, 2.0) == []


def grow(
    loss: Callable[[float], float | None], start: list[float], step: float, most: int
) -> tuple[dict[float, float | None], int]:
    """The sweep's loop: run what is asked for until nothing is."""
    points, rounds = {rate: loss(rate) for rate in start}, 0
    while asked := missing_rates(points, step, most=most):
        assert not set(asked) & set(points)
        points.update({rate: loss(rate) for rate in asked})
        rounds += 1
    return points, rounds


@UNHURRIED
@given(
    best=st.floats(-12, -3), power=st.floats(0.5, 4), ceiling=st.floats(-13, 1), first=st.floats(-12, -4),
    count=st.integers(1, 7), step=st.floats(1.3, 3.5),
)  # fmt: skip
def test_growing_on_a_u_ends_with_its_minimum_enclosed(
    best: float, power: float, ceiling: float, first: float, count: int, step: float
) -> None:
    """Two finite points below; above two as well, or a diverged rate within a step, its gap halved where that is asked."""

    def loss(rate: float) -> float | None:
        return None if math.log(rate) > ceiling else abs(math.log(rate) - best) ** power

    start = [float(f"{math.exp(first) * step**k:.3g}") for k in range(count)]
    points, _ = grow(loss, start, step, most=150)
    assert len(points) < 150
    found = best_rate(points)
    assert found is not None and found.finite_left >= 2
    assert found.finite_right >= 2 or found.ceiling
    if found.ceiling:
        lowest = min(rate for rate, v in points.items() if v is None)
        highest = max(rate for rate, v in points.items() if v is not None)
        assert lowest / highest <= max(step**0.75, 1.25**2) * 1.01


@UNHURRIED
@given(st.integers(0, 2**32), st.floats(1.25, 3.5), st.integers(1, 20))
def test_growing_ends_on_any_losses(seed: int, step: float, count: int) -> None:
    """Also where losses are noise, fall for ever, or diverge at random: never more than `most` rates are tried."""
    rng = random.Random(seed)
    start = [1e-4 * step**k for k in range(count)]
    noise, _ = grow(lambda rate: None if rng.random() < 0.3 else rng.random(), start, step, most=16)
    falling, rounds = grow(lambda rate: rate, start, step, most=16)
    assert len(noise) <= max(16, count)
    assert len(falling) == max(16, count)
    assert rounds <= 16


# ---------------------------------------------------------------- bands


def test_the_band_of_a_tent() -> None:
    """Gain 1 at the top, falling by a quarter an octave: 90 % of it holds for 0.4 octaves on each side."""
    tent: dict[float, float | None] = {2.0**k: 1.0 + abs(k) / 4 for k in range(-3, 4)}
    found = band(tent, start=2.0)
    assert found is not None and found.octaves == pytest.approx(0.8)
    assert (found.open_low, found.open_high) == (False, False)
    assert found.low == pytest.approx(2**-0.4)
    half = band(tent, 0.5, start=2.0)
    assert half is not None and half.octaves == pytest.approx(4.0)
    quarter = band(tent, 0.25, start=2.0)
    assert quarter is not None and (quarter.octaves, quarter.open_low, quarter.open_high) == (6.0, True, True)
    coarse = band({4.0**k: 1.0 + abs(k) / 2 for k in range(-2, 3)}, start=2.0)
    assert coarse is not None and coarse.octaves == pytest.approx(0.8)


def test_a_band_that_meets_the_end_of_the_grid_is_open_there() -> None:
    """Its width is then that of the grid on that side; a diverged rate counts as no gain and closes it."""
    found = band({1: 1.0, 2: 1.0, 4: None}, start=2.0)
    assert found is not None
    assert (found.open_low, found.open_high, found.low) == (True, False, 1)
    assert found.octaves == pytest.approx(1.1)  # the gain falls from 1 to 0 over one octave, to 0.9 after a tenth
    worse = band({1: 1.0, 2: 1.0, 4: 99.0}, start=2.0)
    assert worse == found  # worse than the start is no better than diverged, and no worse


def test_no_gain_no_band() -> None:
    """Where no rate ends below the start there is nothing to be 90 % of."""
    assert band({1e-4: 2.0, 1e-3: 2.5, 1e-2: None}, start=2.0) is None
    assert band({}, start=2.0) is None
    with pytest.raises(ValueError, match="share"):
        band({1e-4: 1.0}, 1.1, start=2.0)


@UNHURRIED
@given(noisy_grids, st.floats(0.01, 100), st.floats(0.05, 0.95))
def test_a_band_is_as_wide_at_any_scale_of_rates(points: dict[float, float | None], c: float, share: float) -> None:
    """Octaves and flags stay, both ends move by the factor; a smaller share is never narrower."""
    one, two = band(points, share, start=1.0), band({r * c: v for r, v in points.items()}, share, start=1.0)
    assert (one is None) == (two is None)
    if one is not None and two is not None:
        assert two.octaves == pytest.approx(one.octaves, abs=1e-9)
        assert (two.low, two.high) == pytest.approx((one.low * c, one.high * c))
        assert (two.open_low, two.open_high) == (one.open_low, one.open_high)
        wider = band(points, share / 2, start=1.0)
        assert wider is not None and wider.octaves >= one.octaves - 1e-12


# ---------------------------------------------------------------- over steps


def test_an_envelope_is_the_lowest_at_shared_steps() -> None:
    """Steps that one curve lacks, or has no number at, are left out; the envelope may be no single run's."""
    a, b = [(1, 3.0), (2, 2.0), (4, 1.5), (5, 1.0)], [(1, 2.5), (2, 2.2), (3, 0.0), (4, 1.6), (5, math.nan)]
    assert envelope([a, b]) == [(1, 2.5), (2, 2.0), (4, 1.5)]
    assert envelope([[(900, 1.0), (64, 2.0), (7, 3.0)]] * 2) == [(7, 3.0), (64, 2.0), (900, 1.0)]
    assert envelope([]) == []


def test_departure_is_for_good() -> None:
    """A passing excess does not count, nor one that ends before the last shared step, nor one of exactly delta."""
    steps = [1, 2, 4, 8, 16]
    reference = [(s, 1.0) for s in steps]

    def at(*above: float) -> int | None:
        return departure(reference, [(s, 1.0 + v) for s, v in zip(steps, above, strict=True)], 0.25)

    assert at(0, 0.5, 0, 0.5, 0.75) == 8
    assert at(0.5, 0.5, 0.5, 0.5, 0.5) == 1
    assert at(0, 0.5, 0.5, 0.5, 0.0) is None
    assert at(0, 0, 0, 0, 0.25) is None
    assert departure(reference, [(3, 9.0), (16, 9.0), (32, 0.0)], 0.25) == 16
    assert departure(reference, [(3, 9.0)], 0.25) is None


def test_a_loss_linear_in_the_log_of_steps_gives_back_its_line() -> None:
    """Intercept at step 1, slope an e-fold, r2 of 1 for the exact line and scipy's with noise."""
    steps = [1, 3, 10, 30, 100]
    assert log_linear(steps, [4 - 0.3 * math.log(s) for s in steps]) == pytest.approx((4.0, -0.3, 1.0))
    noisy = [4 - 0.3 * math.log(s) + 0.1 * (-1) ** i for i, s in enumerate(steps)]
    theirs = scipy.stats.linregress(np.log(steps), noisy)
    assert log_linear(steps, noisy) == pytest.approx((theirs.intercept, theirs.slope, theirs.rvalue**2))
    assert math.isnan(log_linear(steps, [2.0] * 5)[2])
