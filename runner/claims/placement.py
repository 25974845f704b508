"""C13. With equally many parameters, adapters on the MLP beat adapters on attention."""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.stats import equivalence, mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims.lab import FEW, SIZES, Size, arm, grid, start
from runner.claims.shared import LWR, MARGIN, best_run, count, tuned_losses, u_curves, unready

#: ranks with as many parameters to 2 %, on these bases (hidden h, MLP 3 h, half as many key and value heads)
RANKS = {"cpu": {"attention": 24, "mlp": 14, "all-linear": 9}, "gpu": {"attention": 48, "mlp": 28, "all-linear": 18}}
SENTENCE = (
    "At equally many adapter parameters attention alone is worse than the MLP alone, and all layers add nothing to it."
)
SOURCE = LWR + ", 'Layers where LoRA is applied'"
PUBLISHED = ("attention at rank 256 (0.25B) is worse than MLP at rank 128 (0.24B), all layers are no better than MLP; "
             "QLoRA and kenkuuu: all layers are better still")  # fmt: skip
UNIT = "nats"
METRIC = "tuned held-out loss of attention alone minus that of the MLP alone, without the unembedding in any arm"
RULE = ("Holds if it is above 0.5 % of the loss (one-sided t test over seeds, 5 %), fails if it is below that likewise, "
        "else undecided. All layers against the MLP is reported with two one-sided tests at the same margin. "
        "Control: every arm must beat the base by ten margins.")  # fmt: skip
TRAPS = (1, 4, 5, 7, 8, 9, 12)


def arms(size: str) -> dict[str, RunSpec]:
    return {target: arm(SIZES[size], "lora", rank, targets=(target,)) for target, rank in RANKS[size].items()}


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    name = next(key for key, value in SIZES.items() if value == size)
    return [spec for design in arms(name).values() for spec in grid(runs, design, size.lora_rates, FEW)]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    designs = arms(size)
    if (missing := unready("C13", runs, list(designs.values()), FEW)) is not None:
        return missing
    losses = {target: tuned_losses(runs, design, FEW) for target, design in designs.items()}
    margin = MARGIN * mean_interval(losses["mlp"]).value
    worse = [a - b for a, b in zip(losses["attention"], losses["mlp"], strict=True)]
    whole = [a - b for a, b in zip(losses["all-linear"], losses["mlp"], strict=True)]
    effect = mean_interval(worse, unit=UNIT)
    above, below = one_sided(worse, margin), one_sided(worse, margin, greater=False)
    gained = start(runs, designs["mlp"]) - max(mean_interval(row).value for row in losses.values())
    seen = gained > 10 * margin
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 else UNDECIDED
    test = equivalence(whole, margin)
    word = (
        "the same" if test.equivalent else "better" if test.high < 0 else "worse" if test.low > 0 else "not told apart"
    )
    counts = {target: best_run(runs, d, FEW[0]).measured["trainable"] for target, d in designs.items()}
    listed = ", ".join(f"{target} r{RANKS[size][target]} ({counts[target]:,}) {mean_interval(row).value:.3f}"
                       for target, row in losses.items())  # fmt: skip
    sentence = f"{listed} nats; all layers against MLP {test.mean:+.3f}: {word} at a margin of {margin:.3f}"
    return Verdict("C13", status, sentence, effect, count(runs, list(designs.values()), FEW), p=min(above, below),
                   control=f"the least gain over the base is {gained:.3f}: {'found' if seen else 'not found'}",
                   plot=u_curves(runs, list(designs.values()), FEW, title="loss by learning rate and placement"))  # fmt: skip
