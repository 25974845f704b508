"""How much GPU memory a training step needs, phase by phase.

A phase is a ledger of what is alive at its worst moment; the peak is the largest phase:

    load        weights, adapters
    forward     + optimizer states, kept activations, the logits while the loss is computed
    backward    either at the loss: everything kept and the gradients of the logits,
                or at the last layer to be undone: that layer, and all gradients
    optimizer   weights, adapters, gradients, states, and a temporary

The longest sample of a batch decides: `seq_len` is the padded length of the longest batch.

Letters: T = micro_batch * seq_len tokens, V vocabulary, H hidden_size, P trainable parameters.

What a trainer does differently is an option: how its loss treats the logits (LOGITS), whether weights and states are
split over GPUs (Split), what else is trained, what else its layers keep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, erf, hypot, log, sqrt
from pathlib import Path
from typing import TypedDict

from lora_planner import activations
from lora_planner.activations import BF16, FP32, Setup
from lora_planner.errors import BadInput, UnknownName, nearest
from lora_planner.facts import measured, remembered
from lora_planner.ledger import ASSUMED, DERIVED, EXACT, Estimate, Ledger, Term
from lora_planner.method import Method
from lora_planner.method.targets import adapter_table, experts
from lora_planner.model import PARAMETER, Attention, Model, Scan
from lora_planner.params import BYTES, stored_params, trainable_params

CHECKPOINTING = ("none", "full", "selective")
ATTENTION = ("eager", "sdpa", "flash")
FULL_PRECISION = ("mixed", "bf16", "fp32", "master")
#: a plan that is called fitting: the 95 % end of its interval is inside the memory
MIN_P_FIT = 0.95


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Per trainable parameter: states in its own dtype (m and v: 2), and `fixed` bytes of other states.

    `temporary`: parameter-sized temporaries while it steps. `largest`: temporaries of the size of the
    largest trained tensor, where one tensor is updated after the other.
    """

    per_dtype_byte: float
    fixed: float
    temporary: float
    largest: float = 0


@dataclass(frozen=True, slots=True)
class Logits:
    """Bytes per logit, T V of them, of a loss that is computed over all logits of a batch.

    forward     the most that is alive while the loss is computed
    kept        until the backward pass undoes the loss: the log-softmax, and what the loop holds anyway
    gradients   beside it, while the loss is undone
    output      held by a loop that keeps the model's output (`keep_logits`)
    """

    forward: int
    kept: int
    gradients: int
    output: int


#: "full": bf16 logits, their fp32 copy, the fp32 log-softmax; two fp32 gradients. Source: transformers from 4.45 on.
#: "shifted": the fp32 copy is the model's output and is copied once more to shift it. Source: transformers to 4.44.
#: "half": as "shifted", but nothing is made fp32 and the output is held. Source: DeepSpeed's engine has no autocast.
#: "rows": a list of fp32 logits, 128 rows each, that the loop holds, and their log-softmax, whose gradients take its
#: place row by row. Source: litgpt's chunked_cross_entropy; Fabric makes a model's output fp32.
#: "slices": bf16 logits in 8 slices that the loop holds, and their fp32 log-softmax; gradients of a slice at a time.
#: Source: torchtune's CEWithChunkedOutputLoss.
LOGITS = {
    "full": Logits(2 + 2 * FP32, FP32, 2 * FP32, BF16),
    "shifted": Logits(2 + 3 * FP32, FP32, 2 * FP32, FP32),
    "half": Logits(3 * BF16, BF16, 2 * BF16, BF16),
    "rows": Logits(2 * FP32, 2 * FP32, 0, 0),
    "slices": Logits(BF16 + FP32, BF16 + FP32, 1, 0),
}
LOSS = (*LOGITS, "chunked")


@dataclass(frozen=True, slots=True)
class Split:
    """Over how many GPUs a copy of the model is split; all numbers are for one of them.

    weights     FSDP, ZeRO-3: every GPU holds its share of the base, and gathers what it computes with
    states      gradients and optimizer states: as `weights`, or alone in ZeRO-2 and Megatron's distributed optimizer
    unsynced    micro-batches accumulate whole gradients, which are scattered once a step (FSDP's no_sync)
    offload     shares of weights, gradients and states wait in host memory
    buckets     bytes in which gradients are collected before they are reduced
    frozen      frozen weights have gradients too: FSDP 1 where a unit mixes them with trained ones
    """

    weights: int = 1
    states: int = 1
    unsynced: bool = False
    frozen: bool = False
    offload: bool = False
    buckets: float = 0.0


