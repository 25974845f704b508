"""GLM-4 dense: gate and up stored as one matrix; the 0414 models (glm4) also norm what a layer adds.

Source: transformers 5.23 GlmForCausalLM, Glm4ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_gated_mlp, head_dim, heads, rms, split_attention, stack
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32, 2)
    dim = head_dim(c, hidden, n, 128)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=c.flag("attention_bias", True))
    mlp = fused_gated_mlp(hidden, c.size("intermediate_size", 13696))
    names = ["input_layernorm", "post_attention_layernorm"]
    if c.text("model_type", "glm") == "glm4":
        names += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    norms = tuple(rms(name, hidden) for name in names)
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer)],
        [0] * c.size("num_hidden_layers", 40, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 151552),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
    )
