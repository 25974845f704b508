"""Under Adam the init and the rates of A and B are three numbers with the effect of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_planner.ledger import exact
from lora_planner.method import DEFAULT_ALPHA
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.toy import Array, losses

SENTENCE = (
    "under Adam with eps = 0, (alpha, init A, LR A, LR B) and (alpha / (p q), p init A, p LR A, q LR B) train alike"
)
SOURCE = "LoRA Without Regret (2025), on parametrization invariances"
PUBLISHED = "equal for every p and q; for eps > 0 scale eps by 1 / q. An earlier check by numpy: 9e-16 nats"
UNIT = "nats"
METRIC = "largest difference of training loss over 200 steps of float64, against the unscaled parametrization"
SAME, DIFFERENT, VISIBLE = 1e-9, 1e-3, 1e-7
RULE = (
    f"holds where every pair (p, q) stays below {SAME:g} nats, with eps = 0 and with eps = 1e-8 scaled as the gradients "
    f"are, 1 / p in A and 1 / q in B; fails where one does not; undecided where a control is blind: without p on LR A "
    f"every pair must exceed {DIFFERENT:g} nats, and with eps = 1e-8 not scaled one must exceed {VISIBLE:g}"
)
TRAPS = (7,)

PAIRS = ((3.0, 0.5), (0.1, 7.0), (0.3, 0.2))
RANK, STEPS, RATE, EPS = 8, 200, 1e-3, 1e-8


def specs(size: Any, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return []


def plain(eps: float = 0.0) -> Array:
    return losses(RANK, STEPS, RATE, RATE, eps_a=eps, eps_b=eps)


def scaled(p: float, q: float, rate_p: float | None = None, eps_a: float = 0.0, eps_b: float = 0.0) -> Array:
    """Losses of the scaled parametrization; `rate_p` instead of p on the rate of A."""
    rate_a = (p if rate_p is None else rate_p) * RATE
    return losses(RANK, STEPS, rate_a, q * RATE, alpha=DEFAULT_ALPHA / (p * q), init=p, eps_a=eps_a, eps_b=eps_b)


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    """`gaps`: [pair, step] of |difference|, by what was scaled."""
    zero, small = plain(), plain(EPS)
    gaps = {
        "all": [abs(scaled(p, q) - zero) for p, q in PAIRS],
        "LR A not scaled": [abs(scaled(p, q, rate_p=1.0) - zero) for p, q in PAIRS],
        "eps not scaled": [abs(scaled(p, q, eps_a=EPS, eps_b=EPS) - small) for p, q in PAIRS],
        "eps by 1 / q": [abs(scaled(p, q, eps_a=EPS / q, eps_b=EPS / q) - small) for p, q in PAIRS],
        "eps by 1 / p in A, 1 / q in B": [abs(scaled(p, q, eps_a=EPS / p, eps_b=EPS / q) - small) for p, q in PAIRS],
    }
    worst = {name: float(np.max(some)) for name, some in gaps.items()}
    least = min(float(gap.max()) for gap in gaps["LR A not scaled"])
    kept = worst["eps by 1 / p in A, 1 / q in B"]
    sees = least > DIFFERENT and worst["eps not scaled"] > VISIBLE
    status = UNDECIDED if not sees else HOLDS if max(worst["all"], kept) < SAME else FAILS
    sentence = (
        f"losses of {len(PAIRS)} pairs (p, q) differ by at most {worst['all']:.1e} nats in {STEPS} steps; with eps = "
        f"{EPS:g} by {worst['eps not scaled']:.1e}, with eps scaled by 1 / p in A and 1 / q in B by {kept:.1e}, with "
        f"one eps scaled by 1 / q, as published, by {worst['eps by 1 / q']:.1e}: A's gradient scales with 1 / p"
    )
    control = f"with LR A not scaled every pair differs by {least:.2g} nats or more"
    steps = np.arange(STEPS + 1)
    series = []
    for name, some in gaps.items():
        height = np.max(some, axis=0)
        shown = height > 0  # the picture's axis is logarithmic
        series.append(Series(name, tuple(map(float, steps[shown])), tuple(map(float, height[shown]))))
    plot = Plot("Scaled against not scaled", "step", "difference of loss (nats)", tuple(series), y_log=True)
    return Verdict("C03", status, sentence, exact(worst["all"], UNIT), len(PAIRS), control=control, plot=plot)
