"""LFM2: gated short convolutions in most layers, attention in the others; dense or with routed experts.

A convolution mixes `conv_L_cache` neighbours with no state, so its layers have no mixer here:
only weights and the two projections.

Source: transformers 5.23 Lfm2ForCausalLM, Lfm2MoeForCausalLM.
"""

from __future__ import annotations

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
from lora_planner.model import Block, Linear, Model, Weight

CONV, ATTENTION = "conv", "full_attention"


def _dense_width(c: Config) -> int:
    """Two thirds of the stated width, times a factor, rounded up to whole blocks.

    >>> _dense_width(Config({"block_ff_dim": 6656, "block_auto_adjust_ff_dim": True}))
    4608
    """
    inner = c.size("block_ff_dim", c.size("intermediate_size", 12288))
    if not c.flag("block_auto_adjust_ff_dim", True):
        return inner
    inner = int(2 * inner / 3)
    if "block_ffn_dim_multiplier" in c.values and c.values["block_ffn_dim_multiplier"] is None:
        return inner
    factor = c.number("block_ffn_dim_multiplier", 1.0)
    if not 0 < factor < 1e6:  # a NaN is refused too
        raise c.reject("block_ffn_dim_multiplier", "a factor above 0")
    inner = int(factor * inner)
    unit = c.size("block_multiple_of", 256)
    return unit * ((inner + unit - 1) // unit)


def _conv(c: Config, hidden: int) -> Block:
    bias = c.flag("conv_bias", False)
    rows = (
        Linear("conv.in_proj", hidden, 3 * hidden, group="ssm", bias=bias, parts=3),
        Linear("conv.out_proj", hidden, hidden, group="ssm", bias=bias, reads=("conv.in_proj",)),
    )
    kernel = c.size("conv_L_cache", 3)
    return Block(CONV, 0, rows, (Weight("conv.conv", hidden * (kernel + (1 if bias else 0)), "ssm"),))


def _attention(c: Config, hidden: int) -> Block:
    n, kv = heads(c, 32, 8)
    dim = head_dim(c, hidden, n)
    rows, mixer = split_attention(hidden, n, kv, dim, out="out_proj")
    norms = (rms("self_attn.q_layernorm", n * dim, dim), rms("self_attn.k_layernorm", kv * dim, dim))
    return Block(ATTENTION, 0, rows, norms, mixer)


def build(c: Config) -> Model:
    moe = c.text("model_type", "lfm2") == "lfm2_moe"
    hidden = c.size("hidden_size", 2048 if moe else 2560)
    layers = c.size("num_hidden_layers", 32, high=4096)
    if moe and not c.has("layer_types"):
        raise c.reject("layer_types", "a list: this family has no default")
    attending = c.items("full_attn_idxs", list(range(layers))) or []
    kinds = layer_types(c, [ATTENTION if i in attending else CONV for i in range(layers)], (CONV, ATTENTION))
    first = c.size("num_dense_layers", 2, low=0) if moe else layers
    biased = moe and c.flag("use_expert_bias", True)
    mlp_names = ("w1", "w3", "w2")

    def block(key: tuple[str, bool]) -> Block:
        kind, routed = key
        mixing = _conv(c, hidden) if kind == CONV else _attention(c, hidden)
        reads = ("in", mixing.linears[-1].name)
        norms = (rms("operator_norm", hidden), rms("ffn_norm", hidden), *mixing.weights)
        if not routed:
            inner = c.size("intermediate_size", 7168) if moe else _dense_width(c)
            mlp = gated_mlp(hidden, inner, prefix="feed_forward.", names=mlp_names, reads=reads)
            return Block(kind, 0, mixing.linears + mlp, norms, mixing.mixer)
        count = c.size("num_experts", 32)
        active = top_k(c, "num_experts_per_tok", 4, count)
        experts = fused_experts(
            hidden, c.size("moe_intermediate_size", 1792), count, active,
            prefix="feed_forward.experts.", reads=reads,
        )  # fmt: skip
        gate = router(hidden, count, name="feed_forward.gate", reads=reads)
        return Block(
            kind + "_moe",
            0,
            (*mixing.linears, gate, *experts),
            norms,
            mixing.mixer,
            experts=count,
            top_k=active,
        )

    blocks, order = by_kind([(kind, i >= first) for i, kind in enumerate(kinds)], block)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 65536),
        final=[rms("embedding_norm", hidden)],
        tied=c.flag("tie_embedding", c.flag("tie_word_embeddings", True)),
        buffers=sum(blocks[i].experts for i in order) if biased else 0,
    )  # fmt: skip
