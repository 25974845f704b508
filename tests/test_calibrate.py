"""The probe's fit against planted constants, what it does to held-out predictions, and the scoreboard."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from calibrate import probe
from calibrate.constants import write
from calibrate.score import MODEL_MISS, model_miss, scoreboard, scores, step_seconds
from lora_planner import facts
from lora_planner.arch import from_config
from lora_planner.errors import BadInput
from lora_planner.facts import Constant, Gpu
from lora_planner.ledger import Estimate
from lora_planner.memory import constants as memory_constants
from lora_planner.predict import memory_plan, predict, step_work
from lora_planner.record import FINISHED, RunRecord, RunSpec, Score
from lora_planner.throughput import Stack, default_stack, stack, step_time

CPU = Gpu("cpu-test-1t", (), 8 << 30, 12e9, {"fp32": 60e9, "bf16": 90e9}, "cpu", "a test", date(2026, 11, 1))
CUDA = Gpu("test-80gb", (), 80 << 30, 2e12, {"fp32": 20e12, "bf16": 300e12}, "pcie", "a test", date(2026, 11, 1))
CONFIG = {
    "model_type": "llama", "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
WIDER = {**CONFIG, "hidden_size": 384, "intermediate_size": 1024}
PLANTED = {
    "matmul_efficiency": 0.75, "attention_efficiency": 0.25, "adapter_efficiency": 0.2,
    "memory_efficiency": 0.9, "launch_s": 8e-6,
}  # fmt: skip
UNEXPLAINED, WORKSPACE = 0.05, 20e6
STATUSES = ("finished", "diverged", "oom", "interrupted", "killed", "invalid", "failed", "queued")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of this test's own."""
    monkeypatch.setenv(facts.HOME_VARIABLE, str(tmp_path / "home"))
    facts.forget()
    yield tmp_path / "home"
    monkeypatch.undo()
    facts.forget()


def planted(gpu: Gpu) -> Stack:
    rows = stack("lora-plan", gpu).rows
    return Stack("lora-plan", gpu.name, rows | {n: replace(rows[n], value=v) for n, v in PLANTED.items()})


def run_of(spec: RunSpec, gpu: Gpu, config: dict[str, Any], noise: float, rng: random.Random) -> RunRecord:
    """What a device with the planted constants would have measured."""
    model = from_config(config)
    seconds = step_time(step_work(spec, model, gpu), gpu, planted(gpu)).total * math.exp(rng.gauss(0, noise))
    peak = memory_plan(spec, model, gpu).allocated * (1 + UNEXPLAINED) * math.exp(rng.gauss(0, noise / 4))
    if gpu is CUDA:
        peak += WORKSPACE
    foretold = predict(spec, config, gpu)
    measured = {
        "trainable": int(foretold["trainable"].value),
        "step_s": [5 * seconds, 2 * seconds, *[seconds] * 6],
        "step_cpu_s": [seconds] * 8,
        "peak_bytes": {"gradients": int(peak), "optimizer": int(peak / 2), "evaluate": int(3 * peak)},
        "tokens_per_step": spec.batch * spec.seq_len,
    }
    return RunRecord(spec.key, spec, config, foretold, FINISHED, measured=measured, env={"device": gpu.name})


def probes(gpu: Gpu, noise: float = 0.02, seed: int = 0) -> list[RunRecord]:
    rng = random.Random(seed)
    device = "cpu" if gpu is CPU else "cuda"
    specs = [
        RunSpec("b", "probe", method=how, rank=8, seq_len=length, micro_batch=batch, steps=8, device=device, seed=seed)
        for how in ("lora", "full")
        for length in (64, 256)
        for batch in (2, 8)
    ]
    return [run_of(spec, gpu, CONFIG, noise, rng) for spec in specs]


def others(gpu: Gpu) -> list[RunRecord]:
    rng = random.Random(7)
    specs = [
        RunSpec("b", "shift", method=how, rank=16, seq_len=128, micro_batch=batch, steps=8)
        for how in ("lora", "full")
        for batch in (4, 16)
    ]
    return [run_of(spec, gpu, WIDER, 0.02, rng) for spec in specs]


