"""C17. In reinforcement learning rank 1 is enough."""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.stats import equivalence, mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims.lab import SIZES, Size, arm, grid, start
from runner.claims.shared import LWR, count, name, tuned_losses, u_curves, unready

MARGIN, LEAST_GAIN = 0.03, 0.15
RANKS = (1, 16)
FULL_RATES, LORA_RATES = (2e-4, 3.2e-4, 5e-4, 8e-4, 1.25e-3), (5e-4, 8e-4, 1.25e-3, 2e-3, 3.2e-3)
SENTENCE = "With a policy gradient on verifiable rewards, LoRA of rank 1 reaches what full fine-tuning reaches."
SOURCE = LWR + ", 'Reinforcement learning'"
PUBLISHED = ("rank 1 matches full on MATH and GSM8K; open-rl: within 0.002 of full on an 8B model; PeRL (arXiv 2512.23165): "
             "rank 1 is a bottleneck; collapse of high ranks has been seen")  # fmt: skip
UNIT = "reward"
METRIC = "tuned held-out expected reward of rank 1 minus that of full fine-tuning, sums of two digits, five seeds"
RULE = ("Two one-sided t tests over paired seeds at 3 points of reward: holds inside, fails if rank 1 is below by more "
        "than that (one-sided, 5 %), else undecided. Control: full fine-tuning must gain 15 points, from between 5 and 60 %.")  # fmt: skip
TRAPS = (4, 5, 6, 7, 9, 11, 14, 16, 17)


def design(size: Size, method: str = "full", rank: int = 0, **words: object) -> RunSpec:
    plain = {"base": size.sums, "task": "arithmetic", "objective": "rl", "seq_len": 16, "micro_batch": 8, "steps": 100,
             "group": 16, "new_tokens": 1, "eval_at": (25, 50)}  # fmt: skip
    return arm(size, method, rank, **{**plain, **words})


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    found = grid(runs, design(size), FULL_RATES, rewards=True)
    for rank in RANKS:
        found += grid(runs, design(size, "lora", rank), LORA_RATES, rewards=True)
    return found


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    designs = [design(s), *(design(s, "lora", rank) for rank in RANKS)]
    if (missing := unready("C17", runs, designs)) is not None:
        return missing
    rewards = {name(d): tuned_losses(runs, d) for d in designs}
    begin = start(runs, designs[0])
    behind = [a - b for a, b in zip(rewards["lora r1"], rewards["full"], strict=True)]
    test, below = equivalence(behind, MARGIN), one_sided(behind, -MARGIN, greater=False)
    gained = mean_interval(rewards["full"]).value - begin
    seen = gained >= LEAST_GAIN and 0.05 <= begin <= 0.6
    status = UNDECIDED if not seen else HOLDS if test.equivalent else FAILS if below < 0.05 else UNDECIDED
    effect = mean_interval(behind, unit=UNIT)
    listed = ", ".join(f"{arm_name} {mean_interval(row).value:.3f}" for arm_name, row in rewards.items())
    return Verdict("C17", status, f"expected reward from {begin:.3f} to {listed}", effect, count(runs, designs),
                   p=min(test.p, below), control=f"full gains {gained:.3f}: {'found' if seen else 'not found'}",
                   plot=u_curves(runs, designs, title="expected reward by learning rate", y_label="held-out expected reward"))  # fmt: skip
