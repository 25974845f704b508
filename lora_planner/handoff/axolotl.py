"""axolotl: the YAML file of `axolotl train`. Keys and defaults: axolotl 0.19."""

from __future__ import annotations

from typing import Any

from lora_planner.checked import Node
from lora_planner.errors import BadInput
from lora_planner.handoff import hf
from lora_planner.handoff.recipe import FUSED, LEAF_NAMES, NONE, OVER_ACTIVE, PEFT_ALL, RL, SFT, File, Lora, Recipe
from lora_planner.handoff.sharding import of_axolotl
from lora_planner.handoff.source import Document
from lora_planner.handoff.words import alphas, known_keys, ranks, yaml

LABEL = "axolotl 0.19"
#: what it can be told of experts: lora_target_parameters, and a rank of their own in lora_rank_pattern
EXPERTS = (OVER_ACTIVE, FUSED, NONE)
FIELDS = {
    "model": "base_model", "adapter": "adapter", "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "targets": "lora_target_modules", "parameters": "lora_target_parameters", "saved": "lora_modules_to_save",
    "rslora": "peft_use_rslora", "dora": "peft_use_dora", "weights": "bf16", "four_bit": "load_in_4bit",
    "experts_quantised": "quantize_moe_experts", "learning_rate": "learning_rate", "scheduler": "lr_scheduler",
    "micro_batch": "micro_batch_size", "accumulation": "gradient_accumulation_steps", "epochs": "num_epochs",
    "max_steps": "max_steps", "max_length": "sequence_len", "packing": "sample_packing",
    "checkpointing": "gradient_checkpointing", "reentrant": "gradient_checkpointing_kwargs", "optimizer": "optimizer",
    "attention": "attn_implementation", "remote_code": "trust_remote_code", "adapter_dtype": "peft_autocast_adapter_dtype",
}  # fmt: skip
SIGNS = frozenset({"base_model", "adapter", "micro_batch_size", "sequence_len", "num_epochs", "sample_packing",
                   "lora_target_linear", "val_set_size", "dataset_prepared_path"})  # fmt: skip
CHUNKED = ("cut_cross_entropy", "liger_fused_linear_cross_entropy", "chunked_cross_entropy")


def read(document: Document) -> Recipe:
    w = document.root
    adapter = w["adapter"].text("")
    if adapter not in ("", "lora", "qlora"):
        raise BadInput(f"adapter {adapter!r} is not planned", w["adapter"].place, "Use lora, qlora, or leave it out.")
    lora = _lora(w) if adapter else None
    rl = w["rl"].text("")
    objective = SFT if not rl else RL if rl in ("grpo", "gdpo", "ebft") else rl
    four = w["load_in_4bit"].flag() or adapter == "qlora"
    sixteen = _is_16_bit(w)
    optim, notes = hf.optimizer(w["optimizer"].text("adamw_torch_fused"))
    trl = w["trl"].table()
    sharding = of_axolotl(w, document.folder, document.launch)
    masters = sharding.engine == "deepspeed" or (sharding.engine == "fsdp" and w.value.get("bf16") != "full")
    if not w["learning_rate"].there:
        raise BadInput("learning_rate is missing", w["learning_rate"].place, "axolotl has no default for it.")
    recompute = w.value.get("gradient_checkpointing")
    return Recipe(
        "axolotl",
        w["base_model"].text(""),
        objective,
        lora,
        "nf4" if four else "int8" if w["load_in_8bit"].flag() else "bfloat16" if sixteen else "float32",
        sixteen and lora is None and not masters,
        w["quantize_moe_experts"].flag(),
        w["learning_rate"].number(0.0, 1e9, default=0.0),
        w["lr_scheduler"].text("cosine"),
        w["micro_batch_size"].integer(1, 10**6, default=1),
        w["gradient_accumulation_steps"].integer(1, 10**6, default=1),
        w["num_epochs"].number(1e-6, 1e6, default=1.0),
        max(0, w["max_steps"].integer(-1, default=-1)),
        w["sequence_len"].integer(default=512),
        w["sample_packing"].flag(),
        _attention(w) == "flash",
        recompute in ("offload", "offload_disk", "unsloth")
        or w["gradient_checkpointing"].flag()
        or sharding.recomputes,
        w["gradient_checkpointing_kwargs"].table()["use_reentrant"].flag(),
        optimizer=optim,
        attention=_attention(w),
        loss="chunked" if any(w[key].flag() for key in CHUNKED) else "full",
        group=trl["num_generations"].integer(default=8) if objective == RL else 0,
        remote_code=w["trust_remote_code"].flag(),
        given=frozenset(document.values),
        unknown=tuple(sorted(set(document.values) - known_keys("axolotl"))),
        notes=(*document.notes, *notes, *sharding.notes),
        sharding=sharding,
    )


def _is_16_bit(w: Node) -> bool:
    return (
        w.value.get("bf16", "auto") in ("auto", "full") or w["bf16"].flag() or w["fp16"].flag() or w["bfloat16"].flag()
    )


def _attention(w: Node) -> str:
    if w["flash_attention"].flag():
        return "flash"
    return "eager" if w["eager_attention"].flag() else hf.attention(w["attn_implementation"].text(""))


