"""`diagnose`: logs in every form, the shape of curves, planted causes, and what must be refused."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.diagnose import FAULTS, HYGIENE, PLANTED, REPORT, Sweep, known, report
from calibrate.diagnose import causes, hygiene, picture
from calibrate.diagnose.evidence import CANNOT_TELL, LIKELY, POSSIBLE, UNLIKELY
from calibrate.diagnose.logs import Log, read_log
from calibrate.diagnose.settings import Settings
from calibrate.diagnose.shape import falling, gap, lag, line, noise
from calibrate.diagnose.verdict import Diagnosis, diagnose, smoothed
from lora_planner.commands.diagnose import diagnose as command
from lora_planner.errors import BadInput, LoraPlanError

ROOT = Path(__file__).parents[1]
STATE = PLANTED / "healthy-s0.json"
#: its held-out loss had stopped falling before, and the check asks for one rise in a falling curve
MISSED = {"adapter-lost-s2"}
LOGS = sorted(PLANTED.glob("*-s*.json"))


def cli(*words: str | Path) -> Result:
    return CliRunner().invoke(command, [str(w) for w in words])


def fails(*words: str | Path) -> LoraPlanError:
    """The error of a call that must end in one of ours, with a cause and a next step and without a traceback."""
    error = cli(*words).exception
    assert isinstance(error, LoraPlanError), error
    assert error.what
    assert "\n" not in str(error)
    return error


def entries() -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads(STATE.read_text())["log_history"]
    return history


def a_run(loss: Callable[[int], float], steps: int = 200, lr: float = 1e-4, **words: Any) -> Log:
    """A log of a curve, with held-out losses at ten places."""
    places = (0, 5, 10, 20, 30, 50, 75, 100, 150, 200)
    said = Settings(method="full", lr=lr, micro_batch=8, steps=steps)
    return Log("made", "made", tuple((float(s), loss(s)) for s in range(steps)), tuple((float(s), loss(s)) for s in places if s <= steps),
               tuple((float(s), lr) for s in range(steps)), tuple((float(s), 1.0) for s in range(steps)),
               settings=replace(said, **words))  # fmt: skip


def log_linear(stretch: float = 1.0) -> Callable[[int], float]:
    """Falls linearly in ln(steps), as supervised fine-tuning does; `stretch`: so many times slower."""
    return lambda s: 5.0 - 0.4 * math.log1p(s / stretch)


# ---------------------------------------------------------------- reading


def written(form: str) -> tuple[str, str]:
    rows = entries()
    if form == "log_history":
        return "log.json", json.dumps(rows)
    if form == "lines":
        return "log.jsonl", "\n".join(json.dumps(r) for r in rows)
    if form == "printed":
        return "out.log", "\n".join(
            f"  {r['step']}/80 [00:01<00:09]\r{ {k: v for k, v in r.items() if k != 'step'} }" for r in rows
        )
    if form == "printed as text":  # what transformers 5 prints
        return "out.log", "\n".join(
            f" {r['step']}/80 [00:01<\n{ {k: str(v) for k, v in r.items() if k != 'step'} }" for r in rows
        )
    names = ["step", "loss", "eval_loss", "learning_rate", "grad_norm"]
    head = {
        "csv": names,
        "W&B csv": ["Step", *(f"run 7 - train/{n}" if n != "eval_loss" else "run 7 - eval/loss" for n in names[1:])],
    }[form]
    return "log.csv", "\n".join([",".join(head), *(",".join(str(r.get(n, "")) for n in names) for r in rows)])


@pytest.mark.parametrize("form", ["log_history", "lines", "printed", "printed as text", "csv", "W&B csv"])
def test_one_run_in_every_form_is_one_run(form: str, tmp_path: Path) -> None:
    """The same losses, rates and norms at the same steps, and the same verdicts."""
    name, text = written(form)
    (tmp_path / name).write_text(text)
    one, other = read_log(str(STATE)), read_log(str(tmp_path / name))
    for curve in ("train", "held_out", "lr", "grad_norm"):
        assert [x for x, _ in getattr(other, curve)] == [x for x, _ in getattr(one, curve)]
        assert [v for _, v in getattr(other, curve)] == pytest.approx([v for _, v in getattr(one, curve)])
    assert [(c.code, e and e.weight) for c, e in diagnose(other).checks] == [
        (c.code, e and e.weight) for c, e in diagnose(one).checks
    ]


def test_a_state_is_read_as_transformers_reads_it() -> None:
    """As many losses and evaluations, in the same order, as TrainerState has."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(STATE))
    log = read_log(str(STATE))
    assert [v for _, v in log.train] == [e["loss"] for e in state.log_history if "loss" in e]
    assert [v for _, v in log.held_out] == [e["eval_loss"] for e in state.log_history if "eval_loss" in e]
    assert (log.settings.steps, log.settings.micro_batch) == (state.max_steps, state.train_batch_size)


