"""Sampling for RL: kernels measured by others, caches of the real library, relations that hold for any model."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from functools import cache
from statistics import median
from typing import Any

import pytest
import test_arch
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calibrate import rollout as fits
from lora_planner.cli import main
from lora_planner.errors import UnknownName
from lora_planner.facts import gpu
from lora_planner.method import method
from lora_planner.model import Model
from lora_planner.model_source import load_model
from lora_planner.rollout import (
    HF,
    VLLM,
    Card,
    Kept,
    Loaded,
    Sampling,
    cache_bytes,
    card,
    decode_step,
    kept,
    loaded,
    rollout,
    segments,
)
from lora_planner.throughput import stack

BASE = (("weights", 16e9),)
NOTHING = Loaded(0.0, 0.0, (), 0, 0, 0, 0, 0.0)
LORA = method("lora", 8)
STACK = stack("hf-trl", gpu("h100-sxm-80gb"))


# ---------------------------------------------------------------- golden: kernels timed by others


def test_the_packaged_rows_are_the_fit() -> None:
    """Who changes a formula or a row has to run `python -m calibrate.rollout`: the packaged rows are what it writes."""
    packaged = [row for row in json.loads(fits.OUT.read_text())["constants"] if row["basis"] == "fitted"]
    found = [asdict(row) for row in fits.constant_rows()]
    assert [row["name"] + row["gpu"] for row in packaged] == [row["name"] + row["gpu"] for row in found]
    for old, new in zip(packaged, found, strict=True):
        assert (old["n"], old["source"]) == (new["n"], new["source"])
        assert [old[x] for x in ("low", "value", "high")] == pytest.approx(
            [new[x] for x in ("low", "value", "high")], rel=1e-3
        )


#: kind of kernel -> the most that the median error may be where a card was left out of the fit
LEFT_OUT = {"gemm": 0.10, "attention": 0.20, "experts": 0.20}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_a_card_nobody_fitted_on(kind: str) -> None:
    """Each of five cards left out in turn: errors over all of them."""
    assert median(fits.left_out(kind)) < LEFT_OUT[kind]


#: ms of vLLM's whole MLA module of DeepSeek-V3 at 2048 and at 8192 tokens: heads, sequences.
#: Source: aiconfigurator-core 0.12.0, systems/data/*/mla/vllm/0.24.0/mla_generation_module_perf
MLA_MS = {
    ("h100-sxm-80gb", 128, 64): (0.3046, 0.4616), ("h100-sxm-80gb", 128, 256): (0.6001, 1.224),
    ("h100-sxm-80gb", 16, 64): (0.174, 0.3233), ("h100-sxm-80gb", 16, 256): (0.349, 0.9393),
    ("h200-sxm-141gb", 128, 64): (0.2555, 0.4042), ("h200-sxm-141gb", 128, 256): (0.5381, 1.1408),
    ("h200-sxm-141gb", 16, 64): (0.1518, 0.256), ("h200-sxm-141gb", 16, 256): (0.2766, 0.6767),
    ("b200-180gb", 128, 64): (0.1589, 0.2388), ("b200-180gb", 128, 256): (0.346, 0.6648),
    ("b200-180gb", 16, 64): (0.091, 0.1699), ("b200-180gb", 16, 256): (0.1811, 0.4933),
}  # fmt: skip


def test_latent_attention_that_nobody_fitted_on() -> None:
    """What 6144 more tokens of context cost an MLA layer: the latent cache's bytes, or its products. None in the fit."""
    found = []
    for (name, heads, sequences), (short, long) in MLA_MS.items():
        (layer,) = (k for k in kept(model("deepseek-v3"), VLLM) if k.layers == 58)
        layer = replace(layer, layers=1, pair_flops=layer.pair_flops * heads / 128)
        c = card(gpu(name), VLLM)
        step = [decode_step(NOTHING, (layer,), sequences, tokens, c) for tokens in (2048, 8192)]
        predicted = sum(step[1].values()) - sum(step[0].values())
        found.append(abs(math.log(predicted / ((long - short) / 1e3))))
    assert median(found) < 0.15 and max(found) < 0.5, [round(e, 2) for e in found]


#: us of vLLM's fused_recurrent_gated_delta_rule_packed_decode, 32 value heads of 128 x 128, by sequences.
#: Source: aiconfigurator-core 0.12.0, systems/data/*/linear_attention/vllm/0.24.0/gdn_perf
DELTA_US = {
    ("h100-sxm-80gb", 64): 95.08, ("h100-sxm-80gb", 1024): 1439.79, ("h200-sxm-141gb", 64): 71.69,
    ("h200-sxm-141gb", 1024): 1051.97, ("b200-180gb", 64): 48.96, ("b200-180gb", 1024): 659.06,
}  # fmt: skip


