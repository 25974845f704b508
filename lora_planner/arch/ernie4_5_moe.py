"""ERNIE 4.5 MoE: routed and shared experts from one layer to another; a correction bias that is a weight.

Source: transformers 5.23 Ernie4_5_MoeForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    fused_experts,
    gated_mlp,
    head_dim,
    heads,
    rms,
    router,
    split_attention,
    stack,
    top_k,
)
from lora_planner.model import Block, Model, Weight


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2560)
    n, kv = heads(c, 20, 4)
    dim = head_dim(c, hidden, n)
    bias = c.flag("use_bias", False)
    layers = c.size("num_hidden_layers", 28, high=4096)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    dense = gated_mlp(hidden, c.size("intermediate_size", 12288), bias=bias)
    inner = c.size("moe_intermediate_size", 1536)
    experts = c.size("moe_num_experts", 64, "num_experts")
    used = top_k(c, "moe_k", 6, experts, "num_experts_per_tok")
    sparse = (router(hidden, experts), *fused_experts(hidden, inner, experts, used))
    shared = inner * c.size("moe_num_shared_experts", 2, low=0)
    if shared:  # runs before the routed ones
        sparse = (*gated_mlp(hidden, shared, prefix="mlp.shared_experts.", group="shared", bias=bias), *sparse)
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))
    correction = Weight("mlp.gate.moe_statics.e_score_correction_bias", experts, "router")

    def layer(routes: bool) -> Block:
        if routes:
            weights = (*norms, correction)
            return Block("moe", 0, attention + sparse, weights, mixer, experts=experts, top_k=used)
        return Block("dense", 0, attention + dense, norms, mixer)

    first = c.size("moe_layer_start_index", 1, low=0)
    last = c.size("moe_layer_end_index", -1, low=-1)
    last = layers - 1 if last == -1 else last
    step = c.size("moe_layer_interval", 1)
    blocks, order = by_kind([(i + 1) % step == 0 and first <= i <= last for i in range(layers)], layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 103424),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", True),
        head_bias=bias,
        peft_experts="qwen2_moe",
    )
