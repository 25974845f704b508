"""A config's keys and values read with their types, and values written so that every YAML parser agrees on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from lora_planner.errors import BadInput, nearest

KEYS = Path(__file__).parent / "keys"
#: a name this close to a known one is a slip of the finger
TYPO = 0.75


@cache
def known_keys(*names: str) -> frozenset[str]:
    """The documented keys of a tool: the words of keys/NAME.txt.

    >>> "lora_r" in known_keys("trl"), "lora_rank" in known_keys("trl")
    (True, False)
    """
    lines = [line for name in names for line in (KEYS / f"{name}.txt").read_text(encoding="utf-8").splitlines()]
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def likely(key: str, known: Iterable[str]) -> str:
    """The known key that was probably meant; "" where none is close.

    >>> likely("learning_rte", ["learning_rate", "lora_r"]), likely("colour", ["learning_rate"])
    ('learning_rate', '')
    """
    from difflib import SequenceMatcher

    close = nearest(key, known, 1)
    return close[0] if close and SequenceMatcher(None, key, close[0]).ratio() >= TYPO else ""


class Words:
    """A document's values by key. A wrong type is an error that names the place; null is "not set".

    A number in quotes is a number: PyYAML reads `2e-4` as text, and the tools turn it into a number later.
    """

    def __init__(self, document: Mapping[str, Any], where: str, inside: str = "") -> None:
        self.document, self.where, self.inside = document, where, inside

    def place(self, key: str) -> str:
        """A JSON pointer into the file."""
        return f"{self.where}#/{self.inside}{key}"

    def below(self, key: str) -> Words:
        """The mapping under a key."""
        return Words(self.table(key), self.where, f"{self.inside}{key}/")

    def has(self, key: str) -> bool:
        return self.document.get(key) is not None

    def text(self, key: str, default: str = "") -> str:
        value = self.document.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise BadInput(f"expected text, got {shown(value)}", self.place(key), "Put it in quotes.")
        return value

    def number(self, key: str, default: float, low: float = 0.0, high: float = 1e15) -> float:
        value = self.document.get(key)
        if value is None:
            return default
        try:
            found = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            found = None
        if found is None or not isfinite(found):
            raise BadInput(f"expected a number, got {shown(value)}", self.place(key), "Give a number.")
        if not low <= found <= high:
            raise BadInput(f"{found:g} is outside {low:g} to {high:g}", self.place(key), "Correct the number.")
        return found

    def integer(self, key: str, default: int, low: int = 1, high: int = 10**12) -> int:
        found = self.number(key, default, low, high)
        if found != int(found):
            raise BadInput(f"expected a whole number, got {found:g}", self.place(key), "Give a whole number.")
        return int(found)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.document.get(key)
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        if not isinstance(value, bool):
            raise BadInput(f"expected true or false, got {shown(value)}", self.place(key), "Use true or false.")
        return value

    def names(self, key: str, commas: bool = False) -> tuple[str, ...]:
        """A list of names, or one name; `commas`: the tool splits a text at commas."""
        value = self.document.get(key)
        if value is None:
            return ()
        if isinstance(value, str):
            parts = value.split(",") if commas else [value]
            return tuple(part.strip() for part in parts if part.strip())
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise BadInput(f"expected names, got {shown(value)}", self.place(key), "Give a list of module names.")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.document.get(key)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise BadInput(f"expected layer numbers, got {shown(value)}", self.place(key), "Give a list of numbers.")
        return tuple(items)

    def table(self, key: str) -> dict[str, Any]:
        value = self.document.get(key)
        if value is None:
            return {}
        if isinstance(value, str) and value.lstrip().startswith("{"):  # as TRL takes it on a command line
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise BadInput(f"expected keys and values, got {shown(value)}", self.place(key), "Give a mapping.")
        return value

    def flag_in(self, key: str, name: str, default: bool = False) -> bool:
        return self.below(key).flag(name, default)

    def ranks(self, key: str) -> tuple[tuple[str, int], ...]:
        inner = self.below(key)
        return tuple((name, inner.integer(name, 1, 1, 1_000_000)) for name in inner.document)

    def alphas(self, key: str) -> tuple[tuple[str, float], ...]:
        inner = self.below(key)
        return tuple((name, inner.number(name, 1.0, 1e-9, 1e6)) for name in inner.document)


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- writing


def decimal(value: float) -> str:
    """A float without an exponent: YAML 1.1 reads `2e-4` as text, TOML and JSON read `2.e-4` not at all.

    >>> decimal(2.9e-4), decimal(1e-6), decimal(3.0)
    ('0.00029', '0.000001', '3.0')
    """
    text = format(Decimal(repr(float(value))), "f")
    return text if "." in text else text + ".0"


def scalar(value: Any) -> str:
    """One value of a YAML file. Text is always quoted: `no`, `1e3` or `- x` would be read as something else.

    >>> scalar(True), scalar("no"), scalar(["a", "b"]), scalar({"k": 1})
    ('true', '"no"', '["a", "b"]', '{"k": 1}')
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return decimal(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(str(key))}: {scalar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(scalar(item) for item in value) + "]"
    raise TypeError(type(value).__name__)


def _quoted(text: str) -> str:
    r"""Double quotes as YAML has them: escapes are as long as the character needs.

    >>> _quoted('a"b' + chr(10) + chr(0x2028))
    '"a\\"b\\n\\u2028"'
    """
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(
        c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in quoted
    )


def yaml(rows: Mapping[str, Any], header: Sequence[str] = ()) -> str:
    """A flat YAML file. A comment has one line and no break-out: control characters are gone."""
    lines = [f"# {_comment(line)}" for line in header]
    lines += [f"{key}: {scalar(value)}" for key, value in rows.items()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> str:
    return re.sub(r"\s+", " ", "".join(c if c.isprintable() else " " for c in text)).strip()
