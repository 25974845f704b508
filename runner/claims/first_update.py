"""The first update does not depend on the rank, except for its scatter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from lora_planner.ledger import FITTED, Estimate
from lora_planner.method import lora, rslora
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.toy import Array, losses

SENTENCE = (
    "with alpha / r the first update changes the loss equally at every rank in the mean over inits of A, and its scatter "
    "falls as 1 / sqrt(r)"
)
SOURCE = "LoRA Without Regret (2025), on optimal learning rate and rank"
PUBLISHED = (
    "the product of B and A is a mean of r updates of one distribution: equal mean at every rank, scatter as "
    "1 / sqrt(r). Others saw rank 1 learn faster than 256 at one low rate (kenkuuu, 200 steps, one seed)"
)
UNIT = "change at rank 1 / change at rank 64"
METRIC = "change of the loss of one fixed batch by Adam's first step"
ERRORS, MARGIN, SLOPE, SLOPE_MARGIN, LEVEL = 3.0, 0.1, -0.5, 0.1, 0.05
RULE = (
    f"fails where the mean of a rank is over {ERRORS:g} standard errors from that of the largest; else undecided where a "
    f"difference of {MARGIN:.0%} cannot be excluded (one-sided, level {LEVEL}); else holds where log scatter falls with "
    f"log rank at a slope of {SLOPE} +- {SLOPE_MARGIN}, fails where not. Undecided, whatever the rest says, where "
    f"alpha / sqrt(r) stays within {ERRORS:g} standard errors too"
)
TRAPS = (1, 5, 7, 9, 14)

RANKS = (1, 2, 4, 8, 16, 32, 64)
SEEDS, RATE = 200, 1e-6


def specs(size: Any, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return []


def changes(scaling: Callable[[float, int], float]) -> Array:
    """[rank, seed] of the loss after the first step less that before it; no A is a part of another."""
    return np.array([[np.diff(losses(rank, 1, RATE, RATE, 1000 * rank + seed, scaling=scaling))[0]
                      for seed in range(SEEDS)] for rank in RANKS])  # fmt: skip


def differences(found: Array) -> tuple[Array, Array]:
    """Mean of each rank over that of the largest, less 1, and its standard error where both are about equal."""
    mean, error = found.mean(axis=1), found.std(axis=1, ddof=1) / found.shape[1] ** 0.5
    return mean[:-1] / mean[-1] - 1, np.hypot(error[:-1], error[-1]) / abs(mean[-1])


def slope(found: Array) -> tuple[float, float]:
    """Of log standard deviation against log rank, and its standard error; ln s of n normal values has 1 / sqrt(2n - 2).

    >>> round(slope(np.array([[r**-0.5, -(r**-0.5)] * 50 for r in RANKS]))[0], 6)
    -0.5
    """
    x = np.log(RANKS) - np.mean(np.log(RANKS))
    y = np.log(found.std(axis=1, ddof=1))
    return float(x @ y / (x @ x)), float(x @ x * (2 * found.shape[1] - 2)) ** -0.5


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    found, other = changes(lora.scaling), changes(rslora.scaling)
    gap, error = differences(found)
    other_gap, other_error = differences(other)
    fall, fall_error = slope(found)
    z = float(np.max(abs(gap) / error))
    other_z = float(np.max(abs(other_gap) / other_error))
    p = max(1 - NormalDist().cdf(float((MARGIN - abs(g)) / e)) for g, e in zip(gap, error, strict=True))
    if other_z <= ERRORS or (z <= ERRORS and p >= LEVEL):
        status = UNDECIDED
    else:
        status = HOLDS if z <= ERRORS and abs(fall - SLOPE) <= SLOPE_MARGIN else FAILS
    mean, other_mean = found.mean(axis=1), other.mean(axis=1)
    sentence = (
        f"mean changes of ranks {RANKS[0]} to {RANKS[-1]} differ from that of {RANKS[-1]} by {np.max(abs(gap)):.1%} or "
        f"less, {z:.1f} standard errors; scatter falls as r^{fall:.3f} (+- {1.96 * fall_error:.3f})"
    )
    control = (
        f"with alpha / sqrt(r) rank {RANKS[-1]} changes the loss {other_mean[-1] / other_mean[0]:.1f} times as much as "
        f"rank {RANKS[0]}, {other_z:.0f} standard errors"
    )
    ratio, half = float(1 + gap[0]), float(1.96 * error[0])
    effect = Estimate(ratio - half, ratio, ratio + half, UNIT, FITTED)
    x, std = tuple(map(float, RANKS)), found.std(axis=1, ddof=1)
    series = (
        Series("alpha / r, +- 1 standard deviation", x, tuple(-mean), tuple(-mean - std), tuple(-mean + std)),
        Series("alpha / sqrt(r)", x, tuple(-other_mean), style="points"),
    )
    plot = Plot("First update", "rank", "fall of the loss (nats)", series, x_log=True, y_log=True)
    return Verdict("C04", status, sentence, effect, SEEDS * len(RANKS), p=p, control=control, plot=plot)
