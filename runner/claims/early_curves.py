"""C05. Early in training the rank does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import equivalence, mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, SIZES, Size, loss_at, of_arm
from runner.claims.shared import LWR, lora

EARLY = 20
CLOSE = 0.02
SENTENCE = "At one learning rate the first steps look the same at every rank, and the differences grow with time."
SOURCE = LWR + ", 'Parametrization'"
PUBLISHED = ("the curves at the beginning of training are exactly the same at every rank, so that a bug was "
             "suspected; kenkuuu's runs: at a low rate rank 1 is faster than rank 256")  # fmt: skip
UNIT = "share of the drop"
METRIC = ("held-out loss of each rank minus that of the highest, over the highest rank's drop since the start, after "
          "20 steps at the lowest rate of the grid, mean of seeds; the one furthest from 0 over ranks")  # fmt: skip
RULE = ("Holds if that of every rank lies between -2 and 2 % (two one-sided t tests over seeds, 5 %) and the largest is "
        "further from 0 at the last step than after 20; fails if one lies outside (one-sided, p times two sides and the ranks "
        "compared); else undecided. Control: the middle rate of the grid must differ by more than 2 %.")  # fmt: skip
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
    """(L_rank - L_highest) / (L_0 - L_highest) after `step`, the highest rank at the slow rate."""
    slow, _ = rates(size)
    some, most = path(runs, lora(size, rank), rate, seed), path(runs, lora(size, size.ranks[-1]), slow, seed)
    if some is None or most is None:
        return None
    here, reference, begin = loss_at(some, step), loss_at(most, step), loss_at(most, 0)
    if here is None or reference is None or begin is None or begin <= reference:
        return None
    return (here - reference) / (begin - reference)


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    slow, fast = rates(s)
    if not any(of_arm(runs, lora(s, rank)) for rank in s.ranks):
        return Verdict("C05", NOT_RUN, "no run of it in these records")
    asked = [path(runs, design, design.lr, design.seed) for design in specs(s, runs)]
    n = sum(run is not None for run in asked)

    def gaps(rank: int, rate: float, step: int | None) -> list[float]:
        found = (gap(runs, s, rank, rate, seed, step) for seed in SEEDS)
        return [g for g in found if g is not None]

    early = {rank: gaps(rank, slow, EARLY) for rank in s.ranks[:-1]}
    late = {rank: gaps(rank, slow, None) for rank in s.ranks[:-1]}
    control = gaps(s.ranks[-1], fast, EARLY)
    if any(len(row) < len(SEEDS) for row in (*early.values(), *late.values(), control)):
        return Verdict("C05", UNDECIDED, "a run of these ranks and rates is missing or diverged", n=n)
    worst = max(early, key=lambda rank: abs(mean_interval(early[rank]).value))
    effect = mean_interval(early[worst], unit=UNIT)
    # every rank has to be near, so no rank's p is corrected for the others; one that is far is picked, so it is
    near = max(equivalence(row, CLOSE).p for row in early.values())
    outside = [p for row in early.values() for p in (one_sided(row, CLOSE), one_sided(row, -CLOSE, greater=False))]
    far = min(1.0, len(outside) * min(outside))
    end = max((mean_interval(row).value for row in late.values()), key=abs)
    holds = near if abs(end) > abs(effect.value) else 1.0
    other = mean_interval(control).value
    found = abs(other) > CLOSE
    status = UNDECIDED if not found else HOLDS if holds < 0.05 else FAILS if far < 0.05 else UNDECIDED
    listed = ", ".join(f"rank {rank} {mean_interval(row).value:+.1%}" for rank, row in early.items())
    sentence = (f"after {EARLY} steps at {slow:.1e}, of the drop of rank {s.ranks[-1]}: {listed}; "
                f"after {s.steps} steps up to {end:+.1%}")  # fmt: skip
    return Verdict("C05", status, sentence, effect, n, p=min(holds, far), plot=picture(runs, s, slow),
                   control=f"the rate {fast:.1e} differs by {other:+.1%} after {EARLY} steps: "
                   + ("found" if found else "not found, so this design sees nothing"))  # fmt: skip


def picture(runs: Sequence[RunRecord], size: Size, rate: float) -> Plot:
    series = []
    for rank in size.ranks:
        run = path(runs, lora(size, rank), rate, SEEDS[0])
        steps = [(s, v) for s, v in (run.measured["held_out"] if run else []) if s]
        series.append(Series(f"lora r{rank}", tuple(float(s) for s, _ in steps), tuple(v for _, v in steps)))
    return Plot(
        f"one learning rate, {rate:.1e}, seed {SEEDS[0]}", "step", "held-out nats per token", tuple(series), x_log=True
    )
