"""Predictions of two other planners beside ours, on the same published rows in the same run.

    pip install fitcheck-llm==0.3.1 ftuneai==0.4.1          both MIT; nothing of theirs is copied here
    python -m benchmarks.peers                              writes calibrate/track/peers.csv, prints errors by planner

Each peer is called through its own Python interface with what it can be told of a row: shapes, method, rank, the set of
targets, attention, checkpointing, quantisation, optimizer, sharding, GPU. A row that it cannot express, or that it refuses
itself, has a reason instead of a number. What it counts is matched with what was measured:

    measured          fitcheck                  ftune
    tensors           without its overhead      without its 20 % of overhead
    reserved          without the CUDA context  in all
    process           in all                    in all

Ours is shown twice: as shipped, where the row may have fed a fit, and with the row's source left out of every fit.
FitCheck's constants were fitted on its own T4 archive, ftune's on runs that are not in these tables.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from calibrate.track import TABLES, Row, board, read, speed
from calibrate.track.case import Case
from calibrate.track.setting import Setting
from lora_planner.errors import LoraPlanError
from lora_planner.facts import Gpu
from lora_planner.method.targets import adapter_table, experts, top_k
from lora_planner.model import Attention, Linear, Model
from lora_planner.units import GIB, MIB

ROOT = Path(__file__).parents[1]
OUT = ROOT / "calibrate/track/peers.csv"
FILES = ("measured.csv", "peft_l40s.csv")
PEERS = ("fitcheck", "ftune")
PLANNERS = ("ours", "ours, source left out", *PEERS)
#: the part that a matrix plays in a layer, under the names of Llama, which both peers speak
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: what at least one peer predicts
QUANTITIES = ("peak memory", "peak memory, tensors", "tokens/s", "step seconds", "minutes")
#: tokens of the run whose time ftune is asked for: its answer is rounded to 36 s
LONG_RUN = 1e12
FITCHECK_GPUS = {
    "t4-16gb": "t4", "v100-sxm-16gb": "v100-16", "l4-24gb": "l4", "a10-24gb": "a10", "rtx3090-24gb": "3090",
    "rtx4090-24gb": "4090", "rtx5090-32gb": "5090", "rtx-a6000-48gb": "a6000", "rtx-6000-ada-48gb": "rtx6000-ada",
    "l40-48gb": "l40", "l40s-48gb": "l40s", "a100-sxm-40gb": "a100-40", "a100-pcie-40gb": "a100-40",
    "a100-sxm-80gb": "a100-80", "a100-pcie-80gb": "a100-80", "h100-sxm-80gb": "h100", "h200-sxm-141gb": "h200",
    "b200-180gb": "b200",
}  # fmt: skip
FTUNE_GPUS = {
    "t4-16gb": "T4-16GB", "v100-sxm-16gb": "V100-16GB", "v100-sxm-32gb": "V100-32GB", "l4-24gb": "L4-24GB",
    "a10g-24gb": "A10G-24GB", "rtx3090-24gb": "RTX-3090-24GB", "rtx4080-16gb": "RTX-4080-16GB",
    "rtx4090-24gb": "RTX-4090-24GB", "a100-sxm-40gb": "A100-40GB", "a100-pcie-40gb": "A100-40GB",
    "a100-sxm-80gb": "A100-80GB", "a100-pcie-80gb": "A100-80GB", "h100-sxm-80gb": "H100-80GB",
    "h200-sxm-141gb": "H200-141GB",
}  # fmt: skip


class Refused(Exception):
    """Why a peer has no prediction of a row."""


# ---------------------------------------------------------------- what a row says, in words that both peers know


def roles(model: Model, linears: Sequence[Linear]) -> set[str]:
    """The parts that adapted matrices play: a fused matrix plays several.

    >>> from lora_planner.model_source import load_model
    >>> phi = load_model("phi-3.5-mini")
    >>> sorted(roles(phi, [row for row in phi.linears if row.name == "self_attn.qkv_proj"]))
    ['k_proj', 'q_proj', 'v_proj']
    """
    found: set[str] = set()
    mixers = [block.mixer for block in model.blocks if isinstance(block.mixer, Attention)]
    for row in linears:
        if row.group == "attn":
            parts = {
                p for m in mixers for p, of in (("q_proj", m.q), ("k_proj", m.k), ("v_proj", m.v)) if row.name in of
            }
            found |= parts or {"o_proj"}
        elif row.group in ("mlp_dense", "shared", "experts"):
            if row.d_in != model.hidden_size:
                found.add("down_proj")
            elif row.parts > 1:
                found |= {"gate_proj", "up_proj"}
            else:
                found.add("gate_proj" if "gate" in row.name or "w2" in row.name else "up_proj")
        else:
            raise Refused(f"no adapters on {row.group}")
    return found


def adapted(s: Setting) -> list[str]:
    """The roles that have adapters, in the order of a layer."""
    assert s.model is not None
    assert s.method is not None
    if s.saved:
        raise Refused("no embedding trained beside adapters")
    if s.variant:
        raise Refused(f"no {s.variant}")
    if s.method.name not in ("lora", "qlora", "rslora"):
        raise Refused(f"no {s.method.name}")
    found = roles(s.model, [a.linear for a in adapter_table(s.model, s.method).adapters])
    return [role for role in ROLES if role in found]


def expressible(s: Setting, peak: bool = True) -> None:
    """What neither peer can do without, or express. Of time ftune asks less: it is in proportion to tokens."""
    if s.reason or s.model is None or s.method is None:
        raise Refused(s.reason or "the row cannot be read")
    if s.parallel.tensor * s.parallel.pipeline * s.parallel.context * s.parallel.expert > 1:
        raise Refused("no tensor, pipeline, context or expert parallelism")
    if s.parallel.offload or s.source == "ktransformers":
        raise Refused("no offloading to the host")
    if s.compute not in ("bf16", "fp16", "fp32"):
        raise Refused(f"no {s.compute}")
    if not peak:
        return
    if not s.micro_batch or not s.seq_len:
        raise Refused("no micro-batch or length is stated")
    if not s.checkpointing:
        raise Refused("checkpointing is not stated, or selective")
    if s.optimizer not in ("adamw", "adamw-fused", "adamw-foreach", "adamw-8bit"):
        raise Refused(f"no optimizer {s.optimizer}")


def halves(s: Setting) -> bool:
    """Whether what is trained, and so AdamW's states, are in bf16."""
    assert s.method is not None
    return s.full_precision == "bf16" if s.method.is_full else s.method.adapter_dtype == "bfloat16"


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths of a layer, of a routed expert where there are any."""

    heads: int
    kv_heads: int
    head_dim: int
    inner: int


def _shape(model: Model) -> Shape:
    mixer = next((block.mixer for block in model.blocks if isinstance(block.mixer, Attention)), None)
    if mixer is None:
        raise Refused("no attention")
    into = [row for row in model.linears if row.d_in == model.hidden_size]
    inner = {group: max((row.d_out // row.parts for row in into if row.group == group), default=0)
             for group in ("experts", "mlp_dense")}  # fmt: skip
    return Shape(mixer.heads, mixer.kv_heads, mixer.qk_head_dim, inner["experts"] or inner["mlp_dense"])


def fused_attention(s: Setting) -> bool:
    """Neither peer tells torch's fused kernel from FlashAttention."""
    return s.attention != "eager"


