"""The commands. Parses words, calls the planner, prints; heavy imports live inside command bodies."""

from __future__ import annotations

import json
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from lora_planner import __version__
from lora_planner.commands.budget import budget
from lora_planner.commands.check import check
from lora_planner.commands.compare import compare
from lora_planner.commands.diagnose import diagnose
from lora_planner.commands.export import export
from lora_planner.commands.optional import runner as _runner
from lora_planner.commands.optional import track as _track
from lora_planner.commands.report import report
from lora_planner.completion import completion, files, quantities
from lora_planner.completion import gpus as gpu_names
from lora_planner.errors import BadInput, LoraPlanError, UsageError
from lora_planner.options import (
    ADAPTER,
    FINE,
    GPU,
    JSON,
    MODEL,
    OFFLINE,
    PRICES,
    RUNS,
    STEP,
    WORK,
    job_of,
    needed,
    options,
    plan_of,
    priced_of,
    terms,
)  # fmt: skip


class Commands(click.Group):
    """Every command's errors end here: one line, the exit code of the error, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # a closed one is None
                stream.reconfigure(errors="replace")  # names from files may have signs that a terminal lacks
        try:
            return super().invoke(ctx)
        except LoraPlanError as error:
            _fail(error, as_json="--json" in sys.argv[1:])
        except BrokenPipeError:  # `| head` closed our output: not an error of ours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            sys.exit(0)


def _fail(error: LoraPlanError, as_json: bool) -> None:
    from lora_planner.render import error_object, one_line

    if as_json:
        click.echo(json.dumps(error_object(error)))
    click.echo(f"lora-plan: {one_line(str(error))}", err=True)
    sys.exit(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-plan")
def main() -> None:
    """What to run, whether it fits, what it costs, and how sure each number is.

    \b
    lora-plan recommend --model qwen3-8b --data chats.jsonl --gpu h100-sxm-80gb
    """


for command in (budget, check, compare, completion, diagnose, export, report):
    main.add_command(command)


@main.command()
@options(MODEL, WORK, terms(), PRICES, OFFLINE, JSON)
def recommend(as_json: bool, **words: Any) -> None:
    """Search methods, ranks, batches and GPUs for the plan to run.

    \b
    lora-plan recommend --model qwen3-8b --tokens 10M --gpu h100-sxm-80gb,rtx4090-24gb --budget 50
    """
    from lora_planner import render
    from lora_planner.recommend import recommend as search

    advice = search(job_of(words))
    if as_json:
        click.echo(render.to_json(render.advice_object(advice)))
    else:
        render.show_advice(advice)
    sys.exit(advice.exit_code)


@main.command()
@options(MODEL, ADAPTER, GPU, STEP, FINE, PRICES, OFFLINE, JSON)
@click.option("--tokens", metavar="N", help="Tokens to train on: adds hours and cost of the run.")
@click.option(
    "--batch",
    "batch_file",
    metavar="FILE.jsonl",
    shell_complete=files,
    help="One configuration a line, one JSON line out each.",
)
def estimate(as_json: bool, batch_file: str | None, **words: Any) -> None:
    """Price one explicit configuration; search nothing.

    \b
    lora-plan estimate --model llama-3.1-8b --method lora --rank 16 --gpu rtx4090-24gb \\
        --micro-batch 1 --seq-len 2048 --checkpointing full --json
    """
    from lora_planner import render

    if batch_file:
        sys.exit(_estimate_lines(batch_file, words))
    names = needed(words, "model").split(",")
    if len(names) > 1 and as_json:
        sys.exit(max(_estimate_line({**words, "model": name}) for name in names))
    for name in names:
        priced = priced_of({**words, "model": name})
        if as_json:
            click.echo(render.to_json(render.estimate_object(priced)))
        else:
            render.show_estimate(priced)


def _estimate_lines(path: str, defaults: dict[str, Any]) -> int:
    """A line that is wrong yields an error object in its place; the others are still priced."""
    file = Path(path)
    if not file.is_file():
        raise BadInput("there is no such file", path, "Give a JSONL file with one configuration a line.")
    worst = 0
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                worst = max(worst, _estimate_line(defaults, line, f"{path}:{number}"))
    return worst


def _estimate_line(defaults: dict[str, Any], line: str = "{}", place: str = "--model") -> int:
    from lora_planner import render

    try:
        try:
            given = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput("not a JSON object", place, str(error)) from None
        if not isinstance(given, dict):
            raise BadInput("not a JSON object", place, "One object a line.")
        words = {key.replace("-", "_"): value for key, value in given.items()}
        unknown = sorted(set(words) - set(defaults))
        if unknown:
            raise BadInput(f"unknown names {unknown}", place, f"Known: {', '.join(sorted(defaults))}.")
        click.echo(json.dumps(render.estimate_object(priced_of({**defaults, **words}))))
    except LoraPlanError as error:
        click.echo(json.dumps(render.error_object(error)))
        return error.exit_code
    return 0


@main.command()
@click.argument("quantity", shell_complete=quantities)
@options(MODEL, ADAPTER, STEP, FINE, PRICES, OFFLINE, JSON)
@click.option("--gpu", metavar="NAME", shell_complete=gpu_names, default="h100-sxm-80gb", show_default=True)
@click.option("--tokens", metavar="N", default="10M", show_default=True)
def explain(quantity: str, as_json: bool, **words: Any) -> None:
    """Each term of QUANTITY with value, basis, source and place in the code.

    \b
    QUANTITY: params, trainable, flops, memory, time, cost, capacity, learning-rate, batch
    lora-plan explain memory --model qwen3-8b --micro-batch 4
    """
    from lora_planner import render
    from lora_planner.plan import explain as terms

    ledger = terms(quantity, plan_of(words))
    if as_json:
        click.echo(render.to_json(render.ledger_envelope(ledger)))
    else:
        render.show_explanation(ledger)


@main.command()
@JSON
def models(as_json: bool) -> None:
    """The built-in models: names for --model."""
    from lora_planner import render
    from lora_planner.model_source import model_rows

    rows = model_rows()
    if as_json:
        click.echo(render.to_json(render.rows_envelope(rows)))
    else:
        render.show_rows("models", rows)


@main.command()
@options(PRICES, JSON)
def gpus(as_json: bool, prices: str | None) -> None:
    """The built-in GPUs and their dated prices: names for --gpu."""
    from lora_planner import render
    from lora_planner.facts import gpu_rows

    rows = gpu_rows(prices)
    if as_json:
        click.echo(render.to_json(render.rows_envelope(rows)))
    else:
        render.show_rows("gpus", rows)


@main.command()
@click.argument("claims", nargs=-1, metavar="[CLAIM]...")
@options(RUNS, OFFLINE, JSON)
@click.option("--list", "listing", is_flag=True, help="The paper's claims: source, cost, last verdict.")
@click.option("--size", type=click.Choice(["cpu", "gpu"]), help="Of a claim's runs; default: what this machine has.")
@click.option("--ranks", default="1,4,16", show_default=True, metavar="N[,N]")
@click.option("--steps", type=click.IntRange(2), default=60, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rates", type=click.IntRange(2), default=3, show_default=True,
              help="Learning rates an arm to begin with; more where the best is at the end.")  # fmt: skip
def verify(
    as_json: bool, claims: tuple[str, ...], listing: bool, size: str | None, out: str, ranks: str, steps: int,
    seeds: int, rates: int, **words: Any,
) -> None:  # fmt: skip
    """Run LoRA and full fine-tuning here, hold what was predicted against what is measured.

    With CLAIMs (C07, rate-ratio, all) run what the paper's claims need, at their own sizes, and judge them.
    Stopped or killed, the same command goes on. Exit code 7: something failed; 8: undecided.

    \b
    lora-plan verify
    lora-plan verify --model ./qwen3-0.6b --data chats.jsonl --ranks 8,32 --steps 200
    lora-plan verify rate-ratio --size cpu
    """
    if listing or claims:
        given = [f"--{name}" for name in ("model", "data", "base") if words[name]]
        if given:
            raise UsageError(f"{', '.join(given)} and claims", "", "A claim has its own bases and data: leave it away.")
        sys.exit(_verify_claims(claims, listing, size, Path(out), as_json))
    from lora_planner import render

    runner = _runner()
    scene = _scene(runner, out, words)
    runs = runner.run_arms(scene, _ranks(ranks), steps, seeds, rates)
    from calibrate.score import scores
    from calibrate.verdict import arms, exit_code, verdicts
    from runner.sweep import require_finished

    require_finished(runs)
    found = verdicts(runs, scores(runs))
    code = exit_code(found)
    if as_json:
        document = {"verdicts": found, "arms": arms(runs), "base": scene.source.key, "device": scene.gpu.name}
        click.echo(render.to_json(render.envelope(render.plain(document), inputs=words, exit_code=code)))
    else:
        render.show_verification(scene.gpu, scene.source.key, arms(runs), found, out)
    sys.exit(code)


@main.command()
@options(RUNS, OFFLINE, JSON)
def calibrate(as_json: bool, out: str, **words: Any) -> None:
    """Probe this GPU or CPU for a minute or two; later plans use what it measured.

    \b
    lora-plan calibrate
    lora-plan calibrate --model ./qwen3-0.6b --data chats.jsonl
    """
    from lora_planner import render

    runner = _runner()
    scene = _scene(runner, out, words)
    runs = runner.run(scene, [*runner.probes(scene), *runner.checks(scene)])
    from calibrate import constants, probe
    from lora_planner import facts
    from lora_planner.predict import lengths_of, predict
    from lora_planner.record import read_runs
    from lora_planner.throughput import OWN_STACK, stack

    # all runs on this device: also those of an earlier `verify` tell how good the fit is
    here = [run for run in read_runs(Path(out) / "runs.jsonl") if run.spec.device == scene.device]
    before = dict(stack(OWN_STACK, scene.gpu).rows)
    rows, memory = probe.fit(runs, scene.gpu), probe.fit_memory(runs, scene.gpu)
    path = constants.write(rows, facts.home(), memory=memory, gpus=[scene.gpu])
    after = {run.key: predict(run.spec, run.config, scene.gpu, lengths=lengths_of(run.predicted)) for run in here}
    now = {run.key for run in runs}
    planned_as = {run.key: run.predicted for run in here}
    errors = {
        "shapes not in the fit, same sitting": probe.errors([r for r in here if r.key in now], planned_as, after),
        "runs of another sitting": probe.errors([r for r in here if r.key not in now], planned_as, after),
    }
    if as_json:
        document = {"device": scene.gpu.name, "constants": [*rows, *memory], "errors": errors, "file": path.name}
        click.echo(render.to_json(render.envelope(render.plain(document), inputs=words)))
    else:
        render.show_calibration(scene.gpu, before, [*rows, *memory], errors, str(path))


@main.command()
@click.option(
    "--rows",
    "tables",
    multiple=True,
    required=True,
    metavar="FILE.csv",
    shell_complete=files,
    help="Measurements, in the columns of a table in calibrate/tables; may be given again.",
)
@click.option(
    "--cases",
    "to",
    metavar="FILE.csv",
    shell_complete=files,
    help="Write every prediction beside its measurement here.",
)
@JSON
def score(tables: tuple[str, ...], to: str | None, as_json: bool) -> None:  # fmt: skip
    """How wrong the planner is on published measurements that you have.

    \b
    lora-plan score --rows measured.csv
    """
    track, board = _track()
    cases = []
    for name in tables:
        rows = track.read(Path(name))
        cases += track.kind_of(list(rows[0]), name).cases(rows)
    if to:
        from lora_planner.pages import text

        every = [board.plain_case(case) for case in cases]
        names = list(dict.fromkeys(name for row in every for name in row))
        text.write(to, text.csv_text([{name: row.get(name) for name in names} for row in every]))
    from lora_planner import render

    if as_json:
        result = {
            quantity: {
                "all": board.plain_summary(some),
                "by_source": {name: board.plain_summary(s) for name, s in board.grouped(some, lambda c: c.source).items()},
                "details": board.details(some),
                "without_prediction": dict(board.reasons(some)),
                "cases": [board.plain_case(case) for case in some],
            }
            for quantity, some in board.by_quantity(cases).items()
        }  # fmt: skip
        click.echo(render.to_json(render.envelope(render.plain(result), inputs={"rows": list(tables)})))
    else:
        render.show_scores(board, cases)


def _verify_claims(names: tuple[str, ...], listing: bool, size: str | None, out: Path, as_json: bool) -> int:
    _runner()
    from calibrate.family import corrected
    from calibrate.verdict import exit_code
    from lora_planner import facts, render
    from lora_planner.record import read_events
    from runner.claims import study
    from runner.claims.lab import Lab

    claims = study.chosen(names or ["all"])
    chosen = size or "cpu"
    if not listing:
        place = Lab.here(out, facts.home(), size)
        chosen = place.size_name
        study.execute(place, claims)
    family = study.family(chosen, claims)  # what is judged together, whichever of it was asked for
    judged = corrected(study.entries(read_events(out / "runs.jsonl")[0], chosen, family))
    entries = [entry for entry in judged if entry.id in dict(claims)]
    code = 0 if listing else exit_code(entry.verdict for entry in entries)
    if as_json:
        document = {"size": chosen, "claims": [study.plain_entry(entry) for entry in entries]}
        click.echo(render.to_json(render.envelope(render.plain(document), exit_code=code)))
    else:
        render.show_claims(entries, detailed=not listing)
    return code


def _scene(runner: Any, out: str, words: dict[str, Any]) -> Any:
    from calibrate import constants
    from lora_planner import facts

    home = facts.home()
    scene = runner.prepare(Path(out), home, words["model"], words["data"], words["base"], words["offline"])
    if scene.gpu.form == facts.CPU and scene.gpu.name not in {g.name for g in facts.gpus()}:
        constants.write([], home, gpus=[scene.gpu])  # so that every later plan can name this processor
    return scene


def _ranks(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise UsageError(f"--ranks {text}: expected whole numbers", "", "Use --ranks 1,4,16.")
    return [int(word) for word in words]
