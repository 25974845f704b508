"""Give the planner what was found:  python -m runner.claims.findings reports/runs/cpu.jsonl

Writes lora_planner/data/findings.json: each claim with a number, as it was judged from these records.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from calibrate.family import corrected
from lora_planner.facts import DATA
from lora_planner.record import Json, merge, read_events
from runner.claims import lab, study

#: claims whose number a planner's interval has to cover, or an explanation cites
CITED = ("C05", "C06", "C07", "C08", "C09", "C11", "C13", "C16", "C17", "C18", "C19", "C22", "MOE")


def rows(events: list[Json], size: str) -> list[Json]:
    """The cited claims with a number, finite or a lower bound. `base`: the name and the parameters of the model that told."""
    found = []
    runs = list(merge(events).values())
    for entry in corrected(study.entries(events, size, study.family(size, []))):
        effect = entry.verdict.effect
        if entry.id not in CITED or effect is None or not all(map(math.isfinite, (effect.low, effect.value))):
            continue
        bases = {lab.base_name(run.spec.base): run for run in runs if run.key in {r.key for r in entry.runs}}
        found.append({
            "claim": entry.id, "title": entry.title, "status": entry.verdict.status, "said": entry.verdict.sentence,
            "effect": asdict(effect) | ({} if math.isfinite(effect.high) else {"high": None}), "n": entry.verdict.n, "base": ", ".join(sorted(bases)),
        })  # fmt: skip
    return found


def main() -> None:
    source, size = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cpu"
    events, _ = read_events(source)
    document = {"schema": 1, "written_by": "python -m runner.claims.findings", "findings": rows(events, size)}
    (DATA / "findings.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(len(document["findings"]), "findings")


if __name__ == "__main__":
    main()
