"""flops.py against numbers counted by others, against torch's own counter, and against itself."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_planner import flops
from lora_planner.arch import from_config
from lora_planner.errors import BadInput, UnknownName, UnsupportedAdapter
from lora_planner.method import Method, method
from lora_planner.model import Model
from lora_planner.params import trainable_params

GOLDEN = Path(__file__).parents[1] / "calibrate" / "tables"
CONFIGS = Path(__file__).parents[1] / "lora_planner" / "data" / "models"
FULL = method("full")

# The shapes behind flops_small.csv: found from its trainable counts, which they reproduce.
WIDE = {
    "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 8192,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {**WIDE, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {**WIDE, "model_type": "llama", "intermediate_size": 1408, "num_key_value_heads": 2}
MLA = {
    **MOE, "model_type": "deepseek_v2", "num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": None,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "intermediate_size": 704,
    "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-8L-bigvocab": {
        **LLAMA, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 4, "intermediate_size": 704, "vocab_size": 32000, "tie_word_embeddings": True,
    },
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 128, "intermediate_size": 1536,
              "tie_word_embeddings": True},
    "gemma2": {**WIDE, "model_type": "gemma2", "num_key_value_heads": 4, "head_dim": 64,
               "intermediate_size": 2048, "tie_word_embeddings": True},
    "gpt-neox": {**WIDE, "model_type": "gpt_neox", "intermediate_size": 2048},
    "gpt2": {"model_type": "gpt2", "n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 2048,
             "vocab_size": 8192},
    "phi3": {**LLAMA, "model_type": "phi3", "num_key_value_heads": 8},
    "falcon": {**WIDE, "model_type": "falcon", "tie_word_embeddings": True},
    "mixtral": {**MOE, "model_type": "mixtral", "intermediate_size": 512, "num_local_experts": 8,
                "num_experts_per_tok": 2},
    "qwen3-moe": {**MOE, "model_type": "qwen3_moe", "head_dim": 64, "intermediate_size": 512,
                  "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4},
    "deepseek-v2": MLA,
}  # fmt: skip
HYBRID = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 512, "num_experts_per_tok": 2,
}  # fmt: skip
DELTA = {
    **HYBRID, "model_type": "qwen3_next", "num_hidden_layers": 4, "num_experts": 4,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA = {
    **HYBRID, "model_type": "granitemoehybrid", "num_hidden_layers": 3, "num_local_experts": 4,
    "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 48, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 16, "mamba_expand": 2,
}  # fmt: skip
TARGETS = {
    "all": ("all-linear",), "attn": ("attention",), "mlp": ("mlp",), "all+head": ("all-linear", "unembed"),
    "all+experts": ("all-linear",),
}  # fmt: skip


def rows(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((GOLDEN / name).open()))


def method_of(mode: str, rank: str) -> Method:
    if mode == "full":
        return FULL
    experts = "fused" if mode == "all+experts" else "none"
    return Method(rank=int(rank), targets=TARGETS[mode], experts=experts)


@pytest.fixture(scope="module")
def small() -> dict[str, Model]:
    return {name: from_config(config) for name, config in SMALL.items()}


def real(name: str) -> Model:
    return from_config(json.loads((CONFIGS / f"{name}.json").read_text())["config"])


# ---- golden ----


@pytest.mark.parametrize("row", rows("flops_models.csv"), ids=lambda r: f"{r['model']}-{r['mode']}")
def test_real_models_cost_what_torch_counted(row: dict[str, str]) -> None:
    """Forward and backward of forty real models at 2048 tokens, full and LoRA, to the FLOP."""
    model, how, seq_len = real(row["model"]), method_of(row["mode"], row["rank"]), int(row["seq_len"])
    ahead = flops.forward(model, how, seq_len).total * seq_len
    back = flops.train(model, how, seq_len, "eager").total * seq_len - ahead
    tol = float(row["rel_tol"]) or 1e-12  # float rounding only
    assert ahead == pytest.approx(float(row["forward"]), rel=tol)
    assert back == pytest.approx(float(row["backward"]), rel=tol)


@pytest.mark.parametrize("name", SMALL)
def test_small_models_cost_what_torch_counted(name: str, small: dict[str, Model]) -> None:
    """Every target set, rank, length, attention, checkpointing and input gradient, to the FLOP."""
    for row in rows("flops_small.csv"):
        if row["model"] != name:
            continue
        model, how, seq_len = small[name], method_of(row["mode"], row["rank"]), int(row["seq_len"])
        assert trainable_params(model, how) == int(row["trainable"]), row
        ahead = flops.forward(model, how, seq_len).total * seq_len
        step = flops.train(
            model, how, seq_len, row["attention"], row["checkpointing"], input_grads=row["input_grads"] == "1"
        )
        tol = float(row["rel_tol"]) or 1e-12
        assert ahead == pytest.approx(float(row["forward"]), rel=tol), row
        assert step.total * seq_len - ahead == pytest.approx(float(row["backward"]), rel=tol), row


# ---- oracle: torch's counter on a real model with real adapters ----


@pytest.fixture(scope="module")
def torch() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers").logging.set_verbosity_error()
    pytest.importorskip("peft")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


def corrections(torch: Any) -> dict[Any, Any]:
    """What torch 2.13's counter lacks (flash on the CPU) or miscounts (depthwise convolutions)."""

    def conv_backward(g: Any, x: Any, w: Any, *args: Any, out_val: Any = None, **_: Any) -> int:
        needed = args[-1]
        return 2 * x[0] * g[1] * g[2] * w[1] * w[2] * (needed[0] + needed[1])

    def flash(q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
        return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])

    def flash_backward(g: Any, q: Any, k: Any, v: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
        return 2 * q[0] * q[1] * q[2] * k[2] * (3 * q[3] + 2 * v[3])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: flash,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_backward,
        aten.convolution_backward: conv_backward,
    }


