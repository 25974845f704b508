"""C16. LoRA pays more than full fine-tuning for a large batch, at every rank alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import equivalence, mean_interval, one_sided, slope_by_group
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import FEW, SIZES, Size, grid
from runner.claims.shared import LWR, count, full, lora, margin_nats, tuned_losses, unready

FACTORS = (1, 2, 5)  # of the micro-batch of the shared sweep; the same windows in all, so fewer steps
#: the highest of the CPU's sweep, so that what a low rank cannot hold is not taken for the batch
RANKS = (16, 32)
SENTENCE = "The larger the batch, the further LoRA falls behind full fine-tuning, whatever its rank."
SOURCE = LWR + ", 'Batch size effects'"
PUBLISHED = ("in some settings; the gap grows with the batch and does not depend on the rank; at 32 it is small. "
             "arXiv 2602.09492: an optimum in between, also rank-free; arXiv 2602.04998: hardly any effect")  # fmt: skip
UNIT = "nats per doubling"
METRIC = "slope over log2(batch) of (tuned LoRA loss - tuned full loss), mean of two ranks, at equal tokens"
RULE = ("Holds if the slope is above 0 (one-sided t test over seeds, 5 %) and the two ranks' slopes are the same within "
        "0.5 % of full's loss per doubling (two one-sided tests); fails if the slope is below 0, or the ranks differ by "
        "more than that (one-sided, 5 %); else undecided. The same "
        "at equal steps is reported, since a larger batch at equal tokens is also a shorter run. "
        "Control: full fine-tuning itself must be worse at the largest batch, by more than 0.5 % of its loss.")  # fmt: skip
TRAPS = (4, 5, 7, 11, 13, 14)


def at_batch(size: Size, design: RunSpec, factor: int) -> RunSpec:
    if factor == 1:
        return design
    steps = size.steps // factor
    return replace(design, micro_batch=size.micro_batch * factor, steps=steps,
                   eval_at=tuple(step for step in size.eval_at if step < steps))  # fmt: skip


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    found = []
    for factor in FACTORS:
        up = math.sqrt(factor)
        for design, rates in ((full(size), size.full_rates), *((lora(size, rank), size.lora_rates) for rank in RANKS)):
            found += grid(runs, at_batch(size, design, factor), [float(f"{rate * up:.3g}") for rate in rates], FEW)
    return found


def gaps(runs: Sequence[RunRecord], size: Size, rank: int, step: int | None = None) -> list[list[float]] | None:
    """By seed, for each batch: tuned LoRA loss minus tuned full loss; None where one is not known."""
    rows = []
    for factor in FACTORS:
        pair = [at_batch(size, d, factor) for d in (lora(size, rank), full(size))]
        if unready("C16", runs, pair, FEW, step) is not None:
            return None
        rows.append([a - b for a, b in zip(*(tuned_losses(runs, d, FEW, step) for d in pair), strict=True)])
    return [list(column) for column in zip(*rows, strict=True)]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    designs = [at_batch(s, d, f) for f in FACTORS for d in (full(s), *(lora(s, rank) for rank in RANKS))]
    n = count(runs, designs[3:], FEW)
    if not n:
        return Verdict("C16", NOT_RUN, "no run of it in these records")
    for design in designs:
        if (missing := unready("C16", runs, [design], FEW)) is not None:
            return at_this_batch(missing, design, n)
    x = [math.log2(s.micro_batch * factor) for factor in FACTORS]
    found = {rank: gaps(runs, s, rank) or [] for rank in RANKS}
    slopes = {rank: [slope_by_group([(x, row)]).value for row in rows] for rank, rows in found.items()}
    mean = [sum(pair) / len(pair) for pair in zip(*slopes.values(), strict=True)]
    effect = mean_interval(mean, unit=UNIT)
    above, below = one_sided(mean), one_sided(mean, greater=False)
    margin = margin_nats(runs, s)
    reference = [tuned_losses(runs, at_batch(s, full(s), factor), FEW) for factor in FACTORS]
    worse = one_sided([b - a for a, b in zip(reference[0], reference[-1], strict=True)], margin)
    seen = worse < 0.05
    unlike = [b - a for a, b in zip(*slopes.values(), strict=True)]
    apart = mean_interval(unlike)
    same = equivalence(unlike, margin)
    differ = min(1.0, 2 * min(one_sided(unlike, margin), one_sided(unlike, -margin, greater=False)))
    holds, fails = max(above, same.p), min(below, differ)
    status = UNDECIDED if not seen else HOLDS if holds < 0.05 else FAILS if fails < 0.05 else UNDECIDED
    listed = "; ".join(f"rank {rank} " + ", ".join(f"{mean_interval([row[i] for row in rows]).value:+.3f} at {s.micro_batch * f}"
                                                   for i, f in enumerate(FACTORS)) for rank, rows in found.items())  # fmt: skip
    sentence = f"behind full by batch: {listed}; ranks' slopes differ by {apart.value:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}], margin {margin:.3f}"
    equal = gaps(runs, s, RANKS[-1], s.short)
    if equal:
        at = slope_by_group([(x, row) for row in equal])
        sentence += f"; at {s.short} steps each: {at.value:+.3f} [{at.low:+.3f}, {at.high:+.3f}] per doubling"
    control = (f"full fine-tuning {mean_interval(reference[0]).value:.3f} at batch {s.micro_batch}, "
               f"{mean_interval(reference[-1]).value:.3f} at {s.micro_batch * FACTORS[-1]}: {'found' if seen else 'not found'}")  # fmt: skip
    series = tuple(Series(f"lora r{rank} - full", tuple(2**v for v in x), tuple(
        mean_interval([row[i] for row in rows]).value for i in range(len(x))), tuple(min(row[i] for row in rows) for i in range(len(x))),
        tuple(max(row[i] for row in rows) for i in range(len(x)))) for rank, rows in found.items())  # fmt: skip
    return Verdict("C16", status, sentence, effect, n, p=min(holds, fails), control=control,
                   plot=Plot("tuned LoRA loss above full, by batch", "windows a step", "nats", series, x_log=True))  # fmt: skip


def at_this_batch(missing: Verdict, design: RunSpec, n: int) -> Verdict:
    """The same word, saying at which batch."""
    return Verdict(
        missing.claim, missing.status, f"at batch {design.batch}: {missing.sentence}", n=n, plot=missing.plot
    )
