"""Rows of public measurements as settings, and the peaks that the planner says of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy")
pytest.importorskip("scipy")

from calibrate import memory as peaks
from calibrate.track import measured, names, peft_l40s
from calibrate.track.setting import read
from lora_planner.activations import Kept
from lora_planner.arch import from_config
from lora_planner.megatron import Layout, megatron
from lora_planner.memory import ALONE, LOGITS, Split, memory, weights
from lora_planner.method import method
from lora_planner.model_source import load_model
from lora_planner.units import GIB

TABLES = Path(peaks.__file__).parent / "tables"
FULL = method("full")


def table(name: str) -> list[dict[str, str]]:
    with (TABLES / name).open() as file:
        return list(csv.DictReader(file))


ROWS = table("measured.csv")


# ---------------------------------------------------------------- golden: names


@pytest.mark.parametrize("name", sorted(names.shapes()))
def test_a_shape_has_the_parameters_that_its_publisher_states(name: str) -> None:
    """The config's facts rebuild the published total, in billions to three digits."""
    row = names.shapes()[name]
    assert names.build(row["config"], name).total / 1e9 == pytest.approx(row["params_b"], rel=0.004)


def test_no_spelling_names_two_models() -> None:
    """A name and its other spellings lead to the row that has them."""
    for name, row in names.shapes().items():
        for spelling in (name, *row["also"]):
            found = names.config_of(spelling)
            assert found is not None
            assert found[0] == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("meta-llama/Llama-3.2-3B", "llama-3.2-3b"), ("Llama 2 7B", "llama-2-7b"), ("Llama-2-70B (fused qkv)", "llama-2-70b"),
        ("Qwen-72B (v1)", "qwen-72b"), ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("Qwen2-7B-Instruct", "qwen2.5-7b"),
        ("mistral-7b-v0.2", "mistral-7b"), ("DeepSeek-V3 671B", "deepseek-v3"), ("gemma-2b", "gemma-2b"),
        ("gemma2-2b", "gemma-2-2b"), ("MPT-70b", "mpt-70b"), ("Llama-4-Scout 109B-A17B", "llama-4-scout"),
        ("StableLM Alpha 3B", "stablelm-alpha-3b"), ("Qwen3-30B-A3B", "qwen3-30b-a3b"),
    ],
)  # fmt: skip
def test_usual_spellings_of_models_are_understood(text: str, name: str) -> None:
    found = names.model_of(text)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("text", ["", "nobody/heard-of-it-9b", "Llama-3.1-9B", "mistral-7b-of-another-shape", "7b"])
def test_an_unknown_model_is_none_and_no_neighbour(text: str) -> None:
    assert names.model_of(text) is None


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA L40S", "l40s-48gb"), ("A100-SXM4-40GB", "a100-sxm-40gb"), ("A100 80GB", "a100-sxm-80gb"),
        ("H100-80GB SXM", "h100-sxm-80gb"), ("A6000 Ada 48GB", "rtx-6000-ada-48gb"), ("RTX A6000", "rtx-a6000-48gb"),
        ("NVIDIA Blackwell GPU (B200-SXM-180GB)", "b200-180gb"), ("A10G 24GB", "a10g-24gb"),
        ("H100-96GB HBM2e 500W", None), ("A100", None), ("unstated", None), ("", None), ("RTX 4090 Laptop", None),
    ],
)  # fmt: skip
def test_spellings_of_gpus(text: str, name: str | None) -> None:
    """One product, or none: an A100 of unstated size is no A100 of 80 GB."""
    found = names.gpu_of(text)
    assert (found.name if found else None) == name


# ---------------------------------------------------------------- golden: settings


def row_of(**cells: str) -> dict[str, str]:
    return {**dict.fromkeys(measured.COLUMNS, ""), **cells}


