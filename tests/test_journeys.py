"""What the pages show is what the commands print today: the journeys run as a new user would run them."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import journeys  # noqa: E402


def said(text: str) -> str:
    """Words and numbers alone: a line breaks elsewhere when an age has a digit more. Ages and today's date are left out."""
    text = re.sub(r"\d+ days", "N days", text)
    text = re.sub(r"^((?:Budget|Compare):.*?)\d{4}-\d\d-\d\d", r"\1 DATE", text, flags=re.MULTILINE)
    return " ".join(text.split())


@pytest.mark.parametrize("page", journeys.PAGES, ids=lambda page: page.name)
def test_every_command_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    """Each journey, in its order, with files of the one before; exit codes included."""
    environment = journeys.prepare(tmp_path)
    blocks = list(journeys.BLOCK.finditer(page.read_text(encoding="utf-8")))
    assert blocks
    for block in blocks:
        printed = journeys.run(block["command"], tmp_path, environment)
        assert said(printed) == said(block["output"]), block["command"]
        assert str(tmp_path) not in printed


def test_the_pages_hold_every_journey() -> None:
    """Practitioner, RL, lead, sceptic, a run that lags, finance, CI."""
    text = (ROOT / "examples" / "journeys.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (J\d)", text, re.MULTILINE) == ["J1", "J2", "J3", "J4", "J5", "J7", "J8"]


def test_the_readme_shows_what_verify_says_of_the_committed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of `verify` in the README is what its code says today of the runs in reports/runs, which trained for minutes."""
    pytest.importorskip("scipy")
    from calibrate.score import scores
    from calibrate.verdict import arms, verdicts
    from lora_planner import render
    from lora_planner.facts import gpu
    from lora_planner.predict import PROBE
    from lora_planner.record import read_runs

    recorded = read_runs(ROOT / "reports" / "runs" / "verify-cpu.jsonl")
    runs = [run for run in recorded if run.spec.task != PROBE and run.spec.steps == 60]  # the others are of `calibrate`
    device = replace(gpu("h100-sxm-80gb"), name="cpu-intel-xeon-1t")
    monkeypatch.setenv("COLUMNS", "80")
    printed = io.StringIO()
    with redirect_stdout(printed):
        render.show_verification(device, runs[0].spec.base, arms(runs), verdicts(runs, scores(runs)), "lora-plan-runs")
    [shown] = [
        b for b in (ROOT / "README.md").read_text(encoding="utf-8").split("```text\n") if b.startswith("base qwen3-1m")
    ]
    assert said(printed.getvalue()) == said(shown.split("```")[0])
