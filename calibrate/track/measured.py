"""Measured runs of many publishers: peak memory, tokens/s and time, as they were published.

One row gives a case for every quantity that it measures: a peak for each kind of memory that it reports, and what
`speed.cases` finds in it. setting.py reads the row, calibrate/memory.py predicts its memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibrate import memory as peaks
from calibrate.track import Row, speed
from calibrate.track.case import Case
from calibrate.track.setting import Measured, Setting, read
from lora_planner.errors import LoraPlanError
from lora_planner.memory import Constant
from lora_planner.units import GIB

NAME = "Measured runs"
COLUMNS = ("source", "model", "method", "rank", "targets", "precision", "gpu", "n_gpus", "seq_len", "micro_batch",
           "grad_ckpt", "attention impl", "peak_mem_GiB", "tokens_per_s", "time_min", "extra")  # fmt: skip


def cases(rows: Sequence[Row]) -> list[Case]:
    """Every quantity of every row, predicted with the packaged constants."""
    found: list[Case] = []
    for row in rows:
        setting = read(row)
        found += memory_cases(setting)
        found += speed.cases(setting, row)
    return found


def held_out(rows: Sequence[Row]) -> list[Case]:
    """The same, each source predicted by constants that were fitted without its rows."""
    settings = [read(row) for row in rows]
    without = peaks.held_out(settings)
    found = [case for s in settings if s.memory for case in memory_cases(s, without[s.source])]
    return found + speed.held_out(rows)


def memory_cases(setting: Setting, known: Mapping[str, Constant] | None = None) -> list[Case]:
    """A case for each peak that a row reports: first the one that its publisher names, then further ones by kind."""
    return [
        _case(setting, m, f"{m.kind.split()[0]} memory" if i else "peak memory", known)
        for i, m in enumerate(setting.memory)
    ]


def _case(s: Setting, measured: Measured, quantity: str, known: Mapping[str, Constant] | None) -> Case:
    predicted, reason = None, s.reason or peaks.why_not(s)
    if not reason:
        try:
            predicted = peaks.estimate(s, measured.kind, known).scaled(1 / GIB, "GiB")
        except LoraPlanError as error:
            reason = str(error)
    return Case(
        quantity=quantity,
        source=s.source, model=s.model.name if s.model else s.model_name, family=s.family, method=s.method_name,
        gpu=s.gpu.name if s.gpu else s.gpu_name, label=f"{s.label} ({measured.kind})", unit="GiB",
        measured=measured.bytes / GIB, predicted=predicted, reason=reason,
        fitted=known is None and s.source in peaks.fitted_on(), at_least=measured.at_least,
    )  # fmt: skip