ALONE = Split()
#: layers that FSDP has gathered at once: the one that computes and the next
GATHERED = 2
INT32 = 4
#: parameters that DeepSpeed's ZeRO-3 updates at once
SUB_GROUP = 1e9

# fmt: off
OPTIMIZERS = {
    "adamw":         Optimizer(2, 0, 1),  # torch's default on a GPU is foreach
    "adamw-foreach": Optimizer(2, 0, 1),  # _foreach_sqrt(v) is a copy of all of v
    "adamw-loop":    Optimizer(2, 0, 0, 2),  # torch's default on a CPU: sqrt(v), and its quotient
    "adamw-fused":   Optimizer(2, 0, 0),
    "adamw-8bit":    Optimizer(0, 2 * (1 + 4 / 256), 0),  # blocks of 256 with an fp32 scale each
    "adamw-4bit":    Optimizer(0, 2 * (1 / 2 + 4 / 128), 0),  # torchao: blocks of 128
}
#: bits per parameter of a quantised base: 4-bit codes, and a constant per block of 64; with double
#: quantisation 8 bits each and an fp32 constant per 256 of them, else fp32 each. GPTQ: 4-bit codes, and an fp16 scale
#: and a 4-bit zero per group of 128. LLM.int8: a scale per row, not worth counting
QUANTISED_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "nf4-single": 4 + 32 / 64, "gptq": 4 + (16 + 4) / 128,
                  "int8": 8.0}
# fmt: on


class Options(TypedDict, total=False):
    """The keywords of `memory` that say how a step runs."""

    checkpointing: str
    attention: str
    optimizer: str
    loss: str
    full_precision: str
    autocast: bool
    padded: bool | None
    keep_logits: bool
    accumulate: bool
    upcast: bool
    frozen_inputs: bool
    quantised_experts: bool
    in_backward: bool
    offload_activations: bool
    split: Split
    also_trained: float
    also_kept: tuple[activations.Kept, ...]
    known: Mapping[str, Constant] | None


@dataclass(frozen=True, slots=True)
class Constant:
    """A fitted or assumed number with its 90 % interval: a row of data/memory_constants.json."""

    name: str
    value: float
    low: float
    high: float
    basis: str
    n: int
    source: str