# ---------------------------------------------------------------- FitCheck


def fitcheck_memory(s: Setting, kind: str) -> float:
    """GiB. Its own reader of config.json decides which models it refuses; it knows one card."""
    expressible(s)
    from fitcheck import TrainingConfig, config_parser, estimate, get_gpu
    from fitcheck.gpu_db import gpu_key_for
    from fitcheck.overhead_db import get_overhead_profile

    model, method, split = s.model, s.method, s.parallel
    assert model is not None
    assert method is not None
    if split.weights > 1 or split.states > 1:
        raise Refused("no sharding")
    quantised = {"nf4": "nf4", "nf4-single": "nf4", "int8": "int8"}.get(method.base_dtype, "none")
    if quantised == "none" and method.base_dtype not in ("bfloat16", "float16", "float32"):
        raise Refused(f"no {method.base_dtype} base")
    config = _fitcheck_model(config_parser, model)
    if s.gpu is not None and s.gpu.name in FITCHECK_GPUS:
        card = get_gpu(FITCHECK_GPUS[s.gpu.name])
    elif s.card_bytes:
        card = get_gpu(s.gpu_name or "card", int(s.card_bytes / MIB))
    else:
        raise Refused("the memory of the card is not stated")
    training = TrainingConfig(
        precision="fp32" if method.is_full and s.full_precision == "fp32" else s.compute,
        quantization=quantised,
        double_quant=method.base_dtype == "nf4",
        optimizer="adam8bit" if s.optimizer == "adamw-8bit" else "adamw",
        optimizer_dtype="bf16" if halves(s) else "fp32",
        batch_size=s.micro_batch,
        seq_len=s.seq_len,
        lora_rank=None if method.is_full else method.rank,
        lora_targets=list(ROLES[:4]) if method.is_full else adapted(s),
        grad_checkpoint=s.checkpointing == "full",
        flash_attn=fused_attention(s),
    )
    report = estimate(config, training, card)
    context = get_overhead_profile(gpu_key_for(card), training.flash_attn, quantised).base_context_mib
    beside = report.overhead_mib if kind == "allocated" else context if kind.startswith("reserved") else 0.0
    return float(report.total_mib - beside) * MIB / GIB


