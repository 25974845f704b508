"""GLM-4.1V / 4.5V: a ViT with convolutional merging, GLM-4 or GLM-4.5 as the language model.

Source: transformers 5.23 Glm4vForConditionalGeneration, Glm4vMoeForConditionalGeneration.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    fused_experts,
    gated_mlp,
    head_dim,
    heads,
    rms,
    router,
    split_attention,
    stack,
    top_k,
)
from lora_planner.arch.vision import Tower, linear, own_config, patch_conv, patches, weight, wrap
from lora_planner.model import Block, Linear, Model

PREFIX = "model.language_model.layers"


def _dense(c: Config) -> Model:
    """Norms before and after each half of a layer; gate and up in one matrix."""
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32, 2)
    rows, mixer = split_attention(hidden, n, kv, head_dim(c, hidden, n), bias_qkv=True)
    inner = c.size("intermediate_size", 13696)
    mlp = (
        Linear("mlp.gate_up_proj", hidden, 2 * inner, reads=("in", "self_attn.o_proj"), parts=2),
        Linear("mlp.down_proj", inner, hidden, reads=("mlp.gate_up_proj",)),
    )
    names = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
    block = Block("decoder", 0, rows + mlp, tuple(rms(name, hidden) for name in names), mixer)
    return stack(
        c, [block], [0] * c.size("num_hidden_layers", 40, high=4096), hidden=hidden,
        vocab=c.size("vocab_size", 151552), final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False), module_prefix=PREFIX,
    )  # fmt: skip


def _moe(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 96, 8)
    dim = c.size("head_dim", hidden // n)  # rounded down: the class defaults are 4096 and 96 heads
    rows, mixer = split_attention(hidden, n, kv, dim, bias_qkv=c.flag("attention_bias", True))
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))
    count = c.size("n_routed_experts", 128, "num_local_experts")
    active = top_k(c, "num_experts_per_tok", 8, count)
    inner = c.size("moe_intermediate_size", 1408)
    shared = inner * c.size("n_shared_experts", 1)

    def block(routed: bool) -> Block:
        if not routed:
            return Block("dense", 0, rows + gated_mlp(hidden, c.size("intermediate_size", 10944)), norms, mixer)
        mlp = (
            router(hidden, count),
            *fused_experts(hidden, inner, count, active),
            *gated_mlp(hidden, shared, prefix="mlp.shared_experts.", group="shared"),
        )
        return Block("moe", 0, rows + mlp, norms, mixer, experts=count, top_k=active)

    layers = c.size("num_hidden_layers", 46, high=4096)
    first = c.size("first_k_dense_replace", 1, low=0)
    blocks, order = by_kind([i >= first for i in range(layers)], block)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 151424), final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False), module_prefix=PREFIX,
        buffers=sum(blocks[i].experts for i in order),
    )  # fmt: skip


def _tower(v: Config) -> Tower:
    """The MLP of a layer is as wide as the output, that of the merger `intermediate_size`."""
    h, depth, out = v.size("hidden_size", 1536), v.size("depth", 24), v.size("out_hidden_size", 4096)
    wide, side = v.size("intermediate_size", 13696), v.size("spatial_merge_size", 2)
    rows = (
        linear("visual.blocks.attn.qkv", h, 3 * h, depth, v.flag("attention_bias", False), parts=3),
        linear("visual.blocks.attn.proj", h, h, depth, False),
        linear("visual.blocks.mlp.gate_proj", h, out, depth, False),
        linear("visual.blocks.mlp.up_proj", h, out, depth, False),
        linear("visual.blocks.mlp.down_proj", out, h, depth, False),
        linear("visual.merger.proj", out, out, bias=False),
        linear("visual.merger.gate_proj", out, wide, bias=False),
        linear("visual.merger.up_proj", out, wide, bias=False),
        linear("visual.merger.down_proj", wide, out, bias=False),
    )
    frames = v.size("temporal_patch_size", 2)
    return rows, (
        weight("patch_embed.proj", patch_conv(v, h, 14, False, "in_channels") * frames + h),
        weight("embeddings.position_embedding", patches(v, 336, 14) * h),
        weight("norms", 2 * h * depth),
        weight("post_conv_layernorm", h),
        weight("post_layernorm", h),
        weight("downsample", h * out * side * side + out),
        weight("merger.post_projection_norm", 2 * out),
    )


def build(c: Config) -> Model:
    family = c.text("model_type", "glm4v")
    text_of = _moe if family.startswith("glm4v_moe") else _dense
    if family.endswith("_text"):
        return text_of(c)
    text = text_of(own_config(c, "text_config", family + "_text"))
    tower = _tower(own_config(c, "vision_config", family + "_vision"))
    tied = c.flag("tie_word_embeddings", False) or text.tied
    return wrap(c, text, tower, tied, peft_experts="qwen2_moe" if family == "glm4v_moe" else "")