@remembered
def constants(gpu: str = "", stack: str = "") -> dict[str, Constant]:
    """The packaged rows, overridden by the user's own of this GPU and stack."""
    rows = json.loads((Path(__file__).parent / "data" / "memory_constants.json").read_text())["constants"]
    found = {row["name"]: Constant(**row) for row in rows}
    for own in measured().memory:
        if (own.gpu, own.stack) == (gpu, stack):
            found[own.name] = Constant(own.name, own.value, own.low, own.high, own.basis, own.n, own.source)
    return found


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Every phase, the peak with its 90 % interval, and the largest term of the peak.

    `allocated`: the peak without CUDA context and allocator, as torch.cuda.max_memory_allocated counts.
    `moving`: the part of it that comes and goes within a step. `p_fit`: only where a capacity was given.
    """

    phases: dict[str, Ledger]
    peak_phase: str
    peak: Estimate
    dominating: Term
    allocated: float
    moving: float = 0.0
    p_fit: float | None = None
    warnings: tuple[str, ...] = ()


def bytes_per_param(dtype: str) -> float:
    """
    >>> bytes_per_param("bfloat16"), round(bytes_per_param("nf4"), 4)
    (2, 0.5159)
    """
    if dtype in QUANTISED_BITS:
        return QUANTISED_BITS[dtype] / 8
    if dtype not in BYTES:
        known = (*BYTES, *QUANTISED_BITS)
        raise UnknownName(f"dtype {dtype!r} is not known", "base dtype", f"Known: {', '.join(known)}.")
    return BYTES[dtype]


@lru_cache(maxsize=4096)
def weights(model: Model, dtype: str, upcast: bool = False, experts_too: bool = False) -> tuple[float, int]:
    """Bytes of the frozen base, and parameters that a quantised base leaves as they are.

        P * bytes(dtype);   4 and 8 bit: only nn.Linear and Conv1D rows inside the layers, all else in bf16

    bitsandbytes replaces modules, so embeddings, lm_head, norms, routers that are bare parameters and
    transformers 5's fused (3-D) experts stay as they are; `experts_too` where they are modules, as before
    transformers 5, or a trainer quantises them itself. `upcast`: peft's prepare_model_for_kbit_training
    makes all that is unquantised fp32.
    """
    if dtype not in QUANTISED_BITS:
        return model.total * bytes_per_param(dtype), model.total
    rows = (*model.linears, *model.tower)
    quantised = sum(
        row.d_in * row.d_out * row.count
        for row in rows
        if row.kind != PARAMETER or (experts_too and row.group == "experts")
    )
    rest = model.total - quantised
    return quantised * bytes_per_param(dtype) + rest * (FP32 if upcast else BF16), rest


def checkpoint_store(model: Model, tokens: float, stream: int) -> float:
    """What full checkpointing keeps: the input of every layer.

    layers * T * H * bytes
    """
    return model.layers * tokens * model.hidden_size * stream


def log_softmax(vocab: int, tokens: float) -> float:
    """Cross entropy keeps the log-softmax of all logits in fp32:  4 T V"""
    return FP32 * tokens * vocab


def logit_gradients(vocab: int, tokens: float) -> float:
    """Two fp32 gradients are alive when the log-softmax is undone: the loss's and the logits'.  8 T V"""
    return 2 * FP32 * tokens * vocab


def chunked_logits(model: Model, tokens: float) -> float:
    """A fused linear cross entropy computes logits and their gradient for a chunk at a time.

        chunk = T / ceil(V / H) rounded up to a power of two;   8 V chunk + 2 T H

    The chunk's logits with their fp32 copy and gradient (8 V is assumed, kernels differ), and the gradient
    of the hidden states. Source: chunk size as in Liger-Kernel's fused linear cross entropy.
    """
    share = max(1, ceil(tokens / ceil(model.vocab_size / model.hidden_size)))
    chunk = min(tokens, 1 << (share - 1).bit_length())
    return 8 * model.vocab_size * chunk + BF16 * tokens * model.hidden_size


@lru_cache(maxsize=4096)
def dequantised(model: Model, dtype: str) -> int:
    """The largest matrix in bf16: a 4-bit matrix is unpacked whole before it is multiplied.

    GPTQ's fallback kernel is plain torch: autograd keeps the unpacked matrices of the layer that is undone, and
    unpacking goes through 32-bit integers.
    """
    if dtype not in QUANTISED_BITS:
        return 0
    rows = [row for row in (*model.linears, *model.tower) if row.kind != PARAMETER]
    largest = max((row.d_in * row.d_out for row in rows), default=0)
    if dtype == "gptq":
        layers = [
            sum(BF16 * r.d_in * r.d_out * r.count for r in b.linears if r.kind != PARAMETER) for b in model.blocks
        ]
        return max(layers, default=0) + INT32 * largest
    return BF16 * largest


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything that does not depend on batch and length: bytes, and the coefficients of tokens.

    `outside`: bytes of the base that are outside of the layers, in the width that computes. `largest`: bytes of the
    largest trained tensor.
    """

    base: float
    outside: float
    largest: float
    adapters: float
    grads: float
    states: float
    temporary: float
    cast: float
    dequantised: int
    stream: int
    kept: tuple[activations.Kept, ...]
    layer: tuple[activations.Kept, ...]
    flight: tuple[activations.Kept, activations.Kept]
    head: float
    late: float  # bytes of gradients that come after the last layer's activations are gone
    summed: float  # bytes of temporaries while the two gradients of a tied embedding are added
    scans: bool
    warnings: tuple[str, ...]


