"""LLaMA-Factory: the YAML file of `llamafactory-cli train`. Keys and defaults: llamafactory 0.9.5."""

from __future__ import annotations

import json
from typing import Any

from lora_planner.checked import Node
from lora_planner.errors import BadInput
from lora_planner.handoff import hf
from lora_planner.handoff.recipe import LEAF_NAMES, NONE, RL, SFT, File, Lora, Recipe
from lora_planner.handoff.source import Document
from lora_planner.handoff.trl import trainer_rows, whole
from lora_planner.handoff.words import known_keys, yaml

LABEL = "LLaMA-Factory 0.9"
#: what it can be told of experts: no key names bare parameters
EXPERTS = (NONE,)
FIELDS = hf.FIELDS | {
    "model": "model_name_or_path", "adapter": "finetuning_type", "rank": "lora_rank", "alpha": "lora_alpha",
    "dropout": "lora_dropout", "targets": "lora_target", "saved": "additional_target", "rslora": "use_rslora",
    "dora": "use_dora", "weights": "pure_bf16", "four_bit": "quantization_bit", "max_length": "cutoff_len",
    "packing": "packing", "packed_attention": "neat_packing", "attention": "flash_attn",
    "checkpointing": "disable_gradient_checkpointing", "remote_code": "trust_remote_code",
}  # fmt: skip
SIGNS = frozenset({"finetuning_type", "stage", "cutoff_len", "lora_rank", "lora_target", "template", "dataset_dir",
                   "quantization_bit", "additional_target", "pure_bf16"})  # fmt: skip


def read(document: Document) -> Recipe:
    w = document.root
    kind = w["finetuning_type"].text("lora")
    if kind not in ("lora", "full"):
        raise BadInput(f"finetuning_type {kind!r} is not planned", w["finetuning_type"].place, "Use lora or full.")
    lora = _lora(w) if kind == "lora" else None
    fields = hf.trainer(w, 5e-5, document)
    # LLaMA-Factory recomputes unless it is told not to, and its checkpointing marks the inputs itself
    fields["checkpointing"] = not w["disable_gradient_checkpointing"].flag()
    fields["reentrant"] = w["use_reentrant_gc"].flag(True)
    stage = w["stage"].text("sft")
    notes = [*document.notes, *fields.pop("notes")]
    bits = w["quantization_bit"].integer(0, 16, default=0)
    flash = w["flash_attn"].text("auto")
    neat = w["neat_packing"].flag()
    return Recipe(
        "llamafactory",
        w["model_name_or_path"].text(""),
        SFT if stage in ("sft", "pt") else RL if stage == "ppo" else stage,
        lora,
        {4: "nf4", 8: "int8"}.get(bits, "bfloat16" if lora or w["pure_bf16"].flag() else "float32"),
        lora is None and w["pure_bf16"].flag(),
        **fields,
        max_length=w["cutoff_len"].integer(default=2048),
        packing=w["packing"].flag(stage == "pt") or neat,
        packed_attention=neat,
        attention="flash" if flash.startswith("fa") else "eager" if flash == "disabled" else "sdpa",
        loss="chunked" if w["enable_liger_kernel"].flag() else "full",
        remote_code=w["trust_remote_code"].flag(),
        given=frozenset(document.values),
        unknown=tuple(sorted(set(document.values) - known_keys("llamafactory", "hf"))),
        notes=tuple(notes),
    )


def _lora(w: Node) -> Lora:
    rank = w["lora_rank"].integer(1, 10**6, default=8)
    targets = w["lora_target"].names(commas=True) or ("all",)
    everything = LEAF_NAMES if targets == ("all",) else ""
    return Lora(
        rank,
        w["lora_alpha"].number(1e-9, 1e6, default=2.0 * rank),
        w["use_rslora"].flag(),
        w["use_dora"].flag(),
        w["lora_dropout"].number(0.0, 1.0, default=0.0),
        () if everything else targets,
        "",
        everything,
        saved=w["additional_target"].names(commas=True),
        dtype="bfloat16" if w["pure_bf16"].flag() else "float32",
        text_only=w["freeze_vision_tower"].flag(True),
    )


def write(recipe: Recipe, header: tuple[str, ...]) -> tuple[File, ...]:
    """`llamafactory-cli train llamafactory.yaml`, with the dataset_info.json that it looks names up in."""
    lora = recipe.lora
    if recipe.objective == RL:
        raise BadInput("LLaMA-Factory has no GRPO", "--to llamafactory", "Use --to trl, or --to peft for the adapter.")
    if lora and (lora.parameters or (lora.pattern and not lora.leaves)):
        raise BadInput("LLaMA-Factory cannot be told peft's target_parameters", "--to llamafactory",
                       "Use --to axolotl or --to peft.")  # fmt: skip
    rows: dict[str, Any] = {
        "model_name_or_path": recipe.model, "trust_remote_code": False, "stage": "sft", "do_train": True,
        "finetuning_type": "lora" if lora else "full",
    }  # fmt: skip
    if lora:
        rows |= {
            "lora_rank": lora.rank, "lora_alpha": whole(lora.alpha), "lora_dropout": lora.dropout,
            "lora_target": "all" if lora.everything else ",".join(lora.leaves or lora.targets),
            "freeze_vision_tower": True,
            "use_rslora": lora.rslora, "use_dora": lora.dora,
        }  # fmt: skip
        if recipe.weights == "nf4":
            rows |= {"quantization_bit": 4, "quantization_method": "bnb", "quantization_type": "nf4",
                     "double_quantization": True}  # fmt: skip
    rows |= trainer_rows(recipe)
    del rows["gradient_checkpointing"]
    rows.pop("gradient_checkpointing_kwargs", None)
    rows |= {"disable_gradient_checkpointing": not recipe.checkpointing, "use_reentrant_gc": False, "pure_bf16": False,
             "flash_attn": {"flash": "fa2", "eager": "disabled"}.get(recipe.attention, "sdpa"),
             "cutoff_len": recipe.max_length, "packing": recipe.packing, "neat_packing": recipe.packing}  # fmt: skip
    files = []
    if recipe.dataset:
        rows |= {"dataset": "lora_plan", "dataset_dir": "."}
        info = {"lora_plan": {"file_name": recipe.dataset, **_columns(recipe.dataset_kind)}}
        files.append(File("dataset_info.json", json.dumps(info, indent=2) + "\n"))
    rows["output_dir"] = "lora-plan-output"
    return (File("llamafactory.yaml", yaml(rows, header)), *files)


def _columns(kind: str) -> dict[str, Any]:
    """How dataset_info.json describes a schema."""
    if kind == "messages":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "system_tag": "system"}  # fmt: skip
        return {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    if kind == "conversations":
        return {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    names = {"prompt_completion": ("prompt", "completion"), "text": ("text", "")}.get(kind, ("instruction", "output"))
    columns = {"prompt": names[0]} | ({"response": names[1]} if names[1] else {})
    return {"columns": columns | ({"query": "input"} if kind == "instruction" else {})}


def commands(recipe: Recipe) -> str:
    return "llamafactory-cli train llamafactory.yaml"
