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
    "qwen2": "dense", "qwen3": "dense", "gemma": "dense", "gemma2": "dense", "olmo": "dense",
    "olmo2": "dense", "olmo3": "dense", "granite": "dense", "helium": "dense", "seed_oss": "dense",
    "ernie4_5": "dense", "hunyuan_v1_dense": "dense", "exaone4": "dense", "ministral": "dense",
    "ministral3": "dense", "starcoder2": "dense", "nemotron": "dense", "arcee": "dense",
    "apertus": "apertus", "cohere": "cohere", "cohere2": "cohere", "glm": "glm", "glm4": "glm",
    "phi": "phi", "phi3": "phi3", "stablelm": "stablelm", "opt": "opt", "bloom": "bloom",
    "falcon": "falcon", "gpt2": "gpt2", "gpt_bigcode": "gpt2", "gptj": "gptj", "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox", "mixtral": "mixtral", "granitemoe": "mixtral", "phimoe": "mixtral",
    "qwen2_moe": "qwen_moe", "qwen3_moe": "qwen_moe", "olmoe": "olmoe", "gpt_oss": "gpt_oss",
    "deepseek_v2": "deepseek", "deepseek_v3": "deepseek", "deepseek_v32": "deepseek",
    "kimi_k2": "deepseek", "glm_moe_dsa": "deepseek", "glm4_moe_lite": "deepseek",
    "glm4_moe": "glm4_moe", "dots1": "glm4_moe",
    "ernie4_5_moe": "ernie4_5_moe", "hunyuan_v1_moe": "hunyuan_moe",
    "minimax_m2": "minimax_m2", "flex_olmo": "olmoe",
    "qwen3_next": "qwen3_next", "qwen3_5_text": "qwen3_next", "qwen3_5_moe_text": "qwen3_next",
    "nemotron_h": "nemotron_h", "granitemoehybrid": "granite_hybrid", "bamba": "granite_hybrid",
    "mamba2": "mamba", "llama4": "llama4", "llama4_text": "llama4", "gemma3": "gemma3",
    "gemma3_text": "gemma3", "qwen2_vl": "qwen_vl", "qwen2_vl_text": "qwen_vl", "qwen2_5_vl": "qwen_vl",
    "qwen2_5_vl_text": "qwen_vl", "qwen3_vl": "qwen_vl", "qwen3_vl_text": "qwen_vl",
    "qwen3_vl_moe": "qwen_vl", "qwen3_vl_moe_text": "qwen_vl", "qwen3_5": "qwen_vl",
    "qwen3_5_moe": "qwen_vl", "falcon_h1": "falcon_h1", "lfm2": "lfm2", "lfm2_moe": "lfm2",
    "llava": "llava", "llava_next": "llava", "mistral3": "llava", "paligemma": "llava",
    "internvl": "llava", "mllama": "mllama", "mllama_text_model": "mllama", "glm4v": "glm4v",
    "glm4v_text": "glm4v", "glm4v_moe": "glm4v", "glm4v_moe_text": "glm4v", "gemma3n_text": "gemma3n",
}  # fmt: skip


#: a config without these is rarely meant: whoever wrote it would not know the model that comes out
SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def from_config(values: dict[str, Any], where: str = "config.json", name: str = "") -> Model:
    """The table of weights that transformers would build from this config.

    >>> m = from_config({"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
    ...     "num_key_value_heads": 8, "intermediate_size": 14336, "num_hidden_layers": 32,
    ...     "vocab_size": 128256})
    >>> m.total
    8030261248
    """
    config = Config(values, where)
    model = build(config)
    object.__setattr__(model, "name", name or where)
    object.__setattr__(model, "source", where)
    left_out = [key for key in SHAPE_KEYS if key in config.defaulted]
    if left_out:
        model.warnings.append(f"{where} leaves out {', '.join(left_out)}: transformers' class defaults are used")
    return model


def build(config: Config) -> Model:
    """Hand the config to the file of its model_type; a wrapper does so with the language model inside."""
    where = config.where + (f"#{config.pointer}" if config.pointer else "")
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
    return model