@lru_cache(maxsize=4096)
def shape(
    model: Model,
    method: Method,
    setup: Setup,
    optimizer: str,
    full_precision: str,
    upcast: bool,
    experts_too: bool = False,
) -> Shape:
    opt = OPTIMIZERS[optimizer]
    trainable = trainable_params(model, method)
    warnings: list[str] = []
    if method.is_full:
        width = BF16 if full_precision in ("bf16", "master") else FP32
        base, adapters = float(width * (model.total - model.groups["vision"])), 0.0
        base += BF16 * model.groups["vision"]  # a tower that text never passes is left frozen
        trainable -= model.groups["vision"]
        if model.groups["vision"]:
            warnings.append("the vision tower is counted as frozen weights: text passes no gradient through it")
        matrices = sum(row.params for row in model.linears) + model.head.params
        cast = BF16 * matrices if setup.autocast and full_precision == "mixed" else 0.0
        stream = BF16 if full_precision in ("bf16", "master") else FP32
        last = model.blocks[model.order[0]]
        late = float(width) * (sum(row.params for row in last.linears) + (0 if model.tied else model.embed.params))
        summed = 2.0 * width * model.embed.params if model.tied else 0.0
        rows = [row for block in model.blocks for row in block.linears]
        sizes = [row.d_in * row.d_out * (row.count if row.kind == PARAMETER else 1) for row in rows]
        largest = max(model.embed.params, model.head.d_in * model.head.d_out, *sizes)
    else:
        late = summed = 0.0
        width = BYTES[method.adapter_dtype]
        base, rest = weights(model, method.base_dtype, upcast, experts_too)
        adapters = float(stored_params(model, method) * width)
        cast = BF16 * adapters / width if setup.autocast and width == FP32 else 0.0
        stream = FP32 if upcast or setup.fp32 else BF16
        largest = max((a.rank * max(a.linear.d_in, a.linear.d_out) for a in adapter_table(model, method).adapters),
                      default=0)  # fmt: skip
        if method.base_dtype in QUANTISED_BITS:
            warnings += _quantisation_warnings(model, rest, upcast, experts_too)
        if any(a.fused for a in adapter_table(model, method).adapters):
            warnings.append("peft adapts fused experts by building W + B A of all experts in every layer")
    kept, layer = activations.layers(model, method, setup)
    scans = any(isinstance(b.mixer, Scan) for b in model.blocks)
    if scans:
        warnings.append("state-space layers: no published memory measurement, the interval is wide")
    elif experts(model):
        warnings.append("no measured peak of a mixture of experts is used: the interval is that of dense models")
    states = trainable * (opt.per_dtype_byte * width + opt.fixed)
    temporary = (trainable * opt.temporary + largest * opt.largest) * width
    if full_precision == "master" and method.is_full:
        states = trainable * (FP32 + opt.per_dtype_byte * FP32 + opt.fixed)
        temporary = 2.0 * FP32 * trainable  # fp32 gradients, and one copy; of a part of SUB_GROUP at a time
    return Shape(
        base=base,
        largest=float(largest * width),
        outside=float(BF16 * (model.embed.params + (0 if model.tied else model.head.params))),
        adapters=adapters,
        grads=float(trainable * width),
        states=states,
        temporary=temporary,
        cast=cast,
        dequantised=dequantised(model, method.base_dtype) if not method.is_full else 0,
        stream=stream,
        kept=kept,
        layer=layer,
        flight=activations.in_flight(model, method, setup),
        head=activations.head(model, method, setup),
        late=late,
        summed=summed,
        scans=scans,
        warnings=tuple(warnings),
    )


def _quantisation_warnings(model: Model, rest: int, upcast: bool, experts_too: bool) -> list[str]:
    found = []
    bare = sum(row.params for row in model.linears if row.kind == PARAMETER and row.group == "experts")
    if bare and not experts_too:
        found.append(f"4-bit loading skips the fused experts: {bare / model.total:.0%} of the parameters stay in bf16")
    if not upcast:
        found.append(
            f"peft's prepare_model_for_kbit_training would make {rest:,} unquantised parameters fp32: "
            f"{rest * BF16:,} bytes more"
        )
    return found


