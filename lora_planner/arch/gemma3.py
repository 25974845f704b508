"""Gemma 3: sliding attention in five layers of six, normed q and k, four norms a layer; with SigLIP as a VLM.

Source: transformers 5.23 Gemma3ForCausalLM, Gemma3ForConditionalGeneration.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    gated_mlp,
    head_dim,
    heads,
    layer_types,
    rms,
    split_attention,
    stack,
)
from lora_planner.arch.vision import own_config, sub_config, tower, weight, wrap
from lora_planner.model import Block, Model

SLIDING, FULL = "sliding_attention", "full_attention"


def build(c: Config) -> Model:
    if c.text("model_type", "gemma3_text") == "gemma3":
        return _with_tower(c)
    hidden = c.size("hidden_size", 2304)
    layers = c.size("num_hidden_layers", 26, high=4096)
    n, kv = heads(c, 8, 4)
    dim = head_dim(c, hidden, n, 256)
    bias = c.flag("attention_bias", False)
    window = c.optional_size("sliding_window", 4096)
    if window and c.flag("use_bidirectional_attention", False):
        window = window // 2 + 1
    period = c.size("sliding_window_pattern", 6)
    kinds = layer_types(c, [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)], (SLIDING, FULL))
    mlp = gated_mlp(hidden, c.size("intermediate_size", 9216))
    norms = (
        rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden),
        rms("pre_feedforward_layernorm", hidden), rms("post_feedforward_layernorm", hidden),
        rms("self_attn.q_norm", n * dim, dim), rms("self_attn.k_norm", kv * dim, dim),
    )  # fmt: skip

    def block(kind: str) -> Block:
        rows, mixer = split_attention(
            hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, window=window if kind == SLIDING else None
        )
        return Block(kind, 0, rows + mlp, norms, mixer)

    blocks, order = by_kind(kinds, block)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 262208),
        final=[rms("norm", hidden)], tied=c.flag("tie_word_embeddings", True),
        peft_default=("q_proj", "v_proj"),
    )  # fmt: skip


def _with_tower(c: Config) -> Model:
    text = build(own_config(c, "text_config", "gemma3_text"))
    v = sub_config(c, "vision_config", "siglip_vision_model")
    linears, weights = tower(v)
    width = v.size("hidden_size", 768)
    projector = (
        weight("multi_modal_projector.mm_input_projection_weight", width * text.hidden_size),
        weight("multi_modal_projector.mm_soft_emb_norm", width),
    )
    return wrap(c, text, (linears, weights + projector), c.flag("tie_word_embeddings", True))
