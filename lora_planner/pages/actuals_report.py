"""What was spent beside what was planned, as a section of the budget's report. No arithmetic: `actuals` has done it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora_planner import units
from lora_planner.actuals import (
    ALLOWANCE,
    EVALUATION,
    IDLE,
    KINDS,
    LEFT,
    PRICE,
    RERUNS,
    SO_FAR,
    STORAGE,
    TIME,
    Actuals,
    Card,
)
from lora_planner.budget import Budget, Spread
from lora_planner.ledger import DERIVED, EXACT, Estimate
from lora_planner.pages.charts import PLAIN, SMALL, Drawing, Line, Range, Rect, Text, ranges
from lora_planner.pages.document import Document, Facts, Figure, Figures, Heading, Prose, Signature, Table, Warnings
from lora_planner.pages.usage_file import Usage
from lora_planner.render import interval

TITLE = "Planned against actual"
SUM, TOTAL = "for the work done", "difference"
HOW = (
    "Causes add up to the difference, to the cent. Price: hours at the price paid less the same hours at the planned one. "
    "Time: hours of finished runs less those predicted for as many, at the planned price. Reruns, evaluation and idling: hours "
    "less those planned for the part of the training that is done. Still to do is planned and not yet spent. The p50 of a sum "
    "of skewed amounts is above the sum of their middles; the allowance is that part of it."
)
LEARNT = (
    "Re-forecast: what is spent, and what is left at the prices paid and the measured time of runs, where there are any; shares of "
    "evaluation, failures and idling move from planned to measured with the part of the training that is done."
)


def add(d: Document, a: Actuals, b: Budget, usage: Usage, limit_usd: float | None) -> None:
    """Put the section on top of the budget's report, and sign the re-forecast instead of the plan."""
    planned = f"to approve as planned; the re-forecast is {_against(a.approve_usd, a.approved_usd)}"
    figures = [
        (units.usd(a.approve_usd), f"to approve now: spent, the p50 of what is left, and a contingency of {units.usd(a.contingency_usd)}"),
        (units.usd(a.approved_usd), planned),
        (units.usd(a.spent_usd), f"spent, for {_hours(a.spent_hours)} of GPU time{_days(a)}"),
        (units.usd(a.forecast.p50), f"p50 at the end, {units.usd(a.forecast.p90)} at p90"),
    ]  # fmt: skip
    given = []
    if limit_usd:
        word = "inside" if a.approve_usd <= limit_usd else "OVER"
        given = [(units.usd(limit_usd), f"budget given; the amount to approve now is {word} it")]
    warnings = [block for block in d.blocks if isinstance(block, Warnings)]
    blocks = [block for block in d.blocks if not isinstance(block, Warnings)]
    for i, block in enumerate(blocks):
        if isinstance(block, Signature):
            now = f"{units.usd(a.approve_usd)}, of which {units.usd(a.spent_usd)} is spent"
            blocks[i] = Signature(f"{now}; as planned it was {block.sentence}")
    d.blocks = [
        Heading(TITLE), Figures([*figures, *given]), *warnings, by_cause(a),
        Figure([total_chart(a, b, limit_usd), variance_chart(a)]), Prose(HOW, quiet=True), by_item(a), Prose(LEARNT, quiet=True),
        Facts(list(_learnt(a))), Prose(_source(a, usage), quiet=True), Heading("As planned"), *blocks,
    ]  # fmt: skip
    days = _days(a).removeprefix(", ")
    lines = [("to approve", f"{figures[0][0]} now, {units.usd(a.approved_usd)} as planned: {_against(a.approve_usd, a.approved_usd)}"),
             *(("budget", f"{n} {what}") for n, what in given),
             ("spent", f"{units.usd(a.spent_usd)}, {_hours(a.spent_hours)} of GPU time{f' ({days})' if days else ''}"),
             ("left", f"p50 {units.usd(a.left.p50)}, p90 {units.usd(a.left.p90)}, {_hours(a.left_hours.p50)} of GPU time"),
             ("at the end", f"p50 {units.usd(a.forecast.p50)}, p90 {units.usd(a.forecast.p90)}")]  # fmt: skip
    # a terminal has no room for the plan's own tables; they are in the page
    plan = [block for block in d.brief if isinstance(block, Facts | Warnings)]
    d.brief = [
        Facts(lines), Heading(""), by_cause(a, brief=True), Heading(""),
        by_item(a), Facts(list(_learnt(a))), Prose(_source(a, usage), quiet=True), Heading(""), Prose("As planned:"), *plan,
    ]  # fmt: skip


