"""Bytes that autograd keeps after a forward pass, in all and per layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import Subject, cut, derived, family, named, number, text, whole
from calibrate.track.flops import ATTENTION
from lora_planner import activations
from lora_planner.activations import Kept, Setup
from lora_planner.errors import BadInput
from lora_planner.ledger import Estimate
from lora_planner.method import Method, method
from lora_planner.model import Model

NAME = "bytes kept for the backward pass"
COLUMNS = ("model", "mode", "adapter_dtype", "saved_bytes", "per_layer_bytes")
SOURCE = "torch saved_tensors_hooks under fake tensors"
DTYPES = {"": "float32", "fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16",
          "fp16": "float16", "float16": "float16"}  # fmt: skip


def cases(rows: Sequence[Row]) -> list[Case]:
    return [case for row in rows for case in _cases(row)]


def _cases(row: Row) -> Iterator[Case]:
    name = text(row, "model")
    error = text(row, "error")
    subject = Subject(SOURCE, name, text(row, "mode"), family(name),
                      f"nothing was measured: {error.split(':')[0]}" if error else "")  # fmt: skip
    said = (name, text(row, "mode"), text(row, "adapter_dtype"), text(row, "attn", "attention"),
            f"length {text(row, 'seq', 'seq_len')}")  # fmt: skip
    label = " ".join(part for part in said if part)
    yield subject.case("saved bytes", label, "B", number(row, "saved_bytes"), lambda: in_all(row))
    yield subject.case(
        "saved bytes", f"{label}, per layer", "B", number(row, "per_layer_bytes"), lambda: per_layer(row)
    )


def model_of(row: Row) -> Model:
    model = named(text(row, "model"))
    return cut(model, whole(row, "layers", default=model.layers))


def method_of(row: Row, targets: tuple[str, ...] = ("attention", "mlp")) -> Method:
    """Full fine-tuning, or LoRA on every matrix that is an nn.Linear of the layers: experts have no adapter."""
    mode = text(row, "mode").lower()
    if mode == "full":
        return method("full")
    if mode not in ("lora", "dora", "lora-fa", "qlora", "rslora"):
        raise BadInput(f"mode {mode!r} is not known")
    dtype = text(row, "adapter_dtype").lower()
    if dtype not in DTYPES:
        raise BadInput(f"adapter_dtype {dtype!r} is not known")
    return method(mode, whole(row, "r", "rank"), targets=targets, experts="none", adapter_dtype=DTYPES[dtype])


def _setup(row: Row) -> Setup:
    attention = text(row, "attn", "attention").lower() or "sdpa"
    if attention not in ATTENTION:
        raise BadInput(f"attention {attention!r} is not known")
    return Setup(ATTENTION[attention])


def _bytes(kept: Sequence[Kept], seq_len: int, batch: int) -> float:
    return sum(batch * (k.token * seq_len + k.pair * seq_len**2) + k.fixed for k in kept)


def in_all(row: Row) -> Estimate:
    """Of the layers, of the head, and the log-softmax of the logits in fp32."""
    model, how, setup = model_of(row), method_of(row), _setup(row)
    seq_len, batch = whole(row, "seq", "seq_len"), whole(row, "batch", default=1)
    head = activations.head(model, how, setup) + activations.FP32 * model.vocab_size
    value = _bytes(activations.layers(model, how, setup)[0], seq_len, batch) + seq_len * batch * head
    return derived(value, "B", "activations.layers and head")


def per_layer(row: Row) -> Estimate:
    """Mean of the layers, none of them spared what the first one is."""
    model, how, setup = model_of(row), method_of(row), _setup(row)
    seq_len, batch = whole(row, "seq", "seq_len"), whole(row, "batch", default=1)
    trained = activations.Trained.of(model, how)
    blocks = [_bytes(activations.block_kept(b, model.model_type, trained, setup), seq_len, batch) * b.count
              for b in model.blocks]  # fmt: skip
    return derived(sum(blocks) / model.layers, "B", "activations.block_kept")
