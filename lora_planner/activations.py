"""What autograd keeps of one layer between its forward and its backward pass.

Letters: H hidden_size, N heads, K kv heads, D head_dim, F intermediate_size, E experts, k active,
r rank, S sequence length. Everything is bytes per token, with two exceptions: `pair` is multiplied
with S once more (eager scores, a padding mask), `fixed` does not depend on tokens.

A layer keeps what its operations need for their gradients:

| operation          | keeps                                                                        |
|--------------------|------------------------------------------------------------------------------|
| RMS norm           | x in fp32, 1 / rms; with a trained gain also the normalised x                |
| LayerNorm          | x, mean and 1 / std                                                          |
| frozen matrix      | nothing (old bitsandbytes in 4 bit: its input)                               |
| trained matrix     | its input, once for all matrices that read the same tensor                   |
| LoRA matrix        | A's input and B's input; peft casts x once per matrix if A is not in x's dtype|
| fused attention    | q, k, v, the output, log-sum-exp                                             |
| eager attention    | q, k, v with k and v repeated to N heads, softmax in fp32 and once more in bf16 |
| gated MLP          | gate, up, act(gate); the product is the input of down                        |
| experts            | the same for k rows a token, the sorted input, the output that is weighted   |

Source: torch.autograd.graph.saved_tensors_hooks on transformers 5.23 and peft 0.21.2 models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from lora_planner.method import Method
from lora_planner.method.adapter import Adapter
from lora_planner.method.targets import adapter_table
from lora_planner.model import PARAMETER, Attention, Block, Linear, Model, Scan, Weight

FP32, BF16, INT64 = 4, 2, 8


@dataclass(frozen=True, slots=True)
class Habit:
    """How a family's code in transformers differs from Llama's, where that costs memory.

    `gain_fp32`: the norm multiplies its gain before it casts back, so a trained gain keeps fp32.
    `act`: tensors of width F kept besides the inputs of the activation and of its product.
    `score`: bytes per head and pair of tokens that eager attention keeps. `row`: bytes per head besides.
    `router_fp32`: the router multiplies fp32 copies of its input and of its weights.
    """

    gain_fp32: bool = False
    act: int = -1  # -1: one where gated, none where not
    score: int = FP32 + BF16
    row: int = 0
    router_fp32: bool = False


# Read off saved tensors of small models (see the Source above).
HABITS = {
    "gemma": Habit(gain_fp32=True),
    "gemma2": Habit(gain_fp32=True, score=8),  # tanh of the capped scores
    "gemma3": Habit(gain_fp32=True),
    "gemma3_text": Habit(gain_fp32=True),
    "olmo2": Habit(gain_fp32=True),
    "olmo3": Habit(gain_fp32=True),
    "qwen3_next": Habit(gain_fp32=True),
    "qwen3_5_text": Habit(gain_fp32=True),
    "qwen3_5_moe_text": Habit(gain_fp32=True),
    "gpt_oss": Habit(gain_fp32=True, act=4, score=BF16, row=INT64),  # clamped gate; softmax with sinks in bf16
    "deepseek_v2": Habit(router_fp32=True),
    "deepseek_v3": Habit(router_fp32=True),
    "glm4_moe": Habit(router_fp32=True),
    "gpt2": Habit(act=3),  # gelu_new is written out in elementary operations
    "gptj": Habit(act=3),
    "gpt_neo": Habit(act=3),
}
LLAMA = Habit()


@dataclass(frozen=True, slots=True)
class Setup:
    """How the layers run. `autocast`: matrices cast their fp32 inputs and weights to bf16.

    `width`: bytes of an activation; 4 where norms are fp32 and nothing casts back (QLoRA as peft prepares it).
    `fp32`: weights are too, so that tensors are shared which 16 bit would copy. Measured on a CPU.
    `repeats`: k and v are repeated for grouped queries, as transformers does whenever there is a mask.
    `frozen_inputs`: 4-bit matrices keep their input although they are frozen, as bitsandbytes did before 0.44.
    """

    attention: str = "sdpa"
    autocast: bool = False
    padded: bool = False
    width: int = BF16
    fp32: bool = False
    repeats: bool = True
    frozen_inputs: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes kept: `token` per token, `pair` per token and token of its sequence, `fixed` per layer."""

    name: str
    token: float
    pair: float = 0.0
    fixed: float = 0.0

    def times(self, n: float) -> Kept:
        return Kept(self.name, self.token * n, self.pair * n, self.fixed * n)


