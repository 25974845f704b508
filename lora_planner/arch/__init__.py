"""One small file per family turns a config.json (a dict) into a `Model`.

To add a family: a file with `build(config) -> Model`, and a row here. Nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lora_planner.arch.config import Config
from lora_planner.errors import UnknownModelType, nearest
from lora_planner.model import Model

#: model_type -> file in this folder
BY_MODEL_TYPE = {
    "llama": "llama", "mistral": "llama", "smollm3": "llama",
}  # fmt: skip


def from_config(values: dict[str, Any], where: str = "config.json", name: str = "") -> Model:
    """The table of weights that transformers would build from this config.

    >>> m = from_config({"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
    ...     "num_key_value_heads": 8, "intermediate_size": 14336, "num_hidden_layers": 32,
    ...     "vocab_size": 128256})
    >>> m.total
    8030261248
    """
    config = Config(values, where)
    family = config.text("model_type", "")
    if family not in BY_MODEL_TYPE:
        close = nearest(family, BY_MODEL_TYPE)
        raise UnknownModelType(
            f"model_type {family!r} is not known",
            where,
            (f"Nearest: {', '.join(close)}. " if close else "")
            + "If one of them has the same layers, set model_type to it in a copy of the config; "
            "else add a file to lora_planner/arch and a row to BY_MODEL_TYPE.",
        )
    module = import_module(f"lora_planner.arch.{BY_MODEL_TYPE[family]}")
    model: Model = module.build(config)
    object.__setattr__(model, "name", name or where)
    object.__setattr__(model, "source", where)
    return model
