"""C20. By the end of a long run B has grown past A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import mean_interval, one_sided
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, SIZES, Size
from runner.claims.shared import LWR, best_run, count, lora, unready
from runner.claims.shared import specs as sweep

RANK = 16
MOST = 0.8
SENTENCE = "At the end of a long run the spectral norm of B is larger than that of A."
SOURCE = LWR + ", 'Parametrization'"
PUBLISHED = "so on Tulu 3 and OpenThoughts 3; no share of modules is given"
UNIT = "share of matrices"
METRIC = f"share of adapted matrices with |B| > |A| (largest singular values) after the tuned run at rank {RANK}"
RULE = ("Holds if the share is above 80 % (one-sided t test over seeds, 5 %), fails if it is below 80 %, else "
        "undecided. Control: at the lowest rate of the grid the share must be smaller, since B starts at zero.")  # fmt: skip
TRAPS = (1, 7, 9)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return sweep(size, runs, (RANK,))


def share(run: RunRecord) -> float:
    rows = run.measured["norms"]
    return sum(b > a for _, a, b in rows) / len(rows)


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    design = lora(s, RANK)
    if (missing := unready("C20", runs, [design])) is not None:
        return missing
    best = [best_run(runs, design, seed) for seed in SEEDS]
    shares = [share(run) for run in best]
    effect = mean_interval(shares, unit=UNIT)
    above, below = one_sided(shares, MOST), one_sided(shares, MOST, greater=False)
    lowest = [run for run in runs if replace(run.spec, seed=0) == replace(best[0].spec, lr=s.lora_rates[0], seed=0)]
    slow = mean_interval([share(run) for run in lowest if run.measured.get("norms")]).value if lowest else 1.0
    seen = slow < effect.value
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 else UNDECIDED
    ratios = sorted(b / a for _, a, b in best[0].measured["norms"])
    sentence = (f"|B| > |A| in {effect.value:.0%} of the matrices after {s.steps} steps; |B| / |A| has median "
                f"{ratios[len(ratios) // 2]:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f} (seed 0)")  # fmt: skip
    plot = Plot("|B| over |A| by matrix, seed 0", "matrix, sorted", "ratio of spectral norms",
                (Series("|B| / |A|", tuple(float(i) for i in range(len(ratios))), tuple(ratios), style="points"),), y_log=True)  # fmt: skip
    return Verdict("C20", status, sentence, effect, count(runs, [design]), p=min(above, below), plot=plot,
                   control=f"at {s.lora_rates[0]:.1e} it is {slow:.0%}: {'found' if seen else 'not found'}")  # fmt: skip
