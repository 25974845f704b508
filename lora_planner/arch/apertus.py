"""Apertus: two matrices in the MLP, xIELU with two learned numbers a layer, norms on q and k.

Source: transformers 5.23 ApertusForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import head_dim, heads, plain_mlp, rms, split_attention, stack
from lora_planner.model import Block, Model, Weight


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32)
    dim = head_dim(c, hidden, n)
    bias = c.flag("attention_bias", False)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    mlp = plain_mlp(hidden, c.size("intermediate_size", 14336), ("mlp.up_proj", "mlp.down_proj"), bias=False)
    weights = [
        rms("attention_layernorm", hidden),
        rms("feedforward_layernorm", hidden),
        rms("self_attn.q_norm", n * dim, dim),
        rms("self_attn.k_norm", kv * dim, dim),
    ]
    learned = c.text("hidden_act", "xielu") == "xielu"
    if learned:
        weights.append(Weight("mlp.act_fn", 2, "other"))
    layers = c.size("num_hidden_layers", 32, high=4096)
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, tuple(weights), mixer, activation_gated=False)],
        [0] * layers,
        hidden=hidden,
        vocab=c.size("vocab_size", 131072),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        buffers=2 * layers if learned else 0,  # xIELU's beta and eps
    )
