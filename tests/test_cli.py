"""The commands as a user types them: what they print, refuse and promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DATA = str(ROOT / "examples/stdlib-docs.jsonl")
H100 = "h100-sxm-80gb"
RECOMMEND = ["recommend", "--model", "qwen3-8b", "--gpu", H100]
ESTIMATE = ["estimate", "--model", "llama-3.1-8b"]


def run(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """A whole process, as from a shell."""
    return subprocess.run(
        [sys.executable, "-m", "lora_planner", *words], capture_output=True, text=True, cwd=cwd, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **env},
    )  # fmt: skip


def result(*words: str) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["schema_version"] == 1
    assert all(set(w) == {"code", "msg", "fix"} for w in document["warnings"])
    return document["result"]


def estimates(value: Any) -> list[dict[str, Any]]:
    """Every object with an interval, wherever it is."""
    if isinstance(value, dict):
        own = [value] if {"low", "value", "high"} <= set(value) else []
        return own + [e for item in value.values() for e in estimates(item)]
    return [e for item in value for e in estimates(item)] if isinstance(value, list) else []


def test_recommend_answers_everything() -> None:
    """The plan for a real data file names what to run, whether it fits, how long and how much."""
    done = run(*RECOMMEND, "--data", DATA)
    assert done.returncode == 0
    assert done.stderr == ""
    for word in (
        "LoRA r",
        "alpha",
        "scale",
        "LR ",
        "batch",
        "peak",
        "tokens/s",
        "$",
        "to learn",
        "runner-up",
        "rejected",
    ):
        assert word in done.stdout, word


def test_recommend_json_has_intervals_and_bases() -> None:
    """Every estimate in the JSON is ordered and says what kind of number it is."""
    document = result(*RECOMMEND, "--data", DATA)
    plan = document["recommended"]
    assert {"params", "flops", "memory", "time", "cost", "learning_rate", "batch", "capacity"} <= set(plan)
    found = estimates(document)
    assert len(found) > 50
    for e in found:
        assert e["low"] <= e["value"] <= e["high"], e
        assert "basis" in e, e


def test_estimate_keeps_its_names() -> None:
    """The names that programs were promised, with values that transformers and the paper give."""
    document = result(*ESTIMATE, "--method", "full", "--gpu", H100, "--micro-batch", "1", "--checkpointing", "full")
    assert document["params"]["total"] == document["params"]["trainable"] == 8_030_261_248
    assert document["flops"]["forward_per_token"] == pytest.approx(16.083e9, rel=1e-3)
    assert document["flops"]["train_per_token"] > document["flops"]["forward_per_token"]
    assert {"low", "value", "high"} <= set(document["memory"]["peak_bytes"])
    assert sum(t["value"] for t in document["memory"]["ledger"]) == pytest.approx(
        document["memory"]["peak_bytes"]["value"]
    )
    assert {"step_s", "tokens_per_s"} <= set(document["time"])
    assert document["cost"]["usd"]["value"] > 0


def test_estimate_without_gpu_has_no_memory_or_time() -> None:
    """What needs a GPU is left out without one."""
    document = result(*ESTIMATE, "--rank", "16")
    assert document["params"]["trainable"] == document["params"]["stored"] == 41_943_040
    assert sum(document["params"]["groups"].values()) == document["params"]["total"]
    assert not {"memory", "time", "cost"} & set(document)


def test_several_models_print_a_line_each() -> None:
    """--model a,b --json is one JSON object a line."""
    done = run("estimate", "--model", "llama-3.1-8b,qwen3-8b", "--json")
    assert [json.loads(line)["result"]["model"]["name"] for line in done.stdout.splitlines()] == [
        "llama-3.1-8b",
        "qwen3-8b",
    ]


def test_batch_prices_every_line_it_can(tmp_path: Path) -> None:
    """A bad line yields an error object in its place; the others are priced; the worst exit code wins."""
    lines = ['{"model": "qwen3-8b", "rank": 8}', "nonsense", '{"model": "nobody"}', '{"model": "qwen3-8b", "rank": "x"}',
             '{"model": "gpt2", "micro-batch": 2, "gpu": "h100-sxm-80gb"}', '{"model": "gpt2", "checkpointing": "half"}',
             '{"typo": 1}', '{"model": "gpt2", "method": ["lora"]}']  # fmt: skip
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(lines))
    done = run("estimate", "--batch", str(file))
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    codes = [p["exit_code"] for p in printed]
    assert codes[0] == codes[4] == 0
    assert all(code in (2, 3) for i, code in enumerate(codes) if i not in (0, 4)), codes
    assert len(codes) == len(lines)
    assert done.returncode == max(codes)
    assert "Traceback" not in done.stderr


BAD = [
    (3, [*RECOMMEND[:2], "nobody", "--gpu", H100, "--tokens", "1M"]),
    (3, [*RECOMMEND[:2], "a/b/../../c", "--gpu", H100, "--tokens", "1M"]),
    (3, ["recommend", "--model", "qwen3-8b", "--gpu", "h100", "--tokens", "1M"]),
    (3, ["recommend", "--model", "qwen3-8b", "--gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "--tokens", "1M"]),
    (3, [*RECOMMEND, "--tokens", "many"]),
    (3, [*RECOMMEND, "--tokens", "0"]),
    (3, [*RECOMMEND, "--data", "no-such-file.jsonl"]),
    (2, [*RECOMMEND]),
    (2, [*RECOMMEND, "--tokens", "1M", "--data", DATA]),
    (2, [*RECOMMEND, "--tokens", "1M", "--rl"]),
    (3, [*RECOMMEND, "--tokens", "1M", "--rl", "--problems", "100", "--group", "1"]),
    (3, [*RECOMMEND, "--tokens", "1M", "--max-length", "10000000"]),
    (3, [*RECOMMEND, "--tokens", "1M", "--epochs", "0"]),
    (3, [*RECOMMEND, "--tokens", "1M", "--first-epoch-loss", "-1"]),
    (4, [*RECOMMEND, "--tokens", "1M", "--budget", "0"]),
    (4, [*RECOMMEND, "--tokens", "1M", "--deadline", "-1"]),
    (3, [*ESTIMATE, "--rank", "0"]),
    (3, [*ESTIMATE, "--alpha", "0"]),
    (3, [*ESTIMATE, "--targets", "q_prok"]),
    (3, [*ESTIMATE, "--gpu", H100, "--seq-len", "0"]),
    (3, [*ESTIMATE, "--gpu", H100, "--micro-batch", "0"]),
    (3, [*ESTIMATE, "--gpu", H100, "--stack", "mine"]),
    (2, ["estimate"]),
    (3, ["explain", "momory", "--model", "qwen3-8b"]),
]


@pytest.mark.parametrize(("code", "words"), BAD, ids=lambda w: "-".join(w[1:])[-50:] if isinstance(w, list) else str(w))
def test_bad_input_is_one_line(code: int, words: list[str], tmp_path: Path) -> None:
    """The exit code, one line with cause and fix, no traceback, nothing written; --json says the same."""
    done = run(*words, "--json", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("lora-plan: ")
    assert done.stderr.count("\n") == 1
    assert json.loads(done.stdout)["exit_code"] == code
    assert not list(tmp_path.iterdir())


def test_nothing_fits_is_a_result() -> None:
    """Exit 4 with the reason, not an exception; a budget alone in the way is exit 5."""
    done = run("recommend", "--model", "deepseek-v3", "--gpu", "t4-16gb", "--tokens", "1M")
    assert done.returncode == 4
    assert "does not fit" in done.stdout
    done = run(
        "recommend",
        "--model",
        "gpt2",
        "--gpu",
        "h200-sxm-141gb",
        "--tokens",
        "20M",
        "--max-length",
        "64",
        "--budget",
        "0.0001",
    )
    assert done.returncode == 5, done.stdout
    assert "over budget" in done.stdout


def test_huge_jobs_do_not_overflow() -> None:
    """10^9 tokens for 10^6 epochs print as infeasible words, never as 1e+21."""
    done = run(*RECOMMEND, "--tokens", "1B", "--epochs", "1000000")
    assert "Traceback" not in done.stderr
    assert "e+" not in done.stdout


@pytest.mark.parametrize("text", ["usd_per_gpu_hour = -1.0", "usd_per_gpu_hour = 0", 'usd_per_gpu_hour = "free"',
                                  'usd_per_gpu_hour = "1,99"'])  # fmt: skip
def test_b11_bad_prices(text: str, tmp_path: Path) -> None:
    """A price that is none is refused with its place."""
    file = tmp_path / "prices.toml"
    file.write_text(
        f'[[price]]\ngpu = "{H100}"\nprovider = "p"\ncommitment = "on-demand"\nsource = "s"\nas_of = 2026-11-01\n{text}\n'
    )
    done = run(*RECOMMEND, "--tokens", "1M", "--prices", str(file))
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


def test_own_prices_win(tmp_path: Path) -> None:
    """A price file replaces all built-in rows of the GPUs it names, and is not stale."""
    file = tmp_path / "prices.toml"
    file.write_text(f'[[price]]\ngpu = "{H100}"\nprovider = "ours"\ncommitment = "on-demand"\nsource = "contract"\n'
                    "as_of = 2026-11-20\nusd_per_gpu_hour = 1.0\n")  # fmt: skip
    document = result(*ESTIMATE, "--gpu", H100, "--tokens", "10M", "--prices", str(file))
    assert [row["provider"] for row in document["cost"]["prices"]] == ["ours"]
    hours = document["time"]["run_s"]["value"] / 3600
    assert document["cost"]["usd"]["value"] == pytest.approx(hours)


def test_b10_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Control characters in a file's name are shown, not sent."""
    evil = tmp_path / "a\x1b[31mb.jsonl"
    evil.write_text(Path(DATA).read_text().split("\n")[0] + "\n")
    done = run(*RECOMMEND, "--data", str(evil))
    assert "\x1b[31mb" not in done.stdout + done.stderr