def test_what_the_installed_trainer_prints_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Lines by the real PrinterCallback; without a progress bar they are counted, and that is said."""
    from transformers import PrinterCallback, TrainerControl, TrainerState, TrainingArguments

    state = (
        TrainerState(is_local_process_zero=True)
        if "is_local_process_zero" in TrainerState.__dataclass_fields__
        else TrainerState()
    )
    for row in entries():
        PrinterCallback().on_log(
            TrainingArguments(str(tmp_path)),
            state,
            TrainerControl(),
            logs={k: v for k, v in row.items() if k != "step"},
        )
    printed = capsys.readouterr().out
    (tmp_path / "out.log").write_text(printed)
    log = read_log(str(tmp_path / "out.log"))
    assert [v for _, v in log.train] == pytest.approx([e["loss"] for e in entries() if "loss" in e], rel=1e-3)
    assert any("no steps" in note for note in log.notes)


def test_a_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    """checkpoint-80 before checkpoint-9; adapter_config.json beside it says what was trained."""
    for step, loss in ((9, 9.0), (80, 1.0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        rows = [{"step": s, "loss": loss} for s in range(1, 9)]
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    adapter = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "use_rslora": True,
    }
    (tmp_path / "checkpoint-80" / "adapter_config.json").write_text(json.dumps(adapter))
    log = read_log(str(tmp_path))
    assert log.train[0][1] == 1.0
    assert (log.settings.method, log.settings.rank, log.settings.full_modules) == ("rslora", 16, ("lm_head",))
    assert hygiene.also_in_full(log, None).weight == 1  # type: ignore[union-attr]


def test_b15_restarts_holes_and_missing_steps_are_said(tmp_path: Path) -> None:
    """A log that goes back counts its later attempt; a hole and a lack of steps are named."""
    steps = [*range(1, 30), *range(20, 40), *range(200, 220)]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"step": s, "loss": 3.0 + i / 100}) for i, s in enumerate(steps))
    )
    log = read_log(str(tmp_path / "a.jsonl"))
    assert [s for s, _ in log.train] == [*range(1, 40), *range(200, 220)]
    assert dict(log.train)[25] == pytest.approx(3.0 + steps.index(25, 29) / 100)
    assert any("back to step 20" in n for n in log.notes)
    assert any("no points between step 39 and 200" in n for n in log.notes)


def test_a_journal_needs_the_name_of_one_run() -> None:
    """Of many runs the error lists some with their keys, one of which then is read."""
    journal = ROOT / "reports" / "runs" / "verify-cpu.jsonl"
    error = fails(journal)
    assert error.exit_code == 3
    key = re.search(r"KEY: ([0-9a-f]{16}) ", error.fix)
    assert key
    assert read_log(f"{journal}#{key[1]}").settings.is_full


BAD = {
    "empty": ("x.json", b""),
    "blank": ("x.json", b"  \n \n"),
    "binary": ("x.log", bytes(range(256)) * 20),
    "no history": ("x.json", b'{"a": 1}'),
    "history of nothing": ("x.json", b'{"log_history": []}'),
    "history is text": ("x.json", b'{"log_history": "loss"}'),
    "entries are no objects": ("x.json", b"[1, 2, 3, null]"),
    "two losses": ("x.jsonl", b'{"loss": 1, "step": 1}\n{"loss": 1, "step": 2}'),
    "deep": ("x.json", b"[" * 100_000),
    "csv without loss": ("x.csv", b"step,accuracy\n1,2\n2,3\n"),
    "csv of two runs": ("x.csv", b"step,a - loss,b - loss\n1,2,3\n2,3,4\n3,4,5\n"),
    "csv of words": ("x.csv", b"step,loss\n1,a\n2,b\n3,c\n"),
    "prose": ("x.log", b"nothing was trained, the loss was not logged\n" * 5),
    "torn journal": ("x.jsonl", b'{"schema": 1, "event": "planned", "key": "k"}\n'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_log_that_is_none_is_refused(case: str, tmp_path: Path) -> None:
    """Exit code 3, one line, a next step."""
    name, content = BAD[case]
    (tmp_path / name).write_bytes(content)
    error = fails(tmp_path / name)
    assert error.exit_code == 3
    assert error.fix


def test_paths_that_are_no_logs(tmp_path: Path) -> None:
    """Missing, a directory without a state, a pipe: refused without waiting for it."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "no.json", tmp_path, tmp_path / "pipe", "/dev/zero", "a\x1b[31m#b"):
        assert fails(path).exit_code == 3
    assert "\x1b" not in str(fails("a\x1b[31m#b"))


@given(st.lists(st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "learning_rate", "grad_norm", "epoch", "reward"]),
                                st.one_of(st.floats(), st.sampled_from([0.0, 1.0, 2.5]), st.integers(), st.text(max_size=3), st.none(), st.booleans())), max_size=40))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_log_breaks_it(rows: list[dict[str, Any]]) -> None:
    """Whatever numbers, NaN, words or gaps a history has: a diagnosis, or one of our errors."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"lora-plan-diagnose-{os.getpid()}.json"
    path.write_text(json.dumps({"log_history": rows}))
    try:
        log = read_log(str(path))
        assert len(diagnose(log, log).findings) == 4
    except LoraPlanError:
        pass
    finally:
        path.unlink()


# ---------------------------------------------------------------- the shape of a gap


@given(st.floats(1.3, 6.0))
@settings(max_examples=30, deadline=None)
def test_a_curve_stretched_in_time_lags_by_the_stretch(k: float) -> None:
    """Relation: k times slower is k times behind, from start to end. (1 + s/k rounds the first steps.)"""
    one, other = a_run(log_linear(k)), a_run(log_linear())
    found = gap(one.held_out, other.held_out, "held-out")
    assert found is not None
    assert found.lag is not None
    assert found.growth is not None
    assert found.lag.value == pytest.approx(k, rel=0.08)
    assert abs(found.growth.value) < 0.05


def test_a_curve_that_stops_learning_lags_more_and_more() -> None:
    """Relation: a floor makes the lag grow, in held-out and in noisy training losses alike."""
    rng = random.Random(0)
    for channel, sigma in (("held-out", 0.0), ("training", 0.05)):
        floor = [(float(s), max(log_linear()(s), 3.9) + rng.gauss(0, sigma)) for s in range(1, 400)]
        free = [(float(s), log_linear()(s) + rng.gauss(0, sigma)) for s in range(1, 400)]
        found = gap(floor, free, channel)
        assert found is not None
        assert causes.opens(found) == "grows"


def test_one_curve_has_no_gap_and_the_gap_is_antisymmetric() -> None:
    one, other = a_run(log_linear(2.0)).held_out, a_run(log_linear()).held_out
    assert causes.opens(gap(one, one, "held-out")) == "none"
    there, back = gap(one, other, "held-out"), gap(other, one, "held-out")
    assert there is not None
    assert back is not None
    assert there.nats.value == pytest.approx(-back.nats.value)
    assert causes.opens(back) == "ahead"


def test_lag_is_the_ratio_of_steps_at_one_loss() -> None:
    """Golden: halfway between 4 and 3 in ln x between 1 and 100 lies x = 10."""
    assert lag([(1, 4.0), (100, 3.0)], 30, 3.5) == pytest.approx(3.0)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_the_falling_curve_falls_and_keeps_the_mean(values: list[float]) -> None:
    found = [v for _, v in falling(list(enumerate(values)))]
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values), abs=1e-9)


def test_the_noise_of_a_trend_is_that_of_its_noise() -> None:
    """Gaussian noise of 0.1 on a falling curve: within a quarter, and a jump does not change it much."""
    rng = random.Random(1)
    values = [5 - 0.01 * i + rng.gauss(0, 0.1) + (2 if i > 200 else 0) for i in range(400)]
    assert noise(values) == pytest.approx(0.1, rel=0.25)


def test_a_line_has_the_interval_that_scipy_gives() -> None:
    """Oracle: slope and its 90 % interval as scipy.stats.linregress and Student's t."""
    from scipy import stats

    rng = random.Random(2)
    x = [float(i) for i in range(7)]
    y = [2 + 0.3 * v + rng.gauss(0, 0.2) for v in x]
    found = line(x, y, 6.0)
    assert found is not None
    expected = stats.linregress(x, y)
    half = stats.t.ppf(0.95, 5) * expected.stderr
    assert found[1].value == pytest.approx(expected.slope)
    assert found[1].high - found[1].value == pytest.approx(half, rel=1e-3)
    assert found[0].value == pytest.approx(expected.intercept + 6 * expected.slope)


