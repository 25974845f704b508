"""From a spec to what was measured: the one function that every executor calls.

Other executors (a cluster engine, many adapters on one frozen base) call it, or replace it; specs, tasks and
records stay as they are.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_planner import facts, flops
from lora_planner.arch import from_config
from lora_planner.errors import BadInput, LoraPlanError, UnknownName
from lora_planner.model import Model
from lora_planner.predict import PROBE
from lora_planner.record import DIVERGED, FAILED, FINISHED, INTERRUPTED, INVALID, OOM, Json, RunSpec, canonical
from runner import adapt, base, checkpoint, kernel, measure, tasks, update
from runner.train import Diverged, Invalid, Objective, Progress, Supervised, noise_scale, optimizer_for, train

Report = Callable[[Json], None]
KERNEL = "kernel"
TEXTS = ("code", "shift", "jsonl")
#: seconds of work that a kill may cost
SAVE_EVERY_S = 20.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a spec's names are found on this machine. Nothing in here changes a number."""

    root: Path  # checkpoints of unfinished runs
    bases: Mapping[str, Path]
    data: Mapping[str, Path] = field(default_factory=dict)

    def to_json(self) -> Json:
        return {"root": str(self.root), "bases": {k: str(p) for k, p in self.bases.items()},
                "data": {k: str(p) for k, p in self.data.items()}}  # fmt: skip

    @classmethod
    def from_json(cls, document: Json) -> Place:
        return cls(
            Path(document["root"]),
            {k: Path(p) for k, p in document["bases"].items()},
            {k: Path(p) for k, p in document["data"].items()},
        )

    def base(self, key: str) -> base.Base:
        if key not in self.bases:
            raise BadInput(f"the base {key} is not on this machine", "run spec", "Make it, or give --model.")
        return base.Base(key, self.bases[key])

    def checkpoints(self, spec: RunSpec) -> Path:
        return self.root / "checkpoints" / spec.key


@dataclass(slots=True)
class Outcome:
    """How an attempt ended."""

    status: str
    measured: Json = field(default_factory=dict)
    reason: str = ""


class Interrupted(Exception):
    """Someone asked the run to stop; it has been saved."""


