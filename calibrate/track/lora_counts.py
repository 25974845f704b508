"""Trainable parameters that peft reports, by target set and rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import Subject, counted, family, named, number, text, whole
from lora_planner.errors import BadInput
from lora_planner.ledger import Estimate
from lora_planner.method import Method, method
from lora_planner.method.targets import PRESETS
from lora_planner.model import PARAMETER, Model
from lora_planner.params import trainable_params

NAME = "adapter parameters by target set"
COLUMNS = ("name", "target_set", "rank", "trainable")
SOURCE = "peft 0.21.2 on transformers 5.23"
MLP_NAMES = ("gate_proj", "up_proj", "down_proj")
#: target set of the table -> (targets, experts) of ours
SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "all-linear": (("peft-all-linear",), "none"),
    "attn-only": (("attention",), "none"),
    "attn+ssm": (("attention", "ssm"), "none"),
    "mlp-linear-only": (("mlp",), "none"),
    "text-linear": (("all-linear",), "none"),
    "text-linear+lm_head": (("all-linear", "unembed"), "none"),
    "mlp-names": (MLP_NAMES, "none"),
    "experts-fused": (("experts",), "fused"),
    "text-linear+experts": (("all-linear",), "fused"),
}
#: peft's own rewriting of expert names switched off
UNREWRITTEN = "/noconvert"
#: "text-linear-minus-mamba-out_proj": a set without the modules of this name
LESS = re.compile(r"(.+)-minus-(?:mamba-)?(\w+)$")


def cases(rows: Sequence[Row]) -> list[Case]:
    return [_case(row) for row in rows]


def _case(row: Row) -> Case:
    name, wanted = text(row, "name"), text(row, "target_set")
    error = text(row, "error")
    failed = f"peft builds no such adapter: {error.split(':')[0]}" if error else "peft builds no such adapter"
    subject = Subject(SOURCE, name, wanted, family(name), failed if not text(row, "trainable") else "")
    label = f"{name} {wanted} rank {text(row, 'rank')}"
    return subject.case("adapter parameters", label, "params", number(row, "trainable"),
                        lambda: adapters(name, wanted, whole(row, "rank", "r")))  # fmt: skip


def adapters(name: str, target_set: str, rank: int) -> Estimate:
    """Trainable parameters of a target set.

    >>> adapters("llama-3.1-8b", "text-linear", 16).value
    41943040
    """
    model = named(name)
    if target_set.endswith(UNREWRITTEN):
        model, target_set = _unrewritten(model), target_set.removesuffix(UNREWRITTEN)
    return counted(trainable_params(model, chosen(model, target_set, rank)), "params", "params.trainable_params")


@lru_cache(maxsize=256)
def _unrewritten(model: Model) -> Model:
    return replace(model, peft_experts="")


def chosen(model: Model, target_set: str, rank: int) -> Method:
    """The method that a set's name stands for; names that are no set are targets, as `--targets` takes them."""
    if target_set == "default":
        if not model.peft_default:
            raise BadInput(f"peft has no default targets for {model.model_type}")
        return method("lora", rank, targets=model.peft_default, experts="none")
    less = LESS.match(target_set)
    if less:
        return method("lora", rank, targets=_names(model, less[1], less[2]), experts="none")
    targets, experts = SETS.get(target_set) or (tuple(re.split(r"[\s,|+;]+", target_set)), "none")
    return method("lora", rank, targets=targets, experts=experts)


def _names(model: Model, target_set: str, but: str) -> tuple[str, ...]:
    """Modules of a set one by one, without those named `but`."""
    presets = SETS.get(target_set, ((), ""))[0]
    groups = {group for preset in presets for group in PRESETS.get(preset, ())} - {"experts"}
    rows = [row for row in model.linears if row.group in groups and row.kind != PARAMETER]
    found = dict.fromkeys(row.name for row in rows if row.name.rsplit(".", 1)[-1] != but)
    return tuple(found)
