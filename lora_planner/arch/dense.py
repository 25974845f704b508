"""Dense decoders that differ from Llama in a few facts each: one row a family.

To add such a family: a row here, its name in `BY_MODEL_TYPE`. What needs code of its own has its own file.

Source: transformers 5.23, configuration_*.py (class defaults) and modeling_*.py (layers) of each family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    Q_V,
    by_kind,
    gated_mlp,
    head_dim,
    heads,
    layer_norm,
    plain_mlp,
    rms,
    split_attention,
    stack,
    windows,
)
from lora_planner.model import Block, Model, Weight

Bias = bool | tuple[str, bool]  # fixed, or a key of the config and its class default
PRE = ("input_layernorm", "post_attention_layernorm")
POST = ("post_attention_layernorm", "post_feedforward_layernorm")


def _weightless(name: str, width: int) -> Weight:
    return Weight(name, 0, "norm", width, "layer")


def _none(c: Config, layers: int) -> list[int | None]:
    return [None] * layers


def _every(default: int | None) -> Callable[[Config, int], list[int | None]]:
    """Every layer slides where `sliding_window` is set; `layer_types` means nothing to these."""
    return lambda c, layers: [c.optional_size("sliding_window", default)] * layers


def _all_but_each(period: int, default: int) -> Callable[[Config, int], list[int | None]]:
    """Sliding, except each `period`-th layer."""
    return lambda c, layers: windows(
        c, layers, c.optional_size("sliding_window", default), lambda i: (i + 1) % period != 0
    )


def _all(c: Config, layers: int) -> list[int | None]:
    return windows(c, layers, c.optional_size("sliding_window", 4096), lambda i: True)


def _last(c: Config, layers: int) -> list[int | None]:
    """Qwen: `use_sliding_window` turns it on, and only from layer `max_window_layers`."""
    window = c.optional_size("sliding_window", 4096) if c.flag("use_sliding_window", False) else None
    full = c.size("max_window_layers", 28, low=0)
    return windows(c, layers, window, lambda i: i >= full)


def _exaone(c: Config, layers: int) -> list[int | None]:
    window = c.optional_size("sliding_window", 4096)
    if c.has("layer_types") or window is None:
        return windows(c, layers, window, lambda i: False)
    period = c.size("sliding_window_pattern", 4)
    return windows(c, layers, window, lambda i: (i + 1) % period != 0)


@dataclass(frozen=True, slots=True)
class Family:
    """Class defaults (what a missing key means) and layer facts; the defaults here are Llama's layer."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv: int | None = None  # None: as many as heads
    dim: int | None = None  # None: hidden_size / heads
    tied: bool = False
    bias_qkv: Bias = ("attention_bias", False)
    bias_out: Bias | None = None  # None: as bias_qkv
    bias_mlp: Bias = False
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # two names: no gate
    norms: tuple[str, ...] = PRE
    norm: Callable[[str, int], Weight] = rms
    qk_norm: tuple[str, ...] = ()
    qk_norm_shared: bool = True  # one head's weights serve all heads
    windows: Callable[[Config, int], list[int | None]] = _none
    math_only: bool = False
    peft_default: tuple[str, ...] = ()


QK = ("q_norm", "k_norm")

