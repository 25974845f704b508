"""Capacity, rank, learning rate and batch against published numbers, and what must hold for any input."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_planner import batch, capacity, learning_rate
from lora_planner.errors import BadInput, LoraPlanError, UnknownName
from lora_planner.ledger import BASES, Estimate

GOLDEN = Path(__file__).parent / "golden"
LLAMA_8B, PER_RANK_8B = 8.03e9, 2_753_792  # LWR's count, with the unembedding

params = st.floats(1e8, 1e12)
ranks = st.integers(1, 512)
tokens = st.floats(1e3, 1e13)


def rows(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def ordered(e: Estimate) -> bool:
    return 0 <= e.low <= e.value <= e.high and e.basis in BASES


COMPUTED = {
    "rl_bits_10k_x_32": lambda: capacity.rl_need(10_000, 32).bits.high,
    "rl_bits_r1_zero": lambda: capacity.rl_need(32, 16, pass_rate=0.5, passes=10_400).bits.value,
    "published_lr_llama_2048": lambda: learning_rate.published_lora_lr(2048, "llama"),
    "published_lr_llama_3072": lambda: learning_rate.published_lora_lr(3072, "llama"),
    "published_lr_llama_4096": lambda: learning_rate.published_lora_lr(4096, "llama"),
    "published_lr_llama_8192": lambda: learning_rate.published_lora_lr(8192, "llama"),
    "published_lr_qwen3_4096": lambda: learning_rate.published_lora_lr(4096, "qwen3"),
    "binary_entropy_0.1": lambda: capacity.binary_entropy(0.1),
    "binary_entropy_0.01": lambda: capacity.binary_entropy(0.01),
    "mlperf_samples_8": lambda: batch.samples_to_target(8).value,
    "mlperf_samples_64": lambda: batch.samples_to_target(64).value,
    "mlperf_samples_128": lambda: batch.samples_to_target(128).value,
}


@pytest.mark.parametrize("row", rows("science.csv"), ids=lambda r: r["what"])
def test_published_numbers(row: dict[str, str]) -> None:
    """Each formula gives the number that its source prints."""
    assert COMPUTED[row["what"]]() == pytest.approx(float(row["value"]), rel=float(row["rel_tol"]) or 1e-12)


# ---------------------------------------------------------------- capacity and rank


def test_rank_penalty_holds_on_models_outside_the_fit() -> None:
    """At least 85 % of published penalties lie in the 90 % interval; two of the four models are unseen."""
    inside = []
    for row in rows("rank_penalty.csv"):
        p = capacity.rank_penalty(int(row["rank"]), 1e9 * float(row["total_params_b"]), int(row["top_rank"]))
        inside.append(p.low <= float(row["loss_above_top_percent"]) / 100 <= p.high)
    assert sum(inside) / len(inside) >= 0.85


@pytest.mark.parametrize(("base", "rank_16_params", "density"), [(20e6, 3e5, 0.05), (1e9, 1.2e7, 0.44)])
def test_the_adapter_law_contains_its_paper_s_densities(base: float, rank_16_params: float, density: float) -> None:
    """The bits per parameter that Nguyen prints for 20M and 1B lie in the law's interval (p assumed)."""
    held = capacity.adapter_law(base).holds(rank_16_params)
    assert held.low <= density * rank_16_params <= held.high


def test_the_paper_s_rl_example_fits_rank_one() -> None:
    """320,000 bits surely fit the 3M parameters of rank 1, and more than 8x over under 1 bit each."""
    verdict = capacity.verdict(capacity.rl_need(10_000, 32), LLAMA_8B, PER_RANK_8B)
    assert verdict.verdict == capacity.FITS
    assert PER_RANK_8B / verdict.need.high > 8


def test_sources_that_disagree_give_a_contested_verdict_with_reasons() -> None:
    """Between "surely fits" and "surely over" the verdict names who says what, and its source."""
    verdict = capacity.verdict(capacity.sft_need(10e6), LLAMA_8B, 4 * PER_RANK_8B)
    assert verdict.verdict == capacity.CONTESTED
    assert {j.verdict for j in verdict.judgements} > {capacity.FITS}
    assert all(j.source.source and j.reason for j in verdict.judgements)


