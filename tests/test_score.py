"""`lora-plan score`: a stranger's table in, errors out; never a traceback."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calibrate.track import TABLES
from lora_planner.cli import main


def score(*words: str) -> Result:
    return CliRunner().invoke(main, ["score", *words])


def table(tmp_path: Path, **words: str) -> Path:
    """The header of measured runs, and one row: a shipped one with some cells replaced."""
    with (TABLES / "measured.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"].startswith("fitcheck") and row["peak_mem_GiB"]]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerow({**rows[0], **words})
    return path


def test_a_row_is_predicted_and_its_error_told(tmp_path: Path) -> None:
    """The JSON has the case, its prediction inside its interval, and the error as their ratio less one."""
    done = score("--rows", str(table(tmp_path)), "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)["result"]["peak memory"]
    [case] = found["cases"]
    assert case["low"] <= case["predicted"] <= case["high"]
    assert case["error"] == pytest.approx(case["predicted"] / case["measured"] - 1)
    assert found["all"]["n"] == 1 and found["all"]["median"] == pytest.approx(abs(case["error"]))


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    """A model of no known shape has no number, and a reason that names it."""
    done = score("--rows", str(table(tmp_path, model="Totally-New-13B")))
    assert done.exit_code == 0
    assert "no prediction" in done.stdout and "Totally-New-13B" in done.stdout


def test_cells_of_strangers_calculate_nothing(tmp_path: Path) -> None:
    """Model, GPU and every other word of a row are text in the file that is written."""
    out = tmp_path / "cases.csv"
    done = score("--rows", str(table(tmp_path, model="=1+1", gpu="@SUM(A1)", method="-2")), "--cases", str(out))
    assert done.exit_code == 0
    with out.open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert any("1+1" in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "@")) or (cell.startswith("-") and not _number(cell))]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "model\n", "\x00\xff"])
def test_another_table_is_one_line(tmp_path: Path, text: str) -> None:
    """Exit 3, one line that names the file, whatever it holds; so is a file that is not there."""
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode("latin-1"))
    for name in (path, tmp_path / "none.csv", tmp_path):
        done = score("--rows", str(name))
        assert done.exit_code == 3
        assert len(done.stderr.splitlines()) == 1 and name.name in done.stderr


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.csv")), ids=lambda path: path.name)
def test_every_shipped_table_is_recognised(path: Path) -> None:
    """And each of its quantities has cases, with a prediction or a reason."""
    done = score("--rows", str(path), "--json")
    assert done.exit_code == 0
    for some in json.loads(done.stdout)["result"].values():
        assert all(case["predicted"] is not None or case["reason"] for case in some["cases"])
