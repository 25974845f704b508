"""Run the specs that have no result yet, and journal every attempt.

An executor turns specs into messages; the sweep turns messages into the journal. An executor on a cluster, or one
that trains many adapters against one frozen base, needs `run` and `stop` and nothing else of this project.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from lora_planner.errors import RunFailed, Stopped
from lora_planner.ledger import Estimate
from lora_planner.record import FINISHED, INTERRUPTED, KILLED, OOM, Json, RunRecord, RunSpec, read_runs
from runner import journal
from runner.journal import JOURNAL, Journal

#: (key of the spec, message): {"started": environment}, {"step": n, "loss": x} or {"ended": outcome}
Message = tuple[str, Json]
#: disk that a sweep wants free before it starts: records are small, two checkpoints of a run are not
RESERVE_BYTES_PER_PARAM = 2 * 12


class Executor(Protocol):
    """Runs specs in the given order, as many at once as it likes, and yields their messages."""

    def run(self, specs: Sequence[RunSpec]) -> Iterator[Message]: ...
    def stop(self, now: bool) -> None:
        """Ask what runs to save and end; `now`: kill it."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A spec with its prediction, which is journalled before anything runs."""

    spec: RunSpec
    config: Json
    predicted: Mapping[str, Estimate]
    planned_with: str = ""

    @property
    def expected_s(self) -> float:
        step = self.predicted.get("step_s")
        return (step.value if step else 1.0) * self.spec.steps


class Watcher(Protocol):
    """Shows a sweep to a person."""

    def begin(self, left: Sequence[Planned], done: int) -> None: ...
    def message(self, planned: Planned, message: Json) -> None: ...


def riskiest_first(planned: Sequence[Planned]) -> list[Planned]:
    """Largest predicted peak first, then the longest: what cannot fit fails in the first minute, not in the last."""

    def size(p: Planned) -> tuple[float, float]:
        peak = p.predicted.get("peak_bytes")
        return (peak.value if peak else 0.0, p.expected_s)

    return sorted(planned, key=size, reverse=True)


def sweep(directory: Path, planned: Sequence[Planned], executor: Executor, watcher: Watcher) -> list[RunRecord]:
    """Every planned run, finished now or before. Stopped by a signal it saves, and raises Stopped.

    An out-of-memory is a result. It is kept, and the run is tried once more with half the micro-batch.
    """
    with Journal.open(directory) as log:
        queue_of: dict[str, Planned] = {p.spec.key: p for p in planned}
        while True:
            known = {run.key: run for run in read_runs(directory / JOURNAL)}
            for p in queue_of.values():
                if p.spec.key not in known:
                    log.append(journal.planned(p.spec, p.config, p.predicted, p.planned_with))
            left = [p for p in queue_of.values() if p.spec.key not in known or not known[p.spec.key].is_final]
            if not left:
                break
            log.reserve(_disk_bytes(left))
            watcher.begin(left, len(queue_of) - len(left))
            _run(riskiest_first(left), executor, log, watcher)
            failed = {run.key: run for run in read_runs(directory / JOURNAL) if run.key in queue_of}
            retries = _retries(queue_of, failed)
            if not retries:
                break
            queue_of |= {p.spec.key: p for p in retries}
        wanted = set(queue_of)
    return [run for run in read_runs(directory / JOURNAL) if run.key in wanted]


def _disk_bytes(left: Sequence[Planned]) -> int:
    largest = max((p.predicted["trainable"].value for p in left if "trainable" in p.predicted), default=0.0)
    return int(RESERVE_BYTES_PER_PARAM * largest) + (16 << 20)


