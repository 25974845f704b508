"""Parameters of models as transformers builds them: in all, by group, per token; and the adapters of target sets that
some of these tables carry as columns.

Columns are those of the first publication; the copy that the tests read has fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import Subject, counted, family, named, number, text
from calibrate.track.lora_counts import SOURCE as PEFT
from calibrate.track.lora_counts import adapters
from lora_planner.ledger import Estimate
from lora_planner.model import GROUPS

NAME = "parameters of models"
COLUMNS = ("name", "total", "embed", "lm_head", "norm", "attn", "experts", "active", "gemm_active")
SOURCE = "transformers 5.23 on the meta device"
#: a column of adapters, "lora[all-linear]r16"
SET = re.compile(r"lora\[(.+)\]r(\d+)$")


def cases(rows: Sequence[Row]) -> list[Case]:
    return [case for row in rows for case in _cases(row)]


def _cases(row: Row) -> Iterator[Case]:
    name = text(row, "name")
    subject = Subject(SOURCE, name, family=family(name))
    yield subject.case("parameters", name, "params", number(row, "total"), lambda: _total(name))
    yield subject.case("active parameters", name, "params", number(row, "active"), lambda: _active(name))
    yield subject.case("active parameters", f"{name} in matrices", "params", number(row, "gemm_active"),
                       lambda: _matrices(name))  # fmt: skip
    for group in (*GROUPS, "buffers"):
        measured = number(row, "buffers", "buffers_persist") if group == "buffers" else number(row, group)
        yield subject.case("parameters of a group", f"{name} {group}", "params", measured, partial(_group, name, group))
    for column in row:
        found = SET.match(column) if isinstance(column, str) else None
        if found and text(row, column):
            by_peft = Subject(PEFT, name, found[1], subject.family, "peft builds no such adapter")
            yield by_peft.case("adapter parameters", f"{name} {found[1]} rank {found[2]}", "params", number(row, column),
                               partial(adapters, name, found[1], int(found[2])))  # fmt: skip


def _total(name: str) -> Estimate:
    return counted(named(name).total, "params", "model.Model.total")


def _active(name: str) -> Estimate:
    return counted(named(name).active, "params", "model.Model.active")


def _matrices(name: str) -> Estimate:
    return counted(named(name).matmul_active, "params", "model.Model.matmul_active")


def _group(name: str, group: str) -> Estimate:
    model = named(name)
    return counted(model.buffers if group == "buffers" else model.groups[group], "params", "model.Model.groups")
