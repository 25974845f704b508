"""Llama 3.2 Vision: some layers attend to the image instead of the text.

transformers skips those layers for a text without images, and never ties the unembedding.

Source: transformers 5.23 MllamaForConditionalGeneration.
"""

from __future__ import annotations

from dataclasses import replace

from lora_planner.arch.config import Config
from lora_planner.arch.parts import by_kind, gated_mlp, heads, rms, split_attention, stack
from lora_planner.arch.vision import (
    Tower,
    linear,
    own_config,
    patch_conv,
    patches,
    split_layers,
    weight,
    wrap,
)
from lora_planner.model import Block, Model, Weight

CROSS_LAYERS = [3, 8, 13, 18, 23, 28, 33, 38]
EXTRA_TOKENS = 8  # rows of the embedding, not of the unembedding
IMAGE = ("image",)  # what cross-attention reads its keys and values from
RATIOS = 8  # aspect ratios of the default tower


def _text(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    layers = c.size("num_hidden_layers", 40, high=4096)
    n, kv = heads(c, 32, 8)
    if hidden % n:
        raise c.reject("hidden_size", f"a multiple of num_attention_heads = {n}")
    dim, inner = hidden // n, c.size("intermediate_size", 14336)
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))

    def block(cross: bool) -> Block:
        prefix = "cross_attn." if cross else "self_attn."
        rows, mixer = split_attention(hidden, n, kv, dim, prefix=prefix)
        mlp = gated_mlp(hidden, inner, reads=("in", prefix + "o_proj"))
        if not cross:
            return Block("self", 0, rows + mlp, norms, mixer)
        q, k, v, o = rows
        rows = (q, replace(k, reads=IMAGE), replace(v, reads=IMAGE), o)
        gates = (Weight("cross_attn_attn_gate", 1, "other"), Weight("cross_attn_mlp_gate", 1, "other"))
        normed = (rms("cross_attn.q_norm", n * dim, dim), rms("cross_attn.k_norm", kv * dim, dim))
        return Block("cross", 0, rows + mlp, norms + normed + gates, None)

    crossing = c.items("cross_attention_layers", CROSS_LAYERS) or []
    blocks, order = by_kind([i in crossing for i in range(layers)], block)
    vocab = c.size("vocab_size", 128256)
    model = stack(
        c, blocks, order, hidden=hidden, vocab=vocab, final=[rms("norm", hidden)], tied=False,
        notes=("A text without images skips the cross-attention layers; their scores are not counted.",),
    )  # fmt: skip
    return replace(model, embed=Weight("embed_tokens", (vocab + EXTRA_TOKENS) * hidden, "embed"))


def _tower(v: Config, hidden: int) -> Tower:
    h = v.size("hidden_size", 1280)
    layers, gated = v.size("num_hidden_layers", 32), v.size("num_global_layers", 8, low=0)
    tiles, tokens = v.size("max_num_tiles", 4), patches(v, 448, 14) + 1
    ratios = len(v.items("supported_aspect_ratios") or range(RATIOS)) + 1
    inner = v.size("intermediate_size", 5120)
    rows = tuple(
        row
        for path, count in (("transformer", layers), ("global_transformer", gated))
        if count
        for row in split_layers(f"vision_model.{path}.layers.", h, inner, count, out="o_proj", bias=False)
    )
    project = linear("multi_modal_projector", v.size("vision_output_dim", 7680), hidden)
    return (*rows, project), (
        weight("class_embedding", h),
        weight("patch_embedding", patch_conv(v, h, 14, bias=False)),
        weight("gated_positional_embedding", 1 + tokens * h + ratios * tiles * tokens * h),
        weight("tile_positional_embeddings", 2 * (1 + ratios * tiles * h)),
        weight("norms", 4 * h * (layers + gated)),
        weight("gates", 2 * gated),
        weight("layernorm_pre", 2 * h),
        weight("layernorm_post", 2 * h),
    )


def build(c: Config) -> Model:
    if c.text("model_type", "mllama") == "mllama_text_model":
        return _text(c)
    text = _text(own_config(c, "text_config", "mllama_text_model"))
    v = own_config(c, "vision_config", "mllama_vision_model")
    return wrap(c, text, _tower(v, text.hidden_size), tied=False)
