"""The track record: tables of public measurements, each row a case that the planner predicts from what was known before.

A table is a CSV file in the columns of its first publication here; a module reads each kind:

    NAME      what it holds, as a heading
    COLUMNS   names by which its header is recognised
    cases(rows) -> list[Case]     one case for every quantity that a row measures, also those without a prediction

`held_out(rows) -> list[Case]`, where constants were fitted on rows of the kind: the same with each source (or model) left
out of the fit that predicts it.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from lora_planner.errors import BadInput

TABLES = Path(__file__).parents[1] / "tables"
#: modules that read a kind of table
KINDS = ("measured", "peft_l40s", "mlperf", "lr_sweep", "models", "totals", "lora_counts", "shared_outer", "flops",
         "saved", "tracker")  # fmt: skip

Row = Mapping[str, str]


def kinds() -> list[ModuleType]:
    return [importlib.import_module(f"calibrate.track.{name}") for name in KINDS]


def read(path: Path) -> list[Row]:
    """Rows of a CSV file; BadInput where there is none, or it has no rows."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(
            f"cannot read the table: {error}", str(path), "Give a CSV file in UTF-8 with a header."
        ) from error
    if not rows:
        raise BadInput("the table has no rows", str(path), "Give a CSV file with a header and at least one row.")
    return rows


def kind_of(header: Sequence[str], where: str) -> ModuleType:
    """The module that reads a table with this header: all its COLUMNS are there, and more than any other's are."""
    known = kinds()
    fitting = [module for module in known if set(module.COLUMNS) <= set(header)]
    if not fitting:
        near = max(known, key=lambda m: len(set(m.COLUMNS) & set(header)) / len(m.COLUMNS))
        missing = [name for name in near.COLUMNS if name not in header]
        raise BadInput(f"no kind of table has these columns; {near.NAME} lacks {', '.join(missing)}", where,
                       "Use the columns of a table in calibrate/tables.")  # fmt: skip
    return max(fitting, key=lambda m: len(m.COLUMNS))
