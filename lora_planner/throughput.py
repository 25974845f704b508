"""How long one optimizer step takes on one GPU: a roofline with fitted efficiencies and a launch floor.

Legend: T tokens of the step, L layers, H hidden_size, F intermediate_size, V vocab_size, A attention
width (query heads * head_dim), K key/value width, passes = 1 forward + 2 backward + 1 if recomputed.

A GPU does its work in `sum of terms` seconds, but no faster than the host can start its kernels:

    work = matmul + adapters + attention + elementwise + dequantise
    step = (max(work, kernels * launch) + links) * (1 + bubble) + optimizer

A CPU starts its kernels itself, so there the two are added. Where several GPUs share a copy of the model, `links`
is what its link moves and no work hides, `bubble` the share of a pipeline that waits for its ends.

The efficiencies are rows of `data/constants.json`, fitted per software stack with the formulas of this
file for the traffic and the kernels: a change of these formulas asks for a new fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import CPU, Constant, Gpu, constants, measured, remembered
from lora_planner.ledger import DERIVED, FITTED, Ledger, Term

#: passes over the elements; recomputing adds another FORWARD
FORWARD, BACKWARD = 1, 2
#: a stack of rows that hold for every stack: what a card sustains, what its links move
ANY = "*"
#: matmuls in these leave attention and adapters in bf16
NARROW = ("fp8", "fp4")
#: dense fp4 FLOP/s over fp8; the cards that are not here have none
FP4_OVER_FP8 = {"b200-180gb": 2.0, "gb200-186gb": 2.0, "b300-270gb": 3.0, "gb300-278gb": 3.0,
                "mi350x-288gb": 2.0, "mi355x-288gb": 2.0}  # fmt: skip
#: a weight in nf4 is read as half a byte, written as bf16, and read again by the matmul
DEQUANTISE_BYTES = 4.5
DEFAULT_STACK = "hf-trl"
#: the runner's own loop: transformers and peft without a trainer around them
OWN_STACK = "lora-plan"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that element-wise kernels read and write, per feature: `norm`, `rotary`, `mlp` (of its inner
    width), `adapter_in`, `adapter_out`; per score of eager attention; per logit in the loss."""

    norm: int
    rotary: int
    mlp: int
    adapter_in: int
    adapter_out: int
    score: int
    logit: int


#: by bytes of an activation. In 16 bit, norms and the loss cast to fp32 and back, and so does an adapter's
#: input; in fp32 nothing is cast: a norm is two squares, a mean and two products (28), the loss a log-softmax
#: and its gradient (24). What A's skinny products read and write of x over three passes is 4 + 4 + 12 (7 a pass),
#: what B's, the scale and the sum do to the output 24 + 16 (13)
TRAFFIC = {2: Traffic(32, 20, 10, 14, 12, 16, 30), 4: Traffic(28, 40, 20, 7, 13, 24, 24)}


@dataclass(frozen=True, slots=True)
class Work:
    """What one optimizer step asks of one GPU, all micro-batches together.

    tokens              padded tokens that pass the model
    linear_flops        frozen and trained matrices with the unembedding: forward, backward, recomputed
    adapter_flops       the skinny matrices of LoRA, likewise
    attention_flops     scores, values and scans, as the kernel executes them: half of the S x S square
                        in a causal fused kernel, all of it in eager attention
    activation_bytes    what element-wise kernels read and write: `elementwise_bytes`
    weight_bytes_read   weights that the matmuls read, once a pass and micro-batch
    optimizer_bytes     parameters, gradients and states that the optimizer touches: `adamw_bytes`
    dequantised_params  4-bit weights expanded, once a pass and micro-batch
    kernels             launches: `kernel_count`
    dtype               of the matmuls
    attention_dtype     of scores and adapters where it is not that of the matmuls
    gathered_bytes      weights and gradients that a GPU exchanges with those that hold the other shards
    exchanged_bytes     activations that it exchanges with those that compute other parts of the same tokens
    host_bytes          weights fetched from the host's memory, where they are offloaded
    grouped_flops       part of linear_flops in the experts of a mixture, many small products in one kernel
    bubble              share of the work that a pipeline's stage waits at its ends
    nodes               machines; between two of them the links are slower
    dequantised_as      kind of quantisation, "nf4" or "gptq"
    """

    tokens: float
    linear_flops: float
    adapter_flops: float
    attention_flops: float
    activation_bytes: float
    weight_bytes_read: float
    optimizer_bytes: float
    dequantised_params: float
    kernels: float
    dtype: str = "bf16"
    attention_dtype: str = ""
    gathered_bytes: float = 0.0
    exchanged_bytes: float = 0.0
    host_bytes: float = 0.0
    grouped_flops: float = 0.0
    bubble: float = 0.0
    nodes: int = 1
    dequantised_as: str = "nf4"


