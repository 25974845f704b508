"""Llama 2/3, Mistral, SmolLM2/3: pre-norm, grouped queries, SwiGLU.

Source: transformers 5.23 LlamaForCausalLM, MistralForCausalLM, SmolLM3ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    Q_V,
    by_kind,
    gated_mlp,
    head_dim,
    heads,
    rms,
    split_attention,
    stack,
    windows,
)
from lora_planner.model import Block, Model


def _windows(c: Config, family: str, layers: int) -> list[int | None]:
    """Mistral slides everywhere or nowhere, SmolLM3 where it has no rope, Llama never."""
    if family == "mistral":
        return [c.optional_size("sliding_window", 4096)] * layers
    if family == "llama":
        return [None] * layers
    window = c.optional_size("sliding_window") if c.flag("use_sliding_window", False) else None
    period = c.size("no_rope_layer_interval", 4)
    rope = c.items("no_rope_layers")  # 1 where a layer has rope, in spite of the name
    if rope is not None and len(rope) != layers:
        raise c.reject("no_rope_layers", f"{layers} entries")
    return windows(c, layers, window, lambda i: not rope[i] if rope else (i + 1) % period == 0)


def build(c: Config) -> Model:
    family = c.text("model_type", "llama")
    hidden = c.size("hidden_size", 2048 if family == "smollm3" else 4096)
    n, kv = heads(c, 16 if family == "smollm3" else 32, {"mistral": 8, "smollm3": 4}.get(family))
    dim = head_dim(c, hidden, n)
    bias = family != "mistral" and c.flag("attention_bias", False)
    mlp_bias = family != "mistral" and c.flag("mlp_bias", False)
    inner = c.size("intermediate_size", 14336 if family == "mistral" else 11008)
    mlp = gated_mlp(hidden, inner, bias=mlp_bias)
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))

    def layer(window: int | None) -> Block:
        attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, window=window)
        return Block("decoder", 0, attention + mlp, norms, mixer)

    layers = c.size("num_hidden_layers", 36 if family == "smollm3" else 32, high=4096)
    blocks, order = by_kind(_windows(c, family, layers), layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 128256 if family == "smollm3" else 32000),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", family == "smollm3"),
        peft_default=() if family == "smollm3" else Q_V,
    )
