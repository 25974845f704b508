"""Verdicts from synthetic runs, the commands that print them, and what they do on terminals that lack something."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from calibrate import verdict
from calibrate.score import scoreboard, scores
from calibrate.verdict import arm_table, arms, exit_code, noise_floor, verdicts
from lora_planner import cli
from lora_planner.facts import gpu
from lora_planner.ledger import Estimate, exact
from lora_planner.record import (
    DIVERGED,
    FAILED,
    FAILS,
    FINISHED,
    HOLDS,
    INTERRUPTED,
    INVALID,
    KILLED,
    NOT_RUN,
    OOM,
    QUEUED,
    UNDECIDED,
    RunRecord,
    RunSpec,
    Verdict,
    line,
    read_runs,
)
from runner import journal
from runner.board import Board
from runner.journal import Journal
from runner.sweep import Inline, Planned, sweep

ROOT = Path(__file__).parents[1]
TINY = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100}  # fmt: skip
#: huggingface.co/meta-llama/Llama-3.1-8B, config.json: 8,030,261,248 parameters
LLAMA_8B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
            "tie_word_embeddings": False}  # fmt: skip
PREDICTED = {"trainable": exact(1000, "params"), "step_s": Estimate(0.5, 1.0, 2.0, "s", "fitted"),
             "peak_bytes": Estimate(8e8, 1e9, 1.2e9, "B", "fitted")}  # fmt: skip
START = 3.0
SPEC = RunSpec("base", "shift", rank=4, steps=10)
RATES = (1e-4, 1e-3, 1e-2)
#: a base of our own, and the text it is tuned on
STORY = {"nats": 2.5, "bigram_nats": 2.6}
COUNTED = {"bigram_nats": 3.2, "unigram_nats": 4.0}


def run(end: float | None = 2.0, status: str = FINISHED, start: float = START, config: Mapping[str, Any] = TINY,
        measured: Mapping[str, Any] | None = None, **words: Any) -> RunRecord:  # fmt: skip
    """A run that went from `start` to `end`; None: it ended before its last held-out loss."""
    spec = replace(SPEC, **words)
    found = {"trainable": 1000, "step_s": [9.0, 9.0, 1.0, 1.0], "peak_bytes": {"gradients": 1e9}, "drift": 0.01,
             "held_out": [[0, start]] + ([[spec.steps, end]] if end is not None else []), "task": COUNTED, "base": STORY}  # fmt: skip
    return RunRecord(spec.key, spec, dict(config), PREDICTED, status, measured={**found, **(measured or {})})


def arm(ends: Sequence[float], rates: Sequence[float] = RATES, **words: Any) -> list[RunRecord]:
    return [run(end, lr=rate, **words) for end, rate in zip(ends, rates, strict=True)]


FULL: dict[str, Any] = {"method": "full", "rank": 0, "alpha": 0.0}
SCRATCH = {**FULL, "init": "random"}


def everything(**words: Any) -> list[RunRecord]:
    """A verification in which all goes as predicted."""
    lora, full = arm([2.5, 2.2, 2.6], **words), arm([2.5, 2.1, 2.6], **FULL, **words)
    return [*lora, *full, *arm([2.9, 2.8, 2.85], start=5.0, **SCRATCH, **words), run(2.201, repeat=1, lr=1e-3, **words)]


def judged(runs: Sequence[RunRecord]) -> dict[str, Verdict]:
    return {v.claim: v for v in verdicts(runs, scores(runs))}


# ---------------------------------------------------------------- what is predicted about this machine


def test_counts_hold_to_the_last_parameter() -> None:
    """One parameter more than planned, in one run, fails; without a run there is nothing to say."""
    runs = everything()
    assert judged(runs)["counts"].status == HOLDS
    off = run(lr=0.5, measured={"trainable": 1001})
    found = judged([*runs, off])["counts"]
    assert (found.status, found.keys, found.n) == (FAILS, (off.key,), len(runs) + 1)
    assert judged([])["counts"].status == NOT_RUN


@pytest.mark.parametrize(
    ("inside", "outside", "status"), [(17, 3, HOLDS), (16, 4, FAILS), (1, 0, HOLDS), (0, 1, FAILS)]
)
def test_an_interval_must_hold_what_it_promises(inside: int, outside: int, status: str) -> None:
    """85 % of measurements inside the 90 % interval: no less; what lies outside is named, none is dropped."""
    runs = [run(seed=i, measured={"step_s": [0, 0, 1.9 if i < inside else 2.1]}) for i in range(inside + outside)]
    found = judged(runs)["step time"]
    assert (found.status, found.n) == (status, inside + outside)
    assert set(found.keys) == {r.key for r in runs[inside:]}


def test_the_effect_is_the_ratio_with_its_range() -> None:
    """Measured over predicted: lowest, median, highest."""
    found = judged([run(seed=i, measured={"step_s": [0, 0, s]}) for i, s in enumerate((0.6, 1.2, 1.8))])["step time"]
    assert found.effect
    assert (found.effect.low, found.effect.value, found.effect.high) == (0.6, 1.2, 1.8)


@pytest.mark.parametrize(("calm", "drifted", "status", "n"), [
    (4, 0, HOLDS, 4), (3, 2, HOLDS, 3), (2, 2, HOLDS, 2), (2, 3, UNDECIDED, 2), (0, 1, UNDECIDED, 0)])  # fmt: skip
@pytest.mark.parametrize("drift", [0.06, -0.06])
def test_drift_of_the_control_kernel(drift: float, calm: int, drifted: int, status: str, n: int) -> None:
    """Runs whose control kernel drifted by more than 5 % do not count; where most did, timing is undecided (F12)."""
    bad = {"drift": drift, "step_s": [0, 0, 50.0]}  # far outside the interval: they would fail it
    runs = [run(seed=i) for i in range(calm)] + [run(seed=100 + i, measured=bad) for i in range(drifted)]
    found = judged(runs)["step time"]
    assert (found.status, found.n) == (status, n)
    assert judged(runs)["counts"].n == calm + drifted, "drift says nothing about counts"


def test_five_percent_is_no_drift_and_none_was_measured() -> None:
    """The limit itself is calm; a run that diverged has no control kernel after it and still counts."""
    runs = [run(measured={"drift": 0.05}), run(seed=1, measured={"drift": None}, status=DIVERGED)]
    assert judged(runs)["step time"].n == 2


# ---------------------------------------------------------------- what is predicted about losses


def test_a_pretrained_base() -> None:
    """Better than pairs of its own text, and after fine-tuning than random weights: holds, and says all numbers."""
    found = judged(everything())["base is pre-trained"]
    assert found.status == HOLDS
    for number in ("2.500", "2.600", "3.000", "4.000", "3.200", "2.100", "2.800"):
        assert number in found.sentence


@pytest.mark.parametrize(("own", "scratch", "status"), [
    (2.5, 2.8, HOLDS), (2.7, 2.8, FAILS), (2.5, 2.0, FAILS), (2.7, 2.0, FAILS), (2.6, 2.8, FAILS), (2.5, 2.1, FAILS),
    (2.5, None, HOLDS), (2.7, None, FAILS), (None, 2.8, HOLDS), (None, 2.0, FAILS), (None, None, UNDECIDED)])  # fmt: skip
def test_what_a_base_must_beat(own: float | None, scratch: float | None, status: str) -> None:
    """Pairs counted in its own text (2.6) and weights from scratch (against 2.1): each test that was made must be
    passed, a tie is no pass; where none was made nobody knows."""
    known = {"base": {**STORY, "nats": own} if own else {}, "task": {}}
    runs = arm([2.5, 2.1, 2.6], measured=known, **FULL)
    if scratch:
        runs += arm([scratch + 0.1, scratch, scratch + 0.2], start=5.0, measured=known, **SCRATCH)
    assert judged(runs)["base is pre-trained"].status == status


@pytest.mark.parametrize(("unigram", "status"), [(3.1, HOLDS), (3.0, FAILS), (2.9, FAILS)])
def test_what_a_users_base_must_beat(unigram: float, status: str) -> None:
    """Nobody knows the text of a user's base: it starts below token frequencies of the new one."""
    known = {"base": {}, "task": {"unigram_nats": unigram, "bigram_nats": 1.0}}
    assert judged(arm([2.5, 2.1, 2.6], measured=known, **FULL))["base is pre-trained"].status == status


