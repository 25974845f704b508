"""C11. How many bits an adapter's parameter can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import mean_interval, one_sided, slope_by_group
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SIZES, Size, arm, loss_at, mean_points, of_arm
from runner.claims.shared import count

#: fresh ones: with 6 to 8 the best rate was the lowest and 300 exposures were too few, with 11 to 13 the best rate of one
#: seed was the highest
SEEDS = (21, 22, 23)
RANKS = (1, 4)
RATES = (8e-4, 1.6e-3, 3.2e-3)
MOST_RATES = 8
FACTS, VALUE, BATCH, EXPOSURES = 150, 8, 50, 500  # facts and samples a step, per rank; tokens of a value
ACCEPTED = (1.7, 2.75)
PLATEAU = 0.1
SENTENCE = "A LoRA adapter memorises about two bits per trained parameter, in proportion to their number."
SOURCE = "Tan 2026, arXiv:2607.21351, for adapters; Allen-Zhu and Li 2024, arXiv:2404.05405, as the paper cites it"
PUBLISHED = ("1.71 to 2.75 bits at rank 1 to 16 on 2M and 8M bases (Tan); 0.05 to 0.44 on 20M to 1B bases (Nguyen 2026); "
             "2 in full training with 1000 exposures (Allen-Zhu and Li)")  # fmt: skip
UNIT = "bits per parameter"
METRIC = (f"random facts of {VALUE} tokens after {EXPOSURES} exposures: (their information - negative log-likelihood), "
          f"over trained parameters, at rank {RANKS[-1]} and the rate that is best in the mean over seeds")  # fmt: skip
RULE = ("Holds if the 95 % t interval over seeds lies inside 1.7 to 2.75, fails if it lies outside; undecided if it "
        "straddles an end, if the second half of the exposures still adds more than 10 %, or if the best rate is the lowest "
        "or the highest. Control: "
        "the same adapter on a base of random weights must hold less.")  # fmt: skip
TRAPS = (1, 2, 4, 5, 15, 20)


def design(size: Size, rank: int, init: str = "pretrained") -> RunSpec:
    """More facts than the adapter is expected to hold, in proportion to its rank; 8 value tokens are 88 bits."""
    steps = EXPOSURES * FACTS // BATCH
    return arm(size, "lora", rank, base=size.narrow, task="facts", targets=("all-linear",), init=init, steps=steps,
               task_args=(("n", FACTS * rank), ("value_tokens", VALUE)), seq_len=16, micro_batch=BATCH * rank,
               eval_at=(steps // 2,))  # fmt: skip


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    """Each arm at its rates, and, once these have ended, at a rate beyond the end at which the best mean lies."""
    arms = [*(design(size, rank) for rank in RANKS), design(size, RANKS[0], "random")]
    return [replace(one, lr=rate, seed=seed) for one in arms for rate in rates(runs, one) for seed in SEEDS]


def rates(runs: Sequence[RunRecord], one: RunSpec) -> list[float]:
    """What an arm is run at so far: a factor of 2 beyond an end that is the best, until it is none."""
    known = mean_points(runs, one, SEEDS)
    finite = {rate: loss for rate, loss in known.items() if loss is not None}
    found = set(RATES)
    if finite and found <= set(known):
        found |= set(known)
        best_one = min(finite, key=lambda rate: finite[rate])
        if len(found) < MOST_RATES and best_one in (min(found), max(found)):
            found.add(2 * best_one if best_one == max(found) else best_one / 2)
    return sorted(found)


def bits(run: RunRecord, step: int | None) -> float | None:
    """Bits that the run holds after `step`: what the values tell, less what they still cost; below 0 counts too."""
    nats = loss_at(run, step)
    facts = run.measured["task"]
    tokens = facts["trained_tokens"]
    return None if nats is None else tokens * (math.log2(facts["alphabet"]) - nats / math.log(2))


def best(runs: Sequence[RunRecord], one: RunSpec, seed: int) -> RunRecord | None:
    """The run of a seed at the arm's rate; None where a run is missing or diverged."""
    known = {rate: loss for rate, loss in mean_points(runs, one, SEEDS).items() if loss is not None}
    if set(known) < set(RATES):
        return None
    rate = min(known, key=lambda r: known[r])
    return next(run for run in of_arm(runs, one) if (run.spec.seed, run.spec.lr) == (seed, rate))


def density(run: RunRecord, step: int | None = None) -> float:
    return (bits(run, step) or 0.0) / run.measured["trainable"]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    arms = {rank: design(s, rank) for rank in RANKS}
    control = design(s, RANKS[0], "random")
    n = count(runs, [*arms.values(), control], SEEDS)
    if not n:
        return Verdict("C11", NOT_RUN, "no run of it in these records")
    found = {rank: [best(runs, one, seed) for seed in SEEDS] for rank, one in arms.items()}
    known = {rank: [run for run in row if run] for rank, row in found.items()}
    if any(len(row) < len(SEEDS) for row in known.values()):
        return Verdict("C11", UNDECIDED, "a run is missing or diverged", n=n)
    per = {rank: [density(run) for run in row] for rank, row in known.items()}
    effect = mean_interval(per[RANKS[-1]], unit=UNIT)
    half = arms[RANKS[-1]].steps // 2
    grown = mean_interval([density(run) / max(density(run, half), 1e-9) - 1 for run in known[RANKS[-1]]])
    x = [math.log(rank) for rank in RANKS]
    power = slope_by_group(
        [(x, [math.log(max(per[rank][i] * rank, 1e-9)) for rank in RANKS]) for i in range(len(SEEDS))]
    )
    floor = [density(run) for seed in SEEDS if (run := best(runs, control, seed))]
    seen = len(floor) == len(SEEDS) and one_sided([a - b for a, b in zip(per[RANKS[0]], floor, strict=True)]) < 0.05
    low, high = ACCEPTED
    status = (
        HOLDS
        if low <= effect.low and effect.high <= high
        else FAILS
        if effect.high < low or effect.low > high
        else UNDECIDED
    )
    chosen = {run.spec.lr for run in known[RANKS[-1]]}
    tried = list(mean_points(runs, arms[RANKS[-1]], SEEDS))
    at_end = sorted(chosen & {tried[0], tried[-1]})
    if not seen or grown.value > PLATEAU or at_end:
        status = UNDECIDED
    listed = ", ".join(f"rank {rank} {mean_interval(row).value:.2f}" for rank, row in per.items())
    sentence = (f"bits a parameter: {listed}; bits grow as rank^{power.value:.2f} [{power.low:.2f}, {power.high:.2f}]; "
                f"the second half of {EXPOSURES} exposures added {grown.value:.1%}"
                + (f"; the best rate, {at_end[0]:.2g}, is at the end of the grid" if at_end else ""))  # fmt: skip
    said = (
        f"on random weights {mean_interval(floor).value:.2f} at rank {RANKS[0]}: {'found' if seen else 'not found'}"
        if floor
        else "not run"
    )
    p = min(max(one_sided(per[RANKS[-1]], low), one_sided(per[RANKS[-1]], high, greater=False)),
            one_sided(per[RANKS[-1]], low, greater=False), one_sided(per[RANKS[-1]], high))  # fmt: skip
    plot = Plot("bits held by rank", "rank", "bits", (Series("held", tuple(map(float, RANKS)), tuple(
        mean_interval([bits(run, None) or 0.0 for run in known[rank]]).value for rank in RANKS), style="points"),), True, True)  # fmt: skip
    return Verdict("C11", status, sentence, effect, n, p=p, control=said, plot=plot)