# ---------------------------------------------------------------- the fit


@pytest.mark.parametrize("gpu", [CPU, CUDA], ids=lambda g: g.name)
def test_the_fit_finds_the_constants_that_made_the_runs(gpu: Gpu) -> None:
    """Over several noises, the 90 % intervals hold most of the planted constants, and none is far out."""
    inside = total = 0
    for seed in range(4):
        rows = {row.name: row for row in probe.fit(probes(gpu, seed=seed), gpu)}
        for name, value in PLANTED.items():
            row = rows[name]
            total += 1
            inside += row.low <= value <= row.high
            assert abs(math.log(value / row.value)) < 3 * math.log(row.high / row.value), name
            assert (row.basis, row.n, row.gpu, row.stack) == ("fitted", 8, gpu.name, "lora-plan")
    assert inside >= 0.8 * total


def test_a_probe_narrows_what_it_measures() -> None:
    """The matmul's interval and the spread are narrower than the packaged ones, and name their runs."""
    runs = probes(CPU)
    rows = {row.name: row for row in probe.fit(runs, CPU)}
    before = stack("lora-plan", CPU).rows
    for name in ("matmul_efficiency", "spread"):
        assert rows[name].high / rows[name].low < 0.5 * before[name].high / before[name].low
    assert all(run.key in rows["spread"].source for run in runs)


def test_the_spread_is_that_of_runs_left_out() -> None:
    """Ten times the noise gives a wider spread; without any the floor is left: 20 % on a CPU, whose neighbours change,
    and 5 % on a GPU."""
    quiet, noisy = (
        next(row for row in probe.fit(probes(CPU, noise), CPU) if row.name == "spread") for noise in (0.0, 0.2)
    )
    assert 1.2 <= quiet.high < 1.22
    assert noisy.high > 1.3
    on_gpu = next(row for row in probe.fit(probes(CUDA, 0.0), CUDA) if row.name == "spread")
    assert 1.05 <= on_gpu.high < 1.07


def test_memory_rows_hold_what_was_planted() -> None:
    """The unexplained share is found; on CUDA workspace and allocator too, where reserved bytes are known."""
    rows = {row.name: row for row in probe.fit_memory(probes(CPU), CPU)}
    assert rows["unexplained"].value == pytest.approx(UNEXPLAINED, abs=0.01)
    assert set(rows) == {"unexplained", "peak_ratio"}
    runs = probes(CUDA)
    for run in runs:
        run.measured["reserved_bytes"] = int(run.measured["peak_bytes"]["gradients"] * 1.2)
    rows = {row.name: row for row in probe.fit_memory(runs, CUDA)}
    assert rows["unexplained"].value == pytest.approx(UNEXPLAINED, abs=0.02)
    assert rows["workspace_bytes"].value == pytest.approx(WORKSPACE, rel=0.15)
    assert rows["allocator_fraction"].value > 0.2


def test_too_few_runs_determine_nothing() -> None:
    """Three probe runs, or eight that did not finish, are refused with a fix."""
    with pytest.raises(BadInput, match="Run the probe again"):
        probe.fit(probes(CPU)[:3], CPU)
    runs = probes(CPU)
    for run in runs:
        run.status = "killed"
    with pytest.raises(BadInput, match="0 finished"):
        probe.fit(runs, CPU)


def test_a_shared_core_is_timed_by_its_own_time() -> None:
    """Where another process took half of the core, the processor's time counts, and only on a CPU."""
    run = probes(CPU)[0]
    own = run.measured["step_cpu_s"][0]
    run.measured["step_s"] = [2 * own] * 8
    assert step_seconds(run) == (own, "processor time")
    on_gpu = replace(run, spec=replace(run.spec, device="cuda"))
    assert step_seconds(on_gpu) == (2 * own, "wall clock")


# ---------------------------------------------------------------- before and after