def memory(
    model: Model,
    method: Method,
    *,
    micro_batch: int,
    seq_len: int,
    checkpointing: str = "none",
    attention: str = "sdpa",
    optimizer: str = "adamw",
    loss: str = "full",
    full_precision: str = "mixed",
    autocast: bool = False,
    padded: bool | None = None,
    keep_logits: bool = False,
    accumulate: bool = False,
    upcast: bool = False,
    frozen_inputs: bool = False,
    quantised_experts: bool = False,
    in_backward: bool = False,
    offload_activations: bool = False,
    split: Split = ALONE,
    also_trained: float = 0,
    also_kept: tuple[activations.Kept, ...] = (),
    gpu_memory_bytes: float | None = None,
    known: Mapping[str, Constant] | None = None,
) -> MemoryPlan:
    """Peak memory of one training step on one GPU, by phase and term.

    full_precision: "mixed" is fp32 weights under bf16 autocast, 16 bytes a parameter with its gradient and
    AdamW's states; "bf16" is a model loaded and trained in bf16, 8 bytes a parameter; "master" keeps weights and
    gradients in bf16 and fp32 copies among the states, 16 bytes, as DeepSpeed does.
    autocast: matrices cast fp32 inputs to bf16, as Trainer(bf16=True) does with fp32 adapters.
    "fp32": nothing is cast, 16 bytes a parameter; LoRA is so on a float32 base without autocast.
    padded: the batch needs an attention mask; by default where it has more than one sample. False: there is
    surely none, so that k and v are not repeated for grouped queries either.
    keep_logits: the loop holds the model's output while it calls backward (`out.loss.backward()`).
    accumulate: gradients of an earlier micro-batch are alive. upcast, quantised_experts: see `weights`.
    checkpointing "selective": every second product and the attention's output are kept, all else is recomputed.
    Source: torchtitan's op-level policy.
    in_backward: each gradient is applied and freed as soon as it is there, so that only the largest tensor's is alive.
    offload_activations: what is kept of the layers waits in host memory.
    also_trained: parameters that are trained beside the adapters, in the base's dtype if they are a copy of one of its
    modules (peft's modules_to_save). also_kept: bytes that all layers of a trainer keep beside those of transformers'.
    known: fitted constants of one GPU and stack; by default those of `constants()`.
    """
    _check(micro_batch, seq_len, checkpointing, attention, optimizer, loss, full_precision)
    mixed = method.is_full and full_precision == "mixed"
    is_padded = micro_batch > 1 if padded is None else padded
    upcast = upcast and method.base_dtype in QUANTISED_BITS and not method.is_full
    fp32 = full_precision == "fp32" if method.is_full else method.base_dtype == "float32" and not autocast
    width = FP32 if fp32 or (upcast and not autocast) else BF16
    setup = Setup(attention, autocast or mixed, is_padded, width, fp32, padded is not False, frozen_inputs)
    s = shape(model, method, setup, optimizer, full_precision, upcast, quantised_experts)
    master = method.is_full and full_precision == "master"
    s = _with(s, also_trained, optimizer, split, BF16 * model.total if split.frozen else 0, master)
    if in_backward:
        share = s.largest / max(1.0, s.grads)
        s = replace(s, grads=min(s.grads, s.largest), temporary=min(1.0, share) * s.temporary, late=0.0)
    tokens = micro_batch * seq_len
    pairs = tokens * seq_len

    load = [Term("weights", s.base, EXACT, "memory.weights")]
    if s.adapters:
        load.append(Term("adapters", s.adapters, EXACT, "params.stored_params"))
    grads = Term("gradients", s.grads, DERIVED, "params.trainable_params")
    resting = [*load, Term("optimizer states", s.states, DERIVED, "memory.OPTIMIZERS")]
    stepping = [*resting, grads]
    if s.temporary:
        stepping.append(Term("optimizer temporary", s.temporary, DERIVED, "memory.OPTIMIZERS"))
    resting += _gathered(model, method, s, split)
    running = [*resting, grads] if accumulate else resting

    cast = [Term("autocast copies", s.cast, DERIVED, "activations.adapter")] if s.cast else []
    if checkpointing == "full":
        kept = [Term("checkpoints", checkpoint_store(model, tokens, s.stream), DERIVED, "memory.checkpoint_store")]
        if is_padded and attention == "sdpa":
            kept.append(Term("mask", float(pairs), DERIVED, "activations.attention"))
    elif checkpointing == "selective":
        kept = [Term("checkpoints", checkpoint_store(model, tokens, s.stream), DERIVED, "memory.checkpoint_store"),
                Term("selected", selected(model, setup) * tokens, DERIVED, "memory.selected")]  # fmt: skip
    else:
        kept = [
            Term(k.name, k.token * tokens + k.pair * pairs + k.fixed, DERIVED, f"activations.{WHY.get(k.name, k.name)}")
            for k in (*s.kept, *also_kept)
        ]
        kept += cast
    if offload_activations:
        kept = [replace(term, value=0.0) for term in kept]
    tail = Term("head", s.head * tokens, DERIVED, "activations.head")
    output = []
    if keep_logits and loss == "full":
        output = [Term("model output", float(width * tokens * model.vocab_size), DERIVED, "memory.memory")]
    elif keep_logits and loss in LOGITS:
        held = LOGITS[loss].output
        output = [Term("model output", float(held * tokens * model.vocab_size), DERIVED, "memory.LOGITS")]
    at_loss = [*running, *kept, tail, *output, *_loss(model, tokens, loss)]
    forward = [*running, *kept, tail, _forward_logits(model, tokens, loss, width)]
    if cast and checkpointing != "none":
        forward += cast  # autocast forgets them when it ends, unless the graph still needs them

    undone = _undone(s, tokens, pairs)
    first = [*running, *kept, *output, *undone[1:]]
    if checkpointing != "none":
        first = [*running, *_without_own_input(kept, model, setup), *output, *undone]
    last = [*running, *output, *undone]
    end = [*running, *output]
    if s.summed:
        end.append(Term("sum of tied gradients", s.summed, DERIVED, "memory.shape"))
    if not accumulate:
        last.append(replace(grads, value=grads.value - s.late))
        end.append(grads)
    backward = max((at_loss, first, last, end), key=_sum)
    phases = {"load": load, "forward": forward, "backward": backward, "optimizer": stepping}
    still = {"load": _sum(load), "optimizer": _sum(stepping[: len(load) + 2])}
    still |= dict.fromkeys(("forward", "backward"), _sum(running))
    return _plan(phases, s, still, gpu_memory_bytes, known or constants())


