"""Throughput and time of public rows: near what was published, the fit's shortcut is the formula, no row crashes."""

import math
from dataclasses import replace

import pytest

from calibrate import throughput
from calibrate.track import TABLES, board, mlperf, read, setting, speed
from lora_planner.facts import constants, gpu
from lora_planner.throughput import step_time
from lora_planner.workload import Division

MEASURED = read(TABLES / "measured.csv")
MLPERF = read(TABLES / "mlperf_llama2_70b_lora.csv")
PEFT = read(TABLES / "peft_l40s.csv")
NASTY = ("", "nan", "inf", "-1", "0", "1e300", "no number", "8|16", "None")


@pytest.fixture(scope="module")
def shipped():
    return [case for row in MEASURED for case in speed.cases(setting.read(row), row)]


def test_shipped_constants_predict_the_published_rates(shipped):
    """Half of the rows within 10 %, nine in ten inside their interval, every row a prediction or a reason."""
    rates = board.by_quantity(shipped)["tokens/s"]
    found = board.summary(rates)
    assert found.n > 200
    assert found.median < 0.10
    assert found.covered / found.asked >= 0.85
    assert all(case.predicted is not None or case.reason for case in shipped)


def test_every_measured_row_with_a_time_is_a_case(shipped):
    """No row that measured a rate or a time is dropped on the way."""
    timed = [
        row for row in MEASURED if (row["tokens_per_s"] or row["time_min"]) and not row["source"].startswith("MLPerf")
    ]
    assert sum(case.source != "mlperf" for case in shipped) >= len(timed)


def test_the_vectorised_fit_is_the_formula():
    """What the fit minimises and what the planner computes are the same seconds, row by row."""
    rows = throughput.observations()[::7]
    by = throughput.Fit({}, {}, throughput.np.zeros((0, 0)), {}, {})
    logs = {
        name: throughput.np.array([by.sum(throughput.parts_of(name, r.stack, r.gpu.name)) for r in rows])
        for name in throughput.PARTS
    }
    quick = throughput.np.exp(throughput.Model(rows).log_seconds(logs))
    slow = [throughput.predicted_s(row, by) for row in rows]
    assert quick == pytest.approx(slow, rel=1e-9)


def test_the_fit_recovers_the_constants_that_made_its_rows():
    """Rows timed by known constants give these back, however far they are from the priors."""
    rows = [r for r in throughput.observations() if r.source in ("qwen-readme", "fitcheck")]
    key = ("matmul_efficiency", "gpu", "t4-16gb")
    truth = replace(throughput.fit(rows), theta={**throughput.fit(rows).theta, key: math.log(0.4)})
    made = [replace(row, seconds=throughput.predicted_s(row, truth)) for row in rows]
    again = throughput.fit(made)
    asked = next(r for r in rows if r.gpu.name == "t4-16gb")
    assert again.value("matmul_efficiency", asked.stack, "t4-16gb") == pytest.approx(
        truth.value("matmul_efficiency", asked.stack, "t4-16gb"), rel=0.1
    )
    assert throughput.predicted_s(asked, again) == pytest.approx(throughput.predicted_s(asked, truth), rel=0.03)


def test_the_shipped_constants_are_those_of_the_fit():
    """constants.json holds what calibrate.throughput writes: matmul efficiency of every stack on its cards."""
    by = throughput.everything()
    shipped_rows = {(c.stack, c.gpu): c.value for c in constants() if c.name == "matmul_efficiency"}
    for stack, card in by.n:
        if throughput.ANY not in (stack, card):
            assert shipped_rows[stack, card] == pytest.approx(by.value("matmul_efficiency", stack, card), rel=0.03)


def test_left_out_rows_use_no_row_of_their_source():
    """A source that is left out is predicted by others: its stack has no rows of its own then."""
    rows = [r for r in throughput.observations() if r.source in ("litgpt", "fitcheck")]
    found = throughput.left_out(rows, lambda r: r.source, throughput.fit(rows))
    assert {e.tier for e in found} == {throughput.BORROWED}


def test_padded_lengths_grow_with_the_batch_and_stop_at_the_cut():
    """The longest of more samples is longer, never beyond the cut; alone, a sample is as long as the mean."""
    data = speed.Lengths(150, 0.7, 512)
    padded = [data.padded(b) for b in (1, 2, 4, 8, 64, 4096)]
    assert padded == sorted(padded)
    assert padded[0] == 150
    assert padded[-1] <= 512