def test_a_random_base_is_not_taken_for_the_base() -> None:
    """The start of a run from scratch says nothing about the base; without any other run: not run."""
    scratch = arm([2.9, 2.8, 2.85], start=1.0, seed=7, **SCRATCH)
    assert judged(scratch)["base is pre-trained"].status == NOT_RUN
    assert "3.000 before fine-tuning" in judged([*scratch, *everything()])["base is pre-trained"].sentence


@pytest.mark.parametrize(("end", "rerun", "status"), [
    (2.5, 2.5, HOLDS), (3.1, 3.1, FAILS), (3.0, 3.0, FAILS), (2.97, 2.975, HOLDS), (2.97, 2.99, FAILS)])  # fmt: skip
def test_an_arm_must_beat_the_noise(end: float, rerun: float, status: str) -> None:
    """The best run ends below its start by more than twice what a rerun of the same seed differs by."""
    full = arm([2.5, 2.1, 2.6], **FULL)
    runs = [*full, *arm([end, end, end]), run(rerun, lr=RATES[0], repeat=1)]
    found = judged(runs)["both arms learn"]
    assert found.status == status
    assert ("not better: lora r4" in found.sentence) == (status == FAILS)


def test_an_invalid_run_fails_the_arms() -> None:
    """An adapter that did not move is no slow learner: the runs are named."""
    bad = run(None, INVALID, seed=5)
    found = judged([*everything(), bad])["both arms learn"]
    assert (found.status, found.keys) == (FAILS, (bad.key,))
    assert judged([bad])["both arms learn"].status == FAILS
    assert judged([])["both arms learn"].status == NOT_RUN


