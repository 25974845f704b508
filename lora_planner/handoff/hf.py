"""The words of transformers' TrainingArguments, which TRL, LLaMA-Factory and Unsloth's scripts share."""

from __future__ import annotations

from typing import Any

from lora_planner.checked import Node
from lora_planner.handoff.sharding import of_trainer
from lora_planner.handoff.source import Document

#: our fields by the Trainer's key; a tool adds its own
FIELDS = {
    "learning_rate": "learning_rate", "scheduler": "lr_scheduler_type", "micro_batch": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps", "epochs": "num_train_epochs", "max_steps": "max_steps",
    "checkpointing": "gradient_checkpointing", "optimizer": "optim",
    "reentrant": "gradient_checkpointing_kwargs",
}  # fmt: skip
#: the Trainer's optimizer -> ours; what is missing is counted as AdamW and said to be
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_hf": "adamw", "adamw": "adamw", "adamw_torch_fused": "adamw-fused",
    "adamw_bnb_8bit": "adamw-8bit", "adamw_8bit": "adamw-8bit", "paged_adamw_8bit": "adamw-8bit",
    "paged_adamw_32bit": "adamw", "paged_adamw": "adamw",
}  # fmt: skip
#: ours -> what is written
WRITTEN_OPTIMIZERS = {
    "adamw": "adamw_torch", "adamw-foreach": "adamw_torch", "adamw-loop": "adamw_torch",
    "adamw-fused": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit",
}  # fmt: skip


def optimizer(name: str) -> tuple[str, tuple[str, ...]]:
    """Ours, and a note where it has none of its own.

    >>> optimizer("adamw_torch_fused"), optimizer("lion_32bit")[0]
    (('adamw-fused', ()), 'adamw')
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name], ()
    return "adamw", (f"optimizer {name}: its states are counted as AdamW's",)


def attention(name: str) -> str:
    """Ours for transformers' attn_implementation.

    >>> attention("flash_attention_2"), attention("kernels-community/flash-attn3"), attention("")
    ('flash', 'flash', 'sdpa')
    """
    return "flash" if "flash" in name else "eager" if name == "eager" else "sdpa"


def trainer(
    w: Node, learning_rate: float, document: Document, micro_batch: int = 8, checkpointing: bool = False
) -> dict[str, Any]:
    """Fields of a Recipe from TrainingArguments' keys; the numbers are the tool's defaults."""
    sharding = of_trainer(w, document.folder, document.launch)
    renamed = "activation_checkpointing" in w.value or "activation_checkpointing_kwargs" in w.value
    recompute = (
        "activation_checkpointing" if renamed else "gradient_checkpointing"
    )  # its name from transformers 5.24 on
    optim, notes = optimizer(w["optim"].text("adamw_torch_fused"))
    steps = w["max_steps"].integer(-1, default=-1)
    return {
        "learning_rate": w["learning_rate"].number(0.0, 1e9, default=learning_rate),
        "scheduler": w["lr_scheduler_type"].text("linear"),
        "micro_batch": w["per_device_train_batch_size"].integer(1, 10**6, default=micro_batch),
        "accumulation": w["gradient_accumulation_steps"].integer(1, 10**6, default=1),
        "epochs": w["num_train_epochs"].number(1e-6, 1e6, default=3.0),
        "max_steps": max(0, steps),
        "checkpointing": w[recompute].flag(checkpointing) or sharding.recomputes,
        "reentrant": w[f"{recompute}_kwargs"].table()["use_reentrant"].flag(),
        "optimizer": optim,
        "notes": (*notes, *sharding.notes),
        "sharding": sharding,
    }