def test_a_recurrent_state_that_nobody_fitted_on() -> None:
    """An fp32 state, read and written, at the efficiency of attention's cache: within a quarter of the measured kernel."""
    for (name, sequences), us in DELTA_US.items():
        c = card(gpu(name), VLLM)
        step = decode_step(NOTHING, (Kept(1, 0.0, None, 4.0 * 32 * 128 * 128),), sequences, 1000, c)
        assert step["cache"] == pytest.approx(us * 1e-6, rel=0.25), name


# ---------------------------------------------------------------- oracle: the caches of transformers

KEPT = [
    *(("llama", values) for values in test_arch.VARIED["llama"]),
    *(("qwen3", values) for values in test_arch.VARIED["qwen3"]),
    *(("gemma2", values) for values in test_arch.VARIED["gemma2"]),
    *(("gpt_oss", values) for values in test_arch.VARIED["gpt_oss"]),
    *(("deepseek_v2", values) for values in test_arch.VARIED["deepseek_v2"][:2]),
    *(("deepseek_v3", values) for values in test_arch.VARIED["deepseek_v3"][:2]),
    ("qwen3_moe", test_arch.VARIED["qwen3_moe"][1]),
    ("gpt2", test_arch.OLD),
]
HYBRID = ("qwen3_next", "qwen3_5_text", "nemotron_h", "bamba", "mamba2", "gemma3_text", "llama4_text")


def cases() -> list[Any]:
    hybrid = importorskip_cases()
    found = [(family, test_arch._config(family, values)) for family, values in KEPT]
    found += [(family, {**values, "model_type": family}) for family, values in hybrid if family in HYBRID]
    return [pytest.param(family, config, id=f"{family}-{i}") for i, (family, config) in enumerate(found)]


def importorskip_cases() -> list[tuple[str, dict[str, Any]]]:
    try:
        import test_arch_hybrid
    except pytest.skip.Exception:  # no torch: the oracle is skipped, the rest is not
        return []
    return list(test_arch_hybrid.CASES)


@pytest.mark.parametrize(("family", "config"), cases())
def test_the_cache_is_that_of_transformers(family: str, config: dict[str, Any]) -> None:
    """Bytes after 100 tokens. A sliding layer of transformers keeps one token less than its window, and a counter."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from lora_planner.arch import from_config

    values = {k: v for k, v in copy.deepcopy(config).items() if k != "model_type"}
    made = transformers.AutoConfig.for_model(family, **values)
    module = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        out = module(torch.randint(3, 90, (1, 100)), use_cache=True)
    theirs = out.get("past_key_values") or out.get("cache_params")
    ours = from_config(config)
    sliding = [k for k in kept(ours, HF) if k.window]
    last = sum(k.layers * k.token_bytes for k in sliding if k.window and k.window <= 100)
    counters = 8 * sum(k.layers for k in sliding)
    assert abs(stored(theirs, set(), torch) - (cache_bytes(ours, 100, HF) - last)) <= counters


def stored(value: Any, seen: set[int], torch: Any) -> int:
    """Bytes of all tensors in an object, each once."""
    if torch.is_tensor(value):
        if value.data_ptr() in seen:
            return 0
        seen.add(value.data_ptr())
        return int(value.numel() * value.element_size())
    inner = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()  # fmt: skip
    return sum(stored(item, seen, torch) for item in inner)


# ---------------------------------------------------------------- relations

MODELS = st.sampled_from(["qwen3-0.6b", "qwen3-8b", "gemma-3-4b", "deepseek-v2-lite", "qwen3-30b-a3b", "granite-4.0-h-tiny"])  # fmt: skip
H100 = gpu("h100-sxm-80gb")


@cache
def model(name: str) -> Model:
    return load_model(name, offline=True)


def step_s(name: str, sequences: float, context: float, c: Card, engine: str = VLLM) -> float:
    return sum(decode_step(loaded(model(name)), kept(model(name), engine), sequences, context, c, engine).values())


@given(MODELS, st.integers(1, 400), st.integers(1, 400), st.integers(1, 30_000), st.sampled_from(fits.cards()))
def test_a_step_of_more_is_no_faster_and_a_token_of_more_no_dearer(
    name: str, one: int, more: int, context: int, on: str
) -> None:
    """In sequences and context a step grows; its seconds a token fall."""
    c = card(gpu(on), VLLM)
    small, large = step_s(name, one, context, c), step_s(name, one + more, context, c)
    assert small <= large * (1 + 1e-9)
    assert large / (one + more) <= small / one * (1 + 1e-9)
    assert small <= step_s(name, one, context + 1000, c) * (1 + 1e-9)


@given(MODELS, st.integers(1, 300), st.floats(1.0, 4.0))
def test_more_bandwidth_is_never_slower(name: str, sequences: int, factor: float) -> None:
    c = card(H100, VLLM)
    assert step_s(name, sequences, 2000, replace(c, bandwidth=c.bandwidth * factor)) <= step_s(name, sequences, 2000, c)


@given(MODELS, st.integers(1, 300), st.floats(50, 4000), st.floats(0.3, 1.0))
@settings(deadline=None)
def test_more_memory_is_never_slower(name: str, samples: int, answer: float, share: float) -> None:
    """And the same for a card with less: where its samples no longer run together, they take longer or do not fit."""
    what = Sampling(100, answer, 8)
    small = replace(H100, memory_bytes=round(H100.memory_bytes * share))
    a, b = (rollout(model(name), LORA, g, what, samples, STACK) for g in (small, H100))
    assert a.at_once <= b.at_once
    if a.fits:
        assert b.ledger.total <= a.ledger.total * 1.01
    assert a.memory.total <= a.allowed_bytes or a.at_once <= 1


@given(st.integers(1, 2000), st.integers(1, 600), st.floats(20, 5000), st.sampled_from([0.25, 0.5, 1.0]))
@example(5, 5, 20.0, 0.25)  # 5 * (1 - 4 / 5) is below 1
def test_every_token_is_sampled_once(samples: int, at_once: int, answer: float, sigma: float) -> None:
    """Sequences times steps is samples times their mean length, but for the grid of quantiles and the limit."""
    parts = segments(samples, min(samples, at_once), Sampling(0, answer, 8, limit=1e8), sigma)
    tokens = sum(part.sequences * part.steps for part in parts)
    slack = answer * math.exp(5 * sigma)  # the longest one, alone in the end
    assert tokens == pytest.approx(samples * answer, rel=0.06, abs=slack)
    assert all(part.steps > 0 and part.sequences >= 1 for part in parts)


def test_a_longer_tail_takes_longer() -> None:
    what = Sampling(200, 1000, 8)
    r = rollout(model("qwen3-8b"), LORA, H100, what, 64, STACK, BASE)
    assert r.ledger.estimate().low < r.ledger.total < r.ledger.estimate().high
    lengths = next(t for t in r.ledger.terms if t.name == "spread of lengths")
    assert lengths.low is not None and lengths.high is not None and lengths.low < 0 < lengths.high
    assert 0.1 < r.last_tenth < 0.6


def test_generate_waits_for_the_longest() -> None:
    """transformers' generate starts each kernel from Python and keeps all rows until the last is done: slower."""
    fast, slow = (
        rollout(model("qwen3-8b"), LORA, H100, Sampling(200, 1000, 8, e), 32, STACK, BASE) for e in (VLLM, HF)
    )
    assert slow.ledger.total > 3 * fast.ledger.total
    assert slow.ledger["launches"] > 0 and not fast.ledger["launches"]