def test_peft_times_are_near():
    """LoRA, full fine-tuning and the adapters that the planner knows, within 25 %; images have a reason."""
    found = {row["exp"]: case for row in PEFT for case in speed.peft_cases(row)}
    for name in (
        "lora/llama-3.2-3B-rank32",
        "lora/llama-3.2-3B-rank64-rslora",
        "full-finetuning/llama-3.2-3B-lr_0.00001",
    ):
        assert abs(found[name].error) < 0.25, name
    assert "no language model" in found["lora/flux2-klein-default"].reason


# ---------------------------------------------------------------- MLPerf


def test_mlperf_by_submitters_left_out():
    """Without a submitter's rows: tokens/s within 10 %, samples within 10 %, minutes within 15 % for half of them."""
    found = board.by_quantity(mlperf.held_out(MLPERF))
    assert board.summary(found["tokens/s"]).median < 0.10
    assert board.summary(found["samples to target"]).median < 0.10
    assert board.summary(found["minutes"]).median < 0.15
    covered = board.summary(found["samples to target"])
    assert covered.covered >= 0.85 * covered.asked


def test_the_law_of_samples_beats_the_batch_alone():
    """Fitted on batches up to 48, the law in batch and rate is nearer at 64 and 128 than one in the batch fitted on all."""
    entries = [mlperf.read_entry(row) for row in MLPERF]
    large = [e for e in entries if e.batch > 9]
    small = [e for e in entries if e.batch <= 48]
    law = mlperf.fit_samples(small)  # on batches up to 48, held against those of 64 and 128
    beyond = [e for e in large if e.batch > 48]
    error = [abs(math.log(law.samples(e.batch, e.lr).value / e.samples)) for e in beyond]
    alone = [abs(math.log(2791 * (1 + e.batch / 38) / e.samples)) for e in beyond]  # peers.md, fitted on all of them
    assert len(beyond) >= 7
    assert sorted(error)[len(error) // 2] < max(0.1, sorted(alone)[len(alone) // 2])


def test_more_samples_for_a_larger_batch_and_fewer_for_a_larger_rate():
    """Samples grow with the batch and fall with the learning rate; no rate stated is less sure."""
    law = mlperf.fit_samples([mlperf.read_entry(row) for row in MLPERF])
    assert law.samples(128, 5e-4).value > law.samples(8, 5e-4).value
    assert law.samples(64, 6e-4).value < law.samples(64, 3e-4).value
    unstated, stated = law.samples(64, None), law.samples(64, 5e-4)
    assert unstated.high / unstated.value > stated.high / stated.value


@pytest.mark.parametrize("column", list(MLPERF[0]))
@pytest.mark.parametrize("value", NASTY)
def test_no_mlperf_row_crashes(column, value):
    """Any cell may be anything: a case has a prediction or says why not."""
    for case in mlperf.cases([{**MLPERF[40], column: value}]):
        assert case.predicted is not None or case.reason


@pytest.mark.parametrize("column", list(MEASURED[0]))
@pytest.mark.parametrize("value", NASTY)
def test_no_measured_row_crashes(column, value):
    """The same for a row of each kind of publisher."""
    for at in (52, 87, 126, 200, 206, 240, 316):
        row = {**MEASURED[at], column: value}
        for case in speed.cases(setting.read(row), row):
            assert case.predicted is not None or case.reason


@pytest.mark.parametrize("column", list(PEFT[0]))
def test_no_peft_row_crashes(column):
    """The same for peft's table."""
    for value in NASTY:
        for case in speed.peft_cases({**PEFT[0], column: value}):
            assert case.predicted is not None or case.reason


def test_an_unknown_accelerator_has_a_reason():
    """A chip that is not in gpus.toml is named in the reason; its samples to target are predicted all the same."""
    cases = mlperf.cases([{**MLPERF[0], "accelerator": "Abacus X1"}])
    by = {case.quantity: case for case in cases}
    assert "Abacus X1" in by["tokens/s"].reason
    assert by["samples to target"].predicted is not None


def test_an_idle_division_changes_nothing():
    """One GPU that shares nothing does the whole step."""
    from calibrate.track.names import model_of
    from lora_planner.method import Method
    from lora_planner.throughput import stack
    from lora_planner.workload import divided, work

    model, method = model_of("llama-3.1-8b"), Method("lora", 16)
    copy = work(model, method, micro_batch=1, seq_len=1024)
    card = gpu("a100-sxm-80gb")
    one = divided(copy, model, method, Division(), micro_batches=1)
    rows = stack("nemo", card)
    assert step_time(one, card, rows).total == pytest.approx(step_time(copy, card, rows).total)
