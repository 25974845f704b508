"""C08. The best learning rate hardly depends on the rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import mean_interval, one_sided, ratio_interval
from lora_planner.record import FAILS, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims.lab import FEW, SEEDS, SIZES, Size, grid
from runner.claims.shared import LWR, MARGIN, count, log_rates, lora, name, sharp, tuned_losses, u_curves, unready

MOST = 2.0
SENTENCE = "From rank 4 up the best learning rates differ by less than a factor of two; that of rank 1 is lower."
SOURCE = LWR + ", 'Optimal learning rate and rank'"
PUBLISHED = ("under 2 from rank 4 to 512, rank 1 lower; on a public sweep of 21 models the rate grows as "
             "rank^0.18 [0.04, 0.29], 2.1 times from rank 1 to 64")  # fmt: skip
UNIT = "ratio"
METRIC = "largest over smallest of the fitted best rates of the ranks from 4 up"
RULE = ("Holds if that ratio is below 2 (one-sided t test over seeds, 5 %) and rank 1's best rate is not above rank 4's; "
        "fails if it is above 2 (p times the pairs), or rank 1's is above; else undecided. Beside it rank 1 with alpha = 2 r. "
        "Control: at every rank a rate off by a factor of 2 must cost more than 0.5 % of the loss.")  # fmt: skip
TRAPS = (1, 4, 5, 7, 9)


def proportional(size: Size) -> RunSpec:
    """Rank 1 with alpha = 2 r; at rank 16 that is the alpha of the sweep."""
    return replace(lora(size, 1), alpha=2.0)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    found = [spec for rank in size.ranks for spec in grid(runs, lora(size, rank), size.lora_rates)]
    return found + grid(runs, proportional(size), [float(f"{rate * MOST:.3g}") for rate in size.lora_rates], FEW)


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    ranks = [rank for rank in s.ranks if rank >= 4]
    designs = [lora(s, rank) for rank in s.ranks]
    if (missing := unready("C08", runs, designs)) is not None:
        return missing
    logs = {rank: log_rates(runs, lora(s, rank)) for rank in s.ranks}
    ends = sorted(ranks, key=lambda rank: mean_interval(logs[rank]).value)
    apart = [b - a for a, b in zip(logs[ends[0]], logs[ends[-1]], strict=True)]
    effect = replace(ratio_interval(apart), unit=UNIT)
    first = ratio_interval([b - a for a, b in zip(logs[4], logs[1], strict=True)])
    below = one_sided(apart, math.log(MOST), greater=False)
    above = min(1.0, math.comb(len(ranks), 2) * one_sided(apart, math.log(MOST)))  # the widest pair was picked
    higher = one_sided([b - a for a, b in zip(logs[4], logs[1], strict=True)])
    seen, control = sharp(runs, designs, MARGIN * mean_interval(tuned_losses(runs, designs[-1])).value)
    status = HOLDS if below < 0.05 and first.value <= 1 else FAILS if min(above, higher) < 0.05 else UNDECIDED
    if not seen:
        status = UNDECIDED
    listed = ", ".join(f"{name(d)} {ratio_interval(logs[d.rank]).value:.1e}" for d in designs)
    sentence = (f"best rates {listed}; ranks {ends[0]} and {ends[-1]} are {effect.value:.2f} apart, rank 1 has "
                f"{first.value:.2f} [{first.low:.2f}, {first.high:.2f}] of rank 4's; {contrast(runs, s, logs[16])}")  # fmt: skip
    return Verdict("C08", status, sentence, effect, count(runs, [*designs, proportional(s)]),
                   p=min(below if first.value <= 1 else 1.0, above, higher), control=control,
                   plot=u_curves(runs, [*designs], SEEDS, title="loss by learning rate and rank"))  # fmt: skip


def contrast(runs: Sequence[RunRecord], size: Size, sixteen: Sequence[float]) -> str:
    """What the best rate does where alpha follows the rank, as many habits have it."""
    if unready("C08", runs, [proportional(size)], FEW) is not None:
        return "with alpha = 2 r rank 1 has no bracketed optimum"
    ratio = ratio_interval([a - b for a, b in zip(log_rates(runs, proportional(size), FEW), sixteen, strict=False)])
    return (f"with alpha = 2 r rank 1's best rate is {ratio.value:.1f} [{ratio.low:.1f}, {ratio.high:.1f}] times "
            "rank 16's")  # fmt: skip
