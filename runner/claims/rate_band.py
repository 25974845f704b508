"""C19. LoRA forgives a wrong learning rate more than full fine-tuning does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibrate import curves
from calibrate.stats import mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims.lab import SEEDS, SIZES, STEP, Size, grid, of_arm, points, start
from runner.claims.shared import LWR, MARGIN, count, full, lora, u_curves

RANK = 16
SHARE = 0.9
SENTENCE = "LoRA has a wider band of good learning rates than full fine-tuning."
SOURCE = LWR + ", RL experiments; here on supervised runs, where the same sweep tells"
PUBLISHED = "wider in RL (no number); kenkuuu's RL: 10x against 5.8x for rank 1, but 3.3x for rank 256"
UNIT = "octaves"
METRIC = f"octaves of learning rate with 90 % of the best gain: LoRA at rank {RANK} minus full fine-tuning"
RULE = ("Holds if the difference is above 0 (one-sided t test over seeds, 5 %); fails if it is below 0; else undecided, "
        "also where a band reaches the end of its grid. Control: both arms must gain ten times 0.5 % of full's loss.")  # fmt: skip
TRAPS = (4, 5, 7)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    """The sweep's grids, continued while a band is open at an end."""
    found = []
    for design, rates in ((full(size), size.full_rates), (lora(size, RANK), size.lora_rates)):
        begin = [rates[0] / STEP, *rates]
        wanted = grid(runs, design, begin)
        known = [points(runs, design, seed) for seed in SEEDS]
        if all({w.lr for w in wanted} <= set(k) for k in known):
            for k in known:
                width = curves.band(k, SHARE, start=start(runs, design))
                more = [min(k) / STEP] if width and width.open_low else []
                more += [max(k) * STEP] if width and width.open_high else []
                wanted += [replace(design, lr=float(f"{rate:.3g}"), seed=seed) for rate in more for seed in SEEDS]
        found += wanted
    return found


def widths(runs: Sequence[RunRecord], design: RunSpec, share: float) -> list[curves.Band | None]:
    return [curves.band(points(runs, design, seed), share, start=start(runs, design)) for seed in SEEDS]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    designs = [full(s), lora(s, RANK)]
    if not any(of_arm(runs, d) for d in designs):
        return Verdict("C19", NOT_RUN, "no run of it in these records")
    found = {d.method: widths(runs, d, SHARE) for d in designs}
    plot = u_curves(runs, designs, title="loss by learning rate")
    bands = [b for row in found.values() for b in row if b is not None]
    if len(bands) < 2 * len(SEEDS):
        return Verdict(
            "C19", UNDECIDED, "an arm has no run that gains, in some seed", n=count(runs, designs), plot=plot
        )
    if any(b.open_low or b.open_high for b in bands):
        return Verdict("C19", UNDECIDED, "a band reaches the end of its grid", n=count(runs, designs), plot=plot)
    octaves = {method: [b.octaves for b in row if b] for method, row in found.items()}
    differences = [a - b for a, b in zip(octaves["lora"], octaves["full"], strict=True)]
    effect = mean_interval(differences, unit=UNIT)
    above, below = one_sided(differences), one_sided(differences, greater=False)
    lowest = [min(v for v in points(runs, d, seed).values() if v is not None) for d in designs for seed in SEEDS]
    gained = start(runs, designs[0]) - max(lowest)
    seen = gained > 10 * MARGIN * min(lowest)
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 else UNDECIDED
    sentence = (f"within 90 % of the best gain: LoRA {mean_interval(octaves['lora']).value:.1f} octaves, full "
                f"{mean_interval(octaves['full']).value:.1f}")  # fmt: skip
    return Verdict("C19", status, sentence, effect, count(runs, designs), p=min(above, below), plot=plot,
                   control=f"the least gain is {gained:.2f} nats: {'found' if seen else 'not found'}")  # fmt: skip
