"""Qwen1.5-MoE, Qwen2-MoE (a shared expert behind a gate) and Qwen3-MoE (none, norms on q and k).

Source: transformers 5.23 Qwen2MoeForCausalLM, Qwen3MoeForCausalLM.
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
    windows,
)
from lora_planner.model import LINEAR, Block, Linear, Model


def sparse_layers(c: Config, layers: int, experts: int) -> list[bool]:
    """Which layers route: each `decoder_sparse_step`-th that `mlp_only_layers` does not name."""
    dense = c.items("mlp_only_layers", []) or []
    step = c.size("decoder_sparse_step", 1)
    return [i not in dense and experts > 0 and (i + 1) % step == 0 for i in range(layers)]


def build(c: Config) -> Model:
    third = c.text("model_type", "qwen3_moe") == "qwen3_moe"
    hidden = c.size("hidden_size", 2048)
    n, kv = heads(c, 32 if third else 16, 4 if third else 16)
    dim = head_dim(c, hidden, n)
    layers = c.size("num_hidden_layers", 24, high=4096)
    experts = c.size("num_experts", 128 if third else 60, "num_local_experts", low=0)
    used = top_k(c, "num_experts_per_tok", 8 if third else 4, experts) if experts else 0
    dense = gated_mlp(hidden, c.size("intermediate_size", 6144 if third else 5632))
    inner = c.size("moe_intermediate_size", 768 if third else 1408)
    sparse: tuple[Linear, ...] = ()
    if experts:
        sparse = (router(hidden, experts), *fused_experts(hidden, inner, experts, used))
    norms = [rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden)]
    window = c.optional_size("sliding_window", 4096) if c.flag("use_sliding_window", False) else None
    if third:
        bias = out_bias = c.flag("attention_bias", False)
        norms += [rms("self_attn.q_norm", n * dim, dim), rms("self_attn.k_norm", kv * dim, dim)]
        seen = [window] * layers
    else:
        bias, out_bias = c.flag("qkv_bias", True), False
        shared = c.size("shared_expert_intermediate_size", 5632)
        gate = router(hidden, 1, name="mlp.shared_expert_gate", kind=LINEAR)
        sparse += (*gated_mlp(hidden, shared, prefix="mlp.shared_expert.", group="shared"), gate)
        full = c.size("max_window_layers", 28, low=0)
        seen = windows(c, layers, window, lambda i: (i + 1) % 2 != 0 and i < full)

    def layer(key: tuple[bool, int | None]) -> Block:
        routes, window = key
        attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=out_bias, window=window)
        if routes:
            return Block("moe", 0, attention + sparse, tuple(norms), mixer, experts=experts, top_k=used)
        return Block("dense", 0, attention + dense, tuple(norms), mixer)

    keys = list(zip(sparse_layers(c, layers, experts), seen, strict=True))
    blocks, order = by_kind(keys, layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 151936),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe" if third else "",  # qwen2_moe itself is missing from peft's table
    )
