"""C18. Rewards carry few bits, so an RL adapter may be far smaller than a supervised one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import mean_interval
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims import rl_rank_one
from runner.claims.lab import SEEDS, SIZES, Size, arm, mean_points, of_arm, start
from runner.claims.shared import LWR, best_run, count, full, lora, unready

#: adapters smaller than rank 1 everywhere: B of the key projections alone; rank 1 on attention
TINY = (("lora-fa", ("k_proj",)), ("lora", ("attention",)))
RATES = (2e-3, 8e-3, 3.2e-2, 1.28e-1)
TIMES, HALF = 10.0, 0.5
SENTENCE = "RL needs at least ten times fewer adapter parameters than supervised learning for half of the gain."
SOURCE = LWR + ", 'How much capacity is needed by supervised and reinforcement learning?'"
PUBLISHED = ("at most one bit an episode, so rank 1 is ample; TinyLoRA (arXiv 2602.04118): 13 parameters carry GSM8K "
             "from 76 to 91 %, supervised updates need 100 to 1000 times more")  # fmt: skip
UNIT = "ratio of parameters"
METRIC = ("smallest adapter with half of full fine-tuning's gain, supervised over RL, each adapter at the best of its "
          "rates by the mean of three seeds")  # fmt: skip
RULE = ("Holds if the ratio is at least 10, also as a lower bound where the smallest adapter tried is already enough in RL; fails if it "
        "is below 10; undecided where no adapter reaches half of the supervised gain at an optimum, unless the bound settles it. "
        "Control: the smallest adapter must not reach half of the supervised gain.")  # fmt: skip
TRAPS = (2, 4, 5, 7, 16)


def tiny(size: Size, rl: bool) -> list[RunSpec]:
    if rl:
        return [rl_rank_one.design(size, method, 1, targets=targets) for method, targets in TINY]
    return [arm(size, method, 1, targets=targets) for method, targets in TINY]


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    found = [
        replace(d, lr=rate, seed=seed)
        for rl in (True, False)
        for d in tiny(size, rl)
        for rate in RATES
        for seed in SEEDS
    ]
    return [*found, *rl_rank_one.specs(size, runs)]


def share(runs: Sequence[RunRecord], design: RunSpec, reference: float) -> tuple[int, float] | None:
    """(trained parameters, share of the reference gain) at the best rate of the grid."""
    known = [v for v in mean_points(runs, design, SEEDS).values() if v is not None]
    if not known:
        return None
    gain = abs((max(known) if design.objective == "rl" else min(known)) - start(runs, design))
    return int(of_arm(runs, design)[0].measured["trainable"]), gain / reference


def ladder(runs: Sequence[RunRecord], size: Size, rl: bool) -> list[tuple[int, float]]:
    """Parameters and share of full fine-tuning's gain, from the smallest adapter up."""
    whole = rl_rank_one.design(size) if rl else full(size)
    known = [v for v in mean_points(runs, whole, SEEDS).values() if v is not None]
    if not known:
        return []
    reference = abs((max(known) if rl else min(known)) - start(runs, whole))
    ranks = rl_rank_one.RANKS if rl else size.ranks
    larger = [rl_rank_one.design(size, "lora", rank) if rl else lora(size, rank) for rank in ranks]
    return sorted(found for d in (*tiny(size, rl), *larger) if (found := share(runs, d, reference)))


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    small = [*tiny(s, True), *tiny(s, False)]
    n = count(runs, small)
    if not n:
        return Verdict("C18", NOT_RUN, "no run of it in these records")
    steps = {rl: ladder(runs, s, rl) for rl in (True, False)}
    plot = Plot("share of full fine-tuning's gain by adapter size", "trained parameters", "share of the gain", tuple(
        Series("RL" if rl else "supervised", tuple(float(p) for p, _ in found), tuple(v for _, v in found), style="points")
        for rl, found in steps.items()), x_log=True)  # fmt: skip
    enough = {rl: next((p for p, v in found if v >= HALF), None) for rl, found in steps.items()}
    told = "; ".join(
        f"{'RL' if rl else 'supervised'} " + ", ".join(f"{p:,} {v:.0%}" for p, v in found)
        for rl, found in steps.items()
    )
    sentence = f"share of full's gain by trained parameters: {told}{bits(runs, s)}"
    if len(steps[True]) < 3 or len(steps[False]) < 3 or enough[True] is None:
        return Verdict("C18", UNDECIDED, sentence, n=n, plot=plot)
    first = steps[False][0]
    seen = first[1] < HALF
    ratio = (enough[False] or steps[False][-1][0]) / enough[True]
    bound = enough[False] is None or enough[True] == steps[True][0][0]
    effect = replace(mean_interval([ratio], unit=UNIT), low=ratio if bound else ratio / 2)
    status = UNDECIDED if not seen else HOLDS if ratio >= TIMES else UNDECIDED if bound else FAILS
    return Verdict("C18", status, sentence + f"; ratio {'at least ' if bound else ''}{ratio:.0f}", effect, n, plot=plot,
                   control=f"{first[0]:,} parameters reach {first[1]:.0%} supervised: {'found' if seen else 'not found'}")  # fmt: skip


def bits(runs: Sequence[RunRecord], size: Size) -> str:
    """The most that the rewards of the tuned rank 1 run can have told it, beside its parameters."""
    design = rl_rank_one.design(size, "lora", 1)
    if unready("C18", runs, [design]) is not None:
        return ""
    run = best_run(runs, design, SEEDS[0])
    told = sum(step["reward_bits"] for step in run.measured["step_facts"])
    episodes = run.spec.steps * run.spec.batch * run.spec.group
    return (f"; rewards of the tuned rank 1 run: {told:,.0f} bits in {episodes:,} episodes ({told / episodes:.2f} each), "
            f"{run.measured['trainable']:,} parameters")  # fmt: skip
