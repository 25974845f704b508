"""C18. Rewards carry few bits, so an RL adapter may be far smaller than a supervised one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from calibrate import curves
from calibrate.stats import mean_interval, one_sided, ratio_interval
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims import rl_rank_one
from runner.claims.lab import SIZES, STEP, Size, arm, mean_points, negated, of_arm, points, start
from runner.claims.shared import LWR, count, full, lora, name

#: fresh ones: with those before them it was seen that one seed of one arm without a parabola left all undecided
SEEDS = (11, 12, 13, 14, 15)
#: adapters smaller than rank 1 everywhere: B of the key projections alone; rank 1 on attention
TINY = (("lora-fa", ("k_proj",)), ("lora", ("attention",)))
#: grids to begin with, by earlier seeds: of adapters in supervised learning, of the smallest in RL
RATES, SMALLEST_RATES = (6.3e-4, 1e-3, 1.6e-3, 2.5e-3, 4e-3), (3.2e-3, 5e-3, 8e-3, 1.25e-2, 2e-2)
TIMES, HALF = 10.0, 0.5
SENTENCE = "RL needs at least ten times fewer adapter parameters than supervised learning for half of the gain."
SOURCE = LWR + ", 'How much capacity is needed by supervised and reinforcement learning?'"
PUBLISHED = ("at most one bit an episode, so rank 1 is ample; TinyLoRA (arXiv 2602.04118): 13 parameters carry GSM8K "
             "from 76 to 91 %, supervised updates need 100 to 1000 times more")  # fmt: skip
UNIT = "ratio of parameters"
METRIC = ("adapter size at which half of full fine-tuning's gain is reached, supervised over RL; each arm at the rate that is "
          "best in the mean over seeds, sizes between two adapters by the line of the gain over ln(parameters)")  # fmt: skip
RULE = ("Adapters up to rank 1. Holds if the ratio is above 10 (one-sided t test of its log over seeds, 5 %), fails if it is below 10; "
        "where the smallest adapter is already enough in RL, or rank 1 not yet in supervised learning, the ratio is a "
        "lower bound, which can hold and not fail; else undecided, also where the parabola through an arm's means has no "
        "lowest point between two finite rates on each side, full fine-tuning gains nothing or no RL adapter reaches half. "
        "Control: the smallest adapter must not reach half of the supervised gain, in any seed.")  # fmt: skip
TRAPS = (2, 4, 5, 7, 16)


def ladder(size: Size, rl: bool) -> list[RunSpec]:
    """Adapters from the smallest up to rank 1."""
    if rl:
        tiny = [rl_rank_one.design(size, method, 1, targets=targets) for method, targets in TINY]
        return [*tiny, rl_rank_one.design(size, "lora", 1)]
    tiny = [arm(size, method, 1, targets=targets) for method, targets in TINY]
    return [*tiny, lora(size, 1)]


def whole(size: Size, rl: bool) -> RunSpec:
    return rl_rank_one.design(size) if rl else full(size)


def designs(size: Size) -> list[RunSpec]:
    return [design for rl in (True, False) for design in (whole(size, rl), *ladder(size, rl))]


def begin(size: Size, design: RunSpec) -> tuple[float, ...]:
    """The grid of an arm to begin with."""
    rl = design.objective == "rl"
    if design.method == "full":
        return rl_rank_one.FULL_RATES if rl else size.full_rates
    if not rl:
        return RATES
    return SMALLEST_RATES if design.method == "lora-fa" else rl_rank_one.LORA_RATES


def signed(runs: Sequence[RunRecord], design: RunSpec) -> dict[float, float | None]:
    """Means over seeds as something to minimise."""
    known = mean_points(runs, design, SEEDS)
    return negated(known) if design.objective == "rl" else known


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    """Each arm at its rates, and, once these have ended, at what lies beyond an end at which the best mean lies."""
    found = []
    for design in designs(size):
        known, rates = signed(runs, design), set(begin(size, design))
        if rates <= set(known):
            rates |= {*known, *curves.missing_rates(known, STEP)}
        found += [replace(design, lr=rate, seed=seed) for seed in SEEDS for rate in sorted(rates)]
    return found


def tuned(runs: Sequence[RunRecord], design: RunSpec) -> float | None:
    """The rate of the best mean; None where it is not known to be that."""
    known = signed(runs, design)
    best = curves.best_rate(known)
    if best is None or not best.bracketed:
        return None
    losses = {rate: loss for rate, loss in known.items() if loss is not None}
    return min(losses, key=lambda rate: losses[rate])


def tuned_run(runs: Sequence[RunRecord], design: RunSpec, seed: int) -> RunRecord:
    """The run of a seed at its arm's rate."""
    rate = tuned(runs, design)
    return next(run for run in of_arm(runs, design) if run.spec.seed == seed and run.spec.lr == rate)


