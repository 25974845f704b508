"""TRL: the YAML file of `trl sft --config` (or grpo), its command line, or a script's SFTConfig and LoraConfig.

Keys and defaults: trl 1.16, ScriptArguments, ModelConfig, SFTConfig, GRPOConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_planner.checked import Node
from lora_planner.errors import BadInput
from lora_planner.handoff import hf
from lora_planner.handoff.recipe import FUSED, NONE, PEFT_ALL, RL, SFT, File, Lora, Recipe
from lora_planner.handoff.source import ADAPT, LOAD, TRAIN, Document
from lora_planner.handoff.words import alphas, known_keys, ranks, yaml

LABEL = "TRL 1.16"
#: what it can be told of experts: lora_target_parameters, and no rank of their own
EXPERTS = (FUSED, NONE)
FIELDS = hf.FIELDS | {
    "model": "model_name_or_path", "rank": "lora_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "targets": "lora_target_modules", "parameters": "lora_target_parameters", "saved": "lora_modules_to_save",
    "rslora": "use_rslora", "dora": "use_dora", "weights": "dtype", "four_bit": "load_in_4bit",
    "max_length": "max_length", "packing": "packing", "attention": "attn_implementation", "group": "num_generations",
    "remote_code": "trust_remote_code", "adapter": "use_peft",
}  # fmt: skip
#: keys whose value a check needs
READ = frozenset(FIELDS.values()) | {"r", "target_modules", "target_parameters", "modules_to_save", "rank_pattern"}
#: TRL's learning rates are full fine-tuning's, whether or not an adapter is trained
DEFAULT_RATE = {SFT: 2e-5, RL: 1e-6}
SIGNS = frozenset({"use_peft", "max_completion_length", "num_generations", "reward_funcs", "dataset_name",
                   "packing_strategy", "assistant_only_loss", "completion_only_loss", "lora_task_type"})  # fmt: skip
RL_SIGNS = known_keys("trl-grpo") - known_keys("trl-sft") - known_keys("trl-dpo")
DPO_SIGNS = known_keys("trl-dpo") - known_keys("trl-sft") - known_keys("trl-grpo")
#: prompts are not cut; this long ones are assumed where nobody says
ASSUMED_PROMPT = 512
#: TRL's own arguments; a script without them is one of transformers' Trainer
CONFIGS = frozenset({"SFTConfig", "GRPOConfig", "DPOConfig", "SFTTrainer", "GRPOTrainer", "DPOTrainer"})
#: calls after which an adapter gets gradients through re-entrant checkpointing
WIRED = (
    "SFTTrainer",
    "GRPOTrainer",
    "DPOTrainer",
    "prepare_model_for_kbit_training",
    "model.enable_input_require_grads",
)
#: LoraConfig's words in ModelConfig's
FROM_PEFT = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters", "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora", "use_dora": "use_dora", "task_type": "lora_task_type",
}  # fmt: skip


def known(objective: str) -> frozenset[str]:
    """The keys that `trl OBJECTIVE --config` takes."""
    own = {RL: "trl-grpo", SFT: "trl-sft"}.get(objective, "trl-dpo")
    return known_keys("hf", "trl", own)


def flattened(document: Document) -> tuple[dict[str, Any], frozenset[str], dict[str, Any]]:
    """A script's three sections in the words of the command line, its unknown keys, and what only LoraConfig has."""
    sections = document.values
    adapt, load = dict(sections.get(ADAPT, {})), dict(sections.get(LOAD, {}))
    flat: dict[str, Any] = dict(sections.get(TRAIN, {}))
    unknown = frozenset(adapt) - known_keys("peft") | frozenset(flat) - known(document.objective) - {"args"}
    if ADAPT in sections:
        flat["use_peft"] = True
        defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}  # LoraConfig's, not ModelConfig's
        flat |= {FROM_PEFT[key]: value for key, value in (defaults | adapt).items() if key in FROM_PEFT}
    if "model_name" in load or "model_name_or_path" in load:
        flat["model_name_or_path"] = load.get("model_name", load.get("model_name_or_path"))
    for key in ("load_in_4bit", "load_in_8bit", "attn_implementation", "trust_remote_code", "bnb_4bit_quant_storage"):
        if key in load:
            flat[key] = load[key]
    loaded = any(call.endswith("from_pretrained") and "Tokenizer" not in call for call in document.calls)
    flat["dtype"] = load.get("dtype", load.get("torch_dtype", "auto" if loaded else "float32"))
    return flat, unknown, adapt


