"""A training config against the planner: what it trains, what that needs, what is wrong. Judges by `findings` only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_planner import learning_rate
from lora_planner.data_file import DataFacts
from lora_planner.errors import BadInput, EnvironmentMissing, LoraPlanError, UnknownName, UnsupportedAdapter, UsageError
from lora_planner.facts import Gpu
from lora_planner.handoff import READERS, fleet
from lora_planner.handoff.findings import MIN_P_FIT, Finding, Seen, findings
from lora_planner.handoff.fleet import travels_as
from lora_planner.handoff.manifest import Manifest, extra_bytes, resolve
from lora_planner.handoff.recipe import RL, SFT, File, Recipe
from lora_planner.handoff.words import known_keys
from lora_planner.ledger import Estimate
from lora_planner.memory import (
    ALONE,
    GATHERED,
    QUANTISED_BITS,
    MemoryPlan,
    Options,
    Split,
    memory,
    p_fit,
    weights,
)
from lora_planner.memory import constants as memory_constants
from lora_planner.method import DEFAULT_ALPHA
from lora_planner.model import Model
from lora_planner.model_source import load_model
from lora_planner.plan import Configuration, Job, PriceBook, Priced, price
from lora_planner.room import Change, smallest_change_that_fits
from lora_planner.units import gib

__all__ = ["File", "Report", "review"]
#: where neither the file nor a data set says how long a sample is
ASSUMED_LENGTH = 2048
NOFIT, ERROR = 4, 7
HALF_BASE = "bf16 base"
FLOATS = "4-bit weights stored as floats"
BF16 = 2
#: GPUs that are tried where nothing fits on those that are named
MORE = (2, 4, 8, 16, 32, 64, 128, 256)
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
    gpus: int = 1,
) -> Report:
    """Everything `check` says about one recipe on one model, on `gpus` of the named GPU."""
    recipe = replace(recipe, gpus=gpus)
    notes = list(recipe.notes)
    sharding = recipe.sharding
    if sharding.refused and gpu:
        raise BadInput(f"{sharding.refused} splits the model in a way that no memory formula here counts", sharding.refused,
                       "Check without --gpu, or with ZeRO or FSDP.")  # fmt: skip
    if recipe.lora and recipe.weights == "float32" and sharding.engine == "deepspeed":
        recipe = replace(recipe, weights="bfloat16")
        notes.append("DeepSpeed holds a float32 base in 16 bits")
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
    split = split_of(recipe, model)
    priced, peak, fits, all_logits, smallest, unsplit = None, None, None, None, "", None
    change: Change | None = None
    can_price = recipe.lora is None or bool(manifest.rows)
    if can_price:
        try:
            c, tokens, said = _configuration(recipe, model, manifest, gpu, data, stack, steps)
            notes += said
            priced = price(c, book, tokens)
            if gpu:
                priced.memory, peak, fits = peak_of(recipe, manifest, c, priced)
                priced.p_fit = p_fit(priced.memory.peak, gpu.memory_bytes)
                if recipe.tool == "trl" and c.loss == "chunked" and not {"use_liger_kernel"} & recipe.given:
                    whole = replace(c, loss="full")
                    _, all_logits, _ = peak_of(recipe, manifest, whole, price(whole, book, tokens))
                if fits < min_p_fit:
                    change = _smallest(recipe, manifest, c, min_p_fit)
                    smallest = str(change) if change else _more_gpus(recipe, manifest, c, priced, min_p_fit)
                if gpus > 1 or split != ALONE:
                    unsplit = _unsplit(recipe, manifest, c, tokens, book)
                    fleet.timed(priced, sharding, gpus, book)
                    notes += _of_several(recipe, priced)
        except UnsupportedAdapter as error:
            priced = None
            notes.append(f"not priced: {error.what}")
    seen = Seen(
        recipe, recipe.label or tool.LABEL, tool.FIELDS, _known(recipe), model, manifest, advice, lora_rate,
        priced.break_even_rank() if priced and manifest.exact else None, steps, data, gpu.name if gpu else "",
        float(gpu.memory_bytes) if gpu else 0.0, peak, fits, all_logits, min_p_fit, smallest,
        _in_words(change, recipe, tool.FIELDS) if change else (), unsplit,
        priced.step_s.value if priced and priced.step_s else 0.0,
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


def split_of(recipe: Recipe, model: Model) -> Split:
    """One GPU's share under the recipe's sharding."""
    return recipe.sharding.split(recipe.gpus, recipe.accumulation, model.hidden_size)


def _of_several(recipe: Recipe, priced: Priced) -> list[str]:
    """What the numbers of several GPUs leave out."""
    found = []
    c = priced.configuration
    if recipe.gpus > 1 and not recipe.packing:
        found.append("a step waits for the GPU with the longest batch: that wait is not in the time")
    if "optimizer" in recipe.sharding.host:
        found.append("the optimizer's step on the host's processor is not in the time")
    if recipe.gpus > 1 and c.gpu and c.gpu.form != "cpu":
        found.append("buffers of NCCL are not counted")
    return found


def _unsplit(
    recipe: Recipe, manifest: Manifest, c: Configuration, tokens: float | None, book: PriceBook | None
) -> tuple[float, float] | None:
    """(P(fit), seconds of a step) with whole weights on every GPU, where the recipe splits them."""
    s = recipe.sharding
    if not s.weights or recipe.gpus == 1:
        return None
    narrow = replace(recipe, sharding=replace(s, weights=False, kept=False, host=s.host - {"params"}))
    again = price(c, book, tokens)
    _, _, fits = peak_of(narrow, manifest, c, again)
    fleet.timed(again, narrow.sharding, recipe.gpus, book)
    return fits, again.step_s.value if again.step_s else 0.0


def _more_gpus(recipe: Recipe, manifest: Manifest, c: Configuration, priced: Priced, sure: float) -> str:
    """Where no change of the step fits: weights split over the GPUs that there are, or over more."""
    assert c.gpu
    s = recipe.sharding
    if recipe.weights in QUANTISED_BITS and not s.floats:
        return ""
    wide = s if s.weights else replace(s, engine=s.engine or "fsdp", weights=True, gradients=True, states=True)
    for n in (recipe.gpus, *(n for n in MORE if n > recipe.gpus)):
        if n == 1 or (n == recipe.gpus and s.weights):
            continue
        _, peak, fits = peak_of(replace(recipe, gpus=n, sharding=wide), manifest, c, priced)
        if fits >= sure:
            how = s.name if s.weights else "ZeRO-3" if s.engine == "deepspeed" else "FSDP or ZeRO-3"
            return f"{n} GPUs with {how}: peak {gib(peak.value)} on each (--gpu {n}x{c.gpu.name})"
    return ""


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
        run = steps * micro * recipe.accumulation * recipe.gpus * length
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
    split = split_of(recipe, c.model)
    if split != ALONE:
        found["split"] = split
    if recipe.lora is None and recipe.pure:
        found["full_precision"] = "bf16"
    elif recipe.lora is None and recipe.sharding.engine == "deepspeed":
        found["full_precision"] = "master"
    if recipe.lora and recipe.weights == "float32":
        found["autocast"] = True  # the tools train a float32 base under bf16 autocast
    if recipe.experts_quantised:
        found["quantised_experts"] = True
    return found


def peak_of(recipe: Recipe, manifest: Manifest, c: Configuration, priced: Priced) -> tuple[MemoryPlan, Estimate, float]:
    """The plan of one GPU, its peak with everything the config trains, and P(fit): modules_to_save are on top."""
    assert c.gpu and priced.memory
    found: MemoryPlan = priced.memory
    own = _options(recipe, c)
    if {"full_precision", "autocast", "quantised_experts", "split"} & set(own):
        found = memory(c.model, c.method, micro_batch=c.micro_batch, seq_len=max(c.seq_len, c.longest), **own)
    more = extra_bytes(c.model, manifest, recipe, own.get("split", ALONE)) + _unshared(recipe, c, found)
    peak = replace(found.peak, low=found.peak.low + more, value=found.peak.value + more, high=found.peak.high + more)
    return found, peak, p_fit(peak, c.gpu.memory_bytes)


def _unshared(recipe: Recipe, c: Configuration, found: MemoryPlan) -> float:
    """Bytes that every GPU holds although the weights are split.

        weights stored as integers:   quantised * (1 - 1 / GPUs - GATHERED / layers), nor are they gathered
        gathered weights that are kept:     whole - what was counted as gathered

    Source: accelerate 1.15 leaves bitsandbytes' integers out of FSDP2; ZeRO-3 does not share them out (FastChat: 24 GB
    where 3.3 were computed).
    """
    s, m = recipe.sharding, c.method
    n = s.share(recipe.gpus)
    if not s.weights or n == 1:
        return 0.0
    whole, rest = weights(c.model, travels_as(m), experts_too=recipe.experts_quantised)
    integers = 0.0
    if recipe.weights == "int8":
        integers = whole  # counted as bf16, an upper end
    elif not m.is_full and m.base_dtype in QUANTISED_BITS and not s.floats:
        integers = whole - BF16 * rest
    more = integers * (1 - 1 / n - GATHERED / c.model.layers)
    whole -= integers
    if s.kept:
        counted = next((t.value for t in found.phases["forward"].terms if t.name == "gathered weights"), 0.0)
        more += max(0.0, whole - counted)
    return more


def _smallest(recipe: Recipe, manifest: Manifest, c: Configuration, sure: float) -> Change | None:
    """The smallest change that fits; of a float32 base that nothing trains, first its dtype; of 4-bit weights that are
    not split, first their storage."""
    assert c.gpu
    if recipe.lora and recipe.weights == "float32":
        half = replace(c, method=replace(c.method, base_dtype="bfloat16"))
        narrow = replace(recipe, weights="bfloat16")
        _, peak, sure_now = peak_of(narrow, manifest, half, price(half))
        if sure_now >= sure:
            _, before, _ = peak_of(recipe, manifest, c, price(c))
            return Change((HALF_BASE,), peak, before.value - peak.value)
        rest = _smallest(narrow, manifest, half, sure)
        return replace(rest, what=(HALF_BASE, *rest.what)) if rest and "nf4 base" not in rest.what else rest
    s = recipe.sharding
    if s.weights and recipe.weights in QUANTISED_BITS and not s.floats:
        split = replace(recipe, sharding=replace(s, floats=True))
        _, peak, sure_now = peak_of(split, manifest, c, price(c))
        if sure_now >= sure:
            _, before, _ = peak_of(recipe, manifest, c, price(c))
            return Change((FLOATS,), peak, before.value - peak.value)
    own = _options(recipe, c)
    room = c.gpu.memory_bytes - extra_bytes(c.model, manifest, recipe, own.get("split", ALONE))
    if recipe.sharding.weights:
        room -= _unshared(recipe, c, memory(c.model, c.method, micro_batch=1, seq_len=1, **own))
    if room <= 0:
        return None
    return smallest_change_that_fits(
        c.model, c.method, room, micro_batch=c.micro_batch, seq_len=max(c.seq_len, c.longest), min_p_fit=sure, **own,
    )  # fmt: skip


def _in_words(change: Change, recipe: Recipe, words: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """A change in the tool's keys; what the tool has no key for is left to the sentence."""
    found: list[tuple[str, str]] = []
    for what in change.what:
        name, _, number = what.rpartition(" ")
        if name == "micro-batch" and recipe.batch:
            each = recipe.batch // recipe.gpus
            found += [
                (words.get("micro_batch", ""), number),
                (words.get("accumulation", ""), str(max(1, each // int(number)))),
            ]
        elif name == "max length":
            found.append((words.get("max_length", ""), number))
        elif what == "full checkpointing":
            off = words.get("checkpointing", "").startswith("disable")
            found.append((words.get("checkpointing", ""), "false" if off else "true"))
        elif what == HALF_BASE:
            found.append((words.get("weights", ""), "true" if recipe.tool == "axolotl" else "bfloat16"))
        elif what == FLOATS:
            found.append(("bnb_4bit_quant_storage", "bfloat16"))
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
