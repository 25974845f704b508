"""GPT-NeoX, Pythia: fused q, k, v; attention and MLP side by side unless told otherwise.

Source: transformers 5.23 GPTNeoXForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_attention, layer_norm, plain_mlp, stack, whole_head_dim
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 6144)
    n = c.size("num_attention_heads", 64, high=4096)
    dim = whole_head_dim(c, "hidden_size", hidden, n)
    bias = c.flag("attention_bias", True)
    attention, mixer = fused_attention(
        hidden, n, n, dim,
        qkv="attention.query_key_value", out="attention.dense", bias_qkv=bias, bias_out=bias,
    )  # fmt: skip
    mlp = plain_mlp(
        hidden,
        c.size("intermediate_size", 24576),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        reads=("in",) if c.flag("use_parallel_residual", True) else ("in", "attention.dense"),
    )
    norms = (layer_norm("input_layernorm", hidden), layer_norm("post_attention_layernorm", hidden))
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 44, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 50432),
        final=[layer_norm("final_layer_norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        embed="embed_in",
        module_prefix="gpt_neox.layers",
        peft_default=("query_key_value",),
    )
