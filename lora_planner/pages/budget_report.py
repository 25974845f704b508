"""A budget as a document, and as rows for a spreadsheet. No arithmetic: what is said was computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from lora_planner import __version__, units
from lora_planner.budget import Budget, Item, Settings, Spread
from lora_planner.facts import age_days
from lora_planner.ledger import Estimate
from lora_planner.pages.charts import Drawing, Range, capacity_bar, memory_bars, ranges
from lora_planner.pages.curves import capacity_curve
from lora_planner.pages.document import (
    Document,
    Facts,
    Figure,
    Figures,
    Heading,
    Prose,
    Signature,
    Table,
    Warnings,
)
from lora_planner.pages.plan_file import Alternative, Assumed, Sheet
from lora_planner.render import interval, one_line

COMBINED = (
    "How intervals are combined: the error of the predicted time is one factor shared by all runs on a GPU, so it does "
    "not average out over runs; the price is one factor; evaluation, failures, idling, set-up and storage are one each; "
    "factors are independent. p50 and p90 are quantiles of the total under these intervals: a p90 is exceeded by one "
    "project in ten, if the intervals hold. A line's p50 and p90 are its parts of the total's, so that columns add up; the "
    "chart shows each line's own interval."
)


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The same project on another GPU: its own best plan, or why there is none."""

    gpu: str
    plan: str
    budget: Budget | None
    reason: str = ""


def document(
    b: Budget, sheets: Sequence[Sheet], others: Sequence[Elsewhere], today: date,
    warnings: Sequence[tuple[str, str, str]], limit_usd: float | None,
) -> Document:  # fmt: skip
    """The whole report."""
    s = b.settings
    names = ", ".join(dict.fromkeys(sheet.part.model for sheet in sheets))
    cards = ", ".join(dict.fromkeys(sheet.part.gpu for sheet in sheets))
    d = Document(f"Budget: fine-tuning {names}", f"{today.isoformat()}, {b.runs} runs on {cards}")
    spare = "p90 less p50" if s.contingency is None else f"{s.contingency:.0%} of p50"
    rows = [
        (units.usd(b.approve_usd), f"to approve: p50 and a contingency of {units.usd(b.contingency_usd)}, {spare}"),
        (units.usd(b.total.p50), "p50: as likely to cost more as less"),
        *([] if s.contingency is None else [(units.usd(b.total.p90), "p90: one project in ten costs more")]),
        (f"{_hours(b.hours.p50)} h", f"of GPU time at p50, {_hours(b.hours.p90)} h at p90"),
    ]
    if limit_usd:
        inside = "inside" if b.approve_usd <= limit_usd else "OVER"
        rows.append((units.usd(limit_usd), f"budget given; the amount to approve is {inside} it"))
    d.blocks.append(Figures(rows))
    brief = [("approve", f"{units.usd(b.approve_usd)}: p50 and a contingency of {units.usd(b.contingency_usd)} ({spare})"),
             ("total", f"p50 {units.usd(b.total.p50)}, p90 {units.usd(b.total.p90)} ({b.basis})"),
             ("time", f"p50 {_hours(b.hours.p50)}, p90 {_hours(b.hours.p90)} GPU-hours")]  # fmt: skip
    d.brief.append(Facts([*brief, *([("budget", f"{rows[-1][0]} {rows[-1][1]}")] if limit_usd else [])]))
    if warnings:
        d.blocks.append(Warnings(warnings))
    for i, sheet in enumerate(sheets):
        d.blocks += _bought(sheet, i if len(sheets) > 1 else None)
    d.add(Heading("Cost breakdown"), _breakdown(b), brief=True)
    d.blocks += [Figure([cost_chart(b.items)]), Prose(COMBINED, quiet=True)]
    d.add(Heading("Time and cost"))
    d.add(Figure([time_chart(b, sheets), total_chart(b, limit_usd)]))
    for sheet in sheets:
        d.add(Heading("Memory and capacity" + (f": {sheet.part.model} on {sheet.part.gpu}" if len(sheets) > 1 else "")))
        charts = [memory_chart(sheet), capacity_chart(sheet)]
        d.add(Figure([chart for chart in charts if chart]))
        peak = f"Memory by phase: at its peak, in {sheet.peak_phase}, {interval(sheet.peak, units.gib)} of {units.gib(sheet.card_bytes)}; it fits "
        d.add(Prose(f"{peak}with probability {sheet.p_fit:.2f} ({sheet.peak.basis}).", quiet=True))
        d.add(Prose(_held(sheet), quiet=True))
    d.add(Heading("By GPU and provider"))
    d.blocks.append(_offers(b, others))
    d.brief += [Heading(""), _offers(b, others, brief=True)]
    d.add(Prose(_priced(b, s), quiet=True), brief=True)
    d.add(Heading("Rent or hosted training"), Prose(_hosted(b)), brief=True)
    d.add(Heading("Alternatives considered"))
    for sheet in sheets:
        d.add(_alternatives(sheet.alternatives, others), Prose(sheet.considered + ".", quiet=True))
    d.add(Heading("Every assumption"), _assumptions(b, sheets, today))
    d.add(Heading("Approval"))
    hashes = "; ".join(f"{sheet.part.model}, {sheet.method}: {sheet.sha256}" for sheet in sheets)
    d.add(Signature(f"{units.usd(b.approve_usd)} for the plan with SHA-256 {hashes}"))
    d.brief.append(Facts([("plan", f"sha256 {sheet.sha256}") for sheet in sheets]))
    if warnings:
        d.brief.append(Warnings(warnings))
    d.footer = (
        f"lora-plan {__version__}. Amounts in USD. Every number says whether it is exact, derived, fitted or assumed."
    )
    return d


