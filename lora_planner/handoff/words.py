"""The keys that tools know, and values written so that every YAML parser agrees on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from lora_planner.checked import Node
from lora_planner.errors import nearest

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


def ranks(node: Node) -> tuple[tuple[str, int], ...]:
    """peft's rank_pattern."""
    return tuple((name, value.integer(1, 1_000_000)) for name, value in node.table().items())


def alphas(node: Node) -> tuple[tuple[str, float], ...]:
    """peft's alpha_pattern."""
    return tuple((name, value.number(1e-9, 1e6)) for name, value in node.table().items())


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