# ---------------------------------------------------------------- planted causes


@pytest.mark.parametrize("path", LOGS, ids=lambda p: p.stem)
def test_a_planted_fault_is_seen_and_a_healthy_run_is_left_alone(path: Path) -> None:
    """A real Trainer run sabotaged at a known step: the check that is for it fires; without sabotage none does."""
    name, _, seed = path.stem.rpartition("-s")
    fault = FAULTS[name]
    d = diagnose(known(read_log(str(path)), fault, int(seed)))
    fired = {c.code for c, e in d.checks if e and e.weight == 2}
    if path.stem in MISSED:
        assert fault.code not in fired, "no longer missed: say so in the report"
    elif fault.code:
        assert fault.code in fired
        assert d["hygiene"].word == LIKELY
    elif not fault.causes:
        assert not fired


def test_every_fault_was_planted() -> None:
    """Three seeds of each, so that what was tuned on one is tested on two."""
    assert {p.stem for p in LOGS} == {f"{name}-s{seed}" for name in FAULTS for seed in (0, 1, 2)}
    assert sum(HYGIENE in fault.causes for fault in FAULTS.values()) >= 10


def test_the_report_is_what_the_committed_runs_give() -> None:
    """Its numbers are never typed: the page is made again and must be the same."""
    assert REPORT.read_text() == report()


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return Sweep(held_out=True)


