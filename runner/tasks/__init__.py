"""One task a file: `build(tokenizer, seq_len, seed, **args) -> Task`. Add a file and a row in BY_NAME."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import Any

from lora_planner.errors import BadInput, UnknownName, nearest

IGNORED = -100  # a label that is not trained on


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens, and for each the label that the position before it must predict (IGNORED: none)."""

    id: str  # the document or the row it came from, for messages
    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Tokens that count in the loss; the first token has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(slots=True)
class Task:
    """Data of a run. `facts` go into the record as they are.

    `reward`: RL only; (sample, sampled tokens) -> reward. The policy sees the tokens before the first label;
    the labels are the right answer, for the reward and the evaluation.
    """

    name: str
    train: list[Sample]
    held_out: list[Sample]
    facts: dict[str, Any] = field(default_factory=dict)
    reward: Callable[[Sample, list[int]], float] | None = None


BY_NAME = ("code", "shift", "facts", "jsonl", "arithmetic", "probe")


def build(name: str, tokenizer: Any, seq_len: int, seed: int, args: dict[str, Any]) -> Task:
    """The task of this name. `seed` chooses the held-out part and random contents, not the order of training."""
    if name not in BY_NAME:
        close = nearest(name, BY_NAME, 1)
        raise UnknownName(f"no task is called {name!r}", "runner/tasks",
                          f"Known: {', '.join(BY_NAME)}." + (f" Nearest: {close[0]}." if close else ""))  # fmt: skip
    module = import_module(f"runner.tasks.{name}")
    known = list(signature(module.build).parameters)[3:]
    if wrong := sorted(set(args) - set(known)):
        raise BadInput(f"the task {name} has no argument {', '.join(wrong)}", "run spec", f"Known: {', '.join(known)}.")
    task: Task = module.build(tokenizer, seq_len, seed, **args)
    return task