def _with(s: Shape, also_trained: float, optimizer: str, split: Split, frozen: float, master: bool) -> Shape:
    """The shape with what is trained beside, and a GPU's share of what is split."""
    opt = OPTIMIZERS[optimizer]
    extra = also_trained * BF16
    s = replace(
        s,
        adapters=s.adapters + extra,
        grads=s.grads + extra,
        states=s.states + extra * opt.per_dtype_byte + also_trained * opt.fixed,
        temporary=s.temporary + extra * opt.temporary,
    )
    if split == ALONE:
        return s
    if split.offload:
        return replace(s, base=0.0, adapters=0.0, grads=0.0, states=0.0, temporary=0.0, late=0.0, summed=0.0, cast=0.0)
    return replace(
        s,
        base=s.base / split.weights,
        adapters=s.adapters / split.weights,
        grads=max(s.grads, frozen) / (1 if split.unsynced else split.states),
        states=s.states / split.states,
        temporary=min(s.temporary / split.states, 2.0 * FP32 * SUB_GROUP) if master else s.temporary / split.states,
        late=s.late / (1 if split.unsynced else split.states),
        summed=s.summed / split.states,
        cast=0.0,  # what is gathered is bf16 already
    )


def _gathered(model: Model, method: Method, s: Shape, split: Split) -> list[Term]:
    """What FSDP and ZeRO-3 gather from all GPUs to compute with it, and the gradients before they are scattered.

        outside the layers + GATHERED layers, in bf16 or as they are stored;  full fine-tuning: as much of gradients

    Assumed: FSDP wraps each layer, and what is outside of layers (embedding, head) as one.
    """
    buckets = [Term("communication buckets", split.buckets, ASSUMED, "memory.Split")] if split.buckets else []
    if split.weights == 1:
        return buckets
    dtype = method.base_dtype if not method.is_full else "bfloat16"
    whole = weights(model, dtype)[0] - s.outside
    layers = GATHERED * max(whole, 0.0) / model.layers
    found = [
        Term("gathered weights", s.outside + layers, ASSUMED, "memory.memory", s.outside / 2, s.outside + 2 * layers)
    ]
    if method.is_full:
        scattered = s.outside + layers / GATHERED
        found.append(Term("gradients to scatter", scattered, ASSUMED, "memory.memory", scattered / 2, 2 * scattered))
    return found + buckets


