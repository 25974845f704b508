"""Published sweeps of learning rate and rank: the best rate of each model and rank, and what a low rank costs.

The optimum of a cell (a model at a rank) is the vertex of a parabola through its best run and the two beside it; where
the best run is the first or the last that finished it is only bounded. A prediction is judged by how far it is from
there, and by its regret: what the cell's own sweep loses at the predicted rate, see calibrate.learning_rate.regret.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from calibrate import learning_rate as fit
from calibrate.learning_rate import Cell, number
from calibrate.track import Row
from calibrate.track.case import Case
from lora_planner import capacity, learning_rate
from lora_planner.errors import LoraPlanError
from lora_planner.ledger import FITTED, Estimate, around

NAME = "Sweeps of learning rate and rank"
COLUMNS = ("model", "lr", "lora_rank", "test_nll", "train_nll", "wall_min", "dataset", "batch_size", "steps", "source")
LR, PENALTY = "learning rate", "rank penalty"
#: billions of parameters of the smallest and the largest model that was swept: what is assumed of a model without a size
SIZES = tuple(size / 1e9 for size in learning_rate.SWEPT_PARAMS)
#: models without which nothing can be said of another
FEWEST = 4

Predict = Callable[[float], Estimate]  # of a size in billions
Data = tuple[Cell, int, float]


@cache
def fitted_on() -> frozenset[str]:
    """Models whose cells the shipped constants were fitted on."""
    return frozenset(c.model for c in fit.read_cells())


def cases(rows: Sequence[Row]) -> list[Case]:
    """Every cell, and every rank below its model's largest, predicted with the packaged constants."""
    cells = fit.read_cells(rows)
    found = [case for row in rows if (case := _unread(row)) is not None]
    for cell in cells:
        found.append(_rate(LR, cell, *_of_size(cell, lambda b, c=cell: _advised(c, b)), cell.model in fitted_on()))  # type: ignore[misc]
    for cell, top, measured in fit.penalties(cells):
        predicted = _of_size(cell, lambda b, c=cell, t=top: capacity.rank_penalty(c.rank, 1e9 * b, t))  # type: ignore[misc]
        found.append(_penalty(PENALTY, cell, top, measured, *predicted, cell.model in fitted_on()))
    return found


def held_out(rows: Sequence[Row]) -> list[Case]:
    """The same, predicted by fits to the other models of these rows, then by fits to the other families.

    The band comes from the errors of the others where each of them was left out: the model's own error is not among
    them, though the fits behind those errors had its cells.
    """
    cells = [cell for cell in fit.read_cells(rows) if cell.params_b > 0 and len(cell.points) > 1]
    data = fit.penalties(cells)
    found: list[Case] = []
    for how, group in (("model left out", fit.by_model), ("family left out", fit.by_family)):
        found += _rates_left_out(f"{LR}, {how}", cells, group)
        found += _penalties_left_out(f"{PENALTY}, {how}", data, group)
    return found


def _rates_left_out(quantity: str, cells: list[Cell], group: Callable[[Cell], str]) -> list[Case]:
    few = _too_few(cells, group)
    if few:
        return [_rate(quantity, cell, None, few, False) for cell in cells]
    predicted = fit.left_out(cells, (fit.size, fit.rank), group)
    found = []
    for cell, ln_lr in zip(cells, predicted, strict=True):
        others = [i for i, c in enumerate(cells) if group(c) != group(cell)]
        errors = fit.misses([cells[i] for i in others], [predicted[i] for i in others])
        estimate = around(
            math.exp(ln_lr), fit.within(errors or [0.0]), "1", FITTED, f"fit to {len(others)} other cells"
        )
        found.append(_rate(quantity, cell, estimate, "", False))
    return found


def _penalties_left_out(quantity: str, data: list[Data], group: Callable[[Cell], str]) -> list[Case]:
    few = _too_few([cell for cell, _, _ in data], group)
    if few:
        return [_penalty(quantity, *item, None, few, False) for item in data]
    predicted = fit.penalties_left_out(data, group)
    found = []
    for item, value in zip(data, predicted, strict=True):
        others = [i for i, other in enumerate(data) if group(other[0]) != group(item[0])]
        band = fit.within(fit.penalty_misses([data[i] for i in others], [predicted[i] for i in others]))
        estimate = capacity.penalty_within(max(value, 0.0), band, f"fit to {len(others)} other ranks")
        found.append(_penalty(quantity, *item, estimate, "", False))
    return found