def test_the_user_s_own_loss_replaces_the_assumption() -> None:
    """A first-epoch loss makes the need derived and narrower; a pilot does so for what generalises."""
    assumed, own = capacity.sft_need(1e6), capacity.sft_need(1e6, first_epoch_nats=0.9)
    assert (assumed.bits.basis, own.bits.basis) == ("assumed", "derived")
    assert own.bits.high / own.bits.low < assumed.bits.high / assumed.bits.low
    pilot = capacity.sft_need(1e6, excess_bits=2e4)
    assert {e.value for _, e in pilot.excess} == {2e4}


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_constant_reward_teaches_nothing(rate: float) -> None:
    """Never or always rewarded: zero bits, and a warning that says so."""
    need = capacity.rl_need(1000, 8, pass_rate=rate)
    assert need.bits.high == 0
    assert "every advantage is zero" in need.warnings[0]
    assert capacity.verdict(need, LLAMA_8B, PER_RANK_8B).warnings == need.warnings


def test_rl_advice_carries_the_counter_evidence() -> None:
    """Rank 8 for RL, with the studies in which rank 1 or a high rank did not train."""
    advice = capacity.recommend_rank(capacity.rl_need(10_000, 16), LLAMA_8B, PER_RANK_8B)
    assert (advice.rank, advice.smallest.value, advice.penalty) == (8, 1.0, None)
    assert any("2512.23165" in w for w in advice.warnings)
    big = capacity.recommend_rank(capacity.rl_need(10**8, 64), LLAMA_8B, PER_RANK_8B)
    assert any("collapsed" in w for w in big.warnings)


def test_a_small_model_gets_a_higher_floor() -> None:
    """At 1B rank 16 still costs more than half a percent, so the floor is higher than at 70B."""
    small = capacity.recommend_rank(capacity.sft_need(1e5), 1.24e9, 7e5)
    large = capacity.recommend_rank(capacity.sft_need(1e5), 70e9, 1e7)
    assert small.rank > large.rank == 16


@given(tokens, tokens, params, st.floats(1e4, 1e8))
def test_more_data_never_lower_the_rank(a: float, b: float, n: float, per_rank: float) -> None:
    """The recommended and the smallest rank are monotone in the data, and servable."""
    less, more = (capacity.recommend_rank(capacity.sft_need(t), n, per_rank) for t in sorted((a, b)))
    assert less.rank <= more.rank
    assert less.smallest.value <= more.smallest.value
    assert ordered(less.smallest)
    assert more.rank in capacity.SERVABLE_RANKS


@given(tokens, params, ranks, ranks)
def test_a_verdict_never_worsens_with_rank(t: float, n: float, r1: int, r2: int) -> None:
    """A higher rank holds more: over -> contested -> fits, never back; capacity brackets its value."""
    order = [capacity.OVER, capacity.CONTESTED, capacity.FITS]
    low, high = (capacity.verdict(capacity.sft_need(t), n, r * 1e5) for r in sorted((r1, r2)))
    for a, b in zip(low.judgements, high.judgements, strict=True):
        assert order.index(a.verdict) <= order.index(b.verdict)
    assert ordered(low.capacity)


@given(params, params, ranks, ranks)
def test_penalty_falls_with_rank_and_size(n1: float, n2: float, r1: int, r2: int) -> None:
    """A lower rank or a smaller model never has the smaller penalty."""
    (a, b), (m, n) = sorted((r1, r2)), sorted((n1, n2))
    assert capacity.rank_penalty(a, m).value >= capacity.rank_penalty(b, m).value
    assert capacity.rank_penalty(a, m).value >= capacity.rank_penalty(a, n).value
    assert ordered(capacity.rank_penalty(a, m))


@given(st.integers(1, 10**6), st.integers(2, 128), st.floats(0, 1))
def test_rl_carries_at_most_a_bit_an_episode(problems: int, group: int, rate: float) -> None:
    """The signal is bounded by the number of episodes, whatever the pass rate."""
    bits = capacity.rl_need(problems, group, rate).bits
    assert 0 <= bits.value <= problems * group * (1 + 1e-12)
    assert capacity.binary_entropy(rate) == pytest.approx(capacity.binary_entropy(1 - rate), abs=1e-9)


