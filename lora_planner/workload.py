"""What one optimizer step asks of a GPU: from the FLOP table to the terms of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from lora_planner.flops import split
from lora_planner.method import Method
from lora_planner.method.targets import adapter_table, top_k
from lora_planner.model import LINEAR, Attention, Linear, Model
from lora_planner.params import BYTES, trainable_params
from lora_planner.throughput import BACKWARD, FORWARD, Work, adamw_bytes, elementwise_bytes, kernel_count

#: bytes of a weight as the matmul reads it, and of an activation
ELEMENT_BYTES = {"fp32": 4, "tf32": 4}
#: passes over the elements that recomputing adds, by bytes of an element: on a CPU the forward pass takes 42 to 44 % of
#: a step (fp32, torch 2.13), so element-wise work is half forward; elsewhere a pass is a pass
RECOMPUTED = {4: 1.5}
#: kernels that expand a GPTQ matrix over those of an nf4 one: shifts and masks of its packed integers, one by one
GPTQ_LAUNCHES = 1
#: kernels and hooks that ZeRO-3 starts, over those of the model alone: it fetches and frees each module's weights
ZERO3_LAUNCHES = 3.8
MLP = ("mlp_dense", "shared", "experts", "latent")


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths that element-wise kernels see, summed over the layers where `total_*`."""

    attention: float  # mean query width a layer
    heads: int  # all layers' heads
    kv: float
    inner: float  # mean width between the MLP's matrices, experts that a token passes
    adapted_in: int
    adapted_out: int
    adapted: int  # wrapped modules
    matrix_params: int
    quantised_params: int
    quantised: int  # 4-bit modules
    experts: int = 1
    top_k: int = 0  # experts that a token passes
    expert_share: float = 0.0  # of a token's multiplications in matrices


@lru_cache(maxsize=4096)
def shape(model: Model, method: Method) -> Shape:
    """Means over layers, so that hybrids and experts fit the formulas of throughput.py."""
    layers = max(model.layers, 1)
    mixers = [(b.mixer, b.count) for b in model.blocks if isinstance(b.mixer, Attention)]
    experts = max((b.experts for b in model.blocks), default=0) or 1
    rows = [*model.linears, model.head]
    adapters = adapter_table(model, method).adapters
    linears = [row for row in model.linears if row.kind == LINEAR and _is_4bit(method)]

    def modules(row_count: int, group: str) -> int:
        return row_count // experts if group == "experts" else row_count

    return Shape(
        attention=sum(m.heads * m.qk_head_dim * n for m, n in mixers) / layers,
        heads=sum(m.heads * n for m, n in mixers),
        kv=sum(m.kv_heads * m.qk_head_dim * n for m, n in mixers) / layers,
        inner=sum(r.d_in * r.used for r in rows if r.group in MLP and r.reads and _reads_mlp(r.reads)) / layers,
        adapted_in=sum(a.linear.d_in * a.a_used for a in adapters),
        adapted_out=sum(a.linear.d_out * a.b_used for a in adapters),
        adapted=sum(modules(a.linear.count, a.linear.group) for a in adapters),
        matrix_params=sum(r.d_in * r.d_out * r.count for r in rows),
        quantised_params=sum(r.d_in * r.d_out * r.count for r in linears),
        quantised=sum(r.count for r in linears),
        experts=experts,
        top_k=top_k(model),
        expert_share=_expert_share(rows),
    )


def _expert_share(rows: Sequence[Linear]) -> float:
    """Of what a token multiplies, the part in experts."""
    products = [(r.d_in * r.d_out * (r.computed or r.used), r.group == "experts") for r in rows]
    return sum(n for n, expert in products if expert) / max(1, sum(n for n, _ in products))


def _is_4bit(method: Method) -> bool:
    return method.base_dtype.startswith("nf4") or method.base_dtype in ("gptq", "int4")


def _reads_mlp(reads: tuple[str, ...]) -> bool:
    """The second matrix of an MLP reads the first one, never the layer's input."""
    return "in" not in reads


def work(
    model: Model,
    method: Method,
    *,
    micro_batch: int,
    seq_len: int,
    accumulation: int = 1,
    checkpointing: str = "none",
    attention: str = "sdpa",
    dtype: str = "bf16",
) -> Work:
    """One optimizer step of `accumulation` micro-batches, each padded to `seq_len`.

    dtype: of the matmuls. "fp32": weights and activations are four bytes wide and nothing is cast.

    Source: flops.split for the products, throughput.py for traffic and launches.
    """
    parts = split(model, method, seq_len, attention, checkpointing, micro_batch)
    widths = shape(model, method)
    tokens = micro_batch * seq_len * accumulation
    passes = FORWARD + BACKWARD + (FORWARD if checkpointing == "full" else 0)
    trained = trainable_params(model, method)
    # a frozen matrix is read forward, for its input's gradient and when recomputed
    reads = passes if method.is_full else passes - 1
    if attention == "eager":
        scores = parts.scores_forward + parts.scores_backward
    else:  # a fused kernel skips what the mask hides
        scores = parts.scores_visible_forward + parts.scores_visible_backward
    element = ELEMENT_BYTES.get(dtype, 2)
    trained_bytes = 4 if method.is_full else BYTES[method.adapter_dtype]
    return Work(
        tokens=tokens,
        linear_flops=(parts.matrices_forward + parts.matrices_backward) * tokens,
        adapter_flops=(parts.adapters_forward + parts.adapters_backward + parts.scans_forward + parts.scans_backward)
        * tokens,
        attention_flops=scores * tokens,
        activation_bytes=elementwise_bytes(
            tokens=tokens,
            layers=model.layers,
            hidden=model.hidden_size,
            attention=int(widths.attention),
            kv=int(widths.kv),
            intermediate=int(widths.inner),
            vocab=model.vocab_size,
            adapted_in=widths.adapted_in,
            adapted_out=widths.adapted_out,
            eager_scores=widths.heads * seq_len if attention == "eager" else 0,
            residual_bytes=4 if _is_4bit(method) else element,
            passes=FORWARD + BACKWARD + (RECOMPUTED.get(element, FORWARD) if checkpointing == "full" else 0),
            element_bytes=element,
        ),
        weight_bytes_read=float(element) * widths.matrix_params * reads * accumulation,
        optimizer_bytes=adamw_bytes(trained, trained_bytes, 4),
        dequantised_params=widths.quantised_params * (passes - 1) * accumulation,
        kernels=kernel_count(
            layers=model.layers,
            adapted=widths.adapted,
            quantised=widths.quantised * (GPTQ_LAUNCHES if method.base_dtype == "gptq" else 1),
            passes=passes,
            micro_batches=accumulation,
        ),
        dtype=dtype,
        grouped_flops=(parts.matrices_forward + parts.matrices_backward) * tokens * widths.expert_share,
        dequantised_as="gptq" if method.base_dtype == "gptq" else "nf4",
    )


