"""What vision-language families share: the language model inside, and towers that several of them use.

A tower's rows count for the whole model. Their names are the paths in transformers without the
layer's number: peft's matching by suffix finds them, and none equals the name of a text matrix.

Source: transformers 5.23 CLIPVisionModel, SiglipVisionModel, PixtralVisionModel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lora_planner import arch
from lora_planner.arch.config import Config
from lora_planner.model import Linear, Model, Weight

Tower = tuple[tuple[Linear, ...], tuple[Weight, ...]]


def sub_config(c: Config, key: str, model_type: str, if_missing: Mapping[str, Any] | None = None) -> Config:
    """A sub-config with its default model_type; `if_missing` applies only where there is none at all."""
    inner = c.sub(key) if c.has(key) else Config(dict(if_missing or {}), c.where, f"{c.pointer}/{key}")
    inner.values = {"model_type": model_type, **inner.values}
    return inner


def own_config(c: Config, key: str, model_type: str) -> Config:
    """A sub-config of a wrapper that knows only one kind: whatever model_type it states is ignored."""
    inner = sub_config(c, key, model_type)
    inner.values = {**inner.values, "model_type": model_type}
    return inner


def language_model(c: Config, model_type: str, if_missing: Mapping[str, Any] | None = None) -> Model:
    """The model of `text_config`, built by the file of its own model_type."""
    return arch.build(sub_config(c, "text_config", model_type, if_missing))


def wrap(
    c: Config,
    text: Model,
    tower: Tower,
    tied: bool,
    *,
    prefix: str = "model.language_model.layers",
    peft_experts: str = "",
    peft_default: tuple[str, ...] = (),
) -> Model:
    """A language model with a tower. What peft does depends on the wrapper's model_type only."""
    linears, weights = tower
    return replace(
        text,
        model_type=c.text("model_type", ""),
        tied=tied,
        tower=text.tower + linears,
        tower_weights=text.tower_weights + weights,
        module_prefix=prefix,
        peft_experts=peft_experts,
        peft_refuses=(),
        peft_default=peft_default,
    )


def linear(name: str, d_in: int, d_out: int, count: int = 1, bias: bool = True, parts: int = 1) -> Linear:
    """A matrix of a tower, in all its copies."""
    return Linear(name, d_in, d_out, count, count, "vision", bias, parts=parts)


def weight(name: str, params: int) -> Weight:
    """Convolutions, embeddings and norms of a tower, in all their copies."""
    return Weight(name, params, "vision")


def patches(v: Config, image: int, patch: int) -> int:
    """Patches of a square image: (image_size / patch_size)^2, rounded down."""
    side = v.size("image_size", image) // v.size("patch_size", patch)
    return side * side


def patch_conv(v: Config, width: int, patch: int, bias: bool, channels: str = "num_channels") -> int:
    """Parameters of the convolution that embeds a patch: C p p H (+ H)."""
    return width * (v.size(channels, 3) * v.size("patch_size", patch) ** 2 + (1 if bias else 0))


def split_layers(
    path: str, h: int, inner: int, layers: int, *, out: str = "out_proj", bias: bool = True
) -> tuple[Linear, ...]:
    """A ViT layer with q, k, v apart and a two-matrix MLP."""
    return (
        *(linear(f"{path}self_attn.{name}", h, h, layers, bias) for name in ("q_proj", "k_proj", "v_proj", out)),
        linear(path + "mlp.fc1", h, inner, layers),
        linear(path + "mlp.fc2", inner, h, layers),
    )


def clip(v: Config) -> Tower:
    """CLIP's ViT: class token, learned positions, norms before and after."""
    h, layers = v.size("hidden_size", 768), v.size("num_hidden_layers", 12)
    rows = split_layers("vision_tower.encoder.layers.", h, v.size("intermediate_size", 3072), layers)
    return rows, (
        weight("embeddings.class_embedding", h),
        weight("embeddings.patch_embedding", patch_conv(v, h, 32, bias=False)),
        weight("embeddings.position_embedding", (patches(v, 224, 32) + 1) * h),
        weight("layer_norm", 2 * 2 * h * layers),
        weight("pre_layrnorm", 2 * h),
        weight("post_layernorm", 2 * h),
    )


def siglip(v: Config) -> Tower:
    """SigLIP's ViT; with `vision_use_head` (the default) an attention-pooling head follows."""
    h, layers = v.size("hidden_size", 768), v.size("num_hidden_layers", 12)
    inner = v.size("intermediate_size", 3072)
    rows = split_layers("vision_tower.encoder.layers.", h, inner, layers)
    weights = (
        weight("embeddings.patch_embedding", patch_conv(v, h, 16, bias=True)),
        weight("embeddings.position_embedding", patches(v, 224, 16) * h),
        weight("layer_norm", 2 * 2 * h * layers),
        weight("post_layernorm", 2 * h),
    )
    if not v.flag("vision_use_head", True):
        return rows, weights
    head = (
        linear("vision_tower.head.attention.out_proj", h, h),
        linear("vision_tower.head.mlp.fc1", h, inner),
        linear("vision_tower.head.mlp.fc2", inner, h),
    )
    return rows + head, (
        *weights,
        weight("head.probe", h),
        weight("head.attention.in_proj", 3 * h * h + 3 * h),
        weight("head.layernorm", 2 * h),
    )


def pixtral(v: Config) -> Tower:
    """Pixtral's ViT: rotary positions, RMS norms, SwiGLU, no biases."""
    h, layers = v.size("hidden_size", 1024), v.size("num_hidden_layers", 24)
    inner = v.size("intermediate_size", 4096)
    path = "vision_tower.transformer.layers."
    rows = (
        *(linear(f"{path}attention.{name}", h, h, layers, False) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        linear(path + "feed_forward.gate_proj", h, inner, layers, False),
        linear(path + "feed_forward.up_proj", h, inner, layers, False),
        linear(path + "feed_forward.down_proj", inner, h, layers, False),
    )
    return rows, (
        weight("patch_conv", patch_conv(v, h, 16, bias=False)),
        weight("ln_pre", h),
        weight("norms", 2 * h * layers),
    )


TOWERS: dict[str, Callable[[Config], Tower]] = {
    "clip_vision_model": clip, "siglip_vision_model": siglip, "pixtral": pixtral,
}  # fmt: skip


def tower(v: Config) -> Tower:
    """The tower of a `vision_config`, by its model_type."""
    kind = v.text("model_type", "")
    if kind not in TOWERS:
        raise v.reject("model_type", f"a known tower: {', '.join(TOWERS)}")
    return TOWERS[kind](v)
