"""`lora-plan budget`: one or more plans in, the bill of the whole project out."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import date
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner import completion
from lora_planner.errors import BadInput, Infeasible, LoraPlanError, UsageError
from lora_planner.options import JSON, MODEL, PRICES, TERMS, WORK, job_of, options, terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_planner.actuals import Actuals
    from lora_planner.budget import Budget, Settings
    from lora_planner.facts import Price
    from lora_planner.pages.budget_report import Elsewhere
    from lora_planner.pages.plan_file import Sheet
    from lora_planner.pages.usage_file import Usage

CHARTS = ("memory", "capacity", "time", "cost", "total", "variance")
PROJECT = options(
    click.option("--rates", type=click.IntRange(0, 100), help="Learning rates to try.  [default: the plan's sweep]"),
    click.option("--ranks", type=click.IntRange(1, 20), default=2, show_default=True, help="Ranks that get them all."),
    click.option("--sweep", default="25%", show_default=True, metavar="SHARE", help="Length of their runs; 100% is full."),
    click.option("--seeds", type=click.IntRange(0, 1000), default=3, show_default=True, help="Final runs."),
    click.option("--eval", "evaluation", metavar="SHARE", help="Evaluation, of training.  [default: 3%,10%,40%]"),
    click.option("--failed", metavar="SHARE", help="What runs twice.  [default: 3%,15%,50%]"),
    click.option("--idle", metavar="SHARE", help="Paid and not used.  [default: 3%,15%,60%]"),
    click.option("--setup", type=float, metavar="MINUTES", help="Before the first run.  [default: 10 to 120]"),
    click.option("--checkpoints", type=click.IntRange(0, 1000), default=2, show_default=True, help="Kept a final run."),
    click.option("--months", type=float, default=3, show_default=True, help="Of storage."),
    click.option("--storage-price", type=float, metavar="USD", help="A GiB-month.  [default: 0.02 to 0.25]"),
    click.option("--contingency", default="p90", show_default=True, metavar="p90|SHARE", help="Added to the p50."),
    click.option("--actuals", metavar="FILE", shell_complete=completion.files, help="CSV of what was spent: kind,gpu,hours,usd[,runs,finished,date]."),
    click.option("--provider", metavar="NAME", help="Whose price; default: spread over all on demand."),
    click.option("--strict-prices", is_flag=True, help="Refuse prices older than 30 days (exit code 3)."),
    click.option("--hosted-price", type=float, metavar="USD", help="Of training a million tokens at a host."),
)  # fmt: skip
OUTPUTS = options(
    click.option(
        "--html",
        "html_file",
        metavar="FILE",
        shell_complete=completion.files,
        help="One page: no script, nothing to load.",
    ),
    click.option("--markdown", "markdown_file", metavar="FILE", shell_complete=completion.files),
    click.option("--csv", "csv_file", metavar="FILE", shell_complete=completion.files),
    click.option(
        "--plot",
        "plots",
        multiple=True,
        shell_complete=completion.files,
        metavar="CHART.svg|png",
        help=f"A file named {', '.join(CHARTS)}.",
    ),
)
CENTURY_HOURS = 100 * 365.25 * 24


@click.command()
@click.argument("plans", nargs=-1, metavar="[PLAN.json]...", shell_complete=completion.files)
@options(MODEL, WORK, terms(hidden=True), PROJECT, OUTPUTS, PRICES, JSON)
@click.option("--offline", is_flag=True, hidden=True)  # recommend documents it; help is one screen
def budget(plans: tuple[str, ...], as_json: bool, html_file: str | None, markdown_file: str | None, csv_file: str | None,
           plots: tuple[str, ...], **words: Any) -> None:  # fmt: skip
    """The bill of a whole project: sweep, seeds, evaluation, failures, idle time, storage.

    PLAN.json: from `lora-plan recommend --json`, - for stdin; several are parts of one project. Without one, --model,
    --data and all other options of recommend plan first. A SHARE is 15%, or low,value,high: 5%,15%,50%.
    Exit code 5: the amount to approve is over --budget.

    \b
    lora-plan budget plan.json --seeds 3 --idle 15% --html budget.html --csv budget.csv
    lora-plan budget plan.json --seeds 3 --idle 15% --actuals usage.csv --budget 500
    """
    from lora_planner.budget import budget as bill
    from lora_planner.pages import actuals_report, budget_report, text

    today = date.today()
    settings = _settings(words)
    limit = words["budget"]
    if limit is not None and not 0 < limit < float("inf"):
        raise Infeasible(f"nothing costs {limit:g} USD", "--budget", "Give a positive number, or leave it out.")
    kinds = [(path, text.chart_of(path, CHARTS)) for path in plots]
    sheets, others = _plans(plans, words, settings, today)
    found = bill([sheet.part for sheet in sheets], settings, today)
    spent = _spent(words["actuals"], found, sheets, today)
    stale = _stale(found, spent)
    if words["strict_prices"] and stale:
        _refuse_stale(found, stale, today)
    warnings = _warnings(found, sheets, spent, limit, today)
    over = limit is not None and (spent[0] if spent else found).approve_usd > limit

    # with actuals it is the re-forecast that is held against the limit
    page = budget_report.document(found, sheets, others, today, warnings, None if spent else limit)
    if spent:
        actuals_report.add(page, spent[0], found, spent[1], limit)
    if html_file:
        from lora_planner.pages.html import html

        text.write(html_file, html(page))
    if markdown_file:
        text.write(markdown_file, text.markdown(page))
    if csv_file:
        rows = budget_report.rows(found, sheets, others, today)
        text.write(
            csv_file,
            text.csv_text([*rows, *(actuals_report.rows(spent[0], found, spent[1], list(rows[0])) if spent else [])]),
        )
    for path, kind in kinds:
        _draw(path, kind, found, sheets, spent, limit)
    if as_json:
        click.echo(_json(found, sheets, others, spent, warnings, words, today, 5 if over else 0))
    else:
        text.show(page)
    sys.exit(5 if over else 0)


def _settings(words: dict[str, Any]) -> Settings:
    from lora_planner.budget import EVALUATION, FAILED, IDLE, SETUP, STORAGE, Settings, share
    from lora_planner.ledger import DERIVED, Estimate

    def asked(name: str, option: str, default: Estimate) -> Estimate:
        return share(words[name], option) if words[name] is not None else default

    def number(name: str, default: Estimate, factor: float = 1.0) -> Estimate:
        value, option = words[name], f"--{name.replace('_', '-')}"
        if value is None:
            return default
        _positive(value, option, zero=True)
        return Estimate(value * factor, value * factor, value * factor, default.unit, DERIVED, f"yours: {option}")

    sweep = share(words["sweep"], "--sweep").value
    if not 0 < sweep <= 1:
        raise BadInput(f"runs of {sweep:.0%} of a run", "--sweep", "Use more than 0% and at most 100%.")
    _positive(words["months"], "--months", zero=True)
    if words["hosted_price"] is not None:
        _positive(words["hosted_price"], "--hosted-price")
    p90 = words["contingency"].strip().lower() == "p90"
    return Settings(
        words["rates"],
        words["ranks"],
        sweep,
        words["seeds"],
        asked("evaluation", "--eval", EVALUATION),
        asked("failed", "--failed", FAILED),
        asked("idle", "--idle", IDLE),
        number("setup", SETUP, 60.0),
        words["checkpoints"],
        words["months"],
        number("storage_price", STORAGE),
        None if p90 else share(words["contingency"], "--contingency").value,
        words["provider"],
        words["hosted_price"],
    )


def _positive(value: float, option: str, zero: bool = False) -> None:
    if not isfinite(value) or value > 1e9 or value < 0 or (value == 0 and not zero):
        raise BadInput(f"{value:g} is out of range", option, "Use a positive number.")


def _plans(
    files: Sequence[str], words: dict[str, Any], settings: Settings, today: date
) -> tuple[list[Sheet], list[Elsewhere]]:
    """The plans that are bought, and what the other GPUs would have been."""
    from lora_planner.facts import prices
    from lora_planner.pages.plan_file import read, sheet

    if not files:
        return _planned(words, settings, today)
    given = _given("--model", "--data", "--tokens", "--gpu", *TERMS)
    if given:
        raise UsageError(f"{', '.join(given)} and a plan file", "", "The file has its own; leave one of them out.")
    sheets = [sheet(read(path), Path(path).name if path != "-" else "stdin") for path in files]
    if words["prices"]:
        rows = prices(words["prices"])
        sheets = [
            replace(s, part=replace(s.part, prices=tuple(r for r in rows if r.gpu == s.part.gpu))) for s in sheets
        ]
    return sheets, []


def _given(*options: str) -> list[str]:
    """Which of these stand on the command line."""
    context = click.get_current_context()
    source = click.core.ParameterSource.COMMANDLINE
    return [o for o in options if context.get_parameter_source(o.removeprefix("--").replace("-", "_")) is source]


def _planned(words: dict[str, Any], settings: Settings, today: date) -> tuple[list[Sheet], list[Elsewhere]]:
    """Plan as `recommend` does, then once more for each GPU that was not chosen."""
    from lora_planner.budget import budget as bill
    from lora_planner.pages.budget_report import Elsewhere
    from lora_planner.pages.plan_file import sheet
    from lora_planner.recommend import recommend
    from lora_planner.render import advice_object, to_json

    job = job_of(words)

    def planned(*gpus: Any) -> Sheet:
        document = json.loads(to_json(advice_object(recommend(replace(job, gpus=gpus)))))
        found = sheet(document, "--gpu")
        # a plan holds on-demand rows; the table of offers has the others too
        return replace(found, part=replace(found.part, prices=job.book.rows.get(found.part.gpu, ())))

    chosen = planned(*job.gpus)
    others = []
    for gpu in job.gpus:
        if gpu.name == chosen.part.gpu:
            continue
        try:
            other = planned(gpu)
            others.append(Elsewhere(gpu.name, other.method, bill([other.part], settings, today)))
        except LoraPlanError as error:  # a reason, in a row of its own
            others.append(Elsewhere(gpu.name, "", None, error.what))
    return [chosen], others


def _spent(path: str | None, found: Budget, sheets: Sequence[Sheet], today: date) -> tuple[Actuals, Usage] | None:
    """The usage file against the bill."""
    from lora_planner.actuals import actuals
    from lora_planner.pages.usage_file import read

    if path is None:
        return None
    usage = read(path, [(sheet.part.gpu, sheet.sha256) for sheet in sheets], today)
    return actuals(found, usage.lines), usage


def _stale(found: Budget, spent: tuple[Actuals, Usage] | None) -> tuple[Price, ...]:
    """Old prices that something is still predicted with: where one was paid, that one counts."""
    paid = {card.gpu for card in spent[0].cards if card.paid} if spent else set()
    return tuple(row for row in found.stale if row.gpu not in paid)


def _refuse_stale(found: Budget, stale: Sequence[Price], today: date) -> None:
    from lora_planner.budget import stale_words

    raise BadInput(f"{len(stale)} of {len(found.used)} prices are stale: {stale_words(stale, today)}",
                   "--strict-prices", "Pass --prices FILE with today's.")  # fmt: skip


def _warnings(
    found: Budget, sheets: Sequence[Sheet], spent: tuple[Actuals, Usage] | None, limit: float | None, today: date
) -> list[tuple[str, str, str]]:
    from lora_planner.budget import stale_words
    from lora_planner.units import usd

    rows = []
    if found.hours.p50 > CENTURY_HOURS:
        rows.append(("W-INFEASIBLE", "over 100 years of GPU time", "Less data, fewer epochs or a smaller model."))
    approve = (spent[0] if spent else found).approve_usd
    if limit is not None and approve > limit:
        already, fix = "", "Fewer --rates, --ranks or --seeds, shorter --sweep runs, or --provider."
        if spent:
            already = f", {usd(spent[0].spent_usd)} of it spent"
            fix = "Fewer of the runs that are left, or a cheaper provider for them."
        rows.append(("W-OVERBUDGET", f"{usd(approve)} to approve{already}, {usd(limit)} given", fix))
    if stale := _stale(found, spent):
        rows.append(("W-STALE-PRICE", f"{len(stale)} of {len(found.used)} prices are stale: {stale_words(stale, today)}",
                     "Pass --prices FILE with today's."))  # fmt: skip
    rows += _misses(spent[0]) if spent else []
    kept = (w for sheet in sheets for w in sheet.warnings if w[0] not in ("W-STALE-PRICE", "W-BUDGET", "W-NO-PRICE"))
    return list(dict.fromkeys((*rows, *kept)))


def _misses(a: Actuals) -> list[tuple[str, str, str]]:
    rows = []
    for c in a.cards:
        planned = c.predicted_factor
        if c.time_factor and not planned.low <= c.time_factor.value <= planned.high:
            rows.append(("W-TIME-MISS", f"runs on {c.gpu} took {c.time_factor.value:.2f} times the predicted time, outside "
                         f"[{planned.low:.2f}, {planned.high:.2f}]", "`lora-plan calibrate` on that machine."))  # fmt: skip
    return rows


def _draw(
    path: str, kind: str, found: Budget, sheets: Sequence[Sheet], spent: tuple[Actuals, Usage] | None, limit: float | None
) -> None:  # fmt: skip
    from lora_planner.pages import actuals_report
    from lora_planner.pages import budget_report as report
    from lora_planner.pages.text import plot, plots

    if kind == "variance":
        if spent is None:
            raise UsageError(f"--plot {path} needs --actuals", "", "Say what was spent, or leave it out.")
        plot(path, actuals_report.variance_chart(spent[0]))
    elif kind in ("memory", "capacity"):
        draw = report.memory_chart if kind == "memory" else report.capacity_chart
        drawings = [drawing for sheet in sheets if (drawing := draw(sheet))]
        if len(drawings) < len(sheets):
            raise BadInput("full fine-tuning has no adapter to draw", f"--plot {path}", "Leave it out.")
        plots(path, drawings)
    elif kind == "time":
        plot(path, report.time_chart(found, sheets))
    elif kind == "cost":
        plot(path, report.cost_chart(found.items))
    elif spent:
        plot(path, actuals_report.total_chart(spent[0], found, limit))
    else:
        plot(path, report.total_chart(found, limit))


def _json(
    found: Budget, sheets: Sequence[Sheet], others: Sequence[Elsewhere], spent: tuple[Actuals, Usage] | None,
    warnings: list[tuple[str, str, str]], words: dict[str, Any], today: date, code: int,
) -> str:  # fmt: skip
    from lora_planner.pages.actuals_report import learnt, summary
    from lora_planner.pages.budget_report import assumptions
    from lora_planner.render import envelope, plain, to_json

    result = {
        "approve_usd": found.approve_usd, "contingency_usd": found.contingency_usd, "total_usd": found.total,
        "gpu_hours": found.hours, "runs": found.runs, "basis": found.basis, "items": found.items, "offers": found.offers,
        "hosted": found.hosted, "settings": found.settings,
        "plans": [{"sha256": s.sha256, "model": s.part.model, "gpu": s.part.gpu, "method": s.method, "run_s": s.part.run_s}
                  for s in sheets],
        "alternatives": [a for s in sheets for a in s.alternatives],
        "elsewhere": [{"gpu": o.gpu, "plan": o.plan, "reason": o.reason, "total_usd": o.budget.total if o.budget else None}
                      for o in others],
        **({"actuals": summary(*spent)} if spent else {}),
    }  # fmt: skip
    sources = [{"key": a.what, "value": a.value, "kind": a.basis, "source": a.source, "as_of": a.as_of}
               for a in assumptions(found, sheets, today)]  # fmt: skip
    sources += learnt(*spent) if spent else []
    inputs = ([s.sha256 for s in sheets], found.settings, words["prices"], today, *([spent[1].sha256] if spent else []))
    return to_json(envelope(plain(result), inputs, warnings, sources, code))