def test_units_bounds_and_accumulation_are_read_as_published() -> None:
    """GB that the table left as published are GB; an OOM is the card; a global batch gives the accumulation."""
    gb = read(row_of(source="x", model="Llama-2-7B", method="LoRA", peak_mem_GiB="25.7", extra="GB as published"))
    assert gb.memory[0].bytes == 25.7e9
    converted = read(
        row_of(source="x", model="Llama-2-7B", method="LoRA", peak_mem_GiB="60.07", extra="64.5GB as published")
    )
    assert converted.memory[0].bytes == pytest.approx(64.5e9, rel=1e-3)
    oom = read(row_of(source="x", model="Llama-2-7B", method="LoRA", peak_mem_GiB="OOM", gpu="A10G 24GB"))
    assert oom.memory[0].at_least
    assert oom.memory[0].bytes == oom.card_bytes
    batch = read(
        row_of(source="x", model="Llama-2-7B", method="LoRA", micro_batch="2", n_gpus="8", extra="GBS=32; TP=2")
    )
    assert batch.accumulation == 4


def test_a_recipe_is_run_on_the_model_of_its_file() -> None:
    """litgpt's table repeats gemma-2b in the rows of gemma2-2b."""
    of = read(
        row_of(
            source="Lightning-AI/litgpt config_hub/finetune/README.md + gemma2-2b/lora.yaml",
            model="gemma-2b",
            method="LoRA",
        )
    )
    assert of.model is not None
    assert of.model.name == "gemma-2-2b"


def test_trainable_parameters_are_those_that_the_publishers_state() -> None:
    """Targets are translated so that the count is the published one."""
    from lora_planner.params import trainable_params

    stated = [s for s in map(read, ROWS) if s.trainable and s.method and s.model and not s.variant]
    assert len(stated) > 40
    for s in stated:
        assert s.model is not None
        assert s.method is not None
        if s.method.name != "dora":  # the planner counts its magnitudes too, peft's row does as well
            assert trainable_params(s.model, s.method) == s.trainable, s.label


# ---------------------------------------------------------------- golden: peaks

EXACTLY_KNOWN = [
    # source, words of the row, relative tolerance: where the trainer's code says what is kept
    ("resource-tables", "LoRA,8", 0.04),
    ("SimuMax", "Megatron", 0.04),
    ("fitcheck", "LoRA", 0.05),
]


@pytest.mark.parametrize(("source", "words", "tolerance"), EXACTLY_KNOWN)
def test_tensors_that_a_trainer_keeps_are_counted(source: str, words: str, tolerance: float) -> None:
    """torch's own count of allocated bytes, before any constant is added."""
    n = 0
    for row in ROWS:
        s = read(row)
        if source not in row["source"] or words.split(",")[0] not in row["method"] or peaks.why_not(s):
            continue
        if "QLoRA" in row["method"] and source == "resource-tables":
            continue
        for m in s.memory:
            if m.kind == "allocated" and not m.at_least:
                n += 1
                assert peaks.plan(s).allocated == pytest.approx(m.bytes, rel=tolerance), s.label
    assert n >= 9


def test_what_ran_out_of_memory_is_predicted_to() -> None:
    """The interval of every run that did not fit reaches beyond its card."""
    bounds = [case for case in measured.cases(ROWS) if case.at_least and case.predicted is not None]
    assert len(bounds) >= 6
    assert all(case.covered for case in bounds)


# ---------------------------------------------------------------- every row, every cell

cell = st.one_of(
    st.sampled_from(
        [
            "",
            "OOM",
            "nan",
            "inf",
            "-1",
            "0",
            "1e400",
            "∞",
            "None",
            "2-4",
            "16 (see script)",
            "1,000",
            "8k",
            "full",
            "\x00",
        ]
    ),
    st.text(max_size=30),
)


def test_every_row_of_the_tables_gives_cases_with_a_prediction_or_a_reason() -> None:
    for module, name in ((measured, "measured.csv"), (peft_l40s, "peft_l40s.csv")):
        for case in module.cases(table(name)):
            assert (case.predicted is None) == bool(case.reason), case.label
            if case.predicted is not None:
                assert 0 < case.predicted.low <= case.predicted.value <= case.predicted.high, case.label


