"""Adapters that peft attaches are the planner's, on every family that can be built small."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import test_arch
import test_arch_hybrid
import torch

from lora_planner.arch import from_config
from lora_planner.errors import BadInput, UnsupportedAdapter
from lora_planner.method import Method, method
from lora_planner.method.targets import REWRITTEN
from lora_planner.model import PARAMETER
from runner import adapt

DENSE = [pytest.param(family, settings[0], id=family) for family, settings in test_arch.VARIED.items()]
HYBRID = [
    pytest.param(family, values, id=f"{family}-{i}")
    for i, (family, values) in enumerate(test_arch_hybrid.CASES)
    if "vision_config" not in values
]


def on_meta(config: dict[str, Any]) -> Any:
    if "kimi" in config["model_type"] or config["model_type"] in test_arch.VARIED:
        return test_arch._built(copy.deepcopy(config))
    values = {k: v for k, v in config.items() if k != "model_type"}
    return test_arch_hybrid.build(config["model_type"], values)


def attached(config: dict[str, Any], chosen: Method) -> int:
    """Trainable parameters of a model that exists as shapes only; check_counts has compared them."""
    with torch.device("meta"):
        module = adapt.attach(on_meta(config), from_config(config), chosen, seed=0)
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def assert_wraps(config: dict[str, Any], targets: tuple[str, ...]) -> None:
    """peft's count is the plan's; a dense MLP or a shared expert beside routed ones is refused by name, since peft
    takes its matrices for those of the experts."""
    model = from_config(config)
    leaves = {row.name.rsplit(".", 1)[-1] for row in model.linears if row.kind != PARAMETER}
    chosen = method("lora", 3, targets=targets, experts="fused")
    if targets != ("attention",) and leaves & set(REWRITTEN.get(model.peft_experts, {})):
        with pytest.raises(UnsupportedAdapter, match="peft moves"):
            attached(config, chosen)
        assert attached(config, method("lora", 3, targets=("peft-all-linear",))) > 0
    else:
        assert attached(config, chosen) > 0


@pytest.mark.parametrize(("family", "values"), DENSE)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "all-linear,unembed"])
def test_peft_wraps_what_was_planned(family: str, values: dict[str, Any], targets: str) -> None:
    """Attention, MLP, fused experts and the unembedding: as many trainable parameters as the plan says."""
    config = test_arch._config(family, values)
    model = from_config(config)
    if targets.endswith("unembed") and model.tied:
        pytest.skip("a tied unembedding is the embedding")
    assert_wraps(config, tuple(targets.split(",")))


@pytest.mark.parametrize(("family", "values"), HYBRID)
def test_peft_wraps_what_was_planned_in_hybrids(family: str, values: dict[str, Any]) -> None:
    """State-space and linear-attention layers likewise; what peft refuses to wrap is an error, never a silence."""
    config = {**values, "model_type": family}
    if from_config(config).peft_refuses:
        with pytest.raises((ValueError, BadInput)):
            attached(config, method("lora", 3, experts="fused"))
    else:
        assert_wraps(config, ("all-linear",))


@pytest.mark.parametrize("name", ["rslora", "dora", "lora-fa"])
def test_variants_count_what_they_train(name: str) -> None:
    """rsLoRA, DoRA's magnitudes and LoRA-FA's frozen A are counted as peft builds them."""
    assert attached(test_arch._config("qwen3", {}), method(name, 4)) > 0


def test_a_run_that_trains_something_else_is_refused() -> None:
    """If peft wraps one module less than planned, nothing runs."""
    config = test_arch._config("llama", {})
    module = adapt.attach(on_meta(config), from_config(config), method("lora", 4, targets=("attention",)), seed=0)
    with pytest.raises(BadInput, match="would train"):
        adapt.check_counts(module, from_config(config), method("lora", 4))


def test_experts_that_peft_cannot_adapt_are_refused() -> None:
    """Per-expert adapters on fused tensors exist in no peft; the error names the form that does."""
    config = test_arch._config("qwen3_moe", test_arch.MOE)
    with pytest.raises(UnsupportedAdapter, match="fused"):
        adapt.lora_config(from_config(config), method("lora", 4, experts="per-expert"))
