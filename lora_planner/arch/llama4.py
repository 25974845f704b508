"""Llama 4: chunked attention in three layers of four, one shared and one routed expert in each MoE layer.

transformers runs every expert on every token (`computed`) and scales the inputs by the router's score.

Source: transformers 5.23 Llama4ForCausalLM, Llama4ForConditionalGeneration.
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
from lora_planner.arch.vision import Tower, linear, own_config, patches, split_layers, weight, wrap
from lora_planner.model import LINEAR, Block, Model

CHUNKED, FULL = "chunked_attention", "full_attention"


def _text(c: Config) -> Model:
    hidden = c.size("hidden_size", 5120)
    layers = c.size("num_hidden_layers", 48, high=4096)
    n, kv = heads(c, 40, 8)
    dim = head_dim(c, hidden, n, 128)
    bias = c.flag("attention_bias", False)
    count = c.size("num_local_experts", 16)
    active = top_k(c, "num_experts_per_tok", 1, count)
    chunk = c.optional_size("attention_chunk_size", 8192)
    interval = c.size("no_rope_layer_interval", 4)
    rope = c.items("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    if len(rope) != layers:
        raise c.reject("no_rope_layers", f"a list of num_hidden_layers = {layers}")
    kinds = layer_types(c, [CHUNKED if r else FULL for r in rope], (CHUNKED, FULL))
    step = c.size("interleave_moe_layer_step", 1)
    routed = c.items("moe_layers")
    if routed is None:
        routed = list(range(step - 1, layers, step))
    normed = c.flag("use_qk_norm", True)

    def block(key: tuple[str, bool, bool]) -> Block:
        kind, rotary, moe = key
        window = chunk if kind == CHUNKED else None
        rows, mixer = split_attention(hidden, n, kv, dim, bias_qkv=bias, bias_out=bias, window=window)
        norms = [rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden)]
        if normed and rotary:
            norms.append(rms("self_attn.qk_norm", (n + kv) * dim, 0))  # it has no weight
        if not moe:
            inner = c.size("intermediate_size_mlp", 16384)
            mlp = gated_mlp(hidden, inner, prefix="feed_forward.")
            return Block(kind, 0, rows + mlp, tuple(norms), mixer)
        inner = c.size("intermediate_size", 8192)
        mlp = (
            router(hidden, count, name="feed_forward.router", kind=LINEAR),
            *fused_experts(hidden, inner, count, active, prefix="feed_forward.experts.", computed=count),
            *gated_mlp(hidden, inner, prefix="feed_forward.shared_expert.", group="shared"),
        )
        return Block(kind + "_moe", 0, rows + mlp, tuple(norms), mixer, experts=count, top_k=active)

    keys = [(kind, bool(r), i in routed) for i, (kind, r) in enumerate(zip(kinds, rope, strict=True))]
    blocks, order = by_kind(keys, block)
    return stack(
        c, blocks, order, hidden=hidden, vocab=c.size("vocab_size", 202048),
        final=[rms("norm", hidden)], tied=c.flag("tie_word_embeddings", False),
    )  # fmt: skip


def _tower(v: Config, hidden: int) -> Tower:
    """ViT, pixel shuffle with an MLP, projector. The patch embedding is a matrix here, not a convolution."""
    h, layers = v.size("hidden_size", 768), v.size("num_hidden_layers", 34)
    inner, patch = v.size("intermediate_size", 5632), v.size("patch_size", 14)
    out = v.size("projector_output_dim", 4096)
    rows = (
        linear("vision_model.patch_embedding.linear", v.size("num_channels", 3) * patch * patch, h, bias=False),
        *split_layers("vision_model.model.layers.", h, inner, layers, out="o_proj"),
        linear("vision_model.vision_adapter.mlp.fc1", inner, v.size("projector_input_dim", 4096), bias=False),
        linear("vision_model.vision_adapter.mlp.fc2", out, out, bias=False),
        linear("multi_modal_projector.linear_1", v.size("vision_output_dim", 7680), hidden, bias=False),
    )
    return rows, (
        weight("class_embedding", h),
        weight("positional_embedding_vlm", (patches(v, 448, 14) + 1) * h),
        weight("norms", 4 * h * layers),
        weight("layernorm_pre", 2 * h),
        weight("layernorm_post", 2 * h),
    )


def build(c: Config) -> Model:
    if c.text("model_type", "llama4") == "llama4_text":
        return _text(c)
    text = _text(own_config(c, "text_config", "llama4_text"))
    tower = _tower(own_config(c, "vision_config", "llama4_vision_model"), text.hidden_size)
    # the language model inside is a complete one and ties by its own config
    return wrap(c, text, tower, text.tied, prefix="language_model.model.layers", peft_default=("q_proj", "v_proj"))
