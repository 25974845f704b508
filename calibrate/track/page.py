"""The track record as a page: every table of calibrate/tables, quantity by quantity. The same tables give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calibrate.track import TABLES, Row, board, kind_of, measured, read
from calibrate.track.case import Case
from lora_planner import memory

#: written by benchmarks/peers.py: predictions of other planners on the same rows, made in one run with ours
PEERS = Path(__file__).parent / "peers.csv"
OURS = ("ours", "ours, source left out")
OTHERS = ("fitcheck", "ftune")

READING = """\
Each row of a published table is predicted by the planner and held against what its source measured. `error` is \
|predicted / measured - 1|, with its median, 95 % quantile and worst; `bias` is the median with its sign, below 0 where too \
little is predicted; `covered` counts measurements (and bounds, such as a run that was out of memory) inside the 90 % interval.
*Left out* means that every constant was fitted again without the source (or model) that is predicted: that is what to \
expect of a source nobody has seen. *As shipped* is what `lora-plan score` says of the same rows; there `fed a fit` marks rows \
that a shipped constant was fitted on."""


def gathered() -> tuple[dict[str, list[Case]], dict[str, list[Case]]]:
    """Cases of all tables by quantity: as shipped, and with their source or model left out of the fits."""
    shipped: list[Case] = []
    without: list[Case] = []
    for path in sorted(TABLES.glob("*.csv")):
        rows = read(path)
        kind = kind_of(list(rows[0]), path.name)
        if kind is measured:  # it repeats some of MLPerf's rows, which have a table of their own
            rows = [row for row in rows if not str(row["source"]).startswith("MLPerf")]
        shipped += kind.cases(rows)
        if hasattr(kind, "held_out"):
            without += kind.held_out(rows)
    return board.by_quantity(shipped), board.by_quantity(without)


def record() -> str:
    """The page, without runs of our own."""
    shipped, without = gathered()
    lines = ["# How wrong the planner is", "", READING, "", "## In short", "",
             *board.table("quantity", _headlines(shipped, without)), ""]  # fmt: skip
    for quantity in dict.fromkeys([*without, *shipped]):
        lines += [f"## {board.inert(quantity[:1].upper() + quantity[1:])}", ""]
        if quantity in without:
            lines += board.section("Left out", without[quantity])
        if quantity in shipped:
            lines += board.section("As shipped", shipped[quantity])
    return "\n".join([*lines, *beside(read(PEERS)), *unexplained()])


def _headlines(shipped: dict[str, list[Case]], without: dict[str, list[Case]]) -> list[tuple[str, Sequence[Case]]]:
    found: list[tuple[str, Sequence[Case]]] = [
        (quantity if quantity.endswith("left out") else f"{quantity}, left out", some)
        for quantity, some in without.items()
    ]
    found += [(f"{quantity}, as shipped", some) for quantity, some in shipped.items()]
    return [(name, some) for name, some in found if any(case.predicted for case in some)]


def unexplained() -> list[str]:
    """What of a predicted peak has no mechanism behind it."""
    rows = memory.constants()
    names = {"unexplained": "of the counted tensors, with no mechanism", "allocator_fraction": "of what comes and goes within a "
             "step, lost between the allocator's blocks"}  # fmt: skip
    return ["## Constants of the peak", "",
            *(f"- {name}: {100 * rows[name].value:.1f} % [{100 * rows[name].low:.1f}, {100 * rows[name].high:.1f}] {what} "
              f"({rows[name].basis}, {rows[name].n} rows)" for name, what in names.items()), ""]  # fmt: skip


def beside(rows: Sequence[Row]) -> list[str]:
    """Other planners on the rows that each of them and ours, with the row's source left out, can predict."""
    lines = ["## Beside other planners", "",
             "FitCheck 0.3.1 and ftune 0.4.1, both MIT, on the same rows in the same run as ours "
             "(`python -m benchmarks.peers`): each on the rows that it can predict and that ours predicts with the row's source "
             "left out of every fit.", "",
             "| quantity | planner | rows | median | p95 | worst | ours there: median | p95 | worst |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        some = [row for row in rows if row["quantity"] == quantity and not row["bound"]]
        for other in OTHERS:
            both = [row for row in some if row[other] and row[OURS[1]]]
            if both:
                said = [*_spread(both, other), *_spread(both, OURS[1])]
                lines.append(f"| {board.inert(quantity)} | {other} | {len(both)} | {' | '.join(said)} |")
    return [*lines, ""]


def _spread(rows: Sequence[Row], planner: str) -> list[str]:
    return [board.percent(x) for x in board.spread([float(row[planner]) / float(row["measured"]) - 1 for row in rows])]