def test_calibration_shrinks_errors_on_runs_it_did_not_see(own_home: Path) -> None:
    """Another width, length and batch: time and memory errors fall, and the measurements lie in the intervals."""
    held_out, runs = others(CPU), probes(CPU)
    before = {run.key: run.predicted for run in held_out}
    write(probe.fit(runs, CPU), own_home, memory=probe.fit_memory(runs, CPU), gpus=[CPU])
    assert facts.gpu(CPU.name).peak_flops_per_s == pytest.approx(CPU.peak_flops_per_s)
    after = {run.key: predict(run.spec, run.config, CPU) for run in held_out}
    found = {e.quantity: e for e in probe.errors([*runs, *held_out], before, after)}
    assert found["step_s"].n == len(held_out)
    for name in ("step_s", "tokens_per_s", "peak_bytes"):
        assert found[name].median_after < 0.5 * found[name].median_before
        assert found[name].worst_after < 0.1
        assert found[name].covered_after >= len(held_out) - 1
    narrower = [after[r.key]["step_s"].high / after[r.key]["step_s"].low for r in held_out]
    assert max(narrower) < 2 < min(e["step_s"].high / e["step_s"].low for e in before.values())


def test_measured_rows_make_our_loop_the_default_of_their_gpu(own_home: Path) -> None:
    """A GPU has it only where this very device was probed; a processor always: published timings are of GPUs."""
    assert default_stack(CUDA) == "hf-trl"
    write([constant("launch_s", 1e-5, CUDA.name)], own_home)
    assert default_stack(CUDA) == "lora-plan"
    assert default_stack(replace(CUDA, name="another")) == "hf-trl"
    assert default_stack(CPU) == "lora-plan"


def constant(name: str, value: float, gpu: str = "g") -> Constant:
    return Constant(name, "lora-plan", gpu, value, value / 2, value * 2, "fitted", 1, "a test")


def test_writing_merges_by_name_stack_and_gpu(own_home: Path) -> None:
    """A second write replaces its own rows, keeps the others, and reaches memory only on its GPU and stack."""
    write([constant("launch_s", 1.0), constant("spread", 1.0)], own_home)
    write([constant("launch_s", 3.0), constant("launch_s", 5.0, "h")], own_home, memory=[constant("unexplained", 0.5)])
    rows = {(r.name, r.gpu): r.value for r in facts.constants() if r.gpu in ("g", "h")}
    assert rows == {("launch_s", "g"): 3.0, ("launch_s", "h"): 5.0, ("spread", "g"): 1.0}
    assert memory_constants("g", "lora-plan")["unexplained"].value == 0.5
    assert memory_constants("g", "hf-trl") == memory_constants()
    assert [p.name for p in own_home.iterdir()] == ["measured.json"]