def _too_few(cells: Sequence[Cell], group: Callable[[Cell], str]) -> str:
    """Why nothing can be left out; "" where it can."""
    groups = [len({c.model for c in cells if group(c) != g}) for g in {group(c) for c in cells}]
    return "" if groups and min(groups) >= FEWEST else f"fewer than {FEWEST} models are left to fit on"


# ---------------------------------------------------------------- predictions


def _advised(cell: Cell, params_b: float) -> Estimate:
    """What the planner advises for the model, the rank and the run of a cell."""
    return learning_rate.advise(
        1e9 * params_b, cell.facts.model_type, rank=cell.rank, steps=cell.steps, batch=cell.batch
    ).lr


def _of_size(cell: Cell, predict: Predict) -> tuple[Estimate | None, str]:
    """(prediction, why there is none). A name without a size could be of any that was swept: the middle of them, and
    the widest interval."""
    try:
        if cell.params_b > 0:
            return predict(cell.params_b), ""
        ends = [predict(size) for size in SIZES]
        middle = predict(math.sqrt(SIZES[0] * SIZES[1]))
    except LoraPlanError as error:
        return None, str(error)
    low, high = min(e.low for e in ends), max(e.high for e in ends)
    return Estimate(low, middle.value, high, middle.unit, middle.basis, f"size unknown; {middle.source}"), ""


# ---------------------------------------------------------------- cases


def _rate(quantity: str, cell: Cell, predicted: Estimate | None, reason: str, fitted: bool) -> Case:
    measured = math.exp(cell.low if cell.low > -math.inf else cell.high)
    if math.isinf(measured):
        measured, predicted, reason = math.nan, None, "fewer than two of its runs finished: no optimum to predict"
    details: dict[str, float] = {}
    if predicted is not None:
        details = _lost(cell, predicted.value)
        details |= {f"{name} {rival}": value for rival, rate in fit.RIVALS.items()
                    for name, value in _lost(cell, rate(cell)).items() if name != "regret_nats"}  # fmt: skip
    return Case(
        quantity, _short(cell.source), cell.model, _family(cell), f"lora r{cell.rank}", "",
        f"{cell.model} at rank {cell.rank}", "", measured, predicted, reason, fitted,
        at_least=cell.high == math.inf, at_most=cell.low == -math.inf, details=details,
    )  # fmt: skip


def _lost(cell: Cell, lr: float) -> dict[str, float]:
    """Regret of a rate, and by which factor it is off an optimum that is known; nothing of a rival without an answer."""
    if not 0 < lr < math.inf:
        return {}
    share = fit.regret(cell, math.log(lr))
    found = {"regret_nats": share * fit.best_nats(cell), "regret_share": share}
    if cell.bracketed:
        found["factor off"] = math.exp(abs(math.log(lr) - cell.low))
    return found


def _penalty(
    quantity: str, cell: Cell, top: int, measured: float, predicted: Estimate | None, reason: str, fitted: bool
) -> Case:
    """As loss over that of the largest rank, so that an error is one in share of the loss."""
    details = {"penalty_share": measured}
    ratio = None
    if predicted is not None:
        ratio = Estimate(1 + predicted.low, 1 + predicted.value, 1 + predicted.high, "1", predicted.basis, predicted.source)  # fmt: skip
        details |= {"error_share": abs(predicted.value - measured), "error_share no penalty": abs(measured)}
    return Case(
        quantity, _short(cell.source), cell.model, _family(cell), f"lora r{cell.rank}", "",
        f"{cell.model} at rank {cell.rank} over rank {top}", "x loss", 1 + measured, ratio, reason, fitted,
        details=details,
    )  # fmt: skip


def _unread(row: Row) -> Case | None:
    """A row without a rate or a rank measures nothing that could be predicted."""
    lr, rank = number(row.get("lr")), number(row.get("lora_rank"))
    if not 0 < lr < math.inf:
        reason = "no learning rate"
    elif not (1 <= rank < fit.TOP_RANK and rank == int(rank)):
        reason = "no rank of LoRA"
    else:
        return None
    model = str(row.get("model") or "")
    return Case(
        LR, _short(str(row.get("source") or "")), model, "", "", "", f"{model}: a row", "", math.nan, reason=reason
    )


def _short(source: str) -> str:
    return source.split("@")[0].strip()[:60] or "unknown"


def _family(cell: Cell) -> str:
    return cell.family or cell.facts.model_type
