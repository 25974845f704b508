"""The JSON of `lora-plan recommend --json` as a Recipe: the plan in the words of training tools.

Targets are checked against the model's own matrices: what is written reaches exactly what was planned, or it is not
written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_planner.checkpoint import read_argument
from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.facts import gpu
from lora_planner.handoff.manifest import resolve
from lora_planner.handoff.recipe import RL, SFT, Lora, Recipe
from lora_planner.handoff.words import Words
from lora_planner.method import Method, method
from lora_planner.method.targets import adapter_table, top_k
from lora_planner.model import PARAMETER, Model
from lora_planner.model_source import catalogue, load_model
from lora_planner.plan import matmul_dtype

MAX_BYTES = 16 * 1024**2
SCHEMA = 1
AGAIN = "Write it anew with `lora-plan recommend ... --json > plan.json`."


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan as a recipe. `warnings`: (code, sentence, fix), where a tool cannot be told everything."""

    recipe: Recipe
    model: Model
    trainable: int
    sha256: str
    lr_band: tuple[float, float]
    warnings: tuple[tuple[str, str, str], ...] = ()


def read_plan(text: str) -> dict[str, Any]:
    """The envelope in a file, or on stdin as `-`."""
    where = "stdin" if text == "-" else Path(text).name
    if text != "-" and not Path(text).exists():
        raise BadInput("there is no such plan", text, AGAIN)
    document = read_argument(text, MAX_BYTES)
    if document.get("schema_version") != SCHEMA or "result" not in document:
        raise BadInput("not a plan of this version of lora-plan", where, AGAIN)
    result = document["result"]
    if not isinstance(result, dict) or "recommended" not in result:
        raise BadInput("a result without a recommended plan", where, AGAIN)
    if result["recommended"] is None:
        raise BadInput("the plan says that nothing fits", where, "Relax its constraints first.")
    return document


def planned(document: Mapping[str, Any], given: str | None = None, offline: bool = True) -> Planned:
    """The recipe of a plan, its targets resolved against the model."""
    result = document["result"]
    whole = Words(result, "plan", "result/")
    plan = whole.below("recommended")
    model, name = _model(plan, given, offline)
    chosen = _method(plan.below("method"))
    step, data = plan.below("step"), whole.below("data")
    job = whole.below("job")
    codes = [w.get("code") for w in document.get("warnings", []) if isinstance(w, dict)]
    rl = job.text("objective") == RL or "W-RL-TIME" in codes
    if rl and not job.has("group"):
        raise BadInput("a plan for RL that does not name its group", job.place("group"), AGAIN)
    batch = plan.below("batch")
    examples = data.integer("examples", 0)
    epochs = job.number("epochs", _epochs(batch.number("steps", 1.0, 1e-9), batch.integer("batch", 1), examples), 1e-9)
    lr = plan.below("learning_rate").below("lr")
    trainable = plan.below("params").integer("trainable", 0)
    adapter, warnings = _adapter(model, chosen, trainable)
    recipe = Recipe(
        "plan", name, RL if rl else SFT, adapter,
        ("nf4" if chosen.base_dtype == "nf4" else "bfloat16") if adapter else "float32",
        learning_rate=float(f"{lr.number('value', 0.0, 1e-12, 1.0):.3g}"),
        scheduler="constant",
        micro_batch=step.integer("micro_batch", 0),
        accumulation=step.integer("accumulation", 0),
        epochs=float(f"{epochs:.4g}"),
        max_length=step.integer("longest", 0),
        checkpointing=step.text("checkpointing") == "full",
        optimizer=step.text("optimizer", "adamw"),
        attention=step.text("attention", "sdpa"),
        loss=step.text("loss", "full"),
        half=matmul_dtype(gpu(plan.below("gpu").text("name"))),
        group=job.integer("group", 0) if rl else 0,
        dataset=data.text("path"),
        dataset_kind=data.text("kind"),
    )  # fmt: skip
    if recipe.max_length == 0 or recipe.micro_batch == 0 or examples == 0:
        raise BadInput("a plan without its step or its data", "result/recommended/step", AGAIN)
    return Planned(recipe, model, trainable, str(document.get("inputs_sha256", ""))[:12],
                   (lr.number("low", 0.0), lr.number("high", 1.0)), tuple(warnings))  # fmt: skip


def _epochs(steps: float, batch: int, examples: int) -> float:
    """steps * batch / examples        [epochs]

    >>> round(_epochs(126.97, 32, 4063), 5)
    1.00001
    """
    return steps * batch / max(1, examples)