# fmt: skip keeps a row a line or two
FAMILIES = {
    "qwen2": Family(151936, 4096, 22016, 32, 32, 32, bias_qkv=True, bias_out=False, windows=_last,
                    peft_default=Q_V),
    "qwen3": Family(151936, 4096, 22016, 32, 32, 32, 128, qk_norm=QK, windows=_last, peft_default=Q_V),
    "gemma": Family(256000, 3072, 24576, 28, 16, 16, 256, True, peft_default=Q_V),
    "gemma2": Family(256000, 2304, 9216, 26, 8, 4, 256, True, windows=_all_but_each(2, 4096),
                     norms=(*PRE, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
                     math_only=True, peft_default=Q_V),  # capped scores: no sdpa
    "olmo": Family(50304, 4096, 11008, 32, 32, norm=_weightless),
    "olmo2": Family(50304, 4096, 11008, 32, 32, norms=POST, qk_norm=QK, qk_norm_shared=False),
    "olmo3": Family(50304, 4096, 11008, 32, 32, norms=POST, qk_norm=QK, qk_norm_shared=False,
                    windows=_all_but_each(4, 4096)),
    "granite": Family(32000, 4096, 11008, 32, 32, bias_mlp=("mlp_bias", False)),
    "helium": Family(48000, 2560, 7040, 24, 20, 20, 128, bias_out=False, bias_mlp=("mlp_bias", False)),
    "seed_oss": Family(155136, 4096, 27648, 64, 80, 8, 128, bias_qkv=("attention_bias", True),
                       bias_out=("attention_out_bias", False), bias_mlp=("mlp_bias", False),
                       math_only=True),  # drops out attention probabilities by default
    "ernie4_5": Family(103424, 1024, 3072, 18, 16, 2, 128, True, bias_qkv=("use_bias", False),
                       bias_mlp=("use_bias", False)),
    "hunyuan_v1_dense": Family(290943, 4096, 11008, 32, 32, qk_norm=("query_layernorm", "key_layernorm")),
    "exaone4": Family(102400, 4096, 16384, 32, 32, 32, bias_qkv=False, norms=POST, qk_norm=QK,
                      windows=_exaone),
    "ministral": Family(32000, 4096, 14336, 32, 32, 8, bias_qkv=False, windows=_all),
    "ministral3": Family(131072, 4096, 14336, 34, 32, 8, 128, bias_qkv=False, windows=_every(None)),
    "starcoder2": Family(49152, 3072, 12288, 30, 24, 2, tied=True, bias_qkv=("use_bias", True),
                         bias_mlp=("use_bias", True), mlp=("c_fc", "c_proj"), norm=layer_norm,
                         windows=_every(None)),
    "nemotron": Family(256000, 6144, 24576, 32, 48, bias_mlp=("mlp_bias", False),
                       mlp=("up_proj", "down_proj"), norm=layer_norm),
    "arcee": Family(32000, 2560, 18432, 32, 32, bias_mlp=("mlp_bias", False), mlp=("up_proj", "down_proj")),
}  # fmt: skip


def _bias(c: Config, bias: Bias) -> bool:
    return c.flag(*bias) if isinstance(bias, tuple) else bias


def build(c: Config) -> Model:
    f = FAMILIES[c.text("model_type", "")]
    hidden = c.size("hidden_size", f.hidden)
    inner = c.size("intermediate_size", f.inner)
    n, kv = heads(c, f.heads, f.kv)
    dim = head_dim(c, hidden, n, f.dim)
    qkv_bias = _bias(c, f.bias_qkv)
    out_bias = qkv_bias if f.bias_out is None else _bias(c, f.bias_out)
    mlp_bias = _bias(c, f.bias_mlp)
    names = tuple("mlp." + name for name in f.mlp)
    gated = len(names) == 3
    norms = [f.norm(name, hidden) for name in f.norms]
    for name, rows in zip(f.qk_norm, (n * dim, kv * dim), strict=False):
        norms.append(rms("self_attn." + name, rows, dim if f.qk_norm_shared else rows))

    def layer(window: int | None) -> Block:
        attention, mixer = split_attention(
            hidden, n, kv, dim, bias_qkv=qkv_bias, bias_out=out_bias, window=window, math_only=f.math_only
        )
        if gated:
            mlp = gated_mlp(hidden, inner, prefix="", names=names, bias=mlp_bias)
        else:
            mlp = plain_mlp(hidden, inner, (names[0], names[1]), bias=mlp_bias)
        kind = "sliding" if window else "full"
        return Block(kind, 0, attention + mlp, tuple(norms), mixer, activation_gated=gated)

    blocks, order = by_kind(f.windows(c, c.size("num_hidden_layers", f.layers, high=4096)), layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", f.vocab),
        final=[f.norm("norm", hidden)],
        tied=c.flag("tie_word_embeddings", f.tied),
        peft_default=f.peft_default,
    )
