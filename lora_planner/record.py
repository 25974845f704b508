"""What is on disk: what to run, what was predicted before it ran, and what came out.

A journal is a file of JSON lines, one event each, in the order in which things happened:

    planned   the spec, the model's config and the prediction: written before the run starts
    started   an attempt began, in this environment
    ended     the attempt's status and everything measured

Lines are only ever appended. Each carries the CRC of its own text, so that a torn or altered line is
skipped and reported, never read. A run that started and never ended was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_planner.errors import BadInput
from lora_planner.ledger import Estimate
from lora_planner.method import DEFAULT_ALPHA, Method, method

SCHEMA = 1
EVENTS = ("registered", "planned", "started", "ended")

FINISHED, DIVERGED, OOM, INTERRUPTED = "finished", "diverged", "oom", "interrupted"
KILLED, INVALID, FAILED, QUEUED = "killed", "invalid", "failed", "queued"
#: after these a run is not repeated: the result is the measurement, also where it is a bad one
FINAL = (FINISHED, DIVERGED, OOM, INVALID)

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything that decides a run's numbers, and nothing else: no path, no name of a machine.

    base            identity of the base model (a hash of its weights, or of what made them)
    init            "pretrained", or "random": the same architecture from scratch
    task, task_args the data, by name and arguments (a file's sha256, never its path)
    seed            of the adapter's init and of the data order; arms with one seed see the same order
    repeat          same-seed reruns, which measure the noise floor, differ in this alone
    precision       "fp32", or "bf16": autocast, a frozen base in bf16; trained weights are fp32 in both
    eval_every      steps between held-out losses; 0: only before the first and after the last step
    eval_at         further steps with a held-out loss after them
    adam_eps        small, or high ranks are damped silently: the gradient of B scales with alpha / r
    objective       "sft", "rl", or "kernel": gradients of `steps` samples at the start, and no training
    group, new_tokens   RL: samples per prompt, tokens sampled
    """

    base: str
    task: str
    task_args: tuple[tuple[str, Any], ...] = ()
    init: str = "pretrained"
    objective: str = "sft"
    method: str = "lora"
    rank: int = 16
    alpha: float = DEFAULT_ALPHA
    targets: tuple[str, ...] = ("all-linear",)
    experts: str = "fused"
    lr: float = 1e-3
    schedule: str = "constant"
    steps: int = 100
    micro_batch: int = 8
    accumulation: int = 1
    seq_len: int = 128
    seed: int = 0
    repeat: int = 0
    precision: str = "fp32"
    checkpointing: str = "none"
    attention: str = "sdpa"
    device: str = "cpu"
    eval_every: int = 0
    eval_at: tuple[int, ...] = ()
    adam_eps: float = 1e-10
    group: int = 0
    new_tokens: int = 0

    @property
    def key(self) -> str:
        """The first 16 hex digits of the sha256 of the spec's JSON.

        >>> RunSpec("b", "shift").key == RunSpec("b", "shift", lr=0.001).key != RunSpec("b", "shift", seed=1).key
        True
        """
        return hashlib.sha256(canonical(self.to_json()).encode()).hexdigest()[:16]

    def to_json(self) -> Json:
        return {**asdict(self), "task_args": dict(self.task_args), "targets": list(self.targets),
                "eval_at": list(self.eval_at)}  # fmt: skip

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RunSpec:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(document) - known)
        if unknown:
            raise BadInput(
                f"a run spec with unknown fields {unknown}", "run spec", "Was it written by a newer version?"
            )
        words = dict(document)
        words["task_args"] = tuple(sorted(words.get("task_args", {}).items()))
        for name in ("targets", "eval_at"):
            if name in words:
                words[name] = tuple(words[name])
        return cls(**words)

    def plan_method(self) -> Method:
        """The planner's method: what is trained, and in which precision the base is held."""
        base = "bfloat16" if self.precision == "bf16" and self.method != "full" else "float32"
        return method(self.method, max(self.rank, 1), self.alpha or DEFAULT_ALPHA, self.targets, self.experts, base)

    @property
    def batch(self) -> int:
        """Samples an optimizer step."""
        return self.micro_batch * self.accumulation

    def label(self) -> str:
        """What a person calls this run."""
        arm = self.method if self.method == "full" else f"{self.method} r{self.rank}"
        start = "" if self.init == "pretrained" else " from scratch"
        return f"{self.task} {arm}{start} lr {self.lr:.1e} seed {self.seed}" + (
            f"+{self.repeat}" if self.repeat else ""
        )