def _lora(w: Node) -> Lora:
    if not w["lora_r"].there:
        raise BadInput("lora_r is missing", w["lora_r"].place, "axolotl has no default for it.")
    if not w["lora_alpha"].there:
        raise BadInput("lora_alpha is missing", w["lora_alpha"].place, "axolotl has no default for it.")
    targets = w["lora_target_modules"].names()
    raw = w.value.get("lora_target_modules")
    everything = LEAF_NAMES if w["lora_target_linear"].flag() else ""
    if targets in (("all-linear",), ("all_linear",)):
        everything, targets = everything or PEFT_ALL, ()
    is_pattern = isinstance(raw, str) and not everything and bool(targets)
    autocast = w.value.get("peft_autocast_adapter_dtype")
    return Lora(
        w["lora_r"].integer(1, 10**6, default=0),
        w["lora_alpha"].number(1e-9, 1e6, default=0.0),
        w["peft_use_rslora"].flag(),
        w["peft_use_dora"].flag(),
        w["lora_dropout"].number(0.0, 1.0, default=0.0),
        () if is_pattern else targets,
        targets[0] if is_pattern else "",
        everything,
        w["lora_target_parameters"].names(),
        w["lora_modules_to_save"].names(),
        layers=w["peft_layers_to_transform"].integers(),
        layers_pattern=w["peft_layers_pattern"].names(),
        ranks=ranks(w["lora_rank_pattern"]),
        alphas=alphas(w["lora_alpha_pattern"]),
        dtype="bfloat16" if autocast is False else "float32",
    )


def write(recipe: Recipe, header: tuple[str, ...]) -> tuple[File, ...]:
    """`axolotl train axolotl.yaml`."""
    if recipe.objective == RL:
        raise BadInput(
            "a plan for RL is exported to TRL only", "--to axolotl", "Use --to trl, or --to peft for the adapter."
        )
    lora = recipe.lora
    if lora is None and not recipe.pure:
        raise BadInput("the plan keeps fp32 weights under bf16; axolotl's full fine-tuning is all bf16 or all fp32",
                       "--to axolotl", "Use --to trl or --to llamafactory.")  # fmt: skip
    rows: dict[str, Any] = {"base_model": recipe.model, "trust_remote_code": False}
    if lora:
        rows |= {
            "adapter": "qlora" if recipe.weights == "nf4" else "lora",
            "load_in_4bit": recipe.weights == "nf4", "load_in_8bit": False,
            "lora_r": lora.rank, "lora_alpha": int(lora.alpha), "lora_dropout": lora.dropout,
            "lora_target_modules": lora.pattern or ("all-linear" if lora.everything else list(lora.targets)),
            "lora_target_linear": False,
            "peft_use_rslora": lora.rslora, "peft_use_dora": lora.dora,
        }  # fmt: skip
        if lora.alpha != int(lora.alpha):
            raise BadInput(
                f"axolotl takes whole alphas, not {lora.alpha:g}", "--to axolotl", "Plan with a whole alpha."
            )
        if lora.parameters:
            rows |= {"lora_target_parameters": list(lora.parameters), "quantize_moe_experts": recipe.experts_quantised}
        if lora.ranks:
            rows["lora_rank_pattern"] = dict(lora.ranks)
    if recipe.dataset:
        rows["datasets"] = [{"path": recipe.dataset, "ds_type": "json", **_format(recipe.dataset_kind)}]
    rows |= {
        "sequence_len": recipe.max_length, "sample_packing": recipe.packing, "pad_to_sequence_len": recipe.packing,
        "train_on_inputs": False,
        "micro_batch_size": recipe.micro_batch, "gradient_accumulation_steps": recipe.accumulation,
        "num_epochs": recipe.epochs, "optimizer": hf.WRITTEN_OPTIMIZERS[recipe.optimizer],
        "learning_rate": recipe.learning_rate, "lr_scheduler": recipe.scheduler or "constant", "warmup_steps": 0,
        "bf16": recipe.weights != "float32" and recipe.half == "bf16",
        "fp16": recipe.weights != "float32" and recipe.half == "fp16", "tf32": False,
        "attn_implementation": {"flash": "flash_attention_2"}.get(recipe.attention, recipe.attention),
        "gradient_checkpointing": recipe.checkpointing,
    }  # fmt: skip
    if recipe.checkpointing:
        rows["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    rows["output_dir"] = "./lora-plan-output"
    return (File("axolotl.yaml", yaml(rows, header)),)


def _format(kind: str) -> dict[str, Any]:
    """How axolotl is told the schema of a data file."""
    if kind == "messages":
        return {"type": "chat_template"}
    if kind == "conversations":
        names = {"role": "from", "content": "value"}
        return {"type": "chat_template", "field_messages": "conversations", "message_property_mappings": names}
    if kind == "prompt_completion":
        as_it_is = {"format": "{instruction}", "no_input_format": "{instruction}"}
        return {"type": {"field_instruction": "prompt", "field_output": "completion", **as_it_is}}
    return {"type": {"instruction": "alpaca", "text": "completion"}.get(kind, "chat_template")}


def commands(recipe: Recipe) -> str:
    return "axolotl train axolotl.yaml"