def counted(
    torch: Any,
    config: dict[str, Any],
    how: Method,
    modules: str | list[str],
    checkpointing: str,
    shape: tuple[int, int],
) -> tuple[int, int]:
    """Forward and backward FLOP of one step, from transformers, peft and FlopCounterMode."""
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in config.items() if key != "model_type"}
    hf = AutoConfig.for_model(config["model_type"], **values)
    attention = "eager" if config["model_type"] == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(hf, attn_implementation=attention)
    if any("expert" in name for name, _ in model.named_parameters()):
        model.set_experts_implementation("batched_mm")  # the counter knows no grouped_mm
    if not how.is_full:
        wrap = LoraConfig(r=how.rank, target_modules=modules, use_dora=how.name == "dora")
        model = get_peft_model(model, wrap)
    if how.name == "lora-fa":
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad and "lora_A" not in name)
    if checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(0, 100, shape)
    with FlopCounterMode(display=False, custom_mapping=corrections(torch)) as counter:
        out = model(input_ids=ids, use_cache=False).logits.float().sum()
        ahead = counter.get_total_flops()
        out.backward()
    return ahead, counter.get_total_flops() - ahead


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Fewer layers and words, so that a test is fast."""
    short = {"n_layer": 2} if "n_layer" in config else {"num_hidden_layers": 2}
    return {**config, **short, "vocab_size": 256, "pad_token_id": 0}


def check(torch: Any, config: dict[str, Any], how: Method, modules: str | list[str], checkpointing: str) -> None:
    batch, seq_len = 2, 72  # no multiple of a chunk
    want = counted(torch, config, how, modules, checkpointing, (batch, seq_len))
    model, attention = from_config(config), "eager" if config["model_type"] == "gemma2" else "sdpa"
    ahead = flops.forward(model, how, seq_len, batch).total * batch * seq_len
    step = flops.train(model, how, seq_len, attention, checkpointing, batch).total * batch * seq_len
    assert (ahead, step - ahead) == pytest.approx(want, rel=1e-12)


LEAVES = {  # target_modules that peft does not rewrite, and the same in our words
    "llama": (["q_proj", "v_proj"], ("q_proj", "v_proj")),
    "qwen3": ("all-linear", ("peft-all-linear",)),
    "gpt2": ("all-linear", ("peft-all-linear",)),
    "gpt-neox": (["query_key_value", "dense"], ("attention",)),
    "falcon": (["query_key_value", "dense"], ("attention",)),
    "gemma2": (["gate_proj", "up_proj", "down_proj"], ("mlp",)),
    "phi3": (["o_proj"], ("o_proj",)),
    "mixtral": ("all-linear", ("peft-all-linear",)),
    "qwen3-moe": (["q_proj", "k_proj", "v_proj", "o_proj"], ("attention",)),
    "deepseek-v2": ("all-linear", ("peft-all-linear",)),
}


@pytest.mark.parametrize("checkpointing", flops.CHECKPOINTING)
@pytest.mark.parametrize("name", LEAVES)
def test_transformers_and_peft_do_what_the_table_says(torch: Any, name: str, checkpointing: str) -> None:
    """Full and LoRA, fused experts and low-rank attention included, with and without checkpointing."""
    config = shrink(SMALL[name])
    modules, targets = LEAVES[name]
    check(torch, config, FULL, "", checkpointing)
    check(torch, config, Method(rank=4, targets=targets), modules, checkpointing)


@pytest.mark.parametrize("checkpointing", flops.CHECKPOINTING)
@pytest.mark.parametrize("config", [DELTA, MAMBA], ids=lambda c: str(c["model_type"]))
def test_scans_cost_what_the_torch_code_does(torch: Any, config: dict[str, Any], checkpointing: str) -> None:
    """Gated delta rule and Mamba-2, with padding to whole chunks, full and LoRA."""
    check(torch, config, FULL, "", checkpointing)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    check(torch, config, Method(rank=4, targets=("attention",)), modules, checkpointing)


@pytest.mark.parametrize("checkpointing", flops.CHECKPOINTING)
@pytest.mark.parametrize("name", ["opt", "llama4_text", "qwen2_moe"])
def test_what_follows_the_last_product_is_recomputed(torch: Any, name: str, checkpointing: str) -> None:
    """Dropout (OPT), experts computed but not chosen (Llama-4), a gated shared expert (Qwen2-MoE)."""
    config = {
        **HYBRID, "model_type": name, "num_hidden_layers": 2, "ffn_dim": 96, "word_embed_proj_dim": 64,
        "num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2,
        "num_experts_per_tok": 1, "attention_chunk_size": 128,
    }  # fmt: skip
    check(torch, config, FULL, "", checkpointing)


@pytest.mark.parametrize("checkpointing", flops.CHECKPOINTING)
@pytest.mark.parametrize("name", ["dora", "lora-fa"])
def test_variants_of_lora_cost_what_they_add_or_leave_out(torch: Any, name: str, checkpointing: str) -> None:
    """DoRA's norms cost a product with the identity a forward pass; a frozen A has no gradient."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    check(torch, shrink(LLAMA), Method(name, 4), modules, checkpointing)


