"""`lora-plan report`: how wrong the planner is, on public measurements, on runs recorded here, on published claims."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner.commands.optional import own_runs, runner, track
from lora_planner.completion import files
from lora_planner.errors import BadInput, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calibrate.own_runs import Group
    from calibrate.score import Accuracy, Miss
    from lora_planner.pages.charts import Drawing
    from lora_planner.pages.document import Block, Document
    from lora_planner.record import Plot, RunRecord, Score

CHARTS = ("sweep", "loss")
QUANTITIES = {"trainable": "trained params", "peak_bytes": "peak memory", "step_s": "step time", "tokens_per_s": "tokens a second"}  # fmt: skip
RATIOS = (
    "Measured over predicted, of runs that finished or diverged; every prediction was written before its run started, and "
    "its interval is a 90 % one. Fed a fit: runs whose measurements later fed the constants."
)
SWEEPS = (
    "Points are means over seeds, bars the seeds' range. A dashed parabola in the log of the rate is fitted seed by seed through "
    "the points around the lowest; the shaded strip is the 95 % interval of its best rate over seeds. No optimum is named "
    "unless every seed has two finite rates on each side of its lowest point. A cross has no loss to draw: the run diverged, "
    "or ended worse than it began."
)
CURVES = (
    "Each arm at the best rate of its grid, first seed. Where a band is drawn, the planner predicted the end of that run, "
    "from the end of full fine-tuning and the penalty of the rank; nothing is predicted of the way there, or of models "
    "far smaller than any on which the penalty was measured. Left out: bases and tasks of one rate whose loss was read at the "
    "start and the end alone."
)


@click.command()
@click.argument("journals", nargs=-1, metavar="[RUNS.jsonl]...", shell_complete=files)
@click.option(
    "--markdown", "--to", "to", metavar="FILE", shell_complete=files, help="The page, instead of on the terminal."
)
@click.option(
    "--html",
    "html_file",
    metavar="FILE",
    shell_complete=files,
    help="Of RUNS.jsonl: one page, no script, nothing to load.",
)
@click.option(
    "--plot",
    "plots",
    multiple=True,
    metavar="CHART.svg|png",
    shell_complete=files,
    help=f"Of RUNS.jsonl: a file named {' or '.join(CHARTS)}; several are numbered.",
)
@click.option("--claims", is_flag=True, help="Verdicts on the paper's claims instead, with pictures beside --to.")
@click.option(
    "--size", type=click.Choice(["cpu", "gpu"]), default="cpu", show_default=True, help="Of the claims' runs."
)
def report(journals: tuple[str, ...], to: str | None, html_file: str | None, plots: tuple[str, ...], claims: bool, size: str) -> None:  # fmt: skip
    """How wrong the planner is: on public measurements, or, of RUNS.jsonl, on runs recorded here.

    \b
    lora-plan report --markdown reports/scoreboard.md
    lora-plan report lora-plan-runs/runs.jsonl --markdown own-runs.md --html own-runs.html --plot sweep.svg
    lora-plan report reports/runs/cpu.jsonl --claims --markdown reports/verification.md
    """
    from lora_planner.pages import text
    from lora_planner.record import merge, read_events

    kinds = [(path, text.chart_of(path, CHARTS)) for path in plots]
    if (html_file or plots) and (claims or not journals):
        raise UsageError(
            "--html and --plot are of own runs", "", "Name the runs.jsonl of `lora-plan verify`, without --claims."
        )
    events = []
    damaged: list[tuple[str, str, str]] = []
    for name in journals:
        if not Path(name).is_file():
            raise BadInput("there is no such journal", name, "Run `lora-plan verify` first, or name its runs.jsonl.")
        found, skipped = read_events(Path(name))
        events += found
        for number, why in skipped:
            what = f"skipped line {number} of {Path(name).name}: {why}"
            click.echo(f"lora-plan: {what}", err=True)
            damaged.append(("W-DAMAGED", what, "Its run counts as far as other lines tell of it"))
    if claims:
        if not journals:
            raise UsageError("--claims without a journal", "", "Name the runs.jsonl of `lora-plan verify CLAIM`.")
        page = _claims_page(events, size, Path(to).parent if to else None)
    elif journals:
        from calibrate.score import scoreboard, scores
        from calibrate.verdict import arm_table, arms

        runs = list(merge(events).values())
        known = scores(runs)
        parts = [scoreboard(known, runs), "## Held-out losses by learning rate", "", *arm_table(arms(runs))]
        page = "\n".join(parts)
        if html_file or plots:
            _pictures(runs, known, [Path(name).name for name in journals], damaged, html_file, kinds)
    else:
        track()
        from calibrate.track.page import record

        page = record()
    if to:
        try:
            Path(to).write_text(page.rstrip() + "\n", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write the page: {error.strerror or error}", to, "Name another file.") from None
    else:
        click.echo(page)


def _claims_page(events: list[Any], size: str, beside: Path | None) -> str:
    """The page of verdicts; `beside`: where it will lie, with its pictures in figures/."""
    runner()
    from calibrate.family import corrected
    from calibrate.figures import draw
    from calibrate.page import verification
    from runner.claims import study

    entries = corrected(study.entries(events, size, study.chosen(["all"])))
    if beside:
        (beside / "figures").mkdir(parents=True, exist_ok=True)
        for entry in entries:
            if entry.picture and entry.verdict.plot:
                draw(entry.verdict.plot, beside / entry.picture)
    return verification(entries, study.environment(events))


# ---------------------------------------------------------------- own runs as pictures


def _pictures(
    runs: Sequence[RunRecord], known: Sequence[Score], journals: Sequence[str], damaged: Sequence[tuple[str, str, str]],
    html_file: str | None, kinds: Sequence[tuple[str, str]],
) -> None:  # fmt: skip
    from lora_planner.pages import text
    from lora_planner.pages.curves import curve

    own = own_runs()
    groups = own.groups(runs)
    for path, kind in kinds:
        some = own.sweep_plots(groups) if kind == "sweep" else own.loss_plots(groups)
        if not some:
            why = "no arm was run at two learning rates" if kind == "sweep" else "no run has a held-out loss at its end"
            raise BadInput(f"{why}: there is nothing to draw", f"--plot {path}", "Leave it out.")
        text.plots(path, [curve(plot) for plot in some])
    if html_file:
        from lora_planner.pages.html import html

        text.write(html_file, html(_document(own, runs, known, groups, journals, damaged)))


def _document(
    own: Any, runs: Sequence[RunRecord], known: Sequence[Score], groups: Sequence[Group], journals: Sequence[str],
    damaged: Sequence[tuple[str, str, str]],
) -> Document:  # fmt: skip
    """The page of own runs: its numbers are those of calibrate/own_runs.py."""
    from calibrate.score import accuracy
    from calibrate.verdict import noise_floor
    from lora_planner import __version__
    from lora_planner.pages.document import Document, Figure, Figures, Heading, Prose, Table, Warnings

    d = Document("Predicted before the run, measured after it", f"{date.today().isoformat()}, {', '.join(journals)}")
    floor, covered = noise_floor(runs), sum(score.covered for score in known)
    counts = own.statuses(runs)
    noise = ("unknown", "noise floor: no run was repeated with its seed") if floor is None else (
        f"{floor:.2g} nats", "noise floor: the most by which runs of one seed differ at the end")  # fmt: skip
    d.add(Figures([(f"{len(runs):,}", "runs: " + ", ".join(f"{n:,} {status}" for status, n in counts)),
                   (f"{covered:,} of {len(known):,}", "measurements inside the interval predicted for them"), noise]))  # fmt: skip
    if damaged:
        d.add(Warnings(damaged))
    d.add(Heading("Predicted against measured"))
    rows = accuracy(known)
    if rows:
        d.add(Figure(_ratios(rows)), _accuracy_table(rows), Prose(RATIOS, quiet=True))
    else:
        d.add(Prose("Nothing was both predicted and measured."))
    d.add(Heading("Runs by status"))
    d.add(Table(("status", "runs"), [*([status, f"{n:,}"] for status, n in counts), ["all", f"{len(runs):,}"]],
                frozenset({1}), frozenset({len(counts)})))  # fmt: skip
    d.add(Heading("Worst misses"), *_misses(own, runs, known))
    d.add(Heading("Learning rates"))
    _add_plots(d, own.sweep_plots(groups), SWEEPS, "No arm was run at two learning rates.")
    d.add(*_arms(groups))
    d.add(Heading("Loss over steps"))
    _add_plots(d, own.loss_plots(groups), CURVES, "No run has a held-out loss at its end.")
    d.footer = f"lora-plan {__version__}. Losses are held-out nats per trained token."
    return d


def _add_plots(d: Document, plots: Sequence[Plot], reading: str, none: str) -> None:
    from lora_planner.pages.curves import curve
    from lora_planner.pages.document import Figure, Prose

    if plots:
        d.add(Prose(reading, quiet=True), Figure([curve(plot) for plot in plots]))
    else:
        d.add(Prose(none))


def _ratios(rows: Sequence[Accuracy]) -> list[Drawing]:
    """A chart a device: measured over predicted, with a line where they are equal."""
    from lora_planner.pages.charts import Range, ranges

    drawings = []
    for stack, device in dict.fromkeys((row.stack, row.device) for row in rows):
        some = [row for row in rows if (row.stack, row.device) == (stack, device)]
        bars = [Range(QUANTITIES[row.quantity], row.ratio.low, row.ratio.value, row.ratio.high) for row in some]
        drawings.append(ranges(f"Measured over predicted, {device}", bars, lambda x: f"{x:.3g}", 1.0))
    return drawings


def _accuracy_table(rows: Sequence[Accuracy]) -> Block:
    from lora_planner.pages.document import Table

    columns = (
        "quantity",
        "stack",
        "device",
        "n",
        "median ratio",
        "median error",
        "worst error",
        "covered",
        "fed a fit",
    )
    return Table(columns, [
        [QUANTITIES[row.quantity], row.stack, row.device, f"{row.n:,}", f"{row.ratio.value:.3f}", f"{row.median_error:.1%}",
         f"{row.worst_error:.1%}", f"{row.covered:,} of {row.n:,}", f"{row.fitted:,} of {row.n:,}"] for row in rows
    ], frozenset(range(3, 9)))  # fmt: skip


def _misses(own: Any, runs: Sequence[RunRecord], known: Sequence[Score]) -> list[Block]:
    from calibrate.score import misses
    from lora_planner.pages.document import Prose, Table
    from lora_planner.render import interval

    found, more = misses(known)
    rows = [_miss(miss) for miss in found]
    strong = frozenset(i for i, miss in enumerate(found) if miss.contradicts)
    for key, label, peak in own.out_of_memory(runs):
        foretold = interval(peak, _form("peak_bytes")) if peak else "nothing"
        rows.append([f"{label} ({key})", QUANTITIES["peak_bytes"], foretold, "out of memory", ""])
    if not rows:
        return [Prose("None: every measurement lies inside its interval.")]
    blocks: list[Block] = [
        Table(("run", "quantity", "predicted", "measured", "half-widths off"), rows, frozenset({3, 4}), strong)
    ]
    if more:
        blocks.append(Prose(f"And {more:,} more outside their interval."))
    if strong:
        blocks.append(Prose("In bold: over three half-widths off, which contradicts the formula.", quiet=True))
    return blocks


def _miss(miss: Miss) -> list[str]:
    from lora_planner.render import interval

    s, form = miss.score, _form(miss.score.quantity)
    return [f"{s.label} ({s.key})", QUANTITIES[s.quantity], interval(s.predicted, form), form(s.measured), f"{miss.widths:.2f}"]  # fmt: skip


def _form(quantity: str) -> Any:
    from lora_planner import units

    return {"peak_bytes": units.gib, "step_s": units.duration, "trainable": lambda n: f"{n:,.0f}"}.get(quantity, lambda x: f"{x:.4g}")  # fmt: skip


def _arms(groups: Sequence[Group]) -> list[Block]:
    """A row an arm that was swept, a table a base and task."""
    from lora_planner import units
    from lora_planner.pages.document import Prose, Table

    blocks: list[Block] = []
    for group in groups:
        rows = []
        for a in group.arms:
            if not a.is_swept:
                continue
            tried = sorted([*a.arm.losses, *a.arm.diverged])
            best = f"{a.arm.best[1]:.3f} at {units.rate(a.arm.best[0])}" if a.arm.losses else "none"
            rows.append([a.arm.name, f"{a.arm.seeds}", f"{len(tried)}, {units.rate(tried[0])} to {units.rate(tried[-1])}",
                         ", ".join(map(units.rate, a.arm.diverged)), best, a.optimum])  # fmt: skip
        if rows:
            columns = ("arm", "seeds", "rates", "diverged at", "best of the grid", "fitted optimum [95 %]")
            blocks += [Prose(f"{group.title}:"), Table(columns, rows, frozenset({1}))]
    return blocks