@pytest.mark.parametrize(("status", "expected"), [
    (DIVERGED, FAILS), (OOM, UNDECIDED), (KILLED, UNDECIDED), (INTERRUPTED, UNDECIDED), (QUEUED, UNDECIDED)])  # fmt: skip
def test_an_arm_without_a_finished_run_is_not_forgotten(status: str, expected: str) -> None:
    """Full fine-tuning alone does not show that both arms learn: the other one is named."""
    measured = {"held_out": []} if status != DIVERGED else {}
    lora = [run(None, status, lr=rate, measured=measured) for rate in RATES]
    found = judged([*arm([2.5, 2.1, 2.6], **FULL), *lora])["both arms learn"]
    assert found.status == expected
    assert "lora r4" in found.sentence


#: the tinker-cookbook sweep of Llama-3.1-8B has rank 16 at 0.58 % above rank 128; 30 % is nobody's
@pytest.mark.parametrize(("gap", "status", "code"), [(0.0058, HOLDS, 0), (0.30, FAILS, 7)])
def test_lora_against_full_at_a_size_that_was_measured(gap: float, status: str, code: int) -> None:
    """On a base of 8B the predicted penalty of the rank is held against the measured one."""
    full = arm([2.2, 2.0, 2.3], config=LLAMA_8B, **FULL)
    lora = arm([2.7, 2.0 * (1 + gap), 2.8], [1e-3, 1e-2, 1e-1], config=LLAMA_8B, rank=16)
    found = verdict.low_rank([*full, *lora])
    assert found.status == status
    assert f"{gap:+.1%} at 10.0x the rate of full (predicted " in found.sentence
    assert exit_code([found]) == code


@pytest.mark.parametrize("ends", [[2.0, 2.1, 2.2], [2.2, 2.1, 2.0]])
def test_a_best_rate_at_the_edge_decides_nothing(ends: list[float]) -> None:
    """The optimum may lie outside the grid: undecided, the arm is named, and for a predicted gap the exit code is 8."""
    full = arm([2.2, 2.0, 2.3], config=LLAMA_8B, **FULL)
    found = verdict.low_rank([*full, *arm(ends, config=LLAMA_8B, rank=16)])
    assert found.status == UNDECIDED
    assert "edge of the grid: lora r16" in found.sentence
    assert exit_code([found]) == 8


