"""C06. Below its capacity LoRA reaches the loss of full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import equivalence, mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims.lab import FEW, SEEDS, SIZES, Size, of_arm
from runner.claims.shared import (
    LWR,
    best_run,
    count,
    curves_plot,
    full,
    lora,
    margin_nats,
    name,
    start,
    tuned_losses,
    unready,
)
from runner.claims.shared import specs as sweep

SENTENCE = "On a data set that its adapter can hold, LoRA ends at the held-out loss of full fine-tuning."
SOURCE = LWR + ", 'LoRA rank'"
PUBLISHED = ("high ranks and full fine-tuning have the same curves; a 1B model: better on one data set, worse on "
             "another; Biderman et al. 2024: full fine-tuning is ahead on code and mathematics")  # fmt: skip
UNIT = "nats"
METRIC = "tuned held-out loss of the highest rank minus that of full fine-tuning, each at its own fitted best rate"
RULE = ("Two one-sided t tests over paired seeds against a margin of 0.5 % of full fine-tuning's loss: holds if the "
        "difference lies inside, fails if it is above the margin (one-sided, 5 %), else undecided. "
        "Controls: rank 1 must be worse than full by more than the margin; full must gain ten margins.")  # fmt: skip
TRAPS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 14, 17)


def controls(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    """The second highest rank at its middle rate from random weights, with A frozen, and on shuffled windows."""
    plain = replace(lora(size, size.ranks[-2]), lr=size.lora_rates[2])
    kinds = (replace(plain, init="random"), replace(plain, method="lora-fa"),
             replace(plain, task_args=(("shuffled", True),)))  # fmt: skip
    return [replace(kind, seed=seed) for kind in kinds for seed in FEW]


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return [*sweep(size, runs, (size.ranks[0], size.ranks[-2], size.ranks[-1])), *controls(size, runs)]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    high, second, low = lora(s, s.ranks[-1]), lora(s, s.ranks[-2]), lora(s, s.ranks[0])
    designs = [full(s), low, second, high]
    if (missing := unready("C06", runs, designs)) is not None:
        return missing
    reference, margin = tuned_losses(runs, full(s)), margin_nats(runs, s)
    begin = start(runs, full(s))

    def behind(design: RunSpec) -> list[float]:
        return [a - b for a, b in zip(tuned_losses(runs, design), reference, strict=True)]

    test, worse = equivalence(behind(high), margin), one_sided(behind(high), margin)
    seen = one_sided(behind(low), margin) < 0.05 and begin - mean_interval(reference).value > 10 * margin
    status = UNDECIDED if not seen else HOLDS if test.equivalent else FAILS if worse < 0.05 else UNDECIDED
    effect = mean_interval(behind(high), unit=UNIT)
    parts = ", ".join(f"{name(d)} {mean_interval(behind(d)).value:+.3f}" for d in designs[1:])
    run = best_run(runs, high, SEEDS[0])
    held = run.measured["trainable"] * 2
    asked = run.measured["trained_tokens"] * mean_interval(run.measured["losses"]).value / math.log(2)
    gained = mean_interval(reference).value - begin
    sentence = (f"full {begin:.3f} to {mean_interval(reference).value:.3f} nats ({gained:+.3f}); behind it {parts}, "
                f"margin {margin:.3f}; first-epoch log-loss {asked / 1e6:.2f} Mbit at most against "
                f"{held / 1e6:.2f} Mbit at 2 bits a parameter in {name(high)}")  # fmt: skip
    control = (f"rank {s.ranks[0]} is {mean_interval(behind(low)).value:.3f} behind and full gains "
               f"{begin - mean_interval(reference).value:.3f}: {'found' if seen else 'not found'}; "
               + "; ".join(described(runs, s, second)))  # fmt: skip
    return Verdict("C06", status, sentence, effect, count(runs, designs), p=min(test.p, worse), control=control,
                   plot=curves_plot(runs, designs))  # fmt: skip


def described(runs: Sequence[RunRecord], size: Size, reference: RunSpec) -> list[str]:
    """What each negative control came to, beside the same adapter without it."""

    def losses(design: RunSpec) -> list[float]:
        mine = (run for run in of_arm(runs, design) if run.spec.lr == kind.lr and run.spec.seed in FEW)
        return [run.final_loss for run in mine if run.final_loss is not None]

    found = []
    words = ("random base", "A frozen", "shuffled text")
    for kind, word in zip(controls(size, runs)[:: len(FEW)], words, strict=True):
        known, plain = losses(kind), losses(reference)
        if known and plain:
            found.append(f"{word} {mean_interval(known).value:.3f} instead of {mean_interval(plain).value:.3f}")
    return found or ["negative controls not run"]
