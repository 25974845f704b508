"""Batch size: what to train with, what a larger batch costs, and how it splits into micro-batches.

B sequences per optimizer step
LWR: "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from lora_planner.errors import BadInput
from lora_planner.learning_rate import constants
from lora_planner.ledger import FITTED, Estimate, around

#: the one batch that LWR names as working for LoRA
DEFAULT_BATCH = 32
#: below this many steps B, which starts at zero, is still growing
MIN_STEPS = 100
#: sequence length of the runs behind the law
LAW_SEQ_LEN = 8192


@dataclass(frozen=True, slots=True)
class BatchAdvice:
    """`extra`: samples to the same loss, relative to the default batch."""

    batch: int
    steps: float
    extra: Estimate
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accumulation:
    """micro_batch * devices * steps = effective; above the batch asked for only if one pass is."""

    micro_batch: int
    devices: int
    steps: int
    effective: int
    note: str = ""


def samples_to_target(batch: float) -> Estimate:
    """Sequences until the target loss, LoRA on Llama-2-70B, 8192 tokens each.

        2867 (1 + B / 35.7)        [sequences], constants in data/lr_constants.json

    Full fine-tuning has such a law too; no public data compare the two at equal target.
    Source: our fit to MLPerf Training v4.0 to v5.0, 8 batch sizes (8 to 128) from 100 results, each size
    weighing the same, sd 0.17 in log; a power B^0.46 fits no worse (0.13).

    >>> 9_000 < samples_to_target(128).value < 15_000
    True
    """
    _check(batch)
    fit = constants()
    value = fit["batch.samples"].value * (1 + batch / fit["batch.critical"].value)
    return around(value, exp(1.645 * fit["batch.sd"].value), "sequences", FITTED, fit["batch.samples"].source)


def extra_samples(batch: float, seq_len: float = LAW_SEQ_LEN, reference: float = DEFAULT_BATCH) -> Estimate:
    """Samples to the same loss at this batch over those at the reference batch.

        (1 + B / B0) / (1 + B_ref / B0)        [ratio]

    Whether the critical batch B0 is a count of sequences or of tokens is open: the value takes
    sequences, and the interval contains tokens (B scaled by seq_len / 8192).
    Source: `samples_to_target`. LWR: the loss is not fixed by more rank.

    >>> extra_samples(32).value, 1.9 < extra_samples(128).value < 3
    (1.0, True)
    """
    _check(batch)
    _check(reference)
    if not 0 < seq_len < 1e9:
        raise BadInput(f"sequences of {seq_len:g} tokens are empty", "--max-len", "Use the mean length of the data.")
    b0, shrink = constants()["batch.critical"], seq_len / LAW_SEQ_LEN

    def ratio(critical: float, share: float) -> float:
        return (1 + batch * share / critical) / (1 + reference * share / critical)

    value = ratio(b0.value, 1.0)
    ends = [value, *(ratio(c, share) for c in (b0.low, b0.high) for share in (1.0, shrink))]
    return Estimate(min(ends), value, max(ends), "ratio", FITTED, b0.source)


def recommend_batch(examples: float, epochs: float = 1.0, seq_len: float = LAW_SEQ_LEN) -> BatchAdvice:
    """The default batch, halved while the run would have fewer than 100 steps.

        largest of 32, 16, 8, 4, 2, 1 with examples * epochs / B >= 100        [sequences]

    Source: LWR (both methods are best at a small batch, LoRA pays more at a large one, at every rank;
    100 steps: B = 0 must grow first); tinker docs (at least 100 steps, better 1000).

    >>> recommend_batch(50_000).batch, recommend_batch(800).batch
    (32, 8)
    """
    if not 0 < examples < float("inf") or not 0 < epochs < float("inf"):
        raise BadInput(f"{examples:g} examples x {epochs:g} epochs are no run", "--data", "Use positive numbers.")
    batch = DEFAULT_BATCH
    while batch > 1 and examples * epochs / batch < MIN_STEPS:
        batch //= 2
    steps = max(1.0, examples * epochs / batch)
    reasons = ["LoRA pays more than full fine-tuning at a large batch, and a higher rank does not help (LWR)"]
    if batch < DEFAULT_BATCH:
        reasons.append(f"below {DEFAULT_BATCH} for {MIN_STEPS} steps: B starts at zero and must grow")
    warnings = () if steps >= MIN_STEPS else (f"{steps:.0f} steps: too few for LoRA; add epochs or data",)
    return BatchAdvice(batch, steps, extra_samples(batch, seq_len), tuple(reasons), warnings)


def check_batch(batch: int, examples: float, epochs: float = 1.0, seq_len: float = LAW_SEQ_LEN) -> BatchAdvice:
    """A batch that the user chose: what it costs against the default, and what to watch.

    Source: `extra_samples`; arXiv:2602.09492 finds an interior optimum that grows with the data set.

    >>> check_batch(256, 10_000).warnings[0]
    '39 steps: below 100 B is still growing; a smaller batch gives more steps'
    """
    _check(batch)
    if not 0 < examples < float("inf") or not 0 < epochs < float("inf"):
        raise BadInput(f"{examples:g} examples x {epochs:g} epochs are no run", "--data", "Use positive numbers.")
    steps, extra, warnings = max(1.0, examples * epochs / batch), extra_samples(batch, seq_len), []
    if steps < MIN_STEPS:
        warnings.append(f"{steps:.0f} steps: below {MIN_STEPS} B is still growing; a smaller batch gives more steps")
    if batch > DEFAULT_BATCH:
        warnings.append(
            f"batch {batch} needs {extra.value:.2g}x [{extra.low:.2g}, {extra.high:.2g}] the samples of "
            f"batch {DEFAULT_BATCH} for the same loss; more rank does not fix it (LWR; its size is contested)"
        )
    return BatchAdvice(batch, steps, extra, ("chosen by the user",), tuple(warnings))


def accumulate(batch: int, micro_batch: int, devices: int = 1) -> Accumulation:
    """Gradient accumulation for a batch, rounded down: the smaller batch is the safer error.

        max(1, batch // (micro_batch * devices))        [steps]

    Source: definition.

    >>> accumulate(32, 4, 2).steps, accumulate(32, 5).effective
    (4, 30)
    """
    _check(batch)
    if micro_batch < 1 or devices < 1:
        raise BadInput(f"micro-batch {micro_batch} on {devices} devices is empty", "--micro-batch", "Use 1 or more.")
    once = micro_batch * devices
    steps = max(1, batch // once)
    effective = once * steps
    note = "" if effective == batch else f"batch {batch} is no multiple of {once}: {effective} is trained"
    return Accumulation(micro_batch, devices, steps, effective, note)


def _check(batch: float) -> None:
    if not 1 <= batch < 1e9:
        raise BadInput(f"batch {batch:g} is no batch", "--batch", "Use 1 or more sequences per step.")
