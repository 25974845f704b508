"""A training config against the planner: what it trains, what that needs, what is wrong. Judges by `findings` only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_planner import learning_rate
from lora_planner.data_file import DataFacts
from lora_planner.errors import BadInput, EnvironmentMissing, LoraPlanError, UnknownName, UnsupportedAdapter, UsageError
from lora_planner.facts import Gpu
from lora_planner.handoff import READERS
from lora_planner.handoff.findings import MIN_P_FIT, Finding, Seen, findings
from lora_planner.handoff.manifest import Manifest, extra_bytes, resolve
from lora_planner.handoff.recipe import RL, SFT, File, Recipe
from lora_planner.handoff.words import known_keys
from lora_planner.ledger import Estimate
from lora_planner.memory import MemoryPlan, Options, memory, p_fit
from lora_planner.memory import constants as memory_constants
from lora_planner.method import DEFAULT_ALPHA
from lora_planner.model import Model
from lora_planner.model_source import load_model
from lora_planner.plan import Configuration, Job, PriceBook, Priced, price
from lora_planner.room import Change, smallest_change_that_fits

__all__ = ["File", "Report", "review"]
#: where neither the file nor a data set says how long a sample is
ASSUMED_LENGTH = 2048
NOFIT, ERROR = 4, 7
HALF_BASE = "bf16 base"
#: keys.txt files that hold a tool's keys
KEY_FILES = {"axolotl": ("axolotl",), "llamafactory": ("llamafactory", "hf"), "peft": ("peft",),
             "unsloth": ("unsloth", "hf", "trl-sft", "peft")}  # fmt: skip


@dataclass(slots=True)
class Report:
    """The answer to `check`. `peak` and `p_fit` contain what modules_to_save adds."""

    recipe: Recipe
    label: str
    model: Model
    manifest: Manifest
    advice: learning_rate.Advice | None
    priced: Priced | None
    peak: Estimate | None
    p_fit: float | None
    min_p_fit: float
    steps: float | None
    findings: list[Finding]
    notes: list[str]

    @property
    def trainable(self) -> int:
        return (
            self.model.total if self.recipe.lora is None else self.manifest.adapter_params + self.manifest.saved_params
        )

    @property
    def exit_code(self) -> int:
        """4 where it does not fit as surely as asked, 7 where another finding is an error, else 0."""
        errors = {finding.code for finding in self.findings if finding.severity == "error"}
        return NOFIT if "E-NOFIT" in errors else ERROR if errors else 0


def model_of(recipe: Recipe, given: str | None, offline: bool) -> Model:
    """The model that the config names, or `--model` in its place."""
    key = READERS[recipe.tool].FIELDS["model"]
    if not given and not recipe.model:
        raise UsageError(f"the config has no {key}", key, "Name the model with --model.")
    try:
        return load_model(given or recipe.model, offline=offline)
    except (UnknownName, EnvironmentMissing, BadInput) as error:
        if given:
            raise
        raise type(error)(
            error.what, f"{key} of the config", f"{error.fix} Or name the base model with --model."
        ) from None


def review(
    recipe: Recipe,
    model: Model,
    gpu: Gpu | None = None,
    book: PriceBook | None = None,
    data: DataFacts | None = None,
    min_p_fit: float = MIN_P_FIT,
    stack: str = "hf-trl",
) -> Report:
    """Everything `check` says about one recipe on one model."""
    notes = list(recipe.notes)
    manifest = resolve(model, recipe)
    tool = READERS[recipe.tool]
    steps = _steps(recipe, data)
    advice, lora_rate = _rates(recipe, model, manifest, steps)
    if recipe.objective not in (SFT, RL):
        notes.append(f"no published law of learning rates for {recipe.objective}: its rate is not judged")
    if recipe.lora and manifest.rows and not manifest.exact:
        notes.append("parameters and optimizer states are those of these adapters; activations and time are those of "
                     f"{','.join(manifest.method.targets)} at rank {manifest.method.rank} in every layer")  # fmt: skip
    if recipe.weights == "int8":
        notes.append("an 8-bit base is counted as bf16: an upper end")
    priced, peak, fits, all_logits, smallest = None, None, None, None, None
    can_price = recipe.lora is None or bool(manifest.rows)
    if can_price:
        try:
            c, tokens, said = _configuration(recipe, model, manifest, gpu, data, stack, steps)
            notes += said
            priced = price(c, book, tokens)
            if gpu:
                peak, fits = _peak(recipe, manifest, c, priced)
                if recipe.tool == "trl" and c.loss == "chunked" and not {"use_liger_kernel"} & recipe.given:
                    whole = replace(c, loss="full")
                    all_logits, _ = _peak(recipe, manifest, whole, price(whole, book, tokens))
                if fits < min_p_fit:
                    smallest = _smallest(recipe, manifest, c, min_p_fit)
        except UnsupportedAdapter as error:
            priced = None
            notes.append(f"not priced: {error.what}")
    seen = Seen(
        recipe, recipe.label or tool.LABEL, tool.FIELDS, _known(recipe), model, manifest, advice, lora_rate,
        priced.break_even_rank() if priced and manifest.exact else None, steps, data, gpu.name if gpu else "",
        float(gpu.memory_bytes) if gpu else 0.0, peak, fits, all_logits, min_p_fit, str(smallest) if smallest else "",
        _in_words(smallest, recipe, tool.FIELDS) if smallest else (),
    )  # fmt: skip
    return Report(
        recipe,
        recipe.label or tool.LABEL,
        model,
        manifest,
        advice,
        priced,
        peak,
        fits,
        min_p_fit,
        steps,
        findings(seen),
        notes,
    )


def _known(recipe: Recipe) -> frozenset[str]:
    if recipe.tool == "trl":
        return frozenset(READERS["trl"].known(recipe.objective)) | known_keys("peft")
    return known_keys(*KEY_FILES[recipe.tool])


def _steps(recipe: Recipe, data: DataFacts | None) -> float | None:
    """Optimizer steps of the run; None where the data are unknown."""
    if recipe.max_steps:
        return float(recipe.max_steps)
    if data is None or recipe.batch is None:
        return None
    return max(1.0, _samples(recipe, data) * recipe.epochs / recipe.batch)


def _samples(recipe: Recipe, data: DataFacts) -> float:
    """Rows of an epoch: examples, or packs of max_length tokens."""
    if recipe.packing and recipe.max_length:
        return max(1.0, data.tokens.value / (recipe.max_length * data.packing_efficiency))
    return data.examples


def _rates(
    recipe: Recipe, model: Model, manifest: Manifest, steps: float | None
) -> tuple[learning_rate.Advice | None, float]:
    objective = recipe.objective if recipe.objective in (SFT, RL) else SFT
    lora = learning_rate.advise(model.total, model.model_type, "lora", 16, steps=steps, objective=objective)
    if recipe.objective not in (SFT, RL):
        return None, lora.lr.value
    m, adapter = manifest.method, recipe.lora
    rank, alpha = (adapter.rank, adapter.alpha) if adapter else (1, DEFAULT_ALPHA)
    try:
        advice = learning_rate.advise(
            model.total, model.model_type, m.name, rank, alpha, steps, objective, recipe.batch
        )
    except LoraPlanError:
        return None, lora.lr.value  # an alpha so far out that no rate is left; `scale` says so
    return advice, lora.lr.value


def _configuration(
    recipe: Recipe, model: Model, manifest: Manifest, gpu: Gpu | None, data: DataFacts | None, stack: str, steps: float | None
) -> tuple[Configuration, float | None, list[str]]:  # fmt: skip
    """The configuration to price, padded tokens of the run where they are known, and what was assumed."""
    notes = []
    micro = recipe.micro_batch
    if micro is None:
        micro = 1
        notes.append("the file does not say how it is trained: one sequence at a time is assumed (--micro-batch)")
    longest = recipe.max_length
    if not longest and data is None:
        longest = ASSUMED_LENGTH
        notes.append(f"how long samples are is unknown: {longest} tokens are assumed (--seq-len, --data)")
    length, run = float(longest or 0), None
    if data is not None and recipe.objective == SFT:
        job = Job(model, data, (), PriceBook({}, _day()), recipe.epochs, longest or None)
        longest = longest if recipe.packing and longest else job.longest
        length = longest if recipe.packing else job.padded_length(micro)
        run = _samples(recipe, data) * recipe.epochs * length
    if steps is not None and recipe.max_steps:
        run = steps * micro * recipe.accumulation * length
    c = Configuration(
        model, manifest.method, gpu, micro, max(1, round(length)), recipe.accumulation,
        "full" if recipe.checkpointing else "none", recipe.attention, recipe.optimizer, recipe.loss, stack, longest or 0,
    )  # fmt: skip
    return c, run, notes


def _day() -> Any:
    from datetime import date

    return date.today()


def _options(recipe: Recipe, c: Configuration) -> Options:
    assert c.gpu
    found: Options = {
        "checkpointing": c.checkpointing, "attention": c.attention, "optimizer": c.optimizer, "loss": c.loss,
        "accumulate": c.accumulation > 1, "known": memory_constants(c.gpu.name, c.stack),
    }  # fmt: skip
    if recipe.lora is None and recipe.pure:
        found["full_precision"] = "bf16"
    if recipe.lora and recipe.weights == "float32":
        found["autocast"] = True  # the tools train a float32 base under bf16 autocast
    if recipe.experts_quantised:
        found["quantised_experts"] = True
    return found


def _peak(recipe: Recipe, manifest: Manifest, c: Configuration, priced: Priced) -> tuple[Estimate, float]:
    """Peak and P(fit) with everything the config trains: `price`'s, and modules_to_save on top."""
    assert c.gpu and priced.memory
    found: MemoryPlan = priced.memory
    own = _options(recipe, c)
    if {"full_precision", "autocast", "quantised_experts"} & set(own):
        found = memory(c.model, c.method, micro_batch=c.micro_batch, seq_len=max(c.seq_len, c.longest), **own)
    more = extra_bytes(c.model, manifest, recipe)
    peak = replace(found.peak, low=found.peak.low + more, value=found.peak.value + more, high=found.peak.high + more)
    return peak, p_fit(peak, c.gpu.memory_bytes)