def gain(runs: Sequence[RunRecord], design: RunSpec, seed: int) -> float:
    """Reward above, or nats below, those before the first step."""
    sign = 1.0 if design.objective == "rl" else -1.0
    end = points(runs, design, seed)[tuned_run(runs, design, seed).spec.lr]
    assert end is not None  # a mean has all seeds
    return sign * (end - start(runs, design))


def steps(runs: Sequence[RunRecord], size: Size, rl: bool, seed: int) -> list[tuple[int, float]]:
    """(trained parameters, share of full fine-tuning's gain) of each adapter."""
    reference = gain(runs, whole(size, rl), seed)
    sizes = [int(tuned_run(runs, d, seed).measured["trainable"]) for d in ladder(size, rl)]
    return [(n, gain(runs, d, seed) / reference) for n, d in zip(sizes, ladder(size, rl), strict=True)]


def enough(found: Sequence[tuple[int, float]]) -> tuple[float, str]:
    """(parameters at which HALF is reached, "" or which bound that is: "above" where the smallest adapter already
    reaches it, so that fewer may do; "below" where none does).

    >>> enough([(100, 0.25), (10000, 0.75)])
    (1000.0, '')
    >>> enough([(256, 0.1), (190464, 0.4)])
    (190464.0, 'below')
    """
    if found[0][1] >= HALF:
        return float(found[0][0]), "above"
    for (few, low), (many, high) in pairwise(found):
        if high >= HALF:
            return round(few * (many / few) ** ((HALF - low) / (high - low)), 6), ""
    return float(found[-1][0]), "below"


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    n = count(runs, designs(s), SEEDS)
    if not n:
        return Verdict("C18", NOT_RUN, "no run of it in these records")
    for design in designs(s):
        if tuned(runs, design) is None:
            where = (
                f"{'RL' if design.objective == 'rl' else 'supervised'}, {name(design)} on {','.join(design.targets)}"
            )
            return Verdict("C18", UNDECIDED, f"{where}: the means over seeds have no lowest point between two finite rates on "
                           "each side", n=n)  # fmt: skip
    if min(gain(runs, whole(s, rl), seed) for rl in (True, False) for seed in SEEDS) <= 0:
        return Verdict("C18", UNDECIDED, "full fine-tuning gains nothing in some seed", n=n)
    found = {rl: [steps(runs, s, rl, seed) for seed in SEEDS] for rl in (True, False)}
    halves = {rl: [enough(row) for row in rows] for rl, rows in found.items()}
    logs = [math.log(b[0] / a[0]) for a, b in zip(halves[True], halves[False], strict=True)]
    kinds = {rl: {kind for _, kind in row} for rl, row in halves.items()}
    if "below" in kinds[True]:
        return Verdict("C18", UNDECIDED, "no RL adapter reaches half of full fine-tuning's gain, in some seed", n=n)
    bound = "above" in kinds[True] or "below" in kinds[False]
    effect = replace(ratio_interval(logs), unit=UNIT)
    if bound:
        effect = replace(effect, high=math.inf)
    above, below = one_sided(logs, math.log(TIMES)), one_sided(logs, math.log(TIMES), greater=False)
    first = mean_interval([row[0][1] for row in found[False]]).value
    seen = "above" not in kinds[False]
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 and not bound else UNDECIDED
    told = "; ".join(
        ("RL " if rl else "supervised ")
        + ", ".join(
            f"{rows[0][i][0]:,} {mean_interval([row[i][1] for row in rows]).value:.0%}" for i in range(len(rows[0]))
        )
        for rl, rows in found.items()
    )
    sentence = (f"share of full's gain by trained parameters: {told}; half of it takes {'at least ' if bound else ''}"
                f"{effect.value:.0f} times fewer in RL{bits(runs, s)}")  # fmt: skip
    series = tuple(
        Series("RL" if rl else "supervised", tuple(float(p) for p, _ in rows[0]),
               tuple(mean_interval([row[i][1] for row in rows]).value for i in range(len(rows[0]))))
        for rl, rows in found.items()
    )  # fmt: skip
    plot = Plot("share of full fine-tuning's gain by adapter size", "trained parameters", "share", series, x_log=True)
    return Verdict("C18", status, sentence, effect, n, p=above if bound else min(above, below), plot=plot,
                   control=f"{found[False][0][0][0]:,} parameters reach {first:.0%} supervised: {'found' if seen else 'not found'}")  # fmt: skip


def bits(runs: Sequence[RunRecord], size: Size) -> str:
    """The most that the rewards of the tuned rank 1 run can have told it, beside its parameters."""
    run = tuned_run(runs, rl_rank_one.design(size, "lora", 1), SEEDS[0])
    told = sum(step["reward_bits"] for step in run.measured["step_facts"])
    episodes = run.spec.steps * run.spec.batch * run.spec.group
    return (f"; rewards of the tuned rank 1 run: {told:,.0f} bits in {episodes:,} episodes ({told / episodes:.2f} each), "
            f"{run.measured['trainable']:,} parameters")  # fmt: skip
