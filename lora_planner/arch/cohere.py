"""Command R: attention and MLP side by side on one norm, tied head.

Source: transformers 5.23 CohereForCausalLM, Cohere2ForCausalLM (sliding windows, no norms on q and k).
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    gated_mlp,
    head_dim,
    heads,
    layer_norm,
    split_attention,
    stack,
    windows,
)
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    second = c.text("model_type", "cohere") == "cohere2"
    hidden = c.size("hidden_size", 8192)
    n, kv = heads(c, 64)
    dim = hidden // n if second and hidden % n == 0 else head_dim(c, hidden, n)
    bias = c.flag("attention_bias", False)
    mlp = gated_mlp(hidden, c.size("intermediate_size", 22528), reads=("in",))
    norms = [layer_norm("input_layernorm", hidden, bias=False)]
    if not second and c.flag("use_qk_norm", False):
        norms.append(layer_norm("self_attn.q_norm", n * dim, bias=False))
        norms.append(layer_norm("self_attn.k_norm", kv * dim, bias=False))

    def layer(window: int | None) -> Block:
        attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, window=window)
        return Block("sliding" if window else "full", 0, attention + mlp, tuple(norms), mixer)

    layers = c.size("num_hidden_layers", 40, high=4096)
    seen: list[int | None] = [None] * layers
    if second:
        period = c.size("sliding_window_pattern", 4)
        seen = windows(c, layers, c.optional_size("sliding_window", 4096), lambda i: (i + 1) % period != 0)
    blocks, order = by_kind(seen, layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 256000),
        final=[layer_norm("norm", hidden, bias=False)],
        tied=c.flag("tie_word_embeddings", True),
    )
