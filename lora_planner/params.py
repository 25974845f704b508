"""How many parameters a method trains and stores, and how large its file is."""

from __future__ import annotations

from functools import lru_cache

from lora_planner.ledger import EXACT, Ledger, Term
from lora_planner.method import BY_NAME, Method
from lora_planner.method.targets import adapter_table
from lora_planner.model import Model

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@lru_cache(maxsize=4096)
def trainable_params(model: Model, method: Method) -> int:
    """Parameters that the optimizer updates.

    Source: equals what peft 0.21 reports for the same targets.
    """
    if method.is_full:
        return model.total
    count = BY_NAME[method.name].trainable
    return sum(count(adapter) for adapter in adapter_table(model, method).adapters)


@lru_cache(maxsize=4096)
def stored_params(model: Model, method: Method) -> int:
    """Parameters in the file that training leaves behind: the adapter's, or the model's."""
    if method.is_full:
        return model.total
    count = BY_NAME[method.name].stored
    return sum(count(adapter) for adapter in adapter_table(model, method).adapters)


def file_bytes(model: Model, method: Method) -> int:
    """Bytes of that file's tensors: adapters in their own dtype (peft: float32), full in bfloat16."""
    dtype = model.dtype if method.is_full else method.adapter_dtype
    return stored_params(model, method) * BYTES[dtype]


def adapter_ledger(model: Model, method: Method) -> Ledger:
    """Trainable parameters by matrix."""
    count = BY_NAME[method.name].trainable
    if method.is_full:
        terms = [Term(g, n, EXACT, "model.Model.groups") for g, n in model.groups.items() if n]
        return Ledger("trainable", "params", terms, "every parameter")
    terms = [
        Term(a.linear.name, count(a), EXACT, f"method.{method.name.replace('-', '_')}.trainable",
             note=f"rank {a.rank}, A {a.a_copies}x[{a.rank * a.parts}, {a.linear.d_in}], "
                  f"B {a.b_copies}x[{a.linear.d_out}, {a.rank}]")
        for a in adapter_table(model, method).adapters
    ]  # fmt: skip
    return Ledger("trainable", "params", terms, f"rank {method.rank}, experts {method.experts}")