def _smallest(recipe: Recipe, manifest: Manifest, c: Configuration, sure: float) -> Change | None:
    """The smallest change that fits; of a float32 base that nothing trains, first its dtype."""
    assert c.gpu
    if recipe.lora and recipe.weights == "float32":
        half = replace(c, method=replace(c.method, base_dtype="bfloat16"))
        narrow = replace(recipe, weights="bfloat16")
        peak, sure_now = _peak(narrow, manifest, half, price(half))
        if sure_now >= sure:
            before, _ = _peak(recipe, manifest, c, price(c))
            return Change((HALF_BASE,), peak, before.value - peak.value)
        rest = _smallest(narrow, manifest, half, sure)
        return replace(rest, what=(HALF_BASE, *rest.what)) if rest and "nf4 base" not in rest.what else rest
    room = c.gpu.memory_bytes - extra_bytes(c.model, manifest, recipe)
    if room <= 0:
        return None
    return smallest_change_that_fits(
        c.model, c.method, room, micro_batch=c.micro_batch, seq_len=max(c.seq_len, c.longest), min_p_fit=sure,
        **_options(recipe, c),
    )  # fmt: skip


def _in_words(change: Change, recipe: Recipe, words: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """A change in the tool's keys; what the tool has no key for is left to the sentence."""
    found: list[tuple[str, str]] = []
    for what in change.what:
        name, _, number = what.rpartition(" ")
        if name == "micro-batch" and recipe.batch:
            found += [
                (words.get("micro_batch", ""), number),
                (words.get("accumulation", ""), str(max(1, recipe.batch // int(number)))),
            ]
        elif name == "max length":
            found.append((words.get("max_length", ""), number))
        elif what == "full checkpointing":
            off = words.get("checkpointing", "").startswith("disable")
            found.append((words.get("checkpointing", ""), "false" if off else "true"))
        elif what == HALF_BASE:
            found.append((words.get("weights", ""), "true" if recipe.tool == "axolotl" else "bfloat16"))
        elif what == "nf4 base":
            found.append((words.get("four_bit", ""), "4" if recipe.tool == "llamafactory" else "true"))
        elif what == "8-bit optimizer":
            found.append((words.get("optimizer", ""), "adamw_bnb_8bit"))
        elif what == "adapter in bf16":
            found.append((words.get("adapter_dtype", ""), "false"))
        elif what == "chunked loss":
            found.append(({"axolotl": "liger_fused_linear_cross_entropy", "llamafactory": "enable_liger_kernel",
                           "trl": "use_liger_kernel"}.get(recipe.tool, ""), "true"))  # fmt: skip
    return tuple((key, value) for key, value in found if key)
