"""Nemotron-H, Nemotron 2 and 3: every layer is one of Mamba-2 (M), attention (*), MLP (-), experts (E).

MLP and experts are relu(x)^2 between two matrices, no gate. With `moe_latent_size` (Super, Ultra)
the experts live in a narrower space, one projection leads there and one back.

Source: transformers 5.23 NemotronHForCausalLM, which never ties the unembedding.
"""

from __future__ import annotations

from lora_planner.arch import mamba
from lora_planner.arch.config import Config
from lora_planner.arch.parts import (
    OLD_LAYER_TYPES,
    by_kind,
    fused_experts,
    head_dim,
    heads,
    plain_mlp,
    rms,
    router,
    split_attention,
    stack,
    top_k,
)
from lora_planner.model import Block, Linear, Model

PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def _kinds(c: Config) -> list[str]:
    """`layers_block_type` if given, else `hybrid_override_pattern`; their length is the depth."""
    for key in ("layers_block_type", "layer_types"):
        given = c.items(key)
        if given is not None:
            kinds = [OLD_LAYER_TYPES.get(kind, kind) if isinstance(kind, str) else "" for kind in given]
            if not kinds or not set(kinds) <= set(PATTERN.values()):
                raise c.reject(key, f"kinds out of {', '.join(PATTERN.values())}")
            return kinds
    if not c.has("hybrid_override_pattern"):
        return ["linear_attention", "moe", "full_attention", "mlp"]
    pattern = c.text("hybrid_override_pattern", "")
    if not pattern or set(pattern) - set(PATTERN):
        raise c.reject("hybrid_override_pattern", f"letters out of {' '.join(PATTERN)}")
    return [PATTERN[letter] for letter in pattern]


def _mamba(c: Config, hidden: int) -> Block:
    n, dim = c.size("mamba_num_heads", 128), c.size("mamba_head_dim", 64)
    bias = c.flag("use_bias", False)
    shape = mamba.Shape(
        n * dim, n, dim, c.size("ssm_state_size", 128),
        c.size("mamba_n_groups", c.size("n_groups", 8)),
        c.size("mamba_d_conv", c.size("conv_kernel", 4)),
        c.size("mamba_chunk_size", c.size("chunk_size", 128)),
        bias, bias, c.flag("mamba_conv_bias", c.flag("use_conv_bias", True)),
    )  # fmt: skip
    if n % shape.groups:
        raise c.reject("n_groups", f"a divisor of mamba_num_heads = {n}")
    rows, weights, scan = mamba.mixer(hidden, shape, "mixer.")
    return Block("mamba", 0, rows, (rms("norm", hidden), *weights), scan)


def _attention(c: Config, hidden: int) -> Block:
    n, kv = heads(c, 32, 8)
    rows, attention = split_attention(hidden, n, kv, head_dim(c, hidden, n, 128), prefix="mixer.")
    return Block("attention", 0, rows, (rms("norm", hidden),), attention)


def _mlp(c: Config, hidden: int) -> Block:
    inner, bias = c.size("intermediate_size", 21504), c.flag("mlp_bias", False)
    rows = plain_mlp(hidden, inner, ("mixer.up_proj", "mixer.down_proj"), bias=bias, reads=("in",))
    return Block("mlp", 0, rows, (rms("norm", hidden),), activation_gated=False)


def _moe(c: Config, hidden: int) -> Block:
    count = c.size("n_routed_experts", 8, "num_local_experts")
    active = top_k(c, "num_experts_per_tok", 2, count)
    latent = c.optional_size("moe_latent_size")
    bias = c.flag("mlp_bias", False)
    down, up = "mixer.fc1_latent_proj", "mixer.fc2_latent_proj"
    experts = fused_experts(
        latent or hidden, c.size("moe_intermediate_size", 7688), count, active,
        prefix="mixer.experts.", gated=False, reads=(down,) if latent else ("in",),
    )  # fmt: skip
    if latent:
        experts = (
            Linear(down, hidden, latent, group="latent", bias=bias),
            *experts,
            Linear(up, latent, hidden, group="latent", bias=bias, reads=("mixer.experts.down_proj",)),
        )
    shared = plain_mlp(
        hidden, c.size("moe_shared_expert_intermediate_size", 7688),
        ("mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj"),
        group="shared", bias=bias, reads=("in",),
    )  # fmt: skip
    gate = router(hidden, count, name="mixer.gate", reads=("in",))
    return Block(
        "moe", 0, (gate, *experts, *shared), (rms("norm", hidden),), None, False, count, active
    )  # fmt: skip


MAKE = {"linear_attention": _mamba, "full_attention": _attention, "mlp": _mlp, "moe": _moe}


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    kinds = _kinds(c)
    blocks, order = by_kind(kinds, lambda kind: MAKE[kind](c, hidden))
    return stack(
        c,
        blocks,
        order,
        hidden=hidden,
        vocab=c.size("vocab_size", 131072),
        final=[rms("norm_f", hidden)],
        tied=False,
        embed="embeddings",
        peft_refuses=mamba.REFUSED,
        peft_default=("q_proj", "k_proj", "v_proj", "o_proj"),
        # e_score_correction_bias of every router
        buffers=sum(blocks[i].experts for i in order),
    )
