"""Whole runs and sweeps under faults: killed, interrupted, out of memory, resumed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lora_planner.facts import Gpu
from lora_planner.ledger import exact
from lora_planner.record import (
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    OOM,
    RunRecord,
    RunSpec,
    read_events,
    read_runs,
)
from runner import execute as execution
from runner import measure
from runner.execute import Outcome, Place, execute
from runner.sweep import Executor, Inline, Planned, Workers, riskiest_first, slots, sweep

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64,
          "vocab_size": 50, "tie_word_embeddings": False}  # fmt: skip
SPEC = RunSpec("base", "probe", (("n", 16),), rank=4, steps=8, micro_batch=2, seq_len=12, eval_every=3, lr=3e-3)
JOURNAL = "runs.jsonl"
RUNS = 8  # of the sweep that is killed


class Silent:
    def begin(self, left: Sequence[Planned], done: int) -> None: ...
    def message(self, planned: Planned, message: dict[str, Any]) -> None: ...


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and no tokenizer, on disk."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    values = {k: v for k, v in CONFIG.items() if k != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **values)).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def place(base: Path, root: Path) -> Place:
    return Place(root, {"base": base})


def planned(specs: Sequence[RunSpec]) -> list[Planned]:
    return [Planned(spec, CONFIG, {"trainable": exact(1, "params")}) for spec in specs]


def curves(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What a run must give whenever and however it was run."""
    kept = ("losses", "grad_norms", "held_out", "trained_tokens", "norms", "noise_scale")
    return {run.key: {name: run.measured.get(name) for name in kept} for run in runs}


def grid(n: int) -> list[RunSpec]:
    return [replace(SPEC, seed=i, method="full" if i % 2 else "lora") for i in range(n)]


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("words", [{"method": "full"}, {"method": "lora"}, {"method": "lora", "schedule": "linear"}],
                         ids=["full", "lora", "linear"])  # fmt: skip