def signed(usd: float) -> str:
    """Cents, with a sign, as differences are read.

    >>> signed(3.2), signed(-1234.567), signed(0)
    ('+$3.20', '-$1,234.57', '$0.00')
    """
    return f"{'+' if usd > 0 else '-' if usd < 0 else ''}${abs(usd):,.2f}"


def money(usd: float) -> str:
    """
    >>> money(1234.567)
    '$1,234.57'
    """
    return f"${usd:,.2f}"


def by_cause(a: Actuals, brief: bool = False) -> Table:
    """Each cause, GPU by GPU where there are several, then the sums: for the work done, and the whole."""
    found = a.by_cause()
    rows = []
    for name in SO_FAR:
        if name == STORAGE:
            rows.append([name, _stored(a), signed(found[name])])
        else:
            rows += [[name if len(a.cards) == 1 else f"{name}, {c.gpu}", _happened(c, name, a.kinds), signed(a.on_gpu(name, c.gpu))]
                     for c in a.cards]  # fmt: skip
    runs, left = (sum(c.runs_planned for c in a.cards), sum(c.runs_left for c in a.cards))
    rows += [
        [SUM, "against what was planned for as much", signed(a.so_far_usd)],
        [LEFT, f"{left} of {runs} runs, and what comes with them", signed(found[LEFT])],
        [ALLOWANCE, "what the p50 holds above the middle values", signed(found[ALLOWANCE])],
        [TOTAL, f"{money(a.spent_usd)} spent, p50 {money(a.planned_usd)} planned", signed(a.difference_usd)],
    ]
    if brief:
        rows = [row for row in rows if row[2] != signed(0.0) or row[0] == TOTAL]
    strong = frozenset(i for i, row in enumerate(rows) if row[0] in (SUM, TOTAL))
    return Table(("cause", "what happened", "USD"), rows, frozenset({2}), strong)


def _stored(a: Actuals) -> str:
    usd = a.by_cause()[STORAGE]
    if STORAGE not in a.kinds:
        return "no line of it"
    return (
        "over what was planned"
        if usd > 0
        else "less than planned, and closed"
        if usd < 0
        else "within what was planned"
    )


def _happened(c: Card, name: str, kinds: Sequence[str]) -> str:
    """The numbers behind a cause on one GPU."""
    if name == PRICE:
        paid = f"{units.usd(c.paid.value)} an hour paid" if c.paid else "no hours"
        return f"{paid}, {units.usd(c.planned_usd_per_hour)} planned"
    if name == TIME:
        return f"{_hours(c.run_hours)} for {c.runs_finished} finished runs, {_hours(c.run_hours_allowed)} predicted"
    hours, allowed, of = {
        RERUNS: (c.failed_hours, c.failed_hours_allowed, ("failed",)),
        EVALUATION: (c.evaluation_hours, c.evaluation_hours_allowed, ("evaluation",)),
        IDLE: (c.idle_hours, c.idle_hours_allowed, ("idle", "setup")),
    }[name]
    told = _hours(hours) if any(kind in kinds for kind in of) else "no line of it"
    said = f"{told}, {_hours(allowed)} planned so far"
    if name == RERUNS and c.runs_beyond:
        return f"{said}; {c.runs_beyond} run{'' if c.runs_beyond == 1 else 's'} beyond the plan"
    return said


def by_item(a: Actuals) -> Table:
    """The bill's lines: planned, spent, left, and at the end."""
    rows = [[i.name, units.usd(i.planned_p50), money(i.spent), units.usd(i.left_p50), units.usd(i.left_p90), units.usd(i.spent + i.left_p50)]
            for i in a.items]  # fmt: skip
    rows.append(
        [
            "total",
            units.usd(a.planned_usd),
            money(a.spent_usd),
            units.usd(a.left.p50),
            units.usd(a.left.p90),
            units.usd(a.forecast.p50),
        ]
    )
    columns = ("item", "planned p50", "spent", "left p50", "left p90", "at the end")
    return Table(columns, rows, frozenset({1, 2, 3, 4, 5}), frozenset({len(rows) - 1}))


