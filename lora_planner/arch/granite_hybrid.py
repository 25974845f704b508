"""Granite 4 (granitemoehybrid) and Bamba: layers of Mamba-2 or attention, an MLP in each.

Granite's MLP is shared by all tokens and stands beside routed experts, if there are any.

Source: transformers 5.23 GraniteMoeHybridForCausalLM, BambaForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch import mamba
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
from lora_planner.model import Attention, Block, Linear, Model, Scan, Weight

MAMBA, ATTENTION = "linear_attention", "full_attention"
Mixer = tuple[tuple[Linear, ...], tuple[Weight, ...], Attention | Scan]


def _mixer(c: Config, hidden: int, kind: str, default_kv: int | None) -> Mixer:
    if kind == MAMBA:
        return mamba.mixer(hidden, mamba.shape_of(c, hidden, c.size("mamba_expand", 2) * hidden), "mamba.")
    n, kv = heads(c, 32, default_kv)
    bias = c.flag("attention_bias", False)
    rows, attention = split_attention(hidden, n, kv, head_dim(c, hidden, n), bias_qkv=bias, bias_out=bias)
    return rows, (), attention


def _granite_mlp(c: Config, hidden: int, out: str) -> tuple[tuple[Linear, ...], int, int]:
    reads = ("in", out)
    inner = c.size("shared_intermediate_size", 1024)
    into = "shared_mlp.input_linear"
    rows: tuple[Linear, ...] = (
        Linear(into, hidden, 2 * inner, group="shared", reads=reads, parts=2),
        Linear("shared_mlp.output_linear", inner, hidden, group="shared", reads=(into,)),
    )
    count = c.size("num_local_experts", 8, low=0)
    if not count:
        return rows, 0, 0
    active = top_k(c, "num_experts_per_tok", 2, count)
    experts = fused_experts(
        hidden, c.size("intermediate_size", 11008), count, active,
        prefix="block_sparse_moe.experts.", reads=reads,
    )  # fmt: skip
    gate = router(hidden, count, name="block_sparse_moe.router", reads=reads)
    return (gate, *experts, *rows), count, active


def _bamba_kinds(c: Config, layers: int) -> list[str]:
    attending = c.items("attn_layer_indices") or []
    return [ATTENTION if i in attending else MAMBA for i in range(layers)]


def build(c: Config) -> Model:
    granite = c.text("model_type", "granitemoehybrid") == "granitemoehybrid"
    hidden = c.size("hidden_size", 4096)
    layers = c.size("num_hidden_layers", 32, high=4096)

    def block(kind: str) -> Block:
        rows, weights, mixer = _mixer(c, hidden, kind, None if granite else 8)
        out = rows[-1].name
        experts = active = 0
        if granite:
            mlp, experts, active = _granite_mlp(c, hidden, out)
        else:
            mlp = gated_mlp(
                hidden, c.size("intermediate_size", 14336), prefix="feed_forward.",
                bias=c.flag("mlp_bias", False), reads=("in", out),
            )  # fmt: skip
        second = "post_attention_layernorm" if granite else "pre_ff_layernorm"
        norms = (rms("input_layernorm", hidden), rms(second, hidden))
        return Block(kind, 0, rows + mlp, norms + weights, mixer, experts=experts, top_k=active)

    kinds = layer_types(c, [MAMBA] * layers, (MAMBA, ATTENTION)) if granite else _bamba_kinds(c, layers)
    blocks, order = by_kind(kinds, block)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 32000 if granite else 128000),
        final=[rms("norm" if granite else "final_layernorm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
    )