# ---- relations ----

PLAIN = Method(experts="per-expert")
LENGTHS = st.integers(1, 40_000)


def test_one_expert_is_a_dense_mlp() -> None:
    """A mixture of one expert costs a dense model plus its router."""
    moe = from_config({**SMALL["mixtral"], "num_local_experts": 1, "num_experts_per_tok": 1})
    dense = from_config({**SMALL["mixtral"], "model_type": "mistral"})
    for how in (FULL, Method(targets=("attention",))):
        ours = flops.train(moe, how, 128, "eager", input_grads=True).total
        theirs = flops.train(dense, how, 128, "eager", input_grads=True).total
        routers = 2 * moe.hidden_size * moe.layers * (3 if how is FULL else 2)
        assert ours == theirs + routers


def test_the_ratio_of_matrices_alone_is_two_thirds(small: dict[str, Model]) -> None:
    """Without scores, adapters' own cost and the first layer's savings, LoRA is 2/3 of full."""
    llama = small["llama"]
    bare = replace(llama, blocks=tuple(replace(block, mixer=None) for block in llama.blocks))
    full = flops.train(bare, FULL, 128).total
    one, two = (flops.train(bare, replace(PLAIN, rank=r), 128, input_grads=True).total for r in (1, 2))
    assert (2 * one - two) / full == pytest.approx(2 / 3, rel=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "deepseek-v2"])
@settings(max_examples=20, deadline=None)
@given(seq_len=LENGTHS, checkpointing=st.sampled_from(flops.CHECKPOINTING))
def test_at_the_break_even_rank_both_cost_the_same(
    small: dict[str, Model], name: str, seq_len: int, checkpointing: str
) -> None:
    """The ratio to full fine-tuning passes 1 between the two whole ranks around it."""
    model = small[name]
    rank = flops.break_even_rank(model, PLAIN, seq_len, "sdpa", checkpointing)
    below = replace(PLAIN, rank=max(1, int(rank)))
    above = replace(PLAIN, rank=int(rank) + 1)
    assert flops.lora_to_full_ratio(model, above, seq_len, "sdpa", checkpointing) >= 1
    if rank >= 1:
        assert flops.lora_to_full_ratio(model, below, seq_len, "sdpa", checkpointing) <= 1 + 1e-12


def test_the_linear_break_even_rank_is_the_exact_one_without_savings(small: dict[str, Model]) -> None:
    """Where nothing is skipped, scores cancel and r* = P / (3 S)."""
    model, how = small["qwen3"], replace(PLAIN, rank=1)
    full = flops.train(model, FULL, 512).total
    one, two = (flops.train(model, replace(how, rank=r), 512, input_grads=True).total for r in (1, 2))
    assert flops.linear_break_even_rank(model, how) == pytest.approx(1 + (full - one) / (two - one))


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(SMALL)), seq_len=LENGTHS, rank=st.integers(1, 60), batch=st.integers(1, 64))
def test_more_rank_targets_or_checkpointing_never_cost_less(
    small: dict[str, Model], name: str, seq_len: int, rank: int, batch: int
) -> None:
    """Monotone in rank, in the set of targets, in checkpointing; LoRA-FA <= LoRA <= DoRA."""
    model = small[name]

    def cost(how: Method, checkpointing: str = "none") -> float:
        return flops.train(model, how, seq_len, "sdpa", checkpointing, batch).total

    how = replace(PLAIN, rank=rank)
    assert cost(how) <= cost(replace(how, rank=rank + 1))
    assert cost(replace(how, targets=("attention",))) <= cost(how) <= cost(how, "full")
    assert cost(how) <= cost(replace(how, targets=("all-linear", "unembed")))
    assert cost(replace(how, name="lora-fa")) <= cost(how) == cost(replace(how, name="qlora"))
    assert cost(how) <= cost(replace(how, name="dora"))
    assert flops.model_flops(model, how, seq_len, batch).total <= cost(how)


