"""`lora-plan compare`: models x GPUs x methods under a budget and a deadline."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner import completion
from lora_planner.errors import BadInput, UnknownModelType, UsageError
from lora_planner.options import JSON, OFFLINE, PRICES, WORK, job_of, options, terms

if TYPE_CHECKING:
    from lora_planner.compare import Comparison
    from lora_planner.plan import Job

MOST_MODELS = 100
MAX_LIST_BYTES = 1 << 20


@click.command()
@click.option(
    "--model",
    "model",
    shell_complete=completion.models,
    metavar="NAME[,NAME]",
    help="As in recommend; several with commas.",
)
@click.option(
    "--models",
    "models_file",
    shell_complete=completion.files,
    metavar="FILE",
    help="One model a line; # starts a comment.",
)
@click.option("--methods", default="lora,qlora,full", show_default=True, metavar="NAME[,NAME]")
@options(WORK, terms())
@click.option(
    "--csv",
    "csv_file",
    shell_complete=completion.files,
    metavar="FILE",
    help="Every cell, with the reason of those that are out.",
)
@click.option(
    "--plot",
    "plot_file",
    shell_complete=completion.files,
    metavar="FILE.svg|png",
    help="Cost against time, with the Pareto set.",
)
@click.option(
    "--html", "html_file", shell_complete=completion.files, metavar="FILE", help="One page: no script, nothing to load."
)
@click.option("--markdown", "markdown_file", shell_complete=completion.files, metavar="FILE")
@options(PRICES, OFFLINE, JSON)
def compare(
    model: str | None, models_file: str | None, methods: str, csv_file: str | None, plot_file: str | None,
    html_file: str | None, markdown_file: str | None, as_json: bool, **words: Any,
) -> None:  # fmt: skip
    """Models x GPUs x methods: what fits a budget and a deadline, and what nothing beats.

    Each cell that is out has its reason: NOFIT, OVERBUDGET, LATE, UNSUPPORTED. Exit code 5: nothing is
    inside the budget; 4: nothing fits or is in time.

    \b
    lora-plan compare --model qwen3-8b,llama-3.1-8b --gpu h100-sxm-80gb,l40s-48gb --tokens 10M --budget 50
    lora-plan compare --models m.txt --gpu rtx4090-24gb --data chats.jsonl --deadline 12 --csv cells.csv
    """
    from lora_planner.compare import compare as cells
    from lora_planner.pages import compare_report as report
    from lora_planner.pages import text

    if plot_file and Path(plot_file).suffix.lower() not in (".svg", ".png"):
        raise UsageError(f"--plot {plot_file}: neither .svg nor .png", "", "Name a file of one of these kinds.")
    names = _names(model, models_file)
    jobs = _jobs(names, words)
    kinds = list(dict.fromkeys(m.strip() for m in methods.split(",") if m.strip()))
    found = cells(jobs, kinds)
    job = next((job for job in jobs.values() if not isinstance(job, str)), None)
    deadline_s = job.deadline_s if job else None
    warnings = _warnings(found, jobs)
    chart = report.plot(found, words["budget"], deadline_s, legend=False)
    gpus = len({cell.gpu for cell in [*found.out, *(r.cell for r in found.ranked)]})
    title = f"{_many(len(jobs), 'model')} x {_many(gpus, 'GPU')} x {_many(len(kinds), 'method')}"
    page = report.document(found, title, _limits(words, job), date.today(), warnings, chart)
    if csv_file:
        text.write(csv_file, text.csv_text(report.rows(found)))
    alone = report.plot(found, words["budget"], deadline_s)
    if plot_file and alone:
        text.plot(plot_file, alone)
    elif plot_file:
        click.echo(f"lora-plan: nothing has a cost and a time to plot; {plot_file} was not written.", err=True)
    if html_file:
        from lora_planner.pages.html import html

        text.write(html_file, html(page))
    if markdown_file:
        text.write(markdown_file, text.markdown(page))
    if as_json:
        click.echo(_json(found, names, kinds, words, warnings))
    else:
        text.show(page)
    sys.exit(found.exit_code)


def _many(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _names(model: str | None, path: str | None) -> list[str]:
    """Models of --model and --models, each once."""
    from lora_planner.checkpoint import open_regular

    names = [name.strip() for name in (model or "").split(",") if name.strip()]
    if path:
        where = Path(path).name
        with open_regular(Path(path), where) as file:
            raw = file.read(MAX_LIST_BYTES + 1)
        if len(raw) > MAX_LIST_BYTES:
            raise BadInput("a list of over 1 MiB", where, "Give one model a line.")
        try:
            lines = raw.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise BadInput("not UTF-8 text", where, "Give one model a line.") from None
        names += [name for line in lines if (name := line.split("#")[0].strip())]
    names = list(dict.fromkeys(names))
    if not names:
        raise UsageError("neither --model nor --models names a model", "", "See `lora-plan models`.")
    if len(names) > MOST_MODELS:
        raise BadInput(f"{len(names)} models", "--models", f"Compare at most {MOST_MODELS} at once.")
    return names


def _jobs(names: list[str], words: dict[str, Any]) -> dict[str, Job | str]:
    """A job a model, over data that are read once; for an architecture that we do not know, the reason."""
    from lora_planner.model_source import load_model

    first: Job | None = None
    found: dict[str, Job | str] = {}
    for name in names:
        try:
            if first is None:
                first = job_of({**words, "model": name})
                found[name] = first
                continue
            model = load_model(name, offline=words["offline"])
        except UnknownModelType as error:
            found[name] = error.what
            continue
        length = words["max_length"]
        if length and model.max_positions and length > model.max_positions:
            found[name] = f"--max-length {length} exceeds the model's {model.max_positions} positions"
        else:
            found[name] = replace(first, model=model)
    return found


def _limits(words: dict[str, Any], job: Job | None) -> list[tuple[str, str]]:
    from lora_planner.render import interval
    from lora_planner.units import count, duration, usd

    rows = []
    if job:
        data = job.data
        name = Path(data.path).name or "a number of tokens"
        rows.append(
            (
                "data",
                f"{name}: {data.examples:,} examples, {interval(data.tokens, count)} tokens ({data.basis}), {job.epochs:g} epochs",
            )
        )
        if job.budget_usd:
            rows.append(("budget", f"{usd(job.budget_usd)} a run"))
        if job.deadline_s:
            rows.append(("deadline", f"{duration(job.deadline_s)} a run"))
    return rows


def _warnings(found: Comparison, jobs: dict[str, Job | str]) -> list[tuple[str, str, str]]:
    from lora_planner.recommend import RL_TIME
    from lora_planner.units import duration, usd

    rows: list[tuple[str, str, str]] = []
    ready = [job for job in jobs.values() if not isinstance(job, str)]
    rows += [("W-MODEL", f"{name}: {text}", "See `lora-plan models`, or check the files.")
             for name, job in jobs.items() if not isinstance(job, str) for text in job.model.warnings]  # fmt: skip
    rows += [
        ("W-DATA", text, "Give --data and --tokenizer for exact counts.")
        for job in ready[:1]
        for text in job.data.warnings
    ]
    costs = [r.cell.priced.cost for r in found.ranked if r.cell.priced and r.cell.priced.cost]
    stale = {(row.gpu, row.provider) for cost in costs if cost.stale for row in cost.rows}
    if stale:
        oldest = max(cost.oldest_days for cost in costs)
        rows.append(("W-STALE-PRICE", f"prices of {len({gpu for gpu, _ in stale})} GPUs are older than 30 days (up to {oldest} days)",
                     "Pass --prices FILE with today's."))  # fmt: skip
    if ready and ready[0].budget_usd:
        risky = [r for r in found.ranked if r.cell.usd_p90 > (ready[0].budget_usd or 0)]
        if risky:
            rows.append(
                (
                    "W-BUDGET",
                    f"the p90 of {len(risky)} cells is over {usd(ready[0].budget_usd)}",
                    "Fix prices with --prices.",
                )
            )
    if ready and ready[0].deadline_s:
        late = [r for r in found.ranked if r.cell.time_p90 > (ready[0].deadline_s or 0)]
        if late:
            rows.append(("W-DEADLINE", f"the p90 of {len(late)} cells is later than {duration(ready[0].deadline_s)}",
                         "`lora-plan calibrate` narrows the time."))  # fmt: skip
    if ready and ready[0].rl:
        rows.append(RL_TIME)
    return rows


def _json(
    found: Comparison, names: list[str], kinds: list[str], words: dict[str, Any], warnings: list[tuple[str, str, str]]
) -> str:
    from lora_planner.pages.compare_report import cell_object
    from lora_planner.render import envelope, plain, to_json

    result = {
        "cells": len(found.ranked) + len(found.out),
        "counts": found.counts,
        "ranked": [cell_object(r.cell) | {"place": r.place, "tied": r.tied, "front": r.standing, "front_of_model": r.of_model}
                   for r in found.ranked],
        "out": [cell_object(cell) for cell in found.out],
    }  # fmt: skip
    prices = {
        id(row): row for r in found.ranked if r.cell.priced and r.cell.priced.cost for row in r.cell.priced.cost.rows
    }
    sources = [{"key": f"price of {row.gpu}", "value": row.usd_per_gpu_hour, "kind": row.basis, "source": row.source,
                "as_of": row.as_of.isoformat()} for row in prices.values()]  # fmt: skip
    return to_json(envelope(plain(result), (names, kinds, words), warnings, sources, found.exit_code))