def beside_full(sweep: Sweep, rank: int, lr: float, seed: int) -> Diagnosis:
    """A run of the shared sweep beside the best full fine-tuning of its seed."""
    key = ("lora", rank, 32.0, 4)
    run = next(r for r in sweep.by_arm[key] if (r.spec.lr, r.spec.seed) == (lr, seed))
    reference = sweep.tuned(("full", 0, 0.0, 4), seed)
    assert reference is not None
    return diagnose(sweep.log(run), sweep.log(reference))


@pytest.mark.parametrize("seed", [4, 6, 9])
def test_j5_lora_at_the_rate_of_full_fine_tuning(sweep: Sweep, seed: int) -> None:
    """users.md J5: LoRA r16 near full's own rate is behind; the rate is named first, with what to try."""
    d = beside_full(sweep, 16, 8e-4, seed)
    assert (d.findings[0].cause, d.findings[0].word, d.findings[0].detail) == ("learning rate", LIKELY, "too low")
    assert d.experiment is not None
    assert d.experiment.command.startswith("lora-plan verify --model MODEL --data DATA --ranks 16")
    assert any("reference's own rate" in text for text in d.cannot)


@pytest.mark.parametrize("seed", [4, 6, 9])
def test_too_high_a_rate_of_lora_is_not_told_from_capacity(sweep: Sweep, seed: int) -> None:
    """Both part the curves late: both POSSIBLE, the log is said not to tell, and the experiment changes both."""
    d = beside_full(sweep, 16, 8e-3, seed)
    assert {d["learning rate"].word, d["capacity"].word} == {POSSIBLE}
    assert d["learning rate"].detail == "too high"
    assert any("experiment does" in text for text in d.cannot)
    assert d.experiment is not None
    assert "--ranks 16,64" in d.experiment.command


