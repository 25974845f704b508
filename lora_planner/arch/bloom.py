"""BLOOM: fused q, k, v, ALiBi, a norm right after the embedding.

Source: transformers 5.23 BloomForCausalLM (no fused attention kernel: ALiBi is added to the scores).
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_attention, layer_norm, plain_mlp, stack, whole_head_dim
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    key = "n_embed" if c.has("n_embed") else "hidden_size"  # the old name wins, as in transformers
    hidden = c.size(key, 64)
    n = c.size("num_attention_heads", 8, "n_head", high=4096)
    dim = whole_head_dim(c, key, hidden, n)
    attention, mixer = fused_attention(
        hidden, n, n, dim,
        qkv="self_attention.query_key_value", out="self_attention.dense", bias_qkv=True, bias_out=True,
        math_only=True,
    )  # fmt: skip
    names = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    mlp = plain_mlp(hidden, 4 * hidden, names, reads=("in", "self_attention.dense"))
    norms = (layer_norm("input_layernorm", hidden), layer_norm("post_attention_layernorm", hidden))
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 2, "n_layer", high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 250880),
        final=[layer_norm("word_embeddings_layernorm", hidden), layer_norm("ln_f", hidden)],
        tied=c.flag("tie_word_embeddings", True),
        embed="word_embeddings",
        module_prefix="transformer.h",
        peft_default=("query_key_value",),
    )
