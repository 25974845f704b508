"""A tower, a projector and any language model: LLaVA, LLaVA-NeXT, Mistral 3, PaliGemma, InternVL.

Source: transformers 5.23 LlavaForConditionalGeneration, LlavaNext-, Mistral3-, PaliGemma- and
InternVLForConditionalGeneration.
"""

from __future__ import annotations

from collections.abc import Callable

from lora_planner.arch.config import Config
from lora_planner.arch.vision import (
    Tower,
    language_model,
    linear,
    own_config,
    sub_config,
    tower,
    weight,
    wrap,
)
from lora_planner.model import Model

#: what the wrapper assumes where there is no sub-config at all; an incomplete one means class defaults
CLIP_L = {"intermediate_size": 4096, "hidden_size": 1024, "patch_size": 14, "image_size": 336,
          "num_hidden_layers": 24, "num_attention_heads": 16}  # fmt: skip
PIXTRAL = {**CLIP_L, "image_size": 1540}
SO400M = {"intermediate_size": 4096, "hidden_size": 1152, "patch_size": 14, "image_size": 224,
          "num_hidden_layers": 27, "num_attention_heads": 16, "vision_use_head": False}  # fmt: skip
MISTRAL_24B = {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32,
               "num_hidden_layers": 40, "num_key_value_heads": 8, "vocab_size": 131072,
               "sliding_window": None, "max_position_embeddings": 131072}  # fmt: skip
GEMMA_2B = {"hidden_size": 2048, "num_hidden_layers": 18, "intermediate_size": 16384,
            "num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257152}  # fmt: skip


def _feature_layers(c: Config, default: int) -> int:
    """How many layers' outputs the projector reads side by side."""
    chosen = c.values.get("vision_feature_layer", default)
    if isinstance(chosen, list):
        return len(chosen)
    c.size("vision_feature_layer", default, low=-4096)
    return 1


def _llava(c: Config) -> Model:
    """Two matrices project the tower's features; LLaVA-NeXT adds a learned end of line."""
    text = language_model(c, "llama")
    v = sub_config(c, "vision_config", "clip_vision_model", CLIP_L)
    rows, weights = tower(v)
    width, bias = v.size("hidden_size"), c.flag("multimodal_projector_bias", True)
    hidden = text.hidden_size
    rows += (
        linear("multi_modal_projector.linear_1", width * _feature_layers(c, -2), hidden, bias=bias),
        linear("multi_modal_projector.linear_2", hidden, hidden, bias=bias),
    )
    tied = c.flag("tie_word_embeddings", False)
    if c.text("model_type", "llava") == "llava_next":
        return wrap(c, text, (rows, (*weights, weight("image_newline", hidden))), tied)
    return wrap(c, text, (rows, weights), tied or text.tied)


def _mistral3(c: Config) -> Model:
    """Pixtral; a square of patches is merged into one before the projector."""
    text = language_model(c, "mistral", MISTRAL_24B)
    v = sub_config(c, "vision_config", "pixtral", PIXTRAL)
    rows, weights = tower(v)
    width, hidden = v.size("hidden_size", 1024), text.hidden_size
    side, bias = c.size("spatial_merge_size", 2), c.flag("multimodal_projector_bias", False)
    rows += (
        linear("multi_modal_projector.patch_merger.merging_layer", width * side * side, width, bias=False),
        linear("multi_modal_projector.linear_1", width * _feature_layers(c, -1), hidden, bias=bias),
        linear("multi_modal_projector.linear_2", hidden, hidden, bias=bias),
    )
    weights += (weight("multi_modal_projector.norm", width),)
    return wrap(c, text, (rows, weights), c.flag("tie_word_embeddings", True))


def _paligemma(c: Config) -> Model:
    text = language_model(c, "gemma", GEMMA_2B)
    v = sub_config(c, "vision_config", "siglip_vision_model", SO400M)
    rows, weights = tower(v)
    project = linear("multi_modal_projector.linear", v.size("hidden_size", 768), c.size("projection_dim", 2048))
    return wrap(c, text, ((*rows, project), weights), c.flag("tie_word_embeddings", True))


def _pair(v: Config, key: str, default: int) -> tuple[int, int]:
    """A size that may be given for height and width apart."""
    given = v.values.get(key)
    if not isinstance(given, list):
        n = v.size(key, default)
        return n, n
    if len(given) != 2 or not all(type(n) is int and n > 0 for n in given):
        raise v.reject(key, "a whole number or two of them")
    return given[0], given[1]


def _internvit(v: Config) -> Tower:
    """InternViT: layer scales, optional normed q and k."""
    h, layers = v.size("hidden_size", 1024), v.size("num_hidden_layers", 24)
    inner, bias = v.size("intermediate_size", 4096), v.flag("attention_bias", False)
    path = "vision_tower.encoder.layer."
    (height, width), (ph, pw) = _pair(v, "image_size", 448), _pair(v, "patch_size", 14)
    rows = (
        *(linear(f"{path}attention.{name}", h, h, layers, bias) for name in ("q_proj", "k_proj", "v_proj")),
        linear(path + "attention.projection_layer", h, h, layers),
        linear(path + "mlp.fc1", h, inner, layers),
        linear(path + "mlp.fc2", inner, h, layers),
    )
    norm = 1 if v.text("norm_type", "layer_norm") == "rms_norm" else 2
    return rows, (
        weight("cls_token", h * (2 if v.flag("use_mask_token", False) else 1)),
        weight("patch_embeddings.projection", h * (v.size("num_channels", 3) * ph * pw + 1)),
        weight("position_embeddings", ((height // ph) * (width // pw) + 1) * h
               if v.flag("use_absolute_position_embeddings", True) else 0),
        weight("layernorms", 2 * norm * h * layers),
        weight("lambdas", 2 * h * layers),
        weight("qk_norm", 2 * h * layers if v.flag("use_qk_norm", False) else 0),
        weight("layernorm", 0 if v.flag("use_mean_pooling", True) else 2 * h),
    )  # fmt: skip


def _internvl(c: Config) -> Model:
    text = language_model(c, "qwen2")
    v = own_config(c, "vision_config", "internvl_vision")
    rows, weights = _internvit(v)
    ratio = c.number("downsample_ratio", 0.5)
    if not 0 < ratio <= 1:
        raise c.reject("downsample_ratio", "a share above 0, at most 1")
    wide, hidden = v.size("hidden_size", 1024) * int(1 / ratio) ** 2, text.hidden_size
    rows += (
        linear("multi_modal_projector.linear_1", wide, hidden),
        linear("multi_modal_projector.linear_2", hidden, hidden),
    )
    weights += (weight("multi_modal_projector.layer_norm", 2 * wide),)
    return wrap(c, text, (rows, weights), c.flag("tie_word_embeddings", True))


BY_TYPE: dict[str, Callable[[Config], Model]] = {
    "llava": _llava, "llava_next": _llava, "mistral3": _mistral3, "paligemma": _paligemma,
    "internvl": _internvl,
}  # fmt: skip


def build(c: Config) -> Model:
    return BY_TYPE[c.text("model_type", "llava")](c)
