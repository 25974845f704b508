"""Falcon: fused q, k, v with one key head (7B), a few (40B, 180B, 11B) or all (RW).

Source: transformers 5.23 FalconForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_attention, layer_norm, plain_mlp, stack, whole_head_dim
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    key = "n_embed" if c.has("n_embed") else "hidden_size"  # the old name wins, as in transformers
    hidden = c.size(key, 4544)
    n = c.size("num_attention_heads", 71, high=4096)
    dim = whole_head_dim(c, key, hidden, n)
    new = c.flag("new_decoder_architecture", False)
    parallel = c.flag("parallel_attn", True)
    bias = c.flag("bias", False)
    if new:
        kv = c.size("num_kv_heads", n, high=4096)
        if n % kv:
            raise c.reject("num_kv_heads", f"a divisor of num_attention_heads = {n}")
    else:
        kv = 1 if c.flag("multi_query", True) else n
    attention, mixer = fused_attention(
        hidden, n, kv, dim,
        qkv="self_attention.query_key_value", out="self_attention.dense", bias_qkv=bias, bias_out=bias,
        math_only=True,
    )  # fmt: skip
    mlp = plain_mlp(
        hidden,
        c.size("ffn_hidden_size", 4 * hidden),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        bias=bias,
        reads=("in",) if parallel else ("in", "self_attention.dense"),
    )
    if not parallel:
        names = ["input_layernorm", "post_attention_layernorm"]
    elif c.size("num_ln_in_parallel_attn", 2 if new else 1) == 2:
        names = ["ln_attn", "ln_mlp"]
    else:
        names = ["input_layernorm"]
    norms = tuple(layer_norm(name, hidden) for name in names)
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 32, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 65024),
        final=[layer_norm("ln_f", hidden)],
        tied=c.flag("tie_word_embeddings", True),
        embed="word_embeddings",
        module_prefix="transformer.h",
        peft_default=("query_key_value",),
    )