def _bought(sheet: Sheet, number: int | None) -> Iterator[Any]:
    yield Heading("What is bought and why" if number is None else f"What is bought and why: part {number + 1}")
    trained = f"{units.count(sheet.trainable)} of {units.count(sheet.parameters)} parameters ({units.percent(sheet.trainable / sheet.parameters)})"
    yield Facts([
        ("model", sheet.part.model), ("data", sheet.data), ("method", f"{sheet.method}; trains {trained}"),
        ("learning rate", f"{interval(sheet.lr, units.rate)} ({sheet.lr.basis}), {sheet.schedule}"),
        ("sweep", ", ".join(units.rate(rate) for rate in sheet.rates)),
        ("batch", f"{sheet.batch}; {sheet.steps:,.0f} steps"), ("GPU", sheet.part.gpu),
        ("one run", f"{interval(sheet.part.run_s, units.duration)} ({sheet.part.run_s.basis})"),
        ("loss", f"{interval(sheet.penalty, units.percent)} above full fine-tuning, predicted ({sheet.penalty.basis})"),
        ("why", "; ".join(sheet.reasons)), ("plan", f"sha256 {sheet.sha256}"),
    ])  # fmt: skip


def _held(sheet: Sheet) -> str:
    if sheet.capacity is None:
        return "Capacity: all parameters train, so nothing holds the data back."
    verdict, need, held = sheet.capacity
    return (f"Capacity: {verdict}. {interval(need, units.bits)} to learn at most; sources put what the adapter holds between "
            f"{units.bits(held.low)} and {units.bits(held.high)}.")  # fmt: skip


def _hours(h: float) -> str:
    """
    >>> _hours(0.41834), _hours(1570.2), _hours(4e14)
    ('0.418', '1,570', 'over 1M')
    """
    return "over 1M" if h > 1e6 else f"{h:,.0f}" if h >= 100 else f"{h:.3g}"


def _breakdown(b: Budget) -> Table:
    rows = [[i.name, i.detail, _hours(i.hours_p50) if i.hours else "", units.usd(i.usd_p50), units.usd(i.usd_p90), i.basis]
            for i in b.items]  # fmt: skip
    rows.append(["total", "", _hours(b.hours.p50), units.usd(b.total.p50), units.usd(b.total.p90), b.basis])
    return Table(
        ("item", "consists of", "GPU-h", "p50", "p90", "basis"), rows, frozenset({2, 3, 4}), frozenset({len(rows) - 1})
    )


def _offers(b: Budget, others: Sequence[Elsewhere], brief: bool = False) -> Table:
    """The project on every GPU at every price. `brief`: without what 80 columns have no room for."""
    rows: list[list[str]] = []
    dim, strong = set(), set()
    for plan, budget in [("", b), *((o.plan, o.budget) for o in others)]:
        for o in budget.offers if budget else ():
            if budget is b and b.settings.provider and o.chosen:
                strong.add(len(rows))
            if budget is not b or not o.chosen:
                dim.add(len(rows))
            provider = o.price.provider + ("" if o.price.commitment == "on-demand" else f", {o.price.commitment}")
            rows.append([
                o.price.gpu, provider, f"{o.price.usd_per_gpu_hour:g}", units.usd(o.usd.p50), units.usd(o.usd.p90),
                f"{o.price.as_of}{' stale' if o.stale else ''}", o.price.basis, plan.removesuffix(", all-linear") or "as above",
            ])  # fmt: skip
    for other in others:
        if other.budget is None:
            dim.add(len(rows))
            rows.append([other.gpu, "", "", "", "", "", "", other.reason])
    columns = ["GPU", "provider", "USD/h", "p50", "p90", "price as of", "basis", "plan"]
    hidden = {6} if brief else set()
    if not others:
        hidden.add(7)
    keep = [i for i in range(len(columns)) if i not in hidden]
    return Table(
        [columns[i] for i in keep],
        [[row[i] for i in keep] for row in rows],
        frozenset({2, 3, 4}),
        frozenset(strong),
        frozenset(dim),
        frozenset({0, 5}),
    )