def _fitcheck_model(parser: Any, model: Model) -> Any:
    """Its ModelConfig by its own checks, from a config.json in Llama's words and the count that it would ask the hub for."""
    shape = _shape(model)
    raw = {
        "hidden_size": model.hidden_size, "num_hidden_layers": model.layers, "vocab_size": model.vocab_size,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.inner, "tie_word_embeddings": model.tied, "num_experts": experts(model) or None,
    }  # fmt: skip
    if model.groups["vision"]:
        raise Refused("refuses: a multimodal model")
    try:
        parser._reject_unsupported(raw, model.name)
        fields = parser._parse_fields(raw)
        parser._reconcile_param_count(model.name, model.total, parser._count_params(fields))
    except ValueError as error:
        raise Refused(f"refuses: {str(error)[:140]}") from None
    known = {name: getattr(fields, name) for name in fields.__dataclass_fields__}
    return parser.ModelConfig(name=model.name, num_params=model.total, **known)


# ---------------------------------------------------------------- ftune


def _ftune_config(s: Setting) -> Any:
    from ftuneai import FineTuneMethod, LoRATarget, OptimizerType, Quantization, ShardingStrategy, TrainingConfig

    method, split = s.method, s.parallel
    assert method is not None
    four_bit = method.base_dtype in ("nf4", "nf4-single", "gptq")
    kind, targets = FineTuneMethod.FULL, LoRATarget.ATTENTION_ALL
    if not method.is_full:
        kind = FineTuneMethod.QLORA if four_bit else FineTuneMethod.LORA
        targets = getattr(LoRATarget, nearest_set(adapted(s)))
    sharding = ShardingStrategy.NONE
    if split.weights > 1:
        sharding = ShardingStrategy.FSDP
    elif split.states > 1:
        sharding = ShardingStrategy.ZERO_2
    return TrainingConfig(
        method=kind,
        quantization=Quantization.INT4 if four_bit else Quantization.NONE,
        batch_size=s.micro_batch or 1,
        seq_length=s.seq_len or 1,
        gradient_checkpointing=s.checkpointing == "full",
        optimizer=OptimizerType.ADAM_8BIT if s.optimizer == "adamw-8bit" else OptimizerType.ADAMW,
        lora_rank=method.rank,
        lora_target=targets,
        flash_attention=fused_attention(s),
        sharding=sharding,
        num_gpus=max(split.weights, split.states, 1),
    )


def nearest_set(found: Sequence[str]) -> str:
    """ftune has three sets of targets.

    >>> nearest_set(["q_proj", "v_proj"]), nearest_set(["q_proj", "k_proj", "v_proj", "o_proj"])
    ('ATTENTION', 'ATTENTION_ALL')
    """
    if any(role in found for role in ROLES[4:]):
        return "ALL_LINEAR"
    return "ATTENTION" if len(found) <= 2 else "ATTENTION_ALL"


