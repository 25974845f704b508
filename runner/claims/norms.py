"""C20. By the end of a long run B has grown past A."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import one_sided, ratio_interval
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, SIZES, Size, of_arm
from runner.claims.shared import LWR, best_run, count, lora, unready
from runner.claims.shared import specs as sweep

RANK = 16
MOST = 0.8
TINY = 1e-30  # a B that stayed zero has no log
SENTENCE = "At the end of a long run the spectral norm of B is larger than that of A."
SOURCE = LWR + ", 'Parametrization'"
PUBLISHED = "so on Tulu 3 and OpenThoughts 3; no share of modules is given"
UNIT = "ratio of norms"
METRIC = (f"|B| / |A| (largest singular values) that 80 % of the adapted matrices exceed, after the tuned run at rank "
          f"{RANK}")  # fmt: skip
RULE = ("Holds if that ratio is above 1 (one-sided t test of its log over seeds, 5 %), fails if it is below 1, else "
        "undecided. Control: at the lowest rate of the grid it must be smaller, since B starts at zero.")  # fmt: skip
TRAPS = (1, 7, 9)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return sweep(size, runs, (RANK,))


def exceeded(run: RunRecord) -> float:
    """ln(|B| / |A|) of the matrix below which a fifth of them lie."""
    ratios = sorted(math.log(max(b, TINY) / a) for _, a, b in run.measured["norms"])
    return ratios[math.floor((1 - MOST) * len(ratios))]


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    design = lora(s, RANK)
    if (missing := unready("C20", runs, [design])) is not None:
        return missing
    best = [best_run(runs, design, seed) for seed in SEEDS]
    logs = [exceeded(run) for run in best]
    effect = replace(ratio_interval(logs), unit=UNIT)
    above, below = one_sided(logs), one_sided(logs, greater=False)
    slowest = (run for run in of_arm(runs, design) if (run.spec.lr, run.spec.seed in SEEDS) == (s.lora_rates[0], True))
    lowest = [run for run in slowest if run.measured.get("norms")]
    slow = ratio_interval([exceeded(run) for run in lowest]).value if lowest else math.inf
    seen = slow < effect.value
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 else UNDECIDED
    ratios = sorted(b / a for _, a, b in best[0].measured["norms"])
    larger = sum(ratio > 1 for ratio in ratios)
    sentence = (f"|B| > |A| in {larger} of {len(ratios)} matrices after {s.steps} steps; |B| / |A| has median "
                f"{ratios[len(ratios) // 2]:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f} (seed {SEEDS[0]})")  # fmt: skip
    plot = Plot(f"|B| over |A| by matrix, seed {SEEDS[0]}", "matrix, sorted", "ratio of spectral norms",
                (Series("|B| / |A|", tuple(float(i) for i in range(len(ratios))), tuple(ratios), style="points"),), y_log=True)  # fmt: skip
    return Verdict("C20", status, sentence, effect, count(runs, [design]), p=min(above, below), plot=plot,
                   control=f"at {s.lora_rates[0]:.1e} it is {slow:.2f}: {'found' if seen else 'not found'}")  # fmt: skip
