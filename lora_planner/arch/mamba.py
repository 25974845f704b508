"""The Mamba-2 mixer that the hybrid families share, and Mamba-2 itself.

One projection makes gate z, values x, keys B, queries C and step dt; x, B and C pass a causal
depthwise convolution, then a scan with a state of `state` per channel.

Source: transformers 5.23 Mamba2Mixer and its kin in nemotron_h, granitemoehybrid, bamba, falcon_h1.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_planner.arch.config import Config
from lora_planner.arch.parts import rms, stack
from lora_planner.model import Block, Linear, Model, Scan, Weight

#: peft 0.21 will not wrap these in the model types that it calls Mamba (their kernels bypass an adapter)
REFUSED = ("out_proj", "conv1d")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one mixer; `inner` = heads x head_dim unless the config says otherwise."""

    inner: int
    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    chunk: int
    bias_in: bool = False
    bias_out: bool = False
    bias_conv: bool = True
    norm: bool = True


def mixer(hidden: int, m: Shape, prefix: str) -> tuple[tuple[Linear, ...], tuple[Weight, ...], Scan]:
    """in_proj, scan, out_proj.

    in_proj  H -> 2 inner + 2 groups state + heads      (z; x, B, C; dt)

    Source: Dao and Gu 2024, arXiv:2405.21060, sec. 7; shapes as transformers stores them.
    """
    channels = m.inner + 2 * m.groups * m.state
    into, out = prefix + "in_proj", prefix + "out_proj"
    rows = (
        Linear(into, hidden, m.inner + channels + m.heads, group="ssm", bias=m.bias_in, parts=5),
        Linear(out, m.inner, hidden, group="ssm", bias=m.bias_out, reads=(into,)),
    )
    weights = [
        Weight(prefix + "conv1d", channels * (m.kernel + (1 if m.bias_conv else 0)), "ssm"),
        Weight(prefix + "A_log", m.heads, "ssm"),
        Weight(prefix + "D", m.heads, "ssm"),
        Weight(prefix + "dt_bias", m.heads, "ssm"),
    ]
    if m.norm:
        weights.append(Weight(prefix + "norm", m.inner, "ssm", m.inner, "rms"))
    scan = Scan("mamba2", m.heads, m.head_dim, m.state, m.groups, m.kernel, channels, m.chunk, (into,))
    return rows, tuple(weights), scan


def shape_of(c: Config, hidden: int, inner: int, *, bias_out: bool | None = None, norm: bool = True) -> Shape:
    """The `mamba_*` keys of Bamba, Granite 4 and Falcon-H1; `mamba_d_head` may be "auto".

    `bias_out` where the output projection has a key of its own.
    """
    n = c.size("mamba_n_heads", 128)
    automatic = c.values.get("mamba_d_head", "auto") == "auto"
    bias = c.flag("mamba_proj_bias", False)
    shape = Shape(
        inner=inner,
        heads=n,
        head_dim=inner // n if automatic else c.size("mamba_d_head"),
        state=c.size("mamba_d_state", 256),
        groups=c.size("mamba_n_groups", 1),
        kernel=c.size("mamba_d_conv", 4),
        chunk=c.size("mamba_chunk_size", 256),
        bias_in=bias,
        bias_out=bias if bias_out is None else bias_out,
        bias_conv=c.flag("mamba_conv_bias", True),
        norm=norm,
    )
    if shape.heads * shape.head_dim != inner:
        raise c.reject("mamba_n_heads", f"heads of {shape.head_dim} that fill the inner width {inner}")
    if n % shape.groups:
        raise c.reject("mamba_n_groups", f"a divisor of mamba_n_heads = {n}")
    return shape


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    inner = c.size("expand", 2) * hidden
    n, dim = c.size("num_heads", 128), c.size("head_dim", 64)
    if n * dim != inner:
        raise c.reject("num_heads", f"expand * hidden_size / head_dim = {inner // dim}")
    bias = c.flag("use_bias", False)
    shape = Shape(
        inner, n, dim, c.size("state_size", 128), c.size("n_groups", 8), c.size("conv_kernel", 4),
        c.size("chunk_size", 256), bias, bias, c.flag("use_conv_bias", True),
    )  # fmt: skip
    rows, weights, scan = mixer(hidden, shape, "mixer.")
    return stack(
        c,
        [Block("mamba", 0, rows, (rms("norm", hidden), *weights), scan)],
        [0] * c.size("num_hidden_layers", 64, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 32768),
        final=[rms("norm_f", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        embed="embeddings",
        module_prefix="backbone.layers",
        peft_refuses=REFUSED,
    )