@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_resumed_run_is_the_unbroken_one(words: dict[str, Any], after: int, base: Path, tmp_path: Path) -> None:
    """Stopped after any step and resumed: the same losses, norms and weights, to the last bit."""
    spec = replace(SPEC, **words)
    whole = execute(spec, place(base, tmp_path / "whole"), save_to=tmp_path / "a")
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps >= after

    first = execute(spec, place(base, tmp_path / "broken"), stop=stop)
    assert (first.status, whole.status) == (INTERRUPTED, FINISHED)
    second = execute(spec, place(base, tmp_path / "broken"), save_to=tmp_path / "b")
    for name in ("losses", "grad_norms", "held_out", "trained_tokens", "norms"):
        assert second.measured[name] == whole.measured[name], name
    assert any(f"resumed after step {after}" in note for note in second.measured["notes"])
    [name] = [p.name for p in (tmp_path / "a").glob("*.safetensors")]
    one, other = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_f9_a_damaged_checkpoint_falls_back_to_the_one_before(base: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The newest checkpoint has a flipped byte: the run goes on from the older one and says so; the curve is the same."""
    monkeypatch.setattr(execution, "SAVE_EVERY_S", 0.0)
    whole = execute(SPEC, place(base, tmp_path / "whole"))
    steps = iter(range(100))
    execute(SPEC, place(base, tmp_path / "broken"), stop=lambda: next(steps) >= 4)
    newest = max((tmp_path / "broken").rglob("tensors.safetensors"), key=lambda p: p.parent.name)
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    again = execute(SPEC, place(base, tmp_path / "broken"))
    assert again.measured["losses"] == whole.measured["losses"]
    assert any("resumed after step 4" in note and "skipped" in note for note in again.measured["notes"])


# ---------------------------------------------------------------- the sweep


def run_sweep(directory: Path, base: Path, n: int, executor: Executor | None = None) -> list[RunRecord]:
    at = place(base, directory)
    inline = Inline(lambda spec, stop: execute(spec, at, stop=stop))
    return sweep(directory, planned(grid(n)), executor or inline, Silent())


def child(directory: Path, base: Path, ready: Event) -> None:
    ready.set()
    execution.SAVE_EVERY_S = 0.0
    run_sweep(directory, base, RUNS)


def test_f1_kill_9_at_twenty_random_moments_loses_no_finished_run(base: Path, tmp_path: Path) -> None:
    """After each kill the journal parses, every run that had ended is still there as it was, at most one was
    interrupted; in the end the tables are those of an unbroken sweep."""
    begun = time.monotonic()
    expected = curves(run_sweep(tmp_path / "unbroken", base, RUNS))
    a_run = (time.monotonic() - begun) / RUNS  # on this machine, busy as it is
    directory, rng = tmp_path / "killed", random.Random(5)
    # from a server: a fork of this process, with threads of a dozen libraries, once hung for good
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(
        ["transformers.models.qwen3.modeling_qwen3", "peft", "runner.execute", "runner.sweep"]
    )
    before: dict[str, Any] = {}
    kills = broken = 0
    while kills < 20:
        ready = server.Event()
        process = server.Process(target=child, args=(directory, base, ready))
        process.start()
        assert ready.wait(300)
        process.join(rng.uniform(0.0, 2 * a_run) if len(before) < RUNS else 0.02)
        assert process.pid
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        kills += 1
        process.join()
        events, skipped = read_events(directory / JOURNAL)
        assert len(skipped) <= kills
        runs = read_runs(directory / JOURNAL)
        ended = curves([run for run in runs if run.status == FINISHED])
        assert all(ended[key] == curve for key, curve in before.items())
        assert sum(run.status == INTERRUPTED for run in runs) <= 1
        assert sum(e["event"] == "planned" for e in events) == len(runs)
        broken += any(run.status == INTERRUPTED for run in runs)
        before = ended
    assert broken, "no kill came while a run was under way"
    assert curves(run_sweep(directory, base, RUNS)) == expected
    ends = [e["key"] for e in read_events(directory / JOURNAL)[0] if e["event"] == "ended"]
    assert sorted(ends) == sorted(expected), "a finished run was repeated"


def test_what_is_finished_is_not_repeated(base: Path, tmp_path: Path) -> None:
    """A second sweep over the same specs starts nothing; one more spec runs alone."""
    run_sweep(tmp_path, base, 2)
    lines = (tmp_path / JOURNAL).read_text()
    run_sweep(tmp_path, base, 2)
    assert (tmp_path / JOURNAL).read_text() == lines
    run_sweep(tmp_path, base, 3)
    assert sum(e["event"] == "started" for e in read_events(tmp_path / JOURNAL)[0]) == 3


def test_the_prediction_is_on_disk_before_the_run_starts(base: Path, tmp_path: Path) -> None:
    """When an executor gets its first spec, all predictions are in the journal, and later ones do not replace them."""
    seen = []

    class Looks:
        def run(self, specs: Sequence[RunSpec]) -> Any:
            seen.append([run.predicted["trainable"].value for run in read_runs(tmp_path / JOURNAL)])
            for spec in specs:
                yield spec.key, {"ended": asdict(Outcome(FINISHED))}

        def stop(self, now: bool) -> None: ...

    sweep(tmp_path, planned(grid(3)), Looks(), Silent())
    assert seen == [[1, 1, 1]]
    later = [replace(p, predicted={"trainable": exact(2, "params")}) for p in planned(grid(3))]
    assert [run.predicted["trainable"].value for run in sweep(tmp_path, later, Looks(), Silent())] == [1, 1, 1]


def test_f3_out_of_memory_is_a_result_and_is_retried_once_with_half_the_batch(tmp_path: Path) -> None:
    """The OOM is kept with its reason; the retry is labelled, has the same samples a step, and is not retried itself."""

    def breaks(spec: RunSpec, stop: Any) -> Outcome:
        return Outcome(OOM, {"peak_bytes": {"gradients": 7}}, "tried to allocate 2 GiB")

    runs = sweep(tmp_path, planned([replace(SPEC, micro_batch=8)]), Inline(breaks), Silent())
    assert [(r.status, r.spec.micro_batch, r.spec.accumulation) for r in runs] == [(OOM, 8, 1), (OOM, 4, 2)]
    assert runs[0].measured["peak_bytes"] == {"gradients": 7}
    assert f"retry of {runs[0].key}" in runs[1].planned_with


def test_f4_memory_fails_on_the_longest_batch_before_the_first_step(base: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """What the allocator says on a CPU becomes an OOM that names the samples; nothing was trained."""

    def full(self: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr("runner.train.Supervised.rehearse", full)
    outcome = execute(SPEC, place(base, tmp_path))
    assert outcome.status == OOM
    assert "longest micro-batch (probe 0, probe 1)" in outcome.reason
    assert "losses" not in outcome.measured


def test_f6_a_diverged_run_is_kept_with_its_losses(base: Path, tmp_path: Path) -> None:
    """It ends as diverged, in the journal, with what was measured; it is not repeated."""
    at = place(base, tmp_path)
    wild = replace(SPEC, method="full", lr=50.0, steps=40)
    for _ in range(2):
        [run] = sweep(tmp_path, planned([wild]), Inline(lambda s, stop: execute(s, at, stop=stop)), Silent())
        assert run.status == DIVERGED
        assert "step" in run.reason
        assert 0 < len(run.measured["losses"]) < 40
        assert run.final_loss is None
    assert len(run.attempts) == 1


def test_a_run_that_cannot_start_takes_no_other_with_it(base: Path, tmp_path: Path) -> None:
    """An unknown base is one failed run; the next one finishes; failed ones are tried again next time."""
    at = place(base, tmp_path)
    specs = [replace(SPEC, base="elsewhere"), SPEC]
    for _ in range(2):
        runs = sweep(tmp_path, planned(specs), Inline(lambda s, stop: execute(s, at, stop=stop)), Silent())
        assert [run.status for run in runs] == [FAILED, FINISHED]
    assert "not on this machine" in runs[0].reason
    assert [len(run.attempts) for run in runs] == [2, 1]


def test_the_riskiest_run_is_first() -> None:
    """Largest predicted peak, then longest: what will not fit fails in the first minute."""

    def one(peak: float, steps: int) -> Planned:
        return Planned(replace(SPEC, steps=steps), {}, {"peak_bytes": exact(peak, "B"), "step_s": exact(1.0, "s")})

    found = riskiest_first([one(1, 5), one(9, 2), one(9, 3), one(4, 9)])
    assert [(p.predicted["peak_bytes"].value, p.spec.steps) for p in found] == [(9, 3), (9, 2), (4, 9), (1, 5)]


# ---------------------------------------------------------------- reinforcement


def test_a_policy_is_run_resumed_and_recorded_like_any_other(tmp_path: Path) -> None:
    """A base that knows half of the sums is trained on its own rewards: expected reward rises, a broken run is the
    unbroken one, and the record has reward and bits of each step."""
    from runner.tokenizer import save, train_tokenizer

    start, warm = tmp_path / "start", tmp_path / "warm"
    start.mkdir()
    words = train_tokenizer(300)
    save(words, start)
    (start / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 64, "vocab_size": words.get_vocab_size()}))
    at = Place(tmp_path / "runs", {"start": start, "warm": warm})
    sums = RunSpec("start", "arithmetic", (("supervised", True),), init="random", method="full", rank=0, lr=3e-3,
                   steps=150, micro_batch=32, seq_len=8)  # fmt: skip
    assert execute(sums, at, save_to=warm).status == FINISHED
    save(words, warm)
    policy = RunSpec("warm", "arithmetic", objective="rl", method="full", rank=0, lr=3e-4, steps=40, micro_batch=16,
                     seq_len=8, group=8, new_tokens=1)  # fmt: skip
    whole = execute(policy, at)
    assert whole.status == FINISHED, whole.reason
    (_, before), (_, after) = whole.measured["held_out"]
    assert after > before > 0.15
    assert {"reward", "reward_bits"} <= set(whole.measured["step_facts"][0])
    calls = iter(range(100))
    broken = replace(at, root=tmp_path / "broken")
    assert execute(policy, broken, stop=lambda: next(calls) >= 9).status == INTERRUPTED
    assert execute(policy, broken).measured["losses"] == whole.measured["losses"]


# ---------------------------------------------------------------- processes

SWEEP = """
import json, sys
from pathlib import Path
from dataclasses import replace
sys.path[:0] = [{tests!r}]
import test_runs as t
from lora_planner.errors import Stopped
from runner.sweep import Workers, slots
class Loud(t.Silent):
    def message(self, planned, message):
        print(json.dumps([planned.spec.key, list(message)]), flush=True)
base, out = Path({base!r}), Path({out!r})
specs = [t.replace(t.SPEC, steps={steps}, seed=i) for i in range({n})]
workers = Workers(slots("cpu", 0, {slots}), t.place(base, out).to_json())
try:
    t.sweep(out, t.planned(specs), workers, Loud())
except Stopped as error:
    sys.exit(error.exit_code)
"""


def start(base: Path, out: Path, steps: int, n: int, workers: int = 1) -> subprocess.Popen[str]:
    text = SWEEP.format(tests=str(ROOT / "tests"), base=str(base), out=str(out), steps=steps, n=n, slots=workers)
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


def until(process: subprocess.Popen[str], kind: str) -> None:
    assert process.stdout
    for line in process.stdout:
        if json.loads(line)[1] == [kind] or kind in json.loads(line)[1]:
            return
    raise AssertionError(f"ended before {kind}")


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes with ps")
def test_f2_f5_signals_and_killed_workers(base: Path, tmp_path: Path) -> None:
    """A worker killed by the system loses its own run only; SIGINT saves and exits 130; a parent killed with -9
    leaves no orphan; the same sweep then finishes everything from where it stood."""
    process = start(base, tmp_path, steps=4000, n=2)
    until(process, "step")
    [worker] = [pid for pid in children(process.pid) if pid]
    os.kill(worker, signal.SIGKILL)
    until(process, "ended")
    assert KILLED in [run.status for run in read_runs(tmp_path / JOURNAL)]
    until(process, "step")  # the next run has a new worker
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    runs = read_runs(tmp_path / JOURNAL)
    assert {run.status for run in runs} == {KILLED, INTERRUPTED}
    assert any("saved" in run.reason for run in runs)

    process = start(base, tmp_path, steps=4000, n=2)
    until(process, "step")
    [worker] = children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists(), "an orphan holds the device"


def test_workers_give_what_this_process_gives(base: Path, tmp_path: Path) -> None:
    """Executors are interchangeable: two worker processes and this one produce the same curves."""
    workers = Workers(slots("cpu", 0, 2), place(base, tmp_path / "two").to_json())
    two = run_sweep(tmp_path / "two", base, 3, workers)
    assert all(run.status == FINISHED for run in two)
    assert two[0].env["device"].startswith("cpu-")
    assert curves(two) == curves(run_sweep(tmp_path / "one", base, 3))


# ---------------------------------------------------------------- measuring


def test_f17_a_rerun_of_one_seed_is_the_same_run_on_a_cpu(base: Path, tmp_path: Path) -> None:
    """The noise floor of a CPU is zero: `repeat` changes the key and nothing else."""
    one, two = (execute(replace(SPEC, repeat=i), place(base, tmp_path)) for i in (0, 1))
    assert one.measured["losses"] == two.measured["losses"]
    assert replace(SPEC, repeat=1).key != SPEC.key


def test_a_record_says_what_it_was_measured_with(base: Path, tmp_path: Path) -> None:
    """Tokens, seconds, FLOP/s, peak, dtypes and the machine; no path and no host name."""
    outcome = execute(SPEC, place(base, tmp_path))
    found = outcome.measured
    assert len(found["step_s"]) == len(found["step_cpu_s"]) == len(found["losses"]) == SPEC.steps
    assert found["tokens_per_step"] == 2 * 12
    assert found["peak_bytes"]["step"] > 4 * 30_000
    assert found["peak_kind"] == measure.CPU_KIND
    assert found["adapter_dtype"] == ["torch.float32"]
    assert found["model_flops_per_s"] == pytest.approx(found["tokens_per_s"] * flops_per_token(), rel=1e-9)
    assert {name.split(".")[-1] for name, *_ in found["norms"]} >= {"q_proj", "down_proj"}
    env = measure.environment(torch.device("cpu"))
    assert {"torch", "transformers", "peft", "device", "threads", "commit"} <= set(env)
    assert str(tmp_path) not in json.dumps(found) + json.dumps(env)


def flops_per_token() -> float:
    from lora_planner.arch import from_config
    from lora_planner.flops import train

    return train(from_config(CONFIG), SPEC.plan_method(), SPEC.seq_len, "sdpa", "none", SPEC.micro_batch).total


def test_the_peak_of_known_tensors() -> None:
    """What is alive before, and the most that is added at one time: 2 and 1 MiB, then 1 and 4."""
    kept = torch.ones(1 << 18)

    def step() -> None:
        two = torch.ones(1 << 19)
        one = two[: 1 << 18] + 1
        del two
        four = torch.ones(1 << 20)
        del one, four

    assert measure.live_bytes() >= kept.nbytes
    assert measure.cpu_peak(step) - measure.live_bytes() == pytest.approx(5 << 20, rel=0.001)


def test_this_processor_is_a_device() -> None:
    """Its row has a name, a peak and a bandwidth that a processor can have."""
    found = measure.cpu_device(1)
    assert isinstance(found, Gpu)
    assert found.form == "cpu" and found.name.endswith("-1t")
    assert 1e9 < found.peak("fp32") < 1e13
    assert 1e8 < found.hbm_bytes_per_s < 1e12
