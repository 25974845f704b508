"""Attach adapters with peft, and refuse a run whose counts are not the planner's."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from lora_planner.errors import BadInput, UnsupportedAdapter
from lora_planner.method import Method
from lora_planner.method.targets import REWRITTEN, adapter_table
from lora_planner.model import PARAMETER, Model
from lora_planner.params import trainable_params

#: what this loop trains; a 4-bit base needs bitsandbytes and is left to the training frameworks
METHODS = ("full", "lora", "rslora", "dora", "lora-fa")


def lora_config(model: Model, method: Method) -> LoraConfig:
    """peft's words for the planner's adapter table: modules by suffix, fused experts by parameter name.

    No dropout, no bias, peft's own init: A uniform in +-1/sqrt(d_in), B zero.
    """
    adapters = adapter_table(model, method).adapters
    if method.targets == ("peft-all-linear",):
        return _config(method, "all-linear", None)
    if any(a.linear.group == "experts" and not a.fused for a in adapters):
        raise UnsupportedAdapter(
            f"peft trains no {method.experts} adapters on fused expert tensors", "--experts", "Use --experts fused."
        )
    modules = sorted({a.linear.name for a in adapters if a.linear.kind != PARAMETER})
    parameters = sorted({a.linear.name for a in adapters if a.linear.kind == PARAMETER})
    moved = {name for name in modules if name.rsplit(".", 1)[-1] in REWRITTEN.get(model.peft_experts, {})}
    if moved:
        raise UnsupportedAdapter(
            f"peft moves adapters of {', '.join(sorted(moved))} onto the fused experts", "--targets",
            "Use --targets attention or experts, or peft-all-linear for what peft makes of it.",
        )  # fmt: skip
    return _config(method, modules, parameters or None)


def _config(method: Method, modules: str | list[str], parameters: list[str] | None) -> LoraConfig:
    return LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]  # peft's hint says int, its arithmetic does not
        target_modules=modules,
        target_parameters=parameters,
        use_rslora=method.name == "rslora",
        use_dora=method.name == "dora",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def attach(module: Any, model: Model, method: Method, seed: int) -> Any:
    """The module that trains: with adapters, or itself with every weight free. Counts must agree.

    peft keeps adapters in fp32 on a bf16 base (autocast_adapter_dtype), which is what we want.
    """
    if method.name not in METHODS:
        raise UnsupportedAdapter(
            f"the runner does not train {method.name}", "--method", f"It trains {', '.join(METHODS)}."
        )
    if not method.is_full:
        torch.manual_seed(seed)
        module = get_peft_model(module, lora_config(model, method))
        if method.name == "lora-fa":
            for name, parameter in module.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
    else:
        module.requires_grad_(True)
    check_counts(module, model, method)
    return module


def check_counts(module: Any, model: Model, method: Method) -> int:
    """Trainable parameters, or an error where peft wrapped something else than was planned."""
    found = sum(p.numel() for p in module.parameters() if p.requires_grad)
    planned = trainable_params(model, method)
    if found != planned:
        raise BadInput(
            f"the run would train {found:,} parameters, the plan says {planned:,}",
            f"{model.name}, {method.name} {','.join(method.targets)}",
            "Please report it with the model's config.json: one of the two counts is wrong.",
            found=found,
            planned=planned,
        )
    return found


def trained(module: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters with a gradient, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def adapted(module: Any) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(matrix, A, B) of every adapter; none in full fine-tuning."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in module.named_parameters():
        for side in ("lora_A", "lora_B"):
            if f".{side}." in name:
                pairs.setdefault(name.split(f".{side}.")[0], {})[side] = parameter
    return [(short(name), p["lora_A"], p["lora_B"]) for name, p in pairs.items() if len(p) == 2]


def short(name: str) -> str:
    """
    >>> short("base_model.model.model.layers.0.self_attn.q_proj")
    'layers.0.self_attn.q_proj'
    """
    for prefix in ("base_model.", "model.", "model."):
        name = name.removeprefix(prefix)
    return name


def unmoved(module: Any) -> list[str]:
    """Matrices whose B is still zero: they learned nothing."""
    return [name for name, _, b in adapted(module) if not bool(b.detach().any())]


@torch.no_grad()
def spectral_norms(module: Any) -> list[tuple[str, float, float]]:
    """(matrix, |A|, |B|), largest singular values; claim C20 of the paper compares them."""
    return [
        (name, float(torch.linalg.matrix_norm(a.float(), 2)), float(torch.linalg.matrix_norm(b.float(), 2)))
        for name, a, b in adapted(module)
    ]
