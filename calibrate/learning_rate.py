"""Fit the LoRA learning-rate law, the rank penalty and the batch law; write data/lr_constants.json.

    python -m calibrate.learning_rate

Data: a public sweep of 23 models (learning rate x rank, one data set, batch 128, 780 steps), calibrate/tables, and the
MLPerf Training results for Llama-2-70B LoRA. All 23 models are in the shipped fit; errors are reported on models,
families and batch sizes that a fit did not see, and bands come from those errors.

The sweep holds siblings (Kimi-K2 twice, Llama-3.1-8B twice, the 35B-A3B twice, Qwen3-30B-A3B three times), so "model
left out" is what to expect of a family that was swept. "Family left out" is what to expect of another, and there the
law locates the optimum no better than a flat 3e-4: one family of six, Qwen3.5, wants half of what the others do.

The law was chosen among about twenty candidates by the same left-out errors. Sixteen more were tried since and not
taken: width, active parameters, their geometric mean with all, MoE or dense, base or instruct, the square of ln rank, a
slope in size or in rank for each family, and a fit of the regret itself. None lowers the mean regret of left-out models
by more than a paired bootstrap over models can tell from nothing (0.012 of 0.145 % at best); of left-out families three
do, by 0.01 of 0.28 %, which sixteen tries on six families do not make a finding.

Nor is the rate lowered because loss rises faster above the optimum than below: averaged over cells the two sides differ
by less than a tenth up to x2.2, so at the errors of the law the rate of least expected regret is the optimum itself, and
a shift chosen on other families' regrets made a left-out family's worse.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import log_ndtr

from calibrate.lr_models import Facts, facts
from calibrate.track import TABLES
from calibrate.track import read as read_table
from lora_planner.errors import LoraPlanError
from lora_planner.learning_rate import FAMILIES, published_lora_lr

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
OUT = ROOT / "lora_planner" / "data" / "lr_constants.json"
TABLE = TABLES / "lr_rank_sweep.csv"
SWEEP = "thinking-machines-lab/tinker-cookbook@9dfcc3a2 sft_sweep.md (Tulu3, batch 128, 780 steps, alpha 32)"
MLPERF = "MLPerf Training v4.0-v5.0 llama2_70b_lora (rank 16, alpha 32, sequence 8192)"
RL_RUNS = "kenkuuu/lora-without-regret GRPO on MATH, Qwen3-1.7B, ranks 1, 16, 256, one seed"
RL_PARAMS_B = 1.72
RL_BEST = (8e-5, 1e-4, 7e-5)
RL_GOOD = (2e-5, 2e-4)  # final accuracy of 0.80 or more at rank 1

#: prior width of a family's offset in ln LR; leave-one-model-out is the same from 0.15 to 0.6
FAMILY_SD = 0.3
#: below this a relative loss difference is noise (median of the sweep's repeated runs is 0.02 %)
PENALTY_FLOOR = 5e-4
#: more than this multiple of the best loss is a diverged run
DIVERGED = 1.5
#: a rank from here on is a slip of the pen
TOP_RANK = 1e6
#: share of left-out errors that a band holds
COVERAGE = 0.9


@dataclass(frozen=True, slots=True)
class Cell:
    """One model at one rank. ln LR* lies in [low, high]; equal where a parabola found it."""

    model: str
    facts: Facts
    rank: int
    points: tuple[tuple[float, float], ...]  # (ln LR, nats), of runs that finished
    low: float
    high: float
    diverged: tuple[tuple[float, float], ...] = ()  # (ln LR, nats), `DIVERGED` x the best where it has no number
    source: str = ""
    dataset: str = ""
    steps: float | None = None
    batch: int | None = None

    @property
    def family(self) -> str:
        return self.facts.family

    @property
    def params_b(self) -> float:
        return self.facts.params_b

    @property
    def bracketed(self) -> bool:
        return self.low == self.high

    @property
    def sweep(self) -> tuple[object, ...]:
        """What cells of the same model have in common that may be compared."""
        return self.model, self.source, self.dataset, self.steps, self.batch


# ---------------------------------------------------------------- the sweep


def rows(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def optimum(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """ln LR* from the parabola through the best point and its neighbours, as (low, high).

    With no finite point on one side the optimum is only bounded: beyond the middle of the last two.
    Two finite points on each side, as one would like, exist in 3 of 84 cells: the coarse grid's next
    point up has mostly diverged.

    >>> round(optimum([(0.0, 2.0), (1.0, 1.0), (2.0, 2.0)])[0], 9), optimum([(0.0, 2.0), (1.0, 1.0)])
    (1.0, (0.5, inf))
    """
    if len(points) < 2:
        return -math.inf, math.inf
    best = min(range(len(points)), key=lambda i: points[i][1])
    if best == len(points) - 1:
        return (points[best - 1][0] + points[best][0]) / 2, math.inf
    if best == 0:
        return -math.inf, (points[0][0] + points[1][0]) / 2
    a, b, _ = _parabola(points, best)
    vertex = float(-b / 2 / a)
    return vertex, vertex


def _parabola(points: Sequence[tuple[float, float]], best: int) -> np.ndarray:
    x, y = np.array(points[best - 1 : best + 2]).T
    return np.asarray(np.polyfit(x, y, 2))


def read_cells(table: Iterable[Mapping[str, str]] | None = None) -> list[Cell]:
    """The cells of a table of runs, by default of the committed one. Rows without a rate or a rank are left out.

    A run without a loss, or with one of more than `DIVERGED` times the best of its cell, has diverged; so has a rate
    of which one of several runs has.
    """
    found: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for row in read_table(TABLE) if table is None else table:
        lr, r = number(row.get("lr")), number(row.get("lora_rank"))
        if not (0 < lr < math.inf and 1 <= r < TOP_RANK and r == int(r)):
            continue
        key = tuple(str(row.get(name) or "").strip() for name in ("model", "dataset", "source"))
        run = tuple(f"{number(row.get(name)):g}" for name in ("batch_size", "steps"))
        losses = found.setdefault((*key, *run, str(int(r))), {}).setdefault(lr, [])
        losses.append(number(row.get("test_nll")))
    cells = []
    for (model, dataset, source, batch, steps, rank_text), by_lr in found.items():
        finished = [v for values in by_lr.values() for v in values if 0 < v < math.inf]
        ceiling = DIVERGED * min(finished, default=math.nan)
        mean = {lr: float(np.mean(values)) for lr, values in sorted(by_lr.items())}
        fine = {lr for lr, values in by_lr.items() if all(0 < v < ceiling for v in values)}
        points = tuple((math.log(lr), nats) for lr, nats in mean.items() if lr in fine)
        failed = [(math.log(lr), nats) for lr, nats in mean.items() if lr not in fine]
        diverged = tuple((x, y if ceiling < y < math.inf else ceiling) for x, y in failed)
        cells.append(
            Cell(model, facts(model), int(rank_text), points, *optimum(points), diverged, source, dataset,
                 _positive(steps), int(_positive(batch) or 0) or None)
        )  # fmt: skip
    return cells


def number(text: str | None) -> float:
    """NaN where it is none.

    >>> number("3e-4"), number("diverged"), number(None)
    (0.0003, nan, nan)
    """
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _positive(text: str) -> float | None:
    return value if 0 < (value := number(text)) < math.inf else None


def best_nats(cell: Cell) -> float:
    """The least loss of a cell: of the parabola where the optimum is bracketed, else of its best run."""
    losses = [y for _, y in cell.points]
    if not cell.bracketed:
        return min(losses)
    return float(np.polyval(_parabola(cell.points, losses.index(min(losses))), cell.low))


def regret(cell: Cell, ln_lr: float) -> float:
    """Loss at this LR above the cell's best, relative, interpolated on the cell's own sweep. NaN of less than two runs.

    The parabola inside the bracket, straight lines in ln LR outside it, which a convex curve does not exceed. Never
    flattering: towards a rate that diverged, the line to its loss; beyond the last run, the loss goes on rising as
    steeply as between the last two, also where it fell there.
    """
    if len(cell.points) < 2:
        return math.nan
    best = best_nats(cell)
    x, y = np.array(cell.points).T
    i = int(y.argmin())
    if cell.bracketed and x[i - 1] <= ln_lr <= x[i + 1]:
        return float(np.polyval(_parabola(cell.points, i), ln_lr)) / best - 1
    known = sorted((*cell.points, *cell.diverged))
    x, y = np.array(known).T
    if x[0] <= ln_lr <= x[-1]:
        return float(np.interp(ln_lr, x, y)) / best - 1
    end, next_ = (0, 1) if ln_lr < x[0] else (-1, -2)
    slope = abs((y[end] - y[next_]) / (x[end] - x[next_]))
    return float(y[end] + slope * abs(ln_lr - x[end])) / best - 1


# ---------------------------------------------------------------- ln LR* = a + b ln N + c ln r + u[family]

FAMILY_NAMES = sorted(set(FAMILIES.values()))
Feature = Callable[[Cell], float]


def size(cell: Cell) -> float:
    return math.log(cell.params_b / 8)


def width(cell: Cell) -> float:
    return math.log(cell.facts.hidden / 4096)


def rank(cell: Cell) -> float:
    return math.log(cell.rank / 16)


def by_model(cell: Cell) -> str:
    return cell.model


def by_family(cell: Cell) -> str:
    return cell.family or cell.facts.model_type or cell.model


def fit_lr(cells: list[Cell], features: tuple[Feature, ...], family_sd: float = FAMILY_SD) -> np.ndarray:
    """Censored least squares with a shrunken offset per family; every model weighs the same.

    A cell that is only bounded enters through the probability of its side: dropping those cells would
    bias the law low, since nearly all of them are bounded from below.
    """
    x = np.array([[1.0, *(f(c) for f in features), *(float(c.family == name) for name in FAMILY_NAMES)] for c in cells])
    low, high = np.array([c.low for c in cells]), np.array([c.high for c in cells])
    seen = low == high
    weight = np.array([1 / sum(o.model == c.model for o in cells) for c in cells])
    weight *= len(cells) / weight.sum()
    #: +1 where the optimum is above `bound`, -1 where below
    side, bound = np.where(high == math.inf, 1.0, -1.0), np.where(high == math.inf, low, high)
    shrink = np.zeros(x.shape[1])
    shrink[1 + len(features) :] = family_sd**-2

    def loss(t: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log-likelihood and the prior, and its gradient in t = (coefficients, ln sd)."""
        sd = math.exp(t[-1])
        off = (bound - x @ t[:-1]) / sd
        beyond = log_ndtr(-side * off)
        fit = np.where(seen, -(off**2) / 2 - t[-1], beyond)
        mills = np.exp(-(off**2) / 2 - beyond) / math.sqrt(2 * math.pi)
        by_mean = np.where(seen, off, side * mills) / sd
        by_ln_sd = np.where(seen, off**2 - 1, side * mills * off)
        gradient = np.append(shrink * t[:-1] - x.T @ (weight * by_mean), -(weight * by_ln_sd).sum())
        return float(-(weight * fit).sum() + (shrink * t[:-1] ** 2).sum() / 2), gradient

    start = np.zeros(x.shape[1] + 1)
    start[0], start[-1] = math.log(3e-4), -1.0
    # the floor of the sd: a few cells can lie on a line
    ends = [(None, None)] * x.shape[1] + [(math.log(0.05), None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=ends).x
    return np.asarray(found[:-1])


def predict_lr(t: np.ndarray, cell: Cell, features: tuple[Feature, ...]) -> float:
    k = 1 + len(features)
    offset = float(t[k + FAMILY_NAMES.index(cell.family)]) if cell.family else 0.0
    return float(t[:k] @ [1.0, *(f(cell) for f in features)]) + offset


def left_out(
    cells: list[Cell],
    features: tuple[Feature, ...],
    group: Callable[[Cell], str],
    family_sd: float = FAMILY_SD,
) -> list[float]:
    """ln LR predicted for every cell by the fit to all other groups."""
    fits = {g: fit_lr([c for c in cells if group(c) != g], features, family_sd) for g in {group(c) for c in cells}}
    return [predict_lr(fits[group(c)], c, features) for c in cells]


def misses(cells: Sequence[Cell], predicted: Sequence[float]) -> list[float]:
    """|ln LR - ln LR*| of cells whose optimum is bracketed, and the distance to a bound that was not kept.

    A bound that was kept says nothing of the error, so it is not among them.
    """
    found = []
    for c, p in zip(cells, predicted, strict=True):
        off = max(c.low - p, p - c.high, 0.0)
        if c.bracketed or off > 0:
            found.append(off)
    return found


def within(errors: Sequence[float]) -> float:
    """The factor that a new error stays inside in 90 % of cases: the quantile of n errors at 0.9 (n + 1) / n.

    >>> round(within([0.1 * i for i in range(11)]), 3), round(math.exp(0.1 * 10 * 0.9 * 12 / 11), 3)
    (2.669, 2.669)
    """
    n = len(errors)
    return math.exp(float(np.quantile(errors, min(1.0, COVERAGE * (n + 1) / n))))


def score(cells: list[Cell], predicted: Sequence[float]) -> dict[str, float]:
    """Location on bracketed cells, regret on all, see `regret`."""
    pairs = list(zip(cells, predicted, strict=True))
    off = np.array([abs(p - c.low) for c, p in pairs if c.bracketed])
    lost = np.array([100 * regret(c, p) for c, p in pairs])
    return {
        "n": len(off), "within_1.5": float(np.mean(off <= math.log(1.5))),
        "within_2": float(np.mean(off <= math.log(2))), "q50_factor": float(np.exp(np.median(off))),
        "q90_factor": float(np.exp(np.quantile(off, 0.9))), "max_factor": float(np.exp(off.max())),
        "bounds_kept": float(np.mean([c.low <= p <= c.high for c, p in pairs if not c.bracketed])),
        "n_regret": len(lost), "regret_mean_%": float(lost.mean()), "regret_median_%": float(np.median(lost)),
        "regret_p90_%": float(np.quantile(lost, 0.9)), "regret_max_%": float(lost.max()),
    }  # fmt: skip


def covered(cells: Sequence[Cell], predicted: Sequence[float], group: Callable[[Cell], str]) -> tuple[int, int]:
    """Cells inside the band, of all, where each group's band comes from the errors of the other groups."""
    inside = 0
    for g in {group(c) for c in cells}:
        pairs = list(zip(cells, predicted, strict=True))
        others = [(c, p) for c, p in pairs if group(c) != g]
        band = math.log(within(misses(*zip(*others, strict=True))))
        inside += sum(max(c.low - p, p - c.high) <= band for c, p in pairs if group(c) == g)
    return inside, len(cells)


# ---------------------------------------------------------------- rivals


def published(cell: Cell) -> float:
    """What the hosted trainer's get_lr says; NaN where it has no answer, or nobody says how wide the model is.

    It asks whether a name has "llama" or "qwen" in it, so Qwen3.5 gets Qwen3's exponent.
    Source: tinker-cookbook hyperparam_utils.py.
    """
    name = cell.model.lower()
    kind = "llama" if "llama" in name else "qwen3" if "qwen" in name else ""
    width = cell.facts.hidden
    try:
        return published_lora_lr(int(width), kind) if kind and width > 0 else math.nan
    except LoraPlanError:
        return math.nan


#: what others would have said: the formula; a flat rate; ten times 2e-5, trl's default of full fine-tuning, by LWR's rule
RIVALS: Mapping[str, Callable[[Cell], float]] = {
    "get_lr": published,
    "flat 3e-4": lambda cell: 3e-4,
    "10 x 2e-5": lambda cell: 2e-4,
}


# ---------------------------------------------------------------- penalty of a low rank


def penalties(cells: list[Cell]) -> list[tuple[Cell, int, float]]:
    """(cell, largest rank of its model, loss above that rank's, relative), each at its own best LR."""
    best: dict[tuple[object, ...], dict[int, tuple[Cell, float]]] = {}
    for c in cells:
        if len(c.points) < 2 or c.points[0][1] == min(y for _, y in c.points):
            continue  # the best LR was below the sweep: nothing is known of this rank's loss
        best.setdefault(c.sweep, {})[c.rank] = (c, best_nats(c))
    found = []
    for by_rank in best.values():
        top = max(by_rank)
        found += [(c, top, v / by_rank[top][1] - 1) for r, (c, v) in by_rank.items() if r < top]
    return found


def penalty_law(t: np.ndarray, cell: Cell, top: int) -> float:
    above: float = math.exp(t[0]) * (cell.params_b / 8) ** -t[1] * (cell.rank ** -t[2] - top ** -t[2])
    return above


def fit_penalty(data: list[tuple[Cell, int, float]]) -> np.ndarray:
    def residuals(t: np.ndarray) -> np.ndarray:
        return np.array([_log_ratio(penalty_law(t, c, top), seen) for c, top, seen in data])

    return np.asarray(least_squares(residuals, [-3.0, 0.4, 0.7], loss="soft_l1").x)


def _log_ratio(predicted: float, seen: float) -> float:
    return math.log((max(predicted, 0.0) + PENALTY_FLOOR) / (max(seen, 0.0) + PENALTY_FLOOR))


def penalties_left_out(data: list[tuple[Cell, int, float]], group: Callable[[Cell], str]) -> list[float]:
    """The penalty of every cell by the fit to all other groups."""
    groups = {group(c) for c, _, _ in data}
    fits = {g: fit_penalty([d for d in data if group(d[0]) != g]) for g in groups}
    return [penalty_law(fits[group(c)], c, top) for c, top, _ in data]


def penalty_misses(data: Iterable[tuple[Cell, int, float]], predicted: Iterable[float]) -> list[float]:
    return [abs(_log_ratio(p, seen)) for (_, _, seen), p in zip(data, predicted, strict=True)]


# ---------------------------------------------------------------- samples to target against batch


def fit_batch() -> dict[str, float]:
    """samples(B) = S0 (1 + B / B0), one weight per batch size: 84 of the 100 rows are batch 8.

    Beside it a power law, which fits no worse, and the trend of the submitters' learning rates.
    """
    table = rows("mlperf_lora_batch.csv")
    batch = np.array([float(r["global_batch_seqs"]) for r in table])
    samples = np.log([float(r["median_samples_to_converge"]) for r in table])
    lr = np.log([float(r["base_lr"]) for r in table])
    sizes = np.unique(batch)
    mean = np.array([samples[batch == b].mean() for b in sizes])

    def law(t: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(t[0] + np.log1p(b / math.exp(t[1])))

    def fitted(b: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(least_squares(lambda t: law(t, b) - y, [8.0, 3.6]).x)

    t = fitted(sizes, mean)
    others = [fitted(np.delete(sizes, i), np.delete(mean, i)) for i in range(len(sizes))]
    b0 = [math.exp(o[1]) for o in others]
    power = np.polyfit(np.log(sizes), mean, 1)
    return {
        "samples": math.exp(t[0]), "b0": math.exp(t[1]), "b0_low": min(b0), "b0_high": max(b0),
        "sd": float(np.std(law(t, sizes) - mean, ddof=2)), "n_batches": len(sizes), "n_rows": len(table),
        "left_out_max": max(abs(float(law(o, b) - y)) for o, b, y in zip(others, sizes, mean, strict=True)),
        "power_exponent": float(power[0]),
        "power_sd": float(np.std(np.polyval(power, np.log(sizes)) - mean, ddof=2)),
        "lr_exponent": float(np.polyfit(np.log(batch), lr, 1)[0]),
    }  # fmt: skip


# ---------------------------------------------------------------- write

Row = dict[str, Any]


def row(name: str, ends: Iterable[float], n: int, source: str, basis: str = "fitted") -> Row:
    low, value, high = (float(f"{v:.4g}") for v in ends)
    return {"name": name, "value": value, "low": low, "high": high, "basis": basis, "n": n, "source": source}


def jackknife(full: np.ndarray, without: list[np.ndarray]) -> list[tuple[float, float, float]]:
    """90 % intervals from leaving out one model at a time: one model's cells are not independent."""
    spread = np.array(without) - np.mean(without, axis=0)
    half = 1.645 * np.sqrt((len(without) - 1) / len(without) * (spread**2).sum(0))
    return [(float(v - h), float(v), float(v + h)) for v, h in zip(full, half, strict=True)]


def learning_rate_rows(cells: list[Cell]) -> list[Row]:
    """Compare the candidates on what they did not see; write the one by size, rank and family."""
    law, groups = (size, rank), (("model left out", by_model), ("family left out", by_family))
    wide, answered = [c for c in cells if c.facts.hidden > 0], [c for c in cells if published(c) > 0]
    report = {name: score(some, [math.log(RIVALS[name](c)) for c in some])
              for name, some in (("flat 3e-4", cells), ("10 x 2e-5", cells), ("get_lr", answered))}  # fmt: skip
    report["flat 3e-4, where get_lr has an answer"] = score(answered, [math.log(3e-4)] * len(answered))
    out = []
    for name, some, features, family_sd in (
        ("rank, no family", cells, (rank,), 1e-3),
        ("rank", cells, (rank,), FAMILY_SD),
        ("width, rank", wide, (width, rank), FAMILY_SD),
        ("size, rank, no family", cells, law, 1e-3),
        ("size, rank", cells, law, FAMILY_SD),
    ):
        for how, group in groups:
            predicted = left_out(some, features, group, family_sd)
            report[f"{name}: {how}"] = score(some, predicted)
    for how, group in groups:
        errors = misses(cells, predicted := left_out(cells, law, group))
        inside, of = covered(cells, predicted, group)
        report[f"size, rank: {how}"] |= {"band": within(errors), "covered": inside, "of": of}
        pairs = [(c, p) for c, p in zip(cells, predicted, strict=True) if published(c) > 0]
        report[f"size, rank: {how}, where get_lr has an answer"] = score(*map(list, zip(*pairs, strict=True)))
        name = "lr.band" if group is by_model else "lr.band_new_family"
        ends = (math.exp(np.median(errors)), within(errors), math.exp(max(errors)))
        out.append(row(name, ends, len(errors), f"50, 90, 100 % of errors, {how}; {SWEEP}"))
    for name, values in report.items():
        print(f"{name:52}", "  ".join(f"{k} {v:.3g}" for k, v in values.items()))

    models = sorted({c.model for c in cells})
    fit = fit_lr(cells, law)
    ends_of = jackknife(fit, [fit_lr([c for c in cells if c.model != m], law) for m in models])
    names = ["ln_lr", "size_exponent", "rank_exponent", *(f"family.{name}" for name in FAMILY_NAMES)]
    out = [row(f"lr.{name}", e, len(cells), SWEEP) for name, e in zip(names, ends_of, strict=True)] + out

    sft = fit[0] + fit[1] * math.log(RL_PARAMS_B / 8) + fit[3 + FAMILY_NAMES.index("qwen3")]
    best = float(np.mean(np.log(RL_BEST)))
    factors = [math.exp(x - sft) for x in (math.log(RL_GOOD[0]), best, math.log(RL_GOOD[1]))]
    return [*out, row("lr.rl_factor", factors, len(RL_BEST), RL_RUNS, "assumed")]


def penalty_rows(cells: list[Cell]) -> list[Row]:
    data = penalties(cells)
    seen = np.array([v for _, _, v in data])
    print(f"{'no rank penalty at all':52} n {len(data)}  error_median_% {100 * np.median(abs(seen)):.3g}")
    for how, group in (("family left out", by_family), ("model left out", by_model)):
        predicted = penalties_left_out(data, group)
        errors, off = penalty_misses(data, predicted), 100 * abs(np.array(predicted) - seen)
        print(f"{f'rank penalty: {how}':52} n {len(data)}  error_median_% {np.median(off):.3g}  "
              f"error_p90_% {np.quantile(off, 0.9):.3g}  error_max_% {off.max():.3g}  "
              f"within_2 {np.mean(np.array(errors) < math.log(2)):.2f}  band {within(errors):.2f}")  # fmt: skip
    models = sorted({c.model for c, _, _ in data})
    fit = fit_penalty(data)
    ends = jackknife(fit, [fit_penalty([d for d in data if d[0].model != m]) for m in models])
    band = (math.exp(np.median(errors)), within(errors), math.exp(max(errors)))
    return [
        row("penalty.scale", [math.exp(e) for e in ends[0]], len(data), SWEEP),
        row("penalty.size_exponent", ends[1], len(data), SWEEP),
        row("penalty.rank_exponent", ends[2], len(data), SWEEP),
        row("penalty.band", band, len(data), f"50, 90, 100 % of errors, model left out; {SWEEP}"),
        row(
            "penalty.floor",
            (2e-4, PENALTY_FLOOR, 1e-3),
            0,
            "chosen; repeated runs differ by 0.02 %",
            "assumed",
        ),
    ]


def batch_rows() -> list[Row]:
    b = fit_batch()
    print("batch:", "  ".join(f"{k} {v:.4g}" for k, v in b.items()))
    band, n = math.exp(1.645 * b["sd"]), int(b["n_batches"])
    return [
        row("batch.samples", (b["samples"] / band, b["samples"], b["samples"] * band), n, MLPERF),
        row("batch.critical", (b["b0_low"], b["b0"], b["b0_high"]), n, MLPERF),
        row("batch.sd", (b["power_sd"], b["sd"], b["left_out_max"]), n, MLPERF),
    ]


def main() -> None:
    cells = read_cells()
    constants = learning_rate_rows(cells) + penalty_rows(cells) + batch_rows()
    OUT.write_text(json.dumps({"schema": 1, "constants": constants}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
