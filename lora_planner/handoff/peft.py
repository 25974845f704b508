"""peft: adapter_config.json, the file beside every adapter. It says what is adapted, nothing of how it is trained.

Keys and defaults: LoraConfig of peft 0.21.
"""

from __future__ import annotations

import json
from typing import Any

from lora_planner.checked import Node
from lora_planner.errors import BadInput
from lora_planner.handoff.recipe import FUSED, NONE, OVER_ACTIVE, PEFT_ALL, File, Lora, Recipe
from lora_planner.handoff.source import Document
from lora_planner.handoff.trl import whole
from lora_planner.handoff.words import alphas, known_keys, ranks

LABEL = "peft 0.21"
#: what it can be told of experts: target_parameters, and a rank of their own in rank_pattern
EXPERTS = (OVER_ACTIVE, FUSED, NONE)
FIELDS = {
    "model": "base_model_name_or_path", "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "targets": "target_modules", "parameters": "target_parameters", "saved": "modules_to_save",
    "rslora": "use_rslora", "dora": "use_dora",
}  # fmt: skip
SIGNS = frozenset({"peft_type", "base_model_name_or_path", "rank_pattern", "fan_in_fan_out", "init_lora_weights"})


def read(document: Document) -> Recipe:
    w = document.root
    kind = w["peft_type"].text("LORA")
    if kind != "LORA":
        raise BadInput(f"peft_type {kind!r} is not planned", w["peft_type"].place, "Give a LoRA adapter.")
    if w["trainable_token_indices"].table().value if isinstance(w.value.get("trainable_token_indices"), dict) else None:
        notes: tuple[str, ...] = ("trainable_token_indices are not counted",)
    else:
        notes = ()
    return Recipe(
        "peft",
        w["base_model_name_or_path"].text(""),
        lora=lora(w),
        learning_rate=None,
        micro_batch=None,
        max_length=None,
        given=frozenset(document.values),
        unknown=tuple(sorted(set(document.values) - known_keys("peft"))),
        notes=notes,
    )


def lora(w: Node) -> Lora:
    """peft's own semantics: a text in target_modules is a pattern for the whole path, a list holds endings of it."""
    raw = w.value.get("target_modules")
    everything = PEFT_ALL if isinstance(raw, str) and raw.lower() == "all-linear" else ""
    excluded = w.value.get("exclude_modules")
    return Lora(
        w["r"].integer(1, 10**6, default=8),
        w["lora_alpha"].number(1e-9, 1e6, default=8.0),
        w["use_rslora"].flag(),
        w["use_dora"].flag(),
        w["lora_dropout"].number(0.0, 1.0, default=0.0),
        () if isinstance(raw, str) else w["target_modules"].names(),
        raw if isinstance(raw, str) and not everything else "",
        everything,
        w["target_parameters"].names(),
        w["modules_to_save"].names(),
        () if isinstance(excluded, str) else w["exclude_modules"].names(),
        excluded if isinstance(excluded, str) else "",
        w["layers_to_transform"].integers(),
        w["layers_pattern"].names(),
        ranks(w["rank_pattern"]),
        alphas(w["alpha_pattern"]),
    )


def write(recipe: Recipe, header: tuple[str, ...]) -> tuple[File, ...]:
    """adapter_config.json, for LoraConfig.from_pretrained(".") in a script of one's own."""
    adapter = recipe.lora
    if adapter is None:
        raise BadInput("full fine-tuning has no adapter", "--to peft", "Use --to trl, llamafactory or unsloth.")
    rows: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": recipe.model,
        "r": adapter.rank, "lora_alpha": whole(adapter.alpha), "lora_dropout": adapter.dropout, "bias": "none",
        "target_modules": adapter.pattern or ("all-linear" if adapter.everything else list(adapter.targets)),
        "target_parameters": list(adapter.parameters) or None,
        "rank_pattern": dict(adapter.ranks), "alpha_pattern": {}, "modules_to_save": None,
        "use_rslora": adapter.rslora, "use_dora": adapter.dora, "init_lora_weights": True, "fan_in_fan_out": False,
        "inference_mode": False,
    }  # fmt: skip
    return (File("adapter_config.json", json.dumps(rows, indent=2) + "\n"),)


def commands(recipe: Recipe) -> str:
    return 'peft.get_peft_model(model, peft.LoraConfig.from_pretrained("."))'
