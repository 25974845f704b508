"""C05. Early in training the rank does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, SIZES, Size, loss_at, of_arm
from runner.claims.shared import LWR, count, lora

EARLY = 20
CLOSE = 0.02
SENTENCE = "At one learning rate the first steps look the same at every rank, and the differences grow with time."
SOURCE = LWR + ", 'Parametrization'"
PUBLISHED = ("the curves at the beginning of training are exactly the same at every rank, so that a bug was "
             "suspected; kenkuuu's runs: at a low rate rank 1 is faster than rank 256")  # fmt: skip
UNIT = "share of the drop"
METRIC = ("held-out loss of each rank minus that of the highest, over the highest rank's drop since the start, after "
          "20 steps at the lowest rate of the grid; the largest over ranks")  # fmt: skip
RULE = ("Holds if the largest absolute difference is below 2 % of the drop (one-sided t test over seeds, 5 %) and is "
        "larger at the last step than after 20; fails if it is above 2 % (p times the ranks compared); else undecided. "
        "Control: the middle rate of the grid must differ by more than 2 %.")  # fmt: skip
TRAPS = (1, 5, 7, 9)


def rates(size: Size) -> tuple[float, float]:
    return size.lora_rates[0], size.lora_rates[2]


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    slow, fast = rates(size)
    found = [replace(lora(size, rank), lr=slow, seed=seed) for rank in size.ranks for seed in SEEDS]
    return found + [replace(lora(size, size.ranks[-1]), lr=fast, seed=seed) for seed in SEEDS]


def path(runs: Sequence[RunRecord], design: RunSpec, rate: float, seed: int) -> RunRecord | None:
    return next((r for r in of_arm(runs, design) if r.is_final and (r.spec.lr, r.spec.seed) == (rate, seed)), None)


def gap(runs: Sequence[RunRecord], size: Size, rank: int, rate: float, seed: int, step: int | None) -> float | None:
    """|L_rank - L_highest| / (L_0 - L_highest) after `step`, the highest rank at the slow rate."""
    slow, _ = rates(size)
    some, most = path(runs, lora(size, rank), rate, seed), path(runs, lora(size, size.ranks[-1]), slow, seed)
    if some is None or most is None:
        return None
    here, reference, begin = loss_at(some, step), loss_at(most, step), loss_at(most, 0)
    if here is None or reference is None or begin is None or begin <= reference:
        return None
    return abs(here - reference) / (begin - reference)


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    slow, fast = rates(s)
    designs = [lora(s, rank) for rank in s.ranks]
    if not any(of_arm(runs, d) for d in designs):
        return Verdict("C05", NOT_RUN, "no run of it in these records")
    early = {rank: [gap(runs, s, rank, slow, seed, EARLY) for seed in SEEDS] for rank in s.ranks[:-1]}
    late = {rank: [gap(runs, s, rank, slow, seed, None) for seed in SEEDS] for rank in s.ranks[:-1]}
    control = [gap(runs, s, s.ranks[-1], fast, seed, EARLY) for seed in SEEDS]
    if any(g is None for row in (*early.values(), *late.values(), control) for g in row):
        return Verdict(
            "C05", UNDECIDED, "a run of these ranks and rates is missing or diverged", n=count(runs, designs)
        )
    known = {rank: [g for g in row if g is not None] for rank, row in early.items()}
    worst = max(known, key=lambda rank: mean_interval(known[rank]).value)
    effect = mean_interval(known[worst], unit=UNIT)
    below = one_sided(known[worst], CLOSE, greater=False)
    above = min(1.0, len(known) * one_sided(known[worst], CLOSE))  # the worst of them was picked
    end = mean_interval([g for g in late[worst] if g is not None]).value
    other = mean_interval([g for g in control if g is not None])
    found = other.value > CLOSE
    status = (
        UNDECIDED
        if not found
        else HOLDS
        if below < 0.05 and end > effect.value
        else FAILS
        if above < 0.05
        else UNDECIDED
    )
    listed = ", ".join(f"rank {rank} {mean_interval(row).value:.1%}" for rank, row in known.items())
    sentence = (f"after {EARLY} steps at {slow:.1e}, of the drop of rank {s.ranks[-1]}: {listed}; "
                f"after {s.steps} steps rank {worst} is {end:.1%} off")  # fmt: skip
    return Verdict("C05", status, sentence, effect, count(runs, designs), p=min(below, above),
                   control=f"the rate {fast:.1e} differs by {other.value:.1%} after {EARLY} steps: "
                   + ("found" if found else "not found, so this design sees nothing"), plot=picture(runs, s, slow))  # fmt: skip


def picture(runs: Sequence[RunRecord], size: Size, rate: float) -> Plot:
    series = []
    for rank in size.ranks:
        run = path(runs, lora(size, rank), rate, SEEDS[0])
        steps = [(s, v) for s, v in (run.measured["held_out"] if run else []) if s]
        series.append(Series(f"lora r{rank}", tuple(float(s) for s, _ in steps), tuple(v for _, v in steps)))
    return Plot(
        f"one learning rate, {rate:.1e}, seed {SEEDS[0]}", "step", "held-out nats per token", tuple(series), x_log=True
    )
