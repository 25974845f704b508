"""Qwen3-Next and the language models of Qwen3.5: three gated delta rules, then one attention, and so on.

Attention has an output gate, made by q_proj. Qwen3-Next and the Qwen3.5 MoE route to experts beside
a gated shared one; the dense Qwen3.5 has a SwiGLU.

Source: transformers 5.23 Qwen3NextForCausalLM, Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    fused_experts,
    gated_mlp,
    head_dim,
    heads,
    layer_types,
    rms,
    router,
    split_attention,
    stack,
    top_k,
)
from lora_planner.model import LINEAR, Block, Linear, Model, Scan, Weight

DELTA, ATTENTION = "linear_attention", "full_attention"
CHUNK = 64  # of transformers' chunked delta rule
NEXT, DENSE, MOE = "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"

#: class defaults that differ: hidden, layers, kv heads, vocabulary, top_k, experts
DEFAULTS = {
    NEXT: (2048, 48, 2, 151936, 10, 512),
    DENSE: (4096, 32, 4, 248320, 0, 0),
    MOE: (2048, 40, 2, 248320, 8, 256),
}


def delta(c: Config, hidden: int, fused: bool) -> tuple[tuple[Linear, ...], tuple[Weight, ...], Scan]:
    """The gated delta rule: keys and queries in few heads, values in many.

    Source: Yang et al. 2024, arXiv:2412.06464; shapes as transformers stores them.
    """
    dim_k, dim_v = c.size("linear_key_head_dim", 128), c.size("linear_value_head_dim", 128)
    n_k, n_v = c.size("linear_num_key_heads", 16), c.size("linear_num_value_heads", 32)
    if n_v % n_k:
        raise c.reject("linear_num_key_heads", f"a divisor of linear_num_value_heads = {n_v}")
    keys, values = dim_k * n_k, dim_v * n_v
    widths = (
        {"in_proj_qkvz": (2 * keys + 2 * values, 4), "in_proj_ba": (2 * n_v, 2)}
        if fused
        else {"in_proj_qkv": (2 * keys + values, 3), "in_proj_z": (values, 1),
              "in_proj_b": (n_v, 1), "in_proj_a": (n_v, 1)}
    )  # fmt: skip
    rows = tuple(
        Linear(f"linear_attn.{name}", hidden, width, group="ssm", parts=parts)
        for name, (width, parts) in widths.items()
    )
    into = tuple(row.name for row in rows)
    out = Linear("linear_attn.out_proj", values, hidden, group="ssm", reads=into)
    kernel, channels = c.size("linear_conv_kernel_dim", 4), 2 * keys + values
    weights = (
        Weight("linear_attn.conv1d", channels * kernel, "ssm"),
        Weight("linear_attn.A_log", n_v, "ssm"),
        Weight("linear_attn.dt_bias", n_v, "ssm"),
        Weight("linear_attn.norm", dim_v, "ssm", values, "rms"),
    )
    scan = Scan("gated_delta", n_v, dim_v, dim_k, n_k, kernel, channels, CHUNK, into)
    return (*rows, out), weights, scan


def _attention(c: Config, hidden: int, default_kv: int) -> Block:
    n, kv = heads(c, 16, default_kv)
    dim = head_dim(c, hidden, n, 256)
    bias = c.flag("attention_bias", False)
    rows, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, q_rows=2 * n * dim)
    norms = (rms("self_attn.q_norm", n * dim, dim), rms("self_attn.k_norm", kv * dim, dim))
    return Block(ATTENTION, 0, rows, norms, mixer)


def experts_beside_shared(
    c: Config, hidden: int, reads: tuple[str, ...], default_top_k: int, default_experts: int
) -> tuple[tuple[Linear, ...], int, int]:
    """Router, routed experts, one shared expert and the gate of its output."""
    count = c.size("num_experts", default_experts)
    active = top_k(c, "num_experts_per_tok", default_top_k, count)
    shared = c.size("shared_expert_intermediate_size", 512)
    rows = (
        router(hidden, count, reads=reads),
        *fused_experts(hidden, c.size("moe_intermediate_size", 512), count, active, reads=reads),
        *gated_mlp(hidden, shared, prefix="mlp.shared_expert.", group="shared", reads=reads),
        router(hidden, 1, name="mlp.shared_expert_gate", kind=LINEAR, reads=reads),
    )
    return rows, count, active


def build(c: Config) -> Model:
    family = c.text("model_type", NEXT)
    hidden, layers, kv, vocab, k, experts = DEFAULTS[family]
    hidden = c.size("hidden_size", hidden)
    layers = c.size("num_hidden_layers", layers, high=4096)
    interval = c.size("full_attention_interval", 4)
    kinds = layer_types(c, [ATTENTION if (i + 1) % interval == 0 else DELTA for i in range(layers)], (DELTA, ATTENTION))
    sparse = _sparse(c, family, layers, experts)

    def block(key: tuple[str, bool]) -> Block:
        kind, routed = key
        if kind == ATTENTION:
            mixing = _attention(c, hidden, kv)
        else:
            mixing = Block(DELTA, 0, *delta(c, hidden, fused=family == NEXT))
        reads = ("in", mixing.linears[-1].name)
        count = active = 0
        if routed:
            mlp, count, active = experts_beside_shared(c, hidden, reads, k, experts)
        else:
            mlp = gated_mlp(hidden, c.size("intermediate_size", 5632 if family == NEXT else 12288), reads=reads)
        norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))
        return Block(
            kind + ("_moe" if routed else ""), 0, mixing.linears + mlp, norms + mixing.weights, mixing.mixer,
            experts=count, top_k=active,
        )  # fmt: skip

    blocks, order = by_kind(list(zip(kinds, sparse, strict=True)), block)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", vocab),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe" if family == NEXT else "",
    )


def _sparse(c: Config, family: str, layers: int, default_experts: int) -> list[bool]:
    """Which layers route to experts."""
    if family != NEXT:
        return [family == MOE] * layers
    step = c.size("decoder_sparse_step", 1)
    dense = c.items("mlp_only_layers") or []
    some = c.size("num_experts", default_experts, low=0) > 0
    return [some and i not in dense and (i + 1) % step == 0 for i in range(layers)]
