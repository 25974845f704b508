"""The four words, and what stands behind one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_planner.ledger import Estimate

LIKELY, POSSIBLE, UNLIKELY, CANNOT_TELL = "LIKELY", "POSSIBLE", "UNLIKELY", "CANNOT TELL"
WORDS = (LIKELY, POSSIBLE, UNLIKELY, CANNOT_TELL)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observation. `weight`: 2 it shows the cause, 1 it fits, 0 context, -1 it speaks against, -2 it excludes.

    `value`: the number in it with its 90 % interval. `source`: what the reading of it rests on.
    """

    weight: int
    text: str
    value: Estimate | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is said of one cause. `detail`: which way, such as "too low". `fix`: the change it asks for."""

    cause: str
    word: str
    detail: str
    evidence: tuple[Evidence, ...]
    fix: str = ""


def word(evidence: Iterable[Evidence]) -> str:
    """LIKELY needs an observation that shows the cause and none that excludes it; POSSIBLE, more for than against.

    >>> word([Evidence(2, ""), Evidence(-1, "")]), word([Evidence(1, "")]), word([Evidence(2, ""), Evidence(-2, "")])
    ('LIKELY', 'POSSIBLE', 'POSSIBLE')
    >>> word([Evidence(-1, "")]), word([Evidence(1, ""), Evidence(-1, "")]), word([Evidence(0, "")])
    ('UNLIKELY', 'POSSIBLE', 'CANNOT TELL')
    """
    weights = [e.weight for e in evidence if e.weight]
    if not weights:
        return CANNOT_TELL
    if max(weights) == 2:
        return LIKELY if min(weights) > -2 else POSSIBLE
    return POSSIBLE if max(weights) > 0 and sum(weights) >= 0 else UNLIKELY


def strength(evidence: Iterable[Evidence]) -> int:
    """For ranking causes of one word: the sum of the weights."""
    return sum(e.weight for e in evidence)
