"""Step time and cost: above the roofline, monotone, near published step times, linear in price."""

import csv
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.track.names import model_of
from lora_planner.cost import cost, usd_at
from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import Price, gpu, gpus
from lora_planner.ledger import Estimate
from lora_planner.method import Method
from lora_planner.throughput import (
    Work,
    adamw_bytes,
    elementwise_bytes,
    kernel_count,
    roofline_s,
    stack,
    stacks,
    step_time,
)
from lora_planner.workload import Division, divided, work

GOLDEN = Path(__file__).parent / "golden"
TODAY = date(2026, 11, 23)
#: layers, hidden, intermediate, vocabulary; attention as wide as hidden, no grouped keys
SHAPES = {"qwen-7b": (32, 4096, 11008, 151936), "qwen-1.8b": (24, 2048, 5504, 151936)}


def lora_work(model: str, seq_len: int, micro_batches: int = 8, rank: int = 64) -> Work:
    """One optimizer step of LoRA on every matrix of a multi-head model, batch 1, checkpointed."""
    layers, h, f, vocab = SHAPES[model]
    tokens = seq_len * micro_batches
    matrices, head = layers * (4 * h * h + 3 * h * f), h * vocab
    d_in, d_out = layers * (4 * h + f), layers * (5 * h + 2 * f)  # q, k, v stored as one
    adapter = rank * (d_in + d_out)
    return Work(
        tokens=tokens,
        linear_flops=2 * tokens * (3 * matrices + 2 * head),
        adapter_flops=8 * tokens * adapter,
        attention_flops=4.5 / 2 * 4 * tokens * seq_len * h * layers,
        activation_bytes=elementwise_bytes(
            tokens=tokens,
            layers=layers,
            hidden=h,
            attention=h,
            kv=h,
            intermediate=f,
            vocab=vocab,
            adapted_in=d_in,
            adapted_out=d_out,
            passes=4,
        ),
        weight_bytes_read=micro_batches * (6 * matrices + 4 * head),
        optimizer_bytes=adamw_bytes(adapter),
        dequantised_params=0,
        kernels=kernel_count(layers=layers, adapted=5 * layers, passes=4, micro_batches=micro_batches),
    )


def model_named(name: str):
    found = model_of(name)
    assert found is not None
    return found


WORK = lora_work("qwen-7b", 2048)
A100 = gpu("a100-sxm-80gb")
amounts = st.floats(0, 1e18, allow_nan=False)


def seconds(work: Work, name: str = "a100-sxm-80gb") -> float:
    card = gpu(name)
    return step_time(work, card, stack("hf-trl", card)).total


def measured_steps():
    with (GOLDEN / "step_seconds.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", measured_steps(), ids=lambda r: f"{r['model']}-{r['seq_len']}")
def test_published_step_times_lie_in_the_interval(row):
    """Published seconds per step lie in the 90 % interval and within 20 % of the value."""
    card = gpu(row["gpu"])
    found = step_time(lora_work(row["model"], int(row["seq_len"])), card, stack("hf-trl", card)).estimate()
    assert found.low <= float(row["measured_s"]) <= found.high
    assert found.value == pytest.approx(float(row["measured_s"]), rel=0.2)


def test_short_sequences_wait_for_launches():
    """At 256 tokens a step costs what its kernels cost to start; at 8192 nothing waits."""
    short, long = lora_work("qwen-1.8b", 256), lora_work("qwen-1.8b", 8192)
    rows = stack("hf-trl", A100)
    assert step_time(short, A100, rows)["waiting for launches"] > 0.5 * seconds(short)
    assert step_time(long, A100, rows)["waiting for launches"] == 0
    assert seconds(short) == pytest.approx(seconds(lora_work("qwen-1.8b", 512)))


@given(st.tuples(*[amounts] * 9), st.sampled_from(gpus()), st.sampled_from(stacks()))
def test_no_step_is_faster_than_the_roofline(numbers, card, name):
    """Value and lower bound stay at or above the time at 100 % of the peak and of the bandwidth."""
    work = Work(*numbers, dtype="fp16")
    found = step_time(work, card, stack(name, card)).estimate()
    floor = roofline_s(work, card) * (1 - 1e-9)
    assert floor <= found.low * (1 + 1e-6) + 1e-12
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize("field", [name for name, of in Work.__dataclass_fields__.items() if "str" not in str(of.type)])
def test_more_work_never_takes_less_time(field):
    """Step time is monotone in every kind of work."""
    more = replace(WORK, **{field: 3 * getattr(WORK, field) + 1})
    assert seconds(more) >= seconds(WORK)


def test_time_is_monotone_in_tokens():
    """Longer sequences never make a step shorter."""
    times = [seconds(lora_work("qwen-7b", 2**n)) for n in range(5, 16)]
    assert times == sorted(times)


def test_dequantisation_only_adds():
    """An nf4 base costs time on top of the same run in bf16."""
    assert seconds(replace(WORK, dequantised_params=1e11)) > seconds(WORK)


def test_a_faster_card_of_the_same_constants_is_faster():
    """With pooled constants, H100 beats its PCIe sibling and H200 is no slower than H100."""
    pcie, sxm, h200 = (seconds(WORK, n) for n in ("h100-pcie-80gb", "h100-sxm-80gb", "h200-sxm-141gb"))
    assert h200 <= sxm < pcie


def test_terms_add_up_and_carry_a_basis():
    """The ledger is max(work, floor), every non-zero term is fitted, the interval is open."""
    found = step_time(WORK, A100, stack("hf-trl", A100))
    assert found.basis == "fitted"
    assert found.estimate().low < found.total < found.estimate().high
    assert all(term.why.startswith("throughput.") for term in found.terms)


