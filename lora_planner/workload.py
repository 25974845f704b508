"""What one optimizer step asks of a GPU: from the FLOP table to the terms of the roofline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lora_planner.flops import split
from lora_planner.method import Method
from lora_planner.method.targets import adapter_table
from lora_planner.model import LINEAR, Attention, Model
from lora_planner.params import BYTES, trainable_params
from lora_planner.throughput import BACKWARD, FORWARD, Work, adamw_bytes, elementwise_bytes, kernel_count

#: bytes of a weight as the matmul reads it, and of an activation
ELEMENT_BYTES = {"fp32": 4, "tf32": 4}
#: passes over the elements that recomputing adds, by bytes of an element: on a CPU the forward pass takes 42 to 44 % of
#: a step (fp32, torch 2.13), so element-wise work is half forward; elsewhere a pass is a pass
RECOMPUTED = {4: 1.5}
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


@lru_cache(maxsize=4096)
def shape(model: Model, method: Method) -> Shape:
    """Means over layers, so that hybrids and experts fit the formulas of throughput.py."""
    layers = max(model.layers, 1)
    mixers = [(b.mixer, b.count) for b in model.blocks if isinstance(b.mixer, Attention)]
    experts = max((b.experts for b in model.blocks), default=0) or 1
    rows = [*model.linears, model.head]
    adapters = adapter_table(model, method).adapters
    linears = [row for row in model.linears if row.kind == LINEAR and method.base_dtype == "nf4"]

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
    )


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
            residual_bytes=4 if method.base_dtype == "nf4" else element,
            passes=FORWARD + BACKWARD + (RECOMPUTED.get(element, FORWARD) if checkpointing == "full" else 0),
            element_bytes=element,
        ),
        weight_bytes_read=float(element) * widths.matrix_params * reads * accumulation,
        optimizer_bytes=adamw_bytes(trained, trained_bytes, 4),
        dequantised_params=widths.quantised_params * (passes - 1) * accumulation,
        kernels=kernel_count(
            layers=model.layers,
            adapted=widths.adapted,
            quantised=widths.quantised,
            passes=passes,
            micro_batches=accumulation,
        ),
        dtype=dtype,
    )