def test_one_run_says_what_it_cannot_claim(sweep: Sweep) -> None:
    """No reference: capacity and most rates are CANNOT TELL, and the reason is the first thing said of it."""
    d = diagnose(sweep.log(next(r for r in sweep.by_arm["lora", 16, 32.0, 4] if r.spec.lr == 8e-4)))
    assert d["capacity"].word == d["learning rate"].word == CANNOT_TELL
    assert "--ref" in d.cannot[0]


def test_the_rate_of_a_known_model_is_judged_alone() -> None:
    """trl#2872: LoRA at 1e-6. Without a reference, and without the model, the rate itself is enough."""
    run = a_run(lambda s: 2.0 - 1e-4 * s, lr=1e-6, method="lora", rank=16, alpha=32.0)
    found = diagnose(run)["learning rate"]
    assert (found.word, found.detail) == (LIKELY, "too low")


def test_logs_without_any_settings_still_compare_their_rates() -> None:
    """The commonest case, two bare trainer_state.json: the run at a fiftieth of the reference's rate is not "too high"."""
    d = diagnose(read_log(str(PLANTED / "rate-low-s0.json")), read_log(str(STATE)))
    assert (d["learning rate"].word, d["learning rate"].detail) == (POSSIBLE, "too low")
    assert any("--config" in text for text in d.cannot)


def test_trl_and_axolotl_print_more_than_losses(tmp_path: Path) -> None:
    """Extra keys, with brackets and units in their names, and text around the lines do not disturb it."""
    lines = ["[2026-01-01 10:00:00,000] [INFO] Starting trainer...", "  0%|          | 0/60 [00:00<?, ?it/s]"]
    for s in range(2, 61, 2):
        lines.append(f" {s}%|██  | {s}/60 [00:10<00:20,  5.1s/it]")
        lines.append(f"{{'loss': '{3 - s / 60:.4g}', 'grad_norm': '0.71', 'learning_rate': '2e-05', 'memory/max_active (GiB)': '5.1', "
                     f"'ppl': '9.2', 'entropy': '1.2', 'num_tokens': '{s * 900}.0', 'mean_token_accuracy': '0.61', 'epoch': '{s / 60:.2f}'}}")  # fmt: skip
    lines.append("{'train_runtime': '300', 'train_samples_per_second': '1.1', 'train_loss': '2.5', 'epoch': '1'}")
    (tmp_path / "axolotl.log").write_text("\n".join(lines))
    log = read_log(str(tmp_path / "axolotl.log"))
    assert (len(log.train), log.train[-1], log.lr[-1], log.grad_norm[0]) == (30, (60.0, 2.0), (60.0, 2e-5), (2.0, 0.71))
    assert (log.settings.lr, log.seconds) == (2e-5, 5.0)


def test_what_cannot_differ_is_excluded() -> None:
    """Same weights, same rate, larger batch: neither the rate nor capacity, whatever the curves do."""
    one = a_run(log_linear(3.0), lr=1e-4, micro_batch=64)
    d = diagnose(one, a_run(log_linear(), lr=1e-4, micro_batch=8))
    assert d["learning rate"].word == d["capacity"].word == UNLIKELY


# ---------------------------------------------------------------- comparisons that mean nothing


