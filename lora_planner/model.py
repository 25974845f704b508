"""A transformer as a table of weights.

A model is a few kinds of layer (`Block`), each so many times; a block is rows of `Linear`
(matrices a token is multiplied with), rows of `Weight` (everything else) and a mixer
(attention or state-space scan). GQA, `heads * head_dim != hidden_size`, tied heads, experts
and low-rank attention become rows, not branches.

Groups, as the parameter tables of the field split them: embed, lm_head, norm, attn, ssm,
mlp_dense, shared, experts, latent, router, vision, other.

`reads` says whose output a matrix is multiplied with: "in" (what enters the layer), or names of
matrices in the same block. It is what decides, in the first layer, which gradients nobody needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

GROUPS = (
    "embed", "lm_head", "norm", "attn", "ssm", "mlp_dense", "shared", "experts", "latent",
    "router", "vision", "other",
)  # fmt: skip

LINEAR, CONV1D, PARAMETER = "linear", "conv1d", "parameter"


@dataclass(frozen=True, slots=True)
class Linear:
    """y = W x with W [d_out, d_in]; `count` copies are stored, a token passes `used` of them.

    In a `Block` the counts are per layer, in `Model.linears` for the whole model.
    `parts` says how many matrices of the paper are stored as one (gate and up: 2; a fused q, k, v: 3).
    `kind`: how transformers stores it: an nn.Linear, a GPT-2 Conv1D, or a bare (often 3-D) Parameter,
    which peft's `target_modules` cannot reach.
    `computed`: copies multiplied per token by transformers where it is more than `used`
    (Llama-4 runs every expert on every token); 0 means as `used`.
    """

    name: str
    d_in: int
    d_out: int
    count: int = 1
    used: int = 1
    group: str = "mlp_dense"
    bias: bool = False
    kind: str = LINEAR
    reads: tuple[str, ...] = ("in",)
    parts: int = 1
    computed: int = 0

    @property
    def params_each(self) -> int:
        return self.d_in * self.d_out + (self.d_out if self.bias else 0)

    @property
    def params(self) -> int:
        return self.params_each * self.count

    @property
    def active_params(self) -> int:
        return self.params_each * self.used

    def times(self, n: int) -> Linear:
        """The same matrix in `n` layers."""
        return replace(self, count=self.count * n, used=self.used * n, computed=self.computed * n)


@dataclass(frozen=True, slots=True)
class Weight:
    """Parameters that are no matrix of a token: norms, embeddings, convolutions, scan constants.

    `width`: elements per token that a norm reads (0 for what is no norm); `kind`: "rms", "layer" or "".
    """

    name: str
    params: int
    group: str = "norm"
    width: int = 0
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention: scores over all pairs of tokens.

    `q`, `k`, `v` name the matrices whose outputs feed the three inputs of the scores.
    `window`: tokens a query can see, None for all. `qk_head_dim != v_head_dim` in MLA.
    `math_only`: transformers has no fused kernel for it (v and qk widths differ, sinks, dropout).
    """

    heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    q: tuple[str, ...]
    k: tuple[str, ...]
    v: tuple[str, ...]
    window: int | None = None
    math_only: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """A linear recurrence over the sequence: "mamba2" or "gated_delta".

    heads x head_dim values with a state of `state` each; keys and queries come in `groups` heads.
    `conv_channels` pass a causal depthwise convolution of width `conv_kernel` first.
    """

    kind: str
    heads: int
    head_dim: int
    state: int
    groups: int
    conv_kernel: int
    conv_channels: int
    chunk: int
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """One kind of layer, `count` times. `linears` in the order in which they run.

    `activation_gated`: the MLP multiplies act(gate) with up; `top_k` and `experts` describe routing.
    """

    kind: str
    count: int
    linears: tuple[Linear, ...]
    weights: tuple[Weight, ...] = ()
    mixer: Attention | Scan | None = None
    activation_gated: bool = True
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True, eq=False)  # identity: hashing the whole table would dominate a plan
class Model:
    """What the planner knows of a model. Lengths in features, counts in copies."""

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    blocks: tuple[Block, ...]
    embed: Weight
    head: Linear  # the unembedding; stored only when not tied
    tied: bool
    order: tuple[int, ...]  # which block each layer is, first to last
    weights: tuple[Weight, ...] = ()  # final norm, positions, projections of other towers ...
    extra_linears: tuple[Linear, ...] = ()  # text matrices outside the layers (OPT's project_in)
    tower: tuple[Linear, ...] = ()  # vision tower and projector, whole model
    tower_weights: tuple[Weight, ...] = ()
    max_positions: int = 0
    dtype: str = "bfloat16"
    peft_experts: str = ""  # peft maps old expert names onto the fused tensors: "mixtral" or "qwen2_moe" scheme
    peft_refuses: tuple[str, ...] = ()  # module names peft will not wrap in this model_type
    peft_default: tuple[str, ...] = ()  # what peft adapts when asked for nothing
    module_prefix: str = "model.layers"
    buffers: int = 0  # persistent buffers: in the file, not in the count of parameters
    stored_params: int = 0  # parameters to load, counted in the weight files; 0: none were read
    notes: tuple[str, ...] = ()
    source: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.order)

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The language model's matrices without the unembedding, counts for the whole model."""
        rows = [row.times(block.count) for block in self.blocks for row in block.linears]
        return tuple(rows) + self.extra_linears

    @cached_property
    def groups(self) -> dict[str, int]:
        """Parameters by group, every group present; their sum is `total`."""
        sums = dict.fromkeys(GROUPS, 0)
        sums["embed"] += self.embed.params
        if not self.tied:
            sums["lm_head"] += self.head.params
        for row in self.linears:
            sums[row.group] += row.params
        for weight in self._text_weights():
            sums[weight.group] += weight.params
        for tower_row in self.tower:
            sums["vision"] += tower_row.params
        for weight in self.tower_weights:
            sums["vision"] += weight.params
        return sums

    @cached_property
    def total(self) -> int:
        """Parameters stored, a tied unembedding once.

        Source: equals `sum(p.numel() for p in model.parameters())` of transformers.
        """
        return sum(self.groups.values())

    @cached_property
    def active(self) -> int:
        """Parameters one text token passes: all but idle experts and other towers."""
        idle = sum(row.params - row.active_params for row in self.linears)
        return self.total - idle - self.groups["vision"]

    @cached_property
    def matmul_active(self) -> int:
        """Matrix elements one token is multiplied with, unembedding included, biases not."""
        rows = sum(row.d_in * row.d_out * row.used for row in self.linears)
        return rows + self.head.d_in * self.head.d_out

    def _text_weights(self) -> Iterator[Weight]:
        yield from self.weights
        for block in self.blocks:
            for weight in block.weights:
                yield replace(weight, params=weight.params * block.count)