def test_the_adapter_is_taxed_where_it_is_served() -> None:
    what, plain = Sampling(200, 1000, 8), model("qwen3-8b")
    full, small, large = (rollout(plain, m, H100, what, 32, STACK, BASE).ledger for m in (method("full"), LORA, method("lora", 256)))  # fmt: skip
    assert full.total < small.total < large.total
    assert not full["serving the adapter"]


def test_experts_that_nobody_chose_are_not_read() -> None:
    """One token reads its experts, many tokens read all of them, and never more."""
    c = card(H100, VLLM)
    read = [decode_step(loaded(model("qwen3-30b-a3b")), (), n, 1, c)["experts"] for n in (1, 8, 64, 512)]
    assert read == sorted(read)
    assert read[0] / read[-1] == pytest.approx(8 / 128, rel=0.01)


# ---------------------------------------------------------------- the plan


def result(*more: str) -> Any:
    words = [
        "recommend",
        "--model",
        "qwen3-8b",
        "--rl",
        "--problems",
        "1000",
        "--gpu",
        "h100-sxm-80gb",
        "--json",
        *more,
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_phases_are_the_step_and_the_run() -> None:
    """Shares sum to one, seconds to the step, steps to the run; training alone stays visible; cost is the run's."""
    document = result("--sample-tokens", "1500")
    plan = document["result"]["recommended"]
    phases, time = plan["phases"], plan["time"]
    assert [p["name"] for p in phases] == ["rollout", "log-probabilities", "training", "sync"]
    assert sum(p["share"] for p in phases) == pytest.approx(1)
    assert sum(p["seconds"]["value"] for p in phases) == pytest.approx(time["step_s"]["value"])
    assert time["run_s"]["value"] == pytest.approx(time["step_s"]["value"] * plan["batch"]["steps"], rel=0.02)
    (training,) = (p for p in phases if p["name"] == "training")
    assert training["seconds"] == time["train_step_s"]
    assert all(p["seconds"]["low"] < p["seconds"]["value"] < p["seconds"]["high"] for p in phases)
    cheapest = plan["cost"]["cheapest"]["usd_per_gpu_hour"]
    assert plan["cost"]["cheapest_usd"]["value"] == pytest.approx(time["run_s"]["value"] / 3600 * cheapest)
    kinds = {row["key"]: row["kind"] for row in document["provenance"]}
    assert kinds["rollout"] == "assumed" and {"training", "sync", "log-probabilities"} <= kinds.keys()
    assert "is not" in next(w["msg"] for w in document["warnings"] if w["code"] == "W-RL-TIME")


def test_log_probabilities_are_part_of_a_training_step() -> None:
    """One forward pass: less than half of a step that has two backward passes' worth besides."""
    plan = result("--sample-tokens", "1500")["result"]["recommended"]
    seconds_ = {p["name"]: p["seconds"]["value"] for p in plan["phases"]}
    assert 0.15 < seconds_["log-probabilities"] / seconds_["training"] < 0.5


def test_the_peak_is_the_largest_phase_and_no_sum() -> None:
    memory = result("--sample-tokens", "1500")["result"]["recommended"]["memory"]
    totals = {name: ledger["total"] for name, ledger in memory["phases"].items()}
    assert memory["peak_bytes"]["value"] == pytest.approx(max(totals.values()))
    assert memory["peak_phase"] == max(totals, key=lambda name: totals[name])


def test_the_trainers_own_model_needs_no_second_copy_and_no_sync() -> None:
    """`--engine hf`: no log-probabilities of another engine, no weights to send, no second base."""
    plan = result("--sample-tokens", "500", "--engine", "hf")["result"]["recommended"]
    assert [p["name"] for p in plan["phases"]] == ["rollout", "training"]
    assert "engine weights" not in {t["name"] for t in plan["rollout"]["memory"]["terms"]}
    assert plan["rollout"]["serve"] == ""


def test_samples_are_problems_times_group() -> None:
    """However the length is given: by the answer, or by the tokens of all samples."""
    one = result("--sample-tokens", "800", "--group", "8")["result"]
    two = result("--tokens", "8M", "--group", "8")["result"]
    assert one["data"]["examples"] == two["data"]["examples"] == 8000
    assert two["recommended"]["rollout"]["answer_tokens"] == pytest.approx(1000)
    assert one["recommended"]["rollout"]["prompt_tokens"] == 200


def test_serve_flags_name_a_rank_that_loads() -> None:
    plan = result("--sample-tokens", "800")["result"]["recommended"]
    assert f"--max-lora-rank {plan['method']['rank']}" in plan["rollout"]["serve"]
    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--rl", "--problems", "1000", "--sample-tokens", "800",
                                     "--gpu", "h100-sxm-80gb"])  # fmt: skip
    assert "phases" in done.output and "--max-lora-rank" in done.output and "W-RL-TIME" in done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sample-tokens", "0"], "answers of 0 tokens"),
        (["--sample-tokens", "nan"], "answers of nan"),
        (["--sample-tokens", "-5"], "answers of -5"),
        (["--sample-tokens", "1e300"], "answers of 1e+300"),
        (["--tokens", "1M", "--sample-tokens", "5000"], "counts all samples"),
        (["--tokens", "100"], "tokens a sample"),
        (["--sample-tokens", "3000", "--max-length", "1000"], "do not fit into"),
        (["--sample-tokens", "100", "--group", "1"], "zero advantage"),
        (["--sample-tokens", "100", "--engine", "sglang"], "sglang"),
    ],
)
def test_refused(words: list[str], says: str) -> None:
    """One line with the cause, never a traceback."""
    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--rl", "--problems", "1000", "--gpu", "h100-sxm-80gb", *words])  # fmt: skip
    assert done.exit_code in (2, 3, 4), done.output
    assert says in done.output and "Traceback" not in done.output


def test_sampling_that_does_not_fit_says_what_would() -> None:
    """Two copies of 8B in 16 bit exceed 24 GiB; the trainer's own model, in 4 bit, does not."""
    words = [
        "recommend",
        "--model",
        "qwen3-8b",
        "--rl",
        "--problems",
        "1000",
        "--sample-tokens",
        "500",
        "--gpu",
        "rtx4090-24gb",
    ]
    assert CliRunner().invoke(main, words).exit_code == 4
    assert CliRunner().invoke(main, [*words, "--engine", "hf"]).exit_code == 0


def test_supervised_plans_know_nothing_of_it() -> None:
    done = CliRunner().invoke(
        main, ["recommend", "--model", "qwen3-8b", "--tokens", "1M", "--gpu", "h100-sxm-80gb", "--json"]
    )
    plan = json.loads(done.stdout)["result"]["recommended"]
    assert "phases" not in plan and "rollout" not in plan["memory"]["phases"] and "train_step_s" not in plan["time"]


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UnknownName, match="vllm, hf"):
        Sampling(0, 10, 4, "tgi")