# ---------------------------------------------------------------- learning rate


def test_the_law_passes_the_gate_on_models_it_did_not_see() -> None:
    """Model left out: within x2 of the optimum in 90 % of cells, 90 % of regrets below 1 %, flat beaten."""
    from calibrate import learning_rate as fit

    cells = fit.read_cells()
    law = fit.score(cells, fit.left_out(cells, (fit.size, fit.rank), fit.by_model, fit.FAMILY_SD))
    flat = fit.score(cells, [fit.math.log(3e-4)] * len(cells))
    assert law["within_2"] >= 0.9
    assert law["regret_p90_%"] <= 1.0
    assert law["within_1.5"] > flat["within_1.5"]
    assert law["regret_p90_%"] < flat["regret_p90_%"]


def test_constants_are_the_fit_s_output() -> None:
    """The batch rows of the shipped file are what the fit gives on the committed table."""
    from calibrate import learning_rate as fit

    shipped = learning_rate.constants()
    for row in fit.batch_rows():
        assert shipped[row["name"]].value == pytest.approx(row["value"], rel=1e-3)


def test_alpha_travels_with_the_rate() -> None:
    """Twice the scale asks for a lower rate in a wider band; rsLoRA is the same law at its own scale."""
    plain, doubled = (learning_rate.advise(LLAMA_8B, "llama", alpha=a) for a in (32, 64))
    assert (plain.scale, doubled.scale) == (2.0, 4.0)
    assert plain.lr.value / 2 < doubled.lr.value < plain.lr.value
    assert doubled.lr.high / doubled.lr.low > plain.lr.high / plain.lr.low
    rs = learning_rate.advise(LLAMA_8B, "llama", "rslora", rank=16, alpha=8)
    assert rs.scale == 2.0
    assert rs.lr.value == pytest.approx(plain.lr.value)


def test_full_rate_is_a_tenth_in_sft_and_nearer_in_rl() -> None:
    """Full fine-tuning at 1/10 of LoRA's SFT rate with a 3.5-20 spread; the RL ratio is smaller."""
    for objective, low, high in (("sft", 3.5, 22), ("rl", 3.4, 10.1)):
        a = learning_rate.advise(LLAMA_8B, "llama", rank=32, objective=objective)
        assert low < a.lr.value / a.full_lr.value < high
        full = learning_rate.advise(LLAMA_8B, "llama", "full", objective=objective)
        assert full.lr == full.full_lr == a.full_lr


def test_what_was_not_swept_says_so_and_is_wider() -> None:
    """An unseen family, method or size answers with a label and a wider band, never a neighbour's."""
    known = learning_rate.advise(LLAMA_8B, "llama").lr
    for advice in (
        learning_rate.advise(LLAMA_8B, "gemma2"),
        learning_rate.advise(LLAMA_8B, "llama", "dora"),
        learning_rate.advise(135e6, "llama"),
        learning_rate.advise(LLAMA_8B, "llama", objective="rl"),
    ):
        assert advice.labels
        assert advice.lr.high / advice.lr.low > known.high / known.low
    with pytest.raises(UnknownName, match="no exponent"):
        learning_rate.published_lora_lr(2304, "gemma2")


@given(params, params, ranks, ranks, st.sampled_from(["llama", "qwen3_moe", "qwen3_5", "gemma2"]))
def test_rate_rises_with_rank_and_falls_with_size(n1: float, n2: float, r1: int, r2: int, t: str) -> None:
    """At alpha 32 the rate is monotone in rank and in size, and less than x2 apart from r=4 to 128."""
    (a, b), (m, n) = sorted((r1, r2)), sorted((n1, n2))
    assert learning_rate.advise(m, t, rank=a).lr.value <= learning_rate.advise(m, t, rank=b).lr.value
    assert learning_rate.advise(m, t, rank=a).lr.value >= learning_rate.advise(n, t, rank=a).lr.value
    advice = learning_rate.advise(m, t, rank=a)
    assert ordered(advice.lr)
    assert ordered(advice.full_lr)
    assert advice.full_lr.value < advice.lr.value <= 1
    ends = [learning_rate.advise(m, t, rank=r).lr.value for r in (4, 128)]
    assert ends[1] / ends[0] < 2