@given(st.sampled_from(ROWS), st.sampled_from(measured.COLUMNS), cell)
@settings(max_examples=150, deadline=None)
def test_a_malformed_cell_is_no_crash(row: dict[str, str], column: str, text: str) -> None:
    """Whatever stands in one column, the row is read, and says why where there is no prediction."""
    s = read({**row, column: text})
    for case in measured.memory_cases(s):
        assert (case.predicted is None) == bool(case.reason)


@given(st.dictionaries(st.sampled_from([*measured.COLUMNS, "more"]), st.one_of(cell, st.none())))
@settings(max_examples=100, deadline=None)
def test_rows_of_anything_are_no_crash(row: dict[str, Any]) -> None:
    """Missing columns and cells, and cells that no publisher wrote."""
    measured.memory_cases(read(row))


@given(st.sampled_from(table("peft_l40s.csv")), st.sampled_from(peft_l40s.COLUMNS), cell)
@settings(max_examples=80, deadline=None)
def test_a_malformed_cell_of_the_method_comparison_is_no_crash(row: dict[str, str], column: str, text: str) -> None:
    measured.memory_cases(peft_l40s.setting({**row, column: text}))


@pytest.mark.parametrize(
    "source",
    ["meta-pytorch/torchtune README", "Somebody/else@abc", "unslothai/unsloth README", "axolotl", "QwenLM/Qwen"],
)
def test_other_sources_are_read(source: str) -> None:
    """A publisher that no row here is from: a setting with a peak, by the conventions of its trainer or of transformers."""
    s = read(row_of(source=source, model="Llama 3.1 8B", method="LoRA", rank="8", targets="q+v", precision="bf16",
                    gpu="RTX 4090", n_gpus="1", seq_len="2048", micro_batch="2", grad_ckpt="True", peak_mem_GiB="18"))  # fmt: skip
    if source != "QwenLM/Qwen":  # whose targets are Qwen's
        assert peaks.why_not(s) == ""
        assert 8 * GIB < peaks.estimate(s, s.memory[0].kind).value < 40 * GIB


# ---------------------------------------------------------------- held out


def test_a_source_that_is_left_out_does_not_move_its_own_constants() -> None:
    """Doubling a source's measurements changes what others learn from it, not what predicts it."""
    rows = list(peaks.settings())
    doubled = [
        replace(s, memory=tuple(replace(m, bytes=2 * m.bytes) for m in s.memory)) if s.source == "litgpt" else s
        for s in rows
    ]
    before, after = peaks.held_out(rows), peaks.held_out(doubled)
    assert before["litgpt"]["unexplained"] == after["litgpt"]["unexplained"]
    assert before["litgpt"]["allocator_fraction"] == after["litgpt"]["allocator_fraction"]
    assert before["simumax"]["unexplained"] != after["simumax"]["unexplained"]


def test_the_packaged_constants_are_what_the_table_says() -> None:
    """calibrate.memory would write the file that is there."""
    from lora_planner.memory import constants

    assert peaks.complete(peaks.settings()) == constants()


# ---------------------------------------------------------------- relations

LLAMA = load_model("llama-3.2-1b")
HOW: dict[str, Any] = {"micro_batch": 2, "seq_len": 1024}


def peak(what: Any, **how: Any) -> float:
    return memory(LLAMA, what, **{**HOW, **how}).peak.value


@given(st.integers(1, 64), st.integers(2, 8), st.sampled_from(["none", "full", "selective"]))
@settings(max_examples=30, deadline=None)
def test_more_gpus_never_need_more_of_each(n: int, times: int, checkpointing: str) -> None:
    """Splitting weights and states over more GPUs, and states alone."""
    how = {"checkpointing": checkpointing, "full_precision": "master"}
    assert (
        peak(FULL, split=Split(n * times, n * times), **how) <= peak(FULL, split=Split(max(2, n), max(2, n)), **how)
        or n == 1
    )
    assert peak(FULL, split=Split(1, n * times), **how) <= peak(FULL, split=Split(1, n), **how)


