"""A document that anybody may have written, read value by value, and the name of a plan.

A wrong value is one error that says what was expected, what is there, and where: `plan.json#/result/job/epochs`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from math import isfinite
from typing import Any, Self

from lora_planner.errors import BadInput
from lora_planner.ledger import BASES, Estimate

MAX_TEXT = 2000
MAX_ITEMS = 10_000
MAX_NUMBER = 1e30
TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True)
class Node:
    """A place in a document of JSON or YAML.

    fix       what every error advises, in place of what the kind of value suggests
    lenient   a number or a truth in quotes is one, and text that begins with { is JSON: PyYAML reads `2e-4` as text, and
              a command line has nothing else; the tools turn it into a value later

    >>> node = Node({"a": {"b": [1, "x"]}, "lr": "2e-4"}, "f.json")
    >>> node["a"]["b"].path, node.at("a.b").path, [item.value for item in node.at("a.b")]
    ('/a/b', '/a/b', [1, 'x'])
    >>> node["a"]["c"].number(default=3.0), Node({"lr": "2e-4"}, "f.yaml", lenient=True)["lr"].number()
    (3.0, 0.0002)
    >>> node["lr"].number()
    Traceback (most recent call last):
    lora_planner.errors.BadInput: expected a number, got '2e-4' (f.json#/lr). Give a number.
    """

    value: Any
    where: str
    path: str = ""
    fix: str = ""
    lenient: bool = False

    @property
    def place(self) -> str:
        return f"{self.where}#{self.path or '/'}"

    @property
    def there(self) -> bool:
        """Whether there is a value; null is "not set"."""
        return self.value is not None

    def refuse(self, expected: str, fix: str = "") -> BadInput:
        got = "nothing" if self.value is None else shown(self.value)
        return BadInput(f"expected {expected}, got {got}", self.place, self.fix or fix)

    def _inside(self, name: str | int, value: Any) -> Self:
        return type(self)(value, self.where, f"{self.path}/{name}", self.fix, self.lenient)

    def __getitem__(self, name: str) -> Self:
        """The value under a key, whether it is there or not."""
        if not isinstance(self.value, Mapping):
            raise self.refuse("keys and values", "Give a mapping.")
        return self._inside(name, self.value.get(name))

    def at(self, path: str) -> Self:
        """The value under keys with dots between them."""
        node = self
        for name in path.split("."):
            node = node[name]
        return node

    def __iter__(self) -> Iterator[Self]:
        if not isinstance(self.value, list | tuple) or len(self.value) > MAX_ITEMS:
            raise self.refuse("a list", "Give a list.")
        return (self._inside(i, item) for i, item in enumerate(self.value))

    def table(self) -> Self:
        """Keys and values, none of them where nothing is there."""
        value = {} if self.value is None else self.value
        if (
            self.lenient and isinstance(value, str) and value.lstrip().startswith("{")
        ):  # as TRL takes it on a command line
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.refuse("keys and values", "Give a mapping.")
        return type(self)(value, self.where, self.path, self.fix, self.lenient)

    def items(self) -> Iterator[tuple[str, Self]]:
        if not isinstance(self.value, Mapping) or not all(isinstance(name, str) for name in self.value):
            raise self.refuse("keys and values", "Give a mapping.")
        return ((name, self[name]) for name in self.value)

    # ------------------------------------------------------------ values; a default stands for null

    def number(
        self, low: float = 0.0, high: float = MAX_NUMBER, default: float | None = None, quoted: bool = False
    ) -> float:
        """A finite number. `quoted`: one in quotes too, as PyYAML reads `2e-4`."""
        if self.value is None and default is not None:
            return default
        kinds = (int, float, str) if self.lenient else (int, float)
        try:
            found = float(self.value) if isinstance(self.value, kinds) and not isinstance(self.value, bool) else None
        except (ValueError, OverflowError):
            found = None
        if found is None or not isfinite(found):
            raise self.refuse("a number", "Give a number.")
        if not low <= found <= high:
            raise self.refuse(f"a number from {low:g} to {high:g}", "Correct the number.")
        return found

    def integer(self, low: int = 1, high: int = 10**12, default: int | None = None) -> int:
        found = self.number(low, high, default)
        if found != int(found):
            raise self.refuse("a whole number", "Give a whole number.")
        return int(found)

    def flag(self, default: bool = False) -> bool:
        if self.value is None:
            return default
        if self.lenient and isinstance(self.value, str) and self.value.lower() in TRUTHS:
            return TRUTHS[self.value.lower()]
        if not isinstance(self.value, bool):
            raise self.refuse("true or false", "Use true or false.")
        return self.value

    def text(self, default: str | None = None) -> str:
        if self.value is None and default is not None:
            return default
        if not isinstance(self.value, str):
            raise self.refuse("text", "Put it in quotes.")
        if len(self.value) > MAX_TEXT:
            raise self.refuse(f"text of at most {MAX_TEXT} characters", "Shorten it.")
        return self.value

    def names(self, commas: bool = False) -> tuple[str, ...]:
        """A list of names, or one name; `commas`: the tool splits a text at commas."""
        if self.value is None:
            return ()
        if isinstance(self.value, str):
            parts = self.value.split(",") if commas else [self.value]
            return tuple(part.strip() for part in parts if part.strip())
        if not isinstance(self.value, list | tuple) or not all(isinstance(item, str) for item in self.value):
            raise self.refuse("names", "Give a list of names.")
        return tuple(self.value)

    def integers(self) -> tuple[int, ...]:
        """A list of whole numbers from 0 on, or one of them."""
        if self.value is None:
            return ()
        items = self.value if isinstance(self.value, list) else [self.value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.refuse("whole numbers", "Give a list of numbers.")
        return tuple(items)

    def basis(self) -> str:
        if self.value not in BASES:
            raise self.refuse(f"one of {', '.join(BASES)}")
        return str(self.value)

    def day(self) -> date:
        try:
            return date.fromisoformat(self.text())
        except ValueError:
            raise self.refuse("a date like 2026-11-23") from None

    def estimate(self, positive: bool = False) -> Estimate:
        low, value, high = (self[end].number() for end in ("low", "value", "high"))
        if not low <= value <= high or (positive and not low > 0):
            raise self.refuse("low <= value <= high" + (", all above 0" if positive else ""))
        source = self["source"].text("")
        return Estimate(low, value, high, self["unit"].text(""), self["basis"].basis(), source)


def shown(value: object) -> str:
    """A value in an error, not too long of it.

    >>> shown("x" * 100)
    "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..."
    """
    text = repr(value) if not isinstance(value, str) else repr(value[:100])
    return text if len(text) <= 60 else text[:57] + "..."


def plan_hash(result: Any) -> str:
    """What names a plan everywhere (budget, export, check): SHA-256 of its `result`, keys sorted, no spaces.

    Anybody gets it from the file, however that is indented and whatever else is in it:

        python3 -c 'import hashlib, json, sys; print(hashlib.sha256(json.dumps(json.load(sys.stdin)["result"],
            sort_keys=True, separators=(",", ":")).encode()).hexdigest())' < plan.json

    Comments of exported files have its first 12 digits.

    >>> plan_hash({"b": 1, "a": 2}) == plan_hash({"a": 2, "b": 1})
    True
    """
    text = json.dumps(result, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
