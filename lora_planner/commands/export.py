"""`lora-plan export PLAN --to TOOL`: the plan as files that training tools load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner.options import JSON, OFFLINE, options

if TYPE_CHECKING:
    from lora_planner.handoff.plan_file import Planned
    from lora_planner.handoff.recipe import File

TRAINERS = ("trl", "axolotl", "llamafactory", "unsloth")
TOOLS = [*TRAINERS, "peft", "vllm"]


@click.command()
@click.argument("plan", metavar="PLAN")
@options(OFFLINE, JSON)
@click.option("--to", "tool", type=click.Choice(TOOLS), required=True, help="Who is to load the files.")
@click.option("--out", metavar="DIR", type=click.Path(path_type=Path), help="Where to write; default: export/TOOL.")
@click.option("--model", metavar="PATH|ID", help="The planned model, where the plan knows its name only.")
@click.option("--data", metavar="FILE", help="The data as the tool is to find them; default: the planned file's name.")
@click.option("--force", is_flag=True, help="Replace files that are there and differ.")
def export(plan: str, tool: str, out: Path | None, as_json: bool, force: bool, **words: Any) -> None:
    """Write a plan as the config of a training or serving tool.

    PLAN: the JSON of `lora-plan recommend --json`, or - for stdin. What is written reaches exactly the matrices that
    were planned, and `lora-plan check` reads it back.

    \b
    lora-plan recommend --model qwen3-8b --data chats.jsonl --gpu h100-sxm-80gb --json > plan.json
    lora-plan export plan.json --to trl --out export/trl
    """
    from dataclasses import replace

    from lora_planner import render
    from lora_planner.handoff import WRITERS
    from lora_planner.handoff.plan_file import planned, read_plan

    document = read_plan(plan)
    found = planned(document, words["model"], words["offline"])
    recipe = replace(found.recipe, dataset=words["data"]) if words["data"] else found.recipe
    files = WRITERS[tool].write(recipe, _header(found, tool))
    folder = out or Path("export") / tool
    _write(folder, files, force)
    command = WRITERS[tool].commands(recipe)
    warnings = list(found.warnings)
    if as_json:
        result = {"tool": tool, "files": [str(folder / file.name) for file in files], "command": command,
                  "trainable": found.trainable, "plan": found.sha256}  # fmt: skip
        click.echo(
            render.to_json(render.envelope(result, {"plan": document.get("inputs_sha256"), "tool": tool}, warnings))
        )
        return
    for file in files:
        click.echo(render.one_line(str(folder / file.name)))
    for code, msg, fix in warnings:
        click.echo(render.one_line(f"{code} {msg}. {fix}"), err=True)
    if not recipe.dataset and tool in TRAINERS:
        rewards = ", and add reward_funcs" if recipe.objective == "rl" else ""
        click.echo(f"data: the plan was made without a file; name yours with --data, or add it to the config{rewards}")
    elif not words["data"] and tool in TRAINERS:
        click.echo(render.one_line(f"data: {recipe.dataset} is looked for in {folder}; --data names another place"))
    run = f"in Python, in {folder}: {command}" if tool == "peft" else f"run: cd {folder} && {command}"
    click.echo(render.one_line(run))


def _header(found: Planned, tool: str) -> tuple[str, ...]:
    from lora_planner import __version__
    from lora_planner.handoff import WRITERS
    from lora_planner.units import rate

    low, high = found.lr_band
    return (
        f"lora-plan {__version__}, plan {found.sha256}, for {WRITERS[tool].LABEL}",
        f"trains {found.trainable:,} parameters; learning rate within [{rate(low)}, {rate(high)}]",
    )


def _write(folder: Path, files: tuple[File, ...], force: bool) -> None:
    """All files or none: nothing of the user's is replaced unasked, and no file is seen half written."""
    from lora_planner.errors import BadInput

    for file in files:
        path = folder / file.name
        if path.exists() and not force and (not path.is_file() or path.read_bytes() != file.text.encode()):
            raise BadInput("there is a file already, and it differs", str(path), "Use another --out, or --force.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            beside = folder / f".{file.name}.new"
            beside.write_text(file.text, encoding="utf-8")
            beside.replace(folder / file.name)
    except OSError as error:
        raise BadInput(
            f"cannot write: {error.strerror or error}", str(folder), "Name another directory with --out."
        ) from None
