"""FLOP of one step that a counter saw: forward and backward, full fine-tuning and LoRA, small models and real ones.

Counted by torch's FlopCounterMode with its defects corrected, so the corrected columns are read where a table has
both. Some names are of small models with real structure; their shapes are facts beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import Subject, counted, flag, named, number, text, whole
from lora_planner import flops
from lora_planner.arch import from_config
from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.ledger import Estimate
from lora_planner.method import Method, method
from lora_planner.model import Model
from lora_planner.params import trainable_params

NAME = "FLOP per step"
COLUMNS = ("model", "mode")
SOURCE = "torch FlopCounterMode on transformers 5.23 and peft 0.21.2"
SMALL = Path(__file__).with_name("small_shapes.json")
#: part of a mode's name -> (targets, experts)
PARTS = {
    "all": ("all-linear", "none"), "attn": ("attention", "none"), "mlp": ("mlp", "none"), "ssm": ("ssm", "none"),
    "head": ("unembed", "none"), "lm_head": ("unembed", "none"), "experts": ("experts", "fused"),
}  # fmt: skip
METHODS = ("dora", "lora-fa", "rslora", "qlora")
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash", "flash_attention_2": "flash", "fa2": "flash"}


def cases(rows: Sequence[Row]) -> list[Case]:
    return [case for row in rows for case in _cases(row)]


def _cases(row: Row) -> Iterator[Case]:
    name, mode = text(row, "model"), text(row, "mode")
    try:
        model: Model | None = which(row)
    except LoraPlanError:
        model = None
    error = text(row, "error")
    subject = Subject(SOURCE, name, mode, model.model_type if model else "",
                      f"nothing was counted: {error.split(':')[0]}" if error else "")  # fmt: skip
    rank, seq_len = text(row, "r", "rank"), text(row, "seq", "seq_len")
    parts = [name, mode, f"rank {rank}" if rank not in ("", "0") else "", f"length {seq_len}",
             text(row, "attn", "attention"), "checkpointing" if flag(row, "grad_ckpt", "checkpointing") else ""]  # fmt: skip
    label = " ".join(part for part in parts if part)
    if "trainable" in row:
        kind = "parameters" if mode == "full" else "adapter parameters"
        yield subject.case(kind, label, "params",
                           number(row, "trainable"), lambda: _trainable(row))  # fmt: skip
    yield subject.case("FLOPs per step", f"{label}, forward", "FLOP", number(row, "fwd", "forward"), lambda: ahead(row))
    yield subject.case("FLOPs per step", f"{label}, backward", "FLOP",
                       number(row, "bwd_corrected", "bwd", "backward"), lambda: back(row))  # fmt: skip


@cache
def small() -> dict[str, Model]:
    """The small models by their name in the tables."""
    return {name: from_config(config, name=name) for name, config in json.loads(SMALL.read_text())["models"].items()}


def which(row: Row) -> Model:
    """A small model and a real one may share a name (gpt2): the one meant trains nearest to the row's count, and is the
    real one where the row has none."""
    name = text(row, "model")
    found = [small()[name]] if name in small() else []
    try:
        found.append(named(name))
    except LoraPlanError:
        if not found:
            raise
    measured = number(row, "trainable")
    if len(found) == 1 or not measured > 0:
        return found[-1]
    return min(found, key=lambda model: abs(trainable_params(model, method_of(row)) / measured - 1))


def method_of(row: Row) -> Method:
    """What a mode's name says: "full", or target sets joined with "+", with a variant of LoRA among them."""
    mode = text(row, "mode").lower()
    if mode == "full":
        return method("full")
    words = mode.split("+")
    name = next((word for word in words if word in METHODS), "lora")
    sets = [word for word in words if word not in ("lora", name)] or ["all"]
    unknown = [word for word in sets if word not in PARTS]
    if unknown:
        raise BadInput(f"mode {mode!r}: {unknown[0]!r} is no known set of targets")
    experts = "fused" if "experts" in sets else "none"
    targets = tuple(PARTS[word][0] for word in sets if word != "experts" or sets[0] != "all")
    return method(name, whole(row, "r", "rank"), targets=targets, experts=experts)


def _trainable(row: Row) -> Estimate:
    return counted(trainable_params(which(row), method_of(row)), "params", "params.trainable_params")


def ahead(row: Row) -> Estimate:
    """Forward pass of the whole batch."""
    seq_len, batch = whole(row, "seq", "seq_len"), whole(row, "batch", default=1)
    ledger = flops.forward(which(row), method_of(row), seq_len, batch)
    return counted(ledger.total * seq_len * batch, "FLOP", "flops.forward")


def back(row: Row) -> Estimate:
    """Backward pass of the whole batch, with what checkpointing computes again."""
    seq_len, batch = whole(row, "seq", "seq_len"), whole(row, "batch", default=1)
    attention = text(row, "attn", "attention").lower() or "eager"
    if attention not in ATTENTION:
        raise BadInput(f"attention {attention!r} is not known")
    step = flops.train(
        which(row), method_of(row), seq_len, ATTENTION[attention],
        "full" if flag(row, "grad_ckpt", "checkpointing") else "none", batch,
        input_grads=flag(row, "input_require_grads", "input_grads"),
    )  # fmt: skip
    forward = flops.forward(which(row), method_of(row), seq_len, batch)
    return counted((step.total - forward.total) * seq_len * batch, "FLOP", "flops.train")
