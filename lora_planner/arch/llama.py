"""Llama 2/3, Mistral, SmolLM2/3: pre-norm, grouped queries, SwiGLU.

Source: transformers 5.23 LlamaForCausalLM, MistralForCausalLM, SmolLM3ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import gated_mlp, head_dim, heads, rms, split_attention, stack
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    family = c.text("model_type", "llama")
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32, {"mistral": 8, "smollm3": 4}.get(family))
    dim = head_dim(c, hidden, n)
    bias = family == "llama" and c.flag("attention_bias", False)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    mlp_bias = family != "mistral" and c.flag("mlp_bias", False)
    mlp = gated_mlp(hidden, c.size("intermediate_size", 14336 if family == "mistral" else 11008), bias=mlp_bias)
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))
    layers = c.size("num_hidden_layers", 32, high=4096)
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer)],
        [0] * layers,
        hidden=hidden,
        vocab=c.size("vocab_size", 32000),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", family == "smollm3"),
        peft_default=() if family == "smollm3" else ("q_proj", "v_proj"),
    )
