"""GPT-Neo: learned positions; global and local attention take turns.

Source: transformers 5.23 GPTNeoForCausalLM (no fused attention kernel).
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    Q_V,
    by_kind,
    layer_norm,
    plain_mlp,
    split_attention,
    stack,
    whole_head_dim,
)
from lora_planner.model import Block, Model, Weight


def _kinds(c: Config, layers: int) -> list[str]:
    """`attention_types` is a list of [kinds, how often]: [[["global", "local"], 12]]."""
    expected = f"pairs of a list of 'global' or 'local' and a count, {layers} layers in all"
    kinds: list[str] = []
    for pair in c.items("attention_types") or [[["global", "local"], 12]]:
        match pair:
            case [[*names], int(times)] if 0 <= times <= layers:
                kinds += names * times
            case _:
                raise c.reject("attention_types", expected)
    if len(kinds) != layers or any(kind not in ("global", "local") for kind in kinds):
        raise c.reject("attention_types", expected)
    return kinds


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2048)
    n = c.size("num_attention_heads", 16, "num_heads", high=4096)
    dim = whole_head_dim(c, "hidden_size", hidden, n)
    local = c.size("window_size", 256)
    names = ("mlp.c_fc", "mlp.c_proj")
    reads = ("in", "attn.attention.out_proj")
    mlp = plain_mlp(hidden, c.size("intermediate_size", 4 * hidden), names, reads=reads)
    norms = (layer_norm("ln_1", hidden), layer_norm("ln_2", hidden))

    def layer(kind: str) -> Block:
        attention, mixer = split_attention(
            hidden, n, n, dim,
            prefix="attn.attention.", out="out_proj", bias_out=True,
            window=local if kind == "local" else None, math_only=True,
        )  # fmt: skip
        return Block(kind, 0, attention + mlp, norms, mixer, activation_gated=False)

    blocks, order = by_kind(_kinds(c, c.size("num_hidden_layers", 24, "num_layers", high=4096)), layer)
    positions = c.size("max_position_embeddings", 2048)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 50257),
        final=[Weight("wpe", positions * hidden, "embed"), layer_norm("ln_f", hidden)],
        tied=c.flag("tie_word_embeddings", True),
        embed="wte",
        module_prefix="transformer.h",
        peft_default=Q_V,
    )