def test_b16_no_secrets_in_the_output(tmp_path: Path) -> None:
    """A token in the environment and the folder of the data are nobody's business."""
    data = tmp_path / "d.jsonl"
    data.write_text(Path(DATA).read_text())
    done = run(*RECOMMEND, "--data", str(data), "--json", HF_TOKEN="hf_secret_value")
    assert done.returncode == 0
    assert "hf_secret_value" not in done.stdout
    assert str(tmp_path) not in done.stdout


@pytest.mark.parametrize(
    "quantity", ["params", "trainable", "flops", "memory", "time", "cost", "capacity", "learning-rate", "batch"]
)
def test_explain_says_where_each_term_comes_from(quantity: str) -> None:
    """Each term has a value, a basis and a place in the code that exists."""
    for term in result("explain", quantity, "--model", "qwen3-8b")["terms"]:
        assert {"name", "value", "basis", "place"} <= set(term)
        assert (ROOT / term["place"].split(":")[0]).is_file(), term


def test_catalogues_list_names_that_work() -> None:
    """Every listed model and GPU can be planned."""
    models, gpus = result("models"), result("gpus")
    assert len(models) >= 40
    assert {"qwen3-8b", "llama-3.1-8b"} <= {m["name"] for m in models}
    assert H100 in {g["name"] for g in gpus}
    assert run("models").returncode == run("gpus").returncode == 0


