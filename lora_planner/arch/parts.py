"""The building blocks that the families share: attention, MLP, experts, norms.

Letters: H hidden_size, N heads, K kv heads, D head_dim, F intermediate_size, E experts, k active.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from lora_planner.arch.config import Config
from lora_planner.model import PARAMETER, Attention, Block, Linear, Model, Weight

#: what peft adapts by default in most of the models that it knows
Q_V = ("q_proj", "v_proj")
SLIDING, FULL = "sliding_attention", "full_attention"
Key = TypeVar("Key")

#: names that configs of older releases give to kinds of layer
OLD_LAYER_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}


def rms(name: str, width: int, params: int | None = None) -> Weight:
    """An RMS norm over `width` elements of a token; `params` where weights are shared by heads."""
    return Weight(name, width if params is None else params, "norm", width, "rms")


def layer_norm(name: str, width: int, bias: bool = True, params: int | None = None) -> Weight:
    weights = width if params is None else params
    return Weight(name, weights * (2 if bias else 1), "norm", width, "layer")


def heads(c: Config, default_heads: int, default_kv: int | None = None) -> tuple[int, int]:
    """num_attention_heads and num_key_value_heads, checked against each other."""
    n = c.size("num_attention_heads", default_heads, high=4096)
    absent = "num_key_value_heads" not in c.values  # null means as many as heads, whatever the default
    kv = c.size("num_key_value_heads", default_kv if absent and default_kv else n, high=4096)
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


def whole_head_dim(c: Config, key: str, hidden: int, n: int) -> int:
    """hidden_size / heads for the families that know no other head_dim; `key` names hidden_size in errors."""
    if hidden % n:
        raise c.reject(key, f"a multiple of the {n} attention heads")
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


def fused_gated_mlp(hidden: int, inner: int) -> tuple[Linear, ...]:
    """As gated_mlp, with gate and up in one matrix (Phi-3, GLM-4)."""
    return (
        Linear("mlp.gate_up_proj", hidden, 2 * inner, reads=("in", "self_attn.o_proj"), parts=2),
        Linear("mlp.down_proj", inner, hidden, reads=("mlp.gate_up_proj",)),
    )


def fused_attention(
    hidden: int,
    n: int,
    kv: int,
    dim: int,
    *,
    qkv: str,
    out: str,
    bias_qkv: bool = False,
    bias_out: bool = False,
    kind: str = "linear",
    window: int | None = None,
    math_only: bool = False,
) -> tuple[tuple[Linear, ...], Attention]:
    """q, k and v as one matrix of (N + 2K) D rows, and the output."""
    rows = (
        Linear(qkv, hidden, (n + 2 * kv) * dim, group="attn", bias=bias_qkv, kind=kind, parts=3),
        Linear(out, n * dim, hidden, group="attn", bias=bias_out, kind=kind, reads=(qkv,)),
    )
    return rows, Attention(n, kv, dim, dim, (qkv,), (qkv,), (qkv,), window, math_only)


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


def layer_types(c: Config, default: Sequence[str], allowed: Sequence[str], key: str = "layer_types") -> list[str]:
    """The kind of every layer: the config's list, as long as the model is deep, or the family's default."""
    given = c.items(key)
    if given is None:
        return list(default)
    kinds = [OLD_LAYER_TYPES.get(kind, kind) if isinstance(kind, str) else "" for kind in given]
    if len(kinds) != len(default):
        raise c.reject(key, f"a list of num_hidden_layers = {len(default)} kinds")
    if not set(kinds) <= set(allowed):
        raise c.reject(key, f"kinds out of {', '.join(allowed)}")
    return kinds


def windows(c: Config, layers: int, window: int | None, sliding: Callable[[int], bool]) -> list[int | None]:
    """The window of each layer: from `layer_types`, or else where `sliding(i)` says so; None sees all."""
    default = [SLIDING if sliding(i) else FULL for i in range(layers)]
    kinds = layer_types(c, default, (SLIDING, FULL))
    return [window if kind == SLIDING else None for kind in kinds]


def by_kind(keys: Sequence[Key], make: Callable[[Key], Block]) -> tuple[list[Block], list[int]]:
    """One block for each distinct key, and which of them each layer is."""
    kinds = list(dict.fromkeys(keys))
    return [make(kind) for kind in kinds], [kinds.index(key) for key in keys]


def top_k(c: Config, key: str, default: int, experts: int, *aliases: str) -> int:
    """Experts a token passes; never more than there are."""
    k = c.size(key, default, *aliases)
    if k > experts:
        raise c.reject(key, f"at most the {experts} experts")
    return k


def dense_and_shared(
    c: Config,
    hidden: int,
    *,
    inner: int,
    expert_inner: int,
    experts: int,
    used: int,
    shared: int,
    bias: bool = False,
) -> tuple[tuple[Linear, ...], tuple[Linear, ...], int, int]:
    """DeepSeek's two MLPs, from its keys and these class defaults: the dense one of the first layers, and
    router, routed and shared experts of the others. Also the experts, and how many a token passes."""
    dense = gated_mlp(hidden, c.size("intermediate_size", inner), bias=bias)
    expert_inner = c.size("moe_intermediate_size", expert_inner)
    experts = c.size("n_routed_experts", experts, "num_local_experts", "num_experts")
    used = top_k(c, "num_experts_per_tok", used, experts)
    shared_inner = expert_inner * c.size("n_shared_experts", shared, low=0)
    sparse = (router(hidden, experts), *fused_experts(hidden, expert_inner, experts, used))
    if shared_inner:
        sparse += gated_mlp(hidden, shared_inner, prefix="mlp.shared_experts.", group="shared", bias=bias)
    return dense, sparse, experts, used


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
    embed_width: int | None = None,
    head_bias: bool = False,
    **more: object,
) -> Model:
    """Blocks and their order make a model; each block's count is how often the order names it.

    `embed_width` where embeddings are narrower than the layers (OPT-350m).
    """
    width = embed_width or hidden
    if tied and head_bias:  # the matrix is shared with the embedding, the bias is not
        final = [*final, Weight("lm_head.bias", vocab, "lm_head")]
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
        embed=Weight(embed, vocab * width, "embed"),
        head=Linear("lm_head", width, vocab, group="lm_head", bias=head_bias and not tied),
        tied=tied,
        order=tuple(order),
        weights=tuple(final),
        max_positions=c.size("max_position_embeddings", 0, "n_positions", low=0),
        **more,  # type: ignore[arg-type]
    )