@pytest.mark.parametrize(
    ("words", "said"),
    [({"vocab": 32000}, "tokenizers"), ({"model": "other"}, "tokenizers"), ({"task": "b"}, "data differ")],
)
def test_b15_two_tokenizers_or_data_sets_are_not_compared(words: dict[str, Any], said: str) -> None:
    one = a_run(log_linear(3.0), vocab=128256, model="llama", task="a")
    other = a_run(log_linear(), **{"vocab": 128256, "model": "llama", "task": "a"} | words)
    d = diagnose(one, other)
    assert d.gap is None
    assert said in d.refused[0]
    assert d["capacity"].word == UNLIKELY  # full fine-tuning, which needs no comparison
    assert d["learning rate"].word == CANNOT_TELL


def test_b15_another_evaluation_set_is_seen_at_the_start() -> None:
    """Untouched adapters leave the base's loss: where the two differ before step 1, nothing is compared."""
    d = diagnose(a_run(lambda s: log_linear()(s) + 0.4), a_run(log_linear()))
    assert d.gap is None
    assert d["hygiene"].word == LIKELY
    assert "H-START" in d["hygiene"].evidence[0].text


def test_b15_a_smoothed_curve_is_said_to_be() -> None:
    rng = random.Random(3)
    raw = [3.0 + rng.gauss(0, 0.1) for _ in range(200)]
    mean, soft = raw[0], []
    for v in raw:
        mean = 0.9 * mean + 0.1 * v
        soft.append(mean)
    run = a_run(log_linear())
    assert smoothed(replace(run, train=tuple(enumerate(raw)))) is None
    # an exponential average leaves steps that go back, so a moving one on top
    twice = [sum(soft[i : i + 10]) / 10 for i in range(190)]
    assert "smoothed" in (smoothed(replace(run, train=tuple(enumerate(twice)))) or "")


# ---------------------------------------------------------------- the command


def test_the_whole_of_it_as_a_user_types_it(tmp_path: Path) -> None:
    """J5 with a TRL config and a picture in both formats: cause, evidence, what cannot be told, a command."""
    for name, stretch in (("lora", 3.0), ("full", 1.0)):
        run = a_run(log_linear(stretch), lr=2e-5)
        rows = [{"step": s, "loss": v, "learning_rate": 2e-5, "grad_norm": 1.0} for s, v in run.train if s]
        rows += [{"step": s, "eval_loss": v} for s, v in run.held_out]
        rows.sort(key=lambda r: r["step"])
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": rows, "max_steps": 200}))
    (tmp_path / "train.yaml").write_text(
        "model_name_or_path: Qwen/Qwen3-8B\ndataset_name: x\nuse_peft: true\nlora_r: 16\nlora_alpha: 32\n"
        "lora_target_modules: all-linear\nlearning_rate: 2.0e-5\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 4\n"
    )
    (tmp_path / "full.yaml").write_text(
        "model_name_or_path: Qwen/Qwen3-8B\ndataset_name: x\nlearning_rate: 2.0e-5\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 4\n"
        "max_length: 1024\npacking: false\nassistant_only_loss: true\n"
    )
    words = [tmp_path / "lora", "--ref", tmp_path / "full", "--config", tmp_path / "train.yaml", "--ref-config", tmp_path / "full.yaml",
             "--model", "qwen3-8b", "--data", ROOT / "examples" / "stdlib-docs.jsonl"]  # fmt: skip
    result = cli(*words, "--plot", tmp_path / "a.svg")
    assert result.exit_code == 0, result.exception
    text = " ".join(result.output.split())
    assert "1 learning rate LIKELY too low" in text
    assert "the reference's 2.0e-5" in text
    assert "surely fits" in text
    assert "lora-plan verify --model qwen3-8b --data" in text
    document = json.loads(cli(*words, "--json", "--plot", tmp_path / "a.png").output)
    assert document["result"]["findings"][0]["detail"] == "too low"
    assert document["result"]["gap"]["lag"]["low"] < 3.3
    assert (tmp_path / "a.svg").read_text().count(">predicted end of the run</text>") == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_words_that_contradict_each_other_end_in_usage(tmp_path: Path) -> None:
    assert fails(STATE, "--plot", tmp_path / "a.pdf").exit_code == 2
    assert fails(STATE, "--ref-config", STATE).exit_code == 2
    assert fails(STATE, "--config", tmp_path / "none.yaml").exit_code == 3
    assert fails(STATE, "--plot", tmp_path / "no" / "a.svg").exit_code == 3


