"""`lora-plan diagnose`: from the logs of one run or two to the cause, the evidence and the next experiment."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner import completion
from lora_planner.errors import BadInput, UsageError
from lora_planner.options import JSON, options

if TYPE_CHECKING:
    from calibrate.diagnose.logs import Log
    from calibrate.diagnose.verdict import Diagnosis, Planner
    from lora_planner.handoff.recipe import Recipe

TOOLS = ["trl", "axolotl", "llamafactory", "unsloth", "peft"]
PICTURES = (".svg", ".png")


@click.command()
@click.argument("run", shell_complete=completion.files, metavar="RUN")
@options(
    click.option(
        "--ref",
        shell_complete=completion.files,
        metavar="RUN",
        help="A run to hold it against: full fine-tuning, another rank or rate.",
    ),
    click.option(
        "--config",
        shell_complete=completion.files,
        metavar="FILE",
        help="RUN's training config: TRL, axolotl, LLaMA-Factory, Unsloth, peft.",
    ),
    click.option("--ref-config", shell_complete=completion.files, metavar="FILE", help="The training config of --ref."),
    click.option("--tool", type=click.Choice(TOOLS), help="Whose configs they are, where the keys do not tell."),
    click.option(
        "--model",
        shell_complete=completion.models,
        metavar="NAME|PATH",
        help="The base: expected rate, capacity, predicted penalty.",
    ),
    click.option(
        "--data", shell_complete=completion.files, metavar="FILE", help="The training data: how much there is to learn."
    ),
    click.option(
        "--plot",
        shell_complete=completion.files,
        metavar="FILE.svg|png",
        help="Loss curves, with the predicted end where there is one.",
    ),
    JSON,
)
def diagnose(run: str, ref: str | None, plot: str | None, as_json: bool, **words: Any) -> None:
    """Learning rate, capacity, batch or hygiene: what a run's logs say, and what they cannot.

    RUN is trainer_state.json or its directory, a Trainer's JSON lines or printed log, a CSV with step and loss,
    or a journal of our own runs: runs.jsonl#KEY. Each cause is LIKELY, POSSIBLE, UNLIKELY or CANNOT TELL.

    \b
    lora-plan diagnose out/trainer_state.json
    lora-plan diagnose lora/ --ref full/ --config train.yaml --model qwen3-8b --data chats.jsonl
    """
    from calibrate.diagnose.logs import read_log
    from calibrate.diagnose.verdict import diagnose as judge

    if plot and not plot.lower().endswith(PICTURES):
        raise UsageError(f"--plot {plot}: a picture is an SVG or a PNG", "", "Use --plot curves.svg.")
    if words["ref_config"] and not ref:
        raise UsageError("--ref-config without --ref", "", "Name the run it belongs to.")
    one, recipe = _configured(read_log(run), words["config"], words["tool"])
    other = _configured(read_log(ref), words["ref_config"], words["tool"])[0] if ref else None
    planner = _planner(one, recipe, words["model"], words["data"])
    found = judge(one, other, planner)
    if plot:
        _draw(found, planner, plot)
    if as_json:
        from lora_planner import render

        inputs = {"run": run, "ref": ref, "plot": plot, **words}
        click.echo(render.to_json(render.envelope(_object(found), inputs=inputs)))
    else:
        _show(found)
    sys.exit(0)


def _configured(log: Log, config: str | None, tool: str | None) -> tuple[Log, Recipe | None]:
    """The log with what its training config says, and that config; the rate that was logged is kept where both say one."""
    from dataclasses import replace

    if not config:
        return log, None
    from calibrate.diagnose.settings import of_recipe
    from lora_planner import handoff
    from lora_planner.handoff import source

    path = Path(config)
    if not path.is_file():
        raise BadInput("there is no such config", config, "Give the training config of the run.")
    recipe = handoff.read(source.read(path), tool or "")
    said, logged = of_recipe(recipe, path.name), log.settings.lr
    notes = log.notes
    if logged and said.lr and max(logged / said.lr, said.lr / logged) > 1.05:
        notes = (*notes, f"{path.name} says a rate of {said.lr:g}, the log's peak is {logged:g}")
    settings = said.over(log.settings)
    return replace(log, settings=replace(settings, lr=logged or settings.lr), notes=notes), recipe


def _planner(log: Log, recipe: Recipe | None, model_name: str | None, data: str | None) -> Planner:
    """What the planner knows of the model, and of the data where both are given."""
    from calibrate.diagnose.causes import Holds
    from calibrate.diagnose.verdict import Planner

    if not model_name:
        return Planner(data=data or "")
    from lora_planner import capacity
    from lora_planner.data_file import read_data
    from lora_planner.handoff.manifest import resolve
    from lora_planner.method import method
    from lora_planner.model_source import load_model
    from lora_planner.params import trainable_params

    model, s = load_model(model_name), log.settings
    holds = None
    if data and s.is_adapter and s.rank and not log.is_rl:
        if recipe and recipe.lora:
            manifest = resolve(model, recipe)
            trained = manifest.adapter_params + manifest.saved_params
        else:
            trained = trainable_params(
                model, method(s.method or "lora", s.rank, s.alpha or 32.0, s.targets or ("all-linear",))
            )
        need = capacity.sft_need(read_data(data).trained_tokens.value)
        holds = Holds(capacity.verdict(need, model.total, trained), trained, capacity.rank_penalty(s.rank, model.total))
    return Planner(model.total, model.model_type, holds, model_name, data or "")


def _draw(found: Diagnosis, planner: Planner, path: str) -> None:
    from calibrate.diagnose import picture
    from lora_planner.pages.curves import curve
    from lora_planner.pages.text import plot

    plot(path, curve(picture.plot(found, planner.holds.penalty if planner.holds else None)))


# ---------------------------------------------------------------- output


def _object(d: Diagnosis) -> dict[str, Any]:
    from lora_planner.render import plain

    gap = d.gap
    return {
        "run": _run_object(d.run),
        "reference": _run_object(d.reference) if d.reference else None,
        "gap": {"channel": gap.channel, "axis": gap.axis, "end": gap.end, "nats": plain(gap.nats),
                "relative": gap.relative, "early": gap.early, "lag": plain(gap.lag) if gap.lag else None,
                "growth": plain(gap.growth) if gap.growth else None, "points": plain(gap.points)} if gap else None,
        "findings": [plain(f) for f in d.findings],
        "checks": [{"code": c.code, "title": c.title, "seen": plain(e) if e else None, "needs": c.needs, "fix": c.fix}
                   for c, e in d.checks],
        "refused": list(d.refused),
        "cannot_tell": list(d.cannot),
        "experiment": plain(d.experiment) if d.experiment else None,
    }  # fmt: skip


def _run_object(log: Log) -> dict[str, Any]:
    from lora_planner.render import plain

    return {"name": log.name, "form": log.form, "settings": plain(log.settings), "last_step": log.last,
            "training_losses": len(log.train), "held_out_losses": len(log.held_out), "notes": list(log.notes)}  # fmt: skip


def _show(d: Diagnosis) -> None:
    from calibrate.diagnose.causes import gap_text, opens
    from calibrate.diagnose.evidence import LIKELY, POSSIBLE
    from calibrate.diagnose.logs import describe
    from lora_planner import units
    from lora_planner.render import grid, one_line, styled, terminal

    console = terminal()
    rows: list[tuple[str, Any]] = [("run", styled(one_line(describe(d.run))))]
    if d.reference:
        rows.append(("ref", styled(one_line(describe(d.reference)))))
    for log in (d.run, d.reference):
        rows += [("", styled((one_line(note), "dim"))) for note in (*log.notes, *log.settings.notes)] if log else []
    if d.gap:
        text = gap_text(d.gap)
        if d.gap.lag:
            k = d.gap.lag
            text += f"; {k.value:.2g}x [{k.low:.2g}, {k.high:.2g}] behind"
        if d.gap.growth:
            words = {"grows": "and more and more", "stands": "a factor that stands still", "between": "a factor that grows a little",
                     "shrinks": "and catching up"}  # fmt: skip
            text += f", {words[opens(d.gap)]}" if opens(d.gap) in words else ""
        rows.append(("gap", styled(text)))
    rows += [("refused", styled((one_line(text), "yellow"))) for text in d.refused]
    console.print(grid(rows))
    console.print()
    console.print(_causes(d, LIKELY, POSSIBLE))
    rest: list[tuple[str, Any]] = [("cannot tell", styled(one_line(text))) if i == 0 else ("", styled(one_line(text)))
                                   for i, text in enumerate(d.cannot)]  # fmt: skip
    if d.experiment:
        e = d.experiment
        cost = f", about {units.duration(e.seconds)}" if e.seconds else ""
        rest.append(("experiment", styled((one_line(e.change), "bold"), cost)))
        rest += [("", styled(one_line(text))) for text in e.expect]
        rest.append(("", styled((one_line(e.command), "cyan"))))
    if rest:
        console.print()
        console.print(grid(rest))


def _causes(d: Diagnosis, likely: str, possible: str) -> Any:
    from lora_planner.render import grid, one_line, styled

    colours = {likely: "bold red", possible: "bold yellow"}
    rows: list[tuple[str, Any]] = []
    for i, f in enumerate(d.findings, 1):
        detail = f" {one_line(f.detail)}" if f.detail else ""
        rows.append((f"{i} {f.cause}", styled((f.word, colours.get(f.word, "")), detail)))
        for e in f.evidence if f.cause == "hygiene" else sorted(f.evidence, key=lambda e: -abs(e.weight)):
            sign = "+" if e.weight > 0 else "-" if e.weight < 0 else "."
            rows.append(("", styled((f"{sign} ", "dim"), one_line(e.text))))
        if f.fix and f.word in (likely, possible):
            rows.append(("", styled(("try: ", "dim"), one_line(f.fix))))
    return grid(rows)
