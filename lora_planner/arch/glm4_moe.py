"""GLM-4.5/4.6 and dots.llm1: a few dense layers, then routed and shared experts; grouped queries.

Source: transformers 5.23 Glm4MoeForCausalLM, Dots1ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import REQUIRED, Config
from lora_planner.arch.parts import (
    by_kind,
    dense_and_shared,
    head_dim,
    heads,
    rms,
    split_attention,
    stack,
    windows,
)
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    glm = c.text("model_type", "glm4_moe") == "glm4_moe"
    hidden = c.size("hidden_size", 4096 if glm else 4608)
    n, kv = heads(c, 96 if glm else 32, 8 if glm else 32)
    dim = head_dim(c, hidden, n)
    bias = c.flag("attention_bias", False)
    layers = c.size("num_hidden_layers", 46 if glm else 62, high=4096)
    first = min(c.size("first_k_dense_replace", 1 if glm else 0, low=0), layers)
    dense, sparse, experts, used = dense_and_shared(
        c,
        hidden,
        inner=10944,
        expert_inner=1408,
        experts=128 if glm else REQUIRED,
        used=8 if glm else REQUIRED,
        shared=1 if glm else REQUIRED,
    )
    norms = [rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden)]
    if not glm or c.flag("use_qk_norm", False):
        norms += [rms("self_attn.q_norm", n * dim, dim), rms("self_attn.k_norm", kv * dim, dim)]
    seen: list[int | None] = [None] * layers
    if not glm:
        full = c.size("max_window_layers", 62, low=0)
        seen = windows(c, layers, c.optional_size("sliding_window", 4096), lambda i: i >= full)

    def layer(key: tuple[bool, int | None]) -> Block:
        routes, window = key
        attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias and not glm, window=window)
        if routes:
            return Block("moe", 0, attention + sparse, tuple(norms), mixer, experts=experts, top_k=used)
        return Block("dense", 0, attention + dense, tuple(norms), mixer)

    blocks, order = by_kind([(i >= first, seen[i]) for i in range(layers)], layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 151552 if glm else 152064),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe",
        buffers=experts * (layers - first),  # e_score_correction_bias
    )