def _learnt(a: Actuals) -> Iterator[tuple[str, str]]:
    for c in a.cards:
        runs = f"{c.runs_finished} of {c.runs_planned} runs finished" + (
            f", {c.runs_under_way} under way" if c.runs_under_way else ""
        )
        time = f"as predicted, {_factor(c.predicted_factor)}: none measured"
        if c.time_factor:
            time = f"{_factor(c.time_factor)} times the predicted one, measured; {_factor(c.predicted_factor)} planned"
        paid = (
            f"{units.usd(c.paid.value)} an hour paid"
            if c.paid
            else f"{units.usd(c.planned_usd_per_hour)} an hour as planned"
        )
        yield c.gpu, f"{runs}; time of a run {time}; {paid}"


def _factor(e: Estimate) -> str:
    return interval(e, lambda x: f"{x:.2f}")


def _source(a: Actuals, usage: Usage) -> str:
    missing = [kind for kind in KINDS if kind not in a.kinds]
    none = f" No line of {', '.join(missing)}: counted as nothing spent, and forecast as planned." if missing else ""
    lines = f"{a.lines} line{'' if a.lines == 1 else 's'}"
    ignored = f" Columns not read: {', '.join(usage.ignored)[:200]}." if usage.ignored else ""
    return f"From {usage.name}: {lines}, sha256 {usage.sha256}.{none}{ignored}"


def _days(a: Actuals) -> str:
    if a.first is None:
        return ""
    return f", {a.first}" if a.first == a.last else f", {a.first} to {a.last}"


def _against(now: float, planned: float) -> str:
    if round(now, 2) == round(planned, 2):
        return "the same"
    return f"{units.usd(abs(now - planned))} {'more' if now > planned else 'less'}"


def _hours(h: float) -> str:
    """
    >>> _hours(0.41834), _hours(31.2)
    ('25 min', '31.2 h')
    """
    return units.duration(h * units.HOUR) if h else "none"


# ---------------------------------------------------------------- charts


def total_chart(a: Actuals, b: Budget, limit_usd: float | None) -> Drawing:
    """The plan's total, what is spent, and the total as it looks now."""
    rows = [
        Range("as planned", b.total.p05, b.total.p50, b.total.p95, b.total.p90),
        Range("spent", a.spent_usd, a.spent_usd, a.spent_usd, a.spent_usd, "h"),
        Range("re-forecast", a.forecast.p05, a.forecast.p50, a.forecast.p95, a.forecast.p90, "c"),
    ]
    return ranges("Cost at the end", rows, units.usd, limit_usd)


def variance_chart(a: Actuals) -> Drawing:
    """The causes of the difference so far, as bars: to the right what was spent above the plan, to the left what was saved."""
    found = [(name, usd) for name, usd in a.by_cause(SO_FAR).items()]
    width, left, right, row, top = 380.0, 104.0, 316.0, 24.0, 12.0
    bottom = top + row * len(found)
    most = max((abs(usd) for _, usd in found), default=0.0) or 1.0
    low, high = (any(usd < 0 for _, usd in found), any(usd > 0 for _, usd in found))
    zero = right if not high and low else left if not low else (left + right) / 2
    scale = ((right - left) if zero != (left + right) / 2 else (right - left) / 2) / most
    said = "; ".join(f"{name} {signed(usd)}" for name, usd in found)
    d = Drawing("Spent above or below the plan, for the work done", said, width, bottom + 18)
    for i, (name, usd) in enumerate(found):
        y, x = top + i * row, min(zero, zero + usd * scale)
        d.shapes += [Text(left - 8, y + 13, name, "ink", PLAIN, "end"),
                     Rect(x, y + 3, abs(usd) * scale, 12, "b" if usd > 0 else "c", f"{name} {signed(usd)}"),
                     Text(width - 4, y + 13, signed(usd), "ink", SMALL, "end")]  # fmt: skip
    d.shapes += [Line(((zero, top - 4), (zero, bottom)), "ink"),
                 Text(left, bottom + 13, f"against the plan for the work done: {signed(a.so_far_usd)}", "soft", SMALL)]  # fmt: skip
    return d