class Watch:
    """Checkpoints, memory phases, progress and the wish to stop: what surrounds the loop."""

    def __init__(self, spec: RunSpec, directory: Path, module: Any, peaks: measure.Peaks, report: Report,
                 stop: Callable[[], bool]) -> None:  # fmt: skip
        self.spec, self.directory, self.module, self.peaks = spec, directory, module, peaks
        self.report, self.stop, self.saved = report, stop, time.monotonic()

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.peaks.phase(name)

    def stepped(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        self.report({"step": progress.step, "loss": progress.losses[-1]})
        asked = self.stop()
        if progress.step < self.spec.steps and (asked or time.monotonic() - self.saved > SAVE_EVERY_S):
            self.save(progress, optimizer)
        if asked and progress.step < self.spec.steps:
            raise Interrupted(f"stopped after step {progress.step}, saved")

    def save(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        weights = {f"weight.{name}": p.detach() for name, p in adapt.trained(self.module).items()}
        tensors = weights | checkpoint.optimizer_tensors(optimizer) | checkpoint.rng_tensors()
        checkpoint.save(self.directory, progress.step, tensors, asdict(progress))
        self.saved = time.monotonic()

    def restore(self, optimizer: torch.optim.Optimizer) -> Progress:
        """The newest whole checkpoint of this spec, or the beginning."""
        found = checkpoint.load(self.directory)
        if found is None:
            return Progress()
        _, tensors, state, skipped = found
        with torch.no_grad():
            for name, parameter in adapt.trained(self.module).items():
                parameter.copy_(tensors[f"weight.{name}"])
        checkpoint.restore_optimizer(optimizer, tensors)
        checkpoint.restore_rng(tensors)
        progress = Progress(**state)
        progress.notes.append(f"resumed after step {progress.step}" + "".join(f"; skipped {s}" for s in skipped))
        return progress


def execute(
    spec: RunSpec, place: Place, report: Report = lambda _: None, stop: Callable[[], bool] = lambda: False,
    save_to: Path | None = None,
) -> Outcome:  # fmt: skip
    """Run a spec, from its checkpoint if there is one. Every way to end is an Outcome, never an exception.

    `save_to`: where the trained adapter, or the whole model, is written when the run finishes.
    """
    device = torch.device(spec.device)
    peaks = measure.Peaks(device)
    try:
        return _execute(spec, place, device, peaks, report, stop, save_to)
    except Diverged as error:
        return Outcome(DIVERGED, error.args[1], error.args[0])
    except Interrupted as error:
        return Outcome(INTERRUPTED, {}, str(error))
    except Invalid as error:
        return Outcome(INVALID, {}, str(error))
    except LoraPlanError as error:
        return Outcome(FAILED, {}, str(error))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return Outcome(OOM, {"peak_bytes": peaks.bytes, "reserved_bytes": peaks.reserved}, _first_line(error))
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _execute(
    spec: RunSpec, place: Place, device: torch.device, peaks: measure.Peaks, report: Report,
    stop: Callable[[], bool], save_to: Path | None,
) -> Outcome:  # fmt: skip
    begun = time.monotonic()
    source = place.base(spec.base)
    config = source.config()
    plan_model = from_config(config)
    with peaks.phase("load"):
        module, notes = base.load(source, spec, device)
        module = adapt.attach(module, plan_model, spec.plan_method(), spec.seed)
    task = _task(spec, place, source, plan_model)
    objective = _objective(spec, module, task, device, source)
    if spec.objective == KERNEL:
        return Outcome(FINISHED, _kernel(spec, module, task, objective, source))
    optimizer = optimizer_for(module, spec)
    watch = Watch(spec, place.checkpoints(spec), module, peaks, report, stop)
    progress = watch.restore(optimizer)
    if progress.step == 0:
        progress.notes += notes
    control = measure.control_s(device)
    if isinstance(objective, Supervised):
        _rehearse(objective, peaks)
    try:
        train(spec, module, objective, optimizer, watch, progress, plan_model.vocab_size)
    except Diverged as error:
        raise Diverged(
            str(error), _measured(spec, plan_model, module, task, progress, peaks, source.summary())
        ) from None
    measured = _measured(spec, plan_model, module, task, progress, peaks, source.summary())
    measured["drift"] = measure.control_s(device) / control - 1
    if save_to is not None:
        module.save_pretrained(save_to)
    if isinstance(objective, Supervised):
        measured["longest"] = objective.longest()[:8]
        measured["norms"] = adapt.spectral_norms(module)
        measured |= _update(module, objective, spec)
        if spec.task != PROBE:
            measured["noise_scale"] = noise_scale(objective, module)
    if device.type == "cpu":
        measured["peak_bytes"] = {"step": _cpu_step_peak(objective, optimizer, spec)}
    measured["wall_s"] = time.monotonic() - begun
    return Outcome(FINISHED, measured)


def _rehearse(objective: Supervised, peaks: measure.Peaks) -> None:
    """What does not fit fails now, on the longest micro-batch, and its samples are named."""
    try:
        with peaks.phase("longest"):
            objective.rehearse()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        ids = ", ".join(objective.longest()[:4])
        raise MemoryError(f"the longest micro-batch ({ids}) does not fit: {_first_line(error)}") from None


#: tasks of this process by what makes them: the runs of a sweep share one
_TASKS: dict[str, tasks.Task] = {}


def _task(spec: RunSpec, place: Place, source: base.Base, model: Model) -> tasks.Task:
    arguments = dict(spec.task_args)
    if spec.task == PROBE:
        arguments["vocab_size"] = model.vocab_size
    if spec.task == "jsonl":
        from runner.tasks import jsonl

        sha256 = arguments["sha256"]
        if sha256 not in place.data:
            raise BadInput(f"the data file {sha256[:12]} is not on this machine", "run spec", "Give --data.")
        jsonl.register(str(place.data[sha256]))
    key = canonical({"base": spec.base, "task": spec.task, "length": spec.seq_len, "arguments": arguments})
    if key not in _TASKS:
        found = tasks.build(spec.task, base.tokenizer(source), spec.seq_len, 0, arguments)
        if spec.objective == "sft" and spec.task in TEXTS:
            found.facts |= _baselines(found, model)
        _TASKS[key] = found
    return _TASKS[key]


def _baselines(task: tasks.Task, model: Model) -> Json:
    """What counting alone reaches on the held-out text, with counts from the task's own training text."""
    from runner.baselines import bigram_nats, unigram_nats

    return {name: count(task.train, task.held_out, model.vocab_size)
            for name, count in (("unigram_nats", unigram_nats), ("bigram_nats", bigram_nats))}  # fmt: skip


def _objective(spec: RunSpec, module: Any, task: tasks.Task, device: torch.device, source: base.Base) -> Objective:
    if spec.objective == "rl":
        from runner.policy import PolicyGradient
        from runner.train import autocast

        return PolicyGradient(spec, module, task, device, lambda: autocast(device, spec.precision))
    words = base.tokenizer(source)
    return Supervised(spec, module, task, device, (words.pad_token_id if words else 0) or 0)


def _kernel(spec: RunSpec, module: Any, task: tasks.Task, objective: Objective, source: base.Base) -> Json:
    """The empirical NTK of what this spec would train, on the first `steps` samples of its order."""
    assert isinstance(objective, Supervised)
    found = kernel.placement_kernel(objective, module, spec.steps)
    trainable = sum(p.numel() for p in adapt.trained(module).values())
    return {"trainable": trainable, "kernel": found.tolist(), "task": task.facts, "base": source.summary()}


def _update(module: Any, objective: Supervised, spec: RunSpec) -> Json:
    """How many directions the adapters used, and what is left of the loss if each keeps its strongest alone."""
    if spec.method not in ("lora", "rslora") or spec.task == PROBE:
        return {}
    found: Json = {"update": update.adapter_ranks(module)}
    if spec.rank > 1:
        with update.truncated(module, 1):
            found["rank_one_nats"] = objective.evaluate()
    return found


def _cpu_step_peak(objective: Objective, optimizer: torch.optim.Optimizer, spec: RunSpec) -> int:
    """Peak of one more step with optimizer states alive; at learning rate 0, so that the weights stay."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def step() -> None:
        objective.backward(spec.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure.cpu_peak(step)


def _measured(spec: RunSpec, model: Model, module: Any, task: tasks.Task, progress: Progress,
              peaks: measure.Peaks, story: Json) -> Json:  # fmt: skip
    """Everything the record keeps. FLOP/s and MFU by the planner's convention: no recomputation, full T x T scores."""
    device = torch.device(spec.device)
    found: Json = {
        "trainable": sum(p.numel() for p in adapt.trained(module).values()),
        "losses": progress.losses, "grad_norms": progress.grad_norms, "held_out": progress.held_out,
        "step_s": progress.step_s, "step_cpu_s": progress.step_cpu_s, "notes": progress.notes,
        "trained_tokens": progress.trained_tokens, "padded_tokens": progress.padded_tokens,
        "adapter_dtype": sorted({str(p.dtype) for p in adapt.trained(module).values()}),
        "base_dtype": sorted({str(p.dtype) for p in module.parameters()}),
        "peak_kind": measure.CUDA_KIND if device.type == "cuda" else measure.CPU_KIND,
        "task": task.facts, "base": story,
    }  # fmt: skip
    if progress.step_facts:
        found["step_facts"] = progress.step_facts
    if device.type == "cuda":
        found |= {"peak_bytes": peaks.bytes, "reserved_bytes": peaks.reserved}
    if progress.step:
        tokens = progress.padded_tokens / progress.step
        seconds = measure.summary(progress.step_s)
        length = max(1, round(tokens / spec.batch))
        per_token = flops.train(model, spec.plan_method(), length, spec.attention, "none", spec.micro_batch).total
        found |= {
            "tokens_per_step": tokens, "step_median_s": seconds[0], "step_p10_s": seconds[1], "step_p90_s": seconds[2],
            "tokens_per_s": tokens / seconds[0], "model_flops_per_s": per_token * tokens / seconds[0],
        }  # fmt: skip
        peak = _peak_flops(device, spec.precision)
        found["mfu"] = found["model_flops_per_s"] / peak if peak else None
    return found


def _peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of this device where a row of it is known."""
    name = measure.environment(device)["device"]
    try:
        row = facts.gpu(name)
        return row.peak(precision)
    except (UnknownName, BadInput):
        return None