def _ftune_model(s: Setting) -> Any:
    """Its ModelSpec with the exact count; as long a context as the row has."""
    from ftuneai import ModelSpec

    model = s.model
    assert model is not None
    shape = _shape(model)
    return ModelSpec(
        name=model.name,
        parameters=model.total,
        hidden_size=model.hidden_size,
        num_layers=model.layers,
        num_attention_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        vocab_size=model.vocab_size,
        max_seq_length=max(model.max_positions, s.seq_len or 1),
        default_dtype={"fp16": "float16", "fp32": "float32"}.get(s.compute, "bfloat16"),
        is_moe=experts(model) > 0,
        num_experts=experts(model) or None,
        num_active_experts=top_k(model) or None,
    )


def ftune_memory(s: Setting, kind: str) -> float:
    """GiB."""
    expressible(s)
    config = _ftune_config(s)
    from ftuneai.core.memory import MemoryEstimator

    found = MemoryEstimator(_ftune_model(s), config).estimate()
    return float(found.total_gb - (found.overhead_gb if kind == "allocated" else 0.0))


def ftune_rate(s: Setting) -> float:
    """Tokens per second of all GPUs together, padding included: it knows no other."""
    expressible(s, peak=False)
    config = _ftune_config(s)
    from ftuneai import get_gpu
    from ftuneai.core.time import TimeEstimator

    if s.gpu is None:
        raise Refused("the GPU is not known here")
    card = get_gpu(FTUNE_GPUS[s.gpu.name]) if s.gpu.name in FTUNE_GPUS else _ftune_card(s.gpu)
    samples = int(LONG_RUN / config.seq_length)
    found = TimeEstimator(_ftune_model(s), config).estimate(card, samples, epochs=1, num_gpus=s.gpus,
                                                            avg_seq_length=config.seq_length)  # fmt: skip
    return float(found.total_tokens / (3600 * found.total_hours))


def _ftune_card(card: Gpu) -> Any:
    """Its GPUSpec of a card that it does not have, from our row."""
    from ftuneai import GPUSpec

    peak = {dtype: flops / 1e12 for dtype, flops in card.peak_flops_per_s.items()}
    half = peak.get("fp16", peak.get("bf16", 0.0))
    return GPUSpec(card.name, card.memory_bytes / GIB, half, peak.get("bf16", half), peak.get("fp32", half / 2),
                   card.hbm_bytes_per_s / 1e9)  # fmt: skip


# ---------------------------------------------------------------- rows


@dataclass(slots=True)
class Line:
    """A measured quantity and what each planner says of it, or why not."""

    case: Case
    said: dict[str, float] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def ask(self, planner: str, question: Callable[[], float]) -> None:
        try:
            value = question()
        except (Refused, speed.Unpredictable) as refusal:
            self.why[planner] = str(refusal)
        except (LoraPlanError, ValueError, KeyError, ArithmeticError) as error:
            self.why[planner] = f"refuses: {str(error)[:120]}"
        else:
            self.said[planner] = value

    def take(self, planner: str, case: Case | None) -> None:
        """What we say."""
        if case is not None and case.predicted is not None:
            self.said[planner] = case.predicted.value
        else:
            self.why[planner] = case.reason if case else "not predicted with its source left out"

    def error(self, planner: str) -> float:
        return self.said[planner] / self.case.measured - 1


def lines(name: str) -> Iterator[Line]:
    """Every quantity of a table's rows."""
    rows = read(TABLES / name)
    kind = import_module(f"calibrate.track.{name.removesuffix('.csv')}")
    left_out = {_key(case): case for case in kind.held_out(rows)} if hasattr(kind, "held_out") else {}
    for row in rows:
        setting = kind.setting(row) if hasattr(kind, "setting") else kind.read(row)
        as_measured = kind.as_measured(row) if hasattr(kind, "as_measured") else row
        for case in kind.cases([row]):
            if case.quantity not in QUANTITIES:
                continue
            line = Line(case)
            line.take(PLANNERS[0], case)
            line.take(PLANNERS[1], left_out.get(_key(case)))
            _ask(line, setting, as_measured)
            yield line


