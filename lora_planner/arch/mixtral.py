"""Mixtral and its kin: every layer routes, nothing is shared.

Granite-MoE names its block block_sparse_moe; Phi-3.5-MoE has layer norms and a router that is a Linear.

Source: transformers 5.23 MixtralForCausalLM, GraniteMoeForCausalLM, PhimoeForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    fused_experts,
    head_dim,
    heads,
    layer_norm,
    rms,
    router,
    split_attention,
    stack,
    top_k,
)
from lora_planner.model import LINEAR, PARAMETER, Block, Model


def build(c: Config) -> Model:
    family = c.text("model_type", "mixtral")
    granite, phi = family == "granitemoe", family == "phimoe"
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32, None if granite else 8)
    dim = head_dim(c, hidden, n)
    bias = family != "mixtral" and c.flag("attention_bias", False)
    attention, mixer = split_attention(
        hidden, n, kv, dim,
        bias_qkv=bias, bias_out=bias,
        window=None if granite else c.optional_size("sliding_window"),
    )  # fmt: skip
    experts = c.size("num_local_experts", 16 if phi else 8, "num_experts")
    used = top_k(c, "num_experts_per_tok", 2, experts)
    inner = c.size("intermediate_size", {"granitemoe": 11008, "phimoe": 6400}.get(family, 14336))
    place = "block_sparse_moe." if granite else "mlp."
    gate = place + ("gate" if family == "mixtral" else "router")
    routing = router(hidden, experts, name=gate, kind=LINEAR if phi else PARAMETER)
    mlp = fused_experts(hidden, inner, experts, used, prefix=place + "experts.")
    norm = layer_norm if phi else rms
    norms = (norm("input_layernorm", hidden), norm("post_attention_layernorm", hidden))
    return stack(
        c,
        [Block("moe", 0, (*attention, routing, *mlp), norms, mixer, experts=experts, top_k=used)],
        [0] * c.size("num_hidden_layers", 32, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 32064 if phi else 32000),
        final=[norm("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        head_bias=phi and c.flag("lm_head_bias", False),
        # peft lists q and v for mixtral, but its rewrite empties the list: get_peft_model raises
        peft_experts="mixtral" if family == "mixtral" else "",
    )