@given(st.floats(1, 1e6), st.floats(1, 1e6))
def test_short_runs_want_a_higher_rate(s1: float, s2: float) -> None:
    """Monotone in steps, between 1x and 1.5x, and 1x at the length of the sweep."""
    short, long = (learning_rate.short_run_factor(s) for s in sorted((s1, s2)))
    assert 1.5 >= short >= long >= 1
    assert learning_rate.short_run_factor(learning_rate.SWEPT_STEPS) == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- batch


@given(st.integers(1, 4096), st.integers(1, 4096), st.floats(16, 131072))
def test_a_larger_batch_never_needs_fewer_samples(b1: int, b2: int, seq: float) -> None:
    """Samples to target are monotone in the batch; the interval contains the value."""
    small, large = (batch.extra_samples(b, seq) for b in sorted((b1, b2)))
    assert small.value <= large.value
    assert ordered(small)
    assert ordered(batch.samples_to_target(b1))


@given(st.floats(1, 1e9), st.floats(0.1, 10))
def test_small_data_get_a_small_batch(examples: float, epochs: float) -> None:
    """At least 100 steps where batch 1 can give them, else a warning; never above the default."""
    advice = batch.recommend_batch(examples, epochs)
    assert 1 <= advice.batch <= batch.DEFAULT_BATCH
    assert advice.steps >= batch.MIN_STEPS or (advice.batch == 1 and advice.warnings)


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64))
def test_accumulation_never_trains_a_larger_batch_than_needed(b: int, micro: int, devices: int) -> None:
    """micro x devices x steps is the batch rounded down, or one pass where that is larger."""
    a = batch.accumulate(b, micro, devices)
    assert a.effective == micro * devices * a.steps
    assert a.effective <= b or a.steps == 1
    assert bool(a.note) == (a.effective != b)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: learning_rate.advise(LLAMA_8B, "llama", rank=0), "rank 0"),
        (lambda: learning_rate.advise(LLAMA_8B, "llama", alpha=0), "alpha 0"),
        (lambda: learning_rate.advise(LLAMA_8B, "llama", alpha=1e-6), "outside"),
        (lambda: learning_rate.advise(LLAMA_8B, "llama", "loraa"), "not known"),
        (lambda: learning_rate.advise(LLAMA_8B, "llama", objective="dpo"), "not known"),
        (lambda: learning_rate.advise(LLAMA_8B, "llama", steps=0), "0 steps"),
        (lambda: learning_rate.advise(0, "llama"), "no model"),
        (lambda: learning_rate.checked_lr(0), "outside"),
        (lambda: learning_rate.checked_lr(-1e-4), "outside"),
        (lambda: learning_rate.checked_lr(1.5), "outside"),
        (lambda: learning_rate.checked_lr(float("nan")), "outside"),
        (lambda: capacity.rl_need(1000, 1), "zero advantage"),
        (lambda: capacity.rl_need(1000, 8, pass_rate=1.2), "no share"),
        (lambda: capacity.sft_need(0), "teach nothing"),
        (lambda: capacity.sft_need(1e6, first_epoch_nats=-1), "no loss"),
        (lambda: capacity.rank_penalty(0, LLAMA_8B), "rank 0"),
        (lambda: capacity.servable_rank(513), "above what servers accept"),
        (lambda: batch.accumulate(0, 1), "no batch"),
        (lambda: batch.accumulate(8, 0), "empty"),
        (lambda: batch.recommend_batch(0), "no run"),
    ],
)  # fmt: skip
def test_refusals_name_the_fault_and_the_fix(call, word: str) -> None:  # type: ignore[no-untyped-def]
    """A value out of range exits with 3, one line, and a next step."""
    with pytest.raises(LoraPlanError, match=word) as error:
        call()
    assert isinstance(error.value, BadInput)
    assert error.value.fix
    assert "\n" not in str(error.value)