def _retries(queue_of: Mapping[str, Planned], runs: Mapping[str, RunRecord]) -> list[Planned]:
    """Half the micro-batch for each run that was out of memory and is no retry itself."""
    halves = []
    for key, p in queue_of.items():
        run, spec = runs.get(key), p.spec
        if run and run.status == OOM and spec.micro_batch % 2 == 0:
            half = replace(spec, micro_batch=spec.micro_batch // 2, accumulation=spec.accumulation * 2)
            parent = replace(spec, micro_batch=spec.micro_batch * 2, accumulation=max(1, spec.accumulation // 2))
            if half.key not in queue_of and parent.key not in queue_of:
                halves.append(replace(p, spec=half, planned_with=f"{p.planned_with}; retry of {key} after OOM"))
    return halves


def _run(ordered: Sequence[Planned], executor: Executor, log: Journal, watcher: Watcher) -> None:
    by_key = {p.spec.key: p for p in ordered}
    with stopping(executor) as stopped:
        for key, message in executor.run([p.spec for p in ordered]):
            if "started" in message:
                log.append(journal.started(key, message["started"]))
            elif "ended" in message:
                end = message["ended"]
                log.append(journal.ended(key, end["status"], end.get("measured", {}), end.get("reason", "")))
            watcher.message(by_key[key], message)
        if stopped:
            name = signal.Signals(stopped[0]).name
            error = Stopped(f"stopped by {name}, what was finished is saved", "", "The same command goes on from here.")
            error.exit_code = 128 + stopped[0]
            raise error


@contextmanager
def stopping(executor: Executor) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM asks the runs to save and end; the second kills them."""
    seen: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        seen.append(number)
        executor.stop(now=len(seen) > 1)

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Inline:
    """Runs in this process, one at a time."""

    def __init__(self, execute: Callable[..., Any]) -> None:
        self.execute, self.stopped = execute, False

    def run(self, specs: Sequence[RunSpec]) -> Iterator[Message]:
        for spec in specs:
            if self.stopped:
                return
            yield spec.key, {"started": {}}
            outcome = self.execute(spec, stop=lambda: self.stopped)
            yield spec.key, {"ended": asdict(outcome)}

    def stop(self, now: bool) -> None:
        self.stopped = True


@dataclass(slots=True)
class _Slot:
    """One worker process and the run it has."""

    env: dict[str, str]
    process: subprocess.Popen[str] | None = None
    key: str = ""


class Workers:
    """One process per GPU, or per group of cores. A worker that is killed loses its own run, no other."""

    def __init__(self, slots: Sequence[dict[str, str]], place: Json, save_to: Path | None = None) -> None:
        self.slots = [_Slot(env) for env in slots]
        self.place, self.save_to = place, save_to
        self.messages: queue.Queue[tuple[_Slot, subprocess.Popen[str], str | None]] = queue.Queue()
        self.stopped = self.killed = False

    def run(self, specs: Sequence[RunSpec]) -> Iterator[Message]:
        waiting = list(specs)
        try:
            for slot in self.slots:
                self._next(slot, waiting)
            while any(slot.key for slot in self.slots):
                slot, process, line = self.messages.get()
                if process is not slot.process or not slot.key:
                    continue
                if line is None:
                    yield slot.key, {"ended": self._died(slot)}
                else:
                    message = json.loads(line)
                    yield slot.key, message
                    if "ended" not in message:
                        continue
                self._next(slot, waiting)
        finally:
            self._close()

    def stop(self, now: bool) -> None:
        self.stopped = True
        for slot in self.slots:
            if slot.process and slot.process.poll() is None:
                if now:
                    self.killed = True
                    slot.process.kill()
                else:
                    self._send(slot, "stop")

    def _next(self, slot: _Slot, waiting: list[RunSpec]) -> None:
        slot.key = ""
        if self.stopped or not waiting:
            return
        spec = waiting.pop(0)
        slot.key = spec.key
        if slot.process is None or slot.process.poll() is not None:
            self._start(slot)
        job = {"spec": spec.to_json(), "place": self.place, "save_to": str(self.save_to) if self.save_to else None}
        self._send(slot, json.dumps(job))

    def _start(self, slot: _Slot) -> None:
        # a group of its own: a Ctrl-C in the terminal reaches the parent alone, which asks the worker to save
        slot.process = subprocess.Popen(
            [sys.executable, "-m", "runner.worker"], env={**os.environ, **slot.env}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(slot, slot.process), daemon=True).start()

    def _read(self, slot: _Slot, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self.messages.put((slot, process, line))
        process.wait()
        self.messages.put((slot, process, None))

    def _send(self, slot: _Slot, line: str) -> None:
        assert slot.process and slot.process.stdin
        try:
            slot.process.stdin.write(line + "\n")
            slot.process.stdin.flush()
        except (BrokenPipeError, OSError):
            pass  # it died; its reader says so

    def _died(self, slot: _Slot) -> Json:
        """A process that ended without an answer: by our own hand, or by the system's for want of memory."""
        assert slot.process
        code = slot.process.returncode
        if self.killed:
            return {"status": INTERRUPTED, "reason": "killed at the second signal"}
        if code == -signal.SIGKILL:
            return {"status": KILLED, "reason": "killed by signal 9: likely out of host memory"}
        return {"status": KILLED, "reason": f"the worker ended with code {code}"}

    def _close(self) -> None:
        for slot in self.slots:
            if slot.process and slot.process.stdin:
                try:
                    slot.process.stdin.close()  # it saves and leaves
                    slot.process.wait(timeout=30)
                except (OSError, subprocess.TimeoutExpired):
                    slot.process.kill()


def slots(device: str, gpus: int, cores: int, threads: int = 1) -> list[dict[str, str]]:
    """Environments of the workers: a GPU each; on a CPU as many as there are groups of `threads` cores.

    Passive waiting: two processes whose threads spin for each other's cores run up to 48 times slower.
    """
    calm = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cuda":
        return [{**calm, "CUDA_VISIBLE_DEVICES": str(i), "OMP_NUM_THREADS": "4"} for i in range(gpus)]
    return [{**calm, "OMP_NUM_THREADS": str(threads)} for _ in range(max(1, cores // threads))]


def require_finished(runs: Sequence[RunRecord]) -> None:
    """RunFailed where nothing finished: there is no number to show."""
    if runs and not any(run.status == FINISHED for run in runs):
        first = runs[0]
        raise RunFailed(f"none of {len(runs)} runs finished; the first ended {first.status}: {first.reason}",
                        first.spec.label(), "Its record is kept.")  # fmt: skip
