"""Hunyuan-A13B: every layer routes beside one shared MLP of the same width; the router is a Linear.

Source: transformers 5.23 HunYuanMoEV1ForCausalLM.
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
)
from lora_planner.model import LINEAR, Block, Model


def _used(c: Config, layers: int, experts: int) -> list[int]:
    """`moe_topk`: one number, or one a layer."""
    value = c.values.get("moe_topk", c.values.get("num_experts_per_tok", 1))
    per_layer = value if isinstance(value, list) else [value] * layers
    if len(per_layer) < layers or any(type(k) is not int or not 0 < k <= experts for k in per_layer):
        raise c.reject("moe_topk", f"1..{experts}, or {layers} such numbers")
    return per_layer[:layers]


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32)
    dim = head_dim(c, hidden, n)
    bias = c.flag("attention_bias", False)
    inner = c.size("intermediate_size", 11008)
    experts = c.size("num_experts", 1, "num_local_experts")
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    routing = router(hidden, experts, name="mlp.gate.wg", kind=LINEAR)
    shared = gated_mlp(hidden, inner, prefix="mlp.shared_mlp.", group="shared")
    weights = (
        rms("input_layernorm", hidden),
        rms("post_attention_layernorm", hidden),
        rms("self_attn.query_layernorm", n * dim, dim),
        rms("self_attn.key_layernorm", kv * dim, dim),
    )

    def layer(used: int) -> Block:
        mlp = (*shared, routing, *fused_experts(hidden, inner, experts, used))
        return Block("moe", 0, attention + mlp, weights, mixer, experts=experts, top_k=used)

    layers = c.size("num_hidden_layers", 32, high=4096)
    blocks, order = by_kind(_used(c, layers, experts), layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 290943),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe",
    )
