"""A CSV of what was spent, read strictly: a line a run, or a line of an invoice.

Columns, in any order and case; others are ignored and named in a warning:

    kind              sweep, final, evaluation, failed, idle, setup or storage
    gpu               as in the plan or as its driver says; may be empty where the project has one, and for storage
    hours             GPU-hours: hours times GPUs; none for storage
    usd               what was paid, without tax or with it, as in the price file. Or:
    usd_per_gpu_hour  the price, where the amount is hours times it
    runs              how many runs the hours are of; 1 where empty. 0: more hours of runs that another line counts
    finished          yes or no. Where empty: yes for runs; for storage no, more will be billed
    date              2026-11-23
    plan              1, 2 ... in the order of the plan files, or the first digits of a plan's SHA-256; only where
                      two plans share a GPU
    currency          USD

    kind,gpu,hours,usd,runs,finished,date
    setup,h100-sxm-80gb,0.5,1.35,,,2026-11-02
    sweep,h100-sxm-80gb,2.6,6.99,10,yes,2026-11-03
    failed,h100-sxm-80gb,0.7,1.88,,,2026-11-04
    final,h100-sxm-80gb,0.2,0.54,1,no,2026-11-05
    storage,,,1.10,,,2026-11-20
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from difflib import get_close_matches
from pathlib import Path

from lora_planner.actuals import KINDS, RUNS, Spent
from lora_planner.checkpoint import open_regular
from lora_planner.errors import BadInput
from lora_planner.facts import MAX_USD_PER_GPU_HOUR, gpus
from lora_planner.pages.text import FORMULA

MAX_BYTES = 1 << 20
MAX_HOURS, MAX_USD, MAX_RUNS = 1e7, 1e9, 100_000
COLUMNS = ("kind", "gpu", "hours", "usd", "usd_per_gpu_hour", "runs", "finished", "date", "plan", "currency")
NEEDED = ("kind", "hours")
YES, NO = ("yes", "y", "true", "1"), ("no", "n", "false", "0")
EXAMPLE = "The first line names columns: kind,gpu,hours,usd,runs,finished,date."
NUMBER = re.compile(r"\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+")
#: how like a known column another may be before it is taken for a slip of the hand
LIKE = 0.8
#: usd and hours x usd_per_gpu_hour may differ by so much: invoices round
SAME = 0.01


@dataclass(frozen=True, slots=True)
class Usage:
    """The lines of a file, and what of it was not read."""

    name: str
    lines: tuple[Spent, ...]
    ignored: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class _Row:
    """One line as text, by column; `where` is file:line."""

    cells: Mapping[str, str]
    where: str

    def text(self, column: str) -> str:
        cell = self.cells.get(column, "")
        if cell.startswith(FORMULA) and not cell.startswith(("-", "+")):
            raise self.refuse(column, "a formula", "Write its value.")
        return cell

    def number(self, column: str, most: float) -> float | None:
        """The value of a cell, None where it is empty."""
        cell = self.text(column)
        if not cell:
            return None
        if cell.startswith("-"):
            fix = "Take credits and refunds off the line they belong to."
            raise self.refuse(column, "negative, or a formula", fix)
        if not NUMBER.fullmatch(cell):
            raise self.refuse(column, _why(cell), "Write a plain number with a point: 1234.5.")
        found = float(cell)
        if not found <= most:
            raise self.refuse(column, "out of range", f"At most {most:,.0f}.")
        return found

    def refuse(self, column: str, why: str, fix: str) -> BadInput:
        return BadInput(f"{column} {_short(self.cells.get(column, ''))}: {why}", self.where, fix)


def read(path: str, plans: Sequence[tuple[str, str]], today: date) -> Usage:
    """Every line of the file, or an error that names file:line, cause and fix. `plans`: GPU and SHA-256 of each plan."""
    name = Path(path).name
    with open_regular(Path(path), name) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise BadInput("a usage file of over 1 MiB", name, "Sum up its lines by kind, GPU and day.")
    rows = _rows(_decoded(raw, name), name)
    columns = _columns(rows[0][1], f"{name}:{rows[0][0]}")
    lines = tuple(
        _line(_Row(_cells(columns, cells, where), where), plans, today)
        for number, cells in rows[1:]
        if any(cells) and (where := f"{name}:{number}")
    )
    if not lines:
        raise BadInput("no line under the columns' names", name, "Leave --actuals out until something is spent.")
    ignored = tuple(column for column in columns if column and column not in COLUMNS)
    return Usage(name, lines, ignored, hashlib.sha256(raw).hexdigest())


# ---------------------------------------------------------------- text into cells


def _decoded(raw: bytes, name: str) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadInput("UTF-16 text", f"{name}:1", "Save it as CSV UTF-8.")
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise BadInput("a NUL byte: no text file", f"{name}:{line}", "Save it as CSV UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadInput("not UTF-8 text", f"{name}:{line}", "Save it as CSV UTF-8.") from None


def _rows(text: str, name: str) -> list[tuple[int, list[str]]]:
    """(line number, cells without spaces around them). Semicolons and tabs part cells too, if the first line says so."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max((",", ";", "\t"), key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        for cells in reader:
            rows.append((reader.line_num, [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise BadInput(f"no CSV: {error}", f"{name}:{reader.line_num}", "Close every quotation mark.") from None
    while rows and not any(rows[0][1]):
        rows.pop(0)
    if not rows:
        raise BadInput("an empty file", name, EXAMPLE)
    return rows


def _columns(header: Sequence[str], where: str) -> list[str]:
    """Names of the columns, the known ones in our spelling."""
    alike = {re.sub("[^a-z]", "", name): name for name in COLUMNS}
    found = [alike.get(re.sub(r"[\s_-]", "", cell.lower()), cell) for cell in header]
    for column in found:
        if column in COLUMNS and found.count(column) > 1:
            raise BadInput(f"two columns {column}", where, "Keep one.")
        if column in COLUMNS:
            continue
        if (close := get_close_matches(column.lower(), COLUMNS, 1, LIKE)) and close[0] not in found:
            raise BadInput(f"column {_short(column)}", where, f"Did you mean {close[0]}? Rename it, or leave it out.")
    for column in NEEDED:
        if column not in found:
            raise BadInput(f"no column {column}", where, EXAMPLE)
    if "usd" not in found and "usd_per_gpu_hour" not in found:
        raise BadInput("no column usd and none usd_per_gpu_hour", where, EXAMPLE)
    return found


def _cells(columns: Sequence[str], cells: Sequence[str], where: str) -> dict[str, str]:
    if len(cells) > len(columns) and any(cells[len(columns) :]):
        fix = "A number with a decimal comma? Write a point; put text with a comma into quotation marks."
        raise BadInput(f"{len(cells)} cells under {len(columns)} columns", where, fix)
    if len(cells) < len(columns):
        cells = [*cells, *[""] * (len(columns) - len(cells))]
    return dict(zip(columns, cells, strict=False))


# ---------------------------------------------------------------- cells into values


def _line(row: _Row, plans: Sequence[tuple[str, str]], today: date) -> Spent:
    kind = _kind(row)
    if (currency := row.text("currency")) and currency.upper() != "USD":
        raise row.refuse("currency", "not USD", "Convert at the rate of the invoice.")
    hours, usd = row.number("hours", MAX_HOURS), row.number("usd", MAX_USD)
    rate = row.number("usd_per_gpu_hour", MAX_USD_PER_GPU_HOUR)
    runs = _runs(row, kind)
    finished = _finished(row, kind)
    if kind == "storage":
        if hours:
            raise row.refuse("hours", "storage takes no GPU-hours", "Leave it empty, and give usd.")
        if usd is None:
            raise row.refuse("usd", "empty", "Give what the storage cost.")
        card, part, hours = "", None, 0.0
    else:
        card, part = _place(row, kind, plans)
        if hours is None:
            raise row.refuse("hours", "empty", "Give GPU-hours: hours times GPUs.")
        if kind in RUNS and not hours and runs and finished:
            raise row.refuse("hours", "a finished run took none", "Give its GPU-hours, or kind idle for a mere fee.")
    return Spent(kind, card, part, hours, _amount(row, hours, usd, rate), runs, finished, _day(row, today))


def _kind(row: _Row) -> str:
    cell = row.text("kind")
    if cell.lower() in KINDS:
        return cell.lower()
    raise row.refuse("kind", "unknown" if cell else "empty", f"Write one of {', '.join(KINDS)}; leave sums out.")


def _place(row: _Row, kind: str, plans: Sequence[tuple[str, str]]) -> tuple[str, int | None]:
    """The GPU of a line, and which plan's it is."""
    part = _part(row, plans)
    cell = row.text("gpu")
    cards = list(dict.fromkeys(card for card, _ in plans))
    if not cell:
        if part is None and len(cards) > 1:
            raise row.refuse("gpu", "empty", f"Name one of {', '.join(cards)}.")
        card = cards[0] if part is None else plans[part][0]
    else:
        card = _card(row, cell, cards)
        if part is not None and plans[part][0] != card:
            raise row.refuse("gpu", f"plan {part + 1} is on {plans[part][0]}", "Correct one of the two.")
    here = [i for i, (name, _) in enumerate(plans) if name == card]
    if part is None and len(here) == 1:
        part = here[0]
    if part is None and kind in RUNS:
        numbers = ", ".join(str(i + 1) for i in here)
        raise row.refuse("plan", f"plans {numbers} share {card}", f"Say whose run it is, in a column plan: {numbers}.")
    return card, part


def _card(row: _Row, cell: str, cards: Sequence[str]) -> str:
    for card in cards:
        if cell.lower() == card.lower():
            return card
    names = {name.lower(): g.name for g in gpus() for name in (g.name, *g.also, *g.reported_as)}
    found = names.get(cell.lower())
    if found is None:
        raise row.refuse("gpu", "unknown", f"In this project: {', '.join(cards)}.")
    if found in cards:
        return found
    fix = f"Give its plan file too, or leave the line out; in this project: {', '.join(cards)}."
    raise row.refuse("gpu", f"no plan is on {found}", fix)


def _part(row: _Row, plans: Sequence[tuple[str, str]]) -> int | None:
    cell = row.text("plan").lower()
    if not cell:
        return None
    if cell.isdecimal() and len(cell) < 4 and 1 <= int(cell) <= len(plans):
        return int(cell) - 1
    hits = [i for i, (_, sha) in enumerate(plans) if len(cell) >= 6 and sha.startswith(cell)]
    if len(hits) == 1:
        return hits[0]
    raise row.refuse("plan", "no such plan", f"1 to {len(plans)}, or six digits and more of its SHA-256.")


def _runs(row: _Row, kind: str) -> int:
    found = row.number("runs", MAX_RUNS)
    if found is None:
        return 1 if kind in (*RUNS, "failed") else 0
    if found != int(found):
        raise row.refuse("runs", "no whole number", "Count runs.")
    return int(found)


def _finished(row: _Row, kind: str) -> bool:
    cell = row.text("finished").lower()
    if not cell:
        return kind != "storage"
    if cell not in (*YES, *NO):
        raise row.refuse("finished", "neither yes nor no", "Write yes or no.")
    return cell in YES


def _amount(row: _Row, hours: float, usd: float | None, rate: float | None) -> float:
    if usd is None and rate is None:
        raise BadInput("neither usd nor usd_per_gpu_hour", row.where, "Say what was paid; 0 where it was free.")
    if usd is None or rate is None:
        return usd if usd is not None else hours * (rate or 0.0)
    if abs(usd - hours * rate) > max(SAME * max(usd, hours * rate), 0.01):
        raise row.refuse("usd", f"hours x usd_per_gpu_hour is {hours * rate:,.2f}", "Correct one, or leave one out.")
    return usd


def _day(row: _Row, today: date) -> date | None:
    cell = row.text("date")
    if not cell:
        return None
    try:
        found = date.fromisoformat(cell if len(cell) <= 10 else re.sub(r"[T ]\d[\d:.,Z+-]*$", "", cell))
    except ValueError:
        raise row.refuse("date", "no date", "Write 2026-11-23.") from None
    if found > today + timedelta(days=1):
        raise row.refuse("date", "in the future", "Give what was spent, not what will be.")
    return found


def _short(cell: str) -> str:
    return repr(cell if len(cell) <= 40 else cell[:37] + "...")


def _why(cell: str) -> str:
    """What is wrong with a number.

    >>> _why("12,5"), _why("1.234,50"), _why("$3"), _why("nan"), _why("3 h")
    ('a comma', 'a comma', 'a currency sign', 'no number', 'no number')
    """
    if "," in cell and any(c.isdigit() for c in cell):
        return "a comma"
    if any(sign in cell for sign in "$€£¥"):
        return "a currency sign"
    return "no number"