def _priced(b: Budget, s: Settings) -> str:
    one = len({row.gpu for row in b.used}) == 1
    bases = " or ".join(dict.fromkeys(o.price.basis for o in b.offers))
    end = "The project at each price, with storage" if one else "The parts on that GPU at each price, without storage"
    end = f"{end}; prices are {bases}."
    if s.provider:
        return f"The total is at the price of {', '.join(f'{r.provider}, {r.commitment}' for r in b.used)}. {end}"
    if len(b.used) == len({row.gpu for row in b.used}):
        return end
    return f"{end} No provider is chosen, so the total is spread over {len(b.used)} on-demand prices; --provider NAME settles it."


def _hosted(b: Budget) -> str:
    h = b.hosted
    even = f"{units.usd(h.break_even_usd)} per million tokens"
    tokens = f"{interval(h.tokens, units.count)} tokens ({h.tokens.basis}; sweep and final runs)"
    if h.usd is None:
        return (f"Hosted training bought by the token costs as much as renting at {even}, for {tokens}. Give a host's price with "
                "--hosted-price to compare.")  # fmt: skip
    return (
        f"At {units.usd(h.usd_per_million or 0)} per million tokens, {tokens} cost {units.usd(h.usd.p50)} at p50 and {units.usd(h.usd.p90)} at p90 "
        f"hosted, {units.usd(b.total.p50)} and {units.usd(b.total.p90)} rented: {h.verdict}. Both cost the same at {even}. The host's "
        "evaluation, storage, minimum charges and ranks on offer are not in it."
    )  # fmt: skip


def _alternatives(rows: Sequence[Alternative], others: Sequence[Elsewhere]) -> Table:
    cells = [[a.plan, a.gpu, a.peak, a.time, a.cost, a.why] for a in rows]
    for o in others:
        if o.budget:
            cells.append([o.plan, o.gpu, "", f"{_hours(o.budget.hours.p50)} GPU-h", units.usd(o.budget.total.p50),
                          f"the whole project there: p90 {units.usd(o.budget.total.p90)}"])  # fmt: skip
        else:
            cells.append([o.plan, o.gpu, "", "", "", o.reason])
    return Table(("plan", "GPU", "peak", "time", "cost", "why not"), cells, frozenset({2, 3, 4}))


def _assumptions(b: Budget, sheets: Sequence[Sheet], today: date) -> Table:
    rows = [
        [a.what, a.value, a.basis, a.source, a.as_of or f"lora-plan {__version__}", a.change]
        for a in assumptions(b, sheets, today)
    ]
    return Table(("what", "value", "basis", "source", "as of", "change with"), rows, whole=frozenset({4}))


def assumptions(b: Budget, sheets: Sequence[Sheet], today: date) -> Iterator[Assumed]:
    """Prices, then what a project consists of, then what each plan stands on."""
    for row in b.used:
        yield Assumed(f"price of {row.gpu}", f"{row.usd_per_gpu_hour:g} USD/h at {row.provider}, {row.commitment}; {age_days(row, today)} days old", row.basis, row.source,
                      row.as_of.isoformat(), "--prices, --provider")  # fmt: skip
    s = b.settings
    for what, e, option in (("evaluation, of training", s.evaluation, "--eval"), ("failed runs, of training and evaluation", s.failed, "--failed"),
                            ("idle time, of the above", s.idle, "--idle")):  # fmt: skip
        yield Assumed(what, interval(e, lambda x: f"{x:.0%}"), e.basis, e.source, "", option)
    yield Assumed(
        "set-up, once a plan", interval(s.setup, units.duration), s.setup.basis, s.setup.source, "", "--setup"
    )
    yield Assumed(
        "storage, GiB-month", interval(s.storage, units.usd), s.storage.basis, s.storage.source, "", "--storage-price"
    )
    rates = "the plan's" if s.rates is None else s.rates
    counts = f"{s.seeds} seeds, {rates} rates x {s.ranks} ranks, each {s.sweep_share:.0%} of a run, at least 100 steps"
    yield Assumed("runs", counts, "assumed", "three seeds tell a difference from noise; other ranks are taken to last as long as this one",
                  "", "--seeds, --rates, --ranks, --sweep")  # fmt: skip
    yield Assumed("kept on disk", f"{s.checkpoints} checkpoints a final run, {s.months:g} months; a base at 2 B a parameter", "assumed", "ours", "",
                  "--checkpoints, --months")  # fmt: skip
    for sheet in sheets:
        first = f"{sheet.part.model} on {sheet.part.gpu}: " if len(sheets) > 1 else ""
        for a in sheet.assumed:
            yield Assumed(first + a.what, a.value, a.basis, a.source, a.as_of, a.change)