@dataclass(frozen=True, slots=True)
class Division:
    """Over how many GPUs one copy of the model is divided, and how.

    gpus        all of them; the copies beside each other are gpus / (tensor * pipeline * context)
    weights     GPUs that hold a shard of the weights each (FSDP, ZeRO-3); 1: each has them all
    states      GPUs that share out the optimizer's states
    tensor, pipeline, context, expert      GPUs that share out matrices, layers, the sequence, experts
    nodes       machines
    offload     weights wait in the host's memory and are fetched for every pass
    """

    gpus: int = 1
    weights: int = 1
    states: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    nodes: int = 1
    offload: bool = False


def divided(
    copy: Work, model: Model, method: Method, by: Division, *, micro_batches: int, checkpointing: str = "none",
    stored_bytes: float | None = None, gradient_bytes: float = 4.0,
) -> Work:  # fmt: skip
    """What one of several GPUs does of a copy's step: `copy` is the work of one replica's micro-batches.

        FSDP       gathers the weights in each pass, scatters gradients: (w - 1) / w of
                   (passes over weights) * stored + gradient_bytes * trained      [bytes a micro-batch]
        tensor     4 sums over all of a layer's hidden states a token (6 with recomputing), each moving
                   2 (t - 1) / t * 2 H                                     [bytes a token]
        experts    a token's states go to top_k experts and back, forward and backward
        context    keys and values travel round the ring: 3 passes of 2 K   [bytes a token and layer]
        pipeline   its ends wait: bubble = (p - 1) / micro-batches

    Adapters' gradients are summed once a step: 2 (n - 1) / n of 4 bytes each.
    Source: Rajbhandari et al. 2020 (ZeRO), Shoeybi et al. 2019 and Korthikanti et al. 2022 (Megatron),
    Huang et al. 2019 (GPipe: bubble).
    """
    share = by.tensor * by.pipeline * by.context
    trained = trainable_params(model, method)
    widths = shape(model, method)
    again = checkpointing == "full"
    stored = stored_bytes if stored_bytes is not None else 2.0 * model.total
    ours = stored / (by.tensor * by.pipeline)
    gathers = 2 * micro_batches
    gathered = host = 0.0
    if by.weights > 1:
        gathered += (by.weights - 1) / by.weights * gathers * ours
    replicas = max(by.weights, by.gpus // share)
    if replicas > 1:
        summed = trained / (by.tensor * by.pipeline) * gradient_bytes
        gathered += 2 * (replicas - 1) / replicas * summed * (0.5 * micro_batches if by.weights > 1 else 1)
    if by.offload:
        host = gathers * ours / by.weights
    tokens = copy.tokens / by.context
    exchanged = 0.0
    layers = model.layers / by.pipeline
    if by.tensor > 1:
        exchanged += tokens * layers * (6 if again else 4) * 2 * (by.tensor - 1) / by.tensor * 2 * model.hidden_size
    if by.expert > 1 and widths.experts > 1:
        travelled = 2 * 2 * model.hidden_size * (3 if again else 2) * (by.expert - 1) / by.expert
        exchanged += tokens * layers * widths.top_k * travelled
    if by.context > 1:
        exchanged += tokens * layers * 3 * 2 * 2 * widths.kv * (by.context - 1)
    return replace(
        copy,
        tokens=copy.tokens / share,
        linear_flops=copy.linear_flops / share,
        grouped_flops=copy.grouped_flops / share,
        adapter_flops=copy.adapter_flops / share,
        attention_flops=copy.attention_flops / share,
        activation_bytes=copy.activation_bytes / share,
        weight_bytes_read=copy.weight_bytes_read / (by.tensor * by.pipeline),
        optimizer_bytes=copy.optimizer_bytes / max(by.weights, by.states * by.tensor * by.pipeline),
        dequantised_params=copy.dequantised_params / (by.tensor * by.pipeline),
        kernels=copy.kernels / by.pipeline,
        gathered_bytes=gathered,
        exchanged_bytes=exchanged,
        host_bytes=host,
        bubble=(by.pipeline - 1) / micro_batches,
        nodes=by.nodes,
    )