def test_an_unmeasured_gpu_has_a_wider_interval():
    """A GPU without own rows gets the pooled constants and their wider spread."""
    own, pooled = stack("hf-trl", A100).rows["spread"], stack("hf-trl", gpu("b200-180gb")).rows["spread"]
    assert pooled.high > own.high


def test_an_unknown_stack_is_an_error():
    """A stack that nobody named is refused, with the known ones."""
    with pytest.raises(UnknownName, match="hf-trl"):
        stack("colossal", A100)


def test_a_stack_without_rows_says_so_and_is_wider():
    """unsloth has no timings: it borrows those of its class, in an interval wider than any measured stack's own."""
    borrowed = stack("unsloth", A100).rows["spread"]
    assert borrowed.basis == "assumed"
    assert "no row of this stack" in borrowed.source
    assert borrowed.high > stack("hf-trl", A100).rows["spread"].high


def test_what_a_card_sustains_holds_for_every_stack():
    """A stack that never ran on a T4 takes there what others showed: less of the peak than on an A100."""
    t4, a100 = (stack("torchtune", gpu(name))["matmul_efficiency"] for name in ("t4-16gb", "a100-sxm-80gb"))
    assert t4 < 0.8 * a100


def test_a_pipeline_waits_and_links_add():
    """A bubble of a quarter adds a quarter of all but the optimizer; a gathering under less work than it takes shows."""
    rows = stack("nemo", A100)
    alone = step_time(WORK, A100, rows)
    waiting = step_time(replace(WORK, bubble=0.25), A100, rows)
    assert waiting.total == pytest.approx(alone.total + 0.25 * (alone.total - alone["optimizer"]))
    hidden, shown = (step_time(replace(WORK, gathered_bytes=n), A100, rows)["links"] for n in (1e6, 1e14))
    assert hidden == 0 < shown


def test_a_model_on_more_gpus_leaves_each_its_share():
    """Tensor and pipeline parallelism divide a copy's work; FSDP gathers its weights twice a micro-batch."""
    model = model_named("llama-3.1-8b")
    copy = work(model, Method("full", 0, 0.0, (), "none"), micro_batch=1, seq_len=4096)
    full = Method("full", 0, 0.0, (), "none")
    four = divided(copy, model, full, Division(gpus=8, tensor=2, pipeline=4), micro_batches=8)
    assert four.linear_flops == pytest.approx(copy.linear_flops / 8)
    assert four.bubble == pytest.approx(3 / 8)
    sharded = divided(copy, model, full, Division(gpus=8, weights=8), micro_batches=1)
    weights = 2 * 2 * model.total
    assert sharded.linear_flops == copy.linear_flops
    assert sharded.gathered_bytes == pytest.approx(7 / 8 * (weights + 4 * model.total))


def test_fp8_is_faster_but_not_twice():
    """Narrow matmuls have twice the peak; casts and attention keep the step from halving."""
    h100 = gpu("h100-sxm-80gb")
    rows = stack("nemo", h100)
    bf16, fp8 = (step_time(replace(WORK, dtype=d), h100, rows).total for d in ("bf16", "fp8"))
    assert 0.5 * bf16 < fp8 < bf16


def test_constants_of_another_gpu_are_refused():
    """Mixing one GPU's constants with another's peaks raises."""
    with pytest.raises(BadInput):
        step_time(WORK, A100, stack("hf-trl", gpu("t4-16gb")))


def price(usd: float, **changes: object) -> Price:
    row = Price("l4-24gb", usd, f"at {usd}", "on-demand", "s", date(2026, 11, 1))
    return replace(row, **changes)


@given(st.floats(0.01, 100), st.floats(1, 1e7), st.integers(1, 64))
def test_cost_is_linear_in_price_time_and_gpus(usd, time_s, n):
    """Twice the price, the time or the GPUs costs twice as much."""
    time = Estimate(time_s / 2, time_s, time_s * 2, "s", "fitted")
    once = usd_at(price(usd), time, n).value
    assert usd_at(price(2 * usd), time, n).value == pytest.approx(2 * once)
    assert usd_at(price(usd), time.scaled(2), n).value == pytest.approx(2 * once)
    assert usd_at(price(usd), time, 2 * n).value == pytest.approx(2 * once)


def test_cost_spans_providers_and_names_the_cheapest():
    """The interval runs from the cheapest short run to the dearest long one; stale rows are counted."""
    others = [price(0.1, commitment="spot"), price(9, gpu="t4-16gb")]
    rows = [price(0.8), price(0.4, as_of=date(2025, 1, 1)), *others]
    bill = cost(Estimate(1800, 3600, 7200, "s", "fitted"), "l4-24gb", rows, TODAY)
    assert (bill.usd.low, bill.usd.high) == pytest.approx((0.2, 1.6))
    assert bill.cheapest.usd_per_gpu_hour == 0.4
    assert (bill.stale, bill.usd.basis) == (1, "fitted")
    assert bill.oldest_days == (TODAY - date(2025, 1, 1)).days


def test_a_cost_is_no_surer_than_its_price():
    """An assumed price makes the bill assumed."""
    assert usd_at(price(1, basis="assumed"), Estimate(1, 1, 1, "s", "exact")).basis == "assumed"


def test_a_gpu_without_a_price_is_an_error():
    """No price is borrowed from another GPU or another commitment."""
    with pytest.raises(UnknownName, match="price file"):
        cost(Estimate(1, 1, 1, "s", "exact"), "l4-24gb", [price(1, gpu="t4-16gb")], TODAY)
