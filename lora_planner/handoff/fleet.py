"""A configuration on several GPUs: time and cost of all of them. Memory is one GPU's, see `Sharding.split`."""

from __future__ import annotations

import re
from dataclasses import replace

from lora_planner.cost import cost
from lora_planner.errors import BadInput
from lora_planner.facts import Gpu, gpu
from lora_planner.handoff.sharding import Sharding
from lora_planner.ledger import Estimate
from lora_planner.memory import weights
from lora_planner.method import Method
from lora_planner.plan import PriceBook, Priced, matmul_dtype
from lora_planner.throughput import stack, step_time
from lora_planner.workload import ZERO3_LAUNCHES, divided, work

#: GPUs of the largest run that is planned
MAX_GPUS = 16_384
#: bytes of a gradient on the links
GRADIENT = 4.0
#: LoRA on several GPUs under DeepSpeed took up to this many times the prediction: the six such runs that are published
#: (QwenLM/Qwen README, 4 A100, ZeRO-2) took 1.6 to 2.5 times it, the same runs on one GPU 0.9 to 1.1. No mechanism is known
SLOWEST = 2.5


def parse(text: str) -> tuple[int, Gpu]:
    """ "8xh100-sxm-80gb" as eight of them; a name alone is one.

    >>> n, card = parse("8xh100-sxm-80gb")
    >>> n, card.name, parse("h100-sxm-80gb")[0]
    (8, 'h100-sxm-80gb', 1)
    """
    found = re.fullmatch(r"\s*([+-]?\d+)\s*[xX×*]\s*(.+)", text)
    if not found:
        return 1, gpu(text)
    number, name = found[1], found[2].strip()
    if len(number) > 9 or not 1 <= int(number) <= MAX_GPUS:
        raise BadInput(f"{number[:12]} GPUs", "--gpu", f"Use 1 to {MAX_GPUS:,}: 8x{name[:40]}.")
    return int(number), gpu(name)


def timed(priced: Priced, sharding: Sharding, gpus: int, book: PriceBook | None) -> None:
    """Put the time and cost of `gpus` GPUs into what was priced on one.

    step    workload.divided on the GPUs' links, every GPU its own micro-batches
    run     padded tokens of the run / (tokens of a GPU's step * GPUs) steps
    cost    hours * GPUs * price
    """
    c = priced.configuration
    assert c.gpu
    asked = work(
        c.model, c.method, micro_batch=c.micro_batch, seq_len=c.seq_len, accumulation=c.accumulation,
        checkpointing=c.checkpointing, attention=c.attention, dtype=matmul_dtype(c.gpu),
    )  # fmt: skip
    if sharding.engine == "deepspeed" and sharding.weights:
        asked = replace(asked, kernels=ZERO3_LAUNCHES * asked.kernels)
    asked = divided(
        asked, c.model, c.method, sharding.division(gpus, c.gpu.name), micro_batches=c.accumulation,
        checkpointing=c.checkpointing, stored_bytes=weights(c.model, travels_as(c.method))[0], gradient_bytes=GRADIENT,
    )  # fmt: skip
    priced.step = step_time(asked, c.gpu, stack(c.stack, c.gpu))
    if sharding.engine == "deepspeed" and gpus > 1 and not c.method.is_full:
        spread, slow = priced.step.terms[-1], (SLOWEST - 1) * priced.step.total
        priced.step.terms[-1] = replace(spread, high=max(spread.high or 0.0, slow), note="fleet.SLOWEST")
    step = priced.step_s = priced.step.estimate()
    tokens = c.tokens_per_step * gpus
    priced.tokens_per_s = Estimate(
        tokens / step.high, tokens / step.value, tokens / step.low, "tokens/s", step.basis, step.source
    )
    priced.run_s = step.scaled(priced.run_tokens / tokens) if priced.run_tokens else step
    rows = book.rows.get(c.gpu.name) if book else None
    priced.cost = cost(priced.run_s, c.gpu.name, rows, book.today, gpus) if book and rows else None


def travels_as(method: Method) -> str:
    """The dtype in which GPUs exchange weights: what the matmuls compute with, or the 4 bits that are stored."""
    return "bfloat16" if method.is_full or method.base_dtype == "float32" else method.base_dtype
