"""GPT-J: attention and MLP side by side on one norm, a bias in the head.

Source: transformers 5.23 GPTJForCausalLM (no fused attention kernel).
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import Q_V, layer_norm, plain_mlp, split_attention, stack, whole_head_dim
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096, "n_embd")
    n = c.size("num_attention_heads", 16, "n_head", high=4096)
    dim = whole_head_dim(c, "n_embd", hidden, n)
    attention, mixer = split_attention(hidden, n, n, dim, prefix="attn.", out="out_proj", math_only=True)
    mlp = plain_mlp(hidden, c.size("n_inner", 4 * hidden), ("mlp.fc_in", "mlp.fc_out"), reads=("in",))
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, (layer_norm("ln_1", hidden),), mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 28, "n_layer", high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 50400),
        final=[layer_norm("ln_f", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        embed="wte",
        head_bias=True,
        module_prefix="transformer.h",
        peft_default=Q_V,
    )
