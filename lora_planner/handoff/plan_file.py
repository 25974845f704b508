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
from shlex import quote
from typing import Any

from lora_planner.checked import Node, plan_hash
from lora_planner.checkpoint import read_argument
from lora_planner.errors import BadInput, Infeasible, LoraPlanError
from lora_planner.facts import gpu
from lora_planner.handoff import WRITERS
from lora_planner.handoff.manifest import resolve
from lora_planner.handoff.recipe import FUSED, NONE, OVER_ACTIVE, RL, SFT, Lora, Recipe
from lora_planner.handoff.review import peak_of
from lora_planner.ledger import Estimate
from lora_planner.memory import MIN_P_FIT
from lora_planner.method import BY_NAME, DEFAULT_EXPERTS, Method, method
from lora_planner.method.targets import adapter_table, top_k
from lora_planner.model import PARAMETER, Model
from lora_planner.model_source import catalogue, load_model
from lora_planner.plan import Configuration, matmul_dtype, price
from lora_planner.rollout import VLLM
from lora_planner.throughput import DEFAULT_STACK
from lora_planner.units import gib

MAX_BYTES = 16 * 1024**2
SCHEMA = 1
#: what is planned of experts where it is none of a tool's forms
PLANNED = "planned"
AGAIN = "Write it anew with `lora-plan recommend ... --json > plan.json`."


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan as a recipe. `experts`: the form of the experts' adapters where it is not the planned one; `peak`: with it."""

    recipe: Recipe
    model: Model
    trainable: int
    sha256: str
    lr_band: tuple[float, float]
    experts: str = ""
    peak: Estimate | None = None


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


def planned(
    document: Mapping[str, Any],
    given: str | None = None,
    offline: bool = True,
    tool: str = "",
    experts: str = "",
    plan_name: str = "PLAN",
) -> Planned:
    """The recipe of a plan, its targets resolved against the model.

    `tool`: whose forms of experts' adapters count; `experts`: one of them, in place of the planned one.
    """
    result = document["result"]
    whole = Node(result, "plan", "/result", AGAIN)
    plan = whole["recommended"].table()
    model, name = _model(plan, given, offline)
    chosen = _method(plan["method"].table())
    step, data = plan["step"].table(), whole["data"].table()
    job = whole["job"].table()
    codes = [w.get("code") for w in document.get("warnings", []) if isinstance(w, dict)]
    rl = job["objective"].text("") == RL or "W-RL-TIME" in codes
    if rl and not job["group"].there:
        raise BadInput("a plan for RL that does not name its group", job["group"].place, AGAIN)
    batch, sampled = plan["batch"].table(), plan["rollout"].table()
    examples = data["examples"].integer(default=0)
    epochs = job["epochs"].number(
        1e-9, default=_epochs(batch["steps"].number(1e-9, default=1.0), batch["batch"].integer(default=1), examples)
    )
    lr = plan["learning_rate"].table()["lr"].table()
    trainable = plan["params"].table()["trainable"].integer(default=0)
    adapter, trainable = _adapter(model, chosen, trainable, tool, experts, plan_name)
    recipe = Recipe(
        "plan", name, RL if rl else SFT, adapter,
        ("nf4" if chosen.base_dtype == "nf4" else "bfloat16") if adapter else "float32",
        learning_rate=float(f"{lr['value'].number(1e-12, 1.0, default=0.0):.3g}"),
        scheduler="constant",
        micro_batch=step["micro_batch"].integer(default=0),
        accumulation=step["accumulation"].integer(default=0),
        epochs=float(f"{epochs:.4g}"),
        max_length=step["longest"].integer(default=0),
        checkpointing=step["checkpointing"].text("") == "full",
        optimizer=step["optimizer"].text("adamw"),
        attention=step["attention"].text("sdpa"),
        loss=step["loss"].text("full"),
        half=matmul_dtype(gpu(plan["gpu"].table()["name"].text(""))),
        group=job["group"].integer(default=0) if rl else 0,
        answer=round(sampled["longest_answer"].number(default=0.0)) if rl else 0,
        engine_share=float(f"{sampled['engine_share'].number(0.0, 1.0, default=0.0):.2f}") if sampled["engine"].text("") == VLLM else 0.0,
        dataset=data["path"].text(""),
        dataset_kind=data["kind"].text(""),
    )  # fmt: skip
    if recipe.max_length == 0 or recipe.micro_batch == 0 or examples == 0:
        raise BadInput("a plan without its step or its data", "result/recommended/step", AGAIN)
    sha, band = plan_hash(result), (lr["low"].number(default=0.0), lr["high"].number(default=1.0))
    if not experts:
        return Planned(recipe, model, trainable, sha, band)
    peak = _again(recipe, chosen, model, plan)
    return Planned(recipe, model, trainable, sha, band, experts, peak)


def _again(recipe: Recipe, chosen: Method, model: Model, plan: Node) -> Estimate:
    """The peak of the plan's own step with other adapters on the experts; refused where it no longer fits."""
    step, card = plan["step"].table(), gpu(plan["gpu"].table()["name"].text(""))
    manifest = resolve(model, recipe)
    c = Configuration(
        model, manifest.method, card, step["micro_batch"].integer(default=1), step["seq_len"].integer(default=1), step["accumulation"].integer(default=1),
        step["checkpointing"].text("none"), step["attention"].text("sdpa"), step["optimizer"].text("adamw"),
        step["loss"].text("full"), step["stack"].text(DEFAULT_STACK), step["longest"].integer(0, default=0),
    )  # fmt: skip
    _, peak, fits = peak_of(recipe, manifest, c, price(c))
    if fits < MIN_P_FIT:
        raise Infeasible(f"with other adapters on the experts the plan does not fit: peak {gib(peak.value)} of {gib(card.memory_bytes)}, "
                         f"P(fit) {fits:.2f}", "--experts", "Choose another form, or plan for a larger GPU.")  # fmt: skip
    return peak