@dataclass(slots=True)
class RunRecord:
    """One run: what was to be done, what was predicted, and how each attempt ended.

    `measured` is that of the last attempt that ended; the names in it:

    trainable           parameters with a gradient, as peft reports them
    losses, grad_norms  per step; nats per trained token, before the step's update
    held_out            [step, nats per trained token] pairs
    step_s, step_cpu_s  seconds of each step: wall clock, and processor time of this process
    peak_bytes          by phase; `peak_kind` says what was counted
    tokens_per_step     padded tokens; `trained_tokens` of the whole run
    noise_scale         simple gradient noise scale in samples
    norms               [module, |A|, |B|] spectral norms at the end
    drift               control kernel after the run over before it, minus 1
    """

    key: str
    spec: RunSpec
    config: Json
    predicted: dict[str, Estimate]
    status: str = QUEUED
    reason: str = ""
    measured: Json = field(default_factory=dict)
    env: Json = field(default_factory=dict)
    attempts: list[tuple[str, str]] = field(default_factory=list)  # status and reason of each, in order
    planned_with: str = ""  # the planner's version and the hash of its constants

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def final_loss(self) -> float | None:
        """Held-out loss after the last step, of a finished run."""
        points = self.measured.get("held_out") or []
        known = self.status == FINISHED and points and points[-1][1] is not None
        return float(points[-1][1]) if known else None


@dataclass(slots=True)
class Score:
    """One quantity of one run, predicted before and measured after. `fitted`: its run fed the constants."""

    quantity: str
    stack: str
    gpu: str
    key: str
    label: str
    predicted: Estimate
    measured: float
    fitted: bool = False

    @property
    def ratio(self) -> float:
        """measured / predicted"""
        return self.measured / self.predicted.value if self.predicted.value else float("inf")

    @property
    def covered(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "fails", "undecided", "not run"


@dataclass(frozen=True, slots=True)
class Series:
    """One line or cloud of a plot. `low`, `high`: the ends of a band, or empty. `style`: "line", "points" or "fit"."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    style: str = "line"


@dataclass(frozen=True, slots=True)
class Plot:
    """Data of a picture; whoever draws it adds no number."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False


@dataclass(slots=True)
class Verdict:
    """What the runs say about one sentence. `status` is one of the four words above.

    effect     the measured value with its 95 % interval, in the unit of the published one
    n          runs behind it;  `keys` names those that decided, or those that are wrong
    p          of the test that decides, for the correction over a family of claims; None: arithmetic, no test
    control    what is known to differ and was found to, or was not: then nothing else counts
    plot       the data behind it as a picture
    """

    claim: str
    status: str
    sentence: str
    effect: Estimate | None = None
    n: int = 0
    keys: tuple[str, ...] = ()
    p: float | None = None
    control: str = ""
    plot: Plot | None = None


def canonical(document: Mapping[str, Any]) -> str:
    """The one JSON text of a document: what hashes are taken of. NaN and infinity have none."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def line(event: Mapping[str, Any]) -> str:
    """An event as one line of a journal, with its CRC.

    >>> parse(line({"event": "started", "key": "k"}))["key"]
    'k'
    """
    body = {"schema": SCHEMA, **event}
    return canonical({**body, "crc": zlib.crc32(canonical(body).encode())}) + "\n"


def parse(text: str) -> Json:
    """The event of one line, or ValueError where the line is torn, altered or of a newer schema."""
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("not an event")
    crc = document.pop("crc", None)
    if crc != zlib.crc32(canonical(document).encode()):
        raise ValueError("its checksum is wrong")
    if document.get("schema") != SCHEMA or document.get("event") not in EVENTS or "key" not in document:
        raise ValueError(f"schema {document.get('schema')!r}, event {document.get('event')!r} are unknown here")
    return document


def read_events(path: Path) -> tuple[list[Json], list[tuple[int, str]]]:
    """Events in order, and the lines that were skipped: (line number, why). A missing file has none."""
    events: list[Json] = []
    skipped: list[tuple[int, str]] = []
    if not path.exists():
        return events, skipped
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                if not raw.endswith(b"\n"):
                    raise ValueError("the line was never finished")
                events.append(parse(raw.decode("ascii")))
            except (ValueError, RecursionError) as error:
                skipped.append((number, one_reason(error)))
    return events, skipped


def one_reason(error: Exception) -> str:
    return "not readable as JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)


def merge(events: Iterable[Json]) -> dict[str, RunRecord]:
    """Runs by key, in the order in which they were planned. Events of a run nobody planned are ignored."""
    found: dict[str, RunRecord] = {}
    for event in events:
        key = event["key"]
        if event["event"] == "planned":
            predicted = {name: Estimate(**e) for name, e in event["predicted"].items()}
            if key not in found:  # the first prediction is the one that counts
                spec = RunSpec.from_json(event["spec"])
                found[key] = RunRecord(
                    key, spec, event["config"], predicted, planned_with=event.get("planned_with", "")
                )
            continue
        run = found.get(key)
        if run is None:
            continue
        if event["event"] == "started":
            run.status, run.reason, run.env = INTERRUPTED, "it never ended", event.get("env", {})
            run.attempts.append((INTERRUPTED, run.reason))
        else:
            run.status, run.reason = event["status"], event.get("reason", "")
            run.measured = event.get("measured", {})
            if run.attempts and run.attempts[-1] == (INTERRUPTED, "it never ended"):
                run.attempts.pop()
            run.attempts.append((run.status, run.reason))
    return found


def read_runs(path: Path) -> list[RunRecord]:
    """Every run of a journal; damaged lines are left out (`read_events` tells which)."""
    return list(merge(read_events(path)[0]).values())
