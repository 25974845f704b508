"""gpt-oss: every layer routes, biases everywhere, one attention sink a head, every other layer slides.

Source: transformers 5.23 GptOssForCausalLM (no sdpa: the sinks are one more column of the scores).
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    fused_experts,
    head_dim,
    heads,
    rms,
    router,
    split_attention,
    stack,
    top_k,
    windows,
)
from lora_planner.model import Block, Model, Weight


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2880)
    n, kv = heads(c, 64, 8)
    dim = head_dim(c, hidden, n, None if "head_dim" in c.values else 64)
    bias = c.flag("attention_bias", True)
    experts = c.size("num_local_experts", 128, "num_experts")
    used = top_k(c, "num_experts_per_tok", 4, experts)
    routing = router(hidden, experts, name="mlp.router", bias=True)
    mlp = fused_experts(hidden, c.size("intermediate_size", 2880), experts, used, bias=True)
    weights = (
        rms("input_layernorm", hidden),
        rms("post_attention_layernorm", hidden),
        Weight("self_attn.sinks", n, "attn"),
    )

    def layer(window: int | None) -> Block:
        attention, mixer = split_attention(
            hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, window=window, math_only=True
        )
        kind = "sliding" if window else "full"
        return Block(kind, 0, (*attention, routing, *mlp), weights, mixer, experts=experts, top_k=used)

    layers = c.size("num_hidden_layers", 36, high=4096)
    window = c.optional_size("sliding_window", 128)
    blocks, order = by_kind(windows(c, layers, window, lambda i: (i + 1) % 2 != 0), layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 201088),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
    )
