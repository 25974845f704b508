"""Pre-registration: what a claim says, measures and decides by is hashed into the journal before its first run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from lora_planner.record import Json, RunRecord, canonical
from runner.claims import lab

#: whose text decides a verdict besides the claim's own file: a change there is a change of the analysis
ANALYSIS = (
    "runner/claims/lab.py",
    "runner/claims/shared.py",
    "calibrate/stats.py",
    "calibrate/curves.py",
    "calibrate/family.py",
)
ROOT = Path(__file__).parents[2]


def document(claim: str, module: ModuleType, size: str) -> Json:
    """Hypothesis, metric, rule with its margins, the designs to begin with, seeds, and the hash of the analysis.

    Grids may grow by the rule of `lab.grid`, which is part of the hashed analysis; nothing else may be added.
    """
    designs = module.specs(lab.SIZES[size], [])
    return {
        "claim": claim,
        "size": size,
        "hypothesis": module.SENTENCE,
        "metric": module.METRIC,
        "rule": module.RULE,
        "seeds": sorted({design.seed for design in designs}),
        "designs": sorted(design.key for design in designs),
        "rates": sorted({design.lr for design in designs}),
        "analysis": {name: _sha256(ROOT / name) for name in (*ANALYSIS, *_files(module))},
    }


def digest(registered: Json) -> str:
    """sha256 of a document; its first 12 digits are shown."""
    return hashlib.sha256(canonical(registered).encode()).hexdigest()


def _files(module: ModuleType) -> list[str]:
    """The claim's own file and those of the claims that it builds on."""
    others = [m.__name__ for m in vars(module).values() if isinstance(m, ModuleType)]
    mine = [name for name in others if name.startswith("runner.claims.")]
    return sorted(f"{name.replace('.', '/')}.py" for name in {module.__name__, *mine})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def history(events: Sequence[Json], claim: str, size: str) -> list[tuple[int, Json]]:
    """(place in the journal, document) of every registration of this claim at this size."""
    return [
        (place, event["document"])
        for place, event in enumerate(events)
        if event["event"] == "registered" and (event["document"]["claim"], event["document"]["size"]) == (claim, size)
    ]


def standing(events: Sequence[Json], claim: str, module: ModuleType, size: str,
             used: Sequence[RunRecord]) -> tuple[str, str]:  # fmt: skip
    """(hash, sentence): whether the analysis that decides now is one that was registered before these runs started.

    A registration after runs had started is allowed and said: the verdict is then exploratory in so far.
    """
    found = history(events, claim, size)
    if not found:
        return "", "not registered"
    asked = document(claim, module, size)
    places = [place for place, registered in found if registered == asked]
    first = digest(found[-1][1])[:12]
    if not places:
        return first, "registered with another analysis than the one that decides here: exploratory"
    keys = {run.key for run in used}
    early = {e["key"] for e in events[: places[0]] if e["event"] == "started" and e["key"] in keys}
    if not early:
        return digest(asked)[:12], "registered before the first of its runs started"
    return digest(asked)[
        :12
    ], f"registered after {len(early)} of its {len(keys)} runs had started: exploratory in so far"
