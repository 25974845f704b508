"""Adapters are counted as peft and the paper count them."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.track.lora_counts import SETS
from lora_planner.arch import from_config
from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.method import method
from lora_planner.method.targets import adapter_table
from lora_planner.model import Model
from lora_planner.model_source import load_model
from lora_planner.params import file_bytes, stored_params, trainable_params

GOLDEN = Path(__file__).parents[1] / "calibrate" / "tables"


def rows(name: str) -> list[dict[str, str]]:
    with (GOLDEN / name).open() as file:
        return list(csv.DictReader(file))


@cache
def model(name: str) -> Model:
    return load_model(name)


def count(name: str, target_set: str, rank: int) -> int:
    m = model(name)
    targets, experts = (m.peft_default, "none") if target_set == "default" else SETS[target_set]
    return trainable_params(m, method("lora", rank, targets=targets, experts=experts))


@pytest.mark.parametrize("name", sorted({r["name"] for r in rows("lora_counts.csv")}))
def test_trainable_equals_peft(name: str) -> None:
    """Every target set and rank that peft was asked for trains as many parameters here."""
    for row in (r for r in rows("lora_counts.csv") if r["name"] == name and r["trainable"]):
        assert count(name, row["target_set"], int(row["rank"])) == int(row["trainable"]), row


@pytest.mark.parametrize(
    "row", [r for r in rows("lora_counts.csv") if not r["trainable"]], ids=lambda r: "-".join(list(r.values())[:3])
)
def test_what_peft_refuses_is_refused(row: dict[str, str]) -> None:
    """Targets that hit nothing are an error; presets that only peft refuses count, and warn."""
    refused = None
    try:
        count(row["name"], row["target_set"], int(row["rank"]))
    except LoraPlanError as error:
        refused = error
    if refused:
        assert refused.exit_code == 3
        assert refused.fix
        return
    targets, experts = SETS[row["target_set"]]
    table = adapter_table(model(row["name"]), method("lora", int(row["rank"]), targets=targets, experts=experts))
    assert any(code == "W-PEFT-REFUSES" for code, _, _ in table.warnings)


@pytest.mark.parametrize("row", rows("adapter_counts_shared_outer.csv"), ids=lambda r: r["hub"] + r["component"])
def test_shared_outer_equals_the_hosted_trainer(row: dict[str, str]) -> None:
    """Parameters per rank by component equal the hosted trainer's table (without Inkling: no config is public)."""
    groups = {"attn": ("attn", "ssm"), "mlp": ("mlp_dense", "shared", "latent", "experts"), "unembed": ("lm_head",)}
    table = adapter_table(model(row["config"]), method("lora", 1, targets=("tinker", "unembed")))
    found = (a for a in table.adapters if a.linear.group in groups[row["component"]])
    assert sum(a.a_params + a.b_params for a in found) == int(row["per_rank"])


@pytest.mark.parametrize(
    ("targets", "rank", "with_unembed", "without"),
    [
        ("mlp", 256, 0.49, 0.45),
        ("attention", 256, 0.25, 0.22),
        ("all-linear", 256, 0.70, 0.67),
        ("mlp", 128, 0.24, 0.23),
    ],
)
def test_the_papers_table_adapts_the_unembedding(targets: str, rank: int, with_unembed: float, without: float) -> None:
    """The table of "LoRA Without Regret" for Llama-3.1-8B, in billions: only right with the unembedding."""
    m = model("llama-3.1-8b")
    assert round(trainable_params(m, method("lora", rank, targets=(targets, "unembed"))) / 1e9, 2) == with_unembed
    assert round(trainable_params(m, method("lora", rank, targets=(targets,))) / 1e9, 2) == without


@pytest.mark.parametrize(
    ("targets", "experts", "expected"),
    [
        ("peft-all-linear", "none", 996_507_648), ("all-linear", "per-expert", 843_841_536),
        ("all-linear", "fused", 642_514_944), ("all-linear", "none", 13_369_344),
        ("all-linear,unembed", "shared-outer", 247_044_096),
    ],
)  # fmt: skip
def test_one_phrase_many_counts(targets: str, experts: str, expected: int) -> None:
    """What "rank 16, all linear" means on Qwen3-30B-A3B: the counts that tools of the field print."""
    chosen = method("lora", 16, targets=tuple(targets.split(",")), experts=experts)
    assert trainable_params(model("qwen3-30b-a3b"), chosen) == expected


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 128}  # fmt: skip


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj", "gate_proj,up_proj,down_proj"])
def test_equals_peft_itself(name: str, targets: str, tmp_path: Path) -> None:
    """A real adapter on a real (tiny) model: trainable parameters, stored elements and bytes."""
    torch: Any = pytest.importorskip("torch")
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    load_file = pytest.importorskip("safetensors.torch").load_file
    torch.manual_seed(0)
    real = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    asked = targets if targets == "all-linear" else targets.split(",")
    wrapped = peft.get_peft_model(real, peft.LoraConfig(r=4, target_modules=asked, use_dora=name == "dora"))
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors").values()
    ours = from_config({"model_type": "llama", **SMALL})
    chosen = method(name, 4, targets=tuple(targets.split(",")))
    assert trainable_params(ours, chosen) == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert stored_params(ours, chosen) == sum(t.numel() for t in saved)
    assert file_bytes(ours, chosen) == sum(t.numel() * t.element_size() for t in saved)


@given(rank=st.integers(1, 64), factor=st.integers(2, 4))
def test_dense_adapters_are_linear_in_rank(rank: int, factor: int) -> None:
    """Twice the rank is twice the parameters; more targets are never fewer."""
    m = from_config({"model_type": "llama", **SMALL} | {"hidden_size": 512, "intermediate_size": 768})
    small = trainable_params(m, method("lora", rank))
    assert trainable_params(m, method("lora", rank * factor)) == factor * small
    parts = [trainable_params(m, method("lora", rank, targets=(t,))) for t in ("attention", "mlp")]
    assert sum(parts) == small
    assert trainable_params(m, method("lora-fa", rank)) < stored_params(m, method("lora-fa", rank)) == small


@given(rank=st.sampled_from([8, 16, 32, 64]))
def test_expert_shapes_are_ordered(rank: int) -> None:
    """none < rank over active < per expert; sharing the outer factor is smaller than not sharing it."""
    m = model("qwen3-30b-a3b")
    none, over, shared, fused, every = (
        trainable_params(m, method("lora", rank, experts=e))
        for e in ("none", "per-expert-over-active", "shared-outer", "fused", "per-expert")
    )
    assert none < over < every
    assert shared < fused < every


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0}, {"rank": -4}, {"alpha": 0.0}, {"alpha": float("nan")}, {"targets": ("q_prok",)}, {"targets": ()},
        {"rank": 100_000}, {"experts": "some"}, {"name": "lorra"},
    ],
)  # fmt: skip
def test_b13_bad_adapters(bad: dict[str, Any]) -> None:
    """A rank, alpha, target or method that means nothing is refused with a fix."""
    with pytest.raises(BadInput) as refused:
        trainable_params(model("llama-3.1-8b"), method(**{"name": "lora", **bad}))
    assert refused.value.exit_code == 3
    assert refused.value.fix


def test_a_misspelt_target_names_the_nearest() -> None:
    """The error lists the model's modules and the one that was probably meant."""
    with pytest.raises(BadInput, match="Nearest: q_proj"):
        trainable_params(model("llama-3.1-8b"), method("lora", targets=("q_prok",)))