@dataclass(frozen=True, slots=True)
class Stack:
    """A software stack on one GPU: its constants by name."""

    name: str
    gpu: str
    rows: dict[str, Constant]

    def __getitem__(self, name: str) -> float:
        return self.rows[name].value


@remembered
def stacks() -> tuple[str, ...]:
    """The stacks that have rows."""
    return tuple(dict.fromkeys(row.stack for row in constants() if row.name == "matmul_efficiency"))


def default_stack(gpu: Gpu) -> str:
    """Our own loop where it was measured on this very GPU, else what most people run. A processor has our own loop's
    wide interval until it is measured: all published timings are of GPUs.

    >>> default_stack(Gpu("none", (), 1, 1.0, {}, "cpu", "", None))
    'lora-plan'
    """
    own = any(row.stack == OWN_STACK and row.gpu == gpu.name for row in measured().constants)
    return OWN_STACK if own or gpu.form == CPU else DEFAULT_STACK


def stack(name: str, gpu: Gpu) -> Stack:
    """The constants of a stack: those fitted on this GPU, else the pooled ones ("*") at what this GPU sustains.

        efficiency = pooled * sustained(GPU), at most 1      (matmul, attention, narrow formats, links)

    `sustained`, `link_bytes_per_s` and the like belong to the GPU, whatever runs on it: rows of the stack "*".
    A stack nobody measured is an error: between two stacks on one box lies a factor of four (MLPerf
    Llama-2-70B LoRA on 8 H100: 116 and 28 minutes).
    """
    if name not in stacks():
        fix = f"Known: {', '.join(stacks())}. Or measure a step and add its rows."
        raise UnknownName(f"no timings of the stack {name!r}", "data/constants.json", fix, known=stacks())
    found: dict[str, Constant] = {}
    for of, on in ((ANY, ANY), (ANY, gpu.name), (name, ANY), (name, gpu.name)):
        found |= {row.name: row for row in constants() if row.stack == of and row.gpu == on}
    for rated in ("matmul", "attention", "narrow", "link"):
        pooled, share = found[f"{rated}_efficiency"], found.get(f"{rated}_sustained")
        if share is not None and pooled.gpu == ANY:
            low, high = pooled.low * share.value, min(1.0, pooled.high * share.value)
            value = min(1.0, pooled.value * share.value)
            found[pooled.name] = replace(pooled, value=value, low=min(low, value), high=max(high, value))
    return Stack(name, gpu.name, found)


# ---------------------------------------------------------------- what a step asks for


def elementwise_bytes(
    *, tokens: float, layers: int, hidden: int, attention: int, kv: int, intermediate: int, vocab: int,
    adapted_in: int = 0, adapted_out: int = 0, eager_scores: float = 0, residual_bytes: int = 2,
    passes: float = FORWARD + BACKWARD, element_bytes: int = 2,
) -> float:  # fmt: skip
    """Bytes that norms, rotary embedding, activation, residuals, adapters and the loss move.

        layer = (2 norm + 6 residual_bytes) H + rotary (A + K) + mlp F + 8 (residual_bytes - element_bytes) H
        T * (passes * (L * layer + in adapted_in + out adapted_out + score eager_scores) + logit V)   [bytes]

    Unfused kernels, `TRAFFIC` by `element_bytes`; in 16 bit: a norm in fp32 reads and writes 32 bytes a
    feature, a residual three numbers, rotary 20 bytes, silu and the product 10. An adapter's input is cast
    to fp32 and back (14), its output scaled and added (12). `adapted_*`: features into and out of all adapted matrices of the model.
    `eager_scores`: scores a token that eager attention writes out, L * heads * S, 0 for fused kernels.
    `residual_bytes`: 4 for a quantised base, whose residual stream `prepare_model_for_kbit_training`
    keeps in fp32. Loss: cast to fp32, log-softmax, its gradient and the cast back.
    Source: counted from modeling_llama.py of transformers and LoRA's forward in peft.

    >>> elementwise_bytes(tokens=1, layers=1, hidden=1, attention=0, kv=0, intermediate=0, vocab=1)
    258.0
    """
    t = TRAFFIC[element_bytes]
    layer = (2 * t.norm + 6 * residual_bytes + 8 * (residual_bytes - element_bytes)) * hidden
    layer += t.rotary * (attention + kv) + t.mlp * intermediate
    moved = layers * layer + t.adapter_in * adapted_in + t.adapter_out * adapted_out + t.score * eager_scores
    return float(tokens * (passes * moved + t.logit * vocab))