# ---------------------------------------------------------------- rows and JSON


def rows(a: Actuals, b: Budget, usage: Usage, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Lines for the budget's CSV, under its columns: a number a line, an amount without an interval as p50."""
    empty: dict[str, Any] = dict.fromkeys(columns, None)

    def line(section: str, item: str, **more: Any) -> dict[str, Any]:
        return {**empty, "section": section, "item": item, **more}

    def numbers(s: Spread) -> dict[str, Any]:
        return {"unit": s.unit, "p05": s.p05, "p50": s.p50, "p90": s.p90, "p95": s.p95}

    source = f"{usage.name}, sha256 {usage.sha256}"
    found = [line("spent", i.name, unit="USD", p50=i.spent, basis=EXACT, source=source) for i in a.items]
    found += [line("spent", "total", unit="USD", p50=round(a.spent_usd, 2), basis=EXACT, source=source),
              line("spent", "GPU-hours", unit="h", p50=a.spent_hours, basis=EXACT, source=source)]  # fmt: skip
    found += [
        line("variance", c.name, gpu=c.gpu, unit="USD", p50=c.usd, basis=DERIVED, detail="spent less planned")
        for c in a.causes
    ]
    found += [line("variance", "total", unit="USD", p50=a.difference_usd, basis=DERIVED, detail="spent less the planned p50"),
              line("variance", SUM, unit="USD", p50=a.so_far_usd, basis=DERIVED)]  # fmt: skip
    found += [line("left", i.name, unit="USD", p50=i.left_p50, p90=i.left_p90, basis=b.basis) for i in a.items]
    found += [line("left", "total", **numbers(a.left), basis=b.basis), line("left", "GPU-hours", **numbers(a.left_hours), basis=b.basis),
              line("re-forecast", "total", **numbers(a.forecast), basis=b.basis),
              line("re-forecast", "contingency", unit="USD", p50=a.contingency_usd, basis=b.basis),
              line("re-forecast", "to approve", unit="USD", p50=a.approve_usd, basis=b.basis)]  # fmt: skip
    found += [line("learnt", what, gpu=gpu, unit=e.unit, p05=e.low, p50=e.value, p95=e.high, basis=e.basis, source=e.source)
              for what, gpu, e in _measured(a)]  # fmt: skip
    return found


def _measured(a: Actuals) -> Iterator[tuple[str, str, Estimate]]:
    for c in a.cards:
        for what, e in (("time of a run, of the predicted one", c.time_factor), ("price paid", c.paid)):
            if e:
                yield what, c.gpu, e


def learnt(a: Actuals, usage: Usage) -> list[dict[str, Any]]:
    """Where the measured numbers come from, as rows of `provenance`."""
    as_of = a.last.isoformat() if a.last else ""
    return [{"key": f"{what}, {gpu}", "value": interval(e, lambda x: f"{x:.4g}"), "kind": e.basis,
             "source": f"{usage.name}; {e.source}", "as_of": as_of} for what, gpu, e in _measured(a)]  # fmt: skip


def summary(a: Actuals, usage: Usage) -> dict[str, Any]:
    """What `--json` says of it."""
    return {
        "file": {"name": usage.name, "sha256": usage.sha256, "lines": a.lines, "ignored_columns": usage.ignored,
                 "first": a.first, "last": a.last, "kinds": a.kinds},
        "spent_usd": round(a.spent_usd, 2), "spent_gpu_hours": a.spent_hours, "planned_usd": round(a.planned_usd, 2),
        "difference_usd": a.difference_usd, "variance_usd": a.by_cause(), "for_the_work_done_usd": a.so_far_usd,
        "by_gpu": [{"cause": c.name, "gpu": c.gpu or None, "usd": c.usd} for c in a.causes],
        "done": a.done, "gpus": a.cards, "items": a.items, "left_usd": a.left, "left_gpu_hours": a.left_hours, "forecast_usd": a.forecast,
        "contingency_usd": a.contingency_usd, "approve_usd": a.approve_usd, "approved_usd": a.approved_usd, "shares": a.shares,
    }  # fmt: skip
