"""What is committed under reports/ is what the records say today: rendered again, byte for byte."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from calibrate.score import scoreboard, scores
from lora_planner.record import line, merge, read_events, read_runs
from runner.publish import publish

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "reports/runs"
NUMBER = r"(\d[\d,]*(?:\.\d+)?)"


def rendered(tmp_path: Path, *words: str) -> str:
    page = tmp_path / "page.md"
    done = subprocess.run([sys.executable, "-m", "lora_planner", "report", *words, "--to", str(page)],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return page.read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in RUNS.glob("*.jsonl")))
def test_no_record_is_damaged_or_names_a_place(name: str) -> None:
    """Every line has its checksum, and no line a path or a host."""
    _, skipped = read_events(RUNS / name)
    assert not skipped
    text = (RUNS / name).read_text()
    assert not re.search(r'"(/\w+/|[A-Z]:\\|~/)', text), "a path at the beginning of a word"
    assert not re.search(r"https?://|Users", text)


def test_the_page_of_own_runs_is_that_of_the_records(tmp_path: Path) -> None:
    """A change of a formula that moves a score, or of the page, shows in the diff."""
    assert rendered(tmp_path, "reports/runs/verify-cpu.jsonl") == (ROOT / "reports/own-runs.md").read_text()


def test_the_track_record_is_that_of_the_tables(tmp_path: Path) -> None:
    """A change in any prediction of a public measurement shows in the diff of the scoreboard. Another processor's fits
    differ in digits that rounding may bring up: one unit of the last digit shown is no difference."""
    now, then = (re.split(NUMBER, page) for page in (rendered(tmp_path), (ROOT / "reports/scoreboard.md").read_text()))
    assert now[::2] == then[::2]
    for one, other in zip(now[1::2], then[1::2], strict=True):
        unit = 10.0 ** -len(one.partition(".")[2]) if "." in one else 0.0
        assert abs(float(one.replace(",", "")) - float(other.replace(",", ""))) <= 1.001 * unit, (one, other)


def test_publishing_rounds_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    """Keys, specs, predictions and the order of events stay; a damaged line is left out and said; scores hardly move."""
    source = RUNS / "verify-cpu.jsonl"
    events, _ = read_events(source)
    ended = next(e for e in events if e["event"] == "ended")
    ended["measured"]["step_s"] = [value * 1.000000123 for value in ended["measured"]["step_s"]]
    raw = tmp_path / "runs.jsonl"
    raw.write_text("".join(line(e) for e in events) + '{"event": "ended", "torn')
    assert publish(raw, tmp_path / "deep/published.jsonl") == len(events)
    after, skipped = read_events(tmp_path / "deep/published.jsonl")
    assert not skipped
    assert [(e["event"], e["key"]) for e in after] == [(e["event"], e["key"]) for e in events]
    assert [e for e in after if e["event"] == "planned"] == [e for e in events if e["event"] == "planned"]
    before, then = (scores(merge(some).values()) for some in (events, after))
    assert [s.measured for s in then] == pytest.approx([s.measured for s in before], rel=1e-5)
    written = next(e for e in after if e["event"] == "ended")["measured"]["step_s"]
    assert written == [float(f"{value:.6g}") for value in ended["measured"]["step_s"]]


def test_the_scoreboard_needs_the_records_alone() -> None:
    """The same runs in another order give the same page."""
    runs = read_runs(RUNS / "verify-cpu.jsonl")
    assert scoreboard(scores(runs), runs) == scoreboard(scores(runs[::-1]), runs[::-1])


def test_the_verdicts_are_those_of_the_records(tmp_path: Path) -> None:
    """From the claims that need runs on: arithmetic is done again here, and its last digits are the processor's."""
    first = '<a id="c05-cpu">'
    page = rendered(tmp_path, "reports/runs/cpu.jsonl", "--claims").partition(first)[2]
    assert page == (ROOT / "reports/verification.md").read_text().partition(first)[2]
    assert page.count("<details>") == page.count("</details>") > 0
