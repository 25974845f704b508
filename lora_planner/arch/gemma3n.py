"""The language model of Gemma 3n: four parallel streams (AltUp), a low-rank side path (LAuReL),
an embedding for every layer, and last layers that reuse keys and values of earlier ones.

Its image tower is a convolution net of another library, so only `gemma3n_text` is described.

Source: transformers 5.23 Gemma3nForCausalLM.
"""

from __future__ import annotations

from dataclasses import replace

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    by_kind,
    gated_mlp,
    head_dim,
    heads,
    layer_types,
    rms,
    split_attention,
    stack,
)
from lora_planner.model import Block, Linear, Model, Weight

SLIDING, FULL = "sliding_attention", "full_attention"
EARLIER = ("earlier layer",)  # whose keys and values a layer reuses
NOTE = "The four streams between layers are not in the activations; a token is counted as one stream."


def _widths(c: Config, layers: int) -> list[int]:
    """The MLP's width: one for all layers, or a list."""
    if not isinstance(c.values.get("intermediate_size"), list):
        return [c.size("intermediate_size", 16384)] * layers
    widths = c.items("intermediate_size") or []
    if len(widths) != layers or not all(type(w) is int and w > 0 for w in widths):
        raise c.reject("intermediate_size", f"a whole number, or num_hidden_layers = {layers} of them")
    return widths


def _around(c: Config, hidden: int, streams: int) -> tuple[list[Linear], list[Linear], list[Weight]]:
    """What runs before attention, what runs after the MLP, and their weights."""
    rank, narrow = c.size("laurel_rank", 64), c.size("hidden_size_per_layer_input", 256)
    router = "altup.modality_router"
    before = [
        Linear(router, hidden, streams, group="other"),
        Linear("altup.prediction_coefs", streams, streams**2, group="other", reads=(router,)),
        Linear("laurel.linear_left", hidden, rank, group="other"),
        Linear("laurel.linear_right", rank, hidden, group="other", reads=("laurel.linear_left",)),
    ]
    after = [
        Linear("altup.correction_coefs", streams, streams, group="other", reads=("mlp.down_proj",)),
        Linear("per_layer_input_gate", hidden, narrow, group="other", reads=("in", "mlp.down_proj")),
        Linear("per_layer_projection", narrow, hidden, group="other", reads=("per_layer_input_gate",)),
    ]
    weights = [
        Weight("altup.correct_output_scale", hidden, "other"),
        rms("altup.router_norm", hidden),
        rms("laurel.post_laurel_norm", hidden),
        rms("post_per_layer_input_norm", hidden),
    ]
    return before, after, weights


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2048)
    layers = c.size("num_hidden_layers", 35, high=4096)
    n, kv = heads(c, 8, 2)
    dim = head_dim(c, hidden, n, 256)
    bias = c.flag("attention_bias", False)
    window = c.size("sliding_window", 512)
    streams, narrow = c.size("altup_num_inputs", 4), c.size("hidden_size_per_layer_input", 256)
    kinds = layer_types(c, [SLIDING if (i + 1) % 5 else FULL for i in range(layers)], (SLIDING, FULL))
    sharing = c.size("num_kv_shared_layers", 15, low=0)
    if sharing and not set(kinds) <= set(kinds[: max(0, layers - sharing)]):
        raise c.reject("num_kv_shared_layers", "fewer layers, so that each kind has one to share from")
    before, after, around = _around(c, hidden, streams)
    norms = [
        rms(name, hidden)
        for name in (
            "input_layernorm", "post_attention_layernorm",
            "pre_feedforward_layernorm", "post_feedforward_layernorm",
        )
    ]  # fmt: skip

    def block(key: tuple[str, int, bool]) -> Block:
        kind, inner, reuses = key
        rows, mixer = split_attention(
            hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, window=window if kind == SLIDING else None
        )
        normed = [rms("self_attn.q_norm", n * dim, dim)]
        if reuses:
            q, _, _, out = rows
            rows = (q, replace(out, reads=(q.name, *EARLIER)))
            mixer = replace(mixer, k=EARLIER, v=EARLIER)
        else:
            normed += [rms("self_attn.k_norm", kv * dim, dim), rms("self_attn.v_norm", kv * dim, 0)]
        mlp = gated_mlp(hidden, inner, reads=("in", "self_attn.o_proj", "laurel.linear_right"))
        return Block(kind, 0, (*before, *rows, *mlp, *after), (*norms, *normed, *around), mixer)

    keys = [(kind, w, i >= layers - sharing) for i, (kind, w) in enumerate(zip(kinds, _widths(c, layers), strict=True))]
    blocks, order = by_kind(keys, block)
    per_layer, rows = layers * narrow, c.size("vocab_size_per_layer_input", 262144)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 262400),
        final=[
            rms("norm", hidden),
            rms("per_layer_projection_norm", per_layer, narrow),
            Weight("embed_tokens_per_layer", rows * per_layer, "embed"),
        ],
        extra_linears=(
            Linear("per_layer_model_projection", hidden, per_layer, group="other"),
            *(
                Linear(f"{name}.{i}", hidden, hidden, group="other")
                for name in ("altup_projections", "altup_unembed_projections")
                for i in range(streams - 1)
            ),
        ),
        tied=c.flag("tie_word_embeddings", True),
        notes=(NOTE,),
    )  # fmt: skip
