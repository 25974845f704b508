"""A comparison as a document, as rows for a spreadsheet and as a plot. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from lora_planner import __version__, units
from lora_planner.budget import quantile
from lora_planner.compare import BEATEN, PARETO, UNSUPPORTED, Cell, Comparison, Ranked
from lora_planner.ledger import Estimate
from lora_planner.pages.charts import Drawing, Point, front
from lora_planner.pages.document import Document, Facts, Figure, Heading, Prose, Table, Warnings
from lora_planner.recommend import LATE, NOFIT, OVERBUDGET
from lora_planner.render import interval, method_line

READ = (
    "A cell is one run of the best configuration there, with p90s of time and cost; a project is `lora-plan budget`. Ranked by cost; "
    "places with = are ties: the cost intervals overlap. best: no cell costs less and is faster; tie: one is, but "
    "intervals overlap; beaten: one surely is; *: best among the cells of its model."
)
CAUTION = (
    "Loss is above full fine-tuning of the same model, and says nothing between models. Cells of one GPU share most of their "
    "error in time: a tie between them is decided sooner than it looks, by `lora-plan calibrate`."
)


def document(c: Comparison, title: str, limits: Sequence[tuple[str, str]], today: date,
             warnings: Sequence[tuple[str, str, str]], chart: Drawing | None) -> Document:  # fmt: skip
    total = len(c.ranked) + len(c.out)
    reasons = ", ".join(f"{n} {code}" for code, n in c.counts.items())
    d = Document(f"Compare: {title}", today.isoformat())
    d.add(
        Facts([("cells", f"{total}: {len(c.ranked)} can be run" + (f"; {reasons}" if reasons else "")), *limits]),
        brief=True,
    )
    if warnings:
        d.blocks.append(Warnings(warnings))
    if c.ranked:
        d.add(Heading("What can be run"))
        d.blocks.append(table(c.ranked))
        d.brief += [Heading(""), brief_table(c.ranked), Heading("")]
        d.add(Prose(f"Pareto set of cost and time: {_front(c)}."), Prose(f"{READ} {CAUTION}", quiet=True), brief=True)
    else:
        d.add(
            Heading("Nothing can be run"),
            Prose("No cell satisfies the constraints; the reasons are below."),
            brief=True,
        )
    if chart:
        d.add(Figure([chart]))
    if c.out:
        d.add(Heading("What cannot, and why"), out_table(c.out))
        d.brief += [Heading(""), Table(("out", "model", "GPU", "method", "why"), [
            [cell.code, cell.model, cell.gpu, cell.method, _short(cell)] for cell in c.out])]  # fmt: skip
    if warnings:
        d.brief.append(Warnings(warnings))
    d.footer = f"lora-plan {__version__}. Amounts in USD, for one run."
    return d


def letter(i: int) -> str:
    """A name for the i-th cell that is short enough for a dot.

    >>> letter(0), letter(25), letter(26), letter(702)
    ('A', 'Z', 'AA', 'AAA')
    """
    name = ""
    i += 1
    while i:
        i, rest = divmod(i - 1, 26)
        name = chr(65 + rest) + name
    return name


def table(ranked: Sequence[Ranked]) -> Table:
    """Every cell that can be run, with its intervals' middle and p90."""
    keys = _keys(ranked)
    rows = []
    for i, r in enumerate(ranked):
        cell, p = r.cell, r.cell.priced
        assert p and p.memory
        rows.append([
            f"{letter(i)} {cell.model}", _place(r), cell.gpu, method_line(p), units.gib(p.memory.peak.value),
            units.duration(cell.time.value), units.duration(cell.time_p90), units.usd(cell.usd.value), units.usd(cell.usd_p90),
            units.percent(cell.loss.value) if cell.loss else "", _standing(r, keys),
        ])  # fmt: skip
    columns = ("model", "place", "GPU", "plan", "peak", "time p50", "time p90", "cost p50", "cost p90", "loss", "front")
    return Table(
        columns, rows, frozenset({1, *range(4, 10)}), _at(ranked, PARETO), _at(ranked, BEATEN), frozenset({0, 2})
    )


def brief_table(ranked: Sequence[Ranked]) -> Table:
    """The same for a terminal of 80 columns; time and cost are p90s."""
    keys = _keys(ranked)
    rows = []
    for i, r in enumerate(ranked):
        cell = r.cell
        loss = f"{100 * cell.loss.value:.2g}%" if cell.loss else ""
        rows.append([letter(i), _place(r), cell.model, cell.gpu, _plan(cell), units.duration(cell.time_p90), units.usd(cell.usd_p90), loss,
                     _standing(r, keys)])  # fmt: skip
    columns = ("", "#", "model", "GPU", "plan", "time", "cost", "loss", "front")
    return Table(columns, rows, frozenset({1, 5, 6, 7}), _at(ranked, PARETO), _at(ranked, BEATEN), frozenset({0, 2, 3}))


def _keys(ranked: Sequence[Ranked]) -> dict[int, str]:
    return {id(r.cell): letter(i) for i, r in enumerate(ranked)}


def _at(ranked: Sequence[Ranked], standing: str) -> frozenset[int]:
    return frozenset(i for i, r in enumerate(ranked) if r.standing == standing)


def _place(r: Ranked) -> str:
    return f"{r.place}{'=' if r.tied else ''}"