def test_lora_against_full_on_a_tiny_base() -> None:
    """Nobody predicted a penalty for it: shown, undecided, and no reason for an exit code."""
    found = verdict.low_rank(everything())
    assert (found.status, found.effect) == (UNDECIDED, None)
    assert "predicted" in found.sentence
    assert "+4.8%" in found.sentence  # 2.2 over 2.1
    assert exit_code([found, Verdict("counts", HOLDS, "")]) == 0


def test_lora_is_compared_with_full_of_its_own_base_and_length() -> None:
    """Another base, another number of steps: no pair."""
    lora = arm([2.5, 2.2, 2.6])
    assert verdict.low_rank([*lora, *arm([2, 1, 2], base="other", **FULL)]).status == NOT_RUN
    assert verdict.low_rank([*lora, *arm([2, 1, 2], steps=20, **FULL)]).status == NOT_RUN
    assert verdict.low_rank([*lora, *arm([2, 1, 2], **SCRATCH)]).status == NOT_RUN


@pytest.mark.parametrize(("statuses", "code"), [
    ([HOLDS, HOLDS], 0), ([HOLDS, FAILS], 7), ([UNDECIDED, FAILS], 7), ([HOLDS, UNDECIDED], 8), ([NOT_RUN], 8)])  # fmt: skip
def test_exit_codes(statuses: list[str], code: int) -> None:
    """7 where anything failed, 8 where anything stayed open, else 0."""
    assert exit_code([Verdict(f"claim {i}", status, "") for i, status in enumerate(statuses)]) == code


# ---------------------------------------------------------------- arms and noise


def test_an_arm_is_a_mean_over_seeds() -> None:
    """Losses by rate are means over seeds, best is the lowest mean, and a rerun of a seed has no vote."""
    runs = [run(end, lr=rate, seed=seed) for rate, ends in zip(RATES, [(2, 3), (1, 2), (3, 3)], strict=True)
            for seed, end in enumerate(ends)]  # fmt: skip
    [found] = arms([*runs, run(0.1, lr=1e-4, repeat=1)])
    assert found.losses == {1e-4: 2.5, 1e-3: 1.5, 1e-2: 3.0}
    assert (found.best, found.seeds, found.bracketed) == ((1e-3, 1.5), 2, True)


@pytest.mark.parametrize(("ends", "bracketed"), [
    ([3, 2, 3], True), ([2, 3, 4], False), ([4, 3, 2], False), ([3, 2, None], True), ([None, 2, 3], True),
    ([2, 3, None], False)])  # fmt: skip
def test_bracketed(ends: list[float | None], bracketed: bool) -> None:
    """A best rate counts as found with something worse on both sides; a diverged run (None) is worse."""
    runs = [run(end, FINISHED if end else DIVERGED, lr=rate) for end, rate in zip(ends, RATES, strict=True)]
    assert arms(runs)[0].bracketed == bracketed


def test_a_diverged_run_is_listed_and_never_best() -> None:
    """Neither its last held-out loss nor the seeds that survived at its rate make a best."""
    diverged = run(0.5, DIVERGED, lr=1e-2)
    survivor = run(0.6, lr=1e-2, seed=1)
    [found] = arms([*arm([2.5, 2.2], RATES[:2]), diverged, survivor])
    assert found.diverged == (1e-2,)
    assert found.best == (1e-3, 2.2)
    table = "\n".join(arm_table([found]))
    assert "| lora r4 | 2.500 | 2.200 | diverged | 2.200 at 1.0e-03 |" in table
    assert "0.6" not in table


def test_an_arm_that_only_diverged_is_shown() -> None:
    """All its rates in the table, no best among them, and no verdict dies of it."""
    runs = [run(0.5, DIVERGED, lr=rate) for rate in RATES]
    [found] = arms(runs)
    assert math.isinf(found.best[1])
    assert not found.bracketed
    assert "| lora r4 | diverged | diverged | diverged | none |" in arm_table([found])
    assert judged([*runs, *arm([2.5, 2.1, 2.6], **FULL)])["LoRA against full"].status == NOT_RUN


