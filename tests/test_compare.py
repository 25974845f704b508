"""Models x GPUs x methods: which cells are out and why, which are ties, which nothing beats."""

from __future__ import annotations

import csv
import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_planner.cli import Commands, main
from lora_planner.commands.compare import compare as command
from lora_planner.compare import Cell, Comparison, dominates, overlap, places, rank
from lora_planner.ledger import Estimate
from lora_planner.pages.charts import Dot, Line, svg
from lora_planner.pages.compare_report import plot

H100, L40S, G4090, T4 = "h100-sxm-80gb", "l40s-48gb", "rtx4090-24gb", "t4-16gb"
GPUS = f"{H100},{L40S},{G4090}"


def cell(name: str, usd: tuple[float, float, float], hours: tuple[float, float, float], code: str = "") -> Cell:
    """A cell of which only cost and time matter."""
    money = Estimate(*usd, "USD", "fitted")
    time = Estimate(*(h * 3600 for h in hours), "s", "fitted")
    return Cell(name, "g", "lora", code, priced=SimpleNamespace(cost=SimpleNamespace(usd=money), run_s=time))  # type: ignore[arg-type]


def around(x: float) -> tuple[float, float, float]:
    return x * 0.9, x, x * 1.1


# ---------------------------------------------------------------- order


def test_places_by_hand() -> None:
    """1-3 and 2-4 are a tie; 3.5-6 overlaps the second but not the first, so it starts a place of its own."""
    e = [Estimate(a, (a + b) / 2, b, "USD", "fitted") for a, b in ((1, 3), (2, 4), (3.5, 6), (5, 7), (20, 30))]
    assert places(e) == [1, 1, 3, 3, 5]


def test_the_front_by_hand() -> None:
    """Cheap and slow, dear and fast are both best; dear and slow is beaten; nearly as good is a tie."""
    ranked = rank([cell("dear-fast", around(10), around(1)), cell("cheap-slow", around(1), around(10)),
                   cell("dear-slow", around(20), around(20)), cell("nearly", around(1.05), around(10.5))])  # fmt: skip
    found = {r.cell.model: (r.place, r.tied, r.standing, r.by.model if r.by else "") for r in ranked}
    assert found == {
        "cheap-slow": (1, True, "best", ""),
        "nearly": (1, True, "tie", "cheap-slow"),
        "dear-fast": (3, False, "best", ""),
        "dear-slow": (4, False, "beaten", "cheap-slow"),
    }
    assert all(r.of_model == "best" for r in ranked)  # each model has one cell


def test_rank_is_by_the_p90() -> None:
    """The surer of two equal middles comes first."""
    ranked = rank([cell("unsure", (1, 10, 100), around(1)), cell("sure", around(10), around(1))])
    assert [r.cell.model for r in ranked] == ["sure", "unsure"]


numbers = st.tuples(st.floats(0.1, 100), st.floats(1, 3), st.floats(0.1, 100), st.floats(1, 3))


