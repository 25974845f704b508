"""Verdicts on several claims judged together: one of twenty tests at 5 % is wrong by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from calibrate.stats import holm
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED, Verdict

#: an adjusted p above it decides nothing
LEVEL = 0.05


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run as a row. `first`, `last`: held-out nats per token before the first and after the last step, or None."""

    key: str
    label: str
    status: str
    first: float | None
    last: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One claim on one size of model, and what became of it.

    title          the module's name in words
    traps          number and text of each way in which such an experiment could mean nothing
    size           "cpu" or "gpu"
    registered     first 12 hex digits of the pre-registration, or "" where there is none
    registration   when it was written, as a sentence
    command        repeats the claim's runs and this verdict
    picture        name of a file beside the page, or ""
    cost_s         processor seconds of its runs
    asked          runs it begins with; 0: arithmetic
    """

    id: str
    title: str
    sentence: str
    source: str
    published: str
    metric: str
    rule: str
    traps: tuple[tuple[int, str], ...]
    size: str
    verdict: Verdict
    registered: str
    registration: str
    runs: tuple[RunSummary, ...]
    command: str
    picture: str
    cost_s: float
    asked: int = 0


def adjusted(entries: Sequence[Entry]) -> dict[int, float]:
    """Position of an entry -> its Holm-adjusted p. The family is every test on the page, whatever it found.

    A claim whose runs have not decided yet counts as p = 1, so that running it later takes no verdict back.
    """
    p_values = {}
    for i, entry in enumerate(entries):
        open_yet = entry.asked and entry.verdict.status in (UNDECIDED, NOT_RUN)
        if entry.verdict.p is not None or open_yet:
            p_values[str(i)] = 1.0 if entry.verdict.p is None else entry.verdict.p
    return {int(i): p for i, (p, _) in holm(p_values, LEVEL).items()} if p_values else {}


def corrected(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The entries, where "holds" or "fails" became "undecided" if its Holm-adjusted p is above 0.05.

    Nothing else changes: what has no p (arithmetic, an order of three) stays, and nothing becomes decided.
    Twice is once.
    """
    found = adjusted(entries)
    reason = f"not significant after the correction for {len(found)} claims"
    return tuple(
        replace(
            e,
            verdict=replace(
                e.verdict, status=UNDECIDED, sentence=f"{reason}; before it, {e.verdict.status}: {e.verdict.sentence}"
            ),
        )
        if e.verdict.status in (HOLDS, FAILS) and found.get(i, 0.0) > LEVEL
        else e
        for i, e in enumerate(entries)
    )