@pytest.mark.parametrize("status", [OOM, INTERRUPTED, KILLED, INVALID, FAILED])
def test_only_finished_runs_have_a_loss(status: str) -> None:
    """What was interrupted at a low loss is no result."""
    [found] = arms([*arm([2.5, 2.2, 2.6]), run(0.1, status, lr=5e-3)])
    assert found.losses == {1e-4: 2.5, 1e-3: 2.2, 1e-2: 2.6}


def test_arms_are_kept_apart_and_in_order() -> None:
    """Full, then by rank, from scratch last; probes and RL are no arms."""
    kinds = [{"rank": 16}, {"rank": 4}, SCRATCH, FULL, {"rank": 4, "method": "dora"},
             {"task": "probe"}, {"objective": "rl"}]  # fmt: skip
    runs = [r for kind in kinds for r in arm([3, 2, 3], **kind)]
    names = ["full", "dora r4", "lora r4", "lora r16", "full from scratch"]
    for _ in range(5):
        random.Random(0).shuffle(runs)
        assert [a.name for a in arms(runs)] == names


def test_the_table_of_arms() -> None:
    """A row an arm, a column a rate; a rate that an arm did not try is empty, an edge is marked."""
    found = arms([*arm([2.5, 2.2, 2.6]), *arm([2.0, 2.1], RATES[1:], **FULL)])
    assert arm_table(found) == [
        "base, shift, 10 steps of 8 x 128, 1 seed(s):", "",
        "| arm | 1.0e-04 | 1.0e-03 | 1.0e-02 | best |",
        "|---|---|---|---|---|",
        "| full |  | 2.000 | 2.100 | 2.000 at 1.0e-03 (edge) |",
        "| lora r4 | 2.500 | 2.200 | 2.600 | 2.200 at 1.0e-03 |", "",
    ]  # fmt: skip
    single = arms([run(2.5, lr=1e-4, rank=4), run(2.4, lr=1e-4, rank=4, targets=("mlp",))])
    assert [arm.name for arm in single] == ["lora r4", "lora r4 mlp"], "placements are arms of their own"
    assert arm_table([]) == arm_table(single) == ["No arm finished at two learning rates."]


def test_noise_floor() -> None:
    """The widest spread between reruns of one spec; other seeds, rates and diverged reruns are no reruns (F17)."""
    same = [run(2.0), run(2.01, repeat=1), run(1.98, repeat=2)]
    others = [
        run(1.0, seed=1),
        run(1.5, lr=0.5),
        run(9.0, DIVERGED, repeat=3),
        run(2.5, rank=8),
        run(2.5, rank=8, repeat=1),
    ]
    assert noise_floor([*same, *others]) == pytest.approx(0.03)
    assert noise_floor(others[:2]) is None


# ---------------------------------------------------------------- the commands


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.main, words, env={"COLUMNS": "100"})


def record(directory: Path, runs: Sequence[RunRecord]) -> Path:
    """A journal as the sweep writes it: a run that is queued was never started, an interrupted one never ended."""
    with Journal.open(directory) as log:
        for r in runs:
            log.append(journal.planned(r.spec, r.config, r.predicted))
            if r.status != QUEUED:
                log.append(journal.started(r.key, {"device": "cpu"}))
            if r.status not in (QUEUED, INTERRUPTED):
                log.append(journal.ended(r.key, r.status, r.measured, r.reason))
    return directory / "runs.jsonl"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[RunRecord]], Result]:
    """`lora-plan verify` whose runs were these."""

    def command(runs: Sequence[RunRecord], *words: str) -> Result:
        stand_in = SimpleNamespace(run_arms=lambda *_: list(runs))
        scene = SimpleNamespace(gpu=gpu("h100-sxm-80gb"), source=SimpleNamespace(key="base"))
        monkeypatch.setattr(cli, "_runner", lambda: stand_in)
        monkeypatch.setattr(cli, "_scene", lambda *_: scene)
        return invoke("verify", *words)

    return command


