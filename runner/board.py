"""What a person sees while a sweep runs: runs done and left, expected time, the current losses."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOBase
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lora_planner.record import Json
from lora_planner.units import duration
from runner.sweep import Planned

T = TypeVar("T")


class Stderr(TextIOBase):
    """The stream of a board. A terminal that went away ends the showing, never the sweep."""

    def __init__(self) -> None:
        self.stream = sys.stderr  # now: live bars put something else in its place

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        return self._tried(lambda: self.stream.isatty(), False)

    def write(self, text: str) -> int:
        return self._tried(lambda: self.stream.write(text), len(text))

    def flush(self) -> None:
        self._tried(lambda: self.stream.flush(), None)

    def _tried(self, action: Callable[[], T], otherwise: T) -> T:
        try:
            return action() if self.stream else otherwise
        except BrokenPipeError:
            with suppress(OSError):  # what is still buffered goes nowhere: at exit it would turn 0 into 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        except (OSError, ValueError):  # ValueError: it was closed
            pass
        return otherwise


class Board:
    """Live bars on a terminal; elsewhere one plain line a run. Everything goes to stderr, stdout has the result."""

    def __init__(self, slots: int = 1) -> None:
        self.console = Console(file=Stderr(), soft_wrap=True, highlight=False, markup=False, emoji=False)
        self.slots = slots
        self.bars: dict[str, TaskID] = {}
        self.live: Progress | None = None
        self.expected = self.spent_expected = 0.0
        self.left = self.total = 0
        self.begun = time.monotonic()

    def begin(self, left: Sequence[Planned], done: int) -> None:
        self.left, self.total = len(left), len(left)
        self.expected = sum(p.expected_s for p in left)
        self.begun = time.monotonic()
        kept = f", {done} done before" if done else ""
        expected = duration(self.expected / self.slots)
        self.console.print(f"{len(left)} runs{kept}, about {expected} of training expected")
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self.live.start()

    def message(self, planned: Planned, message: Json) -> None:
        key, spec = planned.spec.key, planned.spec
        if "ended" in message:
            self._ended(planned, message["ended"])
        elif self.live and "started" in message:
            self.bars[key] = self.live.add_task(spec.label(), total=spec.steps, loss="")
        elif self.live and "step" in message and key in self.bars:
            self.live.update(self.bars[key], completed=message["step"], loss=f"loss {message['loss']:.3f}")

    def _ended(self, planned: Planned, end: Json) -> None:
        self.left -= 1
        self.spent_expected += planned.expected_s
        if self.live and planned.spec.key in self.bars:
            self.live.remove_task(self.bars.pop(planned.spec.key))
        points = (end.get("measured") or {}).get("held_out") or []
        loss = f" held out {points[0][1]:.3f} -> {points[-1][1]:.3f}" if len(points) > 1 else ""
        why = f": {end['reason']}" if end.get("reason") else ""
        line = f"{self.total - self.left}/{self.total} {planned.spec.label()} {end['status']}{loss}{why}"
        if self.left and self.spent_expected:
            ahead = (self.expected - self.spent_expected) * (time.monotonic() - self.begun) / self.spent_expected
            line += f"; {duration(max(0.0, ahead))} left"
        self.console.print(line)
        if not self.left:
            self.close()

    def close(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None
