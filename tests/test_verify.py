"""`verify`, killed and resumed, then `calibrate`, then a plan: what a user types on a machine without GPU or network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_planner.record import DIVERGED, FINISHED, RunRecord, RunSpec, read_runs
from runner.verify import GRID, beyond

ROOT = Path(__file__).parents[1]
SMALL = ["--base", "tiny", "--ranks", "2", "--steps", "6", "--rates", "2"]
MODEL = ["--model", "qwen3-0.6b", "--micro-batch", "2", "--seq-len", "64"]


def command(home: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "lora_planner", *words]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "LORA_PLAN_HOME": str(home), "COLUMNS": "100"}


def run(home: Path, *words: str, codes: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run(command(home, *words), env=environment(home), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def step_interval(home: Path, device: str) -> dict[str, Any]:
    """What the next plan says about a step on this processor."""
    document = json.loads(run(home, "estimate", *MODEL, "--gpu", device, "--json"))
    found: dict[str, Any] = document["result"]["time"]["step_s"]
    return found


def test_from_nothing_to_a_sharper_plan(tmp_path: Path) -> None:
    """A base is pre-trained, arms are run, killed half-way and resumed without losing a finished run, a verdict is
    printed; a probe then narrows the interval of the next plan, and the report counts every run."""
    home, out = tmp_path / "home", tmp_path / "runs"
    journal = out / "runs.jsonl"
    words = ["verify", *SMALL, "--out", str(out)]
    process = subprocess.Popen(command(home, *words), env=environment(home), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while sum(r.status == FINISHED for r in read_runs(journal)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {r.key: r.measured["losses"] for r in read_runs(journal) if r.status == FINISHED}
    assert len(before) >= 2

    document = json.loads(run(home, *words, "--json", codes=(0, 7, 8)))
    runs = read_runs(journal)
    assert all(run.is_final for run in runs), "a grid may end where runs diverge, never in an unknown state"
    assert {key: losses for r in runs if (key := r.key) in before for losses in [r.measured["losses"]]} == before
    assert all(len(r.attempts) == 1 for r in runs if r.key in before), "a finished run was repeated"
    assert len({run.measured["base"]["weights"] for run in runs if run.status == FINISHED}) == 1, "one base, one digest"
    status = {v["claim"]: v["status"] for v in document["result"]["verdicts"]}
    assert status["counts"] == "holds"
    assert status["both arms learn"] == "holds"
    assert {"step time", "peak memory", "base is pre-trained", "LoRA against full"} <= set(status)
    arms = {arm["name"]: arm for arm in document["result"]["arms"]}
    assert {"full", "lora r2", "full from scratch"} == set(arms)

    device = document["result"]["device"]
    assumed = step_interval(home, device)
    run(home, "calibrate", "--base", "tiny", "--out", str(out))
    fitted = step_interval(home, device)
    assert fitted["high"] / fitted["low"] < assumed["high"] / assumed["low"] / 1.5
    assert str(tmp_path) not in journal.read_text(), "a record holds no path of this machine"

    page = tmp_path / "scoreboard.md"
    run(home, "report", str(journal), "--to", str(page))
    assert f"| all | {len(read_runs(journal))} |" in page.read_text()


def test_the_users_own_model_and_data(tmp_path: Path) -> None:
    """A directory with safetensors and a JSONL file of chats: arms are trained on the answers of that file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from runner.tokenizer import save, train_tokenizer

    model, home = tmp_path / "model", tmp_path / "home"
    model.mkdir()
    words = train_tokenizer(300)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, intermediate_size=64, vocab_size=words.get_vocab_size(),
                                  tie_word_embeddings=False)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    save(words, model)
    data = tmp_path / "chats.jsonl"
    with (ROOT / "examples/stdlib-docs.jsonl").open() as file, data.open("w") as some:
        some.writelines(line for line, _ in zip(file, range(120), strict=False))
    out = tmp_path / "runs"
    asked = ["--model", str(model), "--data", str(data), "--ranks", "2", "--steps", "4", "--rates", "2"]
    document = json.loads(run(home, "verify", *asked, "--out", str(out), "--json", codes=(0, 7, 8)))
    runs = read_runs(out / "runs.jsonl")
    assert {v["claim"]: v["status"] for v in document["result"]["verdicts"]}["counts"] == "holds"
    assert all(r.spec.task == "jsonl" and r.measured["task"]["rows"] == 120 for r in runs)
    full = next(r for r in runs if r.spec.method == "full")
    assert full.measured["tokens_per_step"] == pytest.approx(4 * full.predicted["mean_length"].value)
    assert 0 < full.measured["trained_tokens"] < full.measured["padded_tokens"]


@pytest.mark.parametrize(
    ("make", "said", "code"),
    [
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"\x80\x04."), "pickled weights are never loaded", 3),
        (lambda d: None, "no weights, no safetensors", 3),
        (lambda d: (d / "config.json").unlink(), "no config.json", 3),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama", "_attn_implementation_internal": "x/y"}'),
         "may not choose the code that runs", 3),
    ],
)  # fmt: skip
def test_models_that_are_refused(make: Any, said: str, code: int, tmp_path: Path) -> None:
    """Pickled weights, no weights, no config, a config that names code: one line, exit 3, nothing run."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    make(model)
    done = subprocess.run(command(tmp_path, "verify", "--model", str(model), "--out", str(tmp_path / "o")),
                          env=environment(tmp_path), cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == code
    assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def record(rate: float, loss: float | None, seed: int = 0) -> RunRecord:
    spec = replace(RunSpec("b", "shift"), lr=rate, seed=seed)
    measured = {"held_out": [[0, 5.0], [9, loss]]}
    return RunRecord(spec.key, spec, {}, {}, DIVERGED if loss is None else FINISHED, measured=measured)


def test_a_grid_is_extended_past_the_end_where_the_best_lies() -> None:
    """Upwards, downwards, for every seed; not where the best is inside, and not past a diverged end."""
    up = beyond([record(1e-4, 4.0), record(1e-3, 3.0), record(1e-3, 3.1, seed=1)])
    assert [(s.lr, s.seed) for s in up] == [(3.2e-3, 0), (3.2e-3, 1)]
    down = beyond([record(1e-4, 3.0), record(1e-3, 4.0)])
    assert [s.lr for s in down] == [pytest.approx(1e-4 / GRID, rel=0.05)]
    assert not beyond([record(1e-4, 4.0), record(1e-3, 3.0), record(1e-2, 3.5)])
    assert not beyond([record(1e-4, 4.0), record(1e-3, 3.0), record(1e-2, None)])
    assert not beyond([record(1e-4, None), record(1e-3, None)])
