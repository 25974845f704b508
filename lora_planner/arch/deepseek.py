"""Multi-head latent attention: DeepSeek V2, V3, V3.2, Kimi K2, GLM-4.7-Flash, GLM-5.

Queries and keys pass through a narrow latent; a rotary part of the key is shared by all heads. The first
layers have a dense MLP, the others routed and shared experts. V3.2 and GLM-5 add an indexer, which picks
the keys a query looks at; transformers still computes all scores, so the planner does too.

Source: transformers 5.23 Deepseek{V2,V3,V32}ForCausalLM, Glm4MoeLiteForCausalLM, GlmMoeDsaForCausalLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_planner.arch.config import REQUIRED, Config
from lora_planner.arch.parts import by_kind, dense_and_shared, layer_norm, rms, stack
from lora_planner.model import Attention, Block, Linear, Model, Weight


@dataclass(frozen=True, slots=True)
class Family:
    """Class defaults: what a missing key means."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    v: int
    expert_inner: int
    experts: int
    shared: int
    used: Any
    first_dense: int
    typed: bool = False  # mlp_layer_types says which layers are dense
    score_bias: bool = True  # each router has a correction bias, a buffer
    indexer_heads: int = 0


# fmt: off
FAMILIES = {
    "deepseek_v2":   Family(102400, 4096, 11008, 32, 32, 1536, 512, 128, 64, 128, 1407, 64, 2, REQUIRED, 0,
                            score_bias=False),
    "deepseek_v3":   Family(129280, 7168, 18432, 61, 128, 1536, 512, 128, 64, 128, 2048, 256, 1, 8, 3),
    "deepseek_v32":  Family(129280, 7168, 18432, 61, 128, 1536, 512, 128, 64, 128, 2048, 256, 1, 8, 3,
                            typed=True, indexer_heads=64),
    "glm_moe_dsa":   Family(154880, 6144, 12288, 78, 64, 2048, 512, 192, 64, 256, 2048, 256, 1, 8, 3,
                            typed=True, indexer_heads=32),
    "glm4_moe_lite": Family(154880, 2048, 10240, 47, 20, 768, 512, 192, 64, 256, 1536, 64, 1, 4, 1,
                            typed=True),
}
# fmt: on
FAMILIES["kimi_k2"] = FAMILIES["deepseek_v3"]  # its config.json names DeepseekV3ForCausalLM


def latent_attention(
    c: Config, f: Family, hidden: int, indexer: bool
) -> tuple[tuple[Linear, ...], tuple[Weight, ...], Attention]:
    """q: hidden -> rank -> heads x (nope + rope); k and v: hidden -> rank (+ rope) -> heads x (nope + v)."""
    n = c.size("num_attention_heads", f.heads, high=4096)
    q_rank = c.size("q_lora_rank", f.q_rank) if f.indexer_heads else c.optional_size("q_lora_rank", f.q_rank)
    kv_rank = c.size("kv_lora_rank", f.kv_rank)
    nope = c.size("qk_nope_head_dim", f.nope)
    rope = c.size("qk_rope_head_dim", f.rope)
    v_dim = c.size("v_head_dim", f.v)
    bias = c.flag("attention_bias", False)
    p = "self_attn."
    kv_a, kv_b = p + "kv_a_proj_with_mqa", p + "kv_b_proj"
    weights = [rms(p + "kv_a_layernorm", kv_rank)]
    if q_rank is None:
        q = p + "q_proj"
        rows = [Linear(q, hidden, n * (nope + rope), group="attn")]
    else:
        q = p + "q_b_proj"
        weights.append(rms(p + "q_a_layernorm", q_rank))
        rows = [
            Linear(p + "q_a_proj", hidden, q_rank, group="attn", bias=bias),
            Linear(q, q_rank, n * (nope + rope), group="attn", reads=(p + "q_a_proj",)),
        ]
    rows += [
        Linear(kv_a, hidden, kv_rank + rope, group="attn", bias=bias),
        Linear(kv_b, kv_rank, n * (nope + v_dim), group="attn", reads=(kv_a,)),
    ]
    if indexer and q_rank is not None:
        i = p + "indexer."
        count, width = c.size("index_n_heads", f.indexer_heads), c.size("index_head_dim", 128)
        rows += [
            Linear(i + "wq_b", q_rank, count * width, group="attn", reads=(p + "q_a_proj",)),
            Linear(i + "wk", hidden, width, group="attn"),
            Linear(i + "weights_proj", hidden, count, group="attn"),
        ]
        weights.append(layer_norm(i + "k_norm", width))
    rows.append(Linear(p + "o_proj", n * v_dim, hidden, group="attn", bias=bias, reads=(q, kv_a, kv_b)))
    # values narrower than queries: sdpa has no fused kernel
    mixer = Attention(n, n, nope + rope, v_dim, (q,), (kv_a, kv_b), (kv_b,), None, math_only=True)
    return tuple(rows), tuple(weights), mixer


