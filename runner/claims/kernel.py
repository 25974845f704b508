"""C23. The placement whose kernel is most like full fine-tuning's learns best."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from calibrate.stats import mean_interval, spearman
from lora_planner.ledger import FITTED, Estimate
from lora_planner.record import FAILS, FINISHED, HOLDS, NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims import placement
from runner.claims.lab import FEW, SIZES, Size, grid, of_arm
from runner.claims.shared import LWR, count, full, tuned_losses, unready

SAMPLES = 48
SENTENCE = "The closer a placement's empirical kernel is to that of full fine-tuning, the lower its loss."
SOURCE = LWR + ", 'Discussion', after Malladi et al. 2022, arXiv:2210.05643"
PUBLISHED = "argued, not measured: layers with most parameters dominate the kernel, so they must be adapted"
UNIT = "Spearman correlation"
METRIC = (f"rank correlation over five placements of alignment with full fine-tuning's kernel ({SAMPLES} windows, before "
          "training, diagonals left out, since a sample is always like itself) and tuned loss, sign turned, means of seeds")  # fmt: skip
RULE = ("Holds if the correlation is positive by the exact permutation test over all orders (one-sided, 5 %; of 120 orders "
        "the perfect one and its four next do), fails if it is negative likewise, else undecided. "
        "Control: the largest and the smallest alignment must differ by more than the seeds' spread.")  # fmt: skip
TRAPS = (2, 5, 8)


def arms(size: str) -> dict[str, RunSpec]:
    """The three of C13, and half of attention and of the MLP at the same ranks."""
    plain = placement.arms(size)
    halves = {"q and k": ("attention", ("k_proj", "q_proj")), "gate and up": ("mlp", ("gate_proj", "up_proj"))}
    return plain | {name: replace(plain[whole], targets=targets) for name, (whole, targets) in halves.items()}


def design(arm: RunSpec) -> RunSpec:
    return replace(arm, objective="kernel", steps=SAMPLES, eval_at=(), micro_batch=1)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    name = next(key for key, value in SIZES.items() if value == size)
    kernels = [replace(design(arm), seed=seed) for arm in (full(size), *arms(name).values()) for seed in FEW]
    return [*kernels, *(spec for arm in arms(name).values() for spec in grid(runs, arm, size.lora_rates, FEW))]


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Centred alignment of two kernels without their diagonals.

        <C, C'> / (|C| |C'|),   C = off-diagonal entries of K less their mean       [-1, 1]

    With the diagonal every alignment is near 1. Source: Cortes et al. 2012, JMLR 13, with the unbiased variant's
    zero diagonal (Song et al. 2012, JMLR 13).

    >>> k = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    >>> round(alignment(k, 2 * k + 1), 12)
    1.0
    """
    off = ~np.eye(len(one), dtype=bool)
    a, b = one[off] - one[off].mean(), other[off] - other[off].mean()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def matrix(runs: Sequence[RunRecord], arm: RunSpec, seed: int) -> np.ndarray | None:
    found = [r for r in of_arm(runs, design(arm)) if r.spec.seed == seed and r.status == FINISHED]
    return np.array(found[0].measured["kernel"]) if found else None


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s, placed = SIZES[size], arms(size)
    n = count(runs, [design(arm) for arm in (full(s), *placed.values())], FEW)
    if not n:
        return Verdict("C23", NOT_RUN, "no run of it in these records")
    if (missing := unready("C23", runs, list(placed.values()), FEW)) is not None:
        return missing
    near: dict[str, list[float]] = {target: [] for target in placed}
    for seed in FEW:
        whole = matrix(runs, full(s), seed)
        for target, arm in placed.items():
            part = matrix(runs, arm, seed)
            if whole is None or part is None:
                return Verdict("C23", UNDECIDED, f"the kernel of {target}, seed {seed}, is missing", n=n)
            near[target].append(alignment(part, whole))
    losses = {target: tuned_losses(runs, arm, FEW) for target, arm in placed.items()}
    x = [mean_interval(near[t]).value for t in placed]
    y = [-mean_interval(losses[t]).value for t in placed]
    order = spearman(x, y)
    others = [spearman(x, p) for p in itertools.permutations(y)]
    above = sum(o >= order - 1e-12 for o in others) / len(others)
    below = sum(o <= order + 1e-12 for o in others) / len(others)
    effect = Estimate(order, order, order, UNIT, FITTED, f"{len(placed)} placements, exact test")
    means = sorted(mean_interval(row).value for row in near.values())
    spread = max(max(row) - min(row) for row in near.values())
    seen = means[-1] - means[0] > spread
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 else UNDECIDED
    listed = ", ".join(
        f"{t} {mean_interval(near[t]).value:.3f} ({mean_interval(losses[t]).value:.3f} nats)" for t in placed
    )
    plot = Plot("loss by alignment with full fine-tuning's kernel", "alignment, diagonals left out", "tuned held-out loss",
                tuple(Series(t, tuple(near[t]), tuple(losses[t]), style="points") for t in placed))  # fmt: skip
    return Verdict("C23", status, f"alignment (loss): {listed}", effect, n, p=min(above, below), plot=plot,
                   control=f"alignments span {means[-1] - means[0]:.3f}, seeds {spread:.3f}: {'found' if seen else 'not found'}")  # fmt: skip
