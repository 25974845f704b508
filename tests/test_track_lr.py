"""Sweeps of learning rate and rank: what a table's rows become, and how well cells are predicted that no fit saw."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate import learning_rate as fit
from calibrate.lr_models import facts
from calibrate.track import Row, lr_sweep, read
from calibrate.track.case import Case

ROWS = read(fit.TABLE)
CELLS = fit.read_cells(ROWS)


@cache
def predicted(quantity: str) -> list[Case]:
    return [case for case in _all() if case.quantity == quantity]


@cache
def _all() -> tuple[Case, ...]:
    return (*lr_sweep.cases(ROWS), *lr_sweep.held_out(ROWS))


def details(cases: list[Case], name: str) -> np.ndarray:
    return np.array([case.details[name] for case in cases if name in case.details])


def sweep(*runs: tuple[str, str], model: str = "meta-llama/Llama-3.1-8B", rank: str = "16", **other: str) -> list[Row]:
    """Rows of one cell from (rate, loss)."""
    shared = {"model": model, "lora_rank": rank, "train_nll": "", "wall_min": "", "dataset": "d", "batch_size": "128"}
    return [{**shared, "lr": lr, "test_nll": nll, "steps": "780", "source": "s", **other} for lr, nll in runs]


# ---------------------------------------------------------------- accuracy on what no fit saw


def test_rates_of_models_left_out_reach_the_aim() -> None:
    """Each model by the others: median regret 0.2 % of loss, 90 % below 0.8 %, within x1.5 of 80 % of known optima."""
    cases = predicted("learning rate, model left out")
    regret, off = details(cases, "regret_share"), details(cases, "factor off")
    assert np.median(regret) <= 0.002
    assert np.quantile(regret, 0.9) <= 0.008
    assert np.mean(off <= 1.5) >= 0.8


@pytest.mark.parametrize("rival", ["get_lr", "flat 3e-4", "10 x 2e-5"])
def test_rates_of_models_left_out_lose_less_than_rivals(rival: str) -> None:
    """On the cells where a rival has an answer, the mean and the 90 % quantile of regret are below its own."""
    cases = [c for c in predicted("learning rate, model left out") if f"regret_share {rival}" in c.details]
    ours, theirs = details(cases, "regret_share"), details(cases, f"regret_share {rival}")
    assert len(cases) >= 60
    assert ours.mean() < theirs.mean()
    assert np.quantile(ours, 0.9) < np.quantile(theirs, 0.9)


@pytest.mark.parametrize("how", ["model left out", "family left out"])
def test_rank_penalties_left_out_reach_the_aim(how: str) -> None:
    """Median error at most 0.3 % of loss, and half of what assuming no penalty would err."""
    cases = predicted(f"rank penalty, {how}")
    error, nothing = (np.median(details(cases, name)) for name in ("error_share", "error_share no penalty"))
    assert error <= 0.003
    assert error < nothing / 2


@pytest.mark.parametrize("quantity", ["learning rate, model left out", "rank penalty, model left out"])
def test_intervals_hold_what_they_did_not_see(quantity: str) -> None:
    """A model's band comes from the other models' errors; 85 % or more of its cells lie inside."""
    inside = [case.covered for case in predicted(quantity)]
    assert None not in inside
    assert np.mean(inside) >= 0.85


# ---------------------------------------------------------------- regret


def test_regret_at_a_run_s_own_rate_is_that_run_s() -> None:
    """Where the optimum is only bounded the best is the best run: 1.0 of 0.9, 1.1 of 0.9."""
    cell = fit.read_cells(sweep(("1e-4", "1.1"), ("3e-4", "1.0"), ("1e-3", "0.9")))[0]
    assert [fit.regret(cell, math.log(lr)) for lr in (1e-3, 3e-4, 1e-4)] == pytest.approx([0, 1 / 9, 2 / 9])


@given(st.floats(math.log(1e-6), math.log(1e-1)))
def test_regret_is_never_negative(ln_lr: float) -> None:
    """No rate beats a cell's best, whatever the cell."""
    assert min(fit.regret(cell, ln_lr) for cell in CELLS) >= -1e-12


def test_beyond_the_last_run_regret_never_flatters() -> None:
    """Above a best run that is the last, loss rises as it fell; towards a diverged rate, to that run's loss."""
    alone = sweep(("1e-4", "1.0"), ("1e-3", "0.9"))
    free, blank, huge = (
        fit.read_cells([*alone, *more])[0] for more in ([], sweep(("1e-2", "")), sweep(("1e-2", "9.9")))
    )
    above = math.log(10**-2.5)
    assert fit.regret(free, above) == pytest.approx(0.05 / 0.9)
    assert fit.regret(blank, above) == pytest.approx((fit.DIVERGED - 1) / 2)
    assert fit.regret(huge, above) == pytest.approx(4.5 / 0.9)