def selected(model: Model, setup: Setup) -> float:
    """Bytes a token that the op-level policy keeps: the outputs of every second matrix of a layer, counted from the
    first, and what attention returns.

    >>> from lora_planner.arch import from_config
    >>> selected(from_config({"model_type": "llama"}), Setup("flash")) / 32 / 4096  # q, v, gate, down, attention
    13.375
    """
    total = 0.0
    for block in model.blocks:
        rows = [row.d_out * max(row.used, row.computed) for i, row in enumerate(block.linears) if i % 2 == 0]
        out = block.mixer.heads * block.mixer.v_head_dim if isinstance(block.mixer, Attention) else 0
        total += block.count * (setup.width if setup.fp32 else BF16) * (sum(rows) + out)
    return total


def _without_own_input(kept: list[Term], model: Model, setup: Setup) -> list[Term]:
    """Checkpoints beside a layer that is undone: in fp32 its own is the very input that its first norm keeps."""
    if not setup.fp32:
        return kept
    return [replace(kept[0], value=kept[0].value * (1 - 1 / model.layers)), *kept[1:]]


def _sum(terms: list[Term]) -> float:
    return sum([t.value for t in terms])


def _loss(model: Model, tokens: int, loss: str) -> list[Term]:
    """The head's part of the peak when the backward pass starts."""
    if loss == "chunked":
        return [_chunk(model, tokens)]
    if loss != "full":
        each, n = LOGITS[loss], tokens * model.vocab_size
        found = [Term("logits", float(each.kept * n), DERIVED, "memory.LOGITS")]
        if each.gradients:
            found.append(Term("logit gradients", float(each.gradients * n), DERIVED, "memory.LOGITS"))
        return found
    return [
        Term("logits", log_softmax(model.vocab_size, tokens), DERIVED, "memory.log_softmax"),
        Term("logit gradients", logit_gradients(model.vocab_size, tokens), DERIVED, "memory.logit_gradients"),
    ]


def _forward_logits(model: Model, tokens: int, loss: str, width: int) -> Term:
    """The head's output, its fp32 copy (the output itself if that is fp32) and the log-softmax."""
    if loss == "chunked":
        return _chunk(model, tokens)
    copies = LOGITS[loss].forward if loss != "full" else (width if width == BF16 else 0) + 2 * FP32
    return Term("logits", float(copies * tokens * model.vocab_size), DERIVED, "memory.log_softmax")


def _chunk(model: Model, tokens: int) -> Term:
    value = chunked_logits(model, tokens)
    return Term("logits", value, ASSUMED, "memory.chunked_logits", value / 4, value * 1.5)


def _undone(s: Shape, tokens: int, pairs: int) -> list[Term]:
    """What one layer kept, the gradients in flight while it is undone, and its unpacked matrix."""
    size = {k.name: k.token * tokens + k.pair * pairs + k.fixed for k in s.layer}
    mlp, attention = (k.token * tokens + k.pair * pairs for k in s.flight)
    kept = sum(size.values())
    without_mlp = kept - size.get("mlp", 0.0) - size.get("experts", 0.0)
    if kept + mlp < without_mlp + attention:
        kept, mlp = without_mlp, attention
    terms = [
        Term("one layer", kept, DERIVED, "activations.layers"),
        Term("gradients in flight", mlp, ASSUMED, "activations.in_flight", mlp / 2, mlp * 2),
    ]
    if s.dequantised:
        terms.append(Term("dequantised matrix", s.dequantised, DERIVED, "memory.dequantised"))
    return terms


#: which function of activations.py explains what is kept under this name
WHY = {
    "norms": "norm", "attention": "attention", "scan": "scan", "mlp": "mlp", "experts": "mlp",
    "routing": "mlp", "inputs": "inputs", "adapter inputs": "adapter", "dora": "adapter",
    "adapted experts": "adapter",
}  # fmt: skip


def _plan(
    phases: dict[str, list[Term]],
    s: Shape,
    still: Mapping[str, float],
    capacity: float | None,
    known: Mapping[str, Constant],
) -> MemoryPlan:
    """Add what the GPU takes besides tensors, and the interval that measurements leave.

    `still`: bytes that stay where they are from step to step, which no allocator fragments.
    """
    ledgers, allocated = {}, {}
    for name, terms in phases.items():
        allocated[name] = _sum(terms)
        beside = _beside(allocated[name], max(0.0, allocated[name] - still[name]), known)
        ledgers[name] = Ledger("memory", "B", terms + beside, f"one GPU, {name}")
    peak_phase = max(ledgers, key=lambda name: ledgers[name].total)
    peak = interval(ledgers[peak_phase].total, s.base, s.scans, known)
    return MemoryPlan(
        phases=ledgers,
        peak_phase=peak_phase,
        peak=peak,
        dominating=ledgers[peak_phase].largest(),
        allocated=allocated[peak_phase],
        moving=max(0.0, allocated[peak_phase] - still[peak_phase]),
        p_fit=None if capacity is None else p_fit(peak, capacity),
        warnings=s.warnings,
    )