def test_verify_exits_with_what_it_found(verified: Callable[..., Result]) -> None:
    """0 where all holds, 7 where something fails, 8 where it stays open, 9 where nothing finished; no traceback."""
    good = everything()
    for runs, code, word in (
        (good, 0, "holds"),
        ([*good, run(seed=9, measured={"trainable": 1})], 7, "fails"),
        ([replace(r, measured={**r.measured, "drift": 0.2}) for r in good], 8, "undecided"),
    ):
        done = verified(runs)
        assert done.exit_code == code, done.output
        assert word in done.stdout
        assert "LoRA against full" in done.stdout
    done = verified([run(None, OOM)])
    assert done.exit_code == 9
    assert done.stderr.startswith("lora-plan: none of 1 runs finished")


def test_verify_json(verified: Callable[..., Result]) -> None:
    """One object on stdout with the verdicts, the arms and the exit code, also with an arm that only diverged."""
    runs = [*everything(), *(run(None, DIVERGED, lr=rate, rank=8) for rate in RATES)]
    done = verified(runs, "--json")
    document = json.loads(done.stdout, parse_constant=pytest.fail)
    assert document["exit_code"] == done.exit_code == 7
    assert len(document["result"]["verdicts"]) == 6
    assert [a["name"] for a in document["result"]["arms"]] == ["full", "lora r4", "lora r8", "full from scratch"]
    assert "lora r8" in verified(runs).stdout


def test_report_reads_around_damage(tmp_path: Path) -> None:
    """A torn last line and a flipped byte are skipped, named on stderr, and everything else is counted."""
    path = record(tmp_path, everything())
    lines = path.read_bytes().splitlines(keepends=True)
    whole = len(read_runs(path))
    middle = bytearray(lines[5])  # an "ended"
    middle[len(middle) // 2] ^= 1
    torn = line({"event": "started", "key": "x"}).encode()[:-9]
    path.write_bytes(b"".join([*lines[:5], bytes(middle), *lines[6:], torn]))
    done = invoke("report", str(path))
    assert done.exit_code == 0
    told = done.stderr.splitlines()
    assert [text.split(":")[1] for text in told] == [
        " skipped line 6 of runs.jsonl", f" skipped line {len(lines) + 1} of runs.jsonl"]  # fmt: skip
    assert told[1].endswith("the line was never finished")
    assert f"| finished | {whole - 1} |" in done.stdout
    assert "| interrupted | 1 |" in done.stdout
    assert f"| all | {whole} |" in done.stdout


@pytest.mark.parametrize("name", ["none.jsonl", "."])
def test_report_without_a_journal(name: str, tmp_path: Path) -> None:
    """A missing file, or a directory: exit 3, one line that says what to do."""
    done = invoke("report", str(tmp_path / name))
    assert (done.exit_code, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1
    assert "lora-plan verify" in done.stderr


def test_report_to_a_place_that_is_not_there(tmp_path: Path) -> None:
    """Exit 3 and one line; to a place that is there, the page and nothing on the terminal."""
    path = record(tmp_path, [run()])
    done = invoke("report", str(path), "--to", str(tmp_path / "none" / "page.md"))
    assert done.exit_code == 3
    assert len(done.stderr.splitlines()) == 1
    done = invoke("report", str(path), "--to", str(tmp_path / "page.md"))
    assert (done.exit_code, done.output) == (0, "")
    assert (tmp_path / "page.md").read_text().startswith("# Predicted before the run, measured after it\n")


def test_report_counts_every_status(tmp_path: Path) -> None:
    """No run is left out, however it ended."""
    statuses = (FINISHED, DIVERGED, OOM, INTERRUPTED, KILLED, INVALID, FAILED, QUEUED)
    runs = [run(None, status, seed=10 * i + j) for i, status in enumerate(statuses) for j in range(i + 1)]
    page = invoke("report", str(record(tmp_path, runs))).stdout
    for i, status in enumerate(statuses):
        assert f"| {status} | {i + 1} |" in page
    assert f"| all | {len(runs)} |" in page


def test_the_page_does_not_depend_on_order(tmp_path: Path) -> None:
    """The same runs, planned in another order or in two journals, give the same bytes."""
    others = [run(2.4, seed=1, rank=8), run(None, OOM, seed=2), run(0.1, DIVERGED, seed=3, lr=1e-1)]
    runs = [*everything(), *arm([3, 2, 3], method="dora"), *arm([3, 2.5, 3], base="other"), *others]
    pages = set()
    for i in range(4):
        random.Random(i).shuffle(runs)
        pages.add(invoke("report", str(record(tmp_path / str(i), runs))).stdout_bytes)
    halves = [str(record(tmp_path / name, some)) for name, some in (("a", runs[:9]), ("b", runs[9:]))]
    pages |= {invoke("report", *halves).stdout_bytes, invoke("report", *reversed(halves)).stdout_bytes}
    assert len(pages) == 1
    assert scoreboard(scores(runs), runs).encode() in pages.pop()


# ---------------------------------------------------------------- terminals that lack something (F19)

RECOMMEND = ("recommend", "--model", "qwen3-8b", "--tokens", "10M", "--gpu", "h100-sxm-80gb")
ASCII = ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})