@pytest.mark.parametrize("env", [{"COLUMNS": "20"}, {"COLUMNS": "140"}, {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}],
                         ids=["width 20", "width 140", "ascii"])  # fmt: skip
def test_any_terminal(env: dict[str, str]) -> None:
    """Narrow, wide and ASCII terminals all get the plan."""
    done = run(*RECOMMEND, "--data", DATA, **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_plan_needs_no_torch() -> None:
    """The planner loads neither torch, transformers nor numpy."""
    code = ("import sys; from lora_planner import render, recommend; from lora_planner.cli import main; "
            "assert not {'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("block", "words"),
    [(0, [*RECOMMEND, "--data", DATA]), (1, ["explain", "memory", "--model", "qwen3-8b", "--checkpointing", "full"])],
)
def test_the_readme_shows_what_the_command_prints(block: int, words: list[str]) -> None:
    """The README's outputs are those of today's code; only the age of a price may differ."""
    shown = (ROOT / "README.md").read_text().split("```text\n")[block + 1].split("```")[0].rstrip()
    printed = "\n".join(line.rstrip() for line in run(*words, COLUMNS="88").stdout.splitlines()).rstrip()
    wanted, found = (
        [line for line in text.splitlines() if "days" not in line and "prices are stale" not in line]
        for text in (shown, printed)
    )
    assert wanted == found
