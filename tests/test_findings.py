"""What our own runs found reaches the plan: intervals cover it, explanations cite it, values stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_planner import findings, learning_rate
from lora_planner.ledger import Estimate

PUBLISHED = Estimate(4.6, 10.0, 21.7, "ratio", "fitted", "LWR")
ROW = {"claim": "C07", "title": "rate ratio", "status": "fails", "said": "2.3 after 200 steps", "n": 60, "base": "small",
       "effect": {"low": 2.0, "value": 2.3, "high": 2.6, "unit": "ratio", "basis": "fitted", "source": ""}}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data directory whose findings are the test's."""
    monkeypatch.setattr(findings, "DATA", tmp_path)
    findings.findings.cache_clear()
    yield tmp_path / "findings.json"
    findings.findings.cache_clear()


def write(file: Path, **words: object) -> None:
    file.write_text(json.dumps({"schema": 1, "findings": [{**ROW, **words}]}))
    findings.findings.cache_clear()


def test_the_interval_covers_what_was_measured_and_its_value_stays(rows: Path) -> None:
    """A ratio of 2.3 on a small base pulls the lower end down, not the middle, and is named in the source."""
    write(rows)
    wider = findings.covering(PUBLISHED, "C07")
    assert (wider.low, wider.value, wider.high) == (2.3, 10.0, 21.7)
    assert "our claim C07 on small: 2.3 [2, 2.6] ratio, fails" in wider.source


def test_a_lower_bound_is_cited_as_one(rows: Path) -> None:
    """It has no high end, in the file and in the explanation; what was said of it stays."""
    write(rows, claim="C18", effect={**ROW["effect"], "high": None}, said="at least 2.3")
    assert findings.findings()["C18"].effect.high == float("inf")
    [term] = findings.terms("C18")
    assert (term.value, term.low, term.high) == (2.3, None, None)
    assert "at least 2.3" in term.note


def test_without_a_row_nothing_changes(rows: Path) -> None:
    """No file, or no such claim: the published interval as it was."""
    assert findings.covering(PUBLISHED, "C07") == PUBLISHED
    write(rows)
    assert findings.covering(PUBLISHED, "C99") == PUBLISHED
    assert findings.terms("C99") == []


def test_the_planner_covers_and_cites(rows: Path) -> None:
    """The band of the full rate grows upwards as the ratio's grows downwards."""
    before = learning_rate.full_lr(8e9, "llama")
    write(rows)
    after = learning_rate.full_lr(8e9, "llama")
    assert after.value == before.value and after.high > before.high and after.low == pytest.approx(before.low)
    [term] = findings.terms("C07")
    assert (term.value, term.low, term.high) == (2.3, 2.0, 2.6)
    assert "C07 fails, 60 runs on small" in term.note


def test_a_finding_inside_the_published_interval_widens_nothing(rows: Path) -> None:
    """9.8 lies in [4.6, 21.7]."""
    write(rows, effect={**ROW["effect"], "value": 9.8, "low": 9.0, "high": 10.5})  # type: ignore[dict-item]
    assert (findings.covering(PUBLISHED, "C07").low, findings.covering(PUBLISHED, "C07").high) == (4.6, 21.7)


def test_a_short_run_covers_what_ours_had(rows: Path) -> None:
    """The ratio's excess in short runs reaches up to ours and fades with the steps; full's rate may then be lower still,
    its value and upper end stay, and a long run is as before."""
    plain = learning_rate.full_lr(8e9, "llama")
    write(rows, claim="C09", effect={**ROW["effect"], "value": 1.8, "low": 1.6, "high": 2.0})  # type: ignore[dict-item]
    assert (learning_rate.short_ratio(0).value, learning_rate.short_ratio(0).high) == (1.5, 1.8)
    assert learning_rate.short_ratio(100).high == pytest.approx(1 + 0.8 / 2.718281828)
    short, long = (learning_rate.full_lr(8e9, "llama", steps=steps) for steps in (30, 10_000))
    assert short.low < plain.low and (short.value, short.high) == (plain.value, plain.high)
    assert "claim C09" in short.source and "C09" not in long.source
    assert long.low == pytest.approx(plain.low)