def _epochs(steps: float, batch: int, examples: int) -> float:
    """steps * batch / examples        [epochs]

    >>> round(_epochs(126.97, 32, 4063), 5)
    1.00001
    """
    return steps * batch / max(1, examples)


def _model(plan: Node, given: str | None, offline: bool) -> tuple[Model, str]:
    """The model, and what a training tool is to load: a hub id where there is one."""
    said = plan["model"].table()
    name, total = said["name"].text(""), plan["params"].table()["total"].integer(default=0)
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


def _method(w: Node) -> Method:
    names = w["targets"].names()
    return method(w["name"].text(""), w["rank"].integer(0, default=1) or 1, w["alpha"].number(default=32.0) or 32.0, names or ("all-linear",),
                  w["experts"].text("none"), w["base_dtype"].text("bfloat16"), w["adapter_dtype"].text("float32"))  # fmt: skip


def _adapter(
    model: Model, chosen: Method, trainable: int, tool: str, experts: str, plan_name: str
) -> tuple[Lora | None, int]:
    """peft's words for a method's adapters, and how many parameters they train.

    Names where they reach just these matrices, else an anchored pattern.
    """
    if chosen.is_full:
        return None, trainable
    if chosen.name == "lora-fa":
        raise BadInput("no training tool here has LoRA-FA", "result/recommended/method", "Plan lora instead.")
    bare = _bare(model, chosen)
    if experts and not bare:
        raise BadInput("the plan adapts no experts", "--experts", "Leave it out.")
    form = (experts or _form(model, chosen)) if bare else NONE
    if bare and tool and form not in WRITERS[tool].EXPERTS:
        raise _inexpressible(model, chosen, trainable, tool, plan_name)
    if form == NONE and bare:
        chosen = replace(chosen, experts=NONE)
    elif bare and chosen.name == "dora":
        raise BadInput(
            "peft has no DoRA for the experts' parameters",
            "result/recommended/method",
            "Use --experts none, or plan lora.",
        )
    lora = _lora(model, chosen, form)
    count = resolve(model, Recipe("plan", lora=lora)).adapter_params if lora else 0
    if lora is None or (not experts and form != PLANNED and count != trainable):
        raise BadInput(f"no target names reach just what the plan adapts in {model.name}", "result/recommended/method/targets",
                       "Plan with targets all-linear, attention or mlp.")  # fmt: skip
    return lora, count


def _bare(model: Model, chosen: Method) -> bool:
    """Whether the plan adapts experts, which are bare 3-D parameters."""
    return any(a.linear.kind == PARAMETER for a in adapter_table(model, chosen).adapters)


def _form(model: Model, chosen: Method) -> str:
    """Which of peft's forms is the planned one to the last parameter; PLANNED where none is.

    An expert of one matrix up and one down has the same adapters in either way; where gate and up are one tensor, peft
    gives both one A.

    >>> from lora_planner.model_source import load_model
    >>> _form(load_model("qwen3-30b-a3b"), Method()), _form(load_model("nemotron-3-nano-30b-a3b"), Method())
    ('planned', 'fused-over-active')
    """
    if chosen.experts == FUSED:
        return FUSED
    rows = [a for a in adapter_table(model, chosen).adapters if a.linear.kind == PARAMETER]
    if chosen.experts == "shared-outer" or any(a.parts > 1 for a in rows):
        return PLANNED
    return OVER_ACTIVE if chosen.experts == DEFAULT_EXPERTS else FUSED


def _inexpressible(model: Model, chosen: Method, trainable: int, tool: str, plan_name: str) -> BadInput:
    """One line: what the tool cannot be told, what it can, and how to export that."""
    forms: tuple[str, ...] = WRITERS[tool].EXPERTS
    counts = []
    for form in forms:
        lora = _lora(model, replace(chosen, experts=NONE) if form == NONE else chosen, form)
        if lora:
            counts.append(f"{form}, {resolve(model, Recipe('plan', lora=lora)).adapter_params:,} parameters")
    why = ""
    if len(forms) > 1:
        why = (
            ": no factor is shared by experts"
            if chosen.experts == "shared-outer"
            else ": gate and up of an expert share one A"
        )
    return BadInput(f"{WRITERS[tool].LABEL} cannot train the planned {trainable:,} parameters with --experts {chosen.experts}{why}",
                    f"--to {tool}", f"It can train {'; '.join(counts)}: lora-plan export {quote(plan_name)} --to {tool} --experts {forms[0]}")  # fmt: skip


def _lora(model: Model, chosen: Method, form: str) -> Lora | None:
    """peft's words that reach just the planned modules, with the experts in one of peft's forms."""
    table = adapter_table(model, chosen)
    wanted = Counter(a.linear.name for a in table.adapters)
    plain = sorted({a.linear.name for a in table.adapters if a.linear.kind != PARAMETER})
    bare = sorted({a.linear.name for a in table.adapters if a.linear.kind == PARAMETER})
    base = Lora(chosen.rank, chosen.alpha, chosen.name == "rslora", chosen.name == "dora", dtype=chosen.adapter_dtype)
    if bare:
        rank = max(1, chosen.rank // max(1, top_k(model))) if form == OVER_ACTIVE else chosen.rank
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
        modules = sum(row.params for row in found.rows if row.name in plain)
        if modules == sum(BY_NAME[chosen.name].trainable(a) for a in table.adapters if a.linear.name in plain):
            return lora
    return None


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