@dataclass(frozen=True, slots=True)
class Trained:
    """What has gradients: everything, or the adapters by the name of their matrix."""

    full: bool
    adapters: Mapping[str, Adapter]
    adapter_bytes: int
    freeze_a: bool = False  # LoRA-FA
    dora: bool = False

    @classmethod
    def of(cls, model: Model, method: Method) -> Trained:
        wrapped = {a.linear.name: a for a in adapter_table(model, method).adapters}
        size = FP32 if method.adapter_dtype == "float32" else BF16
        return cls(method.is_full, wrapped, size, method.name == "lora-fa", method.name == "dora")


@lru_cache(maxsize=4096)
def layers(model: Model, method: Method, setup: Setup) -> tuple[tuple[Kept, ...], tuple[Kept, ...]]:
    """What all layers keep, and what the largest single layer keeps while it is undone."""
    trained = Trained.of(model, method)
    per_block = [block_kept(b, model.model_type, trained, setup) for b in model.blocks]
    totals: dict[str, Kept] = {}
    for block, kept in zip(model.blocks, per_block, strict=True):
        for k in kept:
            add(totals, k.times(block.count))
    if not trained.full:
        first = _first_norm(model)
        if first is not None:  # nothing before it is trained, so its input needs no gradient
            kept_first = norm(first, HABITS.get(model.model_type, LLAMA), False, setup)
            add(totals, kept_first.times(-1))
        for k in _before_first_adapter(model, trained, setup, first):
            add(totals, k.times(-1))
    largest = max(per_block, key=lambda kept: sum(k.token + k.pair * 4096 for k in kept))
    return tuple(totals.values()), largest


def in_flight(model: Model, method: Method, setup: Setup) -> tuple[Kept, Kept]:
    """Gradients that are alive while a layer is undone: in its MLP, and in its attention.

        MLP: F width (gate, up, product) + 4 F where down's A is fp32 + 2 H width
        eager attention: (4 + 4) N S      gradients of the softmax and of the scores, a third in fp32

    In fp32 one F less where the product is kept for a trained down, which is undone and gone before gate
    and up are; and one H less: the gradient of the residual is that of the MLP's output.

    When attention is undone what the MLP kept is gone. Assumed: read off the operations' order.
    """
    trained = Trained.of(model, method)
    wide = pair = 0.0
    for block in model.blocks:
        for row in block.linears:
            if row.group in ("mlp_dense", "shared", "experts") and row.reads[0] != "in":
                cast = FP32 if row.name in trained.adapters and casts(trained, setup) else 0
                gradients = 2 if setup.fp32 and (trained.full or row.name in trained.adapters) else 3
                wide = max(wide, (gradients * setup.width + cast) * row.d_in * max(row.used, row.computed))
        if isinstance(block.mixer, Attention) and setup.attention == "eager":
            pair = max(pair, (2 if setup.width == BF16 else 3) * FP32 * block.mixer.heads)
    residual = (1 if setup.fp32 else 2) * setup.width * model.hidden_size
    return Kept("mlp", wide + residual), Kept("attention", residual, pair)


def add(totals: dict[str, Kept], k: Kept) -> None:
    old = totals.get(k.name)
    totals[k.name] = Kept(k.name, old.token + k.token, old.pair + k.pair, old.fixed + k.fixed) if old else k


def _first_norm(model: Model) -> Weight | None:
    """The norm before the first layer's first matrix; None in models that normalise outputs only."""
    block = model.blocks[model.order[0]]
    names = ("input_layernorm", "ln_1", "norm", "self_attn_layer_norm", "ln_attn")
    return next((w for w in block.weights if w.width and w.name.rsplit(".", 1)[-1] in names), None)


def _before_first_adapter(model: Model, trained: Trained, setup: Setup, first: Weight | None) -> Iterator[Kept]:
    """What the first layer does not keep where only its MLP has adapters: attention and norms come before any
    gradient (`first` is counted already), as in `flops` the layer's attention has no backward."""
    block = model.blocks[model.order[0]]
    mixing = [row for row in block.linears if row.group == "attn"]
    if not isinstance(block.mixer, Attention) or any(row.name in trained.adapters for row in mixing):
        return
    if not any(row.name in trained.adapters for row in block.linears):
        return
    habit = HABITS.get(model.model_type, LLAMA)
    yield attention(block.mixer, block.linears, habit, setup)
    for weight in block.weights:
        after = any(word in weight.name for word in ("post_feedforward", "post_mlp"))
        if weight.width and weight is not first and not after:
            yield norm(weight, habit, False, setup)


