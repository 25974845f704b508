"""Strict reading of one `config.json` object: every access says what it expects and where.

A missing key means what transformers makes of it: the class default that the family file states.
Those are remembered in `defaulted`, so that a user can see what was not in the file.
"""

from __future__ import annotations

from typing import Any

from lora_planner.errors import BadInput

REQUIRED: Any = object()


class Config:
    """A dict with a JSON pointer, whose values are checked when they are read."""

    def __init__(self, values: dict[str, Any], where: str = "config.json", pointer: str = "") -> None:
        self.values, self.where, self.pointer = values, where, pointer
        self.defaulted: list[str] = []

    def _bad(self, key: str, expected: str) -> BadInput:
        got = self.values.get(key)
        text = repr(got)
        shown = text if len(text) < 40 else text[:37] + "..."
        return BadInput(
            f"{key}: expected {expected}, got {shown}",
            f"{self.where}#{self.pointer}/{key}",
            "Correct the value; the planner does not guess.",
        )

    def _get(self, key: str, default: Any, aliases: tuple[str, ...]) -> Any:
        for name in (key, *aliases):
            if name in self.values:
                return self.values[name]
        if default is REQUIRED:
            raise BadInput(
                f"{key} is missing",
                f"{self.where}#{self.pointer}",
                "Add it, or use the model's own config.json.",
            )
        self.defaulted.append(key)
        return default

    def size(self, key: str, default: Any = REQUIRED, *aliases: str, low: int = 1, high: int = 2**31) -> int:
        """A whole number in low..high. `null` counts as missing where there is a default."""
        key = next((name for name in (key, *aliases) if name in self.values), key)  # what errors name
        value = self._get(key, default, ())
        if value is None and default is not REQUIRED:
            value = default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._bad(key, f"a whole number {low}..{high}")
        if not low <= value <= high:
            raise self._bad(key, f"{low}..{high}")
        return value

    def optional_size(self, key: str, default: int | None = None, low: int = 1) -> int | None:
        """A whole number, or null (which is a meaning of its own: MLA without q_lora_rank)."""
        if key in self.values and self.values[key] is None:
            return None
        if key not in self.values and default is None:
            return None
        return self.size(key, default, low=low)

    def number(self, key: str, default: float) -> float:
        value = self._get(key, default, ())
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._bad(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool, *aliases: str) -> bool:
        value = self._get(key, default, aliases)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(key, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        value = self._get(key, default, ())
        if not isinstance(value, str):
            raise self._bad(key, "text")
        return value

    def items(self, key: str, default: list[Any] | None = None) -> list[Any] | None:
        """A list, or the default where the key is missing or null."""
        value = self._get(key, default, ())
        if value is not None and not isinstance(value, list):
            raise self._bad(key, "a list")
        return value if value is not None else default

    def sub(self, key: str) -> Config:
        """A nested object; an empty one where it is missing (then every default applies)."""
        value = self._get(key, {}, ())
        if not isinstance(value, dict):
            raise self._bad(key, "an object")
        inner = Config(value, self.where, f"{self.pointer}/{key}")
        inner.defaulted = self.defaulted
        return inner

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def reject(self, key: str, expected: str) -> BadInput:
        """The error to raise when a value contradicts another one."""
        return self._bad(key, expected)
