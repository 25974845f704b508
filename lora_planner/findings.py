"""What our own runs said about the paper's findings: rows that intervals have to cover and `explain` cites.

`python -m runner.claims.findings RUNS.jsonl` writes data/findings.json from committed records; reports/verification.md
has the runs behind each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import inf, isinf

from lora_planner.facts import DATA
from lora_planner.ledger import FITTED, Estimate, Term


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict with its number. `effect` has the 95 % interval over seeds, of one small base: no model that a user
    trains has been in it."""

    claim: str
    title: str
    status: str
    said: str
    effect: Estimate
    n: int
    base: str

    @property
    def cited(self) -> str:
        """How a source line names it."""
        e = self.effect
        return (
            f"our claim {self.claim} on {self.base}: {e.value:.3g} [{e.low:.3g}, {e.high:.3g}] {e.unit}, {self.status}"
        )


@cache
def findings() -> Mapping[str, Finding]:
    """Every row by its claim; none where the file is not there."""
    file = DATA / "findings.json"
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))["findings"]
    # JSON has no infinity: a lower bound has no high end there
    return {row["claim"]: Finding(**{**row, "effect": Estimate(**{**e, "high": inf if e["high"] is None else e["high"]})})
            for row in rows for e in (row["effect"],)}  # fmt: skip


def covering(published: Estimate, claim: str) -> Estimate:
    """The published interval, as wide as our own measurement asks; its value stays that of models of a real size.

    >>> covering(Estimate(4.0, 10.0, 20.0, "ratio", "fitted", "LWR"), "no such claim").low
    4.0
    """
    ours = findings().get(claim)
    if ours is None:
        return published
    return replace(
        published,
        low=min(published.low, ours.effect.value),
        high=max(published.high, ours.effect.value),
        source=f"{published.source}; {ours.cited}",
    )


def terms(*claims: str) -> list[Term]:
    """A line of an explanation for each of these claims that has a row."""
    found = []
    for claim in claims:
        if f := findings().get(claim):
            low, high = (None, None) if isinf(f.effect.high) else (f.effect.low, f.effect.high)
            note = f"{claim} {f.status}, {f.n} runs on {f.base}: {f.said}; reports/verification.md"
            found.append(Term(f"our own runs: {f.title}", f.effect.value, FITTED, "findings.findings", low, high, note))
    return found