def _sparse(c: Config, f: Family, layers: int) -> list[bool]:
    """Which layers route."""
    given = c.items("mlp_layer_types") if f.typed else None
    if given is not None:
        if len(given) != layers or any(kind not in ("dense", "sparse") for kind in given):
            raise c.reject("mlp_layer_types", f"{layers} entries, each 'dense' or 'sparse'")
        return [kind == "sparse" for kind in given]
    key_read = c.text("model_type", "") != "glm4_moe_lite"  # that class always starts with one dense layer
    first = c.size("first_k_dense_replace", f.first_dense, low=0) if key_read else f.first_dense
    return [i >= first for i in range(layers)]


def _indexed(c: Config, f: Family, layers: int) -> list[bool]:
    """Which layers have an indexer of their own; GLM-5's others can reuse the one before."""
    if c.text("model_type", "") != "glm_moe_dsa":
        return [f.indexer_heads > 0] * layers
    kinds = c.items("indexer_types")
    pattern = c.values.get("index_topk_pattern")
    if kinds is None and isinstance(pattern, str | list):
        kinds = [{"F": "full", "S": "shared"}.get(k, "") for k in pattern] if isinstance(pattern, str) else pattern
    if kinds is None:
        period, skip = c.size("index_topk_freq", 1), c.size("index_skip_topk_offset", 2, low=0)
        return [max(i - skip + 1, 0) % period == 0 for i in range(layers)]
    if len(kinds) != layers or any(kind not in ("full", "shared") for kind in kinds):
        raise c.reject("indexer_types", f"{layers} entries, each 'full' or 'shared'")
    return [kind == "full" for kind in kinds]


def build(c: Config) -> Model:
    f = FAMILIES[c.text("model_type", "deepseek_v3")]
    hidden = c.size("hidden_size", f.hidden)
    layers = c.size("num_hidden_layers", f.layers, high=4096)
    dense, sparse, experts, used = dense_and_shared(
        c,
        hidden,
        inner=f.inner,
        expert_inner=f.expert_inner,
        experts=f.experts,
        used=f.used,
        shared=f.shared,
        bias=c.text("model_type", "") == "deepseek_v2" and c.flag("mlp_bias", False),
    )
    norms = (rms("input_layernorm", hidden), rms("post_attention_layernorm", hidden))

    def layer(key: tuple[bool, bool]) -> Block:
        routes, indexer = key
        attention, weights, mixer = latent_attention(c, f, hidden, indexer)
        if routes:
            return Block("moe", 0, attention + sparse, norms + weights, mixer, experts=experts, top_k=used)
        return Block("dense", 0, attention + dense, norms + weights, mixer)

    routing = _sparse(c, f, layers)
    blocks, order = by_kind(list(zip(routing, _indexed(c, f, layers), strict=True)), layer)
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", f.vocab),
        final=[rms("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_experts="qwen2_moe",
        buffers=experts * sum(routing) if f.score_bias else 0,  # e_score_correction_bias
    )