def _model(plan: Words, given: str | None, offline: bool) -> tuple[Model, str]:
    """The model, and what a training tool is to load: a hub id where there is one."""
    said = plan.below("model")
    name, total = said.text("name"), plan.below("params").integer("total", 0)
    wanted = given or name
    try:
        model = load_model(wanted, offline=offline)
    except LoraPlanError as error:
        if given:
            raise
        raise BadInput(f"the plan's model {name!r} is not found here: {error.what}", "result/recommended/model",
                       "Give its directory or hub id with --model.") from None  # fmt: skip
    if model.total != total:
        raise BadInput(f"{model.name} has {model.total:,} parameters, the plan's model {total:,}", "--model",
                       "Give the model that was planned.")  # fmt: skip
    hub = next((entry.hub_id for entry in catalogue() if wanted.lower() in (entry.name, entry.hub_id.lower())), "")
    return model, hub or wanted


def _method(w: Words) -> Method:
    names = w.names("targets")
    return method(w.text("name"), w.integer("rank", 1, 0) or 1, w.number("alpha", 32.0) or 32.0, names or ("all-linear",),
                  w.text("experts", "none"), w.text("base_dtype", "bfloat16"), w.text("adapter_dtype", "float32"))  # fmt: skip


def _adapter(model: Model, chosen: Method, trainable: int) -> tuple[Lora | None, list[tuple[str, str, str]]]:
    """peft's words for a method's adapters: names where they reach just these matrices, else an anchored pattern."""
    if chosen.is_full:
        return None, []
    if chosen.name == "lora-fa":
        raise BadInput("no training tool here has LoRA-FA", "result/recommended/method", "Plan lora instead.")
    table = adapter_table(model, chosen)
    wanted = Counter(a.linear.name for a in table.adapters)
    plain = sorted({a.linear.name for a in table.adapters if a.linear.kind != PARAMETER})
    bare = sorted({a.linear.name for a in table.adapters if a.linear.kind == PARAMETER})
    base = Lora(chosen.rank, chosen.alpha, chosen.name == "rslora", chosen.name == "dora", dtype=chosen.adapter_dtype)
    warnings: list[tuple[str, str, str]] = []
    if bare:
        rank = (
            max(1, chosen.rank // max(1, top_k(model))) if chosen.experts == "per-expert-over-active" else chosen.rank
        )
        ranks = tuple((rf".*\.{re.escape(name)}", rank) for name in bare) if rank != chosen.rank else ()
        base = replace(base, parameters=tuple(bare), ranks=ranks)
    leaves = tuple(sorted({name.rpartition(".")[2] for name in plain}))
    pattern = _anchored(model, plain)
    for lora in (replace(base, targets=leaves), replace(base, pattern=pattern, leaves=leaves)):
        if not plain:
            lora = base
        found = resolve(model, Recipe("plan", lora=lora))
        if found.missed or {row.name for row in found.rows} != set(wanted):
            continue
        if any(row.group == "vision" for row in found.rows):
            continue
        if bare:
            if found.adapter_params != trainable:
                warnings.append(("W-EXPERTS-FORM", f"peft adapts fused experts as one pair for gate and up: {found.adapter_params:,} parameters "
                                 f"in these files, {trainable:,} in the plan", "Check the files: memory and capacity are close, not equal."))  # fmt: skip
        elif found.adapter_params != trainable:
            continue
        return lora, warnings
    raise BadInput(f"no target names reach just what the plan adapts in {model.name}", "result/recommended/method/targets",
                   "Plan with targets all-linear, attention or mlp.")  # fmt: skip


def _anchored(model: Model, names: list[str]) -> str:
    r"""A pattern for whole paths: a name alone would reach a vision tower with the same names.

    >>> from lora_planner.model_source import load_model
    >>> _anchored(load_model("llama-3.1-8b"), ["self_attn.q_proj", "mlp.up_proj"])
    'model\\.layers\\.\\d+\\.(mlp\\.up_proj|self_attn\\.q_proj)'
    """
    inside = sorted(name for name in names if name != model.head.name)
    stack = re.escape(model.module_prefix) + r"\.\d+\.(" + "|".join(re.escape(name) for name in inside) + ")"
    if model.head.name in names:
        return f"({stack}|{re.escape(model.head.name)})" if inside else re.escape(model.head.name)
    return stack