def _standing(r: Ranked, keys: dict[int, str]) -> str:
    if r.standing == PARETO:
        return PARETO
    assert r.by
    return f"{r.standing} {keys.get(id(r.by), '')}{'*' if r.of_model == PARETO else ''}"


def _short(cell: Cell) -> str:
    """A reason that fits a line of a terminal."""
    p = cell.priced
    if cell.code == NOFIT and p and p.memory and p.configuration.gpu:
        return (
            f"{units.gib(p.memory.peak.value)} of {units.gib(p.configuration.gpu.memory_bytes)}, P {p.p_fit or 0:.2f}"
        )
    return cell.reason.removeprefix("late: ").removeprefix("over budget: ")


def _front(c: Comparison) -> str:
    names = [f"{letter(i)} {_name(r.cell)}" for i, r in enumerate(c.ranked) if r.standing == PARETO]
    return "; ".join(names)


def _plan(cell: Cell) -> str:
    """The method in few words: all-linear is the rule, so only other targets are named."""
    if cell.priced is None:
        return cell.method
    return method_line(cell.priced).removesuffix(" fine-tuning").removesuffix(", all-linear")


def _name(cell: Cell) -> str:
    return f"{cell.model}, {_plan(cell)}, {cell.gpu}"


def out_table(out: Sequence[Cell]) -> Table:
    """Cells of one model that are out for one reason on every GPU and method are one row."""
    rows: list[list[str]] = []
    seen = set()
    for cell in out:
        same = [c for c in out if (c.model, c.code, c.reason) == (cell.model, cell.code, cell.reason)]
        key = cell.model, cell.code, cell.reason
        if key in seen:
            continue
        seen.add(key)
        gpus, methods = (list(dict.fromkeys(getattr(c, name) for c in same)) for name in ("gpu", "method"))
        if len(gpus) * len(methods) == len(same):
            rows.append([cell.code, cell.model, ", ".join(gpus), ", ".join(methods), cell.reason])
        else:
            rows += [[c.code, c.model, c.gpu, c.method, c.reason] for c in same]
    return Table(("code", "model", "GPU", "method", "reason"), rows)


def plot(c: Comparison, budget_usd: float | None, deadline_s: float | None, legend: bool = True) -> Drawing | None:
    """Cost against time: what can be run, and hollow what is late or over budget. The page has its table as legend."""
    points = [
        Point(
            letter(i),
            _name(r.cell),
            r.cell.model,
            r.cell.time,
            r.cell.usd,
            r.cell.time_p90,
            r.cell.usd_p90,
            r.standing == PARETO,
        )
        for i, r in enumerate(c.ranked)
    ]
    outside = [cell for cell in c.out if cell.measured and cell.code in (LATE, OVERBUDGET)]
    points += [
        Point(
            letter(len(c.ranked) + i),
            _name(cell),
            cell.model,
            cell.time,
            cell.usd,
            cell.time_p90,
            cell.usd_p90,
            False,
            cell.code,
        )
        for i, cell in enumerate(outside)
    ]
    return front(points, budget_usd, deadline_s, legend) if points else None


# ---------------------------------------------------------------- rows


def rows(c: Comparison) -> list[dict[str, Any]]:
    """A line a cell."""
    found = []
    for r in c.ranked:
        found.append(_row(r.cell) | {"place": r.place, "tied": int(r.tied), "front": r.standing, "front_of_model": r.of_model,
                                     "better": _name(r.by) if r.by else ""})  # fmt: skip
    return found + [_row(cell) for cell in c.out]


def _row(cell: Cell) -> dict[str, Any]:
    p = cell.priced
    k = p.configuration if p else None
    row: dict[str, Any] = {
        "model": cell.model, "gpu": cell.gpu, "method": cell.method, "status": cell.code or "OK", "reason": cell.reason,
        "place": None, "tied": None, "front": None, "front_of_model": None, "better": None,
        "rank": k.method.rank if k and not k.method.is_full else None, "targets": ",".join(k.method.targets) if k and not k.method.is_full else None,
        "micro_batch": k.micro_batch if k else None, "accumulation": k.accumulation if k else None,
        "checkpointing": k.checkpointing if k else None,
    }  # fmt: skip
    row |= _quantiles("peak_bytes", p.memory.peak if p and p.memory else None)
    row["p_fit"] = p.p_fit if p else None
    row |= _quantiles("run_s", p.run_s if p else None)
    row |= _quantiles("usd", p.cost.usd if p and p.cost else None)
    row |= _quantiles("loss_above_full", cell.loss if cell.code != UNSUPPORTED else None)
    row["basis"] = p.cost.usd.basis if p and p.cost else None
    row["stale_prices"] = p.cost.stale if p and p.cost else None
    return row


def _quantiles(name: str, e: Estimate | None) -> dict[str, float | None]:
    ends = ("p05", "p50", "p90", "p95")
    if e is None:
        return {f"{name}_{end}": None for end in ends}
    return dict(zip((f"{name}_{end}" for end in ends), (e.low, e.value, quantile(e, 0.9), e.high), strict=True))


def cell_object(cell: Cell) -> dict[str, Any]:
    """A cell for --json: the columns of the CSV, and the intervals as text for people."""
    shown = (
        {"time": interval(cell.time, units.duration), "cost": interval(cell.usd, units.usd)} if cell.measured else {}
    )
    return _row(cell) | {"shown": shown}
