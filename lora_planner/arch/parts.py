"""The building blocks that the families share: attention, MLP, experts, norms.

Letters: H hidden_size, N heads, K kv heads, D head_dim, F intermediate_size, E experts, k active.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_planner.arch.config import Config
from lora_planner.model import PARAMETER, Attention, Block, Linear, Model, Weight


def rms(name: str, width: int, params: int | None = None) -> Weight:
    """An RMS norm over `width` elements of a token; `params` where weights are shared by heads."""
    return Weight(name, width if params is None else params, "norm", width, "rms")


def layer_norm(name: str, width: int, bias: bool = True, params: int | None = None) -> Weight:
    weights = width if params is None else params
    return Weight(name, weights * (2 if bias else 1), "norm", width, "layer")


def heads(c: Config, default_heads: int, default_kv: int | None = None) -> tuple[int, int]:
    """num_attention_heads and num_key_value_heads, checked against each other."""
    n = c.size("num_attention_heads", default_heads, high=4096)
    kv = c.size("num_key_value_heads", n if default_kv is None else default_kv, high=4096)
    if n % kv:
        raise c.reject("num_key_value_heads", f"a divisor of num_attention_heads = {n}")
    return n, kv


def head_dim(c: Config, hidden: int, n: int, default: int | None = None) -> int:
    """`head_dim` where given, else the class default, else hidden_size / heads, which must be whole."""
    if c.has("head_dim"):
        return c.size("head_dim", high=65536)
    if default is not None:
        return c.size("head_dim", default)
    if hidden % n:
        raise c.reject("hidden_size", f"a multiple of num_attention_heads = {n}, or a head_dim")
    return hidden // n


def split_attention(
    hidden: int,
    n: int,
    kv: int,
    dim: int,
    *,
    prefix: str = "self_attn.",
    out: str = "o_proj",
    bias_qkv: bool = False,
    bias_out: bool = False,
    q_rows: int | None = None,
    window: int | None = None,
    math_only: bool = False,
) -> tuple[tuple[Linear, ...], Attention]:
    """q, k, v and o as four matrices (GQA when kv < n). `q_rows` where q also makes a gate."""
    q, k, v, o = (prefix + s for s in ("q_proj", "k_proj", "v_proj", out))
    rows = (
        Linear(q, hidden, q_rows or n * dim, group="attn", bias=bias_qkv),
        Linear(k, hidden, kv * dim, group="attn", bias=bias_qkv),
        Linear(v, hidden, kv * dim, group="attn", bias=bias_qkv),
        Linear(o, n * dim, hidden, group="attn", bias=bias_out, reads=(q, k, v)),
    )
    return rows, Attention(n, kv, dim, dim, (q,), (k,), (v,), window, math_only)


def gated_mlp(
    hidden: int,
    inner: int,
    *,
    prefix: str = "mlp.",
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    group: str = "mlp_dense",
    bias: bool = False,
    reads: tuple[str, ...] = ("in", "self_attn.o_proj"),
) -> tuple[Linear, ...]:
    """down(act(gate(x)) * up(x)), SwiGLU and its kin."""
    gate, up, down = (prefix + s for s in names)
    return (
        Linear(gate, hidden, inner, group=group, bias=bias, reads=reads),
        Linear(up, hidden, inner, group=group, bias=bias, reads=reads),
        Linear(down, inner, hidden, group=group, bias=bias, reads=(gate, up)),
    )


def plain_mlp(
    hidden: int,
    inner: int,
    names: tuple[str, str],
    *,
    group: str = "mlp_dense",
    bias: bool = True,
    kind: str = "linear",
    reads: tuple[str, ...] = ("in", "self_attn.o_proj"),
) -> tuple[Linear, ...]:
    """down(act(up(x)))"""
    up, down = names
    return (
        Linear(up, hidden, inner, group=group, bias=bias, kind=kind, reads=reads),
        Linear(down, inner, hidden, group=group, bias=bias, kind=kind, reads=(up,)),
    )


def fused_experts(
    outer: int,
    inner: int,
    experts: int,
    top_k: int,
    *,
    prefix: str = "mlp.experts.",
    gated: bool = True,
    bias: bool = False,
    reads: tuple[str, ...] = ("in", "self_attn.o_proj"),
    computed: int = 0,
) -> tuple[Linear, ...]:
    """Routed experts as transformers 5 stores them: two 3-D Parameters, gate and up in one."""
    first = prefix + ("gate_up_proj" if gated else "up_proj")
    down = prefix + "down_proj"
    return (
        Linear(first, outer, inner * (2 if gated else 1), experts, top_k, "experts", bias, PARAMETER,
               reads, 2 if gated else 1, computed),
        Linear(down, inner, outer, experts, top_k, "experts", bias, PARAMETER, (first,), 1, computed),
    )  # fmt: skip


def router(
    hidden: int,
    experts: int,
    *,
    name: str = "mlp.gate",
    kind: str = PARAMETER,
    bias: bool = False,
    reads: tuple[str, ...] = ("in", "self_attn.o_proj"),
) -> Linear:
    return Linear(name, hidden, experts, group="router", kind=kind, bias=bias, reads=reads)


def stack(
    c: Config,
    blocks: Sequence[Block],
    order: Sequence[int],
    *,
    hidden: int,
    vocab: int,
    final: Sequence[Weight],
    tied: bool,
    embed: str = "embed_tokens",
    **more: object,
) -> Model:
    """Blocks and their order make a model; each block's count is how often the order names it."""
    counted = [
        Block(b.kind, order.count(i), b.linears, b.weights, b.mixer, b.activation_gated, b.experts, b.top_k)
        for i, b in enumerate(blocks)
    ]
    return Model(
        name="",
        model_type=c.text("model_type", ""),
        hidden_size=hidden,
        vocab_size=vocab,
        blocks=tuple(counted),
        embed=Weight(embed, vocab * hidden, "embed"),
        head=Linear("lm_head", hidden, vocab, group="lm_head"),
        tied=tied,
        order=tuple(order),
        weights=tuple(final),
        max_positions=c.size("max_position_embeddings", 0, low=0),
        **more,  # type: ignore[arg-type]
    )
