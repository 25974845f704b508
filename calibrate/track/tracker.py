"""Peaks of a step's tensors that a memory tracker saw under fake tensors: no device, no allocator, no context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import LEFT_OUT, Subject, family, flag, number, text, whole
from calibrate.track.flops import ATTENTION
from calibrate.track.saved import method_of, model_of
from lora_planner.errors import BadInput
from lora_planner.ledger import DERIVED, Estimate, Ledger
from lora_planner.memory import MemoryPlan, memory
from lora_planner.method import Method
from lora_planner.params import trainable_params

NAME = "tensor bytes of a step"
COLUMNS = ("model", "layers", "mode", "adapter_dtype", "autocast", "peak_bytes")
SOURCE = "torch MemTracker on a fake CPU device"
#: terms that come from measured constants are what a device takes besides tensors
BESIDE = "memory.constants"


def cases(rows: Sequence[Row]) -> list[Case]:
    return [case for row in rows for case in _cases(row)]


def _cases(row: Row) -> Iterator[Case]:
    name = text(row, "model")
    subject = Subject(SOURCE, name, text(row, "mode"), family(name))
    said = (name, f"{text(row, 'layers')} layers", text(row, "mode"), text(row, "adapter_dtype"),
            "autocast" if flag(row, "autocast") else "", "checkpointing" if flag(row, "grad_ckpt", "checkpointing") else "",
            text(row, "attn", "attention"), f"length {text(row, 'seq', 'seq_len')}")  # fmt: skip
    label = " ".join(part for part in said if part)
    yield subject.case("peak tensor bytes", label, "B", number(row, "peak_bytes"), lambda: peak(row))
    yield subject.case("peak tensor bytes", f"{label}, forward and backward", "B",
                       number(row, "peak_fwd_bwd_bytes", "forward_backward_bytes"),
                       lambda: peak(row, "forward", "backward"))  # fmt: skip


def peak(row: Row, *phases: str) -> Estimate:
    """The largest phase without what a device takes besides tensors; all phases where none are named."""
    ledgers = _plan(row).phases
    found = [Ledger("memory", "B", [term for term in ledgers[name].terms if term.why != BESIDE])
             for name in phases or ledgers]  # fmt: skip
    most = max(found, key=lambda ledger: ledger.total).estimate()
    return Estimate(most.low / LEFT_OUT, most.value, most.high * LEFT_OUT, "B", DERIVED, "memory.memory")


def _plan(row: Row) -> MemoryPlan:
    attention = text(row, "attn", "attention").lower() or "sdpa"
    if attention not in ATTENTION:
        raise BadInput(f"attention {attention!r} is not known")
    loss = text(row, "loss").lower()
    if loss not in ("", "labels"):
        raise BadInput(f"loss {loss!r} is not known")
    return memory(
        model_of(row),
        _method(row),
        micro_batch=whole(row, "batch", default=1),
        seq_len=whole(row, "seq", "seq_len"),
        checkpointing="full" if flag(row, "grad_ckpt", "checkpointing") else "none",
        attention=ATTENTION[attention],
        autocast=flag(row, "autocast"),
        full_precision="bf16",
        padded=True,  # the tracked steps pass a mask
        optimizer=optimizer(text(row, "optim")),
    )


def optimizer(said: str) -> str:
    """
    >>> optimizer("AdamW(foreach)"), optimizer("AdamW(fused)")
    ('adamw-foreach', 'adamw-fused')
    """
    low = said.lower()
    if not low:
        return "adamw"
    known = {"foreach": "adamw-foreach", "fused": "adamw-fused", "for-loop": "adamw-loop", "8bit": "adamw-8bit",
             "8-bit": "adamw-8bit"}  # fmt: skip
    for word, name in known.items():
        if word in low and "adam" in low:
            return name
    if low in ("adamw", "adam"):
        return "adamw"
    raise BadInput(f"optimizer {said!r} is not known")


def _method(row: Row) -> Method:
    """Which matrices have adapters no column says: of the usual sets the one that trains nearest to the row's count."""
    sets = (("all-linear",), ("attention",), ("q_proj", "v_proj"), ("mlp",))
    found = [method_of(row, targets) for targets in sets]
    measured = number(row, "trainable")
    if found[0].is_full or not measured > 0:
        return found[0]
    model = model_of(row)
    return min(found, key=lambda how: abs(trainable_params(model, how) / measured - 1))
