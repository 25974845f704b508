"""`lora-plan check CONFIG`: what a training config will do, before it does it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lora_planner import completion
from lora_planner.options import JSON, OFFLINE, PRICES, options

if TYPE_CHECKING:
    from lora_planner.handoff.review import Report

TOOLS = ["trl", "axolotl", "llamafactory", "unsloth", "peft"]


@click.command()
@click.argument("config", shell_complete=completion.files, metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("launch", metavar="[ACCELERATE]", required=False, type=click.Path(path_type=Path))
@options(PRICES, OFFLINE, JSON)
@click.option("--tool", type=click.Choice(TOOLS), help="What the file is for; default: its keys tell.")
@click.option(
    "--model", shell_complete=completion.models, metavar="NAME|PATH", help="Instead of the model that the file names."
)
@click.option(
    "--gpu",
    shell_complete=completion.gpus,
    metavar="[Nx]NAME",
    help="Adds memory, time and cost: 8xh100-sxm-80gb is eight of it.",
)
@click.option("--min-pfit", type=click.FloatRange(0, 1), default=0.95, show_default=True, help="Exit with 4 below it.")
@click.option(
    "--data",
    shell_complete=completion.files,
    metavar="FILE",
    help="JSONL or Parquet: lengths, steps, the cost of the run.",
)
@click.option("--tokens", metavar="N", help="Size of the data where there is no file.")
@click.option(
    "--tokenizer",
    shell_complete=completion.files,
    metavar="PATH",
    help="tokenizer.json or its directory: exact counts.",
)
@click.option("--micro-batch", type=click.IntRange(1), help="Instead of the file's.")
@click.option("--seq-len", type=click.IntRange(1), help="Longest sample, instead of the file's.")
def check(config: Path, launch: Path | None, as_json: bool, **words: Any) -> None:
    """Say what a training config trains, whether it fits, what it costs and what is wrong.

    CONFIG: TRL, axolotl or LLaMA-Factory YAML, adapter_config.json, Unsloth JSON, a shell script or a Python script
    (read, never run). ACCELERATE: the file of `accelerate launch --config_file`. Sharding (DeepSpeed, FSDP) is read from
    both. Exit code 0: no error; 4: does not fit; 7: another error among the findings.

    \b
    lora-plan check train.yaml --gpu 8xh100-sxm-80gb --data chats.jsonl --min-pfit 0.95
    """
    from lora_planner import render

    report = _review(config, launch, words)
    if as_json:
        click.echo(render.to_json(_document(config, report, words)))
    else:
        _show(config, report)
    sys.exit(report.exit_code)


def _review(config: Path, launch: Path | None, words: dict[str, Any]) -> Report:
    from dataclasses import replace

    from lora_planner.data_file import DataFacts, parse_token_count, read_data
    from lora_planner.errors import BadInput, UsageError
    from lora_planner.handoff import fleet, read, source
    from lora_planner.handoff.review import model_of, review
    from lora_planner.plan import PriceBook
    from lora_planner.throughput import default_stack

    if not config.exists():
        raise BadInput("there is no such file", str(config), "Give a training config.")
    if config.is_dir() and (config / "adapter_config.json").is_file():
        config = config / "adapter_config.json"  # an adapter's directory, as peft saves it
    document = source.read(config)
    if launch is not None:
        if not launch.exists():
            raise BadInput("there is no such file", str(launch), "Give the file of accelerate launch --config_file.")
        document = replace(document, launch={**document.launch, **source.launch(launch)}, folder=document.folder)
    recipe = read(document, words["tool"] or "")
    if words["micro_batch"]:
        recipe = replace(recipe, micro_batch=words["micro_batch"])
    if words["seq_len"]:
        recipe = replace(recipe, max_length=words["seq_len"])
    if words["data"] and words["tokens"]:
        raise UsageError("--data and --tokens are two sizes of one data set", "", "Give one of them.")
    model = model_of(recipe, words["model"], words["offline"])
    gpus, card = fleet.parse(words["gpu"]) if words["gpu"] else (recipe.sharding.processes or 1, None)
    length = recipe.max_length or None
    data = None
    if words["data"]:
        data = read_data(words["data"], tokenizer=words["tokenizer"], max_length=length)
    elif words["tokens"]:
        data = DataFacts.from_tokens(parse_token_count(words["tokens"]), length)
    stack = default_stack(card) if card else "hf-trl"
    return review(recipe, model, card, PriceBook.load(words["prices"]), data, words["min_pfit"], stack, gpus)


def _document(config: Path, r: Report, words: dict[str, Any]) -> dict[str, Any]:
    """The object of --json; the names are a promise to programs."""
    from lora_planner import render

    recipe = render.plain(r.recipe)
    recipe["given"] = sorted(recipe["given"])
    s = r.recipe.sharding
    recipe["sharding"] = {"name": s.name or "none", "weights": s.weights, "gradients": s.gradients, "states": s.states,
                          "host": sorted(s.host), "processes": s.processes or None}  # fmt: skip
    m = r.manifest
    result: dict[str, Any] = {
        "file": config.name,
        "tool": r.recipe.tool,
        "model": {"name": r.model.name, "model_type": r.model.model_type, "source": r.model.source},
        "recipe": recipe,
        "manifest": {
            "rows": [render.plain(row) for row in m.rows], "missed": list(m.missed),
            "saved": [render.plain(row) for row in m.saved], "frozen": list(m.frozen), "modules": m.modules,
        },
        "params": {"total": r.model.total, "trainable": r.trainable, "adapter": m.adapter_params, "saved": m.saved_params},
        "learning_rate": render.plain(r.advice) if r.advice else None,
        "batch": r.recipe.batch,
        "gpus": r.recipe.gpus,
        "plan": r.recipe.plan or None,
        "steps": r.steps,
        "priced": render.priced_object(r.priced) if r.priced else None,
        "priced_exactly": m.exact,
        "peak_bytes": render.plain(r.peak) if r.peak else None,
        "p_fit": r.p_fit,
        "min_p_fit": r.min_p_fit,
        "findings": [
            {"code": f.code, "severity": f.severity, "evidence": f.evidence, "fix": f.fix, "change": dict(f.change)}
            for f in r.findings
        ],
        "notes": r.notes,
    }  # fmt: skip
    warnings = [(f.code, f.evidence, f.fix) for f in r.findings]
    sources = render.provenance(r.priced) if r.priced else []
    inputs = {**words, "config": recipe}
    return render.envelope(result, inputs, warnings, sources, r.exit_code)


def _show(config: Path, r: Report) -> None:
    from lora_planner import render, units

    console = render.terminal()
    line = render.one_line
    rows: list[tuple[str, Any]] = [
        (
            "config",
            render.styled(
                (line(config.name), "bold"), f"  {r.label}{f', of plan {r.recipe.plan}' if r.recipe.plan else ''}"
            ),
        ),
        (
            "model",
            render.styled((line(r.model.name), "bold"), f"  {r.model.total:,} parameters ", render.basis_note("exact")),
        ),
    ]
    rows += [("trains" if i == 0 else "", text) for i, text in enumerate(_trained(r))]
    rows.append(("run", render.styled(_run(r))))
    if r.recipe.gpus > 1 or r.recipe.sharding.name:
        rows.append(("gpus", render.styled(_gpus(r))))
    if r.priced and r.peak and r.p_fit is not None and r.priced.run_s and r.priced.configuration.gpu:
        card = r.priced.configuration.gpu
        word = ("yes", "bold green") if r.p_fit >= r.min_p_fit else ("no", "bold red")
        rows.append(("fits", render.styled(word, f", P {r.p_fit:.2f}: peak {render.interval(r.peak, units.gib)} of "
                                          f"{units.gib(card.memory_bytes)}{' on each' if r.recipe.gpus > 1 else ''}, {card.name} ",
                                          render.basis_note(r.peak.basis))))  # fmt: skip
        of = "run" if r.priced.run_tokens else "step"
        rows.append(
            (
                "time",
                render.styled(
                    f"{render.interval(r.priced.run_s, units.duration)} a {of} ",
                    render.basis_note(r.priced.run_s.basis),
                ),
            )
        )
        rows.append(
            ("cost", render.cost_line(r.priced) if r.priced.run_tokens else render.styled("needs --data or --tokens"))
        )
    console.print(render.grid(rows))
    console.print()
    colours = {"error": "bold red", "warning": "yellow", "note": "cyan"}
    lines: list[tuple[str, Any]] = []
    for finding in r.findings:
        lines.append(
            (finding.code, render.styled((finding.severity, colours[finding.severity]), f"  {line(finding.evidence)}"))
        )
        lines.append(("", render.styled(("fix  ", "dim"), line(finding.fix))))
    console.print(render.grid(lines))
    if not r.findings:
        console.print(render.styled(("nothing found", "green")))
    for note in r.notes:
        console.print(render.styled(render.dim(line(note))))
    counts = {s: sum(f.severity == s for f in r.findings) for s in colours}
    console.print(
        render.styled(
            ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items()) + f"; exit code {r.exit_code}"
        )
    )


def _trained(r: Report) -> list[Any]:
    """The manifest: what is adapted, trained in full, left frozen."""
    from lora_planner import render, units

    line, m, lora = render.one_line, r.manifest, r.recipe.lora
    if lora is None:
        return [render.styled(("full fine-tuning", "bold"), f", all {units.count(r.model.total)} parameters")]
    name = "rsLoRA" if lora.rslora else "DoRA" if lora.dora else "QLoRA" if r.recipe.weights == "nf4" else "LoRA"
    share = units.percent(r.trainable / r.model.total)
    found = [render.styled((f"{name} r{lora.rank}", "bold"), f", alpha {lora.alpha:g}, scale {lora.scale:.3g}: {r.trainable:,} trained "
                          f"({share}) in {m.modules:,} modules ", render.basis_note("exact"))]  # fmt: skip
    by_rank: dict[tuple[str, int], list[str]] = {}
    for row in m.rows:
        some = "" if row.copies == row.of else f" in {row.copies} of {row.of}"
        by_rank.setdefault((row.group, row.rank), []).append(f"{line(row.name.rpartition('.')[2])}{some}")
    for (group, rank), names in by_rank.items():
        at = f" at rank {rank}" if rank != lora.rank else ""
        found.append(render.styled(f"{group}{at}: {', '.join(names)}"))
    if m.saved:
        whole = ", ".join(f"{line(w.name)} {w.params:,}" for w in m.saved)
        found.append(render.styled(("in full: ", "yellow"), whole))
    if m.missed:
        found.append(render.styled(("reaches nothing: ", "yellow"), line(", ".join(m.missed))))
    if m.frozen:
        found.append(render.styled(render.dim(f"frozen: {', '.join(m.frozen)}")))
    return found


def _gpus(r: Report) -> str:
    """How many, and what they share out."""
    s = r.recipe.sharding
    shared = [
        word for word, on in (("weights", s.weights), ("gradients", s.gradients), ("optimizer states", s.states)) if on
    ]
    what = f"{s.name}: each has its share of {', '.join(shared)}" if shared else s.name or "a whole copy on each"
    return f"{r.recipe.gpus or 1}, {what}"


def _run(r: Report) -> str:
    from lora_planner import units

    recipe = r.recipe
    parts = []
    if recipe.learning_rate is not None:
        advised = (
            f" (advised {units.rate(r.advice.lr.value)} [{units.rate(r.advice.lr.low)}, {units.rate(r.advice.lr.high)}])"
            if r.advice
            else ""
        )
        parts.append(f"LR {units.rate(recipe.learning_rate)}{advised}, {recipe.scheduler}")
    if recipe.batch:
        on = "one GPU" if recipe.gpus == 1 else f"{recipe.gpus} GPUs"
        parts.append(f"batch {recipe.batch} = {recipe.micro_batch} x {recipe.accumulation} on {on}")
    if recipe.max_length:
        parts.append(f"{recipe.max_length} tokens{', packed' if recipe.packing else ''}")
    if r.steps:
        parts.append(f"{r.steps:,.0f} steps")
    if recipe.group:
        parts.append(f"groups of {recipe.group}")
    if recipe.micro_batch:
        parts.append(
            f"checkpointing {'full' if recipe.checkpointing else 'none'}, {recipe.optimizer}, base {recipe.weights}"
        )
    return "; ".join(parts) or "not said by this file"
