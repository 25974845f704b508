"""MOE. In a mixture of experts, an adapter on each expert at the rank divided by the active ones matches full."""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.stats import equivalence, mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims.lab import FEW, SIZES, Size, arm, grid, start
from runner.claims.shared import LWR, MARGIN, count, tuned_losses, u_curves, unready

RANK, ACTIVE = 16, 2
SENTENCE = (
    "In a mixture of experts LoRA on every expert, at the rank divided by the active experts, matches full fine-tuning."
)
SOURCE = LWR + ", 'Layers where LoRA is applied', on Qwen3-30B-A3B"
PUBLISHED = "separate adapters on each expert, rank divided by the eight active ones; scaling as in dense models"
UNIT = "nats"
METRIC = f"tuned held-out loss of adapters at rank {RANK} / {ACTIVE} on attention and every expert, minus that of full"
RULE = ("Two one-sided t tests over paired seeds at 0.5 % of full fine-tuning's loss: holds inside, fails if above by more "
        "(one-sided, 5 %), else undecided. Control: attention alone at rank 16 must be worse than with the "
        "experts by more than the margin.")  # fmt: skip
TRAPS = (1, 2, 4, 5, 6, 7, 8, 11, 14)


def arms(size: Size) -> dict[str, RunSpec]:
    """Three arms on the mixture; no unembedding in either adapter."""
    return {
        "full": arm(size, base=size.moe),
        "experts": arm(size, "lora", RANK // ACTIVE, base=size.moe, targets=("attention", "experts"), experts="fused"),
        "attention": arm(size, "lora", RANK, base=size.moe, targets=("attention",), experts="none"),
    }


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return [
        spec
        for name, design in arms(size).items()
        for spec in grid(runs, design, size.full_rates if name == "full" else size.lora_rates, FEW)
    ]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    found = arms(s)
    if (missing := unready("MOE", runs, list(found.values()), FEW)) is not None:
        return missing
    losses = {name: tuned_losses(runs, design, FEW) for name, design in found.items()}
    margin = MARGIN * mean_interval(losses["full"]).value
    behind = [a - b for a, b in zip(losses["experts"], losses["full"], strict=True)]
    without = [a - b for a, b in zip(losses["attention"], losses["experts"], strict=True)]
    test, worse = equivalence(behind, margin), one_sided(behind, margin)
    seen = one_sided(without, margin) < 0.05
    status = UNDECIDED if not seen else HOLDS if test.equivalent else FAILS if worse < 0.05 else UNDECIDED
    effect = mean_interval(behind, unit=UNIT)
    begin = start(runs, found["full"])
    listed = ", ".join(f"{name} {mean_interval(row).value:.3f}" for name, row in losses.items())
    return Verdict("MOE", status, f"from {begin:.3f} to {listed} nats, margin {margin:.3f}", effect,
                   count(runs, list(found.values()), FEW), p=min(test.p, worse),
                   control=f"attention alone is {mean_interval(without).value:+.3f} behind: {'found' if seen else 'not found'}",
                   plot=u_curves(runs, list(found.values()), FEW, title="loss by learning rate, mixture of experts"))  # fmt: skip
