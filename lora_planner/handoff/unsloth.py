"""Unsloth: arguments of FastLanguageModel.from_pretrained, get_peft_model and SFTConfig, as a JSON file of three
sections, or as the literals of a script. Keys and defaults: unsloth 2026.10.
"""

from __future__ import annotations

import json
from typing import Any

from lora_planner.checked import Node
from lora_planner.errors import BadInput
from lora_planner.handoff import hf
from lora_planner.handoff.recipe import LEAF_NAMES, NONE, RL, SFT, File, Lora, Recipe
from lora_planner.handoff.source import ADAPT, LOAD, TRAIN, Document
from lora_planner.handoff.trl import trainer_rows, whole
from lora_planner.handoff.words import known_keys, ranks

LABEL = "Unsloth 2026.10"
#: what it can be told of experts: its own kernels choose how they are adapted
EXPERTS = (NONE,)
FIELDS = hf.FIELDS | {
    "model": "model_name", "adapter": "full_finetuning", "rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "targets": "target_modules", "parameters": "target_parameters", "saved": "modules_to_save",
    "rslora": "use_rslora", "dora": "use_dora", "weights": "dtype", "four_bit": "load_in_4bit",
    "max_length": "max_seq_length", "packing": "packing", "checkpointing": "use_gradient_checkpointing",
    "group": "num_generations", "remote_code": "trust_remote_code",
}  # fmt: skip
SIGNS = frozenset({LOAD, ADAPT, "max_seq_length", "full_finetuning", "use_gradient_checkpointing", "random_state"})
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def flattened(document: Document) -> dict[str, Any]:
    """One table of three: their keys hardly overlap, and where they do, training's win."""
    if not {LOAD, ADAPT, TRAIN} & set(document.values):
        return dict(document.values)
    flat: dict[str, Any] = {}
    for section in (LOAD, ADAPT, TRAIN):
        part = document.values.get(section)
        if part is None:
            if section == ADAPT and section in document.values:
                flat["full_finetuning"] = True
            continue
        if not isinstance(part, dict):
            raise BadInput("expected arguments and their values", f"{document.where}#/{section}", "Give an object.")
        flat |= part
    return flat


def read(document: Document) -> Recipe:
    values = flattened(document)
    w = Node(values, document.where, lenient=True)
    objective = document.objective or (RL if "num_generations" in values else SFT)
    full = w["full_finetuning"].flag()
    fields = hf.trainer(w, 1e-6 if objective == RL else 2e-5, document)
    recompute = values.get("use_gradient_checkpointing", "unsloth")
    fields["checkpointing"] = recompute == "unsloth" or w["use_gradient_checkpointing"].flag(True)
    notes = [note for note in document.notes if note.split()[0] in FIELDS.values()] + list(fields.pop("notes"))
    if recompute == "unsloth":
        notes.append(
            'use_gradient_checkpointing="unsloth" keeps checkpoints in host memory: the peak is lower than printed'
        )
    four = w["load_in_4bit"].flag(True) and not full and not w["load_in_8bit"].flag() and not w["load_in_16bit"].flag()
    other = {"dataset", "dataset_text_field", "script"}
    return Recipe(
        "unsloth",
        w["model_name"].text(""),
        objective,
        None if full else _lora(w),
        "nf4" if four else "int8" if w["load_in_8bit"].flag() and not full else "bfloat16",
        full and not w["float32_mixed_precision"].flag(),
        **fields,
        max_length=w["max_seq_length"].integer(default=2048),
        packing=w["packing"].flag(),
        attention="flash",
        loss="chunked",
        group=w["num_generations"].integer(1, default=8) if objective == RL else 0,
        remote_code=w["trust_remote_code"].flag(),
        given=frozenset(values),
        unknown=tuple(sorted(set(values) - known_keys("unsloth", "hf", "trl-sft", "trl-grpo", "peft") - other)),
        notes=tuple(notes),
    )


