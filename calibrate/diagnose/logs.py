"""Logs of a training run in the forms people have them, as one kind of curve.

Read: a Trainer's `trainer_state.json` (transformers, TRL, axolotl, LLaMA-Factory) or the directory it lies in, its
`log_history` alone, JSON lines, the dict lines that a Trainer prints, a CSV (also one exported from W&B), and the
journals of our own runner. Nothing is unpickled: training_args.bin stays closed.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

from calibrate.diagnose.settings import Settings, of_adapter, of_record
from lora_planner.checkpoint import open_regular, read_json, shown
from lora_planner.errors import BadInput
from lora_planner.record import RunRecord, read_runs

MAX_BYTES = 256 * 1024**2
STATE = "trainer_state.json"
#: what a log must hold before anything is said about it
FEWEST_POINTS = 3
#: values quoted in messages about a log that cannot be read
SHOWN = 6

#: our name -> what tools call it
NAMES: Mapping[str, tuple[str, ...]] = {
    "step": ("step", "global_step", "_step", "train/global_step", "steps", "iteration"),
    "loss": ("loss", "train/loss", "train_loss", "training_loss", "train-loss"),
    "eval_loss": ("eval_loss", "eval/loss", "val_loss", "valid_loss", "validation_loss", "held_out"),
    "lr": ("learning_rate", "lr", "train/learning_rate", "train/lr"),
    "grad_norm": ("grad_norm", "train/grad_norm", "gradient_norm", "total_norm"),
    "epoch": ("epoch", "train/epoch"),
    "reward": ("reward", "train/reward"),
    "reward_std": ("reward_std", "train/reward_std", "frac_reward_zero_std_inverse"),
    "zero_std": ("frac_reward_zero_std", "train/frac_reward_zero_std"),
    "tokens": ("num_tokens", "num_input_tokens_seen", "train/num_tokens"),
}  # fmt: skip
MEANING = {alias: name for name, aliases in NAMES.items() for alias in aliases}
Series = tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Log:
    """One run: curves as (step, value), as they were logged, with what is not finite in it.

    train       mean nats per trained token over the steps since the point before
    held_out    nats per trained token of the evaluation set
    restarts    steps at which the log went back
    resumed     steps after which our own runner says it was resumed
    ended       how our own runner says it ended, "" elsewhere
    unmoved     names of adapters whose B is zero at the end; None: nobody looked
    seconds     a step, where the log says
    """

    name: str
    form: str
    train: Series = ()
    held_out: Series = ()
    lr: Series = ()
    grad_norm: Series = ()
    epoch: Series = ()
    reward: Series = ()
    zero_std: Series = ()
    settings: Settings = field(default_factory=Settings)
    restarts: tuple[float, ...] = ()
    resumed: tuple[float, ...] = ()
    ended: str = ""
    unmoved: tuple[str, ...] | None = None
    adapters: int = 0
    seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_rl(self) -> bool:
        return bool(self.reward)

    @property
    def last(self) -> float:
        """The last step that is in the log."""
        return max((s[-1][0] for s in (self.train, self.held_out, self.lr, self.grad_norm) if s), default=0.0)


def read_log(text: str) -> Log:
    """The run at a path. Of a journal with many runs `PATH#KEY` names one: the start of its key, or of its label."""
    path, wanted = Path(text), ""
    if not path.exists() and "#" in text:
        head, _, wanted = text.rpartition("#")
        path = Path(head)
    if not path.exists():
        raise BadInput("there is no such log", shown(text), "Give trainer_state.json, its directory, a log or a CSV.")
    if path.is_dir():
        path = _in_directory(path, text)
    where = path.name if path.name != STATE or not path.parent.name else f"{path.parent.name}/{path.name}"
    with open_regular(path, shown(text)) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise BadInput(f"longer than {MAX_BYTES:,} bytes", where, "Give the log of one run.")
    content = raw.decode("utf-8", errors="replace").lstrip("\ufeff")
    if not content.strip():
        raise BadInput("the log is empty", where, "Did the run log anything yet?")
    if _is_journal(content):
        return _of_journal(path, where, wanted)
    if wanted:
        raise BadInput("only a journal of our own runs has parts", where, "Leave away what follows the #.")
    log = _parsed(content, where, path.suffix.lower())
    beside = _beside(path)
    log = replace(log, settings=log.settings.over(beside))
    if path.parent.joinpath("adapter_model.safetensors").is_file() and path.name == STATE:
        still, all_of_them = zero_adapters(path.parent / "adapter_model.safetensors")
        log = replace(log, unmoved=still, adapters=all_of_them)
    return _checked(log, where)


def _in_directory(path: Path, text: str) -> Path:
    """The log of a training directory: its own state, else that of its newest checkpoint, else our journal."""
    if (path / STATE).is_file():
        return path / STATE
    states = [p for p in path.glob(f"checkpoint-*/{STATE}") if p.parent.name.rpartition("-")[2].isdigit()]
    if states:
        return max(states, key=lambda p: int(p.parent.name.rpartition("-")[2]))
    if (path / "runs.jsonl").is_file():
        return path / "runs.jsonl"
    raise BadInput(f"no {STATE} in this directory or its checkpoints", shown(text), "Name the log file itself.")


def _beside(path: Path) -> Settings:
    config = path.parent / "adapter_config.json"
    return (
        of_adapter(read_json(config, "adapter_config.json"), "adapter_config.json") if config.is_file() else Settings()
    )


def _checked(log: Log, where: str) -> Log:
    points = max(len(log.train), len(log.held_out), len(log.reward))
    if points < FEWEST_POINTS:
        raise BadInput(f"{points} points of a loss, {FEWEST_POINTS} are the least", where,
                       "Log more often (logging_steps), or wait for more steps.")  # fmt: skip
    return log


# ---------------------------------------------------------------- forms


def _parsed(content: str, where: str, suffix: str) -> Log:
    if suffix in (".csv", ".tsv"):
        return _of_csv(content, where, "\t" if suffix == ".tsv" else ",")
    start = content.lstrip()[:1]
    if start in "[{" and (document := _json(content)) is not None:
        if isinstance(document, dict) and isinstance(document.get("log_history"), list):
            return _of_state(document, where)
        if isinstance(document, list):
            return _of_entries(document, where, "log_history")
        if isinstance(document, dict):
            raise BadInput("a JSON object without log_history", where, f"Give {STATE}, or one object a line.")
    lines = content.replace("\r", "\n").split("\n")
    objects = [_json(line) for line in lines if line.strip().startswith("{")]
    dicts = [o for o in objects if isinstance(o, dict)]
    if dicts and len(dicts) >= len([line for line in lines if line.strip()]) / 2:
        return _of_entries(dicts, where, "JSON lines")
    printed = list(_printed(lines))
    if printed:
        return _of_entries(printed, where, "printed lines")
    if _looks_like_csv(lines):
        return _of_csv(content, where, ",")
    raise BadInput("no loss was found in it", where,
                   "Give trainer_state.json, JSON lines, a Trainer's printed log, or a CSV with step and loss.")  # fmt: skip


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_state(document: Mapping[str, Any], where: str) -> Log:
    log = _of_entries(document["log_history"], where, STATE)
    said = Settings(
        steps=_whole(document.get("max_steps")),
        epochs=number(document.get("num_train_epochs")),
        micro_batch=_whole(document.get("train_batch_size")),
        said_by=(("steps", where),),
    )
    return replace(log, settings=said.over(log.settings))


def _whole(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None and isfinite(found) and found > 0 else None


def number(value: object) -> float | None:
    """A number of a log; text as a Trainer prints it, "nan" and "Infinity" included. None: it is none.

    >>> number("1.5e-4"), number("Infinity"), number(True), number("n/a")
    (0.00015, inf, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


#: 'key': value of a printed dict; the value may be in quotes (transformers 5) or nan
PAIR = re.compile(r"""['"]([\w./ @-]{1,80})['"]\s*:\s*['"]?([-+\w.]{1,40})['"]?""")
#: tqdm's "  12/200 [" before a printed line
PROGRESS = re.compile(r"\b(\d{1,9})/(\d{1,9}) \[")


def _printed(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Dict lines that a Trainer prints, with the step of the progress bar before them where there is one."""
    step = None
    for line in lines:
        if bar := PROGRESS.findall(line[:4000]):
            step = int(bar[-1][0])
        begin, end = line.find("{"), line.rfind("}")
        if 0 <= begin < end and "loss" in line[begin:end]:
            entry: dict[str, Any] = dict(PAIR.findall(line[begin : end + 1][:100_000]))
            if entry:
                if step is not None:
                    entry.setdefault("step", step)
                yield entry


def _looks_like_csv(lines: list[str]) -> bool:
    head = next((line for line in lines if line.strip()), "")
    return "," in head and any(_meaning(cell) for cell in head.split(","))


def _meaning(column: str) -> str | None:
    """What a column is: its own name, or what follows " - " in W&B's exports.

    >>> _meaning("lora-run - train/loss"), _meaning("Global_Step"), _meaning("lora-run - train/loss__MAX")
    ('loss', 'step', None)
    """
    name = column.strip().strip('"').lower()
    return MEANING.get(name) or MEANING.get(name.rpartition(" - ")[2])


def _of_csv(content: str, where: str, delimiter: str) -> Log:
    try:
        rows = list(csv.reader(io.StringIO(content, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise BadInput(f"not a CSV: {error}", where, "Save it again with commas.") from None
    head = rows[0] if rows else []
    columns = {i: name for i, cell in enumerate(head) if (name := _meaning(cell))}
    names = list(columns.values())
    if "loss" not in names and "eval_loss" not in names:
        listed = ", ".join(shown(cell, 30) for cell in head[:SHOWN])
        raise BadInput(
            f"no column of a loss among {listed}", where, "Name them step, loss, eval_loss, learning_rate, grad_norm."
        )
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise BadInput(f"several columns of {', '.join(twice)}", where, "Export one run at a time.")
    entries = []
    for row in rows[1:]:
        cells = {name: row[i] for i, name in columns.items() if i < len(row) and row[i].strip()}
        if cells:
            entries.append(cells)
    log = _of_entries(entries, where, "CSV")
    unread = [(n, e[k]) for n, e in enumerate(entries, 2) for k in e if number(e[k]) is None]
    if unread:
        place, value = unread[0]
        log = replace(
            log,
            notes=(*log.notes, f"{len(unread)} cells are no numbers, the first in line {place}: {shown(value, 20)}"),
        )
    return log


def _of_entries(entries: Iterable[Any], where: str, form: str) -> Log:
    """Curves from dicts of one step each. A log without steps counts its lines."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    restarts: list[float] = []
    notes: list[str] = []
    counted, before, seconds, total = 0, -inf, None, None
    for entry in entries:
        if not isinstance(entry, Mapping):
            continue
        words = {
            name: v for key, value in entry.items() if (name := _meaning(str(key))) and (v := number(value)) is not None
        }
        if "train_runtime" in entry:
            # the summary at the end: its train_loss is a mean over the run
            seconds, total = number(entry.get("train_runtime")), number(entry.get("step")) or max(before, counted)
            continue
        if not words.keys() & {"loss", "eval_loss", "reward"}:
            continue
        step = words.pop("step", None)
        if step is None or not isfinite(step):
            counted += "loss" in words or "reward" in words
            step = float(counted)
        else:
            if step < before:
                restarts.append(step)
                for curve in found.values():  # what the later attempt did counts
                    del curve[next((i for i, (s, _) in enumerate(curve) if s >= step), len(curve)) :]
            before = step
        for name, value in words.items():
            if found[name] and found[name][-1][0] == step:
                found[name][-1] = (step, value)
            else:
                found[name].append((step, value))
    if counted:
        notes.append("the log has no steps: its lines are counted instead")
    if restarts:
        notes.append(
            f"the log goes back to step {restarts[0]:g}" + (f" and {len(restarts) - 1} more" if restarts[1:] else "")
        )
    notes += _gaps(found["loss"])
    rates = [v for _, v in found["lr"] if isfinite(v) and v > 0]
    settings = Settings(lr=max(rates) if rates else None, said_by=((("lr"), where),) if rates else ())
    per_step = seconds / total if seconds and total else None
    return Log(
        where, form, tuple(found["loss"]), tuple(found["eval_loss"]), tuple(found["lr"]), tuple(found["grad_norm"]),
        tuple(found["epoch"]), tuple(found["reward"]), tuple(found["zero_std"]), settings, tuple(restarts),
        seconds=per_step, notes=tuple(notes),
    )  # fmt: skip


def _gaps(curve: list[tuple[float, float]]) -> list[str]:
    """A stretch without points that is ten times the usual distance between two."""
    steps = sorted(b - a for (a, _), (b, _) in itertools.pairwise(curve))
    if len(steps) < 4:
        return []
    usual = steps[len(steps) // 2]
    holes = [(a, b) for (a, _), (b, _) in itertools.pairwise(curve) if b - a > 10 * usual > 0]
    return [f"no points between step {holes[0][0]:g} and {holes[0][1]:g}"] if holes else []


# ---------------------------------------------------------------- our own runs


def _is_journal(content: str) -> bool:
    first = _json(content[: content.find("\n")] if "\n" in content else content)
    return isinstance(first, dict) and {"schema", "event", "key"} <= first.keys()


def _of_journal(path: Path, where: str, wanted: str) -> Log:
    runs = [run for run in read_runs(path) if run.measured.get("losses") or run.status in ("diverged", "invalid")]
    chosen = [r for r in runs if r.key.startswith(wanted) or r.spec.label().startswith(wanted)]
    if not chosen:
        raise BadInput(f"no run of it begins with {shown(wanted)!r}" if wanted else "no run of it has a loss", where,
                       f"It has {len(runs)} runs with losses.")  # fmt: skip
    if len(chosen) > 1:
        listed = "; ".join(f"{r.key} {r.spec.label()}" for r in chosen[:SHOWN])
        raise BadInput(
            f"{len(chosen)} runs", where, f"Name one as {path.name}#KEY: {listed}{' ...' if chosen[SHOWN:] else ''}"
        )
    return of_record_log(chosen[0], where)


def of_record_log(run: RunRecord, where: str) -> Log:
    """Curves of a run of our own: the loss of step n was taken before its update, so it stands at n - 1."""
    m = run.measured
    losses = tuple((float(i), _float(v)) for i, v in enumerate(m.get("losses") or []))
    norms = tuple((float(i), _float(v)) for i, v in enumerate(m.get("grad_norms") or []))
    held_out = tuple((float(step), _float(v)) for step, v in m.get("held_out") or [])
    notes = [str(note) for note in m.get("notes") or []]
    resumed = tuple(float(x) for note in notes for x in re.findall(r"resumed after step (\d+)", note))
    spectral = m.get("norms") or []
    still = tuple(name for name, _, b in spectral if b == 0) if spectral else None
    rl = run.spec.objective == "rl"
    return Log(
        f"{where}#{run.key}", "our own record", () if rl else losses, () if rl else held_out,
        tuple((x, run.spec.lr * (1 - x / run.spec.steps if run.spec.schedule == "linear" else 1)) for x, _ in losses)
        if run.spec.schedule in ("constant", "linear") else (),
        norms, reward=held_out if rl else (), settings=of_record(run), resumed=resumed,
        ended=run.status if not run.reason else f"{run.status}: {run.reason}", unmoved=still, adapters=len(spectral),
        seconds=m.get("step_median_s"), notes=tuple(notes),
    )  # fmt: skip


def _float(value: object) -> float:
    found = number(value)
    return nan if found is None else found


# ---------------------------------------------------------------- adapters on disk


def zero_adapters(path: Path) -> tuple[tuple[str, ...], int]:
    """Names of the lora_B matrices of a safetensors file that are zero in every byte, and how many there are."""
    from lora_planner.checkpoint import read_header

    still: list[str] = []
    seen = 0
    with open_regular(path, path.name) as file:
        tensors = read_header(file, path.name)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for tensor in tensors:
            if ".lora_B" not in tensor.name:
                continue
            seen += 1
            begin, end = header[tensor.name]["data_offsets"]
            file.seek(8 + length + begin)
            left, zero = end - begin, True
            while left > 0 and zero:
                block = file.read(min(left, 1 << 20))
                zero, left = bool(block) and not any(block), left - len(block)
            if zero:
                still.append(tensor.name)
    return tuple(still), seen


def describe(log: Log) -> str:
    """One line: where it is from and what it was set to do."""
    seen = [f"{len(curve)} {name}" for name, curve in
            (("training losses", log.train), ("held-out losses", log.held_out), ("rewards", log.reward)) if curve]  # fmt: skip
    return f"{log.name} ({log.form}): {log.settings.label()}; {', '.join(seen)} to step {log.last:g}"