def test_selective_checkpointing_is_between_none_and_full() -> None:
    full, selective, none = (peak(FULL, checkpointing=c, seq_len=4096) for c in ("full", "selective", "none"))
    assert full < selective < none


def test_old_bitsandbytes_keeps_the_inputs_of_frozen_matrices() -> None:
    """Exactly the widths that matrices read and nothing else keeps, in bf16: MLP input and output of its product."""
    how: dict[str, Any] = {"attention": "flash", "checkpointing": "none"}
    what = method("qlora", targets=("q_proj",), adapter_dtype="bfloat16")
    plain, old = (memory(LLAMA, what, frozen_inputs=f, **HOW, **how).allocated for f in (False, True))
    tokens, inner = HOW["micro_batch"] * HOW["seq_len"], LLAMA.blocks[0].linears[-1].d_in
    assert old - plain == pytest.approx(2 * tokens * LLAMA.layers * (LLAMA.hidden_size + inner), rel=0.01)


def test_quantising_experts_saves_what_they_hold() -> None:
    """Half a byte in place of two for each weight of an expert."""
    olmoe = load_model("olmoe-1b-7b")
    bare, packed = (weights(olmoe, "nf4", experts_too=e)[0] for e in (False, True))
    assert (bare - packed) / olmoe.groups["experts"] == pytest.approx(2 - 4.127 / 8, rel=1e-3)


def test_what_is_trained_beside_costs_its_states_and_what_is_kept_beside_its_tokens() -> None:
    """8 bytes a parameter in bf16 under AdamW, and the temporary while it steps; tokens times their bytes."""
    more = memory(LLAMA, method("lora"), also_trained=1e9, **HOW).phases["optimizer"].total
    less = memory(LLAMA, method("lora"), **HOW).phases["optimizer"].total
    assert more - less == pytest.approx(10e9, rel=0.1)
    kept = (Kept("more", 1000.0),)
    assert memory(LLAMA, method("lora"), also_kept=kept, **HOW).allocated - memory(
        LLAMA, method("lora"), **HOW
    ).allocated == pytest.approx(1000 * HOW["micro_batch"] * HOW["seq_len"])


@pytest.mark.parametrize("loss", sorted(LOGITS))
def test_a_loss_on_fewer_bytes_per_logit_needs_less(loss: str) -> None:
    """Where logits decide, the peak orders as the bytes that a loss keeps."""
    how: dict[str, Any] = {"checkpointing": "full", "seq_len": 8192}
    ours, theirs = LOGITS[loss], LOGITS["shifted"]
    bytes_of = [max(each.forward, each.kept + each.gradients) for each in (ours, theirs)]
    peaks_of = [peak(method("lora"), loss=name, **how) for name in (loss, "shifted")]
    assert (bytes_of[0] <= bytes_of[1]) == (peaks_of[0] <= peaks_of[1])


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_megatron_needs_less_with_every_way_of_splitting(tensor: int, pipeline: int, context: int, data: int) -> None:
    """Each doubling of one way, the others alike, and recomputing, never needs more."""
    small = from_config({"model_type": "llama", "num_hidden_layers": 16})
    layout = Layout(tensor, pipeline, context, 1, data, 8)

    def total(at: Layout, recompute: bool = False) -> float:
        return megatron(small, micro_batch=1, seq_len=4096, layout=at, recompute=recompute).total

    whole = total(layout)
    assert total(replace(layout, tensor=2 * tensor)) <= whole
    assert total(replace(layout, context=2 * context)) <= whole
    assert total(replace(layout, data=2 * data)) <= whole
    assert total(layout, recompute=True) <= whole


def test_alone_is_the_default() -> None:
    """A split over one GPU changes nothing."""
    assert peak(FULL, split=ALONE) == peak(FULL) == peak(FULL, split=Split(1, 1))