def read(document: Document) -> Recipe:
    values: Mapping[str, Any] = document.values
    unknown: frozenset[str] = frozenset()
    only_peft: dict[str, Any] = {}
    if document.origin == "script":
        values, unknown, only_peft = flattened(document)
    w = Node(values, document.where, lenient=True)
    objective = document.objective
    if not objective:
        objective = RL if RL_SIGNS & set(values) else "dpo" if DPO_SIGNS & set(values) else SFT
    bare = document.origin == "script" and document.calls.isdisjoint(CONFIGS)
    fields = hf.trainer(w, 5e-5 if bare else DEFAULT_RATE.get(objective, 1e-6), document, checkpointing=not bare)
    notes = [note for note in document.notes if note.split()[0] in READ] + list(fields.pop("notes"))
    lora = _lora(w, Node(only_peft, document.where, lenient=True)) if w["use_peft"].flag() else None
    weights, pure = _weights(w, lora is not None)
    sharding = fields["sharding"]
    if weights == "nf4":
        storage = str(w.value.get("bnb_4bit_quant_storage") or "")
        fields["sharding"] = replace(sharding, floats=storage.removeprefix("torch.").startswith(("bfloat", "float")))
    if sharding.engine and w["bf16"].flag(not bare) | w["fp16"].flag():
        pure = False  # both update fp32 copies of what 16 bits compute with
    if objective == RL:
        length = w["vllm_max_model_length"].integer(default=0)
        notes.append("what samples is not counted: plan it with `lora-plan recommend --rl`")
        if not length:
            length = w["max_completion_length"].integer(default=512) + ASSUMED_PROMPT
            notes.append(f"prompts of {ASSUMED_PROMPT} tokens are assumed")
    elif bare:
        length = 0
    else:
        length = w["max_length"].integer(0, default=1024) if "max_length" not in values or w["max_length"].there else 0
    if document.origin != "script" and objective in (SFT, RL, "dpo"):
        unknown = frozenset(values) - known(objective)
    packed = w["packing"].flag() if objective == SFT else False
    attention = hf.attention(w["attn_implementation"].text(""))
    if values.get("max_length", 0) is None:
        notes.append("max_length is null: nothing is cut")
    return Recipe(
        "trl",
        w["model_name_or_path"].text(""),
        objective,
        lora,
        weights,
        pure,
        **fields,
        max_length=length,
        packing=packed,
        packed_attention=attention == "flash",
        attention=attention,
        loss="chunked" if w["use_liger_kernel"].flag() or _in_pieces(w, objective, bare) else "full",
        group=w["num_generations"].integer(1, default=8) if objective == RL else 0,
        remote_code=w["trust_remote_code"].flag(),
        label="transformers' Trainer" if bare else "",
        wired=document.origin != "script" or not document.calls.isdisjoint(WIRED),
        given=frozenset(values),
        unknown=tuple(sorted(unknown)),
        notes=tuple(notes),
    )


def _in_pieces(w: Node, objective: str, bare: bool) -> bool:
    """SFTTrainer of 1.16 never has all logits at once, except for label smoothing."""
    return objective == SFT and not bare and w["label_smoothing_factor"].number(default=0.0) == 0


def _lora(w: Node, peft: Node) -> Lora:
    targets = w["lora_target_modules"].names()
    everything = PEFT_ALL if targets == ("all-linear",) else ""
    raw = w.value.get("lora_target_modules")
    # ModelConfig unwraps a list of one, and peft takes a text as a pattern for the whole path; LoraConfig unwraps nothing
    single = len(targets) == 1 and not everything and (isinstance(raw, str) or not peft.value)
    return Lora(
        w["lora_r"].integer(1, 10**6, default=16),
        w["lora_alpha"].number(1e-9, 1e6, default=32.0),
        w["use_rslora"].flag(),
        w["use_dora"].flag(),
        w["lora_dropout"].number(0.0, 1.0, default=0.05),
        () if everything or single else targets,
        targets[0] if single else "",
        everything,
        w["lora_target_parameters"].names(),
        w["lora_modules_to_save"].names(),
        peft["exclude_modules"].names(),
        layers=peft["layers_to_transform"].integers(),
        layers_pattern=peft["layers_pattern"].names(),
        ranks=ranks(peft["rank_pattern"]),
        alphas=alphas(peft["alpha_pattern"]),
    )


def _weights(w: Node, adapter: bool) -> tuple[str, bool]:
    if w["load_in_4bit"].flag():
        return "nf4", False
    if w["load_in_8bit"].flag():
        return "int8", False
    inner = w["model_init_kwargs"].table()
    dtype = w["dtype"].text(inner["dtype"].text(inner["torch_dtype"].text("float32")))
    return ("bfloat16" if dtype == "auto" else dtype), dtype != "float32" and not adapter


