"""What tables of counted quantities share: which model a row is of, its numbers, and a case that says why it has no
prediction.

Parameters, FLOP and tensor bytes are counted by a library, not measured on a device: what the planner says of them is
exact or derived, and a miss is a mistake, not noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.names import model_of
from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.ledger import DERIVED, EXACT, Estimate, around, exact
from lora_planner.model import Model

#: what the closed forms of memory leave out: index tensors, masks, a second rotary table. Assumed: what most
#: families stay within
LEFT_OUT = 1.005
#: counts beyond it are no counts
LARGEST = 1e18


def text(row: Row, *names: str) -> str:
    """The first of these columns that says something; "" where none does.

    >>> text({"r": " 16 ", "rank": ""}, "rank", "r")
    '16'
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def number(row: Row, *names: str) -> float:
    """The number in the first of these columns that says something; NaN where it is none.

    >>> number({"fwd": "1e3"}, "fwd"), number({"fwd": "ERR"}, "fwd")
    (1000.0, nan)
    """
    try:
        value = float(text(row, *names).replace(",", ""))
    except ValueError:
        return math.nan
    return value if abs(value) < LARGEST else math.nan


def whole(row: Row, *names: str, least: int = 1, default: int | None = None) -> int:
    """A whole number of at least `least`; `default` where the columns are empty. BadInput else.

    >>> whole({"seq": "2048.0"}, "seq")
    2048
    """
    if default is not None and not text(row, *names):
        return default
    value = number(row, *names)
    if not math.isfinite(value) or value != int(value) or value < least:
        raise BadInput(f"{names[0]} {text(row, *names)!r} is no whole number of {least} or more")
    return int(value)


def flag(row: Row, *names: str) -> bool:
    """
    >>> flag({"grad_ckpt": "1"}, "grad_ckpt"), flag({"checkpointing": "none"}, "checkpointing")
    (True, False)
    """
    return text(row, *names).lower() not in ("", "0", "0.0", "no", "none", "off", "false")


@lru_cache(maxsize=512)
def named(*names: str) -> Model:
    """The model that the first known of these names means; BadInput where all are unknown."""
    for name in names:
        model = model_of(name) if name else None
        if model is not None:
            return model
    shown = next((name for name in names if name), "")
    raise BadInput(f"no config of {shown} is known here" if shown else "the row names no model")


@lru_cache(maxsize=512)
def cut(model: Model, layers: int) -> Model:
    """The first `layers` layers of a model, as `num_hidden_layers` in its config would make it.

    >>> from lora_planner.arch import from_config
    >>> cut(from_config({"model_type": "llama", "num_hidden_layers": 8}), 2).layers
    2
    """
    if layers == model.layers:
        return model
    if not 1 <= layers < model.layers:
        raise BadInput(f"{layers} layers, but {model.name} has {model.layers}")
    order = model.order[:layers]
    blocks = tuple(replace(block, count=order.count(i)) for i, block in enumerate(model.blocks))
    return replace(model, order=order, blocks=blocks)


def counted(value: float, unit: str, source: str) -> Estimate:
    """An exact estimate; counts are whole, and float sums are rounded back to it."""
    return exact(round(value), unit, source)


def derived(value: float, unit: str, source: str) -> Estimate:
    """A closed form of tensor bytes, which leaves small tensors out."""
    return around(value, LEFT_OUT, unit, DERIVED, source)


@dataclass(frozen=True, slots=True)
class Subject:
    """What all cases of one row have in common. `failed`: why the source itself could not count."""

    source: str
    name: str
    method: str = ""
    family: str = ""
    failed: str = ""

    def case(self, quantity: str, label: str, unit: str, measured: float, predict: Callable[[], Estimate]) -> Case:
        """One quantity; whatever keeps it from being predicted becomes the reason."""
        predicted, reason = None, ""
        if not math.isfinite(measured):
            reason = self.failed or "the row has no number here"
        else:
            try:
                predicted = predict()
            except LoraPlanError as error:
                reason = error.what
        return Case(quantity, self.source, self.name, self.family, self.method, "", label, unit, measured, predicted,
                    reason)  # fmt: skip


def family(*names: str) -> str:
    """model_type of a model, "" where it is unknown."""
    try:
        return named(*names).model_type
    except LoraPlanError:
        return ""


__all__ = ["DERIVED", "EXACT", "Subject", "counted", "cut", "derived", "family", "flag", "named", "number", "text",
           "whole"]  # fmt: skip
