"""Fit what the GPU takes besides tensors, and the interval of the peak:  python -m calibrate.memory

Tensors are counted (lora_planner/memory.py); three constants are not, and come from published runs
(calibrate/tables/measured.csv, read by calibrate/track/setting.py):

    allocator     (reserved - allocated) / (what comes and goes in a step): median of each source, then of the sources
    unexplained   measured allocated / counted allocated - 1, likewise
    peak_ratio    interval of measured / predicted peak for a new source, from sources predicted without themselves

Writes lora_planner/data/memory_constants.json.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from calibrate import track
from calibrate.track.setting import Setting, read
from lora_planner import memory
from lora_planner.activations import Kept
from lora_planner.errors import BadInput
from lora_planner.ledger import Estimate
from lora_planner.megatron import Layout, megatron
from lora_planner.memory import Constant, MemoryPlan, Split
from lora_planner.method import Method
from lora_planner.method.targets import adapter_table
from lora_planner.model import Attention, Model
from lora_planner.units import GIB, MIB

ROOT = Path(__file__).parents[1]
OUT = ROOT / "lora_planner/data/memory_constants.json"
TABLE = "measured.csv"
BESIDE = ("allocator", "workspace", "unexplained", "CUDA context")
#: two buffers (overlap_comm) of 2e8 gradients in 16 bit: the ZeRO-2 configuration that Qwen's and other scripts ship
BUCKETS = 2 * 2e8 * 2
#: sources with fewer rows do not say how wide errors are
FEW = 5
#: standard deviation of a normal distribution over its median absolute deviation
MAD = 1.4826
#: what a process held before CUDA loaded kernels only when they are used
OLD_CONTEXT = "cuda_context_2023_bytes"
#: FSDP 1 frees on other streams than it allocates on: its reserved memory is not that of a step on one GPU
FSDP_1 = ("fsdp-qlora", "litgpt")
FSDP_ALLOCATOR = "allocator_fraction_fsdp1"
#: sources whose bitsandbytes is older than the fix of the kept inputs (0.44, mid 2024)
OLD_BITSANDBYTES = ("litgpt", "fsdp-qlora")


# ---------------------------------------------------------------- a row as a question to the planner


def why_not(s: Setting) -> str:
    """Why the planner has no peak for a setting; "" where it has one."""
    if s.reason or s.model is None or s.method is None:
        return s.reason or "no model or method"
    missing = [
        word
        for word, value in (("micro-batch", s.micro_batch), ("length of the longest sample", s.seq_len))
        if not value
    ]
    if missing:
        return f"the {' and the '.join(missing)} is not stated"
    if not s.checkpointing:
        return "whether, or how, activations are recomputed is not stated"
    p = s.parallel
    if _is_megatron(s) and not s.layout:
        return "over how many GPUs Megatron splits matrices and layers is not stated"
    if p.tensor * p.pipeline * p.expert > 1 and not (_is_megatron(s) and s.method.is_full):
        return "matrices, layers or experts are split over GPUs by a trainer that the planner does not know"
    if s.source == "ktransformers" or (p.offload and p.weights == 1):
        return "part of the model is in host memory"
    return ""


def _is_megatron(s: Setting) -> bool:
    return "megatron" in s.how.lower() or s.stack.name == "megatron"


def _megatron(s: Setting, known: Mapping[str, Constant]) -> MemoryPlan:
    """Megatron's peak in the form of the planner's others."""
    assert s.model is not None and s.micro_batch and s.seq_len
    p = s.parallel
    copies = max(1, s.gpus // (p.tensor * p.pipeline * p.context))
    layout = Layout(p.tensor, p.pipeline, p.context, p.expert, copies, s.accumulation or p.pipeline)
    found = megatron(
        s.model, micro_batch=s.micro_batch, seq_len=s.seq_len, layout=layout, recompute=s.checkpointing == "full"
    )
    return memory.with_the_rest(found, known)


def plan(s: Setting, known: Mapping[str, Constant] | None = None) -> MemoryPlan:
    """The planner's memory of one GPU of a setting."""
    if why := why_not(s):
        raise BadInput(why, s.label)
    assert s.model is not None and s.method is not None and s.micro_batch and s.seq_len
    if _is_megatron(s) and s.method.is_full:
        return _megatron(s, known or memory.constants())
    quantised = s.method.base_dtype in memory.QUANTISED_BITS and not s.method.is_full
    return memory.memory(
        s.model,
        _nearest(s),
        micro_batch=s.micro_batch,
        seq_len=-(-s.seq_len // s.parallel.context),
        checkpointing=s.checkpointing,
        attention="eager" if s.stack.name == "litgpt" and s.model.model_type == "gemma2" else s.attention,
        optimizer=s.optimizer,
        loss="half" if _half(s) else s.loss,
        full_precision="master" if _deepspeed(s) else s.full_precision,
        autocast=s.autocast and not _half(s),
        padded=None if s.stack.repeats and not s.packed else False,
        keep_logits=s.keep_logits or _half(s),
        accumulate=(s.accumulation or 1) > 1,
        upcast=s.upcast,
        frozen_inputs=quantised and s.source in OLD_BITSANDBYTES,
        quantised_experts=quantised and s.source == "axolotl",
        in_backward=s.in_backward,
        offload_activations=s.offloaded,
        split=_split(s),
        also_trained=also_trained(s),
        also_kept=_also_kept(s),
        known=known,
    )


def _deepspeed(s: Setting) -> bool:
    """Full fine-tuning under ZeRO: Qwen's scripts and everybody who says so."""
    return s.full_precision == "mixed" and (
        s.source == "qwen-readme" or re.search(r"zero[- ]?(stage[- ]?)?[123]|deepspeed", s.how.lower()) is not None
    )


def _half(s: Setting) -> bool:
    """Qwen's script for Q-LoRA runs DeepSpeed in fp16."""
    return s.source == "qwen-readme" and s.method_name == "qlora"


def _split(s: Setting) -> Split:
    """litgpt accumulates under no_sync, and wraps adapters together with what they adapt."""
    p, litgpt = s.parallel, s.stack.name == "litgpt"
    if p.weights == 1:
        return Split(1, p.states, buckets=BUCKETS if p.states > 1 or _half(s) else 0)
    return Split(p.weights, p.states, litgpt and (s.accumulation or 2) > 1, litgpt, p.offload)


def also_trained(s: Setting) -> float:
    """Parameters trained beside LoRA's: whole modules, or what another method of peft trains in place of it."""
    assert s.model is not None
    if s.variant:
        return 2.0 * (s.trainable or 0)  # in fp32, where the planner expects 16 bit
    whole = {"embed": s.model.embed.params, "lm_head": s.model.head.params}
    return float(sum(whole[name] for name in s.saved))


#: methods of peft that read no input: they scale weights, outputs or norms, or put tokens in front
WITHOUT_INPUT = (
    "tinylora",
    "miss",
    "bone",
    "prefixtuning",
    "ptuning",
    "ln_tuning",
    "shira",
    "prompt_tuning",
    "trainable_tokens",
)
#: methods that build the whole update of a matrix: its two factors' products in fp32, and the sum with W
WHOLE_UPDATE = ("loha", "lokr", "hira", "fourierft", "waveft", "frod", "boft", "hra", "bat", "randlora", "shira")
UPDATE_BYTES = {"shira": 4.0}  # one sparse product
ALL_PRODUCTS = 4.0 + 4.0 + 2.0


def _nearest(s: Setting) -> Method:
    """LoRA at rank 1 in place of a method that the planner does not have; without A's input where it reads none."""
    assert s.method is not None
    if not s.variant:
        return s.method
    quiet = s.variant in WITHOUT_INPUT or s.variant in WHOLE_UPDATE
    return replace(s.method, name="lora-fa" if quiet else "lora", rank=1)


def _also_kept(s: Setting) -> tuple[Kept, ...]:
    assert s.model is not None and s.method is not None
    if s.stack.name == "litgpt" and not s.method.is_full:
        return litgpt_kept(s.model, s.method)
    if s.variant in WHOLE_UPDATE:
        elements = sum(
            a.linear.d_in * a.linear.d_out * a.linear.count for a in adapter_table(s.model, s.method).adapters
        )
        return (Kept("updates", 0.0, 0.0, UPDATE_BYTES.get(s.variant, ALL_PRODUCTS) * elements),)
    if s.variant == "ln_tuning":
        return (Kept("gains", 2.0 * sum(w.width * b.count for b in s.model.blocks for w in b.weights)),)
    return ()


@cache
def litgpt_kept(model: Model, method: Method) -> tuple[Kept, ...]:
    """What litgpt's layers keep beside those of transformers, for all layers.

        dropout of 0.05 before every A:      its output and a mask of a byte, 3 d_in, in place of the shared input
        q, k, v are one matrix:              where v is a view of its output (no grouped queries), all of it, 2 (q + k)
        adapters on some of q, k, v only:    index_copy keeps what it spreads over all of them, 2 (adapted widths)
        4 bit:                               bitsandbytes hangs the inputs of matrices on the graph, not among what is
                                             saved, so that those of the micro-batch before live until the loop's
                                             `logits` is overwritten

    Source: litgpt/lora.py and model.py of October 2023 to mid 2024.
    """
    wrapped = {a.linear.name for a in adapter_table(model, method).adapters}
    token = 0.0
    for block in model.blocks:
        mixer = block.mixer
        if not isinstance(mixer, Attention):
            continue
        three = {*mixer.q, *mixer.k, *mixer.v}
        rows = {row.name: row for row in block.linears}
        inside = [name for name in rows if name in wrapped]
        calls = [name for name in inside if name not in three] + ([mixer.q[0]] if three & wrapped else [])
        extra = sum(3.0 * rows[name].d_in for name in calls)
        if method.base_dtype not in memory.QUANTISED_BITS:  # else the undropped inputs are kept as well
            extra -= sum(
                2.0 * d
                for d in {rows[n].reads: rows[n].d_in for n in calls if mixer.v[0] not in rows[n].reads}.values()
            )
        if mixer.kv_heads == mixer.heads:
            extra += 2.0 * sum(rows[name].d_out for name in (*mixer.q, *mixer.k))
        if three & wrapped and not three <= wrapped:
            extra += 2.0 * sum(rows[name].d_out for name in three & wrapped)
        if method.base_dtype in memory.QUANTISED_BITS:
            extra += sum(
                2.0 * d for d in {r.reads: r.d_in for r in rows.values() if mixer.v[0] not in r.reads}.values()
            )
        token += block.count * extra
    return (Kept("litgpt", token),)


# ---------------------------------------------------------------- what a row reports


def counted(found: MemoryPlan, kind: str) -> float:
    """The peak in the sense of a publisher, at its expected value."""
    return estimate_of(found, kind).value


def estimate_of(found: MemoryPlan, kind: str) -> Estimate:
    """The peak with its interval: tensors ("allocated"), what the allocator holds ("reserved"), the whole process."""
    ledger = found.phases[found.peak_phase]
    value = found.peak.value
    if kind.startswith("reserved"):
        value -= ledger["CUDA context"]
    elif kind == "allocated":
        value = found.allocated + ledger["unexplained"]
    return found.peak.scaled(value / found.peak.value)


def known_for(s: Setting, known: Mapping[str, Constant] | None) -> Mapping[str, Constant]:
    """The constants of a setting's time and trainer, where they have their own."""
    known = known or memory.constants()
    if s.stack.old and OLD_CONTEXT in known:
        known = {**known, "cuda_context_bytes": known[OLD_CONTEXT]}
    if s.stack.name in FSDP_1 and FSDP_ALLOCATOR in known:
        known = {**known, "allocator_fraction": known[FSDP_ALLOCATOR]}
    return known


def estimate(s: Setting, kind: str, known: Mapping[str, Constant] | None = None) -> Estimate:
    """The peak of a setting in bytes, in the sense of its publisher."""
    return estimate_of(plan(s, known_for(s, known)), kind)


# ---------------------------------------------------------------- the constants


def assumed() -> dict[str, Constant]:
    """The constants that are not fitted, and neutral ones in the place of the others."""
    rows = [
        _constant("cuda_context_bytes", 0.45 * GIB, 0.14 * GIB, 0.8 * GIB, "assumed", 0,
             "0.14 GiB on a T4 (fitcheck); 0.4 to 0.8 are usual with cuBLAS and cuDNN loaded on newer cards"),
        _constant(OLD_CONTEXT, 1343 * MIB, 0.9 * GIB, 2 * GIB, "assumed", 0,
             "transformers' guide to training on one GPU (2023): 1343 MB in use after a first tensor"),
        _constant("workspace_bytes", 32 * MIB, 8 * MIB, 96 * MIB, "assumed", 0, "cuBLAS: 8 MiB a stream, 32 on Hopper"),
        _constant("allocator_fraction", 0, 0, 0, "fitted", 0, ""),
        _constant("unexplained", 0, 0, 0, "fitted", 0, ""),
        _constant("peak_ratio", 1, 0.9, 1.1, "fitted", 0, ""),
        _constant("peak_ratio_hybrid", 1, 0.6, 1.7, "assumed", 0, "no measurement of a state-space model is published"),
    ]  # fmt: skip
    return {row.name: row for row in rows}


def usable(settings: Iterable[Setting]) -> list[Setting]:
    """Those that measure a peak, not a bound, and that the planner can predict."""
    return [s for s in settings if s.memory and not why_not(s) and not any(m.at_least for m in s.memory)]


def rough(s: Setting) -> bool:
    """Rows that say of themselves that they are no measurement to fit on, and methods that are only nearly LoRA."""
    words = s.notes.lower()
    return bool(s.variant) or any(
        word in words for word in ("readme-level", "low confidence", "approx", "user-reported")
    )


def fit(settings: Sequence[Setting]) -> dict[str, Constant]:
    """The constants that rows of several sources say, every source counting the same."""
    known = assumed()
    unexplained, allocator, streams = defaultdict(list), defaultdict(list), defaultdict(list)
    processes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for s in usable(settings):
        if rough(s):
            continue
        found = plan(s, known)
        peaks = {m.kind.split()[0]: m.bytes for m in s.memory}
        if "allocated" in peaks:
            unexplained[s.source].append(peaks["allocated"] / found.allocated - 1)
        moving = max(found.moving, MIB)
        if "reserved" in peaks and s.attention != "eager":
            tensors = peaks.get("allocated", found.allocated)
            share = (peaks["reserved"] - tensors) / (moving + tensors - found.allocated)
            (streams if s.stack.name in FSDP_1 else allocator)[s.source].append(share)
        elif s.stack.old and "process" in peaks:
            processes[s.source].append((moving, peaks["process"] - found.allocated))
    for source, points in processes.items():
        allocator[source].append(slope(points))
    known["unexplained"] = _fitted("unexplained", unexplained)
    known["allocator_fraction"] = _fitted("allocator_fraction", allocator)
    if streams:
        known[FSDP_ALLOCATOR] = _fitted(FSDP_ALLOCATOR, streams)
    return known


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Slope of y over x: the median of all pairs' slopes (Theil and Sen).

    >>> slope([(0, 1), (1, 3), (2, 5), (3, 7), (4, 100)])
    2.0
    """
    x, y = np.array(points, dtype=float).T
    i, j = np.triu_indices(len(x), 1)
    apart = np.abs(x[j] - x[i]) > 0.1 * np.ptp(x) if len(x) > 1 else np.array([], dtype=bool)
    return float(np.median((y[j] - y[i])[apart] / (x[j] - x[i])[apart])) if apart.any() else 0.0


def _fitted(name: str, by_source: Mapping[str, Sequence[float]]) -> Constant:
    """Median of the sources' medians; 5 and 95 % of all rows, every source with the same weight."""
    if not by_source:
        return assumed()[name]
    middle = float(np.median([np.median(values) for values in by_source.values()]))
    low, high = np.quantile(pooled(by_source.values()), [0.05, 0.95])
    n = sum(map(len, by_source.values()))
    return _constant(name, middle, min(low, middle), max(high, middle), "fitted", n, ", ".join(sorted(by_source)))


def pooled(groups: Iterable[Sequence[float]]) -> np.ndarray:
    """Values of which each group has the same share, however many it has."""
    return np.concatenate([np.quantile(values, np.linspace(0.01, 0.99, 99)) for values in groups])


def _constant(name: str, value: float, low: float, high: float, basis: str, n: int, source: str) -> Constant:
    """A row of the file, in the digits that the file keeps."""
    a, b, c = (float(f"{v:.4g}") for v in (value, low, high))
    return Constant(name, a, b, c, basis, n, source)


def write(known: Mapping[str, Constant]) -> None:
    """Replace the packaged constants."""
    body = ",\n".join(json.dumps(asdict(c)) for c in known.values())
    OUT.write_text(f'{{"schema": 1, "constants": [\n{body}\n]}}\n')
    memory.constants.cache_clear()


@cache
def settings() -> tuple[Setting, ...]:
    """The packaged table."""
    return tuple(read(row) for row in track.read(track.TABLES / TABLE))


def ratios(known_without: Mapping[str, Mapping[str, Constant]], rows: Sequence[Setting]) -> dict[str, list[float]]:
    """measured / predicted of each source, by constants that were fitted without it."""
    found = defaultdict(list)
    for s in usable(rows):
        for m in s.memory:
            found[s.source].append(m.bytes / estimate(s, m.kind, known_without[s.source]).value)
    return found


@cache
def fitted_on() -> frozenset[str]:
    """Sources that the packaged constants were fitted on."""
    return frozenset(s.source for s in usable(settings()) if not rough(s))


def interval(by_source: Mapping[str, Sequence[float]]) -> Constant:
    """The 90 % interval of measured / predicted for a source that is not among these, each left out of its own fit.

        exp(m -+ t s sqrt(1 + 1 / k)),   s^2 = variance between the k sources' medians + mean variance within them

    Of ln(measured / predicted); t is Student's 95 % point with k - 1 degrees. Sources of fewer than FEW rows are left out.
    """
    used = {source: np.log(values) for source, values in by_source.items() if len(values) >= FEW}
    middles = np.array([np.median(values) for values in used.values()])
    within = float(np.mean([np.median(np.abs(values - np.median(values))) * MAD for values in used.values()]))
    spread = float(np.hypot(middles.std(ddof=1), within)) if len(middles) > 1 else within
    wide = float(stdtrit(max(1, len(middles) - 1), 0.95)) * spread * float(np.sqrt(1 + 1 / len(middles)))
    low, high = (float(np.exp(middles.mean() + side * wide)) for side in (-1, 1))
    why = "90 % of measured / predicted for a further source, from the errors of each left out: " + ", ".join(
        sorted(used)
    )
    return _constant("peak_ratio", 1.0, min(low, 1.0), max(high, 1.0), "fitted", sum(map(len, used.values())), why)


def held_out(rows: Sequence[Setting]) -> dict[str, dict[str, Constant]]:
    """The constants for each source, fitted without it; its interval is from the other sources' own left-out errors."""
    sources = {s.source for s in rows if s.memory}
    without = {source: fit([s for s in rows if s.source != source]) for source in sorted(sources)}
    found = ratios(without, [s for s in rows if not rough(s)])
    for source, known in without.items():
        others = {other: values for other, values in found.items() if other != source}
        if any(len(values) >= FEW for values in others.values()):
            known["peak_ratio"] = interval(others)
    return without


def complete(rows: Sequence[Setting]) -> dict[str, Constant]:
    """All constants from these rows, the interval of the peak included."""
    found = ratios(held_out(rows), [s for s in rows if not rough(s)])
    known = fit(rows)
    if any(len(values) >= FEW for values in found.values()):
        known["peak_ratio"] = interval(found)
    return known


def main() -> None:
    rows = settings()
    for source, values in ratios(held_out(rows), rows).items():
        errors = np.abs(1 / np.array(values) - 1)
        print(f"{source:14} n {len(values):3}  measured/predicted median {np.median(values):.3f}, "
              f"5-95 % {np.quantile(values, 0.05):.3f} to {np.quantile(values, 0.95):.3f}, "
              f"median error {np.median(errors):.1%}, worst {errors.max():.1%}")  # fmt: skip
    known = complete(rows)
    write(known)
    for row in known.values():
        print(f"{row.name:24} {row.value:.4g}  {row.low:.4g} to {row.high:.4g}  ({row.basis}, n {row.n})")


if __name__ == "__main__":
    main()