def kernel_count(
    *, layers: int, adapted: int = 0, quantised: int = 0, passes: int = FORWARD + BACKWARD,
    micro_batches: int = 1,
) -> int:  # fmt: skip
    """Kernels started by one step.

        micro_batches * (passes * (40 L + 7 adapted + 4 quantised) + 60)   [launches]

    40 a layer and pass: two unfused norms of 7, four projections, rotary 10, attention 3, MLP 5, residuals 2
    and casts. 7 an adapted matrix: cast, dropout, A, B, scale, add, cast. 4 a quantised one: the scales of the
    scales, their offset, the weights, a transposed view. 60: embedding, loss, clipping.
    Source: counted from modeling_llama.py of transformers, LoRA's forward in peft and bitsandbytes' matmul_4bit.

    >>> kernel_count(layers=32, adapted=224)
    8604
    """
    return micro_batches * (passes * (40 * layers + 7 * adapted + 4 * quantised) + 60)


def adamw_bytes(params: float, param_bytes: int = 4, state_bytes: int = 4) -> float:
    """Bytes that torch's foreach AdamW moves for `params` trained weights.

        params * (9 * param_bytes + 14 * state_bytes)   [bytes]

    One pass over memory for every operation (r reads, w writes). In the parameters' dtype: decay p r w,
    update p r w, and the gradient in lerp r, addcmul r, norm r, clipping r w. In the states': lerp m r w,
    mul v r w, addcmul v r w, sqrt v r temp w, div and add on temp r w each, update m r temp r.
    Source: torch/optim/adam.py, `_multi_tensor_adam`, and `clip_grad_norm_`.

    >>> adamw_bytes(1, 2, 2)
    46
    """
    return params * (9 * param_bytes + 14 * state_bytes)


# ---------------------------------------------------------------- how long that takes


def peak_of(gpu: Gpu, dtype: str) -> float:
    """Dense FLOP/s; fp4 is a multiple of fp8 on the cards that have it.

        peak(fp4) = FP4_OVER_FP8 * peak(fp8)        [FLOP/s]

    Source: data sheets of HGX B200 and B300, GB200 and GB300 NVL72, MI350X and MI355X, without sparsity.

    >>> from lora_planner.facts import gpu
    >>> peak_of(gpu("b200-180gb"), "fp4") / 1e12
    9000.0
    """
    if dtype == "fp4" and gpu.name in FP4_OVER_FP8:
        return gpu.peak("fp8") * FP4_OVER_FP8[gpu.name]
    return gpu.peak(dtype)


def other_peak(work: Work, gpu: Gpu) -> float:
    """FLOP/s of scores and adapters: the stated dtype, and 16 bit where only the matmuls are narrower."""
    return gpu.peak(work.attention_dtype or ("bf16" if work.dtype in NARROW else work.dtype))


def roofline_s(work: Work, gpu: Gpu) -> float:
    """No step is faster: every FLOP at the dense peak, every weight read at full bandwidth.

        (max(linear / peak, weight bytes / bandwidth) + (adapter + attention) / peak)   [s]

    Source: Williams et al. 2009, "Roofline", one roof for every kind of kernel.
    """
    matmul = max(work.linear_flops / peak_of(gpu, work.dtype), work.weight_bytes_read / gpu.hbm_bytes_per_s)
    return matmul + (work.adapter_flops + work.attention_flops) / other_peak(work, gpu)


def launch_floor_s(work: Work, stack: Stack) -> float:
    """Seconds that the host needs to start the kernels: kernels * launch_s."""
    return work.kernels * stack["launch_s"]


