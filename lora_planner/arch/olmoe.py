"""OLMoE: every layer routes; q and k are normed over all heads at once.

Source: transformers 5.23 OlmoeForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_experts, head_dim, heads, rms, router, split_attention, stack, top_k
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2048)
    n, kv = heads(c, 16)
    dim = head_dim(c, hidden, n)
    bias = c.flag("attention_bias", False)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    experts = c.size("num_experts", 64, "num_local_experts")
    used = top_k(c, "num_experts_per_tok", 8, experts)
    mlp = fused_experts(hidden, c.size("intermediate_size", 2048), experts, used)
    norms = (
        rms("input_layernorm", hidden),
        rms("post_attention_layernorm", hidden),
        rms("self_attn.q_norm", hidden),
        rms("self_attn.k_norm", hidden // n * kv),
    )
    block = Block(
        "moe", 0, (*attention, router(hidden, experts), *mlp), norms, mixer, experts=experts, top_k=used
    )
    return stack(
        c,
        [block],
        [0] * c.size("num_hidden_layers", 16, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 50304),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe",
    )
