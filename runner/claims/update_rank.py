"""C22. What generalises needs few directions, facts need many."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrate.stats import mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, SIZES, Size, arm, of_arm
from runner.claims.shared import best_run, count, lora, unready
from runner.claims.shared import specs as sweep

RANK = 16
FEW, MANY = 3.0, 8.0
SENTENCE = "The update of a task that generalises has an effective rank of three or less, that of random facts one of eight or more."
SOURCE = "Nguyen 2026, 'Capacity of a LoRA Adapter'; effective rank as in Roy and Vetterli 2007"
PUBLISHED = "1 to 3 on three tasks, about 14 on random facts, adapters of rank 16"
UNIT = "effective rank"
METRIC = f"median over matrices of exp(entropy of the singular values of B A), tuned run on the shift, rank {RANK}"
RULE = ("Holds if it is below 3 (one-sided t test over seeds, 5 %) and that of the facts above 8; fails if it is above 3 or "
        "the facts' below 8 (p doubled for two chances); else undecided. Control: by the same computation a random "
        "product of rank 16 must have more than 8, one of rank 2 at most 3.")  # fmt: skip
TRAPS = (1, 2, 5)


def facts(size: Size) -> RunSpec:
    return arm(size, "lora", RANK, task="facts", task_args=(("n", 600), ("value_tokens", 8)), seq_len=16, micro_batch=100,
               steps=300, eval_at=(), lr=size.lora_rates[2])  # fmt: skip


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return [*sweep(size, runs, (RANK,)), *(replace(facts(size), seed=seed) for seed in SEEDS)]


def median_rank(run: RunRecord) -> float:
    return statistics.median(row[1] for row in run.measured["update"])


def instrument(hidden: int) -> tuple[float, float]:
    """Effective ranks of B A with normal entries, of rank RANK and of rank 2: what the measure says of a high and
    of a low rank at this width."""
    draw = np.random.default_rng(0)
    found = []
    for rank in (RANK, 2):
        s = np.linalg.svd(draw.normal(size=(hidden, rank)) @ draw.normal(size=(rank, hidden)), compute_uv=False)[:rank]
        share = s / s.sum()
        found.append(float(np.exp(-(share * np.log(share)).sum())))
    return found[0], found[1]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    design, other = lora(s, RANK), facts(s)
    n = count(runs, [design, other])
    if (missing := unready("C22", runs, [design])) is not None:
        return missing
    memorised = sorted(
        (r for r in of_arm(runs, other) if r.spec.seed in SEEDS and r.final_loss is not None),
        key=lambda run: run.spec.seed,
    )
    if len(memorised) < len(SEEDS):
        return Verdict("C22", UNDECIDED, "a run of the facts is missing or diverged", n=n)
    tuned = [best_run(runs, design, seed) for seed in SEEDS]
    shift, fact = [median_rank(run) for run in tuned], [median_rank(run) for run in memorised]
    effect = mean_interval(shift, unit=UNIT)
    low, high = one_sided(shift, FEW, greater=False), one_sided(fact, MANY)
    against = min(1.0, 2 * min(one_sided(shift, FEW), one_sided(fact, MANY, greater=False)))
    random, narrow = instrument(int(tuned[0].config["hidden_size"]))
    seen = random > MANY and narrow <= FEW
    status = UNDECIDED if not seen else HOLDS if max(low, high) < 0.05 else FAILS if against < 0.05 else UNDECIDED
    lost = mean_interval([run.measured["rank_one_nats"] - (run.final_loss or 0.0) for run in tuned])
    forgot = mean_interval([run.measured["rank_one_nats"] - (run.final_loss or 0.0) for run in memorised])
    sentence = (f"shift {effect.value:.1f}, facts {mean_interval(fact).value:.1f} of {RANK}; keeping each adapter's "
                f"strongest direction alone costs {lost.value:.3f} nats on the shift, {forgot.value:.3f} on the facts")  # fmt: skip
    rows = {"shift": tuned[0], "facts": memorised[0]}
    plot = Plot(f"effective rank by matrix, seed {SEEDS[0]}", "matrix, sorted", "effective rank", tuple(
        Series(label, tuple(float(i) for i in range(len(run.measured["update"]))),
               tuple(sorted(row[1] for row in run.measured["update"])), style="points") for label, run in rows.items()))  # fmt: skip
    return Verdict("C22", status, sentence, effect, n, p=min(max(low, high), against), plot=plot,
                   control=f"a random product of rank {RANK} has {random:.1f}, one of rank 2 {narrow:.1f}: {'found' if seen else 'not found'}")  # fmt: skip