def block_kept(block: Block, family: str, trained: Trained, setup: Setup) -> tuple[Kept, ...]:
    """Everything that one layer of this kind keeps."""
    habit = HABITS.get(family, LLAMA)
    kept: dict[str, Kept] = {}
    shared = (
        0  # layer norms keep their input itself: those of a layer with MLP and attention side by side read the same
    )
    side_by_side = any(row.group == "mlp_dense" and row.reads == ("in",) for row in block.linears)
    for weight in block.weights:
        if weight.width:
            k = norm(weight, habit, trained.full, setup)
            if side_by_side and weight.kind == "layer" and weight.width == block.linears[0].d_in:
                k = replace(k, token=k.token - shared)
                shared = setup.width * weight.width
            add(kept, k)
    if isinstance(block.mixer, Attention):
        add(kept, attention(block.mixer, block.linears, habit, setup))
    elif isinstance(block.mixer, Scan):
        add(kept, scan(block.mixer))
    for k in mlp(block, habit, setup.width):
        add(kept, k)
    if habit.router_fp32:
        for row in block.linears:
            if row.group == "router":
                copy = FP32 * row.d_in if trained.full else 0
                add(kept, Kept("routing", copy, 0.0, FP32 * row.d_in * row.d_out))
    add(kept, inputs(block, trained, setup))
    for row in block.linears:
        if row.name in trained.adapters:
            for k in adapter(row, trained.adapters[row.name], block.count, trained, setup):
                add(kept, k)
    return tuple(kept.values())


