"""MiniMax-M2: every layer routes, nothing is shared; q and k are normed over all heads at once.

Source: transformers 5.23 MiniMaxM2ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_experts, head_dim, heads, rms, router, split_attention, stack, top_k
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 3072)
    n, kv = heads(c, 48, 8)
    dim = head_dim(c, hidden, n, 128)
    attention, mixer = split_attention(hidden, n, kv, dim)
    experts = c.size("num_local_experts", 256, "num_experts")
    used = top_k(c, "num_experts_per_tok", 8, experts)
    mlp = (
        router(hidden, experts),
        *fused_experts(hidden, c.size("intermediate_size", 1536), experts, used),
    )
    norms = (
        rms("input_layernorm", hidden),
        rms("post_attention_layernorm", hidden),
        rms("self_attn.q_norm", n * dim),
        rms("self_attn.k_norm", kv * dim),
    )
    layers = c.size("num_hidden_layers", 62, high=4096)
    return stack(
        c,
        [Block("moe", 0, attention + mlp, norms, mixer, experts=experts, top_k=used)],
        [0] * layers,
        hidden=hidden,
        vocab=c.size("vocab_size", 200064),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="mixtral",
        buffers=experts * layers,  # e_score_correction_bias
    )
