"""OLMoE and FlexOlmo: every layer routes; q and k are normed over all heads at once.

FlexOlmo norms what a layer adds, as OLMo 2 does.

Source: transformers 5.23 OlmoeForCausalLM, FlexOlmoForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_experts, head_dim, heads, rms, router, split_attention, stack, top_k
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    flex = c.text("model_type", "olmoe") == "flex_olmo"
    hidden = c.size("hidden_size", 4096 if flex else 2048)
    n, kv = heads(c, 32 if flex else 16)
    dim = head_dim(c, hidden, n)
    bias = c.flag("attention_bias", False)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    experts = c.size("num_experts", 7 if flex else 64, "num_local_experts")
    used = top_k(c, "num_experts_per_tok", 5 if flex else 8, experts)
    mlp = fused_experts(hidden, c.size("intermediate_size", 11008 if flex else 2048), experts, used)
    width = dim if flex else hidden // n  # OLMoE's norms do not know head_dim
    names = ("post_attention_layernorm", "post_feedforward_layernorm" if flex else "input_layernorm")
    norms = (
        *(rms(name, hidden) for name in names),
        rms("self_attn.q_norm", n * width),
        rms("self_attn.k_norm", kv * width),
    )
    block = Block("moe", 0, (*attention, router(hidden, experts), *mlp), norms, mixer, experts=experts, top_k=used)
    return stack(
        c,
        [block],
        [0] * c.size("num_hidden_layers", 32 if flex else 16, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 100352 if flex else 50304),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe",
    )