def norm(weight: Weight, habit: Habit, full: bool, setup: Setup) -> Kept:
    """RMS: x in fp32 and a scale per normalised row; LayerNorm: x, mean and 1 / std.

        rms:   w (4 + [trained: 2, or 4 where the gain is applied in fp32]) + 4 rows
        layer: 2 w + 8

    `rows` is more than one where each head is normalised on its own.

    >>> norm(Weight("input_layernorm", 4096, width=4096, kind="rms"), LLAMA, False, Setup()).token
    16388
    """
    if weight.kind == "layer":
        return Kept("norms", setup.width * weight.width + 2 * FP32)
    rows = max(1, weight.width // weight.params) if weight.params else 1
    gain = (FP32 if habit.gain_fp32 or setup.autocast or setup.fp32 else BF16) if full else 0
    return Kept("norms", (FP32 + gain) * weight.width + FP32 * rows)


def attention(mixer: Attention, linears: Iterable[Linear], habit: Habit, setup: Setup) -> Kept:
    """q, k, v, and the output with its log-sum-exp, or all scores when eager.

        flash: 2 (N D + K D + K Dv + N Dv) + 4 N
        sdpa:  the same with k and v repeated to N heads, as transformers does whenever there is a mask,
               and 2 S for the mask in bf16 where the batch is padded
        eager: 2 (2 N D + N Dv) + (4 + 2) N S

    A matrix that yields more than v stays whole as long as v is a view of its output; repeating a
    single head is a view too.
    """
    one_head = mixer.kv_heads == 1 and mixer.q != mixer.v
    grouped = setup.attention == "flash" or (setup.attention == "sdpa" and not setup.repeats)
    kv = mixer.kv_heads if grouped or one_head else mixer.heads
    v = kv * mixer.v_head_dim
    if kv == mixer.kv_heads:
        v = max([v, *(row.d_out for row in linears if row.name == mixer.v[-1])])
    tokens = setup.width * (mixer.heads * mixer.qk_head_dim + kv * mixer.qk_head_dim + v)
    if setup.attention == "eager":
        pair = (habit.score if setup.width == BF16 else FP32) * mixer.heads
        return Kept("attention", tokens + habit.row * mixer.heads, pair)
    out = setup.width * mixer.heads * mixer.v_head_dim + FP32 * mixer.heads
    mask = setup.width if setup.padded and setup.attention == "sdpa" else 0
    return Kept("attention", tokens + out, mask)


def scan(mixer: Scan) -> Kept:
    """A state-space layer on its fused kernel: convolution in and out, gate, gated norm, a state per chunk.

        2 (2 conv_channels + 2 heads head_dim) + 4 heads head_dim + 4 heads head_dim state / chunk

    Assumed: no published measurement; the elementwise fallback without the kernel keeps several times this.
    """
    values = mixer.heads * mixer.head_dim
    state = FP32 * values * mixer.state / max(1, mixer.chunk)
    return Kept("scan", BF16 * (2 * mixer.conv_channels + 2 * values) + FP32 * values + state)


def mlp(block: Block, habit: Habit, width: int = BF16) -> Iterator[Kept]:
    """Dense and shared: the activation's input, its output where it is multiplied with `up`, and `up`.

        gated: 2 F * 3,   not gated: 2 F     (the product is counted as the input of down)

    Experts: the same k times, 2 k H for the output that the routing weights multiply, and the routing:

        4 E + k (8 * 4 + 2)        softmax in fp32, indices in int64
    """
    by_name = {row.name: row for row in block.linears}
    for row in block.linears:
        if row.group not in ("mlp_dense", "shared", "experts") or row.reads[0] not in by_name:
            continue
        feeders = [by_name[name] for name in row.reads if name in by_name and by_name[name].group == row.group]
        if not feeders:
            continue
        gated = len(feeders) > 1 or feeders[0].parts > 1
        copies = max(row.used, row.computed)
        extra = habit.act if habit.act >= 0 else int(gated)
        wide = width * row.d_in * copies * ((2 if gated else 1) + extra)
        if row.group == "experts":
            yield Kept("experts", wide + width * row.d_out * copies)
            yield Kept("routing", FP32 * block.experts + copies * (4 * INT64 + BF16))
        else:
            yield Kept("mlp", wide)


def inputs(block: Block, trained: Trained, setup: Setup) -> Kept:
    """Inputs of trained matrices in the dtype they are multiplied in, each distinct tensor once.

        2 d_in for every distinct input that a trained W, an A in bf16, or a W with `frozen_inputs` reads

    Under autocast the output of a norm with fp32 weights is cast anew for every matrix. The input of
    the output projection is what fused attention already keeps.
    """
    shared: dict[tuple[tuple[str, ...], int, bool], float] = {}
    copies = 0.0
    for row in block.linears:
        pair = trained.adapters.get(row.name)
        experts = row.group == "experts"
        rows = max(row.used, row.computed) if experts else 1
        if setup.frozen_inputs and not trained.full and row.kind != PARAMETER:
            if not _from_fused_attention(row, block, setup):
                shared[row.reads, row.d_in, experts] = setup.width * row.d_in * rows
            continue
        if trained.full:
            own = setup.autocast and row.reads[0] == "in" and not experts
        elif pair is None:
            continue
        elif pair.fused:  # W + B A has a gradient, so it keeps its input in the base's dtype
            own = False
        else:
            if trained.freeze_a or casts(trained, setup):
                continue  # see adapter()
            own = False
        if own:
            copies += BF16 * row.d_in
        elif not _from_fused_attention(row, block, setup):
            shared[row.reads, row.d_in, experts] = setup.width * row.d_in * rows
    return Kept("inputs", copies + sum(shared.values()))


def adapter(row: Linear, pair: Adapter, depth: int, trained: Trained, setup: Setup) -> Iterator[Kept]:
    """What peft's wrapper keeps besides a shared input: its own copy of x where it casts, and A x.

        fp32 A on a bf16 stream: 4 d_in + 4 r;    bf16 A: 2 r;    under autocast: 2 d_in + 2 r

    DoRA adds (4 + 2) d_out for the two outputs that the magnitude scales.
    `fused` (target_parameters): W + B A of all experts in bf16, whatever the tokens.

    >>> q = Linear("q_proj", 4096, 4096, group="attn")
    >>> [k] = adapter(q, Adapter.of(q, 16), 1, Trained(False, {}, FP32), Setup())
    >>> k.token
    16448
    """
    if pair.fused:
        yield Kept("adapted experts", 0.0, 0.0, BF16 * row.d_in * row.d_out * row.count)
        return
    rows = max(row.used, row.computed) * pair.parts
    size = BF16 if setup.autocast else trained.adapter_bytes
    copy = size * row.d_in if casts(trained, setup) and not trained.freeze_a else 0
    token = rows * (copy + size * pair.rank)
    if trained.dora:
        yield Kept("dora", rows * (FP32 + BF16) * row.d_out)
    yield Kept("adapter inputs", token)


def casts(trained: Trained, setup: Setup) -> bool:
    """Whether every wrapped matrix makes its own copy of x, because A or autocast wants another dtype."""
    return setup.autocast or trained.adapter_bytes != setup.width


def _from_fused_attention(row: Linear, block: Block, setup: Setup) -> bool:
    """Whether this is the output projection, whose input is the output that fused attention keeps."""
    mixer = block.mixer
    return (
        isinstance(mixer, Attention)
        and setup.attention != "eager"
        and row.name not in mixer.v
        and bool(set(row.reads) & set(mixer.v))
        and row.d_in == mixer.heads * mixer.v_head_dim
    )


def head(model: Model, method: Method, setup: Setup) -> float:
    """Per token: the final norm, the head's input where something trains it, rope's cos and sin, the labels.

    The log-softmax is a term of its own in memory.py.
    """
    trained = Trained.of(model, method)
    habit = HABITS.get(model.model_type, LLAMA)
    last = next((w for w in model.weights if w.width), None)
    kept = norm(last, habit, trained.full, setup).token if last else 0.0
    wrapped = model.head.name in trained.adapters
    if trained.full or wrapped:
        kept += (FP32 if setup.fp32 or (wrapped and trained.adapter_bytes == FP32) else BF16) * model.head.d_in
    dims = [b.mixer.qk_head_dim for b in model.blocks if isinstance(b.mixer, Attention)]
    return kept + (2 * (FP32 if setup.fp32 else BF16) * max(dims) if dims else 0) + INT64
