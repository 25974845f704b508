"""Fit the LoRA learning-rate law, the rank penalty and the batch law; write data/lr_constants.json.

    python -m calibrate.learning_rate

Data: a public sweep of 23 models (learning rate x rank, one data set, batch 128, 780 steps) and the
MLPerf Training results for Llama-2-70B LoRA. Errors are reported on models, families and batch
sizes that the fit did not see.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.stats import norm

from lora_planner.learning_rate import FAMILIES, published_lora_lr

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
OUT = ROOT / "lora_planner" / "data" / "lr_constants.json"
SWEEP = "thinking-machines-lab/tinker-cookbook@9dfcc3a2 sft_sweep.md (Tulu3, batch 128, 780 steps, alpha 32)"
MLPERF = "MLPerf Training v4.0-v5.0 llama2_70b_lora (rank 16, alpha 32, sequence 8192)"
RL_RUNS = "kenkuuu/lora-without-regret GRPO, Qwen3-1.7B, rank 1/16/256: 8e-5, 1e-4, 7e-5; one seed"

#: prior width of a family's offset in ln LR; leave-one-model-out is the same from 0.15 to 0.6
FAMILY_SD = 0.3
#: below this a relative loss difference is noise (median of the sweep's repeated runs is 0.02 %)
PENALTY_FLOOR = 5e-4
#: more than this multiple of the best loss is a diverged run
DIVERGED = 1.5


@dataclass(frozen=True, slots=True)
class Cell:
    """One model at one rank. ln LR* lies in [low, high]; equal where a parabola found it."""

    model: str
    family: str
    hidden: float
    params_b: float
    rank: int
    points: tuple[tuple[float, float], ...]  # (ln LR, nats), finite ones
    low: float
    high: float

    @property
    def bracketed(self) -> bool:
        return self.low == self.high


# ---------------------------------------------------------------- the sweep


def rows(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def optimum(points: tuple[tuple[float, float], ...]) -> tuple[float, float]:
    """ln LR* from the parabola through the best point and its neighbours, as (low, high).

    With no finite point on one side the optimum is only bounded: beyond the middle of the last two.
    Two finite points on each side, as one would like, exist in 3 of 84 cells: the coarse grid's next
    point up has mostly diverged.
    """
    best = min(range(len(points)), key=lambda i: points[i][1])
    if best == len(points) - 1:
        return (points[best - 1][0] + points[best][0]) / 2, math.inf
    if best == 0:
        return -math.inf, (points[0][0] + points[1][0]) / 2
    a, b, _ = np.polyfit(*zip(*points[best - 1 : best + 2], strict=True), 2)
    vertex = float(-b / 2 / a)
    return vertex, vertex


def read_cells() -> list[Cell]:
    facts = {row["model"]: row for row in rows("lr_rank_models.csv")}
    losses: dict[tuple[str, int], dict[float, list[float]]] = {}
    for row in rows("lr_rank_sweep.csv"):
        if row["test_nll"]:
            by_lr = losses.setdefault((row["model"], int(row["lora_rank"])), {})
            by_lr.setdefault(float(row["lr"]), []).append(float(row["test_nll"]))
    cells = []
    for (model, rank), by_lr in losses.items():
        ceiling = DIVERGED * min(min(v) for v in by_lr.values())
        points = tuple((math.log(lr), float(np.mean(v))) for lr, v in sorted(by_lr.items()) if max(v) < ceiling)
        fact = facts[model]
        cells.append(
            Cell(model, FAMILIES[fact["model_type"]], float(fact["hidden_size"] or "nan"),
                 float(fact["total_params_b"]), rank, points, *optimum(points))
        )  # fmt: skip
    return cells


def regret(cell: Cell, ln_lr: float) -> float:
    """Loss at this LR above the cell's best, relative, interpolated on the cell's own sweep.

    The parabola inside the bracket, straight lines in ln LR outside, the end value beyond the end.
    """
    x, y = np.array(cell.points).T
    i = int(y.argmin())
    if not cell.bracketed:
        return float(np.interp(ln_lr, x, y) / y.min() - 1)
    parabola = np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2)
    best = np.polyval(parabola, cell.low)
    inside = x[i - 1] <= ln_lr <= x[i + 1]
    here = np.polyval(parabola, ln_lr) if inside else np.interp(ln_lr, x, y)
    return float(here / best - 1)


# ---------------------------------------------------------------- ln LR* = a + b ln(N/8e9) + c ln(r/16) + u[family]

FAMILY_NAMES = sorted(set(FAMILIES.values()))
Feature = Callable[[Cell], float]
SIZE: Feature = lambda c: math.log(c.params_b / 8)  # noqa: E731
WIDTH: Feature = lambda c: math.log(c.hidden / 4096)  # noqa: E731
RANK: Feature = lambda c: math.log(c.rank / 16)  # noqa: E731


def fit_lr(cells: list[Cell], features: tuple[Feature, ...], family_sd: float = FAMILY_SD) -> np.ndarray:
    """Censored least squares with a shrunken offset per family; every model weighs the same.

    A cell that is only bounded enters through the probability of its side: dropping those cells would
    bias the law low, since nearly all of them are bounded from below.
    """
    x = np.array([[1.0, *(f(c) for f in features)] for c in cells])
    z = np.array([[float(c.family == name) for name in FAMILY_NAMES] for c in cells])
    low, high = np.array([c.low for c in cells]), np.array([c.high for c in cells])
    seen = low == high
    weight = np.array([1 / sum(o.model == c.model for o in cells) for c in cells])
    weight *= len(cells) / weight.sum()
    k = x.shape[1]

    def loss(t: np.ndarray) -> float:
        mean, sd = x @ t[:k] + z @ t[k:-1], math.exp(t[-1])
        side = np.maximum(norm.cdf(high, mean, sd) - norm.cdf(low, mean, sd), 1e-12)
        fit = np.where(seen, norm.logpdf(np.where(seen, low, 0.0), mean, sd), np.log(side))
        return float(-(weight * fit).sum() + (t[k:-1] ** 2).sum() / 2 / family_sd**2)

    start = np.zeros(k + len(FAMILY_NAMES) + 1)
    start[0], start[-1] = math.log(3e-4), -1.0
    found = minimize(loss, start, method="L-BFGS-B").x
    return np.asarray(found[:-1])


def predict_lr(t: np.ndarray, cell: Cell, features: tuple[Feature, ...]) -> float:
    k = 1 + len(features)
    return float(t[:k] @ [1.0, *(f(cell) for f in features)] + t[k + FAMILY_NAMES.index(cell.family)])


def left_out(
    cells: list[Cell], features: tuple[Feature, ...], group: Callable[[Cell], str], family_sd: float = FAMILY_SD
) -> list[float]:
    """ln LR predicted for every cell by the fit to all other groups."""
    fits = {
        g: fit_lr([c for c in cells if group(c) != g], features, family_sd) for g in {group(c) for c in cells}
    }
    return [predict_lr(fits[group(c)], c, features) for c in cells]


def score(cells: list[Cell], predicted: Iterable[float]) -> dict[str, float]:
    """Location on bracketed cells, regret on all (diverging is invisible to it: no point, no loss)."""
    pairs = list(zip(cells, predicted, strict=True))
    off = np.array([abs(p - c.low) for c, p in pairs if c.bracketed])
    lost = np.array([100 * max(regret(c, p), 0.0) for c, p in pairs])
    return {
        "n": len(off), "within_1.5": float(np.mean(off <= math.log(1.5))),
        "within_2": float(np.mean(off <= math.log(2))), "q90_factor": float(np.exp(np.quantile(off, 0.9))),
        "bounds_kept": float(np.mean([c.low <= p <= c.high for c, p in pairs if not c.bracketed])),
        "n_regret": len(lost), "regret_median_%": float(np.median(lost)),
        "regret_p90_%": float(np.quantile(lost, 0.9)), "regret_max_%": float(lost.max()),
    }  # fmt: skip


# ---------------------------------------------------------------- penalty of a low rank


def penalties(cells: list[Cell]) -> list[tuple[Cell, int, float]]:
    """(cell, largest rank of its model, loss above that rank's, relative), each at its own best LR."""
    best: dict[str, dict[int, tuple[Cell, float]]] = {}
    for c in cells:
        x, y = np.array(c.points).T
        i = int(y.argmin())
        if i == 0:
            continue  # the best LR was below the sweep: nothing is known of this rank's loss
        value = float(y[i])
        if c.bracketed:
            value = float(np.polyval(np.polyfit(x[i - 1 : i + 2], y[i - 1 : i + 2], 2), c.low))
        best.setdefault(c.model, {})[c.rank] = (c, value)
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


def penalty_errors(data: list[tuple[Cell, int, float]]) -> np.ndarray:
    """ln(predicted / seen), each model predicted by the others."""
    fits = {m: fit_penalty([d for d in data if d[0].model != m]) for m in {d[0].model for d in data}}
    return np.array([_log_ratio(penalty_law(fits[c.model], c, top), seen) for c, top, seen in data])


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
        "power_exponent": float(power[0]), "power_sd": float(np.std(np.polyval(power, np.log(sizes)) - mean, ddof=2)),
        "lr_exponent": float(np.polyfit(np.log(batch), lr, 1)[0]),
    }  # fmt: skip