# ---------------------------------------------------------------- charts


def cost_chart(items: Sequence[Item]) -> Drawing:
    return ranges("Cost by item", [Range(i.name, i.usd.p05, i.usd.p50, i.usd.p95, i.usd.p90) for i in items], units.usd)


def total_chart(b: Budget, limit_usd: float | None) -> Drawing:
    rows = [_range("project", b.total)]
    if b.hosted.usd:
        rows.append(_range("hosted", b.hosted.usd, "b"))
    return ranges("Cost of the project", rows, units.usd, limit_usd)


def time_chart(b: Budget, sheets: Sequence[Sheet]) -> Drawing:
    rows = []
    for i, sheet in enumerate(sheets, start=1):
        e: Estimate = sheet.part.run_s.scaled(1 / units.HOUR)
        rows.append(Range("one run" if len(sheets) == 1 else f"one run, part {i}", e.low, e.value, e.high, ink="c"))
    return ranges("GPU time", [*rows, _range("all runs", b.hours)], lambda h: units.duration(h * units.HOUR))


def _range(name: str, s: Spread, ink: str = "a") -> Range:
    return Range(name, s.p05, s.p50, s.p95, s.p90, ink)


def memory_chart(sheet: Sheet) -> Drawing:
    return memory_bars(sheet.phases, sheet.peak, sheet.peak_phase, sheet.card_bytes, sheet.part.gpu)


def capacity_chart(sheet: Sheet) -> Drawing | None:
    if sheet.capacity is None:
        return None
    verdict, need, held = sheet.capacity
    if sheet.seen is None:
        return capacity_bar(need, held, verdict)
    return capacity_curve(need, held, verdict, sheet.seen, sheet.method)


# ---------------------------------------------------------------- rows


def rows(b: Budget, sheets: Sequence[Sheet], others: Sequence[Elsewhere], today: date) -> list[dict[str, Any]]:
    """A tidy table: one line a number."""
    empty: dict[str, Any] = dict.fromkeys(
        ("section", "item", "detail", "gpu", "provider", "unit", "p05", "p50", "p90", "p95", "basis", "source", "as_of")
    )

    def line(section: str, item: str, s: Spread | None = None, **more: Any) -> dict[str, Any]:
        numbers = {"unit": s.unit, "p05": s.p05, "p50": s.p50, "p90": s.p90, "p95": s.p95} if s else {}
        return {**empty, "section": section, "item": item, **numbers, **more}

    found = [
        line("cost", i.name, detail=i.detail, unit="USD", p50=i.usd_p50, p90=i.usd_p90, basis=i.basis) for i in b.items
    ]
    found += [line("line alone", i.name, i.usd, detail="its own quantiles", basis=i.basis) for i in b.items]
    found += [line("cost", "total", b.total, basis=b.basis), line("time", "GPU-hours", b.hours, basis=b.basis)]
    found += [line("cost", "contingency", unit="USD", p50=b.contingency_usd, basis=b.basis),
              line("cost", "to approve", unit="USD", p50=b.approve_usd, basis=b.basis)]  # fmt: skip
    for budget in (b, *(o.budget for o in others if o.budget)):
        storage = "with storage" if len({row.gpu for row in budget.used}) == 1 else "without storage"
        found += [line("offer", storage, o.usd, gpu=o.price.gpu, provider=f"{o.price.provider}, {o.price.commitment}",
                       detail=f"{o.price.usd_per_gpu_hour:g} USD/h, {o.age_days} days old{', stale' if o.stale else ''}", basis=o.price.basis,
                       source=o.price.source, as_of=o.price.as_of.isoformat()) for o in budget.offers]  # fmt: skip
    found += [line("alternative", o.plan or o.gpu, gpu=o.gpu, detail=o.reason) for o in others if o.budget is None]
    found.append(
        line("hosted", "break-even", unit="USD per million tokens", p50=b.hosted.break_even_usd, basis=b.basis)
    )
    if b.hosted.usd:
        found.append(line("hosted", "total", b.hosted.usd, detail=b.hosted.verdict, basis=b.hosted.tokens.basis))
    for sheet in sheets:
        found += [line("alternative", a.plan, gpu=a.gpu, detail=a.why) for a in sheet.alternatives]
        found.append(
            line("plan", sheet.method, gpu=sheet.part.gpu, detail=sheet.part.model, source=f"sha256 {sheet.sha256}")
        )
    found += [line("assumption", a.what, detail=one_line(a.value), basis=a.basis, source=a.source, as_of=a.as_of)
              for a in assumptions(b, sheets, today)]  # fmt: skip
    return found