@pytest.mark.parametrize("lost", ["", "nan", "inf", "7.3", "diverged"])
def test_a_run_that_diverged_is_no_point_of_the_curve(lost: str) -> None:
    """Without a loss, or with a huge one, a rate bounds nothing and moves no optimum."""
    runs = [("1e-4", "0.60"), ("3e-4", "0.58"), ("1e-3", "0.59")]
    with_it, without = (lr_sweep.cases(sweep(*r)) for r in ([*runs, ("3e-3", lost)], runs))
    assert with_it[0].measured == without[0].measured
    assert not with_it[0].at_least


def test_an_optimum_at_an_end_is_a_bound() -> None:
    """Best at the last finished rate: at least; at the first: at most; of one run: nothing to predict, and says so."""
    top = lr_sweep.cases(sweep(("1e-4", "0.60"), ("3e-4", "0.58"), ("1e-3", "")))[0]
    low = lr_sweep.cases(sweep(("1e-4", "0.58"), ("3e-4", "0.60")))[0]
    one = lr_sweep.cases(sweep(("1e-4", "0.58"), ("3e-4", "")))[0]
    assert (top.at_least, top.at_most, low.at_least, low.at_most) == (True, False, False, True)
    assert top.measured == low.measured == pytest.approx(math.sqrt(3e-8))
    assert one.predicted is None
    assert "finished" in one.reason


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "family", "billions"),
    [
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3", 235.09),
        ("Qwen/Qwen3-8B-Base", "qwen3", 8.19),
        ("meta-llama/Llama-3.2-3B", "llama", 3.213),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama", 70.55),
        ("openai/gpt-oss-20b", "gpt-oss", 20.91),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek", 671),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "llama", 8),
        ("Qwen/Qwen3.5-122B-A10B", "qwen3.5", 122),
        ("nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16", "nemotron", 120),
        ("google/gemma-3-27b-it", "", 27),
    ],
)
def test_models_that_were_not_swept_here_have_a_size_and_a_family(name: str, family: str, billions: float) -> None:
    """By the published total, or what the name states: all parameters, not the active ones."""
    found = facts(name)
    assert found.family == family
    assert found.params_b == pytest.approx(billions, rel=0.03)


def test_a_model_without_a_size_gets_an_answer_and_a_wider_interval() -> None:
    """Every size that was swept could be meant."""
    runs = (("1e-4", "0.60"), ("3e-4", "0.58"), ("1e-3", "0.59"))
    known, unknown = (lr_sweep.cases(sweep(*runs, model=m))[0].predicted for m in ("new-30b", "new"))
    assert known is not None
    assert unknown is not None
    assert unknown.low < known.low < known.high < unknown.high


def test_only_models_of_the_fit_are_marked_as_fitted() -> None:
    """All of the committed table, and no other."""
    assert all(case.fitted for case in lr_sweep.cases(ROWS))
    assert not any(case.fitted for case in _all() if "left out" in case.quantity)
    assert not lr_sweep.cases(sweep(("1e-4", "0.6"), ("3e-4", "0.5"), model="Qwen/Qwen3-14B"))[0].fitted


# ---------------------------------------------------------------- any table


def test_the_order_of_rows_does_not_matter() -> None:
    """A shuffled table gives the same cases."""
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    key = lambda case: (case.quantity, case.label, case.measured)  # noqa: E731
    assert sorted(map(key, lr_sweep.cases(shuffled))) == sorted(map(key, lr_sweep.cases(ROWS)))


@pytest.mark.parametrize("column", lr_sweep.COLUMNS)
@pytest.mark.parametrize("value", ["", "?", "-1", "0", "1e400", "nan", "0.5", "9" * 30, "Ω/✗ 8b", None])
def test_a_malformed_column_never_crashes(column: str, value: str | None) -> None:
    """Every case has a prediction or a reason; intervals are in order."""
    rows = [{**row, column: value} if i % 3 == 0 else row for i, row in enumerate(ROWS[:60])]
    for case in lr_sweep.cases(rows):  # type: ignore[arg-type]
        assert (case.predicted is None) == bool(case.reason)
        if case.predicted is not None:
            assert 0 <= case.predicted.low <= case.predicted.value <= case.predicted.high < math.inf
            assert case.error is None or math.isfinite(case.error)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40) | st.from_regex(r"[A-Za-z]{1,8}-?[0-9.]{0,5}[bBmM]?(-A[0-9]b)?", fullmatch=True))
def test_any_model_name_gets_an_answer(name: str) -> None:
    """An estimate or a reason, whatever the name."""
    rows = sweep(("1e-4", "0.60"), ("3e-4", "0.58"), ("1e-3", "0.59"), model=name)
    rows += sweep(("1e-4", "0.60"), ("3e-4", "0.57"), ("1e-3", "0.58"), model=name, rank="64")
    cases = lr_sweep.cases(rows)
    assert len(cases) == 3
    assert all(case.predicted is not None or case.reason for case in cases)


def test_too_few_models_to_leave_one_out_says_so() -> None:
    """A table of one model has no left-out prediction."""
    held = lr_sweep.held_out(sweep(("1e-4", "0.60"), ("3e-4", "0.58"), ("1e-3", "0.59")))
    assert held
    assert all(case.predicted is None and "fewer" in case.reason for case in held)
    assert lr_sweep.held_out([]) == []