# ---------------------------------------------------------------- write


def row(name: str, value: float, low: float, high: float, n: int, source: str, basis: str = "fitted") -> dict[str, Any]:
    short = [float(f"{v:.4g}") for v in (value, min(low, value), max(high, value))]
    return {"name": name, "value": short[0], "low": short[1], "high": short[2], "basis": basis, "n": n, "source": source}


def main() -> None:
    cells = read_cells()
    law = (SIZE, RANK)
    report = {"flat 3e-4": score(cells, [math.log(3e-4)] * len(cells))}
    known = [c for c in cells if c.family in ("llama", "qwen3")]
    published = [math.log(published_lora_lr(int(c.hidden), c.family)) for c in known]
    report["published formula (Llama, Qwen3 only)"] = score(known, published)
    report["flat 3e-4 (Llama, Qwen3 only)"] = score(known, [math.log(3e-4)] * len(known))
    wide = [c for c in cells if c.hidden > 0]
    for name, some, features, sd in (
        ("rank, no family", cells, (RANK,), 1e-3), ("rank", cells, (RANK,), FAMILY_SD),
        ("width and rank", wide, (WIDTH, RANK), FAMILY_SD), ("size and rank, no family", cells, law, 1e-3),
        ("size and rank", cells, law, FAMILY_SD),
    ):  # fmt: skip
        report[f"{name}: model left out"] = score(some, left_out(some, features, lambda c: c.model, sd))
        report[f"{name}: family left out"] = score(some, left_out(some, features, lambda c: c.family, sd))
    for name, values in report.items():
        print(f"{name:40}", "  ".join(f"{k} {v:.3g}" for k, v in values.items()))

    t = fit_lr(cells, law)
    models = sorted({c.model for c in cells})
    jack = np.array([fit_lr([c for c in cells if c.model != m], law) for m in models])
    # jackknife over models: one model's cells are no independent rows
    sd = np.sqrt((len(models) - 1) / len(models) * ((jack - jack.mean(0)) ** 2).sum(0)) * 1.645
    known_band = report["size and rank: model left out"]["q90_factor"]
    new_band = report["size and rank: family left out"]["q90_factor"]
    fields = ["ln_lr", "size_exponent", "rank_exponent", *(f"family.{name}" for name in FAMILY_NAMES)]
    out = [
        row(f"lr.{name}", t[i], t[i] - sd[i], t[i] + sd[i], len(cells), SWEEP) for i, name in enumerate(fields)
    ]
    out += [
        row("lr.band", known_band, 1, known_band, len(cells), f"90th percentile, model left out; {SWEEP}"),
        row("lr.band_new_family", new_band, 1, new_band, len(cells), f"90th percentile, family left out; {SWEEP}"),
    ]
    at_1_7b = t[0] + t[1] * math.log(1.72 / 8) + t[3 + FAMILY_NAMES.index("qwen3")]
    rl = [math.exp(math.log(lr) - at_1_7b) for lr in (8e-5, 1e-4, 7e-5)]
    rl_band = [math.exp(math.log(lr) - at_1_7b) for lr in (2e-5, 2e-4)]  # final accuracy >= .80
    out.append(row("lr.rl_factor", float(np.exp(np.mean(np.log(rl)))), *rl_band, 3, RL_RUNS, "assumed"))

    data = penalties(cells)
    errors = penalty_errors(data)
    p = fit_penalty(data)
    band = float(np.exp(np.quantile(abs(errors), 0.9)))
    print(f"rank penalty: n {len(data)}  within x2 {np.mean(abs(errors) < math.log(2)):.2f}  90 % within x{band:.2f}")
    pj = np.array([fit_penalty([d for d in data if d[0].model != m]) for m in models])
    ps = np.sqrt((len(models) - 1) / len(models) * ((pj - pj.mean(0)) ** 2).sum(0)) * 1.645
    out += [
        row("penalty.scale", math.exp(p[0]), math.exp(p[0] - ps[0]), math.exp(p[0] + ps[0]), len(data), SWEEP),
        row("penalty.size_exponent", p[1], p[1] - ps[1], p[1] + ps[1], len(data), SWEEP),
        row("penalty.rank_exponent", p[2], p[2] - ps[2], p[2] + ps[2], len(data), SWEEP),
        row("penalty.band", band, 1, band, len(data), f"90th percentile, model left out; {SWEEP}"),
        row("penalty.floor", PENALTY_FLOOR, 2e-4, 1e-3, 66, f"repeated runs differ by a median 0.02 %; {SWEEP}"),
    ]

    b = fit_batch()
    print("batch:", "  ".join(f"{k} {v:.4g}" for k, v in b.items()))
    band = math.exp(1.645 * b["sd"])
    out += [
        row("batch.samples", b["samples"], b["samples"] / band, b["samples"] * band, b["n_batches"], MLPERF),
        row("batch.critical", b["b0"], b["b0_low"], b["b0_high"], b["n_batches"], MLPERF),
        row("batch.sd", b["sd"], b["power_sd"], b["left_out_max"], b["n_batches"], MLPERF),
    ]
    OUT.write_text(json.dumps({"schema": 1, "constants": out}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