@settings(max_examples=50, deadline=None)
@given(name=st.sampled_from(sorted(SMALL)), seq_len=LENGTHS)
def test_longer_sequences_cost_more_per_token(small: dict[str, Model], name: str, seq_len: int) -> None:
    """Scores grow with the sequence; the matrices of a token do not."""
    short, long = (flops.train(small[name], PLAIN, n) for n in (seq_len, seq_len + 1))
    assert short.total < long.total
    assert short["matrices, forward"] == long["matrices, forward"]


def test_merging_adapters_into_experts_is_paid_per_pass(small: dict[str, Model]) -> None:
    """Eight times the batch pays an eighth per token, and nothing else changes."""
    how = replace(PLAIN, experts="fused")
    one, eight = (flops.train(small["mixtral"], how, 128, batch=b) for b in (1, 8))
    for old, new in zip(one.terms, eight.terms, strict=True):
        assert old.value == new.value * (8 if old.name.startswith("adapters merged") else 1)


@pytest.mark.parametrize("config", [*SMALL.values(), DELTA, MAMBA], ids=lambda c: str(c["model_type"]))
def test_the_split_adds_up(config: dict[str, Any]) -> None:
    """The parts by kernel sum to the ledger, and a causal kernel does about half of the scores."""
    model = from_config(config)
    for how in (FULL, PLAIN, replace(PLAIN, experts="fused")):
        parts = flops.split(model, how, 1000, "sdpa", "full")
        matrices = parts.matrices_forward + parts.matrices_backward
        adapters = parts.adapters_forward + parts.adapters_backward
        rest = parts.scores_forward + parts.scores_backward + parts.scans_forward + parts.scans_backward
        assert matrices + adapters + rest == pytest.approx(flops.train(model, how, 1000, "sdpa", "full").total)
        assert parts.scores_visible_forward == pytest.approx(parts.scores_forward * 0.5005)


@given(seq_len=st.integers(1, 60), window=st.none() | st.integers(1, 80))
def test_visible_share_is_the_area_of_the_mask(seq_len: int, window: int | None) -> None:
    """Counted pair by pair: a query sees itself and what is before it, within the window."""
    seen = sum(0 <= i - j < (window or seq_len) for i in range(seq_len) for j in range(seq_len))
    assert flops.visible_share(window, seq_len) == pytest.approx(seen / seq_len**2)


def test_idle_experts_are_a_term_of_their_own() -> None:
    """Llama-4 runs every expert: shown apart, in the executed work, not in the model's."""
    scout = real("llama-4-scout")
    assert flops.forward(scout, FULL, 128)["experts computed but not chosen, forward"] > 0
    assert flops.model_flops(scout, FULL, 128).total < flops.train(scout, FULL, 128, "eager").total / 4


def test_only_the_unembedding_adapted_needs_no_backward_through_the_layers(small: dict[str, Model]) -> None:
    """Its own A and B are all that is computed."""
    model, how = small["llama"], Method(rank=8, targets=("unembed",))
    ahead = flops.forward(model, how, 128).total
    own = 2 * 8 * (model.hidden_size + model.vocab_size)
    back = own + 2 * 8 * model.vocab_size  # dA and dB, and the gradient of x A
    assert flops.train(model, how, 128).total - ahead == pytest.approx(back)


def test_a_wrong_word_or_no_tokens_are_named(small: dict[str, Model]) -> None:
    """Unknown attention, unknown checkpointing, an empty batch, a rank that never breaks even."""
    with pytest.raises(UnknownName, match="attention 'fast' is not known"):
        flops.train(small["llama"], PLAIN, 128, "fast")
    with pytest.raises(UnknownName, match="checkpointing"):
        flops.train(small["llama"], PLAIN, 128, checkpointing="some")
    with pytest.raises(BadInput, match="no batch"):
        flops.forward(small["llama"], PLAIN, 0)
    with pytest.raises(UnsupportedAdapter, match="no rank breaks even"):
        flops.linear_break_even_rank(small["mixtral"], replace(PLAIN, targets=("experts",), experts="fused"))