def _beside(tensors: float, moving: float, known: Mapping[str, Constant]) -> list[Term]:
    """What the GPU takes besides tensors."""
    return [
        _fitted("allocator", known["allocator_fraction"], moving),
        _fitted("workspace", known["workspace_bytes"]),
        _fitted("unexplained", known["unexplained"], tensors),
        _fitted("CUDA context", known["cuda_context_bytes"]),
    ]


def with_the_rest(tensors: Ledger, known: Mapping[str, Constant]) -> MemoryPlan:
    """A plan of one phase, from the ledger of its tensors."""
    resting = sum(tensors[name] for name in ("weights", "gradients", "optimizer states"))
    moving = tensors.total - resting
    ledger = replace(tensors, terms=tensors.terms + _beside(tensors.total, moving, known))
    peak = interval(ledger.total, tensors["weights"], False, known)
    return MemoryPlan({"step": ledger}, "step", peak, ledger.largest(), tensors.total, moving)


def _fitted(name: str, c: Constant, of: float = 1.0) -> Term:
    return Term(name, c.value * of, c.basis, "memory.constants", c.low * of, c.high * of)


def interval(peak: float, base: float, scans: bool, known: Mapping[str, Constant]) -> Estimate:
    """The 90 % interval of a peak.

        low  = max(base, peak * peak_ratio.low)
        high = peak * peak_ratio.high

    peak_ratio: measured over predicted, on sources that no other constant was fitted on. Models with
    state-space layers add, in quadrature, `peak_ratio_hybrid` of all that is not the base's weights.
    """
    ratio = known["peak_ratio"]
    below, above, basis = peak * (1 - ratio.low), peak * (ratio.high - 1), ratio.basis
    if scans:
        hybrid = known["peak_ratio_hybrid"]
        below = hypot(below, (peak - base) * (1 - hybrid.low))
        above = hypot(above, (peak - base) * (hybrid.high - 1))
        basis = hybrid.basis
    return Estimate(max(base, peak - below), peak, peak + above, "B", basis, ratio.source)


def _check(
    micro_batch: int,
    seq_len: int,
    checkpointing: str,
    attention: str,
    optimizer: str,
    loss: str,
    precision: str,
) -> None:
    if micro_batch < 1 or seq_len < 1:
        raise BadInput(f"a batch of {micro_batch} x {seq_len} tokens", "micro_batch, seq_len", "Use 1 or more of each.")
    for value, known, where in (
        (checkpointing, CHECKPOINTING, "checkpointing"),
        (attention, ATTENTION, "attention"),
        (optimizer, OPTIMIZERS, "optimizer"),
        (loss, LOSS, "loss"),
        (precision, FULL_PRECISION, "full_precision"),
    ):
        if value not in known:
            close = nearest(value, known, 1)
            raise UnknownName(
                f"{where} {value!r} is not known", where,
                f"Known: {', '.join(known)}." + (f" Nearest: {close[0]}." if close else ""),
            )  # fmt: skip


def p_fit(peak: Estimate, capacity_bytes: float) -> float:
    """Probability that the peak stays within a capacity.

        Phi((ln capacity - m) / s),   m = (ln low + ln high) / 2,   s = (ln high - ln low) / (2 * 1.645)

    `low` and `high` are read as the 5 % and 95 % points of a normal distribution of ln(peak).

    >>> round(p_fit(Estimate(90, 100, 110, "B", "fitted"), 110), 2)
    0.95
    """
    if capacity_bytes <= 0:
        return 0.0
    spread = (log(peak.high) - log(peak.low)) / (2 * 1.6448536269514722)
    middle = (log(peak.high) + log(peak.low)) / 2
    if spread == 0:
        return float(peak.value <= capacity_bytes)
    return 0.5 * (1 + erf((log(capacity_bytes) - middle) / spread / sqrt(2)))