def _key(case: Case) -> tuple[str, str, str, float]:
    return case.quantity, case.label, case.unit, case.measured


def _ask(line: Line, s: Setting, row: Row) -> None:
    quantity = line.case.quantity
    if "memory" in quantity:
        kind = next((m.kind for m in s.memory if line.case.label.endswith(f"({m.kind})")), "reserved")
        line.ask("fitcheck", lambda: fitcheck_memory(s, kind))
        line.ask("ftune", lambda: ftune_memory(s, kind))
        return
    line.why["fitcheck"] = "predicts memory only"
    if quantity == "tokens/s":
        line.ask("ftune", lambda: ftune_rate(s))
    elif quantity == "step seconds":
        line.ask("ftune", lambda: tokens_of_step(s, row) / ftune_rate(s))
    elif quantity == "minutes" and s.source != "mlperf":
        line.ask("ftune", lambda: tokens_of_step(s, row) * speed.steps_of_run(s, row) / ftune_rate(s) / 60)
    else:
        line.why["ftune"] = f"does not predict {quantity}"


def tokens_of_step(s: Setting, row: Row) -> float:
    """Tokens of an optimizer step, as the publisher's data have them."""
    try:
        return speed.observation(s, row)[1]
    except speed.Unpredictable as why:
        raise Refused(str(why)) from None


# ---------------------------------------------------------------- what comes out


def errors(found: Sequence[Line], planner: str) -> list[float]:
    return [line.error(planner) for line in found if planner in line.said and _comparable(line.case)]


def _comparable(case: Case) -> bool:
    return not (case.at_least or case.at_most) and case.measured > 0 and math.isfinite(case.measured)


def summary(found: Sequence[Line], planners: Sequence[str]) -> list[str]:
    """A Markdown table: each planner on the rows that all of them predict, and on all that it can."""
    shared = [line for line in found if all(planner in line.said for planner in planners) and _comparable(line.case)]
    out = ["| planner | rows | n | median | p95 | worst | bias |", "|---|---|---|---|---|---|---|"]
    for which, some in (("all can", shared), ("each can", found)):
        for planner in planners:
            off = errors(some, planner)
            if not off:
                continue
            median, p95, worst = board.spread(off)
            out.append(f"| {planner} | {which} | {len(off)} | {median:.1%} | {p95:.1%} | "
                       f"{worst:.1%} | {statistics.median(off):+.1%} |")  # fmt: skip
    return out


def groups(found: Sequence[Line]) -> Iterator[tuple[str, list[Line], tuple[str, ...]]]:
    """(heading, lines, planners) of each comparison that is printed."""
    for quantity in QUANTITIES:
        some = [line for line in found if line.case.quantity == quantity]
        planners = tuple(planner for planner in PLANNERS if any(planner in line.said for line in some))
        if not set(PEERS) & set(planners):
            continue
        yield quantity, some, planners
        fresh = [line for line in some if line.case.source != "fitcheck"]
        if "fitcheck" in planners:
            yield f"{quantity}, without the archive that FitCheck was fitted on", fresh, planners


def write(found: Sequence[Line]) -> None:
    with OUT.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", "source", "quantity", "unit", "measured", "bound", *PLANNERS, "why not"])
        for line in found:
            case = line.case
            bound = "at least" if case.at_least else "at most" if case.at_most else ""
            said = [f"{line.said[p]:.5g}" if p in line.said else "" for p in PLANNERS]
            why = "; ".join(f"{planner}: {line.why[planner]}" for planner in PLANNERS if planner in line.why)
            writer.writerow(
                [case.label, case.source, case.quantity, case.unit, f"{case.measured:.5g}", bound, *said, why]
            )


def main() -> None:
    missing = [name for name in ("fitcheck", "ftuneai") if find_spec(name) is None]
    if missing:
        raise SystemExit(f"{' and '.join(missing)} not installed: pip install fitcheck-llm==0.3.1 ftuneai==0.4.1")
    found = [line for name in FILES for line in lines(name)]
    write(found)
    for heading, some, planners in groups(found):
        print(f"\n## {heading}\n", *summary(some, planners), sep="\n")


if __name__ == "__main__":
    main()
