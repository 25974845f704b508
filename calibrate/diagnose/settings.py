"""What a run was set to do, as far as its own files or a training config say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any

from lora_planner.arch import from_config
from lora_planner.errors import LoraPlanError
from lora_planner.handoff.recipe import LEAF_NAMES, PEFT_ALL, Recipe
from lora_planner.record import RunRecord


@dataclass(frozen=True, slots=True)
class Settings:
    """None: nobody said. `batch`: sequences an optimizer step over all devices. `task`: identity of the data.

    `full_modules`: trained in full beside the adapter. `params`: parameters of the base model. `said_by`: the file
    behind each field. `notes`: what was concluded rather than read.
    """

    method: str | None = None
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    full_modules: tuple[str, ...] = ()
    lr: float | None = None
    schedule: str | None = None
    warmup_steps: float | None = None
    steps: int | None = None
    epochs: float | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    batch: int | None = None
    seq_len: int | None = None
    seed: int | None = None
    model: str | None = None
    model_type: str | None = None
    params: float | None = None
    vocab: int | None = None
    trainable: int | None = None
    task: str | None = None
    group: int | None = None
    said_by: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def over(self, other: Settings) -> Settings:
        """These where they say something, else the other's.

        >>> Settings(lr=1e-4).over(Settings(lr=2e-4, rank=8)).rank
        8
        """
        known = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, ())}
        for name in ("said_by", "notes"):
            known[name] = (*getattr(self, name), *getattr(other, name))
        return replace(other, **known)

    @property
    def is_full(self) -> bool:
        return self.method == "full"

    @property
    def is_adapter(self) -> bool:
        return self.method is not None and self.method != "full"

    @property
    def global_batch(self) -> int | None:
        """Sequences a step: as said, or micro-batch x accumulation on one device."""
        if self.batch is not None:
            return self.batch
        return self.micro_batch * (self.accumulation or 1) if self.micro_batch else None

    def label(self) -> str:
        """What a person calls this run.

        >>> Settings(method="lora", rank=16, alpha=32.0, lr=1e-5, micro_batch=4, accumulation=8).label()
        'LoRA r16 alpha 32, LR 1.0e-5, batch 32'
        """
        from lora_planner.units import rate

        names = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "rslora": "rsLoRA", "dora": "DoRA",
                 "lora-fa": "LoRA-FA"}  # fmt: skip
        arm = names.get(self.method or "", self.method or "method unknown")
        if self.rank is not None and not self.is_full:
            arm += f" r{self.rank}" + (f" alpha {self.alpha:g}" if self.alpha else "")
        rest = [f"LR {rate(self.lr)}" if self.lr else "LR unknown"]
        rest += [f"batch {self.global_batch}"] if self.global_batch else []
        rest += [f"{self.steps:,} steps"] if self.steps else []
        return ", ".join([arm, *rest])


def of_record(run: RunRecord) -> Settings:
    """From a record of our own runner, which says everything."""
    s = run.spec
    full = s.method == "full"
    return Settings(
        s.method, None if full else s.rank, None if full else s.alpha, s.targets, (), s.lr, s.schedule, None, s.steps,
        None, s.micro_batch, s.accumulation, s.batch, s.seq_len, s.seed, s.base, run.config.get("model_type"), _params(run.config),
        run.config.get("vocab_size"), run.measured.get("trainable"),
        " ".join([s.task, *(f"{k}={v}" for k, v in s.task_args)]), s.group or None, (("everything", "its record"),),
    )  # fmt: skip


def _params(config: Mapping[str, Any]) -> float | None:
    try:
        return float(from_config(dict(config)).total)
    except LoraPlanError:
        return None


def of_recipe(recipe: Recipe, where: str) -> Settings:
    """From a training config of another tool, read by lora_planner.handoff. peft's own has no trainer in it."""
    lora, bare = recipe.lora, recipe.tool == "peft"
    method = None
    if lora:
        quantised = recipe.weights in ("nf4", "int8")
        method = "dora" if lora.dora else "rslora" if lora.rslora else "qlora" if quantised else "lora"
    elif not bare:
        method = "full"
    everything = {PEFT_ALL: "peft-all-linear", LEAF_NAMES: "all-linear"}
    named = (lora.targets or tuple(filter(None, [lora.pattern, everything.get(lora.everything)]))) if lora else ()
    return Settings(
        method, lora.rank if lora else None, lora.alpha if lora else None, named, lora.saved if lora else (),
        recipe.learning_rate, recipe.scheduler or None, None, recipe.max_steps or None, None if bare else recipe.epochs,
        recipe.micro_batch, None if bare else recipe.accumulation, None, recipe.max_length, model=recipe.model or None,
        group=recipe.group or None, said_by=(("everything", where),),
        notes=() if lora or bare else (f"{where} names no adapter: full fine-tuning",),
    )  # fmt: skip


def of_adapter(document: Mapping[str, Any], where: str) -> Settings:
    """From peft's adapter_config.json beside a log."""
    rank, alpha = _whole(document.get("r")), _number(document.get("lora_alpha"))
    method = "dora" if document.get("use_dora") else "rslora" if document.get("use_rslora") else "lora"
    base = document.get("base_model_name_or_path")
    return Settings(method=method, rank=rank, alpha=alpha, targets=_words(document.get("target_modules")),
                    full_modules=_words(document.get("modules_to_save")), model=base if isinstance(base, str) else None,
                    said_by=(("adapter", where),))  # fmt: skip


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if isfinite(number) else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) and abs(number) < 1e12 else None


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(str(v) for v in value) if isinstance(value, list) else ()