def process(*words: str, shell: str = "", env: Mapping[str, str] | None = None, stdout: int = subprocess.PIPE,
            stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """A whole process; `shell` is what a shell does with it, where "$@" is the command."""
    command = [sys.executable, *words]
    if shell:
        command = ["sh", "-c", shell, "sh", *command]
    # buffered, as from a shell: what is left in the buffer is written at exit, after every handler
    around = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **(env or {})}
    return subprocess.run(command, stdout=stdout, stderr=stderr, text=True, timeout=60, cwd=ROOT, env=around)


@contextmanager
def unread() -> Iterator[int]:
    """The end of a pipe to write to; the other one is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    path = record(tmp_path_factory.mktemp("runs-é"), everything())
    return [("-m", "lora_planner", *words) for words in (("report", str(path)), RECOMMEND)]


def test_output_that_nobody_reads(commands: list[tuple[str, ...]]) -> None:
    """Piped into `head -1`, into a pipe that is closed already, or with stdout closed: silent, and no error."""
    for words in commands:
        done = process(*words, shell='"$@" | head -n 1')
        assert (len(done.stdout.splitlines()), done.stderr) == (1, ""), words
        done = process(*words, shell='exec "$@" >&-')
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), words
        with unread() as pipe:
            broken = process(*words, stdout=pipe)
        assert (broken.returncode, broken.stderr) == (0, ""), words


@pytest.mark.parametrize("env", ASCII, ids=["PYTHONIOENCODING", "LC_ALL"])
def test_output_in_ascii(env: dict[str, str], commands: list[tuple[str, ...]]) -> None:
    """The same answer in signs that the terminal has."""
    for words in commands:
        done = process(*words, env=env)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout.isascii()
        assert len(done.stdout.splitlines()) > 5


def test_a_terminal_of_20_columns(commands: list[tuple[str, ...]]) -> None:
    """Narrow is ugly, not fatal; the page of the report is a file and is not wrapped."""
    for words in commands:
        done = process(*words, env={"COLUMNS": "20"})
        assert (done.returncode, done.stderr) == (0, ""), words
    report = process(*commands[0], env={"COLUMNS": "20"}).stdout
    assert report == process(*commands[0], env={"COLUMNS": "200"}).stdout


SHOW = """
from calibrate.probe import Errors
from calibrate.verdict import Arm
from lora_planner import render
from lora_planner.cli import main
from lora_planner.facts import Constant, gpu
from lora_planner.record import Verdict