@given(st.lists(numbers, min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_front_is_a_pareto_set(rows: list[tuple[float, float, float, float]]) -> None:
    """Nothing beats a best cell; everything else has one that does, and that one is itself not worse in both."""
    cells = [cell(str(i), (u / f, u, u * f), (t / g, t, t * g)) for i, (u, f, t, g) in enumerate(rows)]
    ranked = rank(cells)
    assert sorted(r.cell.model for r in ranked) == sorted(c.model for c in cells)
    assert any(r.standing == "best" for r in ranked)
    assert [r.cell.usd_p90 for r in ranked] == sorted(r.cell.usd_p90 for r in ranked)
    for r in ranked:
        if r.standing == "best":
            assert not any(dominates(c, r.cell) for c in cells)
        else:
            assert r.by
            assert dominates(r.by, r.cell)
        if r.standing == "beaten":
            assert r.by
            assert not overlap(r.by.usd, r.cell.usd)
            assert not overlap(r.by.time, r.cell.time)


@given(st.lists(numbers, min_size=1, max_size=12), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_of_input_changes_nothing(rows: list[tuple[float, float, float, float]], random: Any) -> None:
    """A permutation of the cells gives the same table."""
    cells = [cell(str(i), (u / f, u, u * f), (t / g, t, t * g)) for i, (u, f, t, g) in enumerate(rows)]
    other = list(cells)
    random.shuffle(other)
    assert [(r.cell.model, r.place, r.standing) for r in rank(cells)] == [
        (r.cell.model, r.place, r.standing) for r in rank(other)
    ]


def test_exit_codes() -> None:
    """0 where something runs, 5 where only money is missing, 4 where nothing fits or is in time."""
    ready, dear, big, late = (Cell("m", "g", "lora", code) for code in ("", "OVERBUDGET", "NOFIT", "LATE"))
    assert Comparison(rank([cell("m", around(1), around(1))]), [dear]).exit_code == 0
    assert Comparison([], [dear, big, late]).exit_code == 5
    assert Comparison([], [big, late]).exit_code == 4
    assert ready.code == ""


def test_the_plot_shows_the_front_and_the_late() -> None:
    """A filled dot a cell that can be run, a hollow one for what is late; the front is one line of steps."""
    ranked = rank(
        [cell("a", around(10), around(1)), cell("b", around(1), around(10)), cell("c", around(20), around(20))]
    )
    for r in ranked:
        r.cell.priced.configuration = SimpleNamespace(method=SimpleNamespace(is_full=True))  # type: ignore[union-attr]
    late = cell("d", around(2), around(30), "LATE")
    late.priced.configuration = ranked[0].cell.priced.configuration  # type: ignore[union-attr]
    drawing = plot(Comparison(ranked, [late]), 15.0, 25 * 3600.0)
    assert drawing
    dots = [s for s in drawing.shapes if isinstance(s, Dot)]
    assert [d.hollow for d in dots] == [False, False, False, True]
    # time grows to the right, cost upwards
    by_name = {d.title.split(",")[0]: d for d in dots}
    assert by_name["a"].x < by_name["b"].x < by_name["c"].x
    assert by_name["c"].y < by_name["a"].y < by_name["b"].y
    steps = [s for s in drawing.shapes if isinstance(s, Line) and s.ink == "ink"]
    assert len(steps) == 1
    assert svg(drawing).count("stroke-dasharray") == 2  # the budget and the deadline


# ---------------------------------------------------------------- the command


def run(*words: str) -> Result:
    """The command in a group as the real one is, errors and exit codes included."""
    group = Commands("lora-plan")
    group.add_command(command)
    return CliRunner().invoke(group, ["compare", *words])


def test_cells_agree_with_recommend() -> None:
    """Where recommend chooses a plan, that plan stands in its cell, with the same cost, time and peak."""
    words = ["--model", "qwen3-8b", "--tokens", "10M"]
    chosen = json.loads(CliRunner().invoke(main, ["recommend", *words, "--gpu", L40S, "--json"]).stdout)["result"][
        "recommended"
    ]
    found = json.loads(run(*words, "--gpu", GPUS, "--json").stdout)["result"]
    same = [c for c in found["ranked"] if c["gpu"] == L40S and c["method"] == chosen["method"]["name"]]
    assert len(same) == 1
    assert same[0]["usd_p50"] == chosen["cost"]["usd"]["value"]
    assert same[0]["run_s_p50"] == chosen["time"]["run_s"]["value"]
    assert same[0]["peak_bytes_p50"] == chosen["memory"]["peak_bytes"]["value"]
    assert same[0]["rank"] == chosen["method"]["rank"]


def test_every_cell_is_somewhere(tmp_path: Path) -> None:
    """2 models x 3 GPUs x 3 methods are 18 lines; each that is out has a code and a reason."""
    path = tmp_path / "cells.csv"
    done = run(
        "--model",
        "qwen3-8b,qwen3-0.6b",
        "--gpu",
        GPUS,
        "--tokens",
        "10M",
        "--budget",
        "2",
        "--deadline",
        "1",
        "--csv",
        str(path),
    )
    assert done.exit_code == 0
    rows = list(csv.DictReader(path.open(newline="")))
    assert len({(r["model"], r["gpu"], r["method"]) for r in rows}) == len(rows) == 18
    assert {r["status"] for r in rows} == {"OK", "NOFIT", "LATE"}
    for r in rows:
        assert bool(r["reason"]) == (r["status"] != "OK")
        if r["status"] == "OK":
            assert float(r["usd_p50"]) <= 2
            assert float(r["run_s_p50"]) <= 3600
            assert float(r["p_fit"]) >= 0.95
            assert float(r["usd_p05"]) <= float(r["usd_p50"]) <= float(r["usd_p90"]) <= float(r["usd_p95"])
        elif r["status"] == "LATE":
            assert float(r["run_s_p50"]) > 3600
        else:
            assert float(r["p_fit"]) < 0.95


def test_a_larger_budget_never_loses_a_cell() -> None:
    """What can be run for 1 dollar can be run for 3; every cell over the smaller one says OVERBUDGET."""
    words = ["--model", "qwen3-8b", "--gpu", GPUS, "--tokens", "10M", "--json"]
    small, large, none = (
        json.loads(run(*words, *more).stdout)["result"] for more in (("--budget", "1.3"), ("--budget", "3"), ())
    )
    names = [{(c["gpu"], c["method"]) for c in found["ranked"]} for found in (small, large, none)]
    assert names[0] <= names[1] <= names[2]
    assert names[0] < names[2]
    dear = {(c["gpu"], c["method"]) for c in small["out"] if c["status"] == "OVERBUDGET"}
    assert dear == names[2] - names[0]


def test_nothing_inside_the_budget_is_five_and_nothing_fits_is_four() -> None:
    """Ten cents pay for no run of 10M tokens; a 70B model fits no T4."""
    dear = run("--model", "qwen3-8b", "--gpu", H100, "--tokens", "10M", "--budget", "0.1")
    assert dear.exit_code == 5
    assert "OVERBUDGET" in dear.stdout
    big = run("--model", "llama-3.1-70b", "--gpu", T4, "--tokens", "10M")
    assert big.exit_code == 4
    assert "NOFIT" in big.stdout


def test_a_list_of_models(tmp_path: Path) -> None:
    """Comments, empty lines and repetitions are no models."""
    path = tmp_path / "m.txt"
    path.write_text("# ours\nqwen3-0.6b\n\nqwen3-8b  # large\nqwen3-0.6b\n")
    found = json.loads(run("--models", str(path), "--gpu", H100, "--tokens", "1M", "--json").stdout)["result"]
    assert {c["model"] for c in [*found["ranked"], *found["out"]]} == {"qwen3-0.6b", "qwen3-8b"}
    assert found["cells"] == 6


def test_an_unknown_architecture_is_a_cell_not_the_end(tmp_path: Path) -> None:
    """One model that we cannot read leaves the others compared; a name that is nothing ends with exit 3."""
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps({"model_type": "perceiver9", "hidden_size": 64}))
    done = run("--model", f"{odd},qwen3-0.6b", "--gpu", H100, "--tokens", "1M", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["result"]
    assert {c["status"] for c in found["out"] if c["model"] == str(odd)} == {"UNSUPPORTED"}
    assert {c["model"] for c in found["ranked"]} == {"qwen3-0.6b"}
    wrong = run("--model", "qwen3-8b,qwen3-8bb", "--gpu", H100, "--tokens", "1M", "--offline")
    assert wrong.exit_code == 3
    assert len(wrong.stderr.splitlines()) == 1


def test_a_gpu_without_a_price_is_unsupported() -> None:
    """No price, no place in a ranking by cost; the fix is named."""
    done = run("--model", "qwen3-0.6b", "--gpu", f"h200-nvl-141gb,{H100}", "--tokens", "1M", "--json")
    out = [c for c in json.loads(done.stdout)["result"]["out"] if c["gpu"] == "h200-nvl-141gb"]
    assert out
    assert all(c["status"] == "UNSUPPORTED" and "--prices" in c["reason"] for c in out)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--gpu", H100, "--tokens", "1M"], 2),
        (["--model", "qwen3-8b", "--gpu", H100], 2),
        (["--model", "qwen3-8b", "--tokens", "1M"], 2),
        (["--model", "qwen3-8b", "--gpu", "h100", "--tokens", "1M"], 3),
        (["--model", "qwen3-8b", "--gpu", H100, "--tokens", "1M", "--methods", "lora,magic"], 3),
        (["--model", "qwen3-8b", "--gpu", H100, "--tokens", "1M", "--methods", ","], 3),
        (["--model", "qwen3-8b", "--gpu", H100, "--tokens", "1M", "--plot", "x.pdf"], 2),
        (["--model", "qwen3-8b", "--gpu", H100, "--tokens", "1M", "--budget", "0"], 4),
        (["--model", "qwen3-8b", "--gpu", H100, "--tokens", "1M", "--deadline", "-1"], 4),
        (["--model", "qwen3-8b", "--gpu", H100, "--tokens", "1M", "--budget", "nan"], 4),
        (["--models", "/no/such/list", "--gpu", H100, "--tokens", "1M"], 3),
        (["--models", "/dev", "--gpu", H100, "--tokens", "1M"], 3),
        (["--model", ",".join(f"m{i}" for i in range(101)), "--gpu", H100, "--tokens", "1M"], 3),
    ],
)
def test_bad_words(words: list[str], code: int) -> None:
    """Each wrong word ends with its exit code and a reason, never a traceback."""
    done = run(*words)
    assert done.exit_code == code, done.output
    assert not isinstance(done.exception, Exception) or isinstance(done.exception, SystemExit)
    assert done.stderr.strip()


def test_outputs_agree(tmp_path: Path) -> None:
    """Table, page, Markdown and both plots come from the same cells."""
    files = {kind: tmp_path / f"c.{kind}" for kind in ("html", "md", "svg", "png")}
    done = run("--model", "qwen3-8b", "--gpu", f"{H100},{L40S}", "--tokens", "10M", "--html", str(files["html"]), "--markdown", str(files["md"]),
               "--plot", str(files["svg"]))  # fmt: skip
    assert done.exit_code == 0
    assert f"Compare: 1 model x 2 GPUs x 3 methods  {date.today()}" in done.stdout
    assert "Pareto set" in done.stdout
    for kind in ("html", "md"):
        assert "QLoRA r32, all-linear" in files[kind].read_text()
    assert files["svg"].read_text().startswith("<svg xmlns=")
    pytest.importorskip("matplotlib")
    assert run("--model", "qwen3-8b", "--gpu", L40S, "--tokens", "10M", "--plot", str(files["png"])).exit_code == 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_help_shows_an_example_and_fits() -> None:
    """One screen, with a line to copy."""
    done = run("--help")
    assert "lora-plan compare --model qwen3-8b,llama-3.1-8b" in done.stdout
    assert len(done.stdout.splitlines()) <= 50
