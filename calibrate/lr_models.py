"""What a model's name says of it for the learning-rate law: parameters, width, family.

lr_models.csv beside this file has the models of the sweep and others that are tuned often; a name that is not among
them is read: its size from "8B" or "30B-A3B", its architecture from its words.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lora_planner.learning_rate import FAMILIES

TABLE = Path(__file__).with_name("lr_models.csv")
#: words that say how a model was tuned or stored, not which it is
TUNED = ("instruct", "chat", "base", "thinking", "it", "hf", "bf16", "fp8", "bnb", "4bit", "preview", "sft", "dpo")
#: what is in a name -> its model_type, the first that is found. A distilled model is the one it was distilled into.
WORDS = (
    (r"llama-?4", "llama4"),
    (r"llama|vicuna|alpaca|smollm2", "llama"),
    (r"distill-qwen", "qwen2"),
    (r"qwen-?3[._][5-9].*-a\d", "qwen3_5_moe"),
    (r"qwen-?3[._][5-9]", "qwen3_5"),
    (r"qwen-?3-?next", "qwen3_next"),
    (r"qwen-?3-?vl.*-a\d", "qwen3_vl_moe"),
    (r"qwen-?3-?vl", "qwen3_vl"),
    (r"qwen-?3\b.*-a\d", "qwen3_moe"),
    (r"qwen-?3\b", "qwen3"),
    (r"qwen-?2|qwen1[._]5|qwq", "qwen2"),
    (r"qwen", "qwen"),
    (r"deepseek-?v2", "deepseek_v2"),
    (r"deepseek-?(v3|r1)", "deepseek_v3"),
    (r"kimi-?k2[._]5", "kimi_k25"),
    (r"kimi-?k2", "kimi_k2"),
    (r"nemotron-?(3|h\b|nano)", "nemotron_h"),
    (r"gpt-?oss", "gpt_oss"),
    (r"mixtral", "mixtral"),
    (r"mistral|ministral|devstral|magistral", "mistral"),
    (r"gemma-?3", "gemma3"),
    (r"gemma", "gemma2"),
    (r"phi", "phi3"),
    (r"glm", "glm4_moe"),
)


@dataclass(frozen=True, slots=True)
class Facts:
    """`params_b`: total, billions; `hidden`: width. NaN where nobody says. `family`: that of the law, "" if not swept."""

    model_type: str
    family: str
    params_b: float
    hidden: float


@cache
def table() -> Mapping[str, Facts]:
    """Facts by name as `short` writes it; the first of several rows of the same name, which are of the same shape."""
    found: dict[str, Facts] = {}
    with TABLE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            kind, width = row["model_type"], float(row["hidden_size"] or "nan")
            found.setdefault(short(row["model"]), Facts(kind, family(kind), float(row["total_params_b"]), width))
    return found


def family(model_type: str) -> str:
    """The family whose offset the law has, or ""."""
    return FAMILIES.get(model_type, "")


def short(name: str) -> str:
    """A name without organisation, words of tuning and dates.

    >>> short("Qwen/Qwen3-30B-A3B-Instruct-2507"), short("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    ('qwen3-30b-a3b', 'nvidia-nemotron-3-nano-30b-a3b')
    """
    words = re.split(r"[-_\s]+", name.strip().lower().split("/")[-1])
    return "-".join(word for word in words if word and word not in TUNED and not re.fullmatch(r"v?\d{4}", word))


def size_b(name: str) -> float:
    """Total parameters that a name states, billions: never the active ones. NaN where it states none.

    >>> [size_b(n) for n in ("Qwen3.5-122B-A10B", "SmolLM2-135M", "Kimi-K2", "Mixtral-8x7B")]
    [122.0, 0.135, nan, 56.0]
    """
    stated = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    if stated is None:
        return math.nan
    return float(stated[1] or 1) * float(stated[2]) * (1.0 if stated[3] == "b" else 1e-3)


def facts(name: str) -> Facts:
    """What is known of a model by its name.

    >>> facts("Qwen/Qwen3-8B-Base").params_b, facts("someone/Qwen3.5-122B-A10B").family, facts("new-9b").family
    (8.19, 'qwen3.5', '')
    """
    known = table().get(short(name))
    if known is not None:
        return known
    kind = next((kind for words, kind in WORDS if re.search(words, name.lower())), "")
    total = size_b(name)
    return Facts(kind, family(kind), total if total > 0 else math.nan, math.nan)