@main.command()
def show():
    card, arm = gpu("h100-sxm-80gb"), Arm("base", "shift", "lora r4", {1e-3: 2.0}, (1e-2,), 1)
    render.show_verification(card, "base", [arm], [Verdict("time", "holds", "x/\\u00f7 1.3 \\u2265 \\u2588")], "b\\u00e9")
    row = Constant("launch_s", "lora-plan", card.name, 8e-6, 7e-6, 9e-6, "fitted", 8, "a probe")
    errors = [Errors("step_s", 3, 0.5, 0.9, 0, 0.1, 0.2, 3)]
    render.show_calibration(card, {row.name: row}, [row], {"seen": errors}, "/home/\\u017e/constants.json")

main(["show"])
"""


@pytest.mark.parametrize(
    "env", [ASCII[0], {**ASCII[1], "COLUMNS": "20"}], ids=["PYTHONIOENCODING", "LC_ALL, 20 columns"]
)
def test_verification_and_calibration_in_ascii(env: dict[str, str]) -> None:
    """Signs from elsewhere (a path, a sentence) become question marks where the terminal has none for them."""
    done = process("-c", SHOW, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    for word in ("holds", "(edge)", "/home/?/"):  # cells are folded, not cut
        assert word in done.stdout


def test_sentences_are_ascii() -> None:
    """What we write ourselves has a form on every terminal."""
    for found in judged(everything()).values():
        assert found.sentence.isascii(), found.sentence


# ---------------------------------------------------------------- the board


@dataclass
class End:
    """What an executor's function returns."""

    status: str = FINISHED
    measured: dict[str, Any] = field(default_factory=lambda: {"held_out": [[0, 3.0], [10, 2.0]]})
    reason: str = ""


PLANNED = [Planned(replace(SPEC, seed=i), TINY, PREDICTED) for i in range(3)]


class Gone(io.StringIO):
    """A stderr of which nothing is left after some writes."""

    def __init__(self, error: Exception, terminal: bool, after: int) -> None:
        super().__init__()
        self.error, self.terminal, self.after = error, terminal, after

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.after -= 1
        if self.after < 0:
            raise self.error
        return super().write(text)


def executed(spec: RunSpec, stop: Callable[[], bool]) -> End:
    return End()


def test_without_a_terminal_a_run_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text, one line for the start and one a run, never wrapped however narrow; markup is text."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    endings = iter([End(), End(OOM, {}, "[red]out of memory :warning: " + "x" * 200), End(), End()])
    sweep(tmp_path, PLANNED[:2], Inline(lambda spec, stop: next(endings)), Board())
    told = sys.stderr.getvalue().splitlines()
    assert told[0].startswith("2 runs, about 20 s of training expected")
    assert told[1].startswith("1/2 shift lora r4 lr 1.0e-03 seed 0 finished held out 3.000 -> 2.000")
    assert told[2] == "2/2 shift lora r4 lr 1.0e-03 seed 1 oom: [red]out of memory :warning: " + "x" * 200
    assert len(told) == 5, "the retry with half the micro-batch, and its own beginning"
    assert "\x1b" not in "".join(told)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "terminal gone"), ValueError("closed file")],
                         ids=["pipe", "hang-up", "closed"])  # fmt: skip
def test_a_stderr_that_goes_away_ends_no_sweep(error: Exception, terminal: bool, after: int, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The showing ends, the runs go on and are recorded."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Gone(error, terminal, after))
    runs = sweep(tmp_path, PLANNED, Inline(executed), Board())
    assert [r.status for r in runs] == [FINISHED] * 3


def test_no_stderr_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&-`: Python has no stderr then."""
    monkeypatch.setattr(sys, "stderr", None)
    assert len(sweep(tmp_path, PLANNED, Inline(executed), Board())) == 3


SWEEP = """
import sys
from pathlib import Path
from tests.test_verdict import PLANNED, Board, Inline, executed, sweep
print(len(sweep(Path(sys.argv[1]), PLANNED, Inline(executed), Board())))
"""


def test_stdout_survives_a_broken_stderr(tmp_path: Path) -> None:
    """`2> >(head -1)`: nobody reads the board, the result still comes."""
    with unread() as pipe:
        done = process("-c", SWEEP, str(tmp_path), stderr=pipe)
    assert (done.returncode, done.stdout) == (0, "3\n")
