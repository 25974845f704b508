"""Write what was measured here where the planner looks for it: `measured.json`, replaced as a whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from lora_planner import facts
from lora_planner.errors import BadInput
from lora_planner.facts import MEASURED, MEASURED_SCHEMA, Constant, Gpu


def write(rows: Sequence[Constant], home: Path, *, memory: Sequence[Constant] = (), gpus: Sequence[Gpu] = ()) -> Path:
    """Merge rows into `home`'s measured.json and return its path: new ones replace old ones of the same
    (name, stack, gpu), devices those of the same name. A damaged file is an error and stays as it is."""
    path = home / MEASURED
    old = facts.read_measured(path)
    devices = {g.name: g for g in (*old.gpus, *gpus)}
    document = {
        "schema": MEASURED_SCHEMA,
        "gpus": [facts.device_row(devices[name]) for name in sorted(devices)],
        "constants": _merged((*old.constants, *rows)),
        "memory": _merged((*old.memory, *memory)),
    }
    try:
        home.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        fix = f"Point {facts.HOME_VARIABLE} at a directory with room that can be written."
        raise BadInput(f"cannot write the measured constants: {error.strerror}", str(path), fix) from None
    facts.forget()
    return path


def _merged(rows: Iterable[Constant]) -> list[dict[str, object]]:
    by_key = {(row.name, row.stack, row.gpu): row for row in rows}
    return [asdict(by_key[key]) for key in sorted(by_key)]


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, whenever the power goes."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too
    finally:
        os.close(directory)