def _lora(w: Node) -> Lora:
    raw = w.value.get("target_modules")
    targets = w["target_modules"].names() or (() if w["target_parameters"].there else DEFAULT_TARGETS)
    everything = LEAF_NAMES if targets == ("all-linear",) else ""
    is_pattern = isinstance(raw, str) and not everything
    return Lora(
        w["r"].integer(1, 10**6, default=16),
        w["lora_alpha"].number(1e-9, 1e6, default=16.0),
        w["use_rslora"].flag(),
        w["use_dora"].flag(),
        w["lora_dropout"].number(0.0, 1.0, default=0.0),
        () if everything or is_pattern else targets,
        targets[0] if is_pattern else "",
        everything,
        w["target_parameters"].names(),
        w["modules_to_save"].names(),
        layers=w["layers_to_transform"].integers(),
        ranks=ranks(w["rank_pattern"]),
        text_only=True,
    )


SCRIPT = '''"""Trains what unsloth.json says. Unsloth first: it changes the libraries that are imported after it."""

import json
from pathlib import Path

from unsloth import FastLanguageModel  # isort: skip
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

arguments = json.loads(Path(__file__).with_name("unsloth.json").read_text(encoding="utf-8"))
model, tokenizer = FastLanguageModel.from_pretrained(**arguments["from_pretrained"])
if arguments["get_peft_model"] is not None:
    model = FastLanguageModel.get_peft_model(model, **arguments["get_peft_model"])
data = load_dataset("json", data_files=arguments["dataset"], split="train")
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=SFTConfig(**arguments["sft_config"]))
trainer.train()
model.save_pretrained(arguments["sft_config"]["output_dir"])
'''


def write(recipe: Recipe, header: tuple[str, ...]) -> tuple[File, ...]:
    """`python train_unsloth.py`, which reads unsloth.json beside it."""
    if recipe.objective == RL:
        raise BadInput(
            "a plan for RL is exported to TRL only", "--to unsloth", "Use --to trl, or --to peft for the adapter."
        )
    lora = recipe.lora
    load: dict[str, Any] = {
        "model_name": recipe.model, "max_seq_length": recipe.max_length, "load_in_4bit": recipe.weights == "nf4",
        "full_finetuning": lora is None, "trust_remote_code": False,
        "use_gradient_checkpointing": "unsloth" if recipe.checkpointing else False,
    }  # fmt: skip
    if lora is None:
        load["float32_mixed_precision"] = not recipe.pure
    adapt: dict[str, Any] | None = None
    if lora:
        if lora.parameters:
            raise BadInput("Unsloth's own expert kernels choose how experts are adapted", "--to unsloth",
                           "Use --to axolotl or --to peft, whose files say it.")  # fmt: skip
        adapt = {
            "r": lora.rank, "lora_alpha": whole(lora.alpha), "lora_dropout": lora.dropout, "bias": "none",
            "target_modules": lora.pattern or ("all-linear" if lora.everything else list(lora.targets)),
            "use_rslora": lora.rslora, "use_gradient_checkpointing": "unsloth" if recipe.checkpointing else False,
            "random_state": 3407,
        }  # fmt: skip
        if lora.dora:
            adapt["use_dora"] = True
    train = trainer_rows(recipe)
    del train["gradient_checkpointing"]
    train.pop("gradient_checkpointing_kwargs", None)
    if recipe.dataset_kind in ("messages", "conversations"):
        train["assistant_only_loss"] = True
    train |= {"max_length": recipe.max_length, "packing": recipe.packing, "output_dir": "lora-plan-output"}
    document = {LOAD: load, ADAPT: adapt, TRAIN: train, "dataset": recipe.dataset or "data.jsonl"}
    return File("unsloth.json", json.dumps(document, indent=2) + "\n"), File("train_unsloth.py", SCRIPT)


def commands(recipe: Recipe) -> str:
    return "python train_unsloth.py"
