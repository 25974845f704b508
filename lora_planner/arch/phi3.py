"""Phi-3, Phi-3.5, Phi-4: q, k and v stored as one matrix, gate and up as another.

Source: transformers 5.23 Phi3ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_attention, fused_gated_mlp, head_dim, heads, rms, stack
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 3072)
    n, kv = heads(c, 32)
    dim = head_dim(c, hidden, n)
    attention, mixer = fused_attention(
        hidden, n, kv, dim,
        qkv="self_attn.qkv_proj", out="self_attn.o_proj", window=c.optional_size("sliding_window"),
    )  # fmt: skip
    mlp = fused_gated_mlp(hidden, c.size("intermediate_size", 8192))
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer)],
        [0] * c.size("num_hidden_layers", 32, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 32064),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
    )
