"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5: a ViT whose merged patches enter the language model.

Source: transformers 5.23 Qwen2VL-, Qwen2_5_VL-, Qwen3VL-, Qwen3VLMoe-, Qwen3_5- and
Qwen3_5MoeForConditionalGeneration.
"""

from __future__ import annotations

from lora_planner.arch import qwen3_next
from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    fused_experts,
    gated_mlp,
    head_dim,
    heads,
    layer_types,
    rms,
    router,
    split_attention,
    stack,
    top_k,
)
from lora_planner.arch.vision import Tower, linear, own_config, patch_conv, weight, wrap
from lora_planner.model import Block, Model

SLIDING, FULL = "sliding_attention", "full_attention"


def _merger(name: str, norm: int, wide: int, out: int, count: int, layers: tuple[str, str], layer: bool) -> Tower:
    """Norm and two matrices that make one language token of a square of patches."""
    first, second = layers
    rows = (linear(name + first, wide, wide, count), linear(name + second, wide, out, count))
    return rows, (weight(name + "norm", norm * (2 if layer else 1) * count),)


def _patch(v: Config, width: int, patch: int, bias: bool) -> int:
    frames = v.size("temporal_patch_size", 2)
    conv = patch_conv(v, width, patch, False, "in_channels") * frames
    return conv + (width if bias else 0)


def tower_2(v: Config) -> Tower:
    """Qwen2-VL: layer norms, a two-matrix MLP; `hidden_size` is the width it hands over."""
    h, depth, side = v.size("embed_dim", 1280), v.size("depth", 32), v.size("spatial_merge_size", 2)
    inner = h * v.size("mlp_ratio", 4)
    merger, norms = _merger(
        "visual.merger.", h, h * side * side, v.size("hidden_size", 3584), 1, ("mlp.0", "mlp.2"), True
    )
    rows = (
        linear("visual.blocks.attn.qkv", h, 3 * h, depth, parts=3),
        linear("visual.blocks.attn.proj", h, h, depth),
        linear("visual.blocks.mlp.fc1", h, inner, depth),
        linear("visual.blocks.mlp.fc2", inner, h, depth),
    )  # fmt: skip
    return rows + merger, (
        weight("patch_embed.proj", _patch(v, h, 14, False)), weight("norm", 4 * h * depth), *norms,
    )  # fmt: skip


def tower_2_5(v: Config) -> Tower:
    """Qwen2.5-VL: RMS norms and a SwiGLU with biases."""
    h, depth, side = v.size("hidden_size", 3584), v.size("depth", 32), v.size("spatial_merge_size", 2)
    inner = v.size("intermediate_size", 3420)
    merger, norms = _merger(
        "visual.merger.", h, h * side * side, v.size("out_hidden_size", 3584), 1, ("mlp.0", "mlp.2"), False
    )
    rows = (
        linear("visual.blocks.attn.qkv", h, 3 * h, depth, parts=3),
        linear("visual.blocks.attn.proj", h, h, depth),
        linear("visual.blocks.mlp.gate_proj", h, inner, depth),
        linear("visual.blocks.mlp.up_proj", h, inner, depth),
        linear("visual.blocks.mlp.down_proj", inner, h, depth),
    )  # fmt: skip
    return rows + merger, (
        weight("patch_embed.proj", _patch(v, h, 14, False)), weight("norm", 2 * h * depth), *norms,
    )  # fmt: skip


def tower_3(v: Config, deepstack: int) -> Tower:
    """Qwen3-VL and Qwen3.5: learned positions; Qwen3-VL also merges the outputs of `deepstack` layers."""
    h, depth, side = v.size("hidden_size", 1152), v.size("depth", 27), v.size("spatial_merge_size", 2)
    inner, out = v.size("intermediate_size", 4304), v.size("out_hidden_size", 3584)
    names = ("linear_fc1", "linear_fc2")
    wide = h * side * side
    merger, norm = _merger("visual.merger.", h, wide, out, 1, names, True)
    deep, deep_norm = _merger("visual.deepstack_merger_list.", wide, wide, out, deepstack, names, True)
    rows = (
        linear("visual.blocks.attn.qkv", h, 3 * h, depth, parts=3),
        linear("visual.blocks.attn.proj", h, h, depth),
        linear("visual.blocks.mlp.linear_fc1", h, inner, depth),
        linear("visual.blocks.mlp.linear_fc2", inner, h, depth),
    )  # fmt: skip
    return rows + merger + (deep if deepstack else ()), (
        weight("patch_embed.proj", _patch(v, h, 16, True)),
        weight("pos_embed", v.size("num_position_embeddings", 2304) * h),
        weight("norm", 4 * h * depth),
        *norm,
        *(deep_norm if deepstack else ()),
    )


def text_2(c: Config) -> Model:
    """The language model of Qwen2-VL and Qwen2.5-VL: Qwen2, biased q, k, v."""
    hidden = c.size("hidden_size", 8192)
    layers = c.size("num_hidden_layers", 80, high=4096)
    n, kv = heads(c, 64, 8)
    if hidden % n:
        raise c.reject("hidden_size", f"a multiple of num_attention_heads = {n}")
    window = c.optional_size("sliding_window", 4096) if c.flag("use_sliding_window", False) else None
    late = c.size("max_window_layers", 80, low=0)
    kinds = layer_types(c, [SLIDING if window and i >= late else FULL for i in range(layers)], (SLIDING, FULL))

    def block(kind: str) -> Block:
        rows, mixer = split_attention(
            hidden, n, kv, hidden // n, bias_qkv=True, window=window if kind == SLIDING else None
        )
        mlp = gated_mlp(hidden, c.size("intermediate_size", 29568))
        norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))
        return Block(kind, 0, rows + mlp, norms, mixer)

    blocks, order = by_kind(kinds, block)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 152064),
        final=[rms("norm", hidden)], tied=c.flag("tie_word_embeddings", False),
        module_prefix="model.language_model.layers",
    )  # fmt: skip


def text_3(c: Config) -> Model:
    """The language model of Qwen3-VL: Qwen3 with normed q and k, dense or with routed experts."""
    moe = c.text("model_type", "") == "qwen3_vl_moe_text"
    hidden = c.size("hidden_size", 2048 if moe else 4096)
    layers = c.size("num_hidden_layers", 24 if moe else 32, high=4096)
    n, kv = heads(c, 16 if moe else 32, 16 if moe else 32)
    dim = head_dim(c, hidden, n, None if moe else 128)
    bias = c.flag("attention_bias", False)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias)
    norms = (
        rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden),
        rms("self_attn.q_norm", n * dim, dim), rms("self_attn.k_norm", kv * dim, dim),
    )  # fmt: skip
    count = c.size("num_experts", 60, "num_local_experts", low=0) if moe else 0
    step = c.size("decoder_sparse_step", 1)
    dense = c.items("mlp_only_layers") or []

    def block(routed: bool) -> Block:
        if not routed:
            mlp = gated_mlp(hidden, c.size("intermediate_size", 5632 if moe else 22016))
            return Block("dense", 0, attention + mlp, norms, mixer)
        active = top_k(c, "num_experts_per_tok", 4, count)
        experts = fused_experts(hidden, c.size("moe_intermediate_size", 1408), count, active)
        rows = (*attention, router(hidden, count), *experts)
        return Block("moe", 0, rows, norms, mixer, experts=count, top_k=active)

    sparse = [count > 0 and i not in dense and (i + 1) % step == 0 for i in range(layers)]
    blocks, order = by_kind(sparse, block)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 151936),
        final=[rms("norm", hidden)], tied=c.flag("tie_word_embeddings", moe),
        module_prefix="model.language_model.layers",
    )  # fmt: skip


def build(c: Config) -> Model:
    family = c.text("model_type", "")
    if family in ("qwen2_vl_text", "qwen2_5_vl_text"):
        return text_2(c)
    if family in ("qwen3_vl_text", "qwen3_vl_moe_text"):
        return text_3(c)
    v = own_config(c, "vision_config", family + "_vision")
    tied = c.flag("tie_word_embeddings", False)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        # configs of older releases keep the language model's keys at the top
        text = text_2(c.sub("text_config") if c.has("text_config") else c)
        return wrap(c, text, tower_2(v) if family == "qwen2_vl" else tower_2_5(v), tied or text.tied)
    text_config = own_config(c, "text_config", family + "_text")
    text = text_3(text_config) if family.startswith("qwen3_vl") else qwen3_next.build(text_config)
    deepstack = 0
    if family in ("qwen3_vl", "qwen3_vl_moe"):
        deepstack = len(v.items("deepstack_visual_indexes", [8, 16, 24]) or [])
    return wrap(c, text, tower_3(v, deepstack), tied)
