"""Records as they are committed:  python -m runner.publish lora-plan-runs/runs.jsonl reports/runs/cpu.jsonl

The same events in the same order, each number to six digits, which is beyond what two machines agree on and a third
of the bytes. Verdicts and scoreboards of this repository are rendered from what was published.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.record import line, read_events

DIGITS = 6


def rounded(value: Any) -> Any:
    """
    >>> rounded({"loss": 3.14159265, "n": 7, "rows": [1e-12 / 3]})
    {'loss': 3.14159, 'n': 7, 'rows': [3.33333e-13]}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


def publish(source: Path, target: Path) -> int:
    """Number of events written. What was measured is rounded; specs, predictions and registrations are hashed or
    promised, and stay to the last digit."""
    if not source.is_file():
        raise BadInput("there is no such journal", source.name, "Name a runs.jsonl.")
    events, skipped = read_events(source)
    for number, why in skipped:
        print(f"left out line {number}: {why}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = "".join(line({**e, "measured": rounded(e["measured"])} if "measured" in e else e) for e in events)
    target.write_text(whole, encoding="ascii")
    return len(events)


if __name__ == "__main__":
    try:
        print(publish(Path(sys.argv[1]), Path(sys.argv[2])), "events")
    except (LoraPlanError, IndexError) as error:
        sys.exit(f"publish: {error}")