def test_a_write_that_fails_leaves_the_old_file(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the last moment: the old rows stay, nothing half-written is left, one clear line."""
    path = write([constant("launch_s", 1.0)], own_home)
    old = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        write([constant("launch_s", 2.0)], own_home)
    assert path.read_bytes() == old
    assert list(own_home.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "[" * 100_000, '{"schema": 2}', '{"schema": 1, "constants": 3}',
        '{"schema": 1, "constants": [{"name": "x"}]}',
        '{"schema": 1, "gpus": [{"name": "g"}]}',
        json.dumps({"schema": 1, "constants": [{"name": "x", "stack": "s", "gpu": "g", "value": 3, "low": 4, "high": 5,
                                                "basis": "fitted", "n": 1, "source": "s"}]}),
        json.dumps({"schema": 1, "memory": [{"name": "x", "stack": "s", "gpu": "g", "value": math.nan, "low": 4,
                                             "high": 5, "basis": "fitted", "n": 1, "source": "s"}]}),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_damaged_file_is_one_clear_line(own_home: Path, text: str) -> None:
    """Torn, of another schema or inconsistent: refused with place and fix, and never overwritten."""
    own_home.mkdir()
    path = own_home / "measured.json"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        facts.constants()
    assert "measured.json" in str(caught.value)
    assert "Delete the file" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput):
        write([constant("launch_s", 1.0)], own_home)
    assert path.read_text() == text


# ---------------------------------------------------------------- the scoreboard


def score(value: float, low: float, high: float, measured: float, quantity: str = "step_s") -> Score:
    return Score(quantity, "lora-plan", "g", "k", "a run", Estimate(low, value, high, "s", "fitted"), measured)


@pytest.mark.parametrize(
    ("measured", "missed"), [(100, False), (199, False), (799, False), (801, True), (13, False), (12, True)]
)
def test_a_prediction_off_by_three_intervals_is_a_model_miss(measured: float, missed: bool) -> None:
    """Three half-widths of 50 to 200 around 100 end at 12.5 and at 800."""
    assert model_miss(score(100, 50, 200, measured)) is missed


def test_an_exact_number_that_is_wrong_is_a_model_miss() -> None:
    """One trainable parameter more than counted contradicts the count."""
    assert model_miss(score(10, 10, 10, 11, "trainable"))
    assert not model_miss(score(10, 10, 10, 10, "trainable"))


def test_the_scoreboard_counts_every_run() -> None:
    """One run of each status: all are counted, the finished and the diverged one are scored, OOM is named."""
    runs = probes(CPU)
    for run, status in zip(runs, STATUSES, strict=True):
        run.status = status
    found = scores(runs)
    assert {s.key for s in found} == {runs[0].key, runs[1].key}
    page = scoreboard(found, runs)
    for status in STATUSES:
        assert f"| {status} | 1 |" in page
    assert "| all | 8 |" in page
    assert f"`{runs[2].key}` {runs[2].spec.label()}: out of memory" in page
    assert "| trainable | lora-plan | cpu-test-1t | 2 | 1.000 | 0.0% | 0.0% | 2 of 2 | 2 of 2 |" in page


def test_the_scoreboard_names_contradictions_and_depends_on_the_records_alone() -> None:
    """A step 1,000 times as slow as predicted is E-MODEL-MISS; the order of runs changes no byte."""
    runs = others(CPU)
    runs[1].measured["step_s"] = runs[1].measured["step_cpu_s"] = [1000 * runs[1].predicted["step_s"].value] * 8
    page = scoreboard(scores(runs), runs)
    assert f"{MODEL_MISS} `{runs[1].key}`" in page
    assert page == scoreboard(scores(runs[::-1]), runs[::-1])
    assert "0 of 4 |" in page  # none fed a fit


def test_a_scoreboard_of_nothing_says_so() -> None:
    """No run, no table of numbers."""
    page = scoreboard([], [])
    assert "Nothing was both predicted and measured." in page
    assert "| all | 0 |" in page


# ---------------------------------------------------------------- the device that calibrates itself


def test_a_cpu_starts_and_executes_its_kernels() -> None:
    """On a CPU launches add to the work; on a GPU they only matter where they are longer than it."""
    spec, model = RunSpec("b", "probe", seq_len=256), from_config(CONFIG)
    for gpu, adds in ((CPU, True), (replace(CPU, form="pcie"), False)):
        rows = stack("lora-plan", gpu)
        slow = Stack(rows.name, rows.gpu, rows.rows | {"launch_s": replace(rows.rows["launch_s"], value=1e-5)})
        asked = step_work(spec, model, CPU)
        idle = step_time(replace(asked, kernels=0), gpu, slow).total
        assert step_time(asked, gpu, slow).total == pytest.approx(idle + (asked.kernels * 1e-5 if adds else 0))


def test_fp32_moves_more_bytes_than_bf16() -> None:
    """Weights are read at twice the width, and element-wise traffic of the model grows, but by less: nothing is cast.

    Without adapters: in 16 bit these cast their input to fp32 and back, which fp32 saves.
    """
    model, spec = from_config(CONFIG), RunSpec("b", "probe", method="full", rank=0, alpha=0.0)
    narrow, wide = (step_work(replace(spec, precision=p), model, CPU) for p in ("bf16", "fp32"))
    assert wide.weight_bytes_read == 2 * narrow.weight_bytes_read
    assert narrow.activation_bytes < wide.activation_bytes < 2 * narrow.activation_bytes
    assert (narrow.dtype, wide.dtype) == ("bf16", "fp32")


def test_an_rl_run_has_no_predicted_time() -> None:
    """Sampling is not modelled, so that only the trained parameters are foretold."""
    assert set(predict(RunSpec("b", "arithmetic", objective="rl"), CONFIG, CPU)) == {"trainable"}
