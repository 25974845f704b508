"""Checkpoints of a run that survive a kill, a full disk and a flipped bit.

    step-000120/tensors.safetensors   weights, optimizer, random generators
    step-000120/state.json            the marker, written last: step, state and the sha256 of both

A checkpoint is made in `saving/` and gets its name by one rename. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_planner.errors import BadInput
from runner.journal import PATIENCE_S, patiently, sync_directory

SCHEMA = 1
TENSORS, STATE, SAVING = "tensors.safetensors", "state.json", "saving"
NAME = re.compile(r"step-(\d{6,})(?:\.(\d+))?")  # .1, .2 ...: the same step again, beside a damaged one
OPTIMIZER, RNG = "optimizer.", "rng."

log = logging.getLogger(__name__)
Tensors = dict[str, torch.Tensor]


def save(
    directory: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int = 2, patience_s: float = PATIENCE_S
) -> Path:
    """Writes the checkpoint of this step and keeps the `keep` newest, this one included. One process at a time.

    Whatever fails before the rename, those that were there are untouched. Checkpoints of later steps are
    removed: a run that saves this step did not get there, since they could not be loaded.
    """
    path = patiently(lambda: _write(directory, step, tensors, state), directory, patience_s)
    mine = _order(path)
    older = [p for p in _newest_first(directory) if _order(p) < mine and _order(p)[0] < step]
    for other in _newest_first(directory):
        if other != path and other not in older[: keep - 1]:
            shutil.rmtree(other, ignore_errors=True)
    return path


def load(directory: Path) -> tuple[int, Tensors, dict[str, Any], list[str]] | None:
    """Step, tensors, state of the newest whole checkpoint, and which newer ones were skipped and why.

    None where none is whole. The damaged ones are logged too, or a run that starts over would do so silently.
    """
    skipped: list[str] = []
    for path in _newest_first(directory):
        try:
            marker = _marker(path)
            with (path / TENSORS).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != marker["sha256"]:
                    raise ValueError(f"the checksum of {TENSORS} is wrong")
            return marker["step"], load_file(path / TENSORS), marker["state"], skipped
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            skipped.append(f"{path.name}: {_reason(error)}")
            log.warning("skipped a damaged checkpoint, %s", skipped[-1])
    return None


def _write(directory: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    saving = directory / SAVING
    directory.mkdir(parents=True, exist_ok=True)
    if saving.exists():
        shutil.rmtree(saving)  # a killed process left it
    try:
        saving.mkdir()
        _write_tensors(saving / TENSORS, tensors)
        with (saving / TENSORS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        body = {"schema": SCHEMA, "step": step, "state": state, "sha256": digest}
        _write_synced(saving / STATE, _text({**body, "marker": _digest(body)}).encode())
        sync_directory(saving)
        names = (f"step-{step:06d}" + (f".{n}" if n else "") for n in count())
        path = next(directory / name for name in names if not (directory / name).exists())
        os.rename(saving, path)
    except OSError:
        shutil.rmtree(saving, ignore_errors=True)  # gives its space back
        raise
    sync_directory(directory)
    return path


def _write_tensors(path: Path, tensors: Tensors) -> None:
    try:
        save_file(_separate(tensors), path)
    except SafetensorError as error:  # the library hides the number of a disk's error in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_synced(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        while content:
            content = content[os.write(fd, content) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _separate(tensors: Tensors) -> Tensors:
    """On the CPU, in one piece each, and no two in the same memory: safetensors stores tied weights twice or not."""
    seen: set[int] = set()
    separate: Tensors = {}
    for name, tensor in tensors.items():
        piece = tensor.detach().cpu().contiguous()
        where = piece.untyped_storage().data_ptr()
        separate[name] = piece.clone() if where in seen else piece
        seen.add(where)
    return separate


def _marker(path: Path) -> dict[str, Any]:
    body = json.loads((path / STATE).read_bytes().decode("ascii"))
    if not isinstance(body, dict) or body.pop("marker", None) != _digest(body):
        raise ValueError(f"the checksum of {STATE} is wrong")
    if body["schema"] != SCHEMA:
        raise ValueError(f"schema {body['schema']!r} is unknown here")
    if body["step"] != _order(path)[0]:
        raise ValueError(f"it is of step {body['step']}")
    return body


def _text(body: dict[str, Any]) -> str:
    """One text of a state. NaN is allowed, which a journal's line forbids: a state must come back as it was."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(_text(body).encode()).hexdigest()


def _order(path: Path) -> tuple[int, int]:
    """Step, and which writing of it."""
    match = NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, -1)


def _newest_first(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted((p for p in directory.iterdir() if NAME.fullmatch(p.name)), key=_order, reverse=True)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"it has no {Path(str(error.filename)).name}"
    unreadable = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
    return f"{STATE} is not readable as JSON" if unreadable else str(error)


# --- what goes into a checkpoint ----------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's exp_avg, exp_avg_sq and step of every parameter that had a step: `optimizer.INDEX.NAME`.

    The tensors are the optimizer's own, not copies; INDEX counts the parameters in the order of the groups.
    """
    state = optimizer.state_dict()["state"]
    return {f"{OPTIMIZER}{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer over the same parameters in the same order.

    Other names in `tensors` are left alone; learning rate and betas stay those of `optimizer`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Tensors] = {}
    for full, tensor in tensors.items():
        if not full.startswith(OPTIMIZER):
            continue
        index, name = full.removeprefix(OPTIMIZER).split(".")
        known = int(index) < len(parameters)
        if not known or (tensor.ndim and tensor.shape != parameters[int(index)].shape):
            has = list(parameters[int(index)].shape) if known else "no such parameter"
            raise BadInput(f"{full} is {list(tensor.shape)}, the optimizer has {has}", "checkpoint",
                           "It belongs to another model or method: name another directory.")  # fmt: skip
        state.setdefault(int(index), {})[name] = tensor.clone()  # or two optimizers would share it
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def rng_tensors() -> Tensors:
    """States of torch's generators, uint8. CUDA's only where this process uses it: asking would start it."""
    states = {f"{RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"{RNG}cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng(tensors: Tensors) -> None:
    """The inverse of `rng_tensors`; a GPU that is not here keeps no state. Other names are left alone."""
    torch.set_rng_state(tensors[f"{RNG}cpu"])
    for i in range(torch.cuda.device_count()):
        if f"{RNG}cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"{RNG}cuda.{i}"], i)