def write(recipe: Recipe, header: tuple[str, ...]) -> tuple[File, ...]:
    """`trl sft --config sft.yaml`: every value that TRL would otherwise take from full fine-tuning is there."""
    lora = recipe.lora
    rows: dict[str, Any] = {"model_name_or_path": recipe.model, "trust_remote_code": False}
    rows["dtype"] = "float32" if recipe.weights == "float32" else {"bf16": "bfloat16", "fp16": "float16"}[recipe.half]
    rows["attn_implementation"] = {"flash": "flash_attention_2"}.get(recipe.attention, recipe.attention)
    if lora:
        if lora.ranks or lora.alphas:
            raise BadInput("TRL's command line cannot give the experts a rank of their own", "--to trl",
                           "Use --to peft, and pass peft_config=LoraConfig.from_pretrained(...) to SFTTrainer.")  # fmt: skip
        rows |= {
            "use_peft": True, "lora_r": lora.rank, "lora_alpha": whole(lora.alpha), "lora_dropout": lora.dropout,
            "lora_target_modules": _targets(lora),
            "use_rslora": lora.rslora, "use_dora": lora.dora,
        }  # fmt: skip
        if lora.parameters:
            rows["lora_target_parameters"] = list(lora.parameters)
        if recipe.weights == "nf4":
            rows |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    rows |= trainer_rows(recipe)
    if recipe.objective == RL:
        rows |= {"num_generations": recipe.group, "max_completion_length": _completion(recipe), "beta": 0.0}
        rows["use_vllm"] = bool(recipe.engine_share)
        if recipe.engine_share:
            # colocated: the engine sleeps while the trainer works, which is what the plan's peak says
            rows |= {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True,
                     "vllm_gpu_memory_utilization": recipe.engine_share, "vllm_max_model_length": recipe.max_length}  # fmt: skip
    else:
        rows |= {"max_length": recipe.max_length, "packing": recipe.packing, "loss_type": "nll"}
        if recipe.dataset_kind in ("messages", "conversations"):
            rows["assistant_only_loss"] = True
    if recipe.dataset:
        rows["datasets"] = [{"path": "json", "data_files": recipe.dataset, "split": "train"}]
    rows["output_dir"] = "lora-plan-output"
    return (File("grpo.yaml" if recipe.objective == RL else "sft.yaml", yaml(rows, header)),)


def _completion(recipe: Recipe) -> int:
    """What a sample leaves for the answer; and whether a step holds whole groups, which GRPOTrainer asks for."""
    length, size = recipe.max_length or 0, recipe.batch or 0
    if length <= 2 * ASSUMED_PROMPT:
        raise BadInput(f"samples of {length} tokens leave no room for a prompt of {ASSUMED_PROMPT} and an answer", "--to trl",
                       "Plan with a longer --max-length.")  # fmt: skip
    if size % recipe.group:
        raise BadInput(f"a step of {size} samples holds no whole groups of {recipe.group}", "--to trl",
                       "Plan with a --group that divides the batch.")  # fmt: skip
    return min(recipe.answer, length) if recipe.answer else length - ASSUMED_PROMPT


def _targets(lora: Lora) -> str | list[str]:
    """A single name goes as a pattern: TRL unwraps it from its list, and peft would look for a module of just that name."""
    if lora.everything:
        return "all-linear"
    if lora.pattern:
        return lora.pattern
    return list(lora.targets) if len(lora.targets) > 1 else rf".*\.{lora.targets[0]}" if lora.targets else []


def trainer_rows(recipe: Recipe) -> dict[str, Any]:
    """A Recipe in TrainingArguments' keys, nothing left to a default that we know to matter."""
    rows: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.scheduler or "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation,
        "num_train_epochs": recipe.epochs,
        "optim": hf.WRITTEN_OPTIMIZERS[recipe.optimizer],
        "gradient_checkpointing": recipe.checkpointing,
        recipe.half: True,
    }
    if recipe.checkpointing:
        rows["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return rows


def whole(number: float) -> int | float:
    """TRL's and LLaMA-Factory's alpha is a whole number.

    >>> whole(32.0), whole(22.6)
    (32, 22.6)
    """
    return int(number) if number == int(number) else number


def commands(recipe: Recipe) -> str:
    return f"trl {'grpo' if recipe.objective == RL else 'sft'} --config {write_name(recipe)}"


def write_name(recipe: Recipe) -> str:
    return "grpo.yaml" if recipe.objective == RL else "sft.yaml"
