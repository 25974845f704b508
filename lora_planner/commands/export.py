"""`lora-plan export PLAN --to TOOL`: the plan as files that training tools load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner import completion
from lora_planner.options import JSON, OFFLINE, options

if TYPE_CHECKING:
    from lora_planner.handoff.plan_file import Planned
    from lora_planner.handoff.recipe import File

TRAINERS = ("trl", "axolotl", "llamafactory", "unsloth")
TOOLS = [*TRAINERS, "peft", "vllm"]
FORMS = ["fused-over-active", "fused", "none"]


@click.command()
@click.argument("plan", shell_complete=completion.files, metavar="PLAN")
@options(OFFLINE, JSON)
@click.option("--to", "tool", type=click.Choice(TOOLS), required=True, help="Who is to load the files.")
@click.option(
    "--out",
    shell_complete=completion.files,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where to write; default: export/TOOL.",
)
@click.option(
    "--model",
    shell_complete=completion.models,
    metavar="PATH|ID",
    help="The planned model, where the plan knows its name only.",
)
@click.option(
    "--data",
    shell_complete=completion.files,
    metavar="FILE",
    help="The data as the tool is to find them; default: the planned file's name.",
)
@click.option(
    "--experts", type=click.Choice(FORMS), help="Adapters of the experts where the tool has not the planned ones."
)
@click.option("--force", is_flag=True, help="Replace files that are there and differ.")
def export(plan: str, tool: str, out: Path | None, as_json: bool, force: bool, **words: Any) -> None:
    """Write a plan as the config of a training or serving tool.

    PLAN: the JSON of `lora-plan recommend --json`, or - for stdin. What is written trains exactly what was planned, and
    `lora-plan check` reads it back. Tools adapt the experts of a mixture in fewer forms than the planner: fused is
    peft's pair on each fused tensor, at the plan's rank or (fused-over-active) at that over the active experts.

    \b
    lora-plan recommend --model qwen3-8b --data chats.jsonl --gpu h100-sxm-80gb --json > plan.json
    lora-plan export plan.json --to trl --out export/trl
    """
    from dataclasses import replace

    from lora_planner import render
    from lora_planner.handoff import WRITERS
    from lora_planner.handoff.plan_file import planned, read_plan
    from lora_planner.units import gib

    document = read_plan(plan)
    found = planned(document, words["model"], words["offline"], tool, words["experts"] or "", plan)
    recipe = replace(found.recipe, dataset=words["data"]) if words["data"] else found.recipe
    files = WRITERS[tool].write(recipe, _header(found, tool))
    folder = out or Path("export") / tool
    _write(folder, files, force)
    command = WRITERS[tool].commands(recipe)
    if as_json:
        result = {"tool": tool, "files": [str(folder / file.name) for file in files], "command": command,
                  "trainable": found.trainable, "plan": found.sha256, "experts": found.experts or "planned",
                  "peak_bytes": render.plain(found.peak)}  # fmt: skip
        click.echo(
            render.to_json(render.envelope(result, {"plan": found.sha256, "tool": tool, "experts": found.experts}))
        )
        return
    for file in files:
        click.echo(render.one_line(str(folder / file.name)))
    if found.peak:
        was = document["result"]["recommended"]["params"]["trainable"]
        click.echo(
            f"experts: {found.experts}, {found.trainable:,} parameters instead of {was:,}; peak {render.interval(found.peak, gib)}"
        )
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
        f"lora-plan {__version__}, plan {found.sha256[:12]}, for {WRITERS[tool].LABEL}",
        f"trains {found.trainable:,} parameters{f' ({found.experts} experts)' if found.experts else ''}; learning rate within [{rate(low)}, {rate(high)}]",
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