def test_names_from_files_do_nothing_to_the_terminal(tmp_path: Path) -> None:
    """An escape sequence in a file's name or an adapter's stays text."""
    folder = tmp_path / "x\x1b[31m"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(STATE.read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 16, "modules_to_save": ["\x1b]0;own\x07head"]})
    )
    result = cli(folder)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "\x07" not in result.output


def test_an_adapter_file_of_zeros_is_seen(tmp_path: Path) -> None:
    """lora_B of all modules zero in the file beside the state; one that moved makes it POSSIBLE."""
    import numpy as np
    from safetensors.numpy import save_file

    (tmp_path / "trainer_state.json").write_text(STATE.read_text())
    tensors = {
        f"m.{i}.lora_{x}.weight": np.full((4, 4), float(x == "A"), dtype=np.float32) for i in range(2) for x in "AB"
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert hygiene.unmoved(read_log(str(tmp_path)), None).weight == 2  # type: ignore[union-attr]
    tensors["m.1.lora_B.weight"][3, 3] = 1e-9
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = hygiene.unmoved(read_log(str(tmp_path)), None)
    assert found is not None
    assert (found.weight, "m.0.lora_B.weight" in found.text) == (1, True)


def test_rewards_are_no_likelihoods(tmp_path: Path) -> None:
    """GRPO logs: rates by the RL band, groups without signal, and no word on capacity from a loss near zero."""
    rows = [
        {"step": s, "loss": 0.01 * (-1) ** s, "reward": 0.3, "frac_reward_zero_std": 0.9, "learning_rate": 1e-6}
        for s in range(1, 60)
    ]
    (tmp_path / "grpo.jsonl").write_text("\n".join(map(json.dumps, rows)))
    d = diagnose(read_log(str(tmp_path / "grpo.jsonl")))
    assert "H-ADVANTAGE" in " ".join(e.text for e in d["hygiene"].evidence)
    assert any("policy gradient" in text for text in d.cannot)


def test_it_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    """The base install has no numpy, torch, yaml or matplotlib: a diagnosis and an SVG need none, a PNG says what to install."""
    blocked = ["numpy", "scipy", "torch", "transformers", "peft", "yaml", "matplotlib", "pandas"]
    script = (f"import sys\nfor n in {blocked!r}: sys.modules[n] = None\nfrom lora_planner.commands.diagnose import diagnose\n"
              "diagnose(sys.argv[1:])")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, str(STATE)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "hygiene" in done.stdout
    words = [sys.executable, "-c", script, str(STATE), "--plot"]
    done = subprocess.run([*words, str(tmp_path / "x.svg")], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.svg").read_text().startswith("<svg")
    done = subprocess.run([*words, str(tmp_path / "x.png")], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "lora-plan[report]" in done.stderr


def test_the_help_fits_a_screen_and_shows_an_example() -> None:
    result = cli("--help")
    assert result.output.count("\n") <= 40
    assert "lora-plan diagnose lora/ --ref full/" in result.output


def test_the_bar_is_the_reference_times_the_predicted_penalty() -> None:
    """Relation: at the reference's last point, and only where something is predicted."""
    from lora_planner.ledger import Estimate

    d = diagnose(a_run(log_linear(2.0), method="lora", rank=4), a_run(log_linear()))
    bar = picture.plot(d, Estimate(0.01, 0.02, 0.05, "relative loss", "fitted")).series[-1]
    end = log_linear()(200)
    assert (bar.x, *bar.low, *bar.y, *bar.high) == (
        (200.0,),
        pytest.approx(end * 1.01),
        pytest.approx(end * 1.02),
        pytest.approx(end * 1.05),
    )
    assert not any(s.low for s in picture.plot(d).series)


def test_a_refused_log_is_bad_input() -> None:
    """The class of error that exits with 3."""
    with pytest.raises(BadInput):
        read_log("no such log")