def links_s(work: Work, stack: Stack, busy_s: float) -> float:
    """Seconds in which a GPU waits for data from others.

        exchanged / rate + max(0, gathered / rate - overlap * busy) + host / (link_efficiency * host_bytes_per_s)   [s]
        rate = link_efficiency * link_bytes_per_s; through several machines at most their node_link_bytes_per_s

    Weights and gradients are exchanged while other layers compute, where the stack does that; activations of
    tensor and expert parallelism are needed at once.
    """
    within, between = stack["link_bytes_per_s"], stack["node_link_bytes_per_s"]
    rate = stack["link_efficiency"]
    gathered = work.gathered_bytes / (rate * (min(within, between) if work.nodes > 1 else within))
    hidden = stack["overlap"] * busy_s
    return (
        work.exchanged_bytes / (rate * within)
        + max(0.0, gathered - hidden)
        + work.host_bytes / (rate * stack["host_bytes_per_s"])
    )


def matmul_efficiency(work: Work, stack: Stack) -> float:
    """Share of the peak that large matmuls reach; narrower formats reach less of theirs.

    A format of half the width asks for its casts and scales, which the peak does not count: fp4 is the same step
    again, from fp8.
    """
    steps = {"fp8": 1, "fp4": 2}.get(work.dtype, 0)
    return min(1.0, stack["matmul_efficiency"] * stack["narrow_efficiency"] ** steps)


def step_time(work: Work, gpu: Gpu, stack: Stack) -> Ledger:
    """Seconds of one optimizer step on one GPU, by cause; `estimate()` has the 90 % interval.

        GPU: (max(gpu work, launch floor) + links) (1 + bubble) + optimizer  [s]
        CPU: work + launch floor, for the host that starts a kernel executes it too: nothing overlaps

    What the GPU waits for the host, for its links and in a pipeline are terms of their own. The last term is zero and
    carries the spread of measured over predicted times of this stack; its lower end stops at the compute roofline.
    """
    if work.tokens < 0 or stack.gpu != gpu.name:
        raise BadInput("negative work, or constants of another GPU", f"{stack.name} on {gpu.name}")
    peak, other, bandwidth = peak_of(gpu, work.dtype), other_peak(work, gpu), gpu.hbm_bytes_per_s
    memory = bandwidth * stack["memory_efficiency"]
    # experts' products are smaller, and so further from the peak
    products = work.linear_flops + work.grouped_flops * (1 / stack["grouped_efficiency"] - 1)
    matmul = max(
        products / (peak * matmul_efficiency(work, stack)),
        work.weight_bytes_read / bandwidth,
    )
    dequantised = work.dequantised_params * DEQUANTISE_BYTES
    expanding = "gptq_efficiency" if work.dequantised_as == "gptq" else "dequantise_efficiency"
    parts = (
        ("matmul", matmul, "matmul_efficiency"),
        ("adapters", work.adapter_flops / (other * stack["adapter_efficiency"]), "adapter_efficiency"),
        ("attention", work.attention_flops / (other * stack["attention_efficiency"]), "attention_efficiency"),
        ("elementwise", work.activation_bytes / memory, "memory_efficiency"),
        ("optimizer", work.optimizer_bytes / memory, "memory_efficiency"),
        ("dequantise", dequantised / (bandwidth * stack[expanding]), expanding),
    )
    terms = [Term(name, s, stack.rows[by].basis, "throughput.step_time", note=by) for name, s, by in parts]
    busy = sum(term.value for term in terms)
    floor = launch_floor_s(work, stack)
    name, waiting = ("starting kernels", floor) if gpu.form == CPU else ("waiting for launches", max(0.0, floor - busy))
    links = links_s(work, stack, busy)
    bubble = work.bubble * (busy - work.optimizer_bytes / memory + waiting + links)
    total = busy + waiting + links + bubble
    spread = stack.rows["spread"]
    low = max(total * spread.low, min(total, roofline_s(work, gpu)))
    launch = stack.rows["launch_s"].basis
    terms.append(Term(name, waiting, launch, "throughput.launch_floor_s", note="launch_s"))
    if links:
        by = "link_efficiency"
        terms.append(Term("links", links, stack.rows[by].basis, "throughput.links_s", note=by))
    if bubble:
        terms.append(Term("pipeline bubble", bubble, DERIVED, "workload.divided"))
    above = total * (spread.high - 1)
    terms.append(Term("spread", 0.0, FITTED, "throughput.step_time", low - total, above, spread.source))
    return Ledger("step time", "s", terms, f"stack {stack.name}, {gpu.name}, {work.dtype}, padded tokens")
