"""Tokens a second, seconds and minutes of measured runs, as the planner predicts them.

A row becomes an Observation: the work of one GPU in one optimizer step, by which stack, and how long the step took.
`cases` predicts it with the packaged constants; calibrate/throughput.py fits these on the same observations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from calibrate.throughput import Observation
from calibrate.track import setting as settings
from calibrate.track.case import Case
from calibrate.track.setting import Setting
from lora_planner.errors import LoraPlanError
from lora_planner.facts import Gpu, constants, gpus
from lora_planner.flops import CHECKPOINTING
from lora_planner.ledger import Estimate
from lora_planner.plan import matmul_dtype
from lora_planner.throughput import ANY, Work, adamw_bytes, stack, step_time
from lora_planner.workload import ZERO3_LAUNCHES, Division, divided, shape, work

Row = Mapping[str, str]

#: publisher -> stack of constants.json; "*" is everybody else, who mostly runs what most people run
STACK_OF = {
    "litgpt": "litgpt", "fsdp-qlora": "fsdp-qlora", "torchtune": "torchtune", "mosaicml": "llm-foundry", "nemo": "nemo",
    "nemo-automodel": "nemo-automodel", "megatron-bridge": "nemo", "megatron": "nemo", "simumax": "nemo",
    "unsloth": "unsloth", "axolotl": "axolotl", "*": "hf-trl",
}  # fmt: skip
#: an adapter that the planner does not know takes this much of LoRA's step (median of those in peft's comparison), and
#: the factor by which its interval is wider; those that wrap no matrix, or only scale, take LoRA's time
VARIANT_SLOWER, VARIANT_FACTOR = 1.17, 1.3
PLAIN_VARIANTS = (
    "ia3",
    "ln_tuning",
    "prefixtuning",
    "ptuning",
    "prompt_tuning",
    "miss",
    "road",
    "mica",
    "shira",
    "trainable",
)
#: seconds of a step in which the source's loop does something else than train: peft's collects garbage and empties the
#: cache; there the bare model (ln_tuning) takes as long as LoRA, although it starts a quarter fewer kernels
LOOP_S = {"peft": 0.06}
#: validation beside training, as a share: litgpt validates on 100 batches every 100 steps
VALIDATION = 1.05
#: element-wise traffic of a stream in fp32 over one that casts to fp32 and back
FP32_STREAM = 1.4
#: a card that gpus.toml does not have because its name asks for another: text -> (its sibling, bytes/s, clock)
SIBLINGS = {
    "h100-96gb hbm2e 500w": ("h100-sxm-80gb", 2.4e12, 1.0),
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a data set's samples: mean, s.d. over mean, the cut; `buckets`: batches of near lengths."""

    mean: float
    cv: float
    cut: float = math.inf
    buckets: bool = False
    samples: int = 0
    source: str = ""

    def padded(self, batch: int) -> float:
        """Mean length to which the samples of a batch are padded.

            mean * exp(-s^2 / 2 + s z(b)),   s^2 = ln(1 + cv^2), z(b) the mean of the longest of b normals

        Log-normal lengths, the longest of a batch at the quantile of the mean of its order statistic. Samples of near
        length in a batch waste 4 %.

        >>> round(Lengths(100, 0.5).padded(1)), round(Lengths(100, 0.5).padded(4)), round(Lengths(100, 0.5).padded(64))
        (100, 154, 277)
        """
        if batch <= 1:
            return min(self.mean, self.cut)
        if self.buckets:
            return 1.04 * self.mean
        s = math.sqrt(math.log(1 + self.cv**2))
        # E[max] of b log-normals by the midpoint rule over the quantiles of the largest
        n, total = 64, 0.0
        for i in range(n):
            u = ((i + 0.5) / n) ** (1 / batch)
            total += min(self.cut, self.mean * math.exp(-s * s / 2 + s * _quantile(u)))
        return total / n


def _quantile(u: float) -> float:
    """Of the standard normal distribution."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(u)


#: what is known of the lengths of data that tables name
DATA = (
    (r"alpaca2k|alpaca_2k|alpaca-2k", Lengths(150, 0.7, 512, samples=1900,
     source="assumed: 2000 samples of Alpaca less 5 % for validation, its template of 40 tokens included")),
    (r"alpaca", Lengths(150, 0.7, source="assumed: Alpaca with its template of 40 tokens")),
    (r"<= ?768|metamath", Lengths(210, 0.5, 768, buckets=True,
     source="4,198,051 tokens in 20,000 samples; peft's run.py batches by length (BucketIterator)")),
)  # fmt: skip


def lengths_of(text: str) -> Lengths | None:
    """
    >>> lengths_of("<= 512 (Alpaca2k, padded to batch max)").samples, lengths_of("2048")
    (1900, None)
    """
    low = text.lower()
    return next((known for pattern, known in DATA if re.search(pattern, low)), None)


# ---------------------------------------------------------------- a setting as work


class Unpredictable(Exception):
    """Why a row has no prediction."""


def stack_of(s: Setting, row: Row) -> str:
    name = STACK_OF.get(s.source, STACK_OF["*"])
    text = " ".join(str(v) for v in row.values()).lower()
    if s.source == "torchtitan":
        return "torchtitan-compile" if s.compiled else "torchtitan"
    if s.source == "ms-swift" and "megatron" in str(row.get("method", "")).lower():
        return "nemo"
    if "unsloth" in text and name == "hf-trl":
        return "unsloth"
    return name


@cache
def gpu_like(text: str) -> Gpu | None:
    """Cards that differ from one of gpus.toml in a way that the text states."""
    known = SIBLINGS.get(text.lower().strip())
    if known is None:
        found = [g for g in gpus() if any(name.lower() in text.lower() for name in g.also if len(name) > 6)]
        return found[0] if len(found) == 1 else None
    base = next(g for g in gpus() if g.name == known[0])
    peaks = {dtype: peak * known[2] for dtype, peak in base.peak_flops_per_s.items()}
    return replace(base, hbm_bytes_per_s=known[1], peak_flops_per_s=peaks)


def observation(s: Setting, row: Row) -> tuple[Observation, float, float]:
    """What one GPU does in a step, the tokens that the source counts in it (of all GPUs), and padded tokens in it.

    `seconds` is left NaN. Raises Unpredictable.
    """
    if s.reason:
        raise Unpredictable(s.reason)
    gpu = s.gpu or gpu_like(s.gpu_name)
    if gpu is None:
        raise Unpredictable(
            f"the GPU {s.gpu_name[:40]!r} is not in data/gpus.toml" if s.gpu_name else "no GPU is stated"
        )
    if s.model is None or s.method is None:
        raise Unpredictable("the model or the method is not known")
    if s.source == "ktransformers":
        raise Unpredictable("experts or layers run on the host, in a way that the row does not say")
    if "suite" in s.notes.lower():
        raise Unpredictable("the time of a whole suite, whose tokens are not stated")
    if "experts loop" in s.notes:
        raise Unpredictable("experts run one by one in a Python loop, whose launches are not counted")
    if s.micro_batch is None:
        raise Unpredictable("the micro-batch is not stated")
    if s.tokens_per_s is None and s.seconds_per_step and not s.accumulation and not _stated_batch(s):
        raise Unpredictable("the batch of a step is not stated")
    known = lengths_of(str(row.get("seq_len", "")))
    seq = known.padded(s.micro_batch) if known else s.seq_len
    if not seq:
        raise Unpredictable("the tokens of a batch are not stated")
    accumulation = _accumulation(s)
    p = s.parallel
    share = p.tensor * p.pipeline * p.context
    if share > s.gpus or s.gpus > 1 << 17 or seq * s.micro_batch * accumulation > 1e10:
        raise Unpredictable("the numbers of the row contradict each other")
    asked = _copy(s, gpu, round(seq), accumulation)
    asked = _divided(s, asked, accumulation, str(row.get("method", "")))
    replicas = s.gpus // share
    padded = replicas * s.micro_batch * round(seq) * accumulation
    counted = replicas * s.micro_batch * accumulation * (known.mean if known else seq)
    found = Observation(s.source, s.model.name, stack_of(s, row), gpu, asked, math.nan, label=s.label)
    return found, counted, padded


def _accumulation(s: Setting) -> int:
    """Micro-batches of a step; of "GBS16" without an equals sign too."""
    if s.accumulation:
        return s.accumulation
    stated = _stated_batch(s)
    share = s.parallel.tensor * s.parallel.pipeline * s.parallel.context
    return max(1, round(stated * share / ((s.micro_batch or 1) * s.gpus))) if stated else 1


def _stated_batch(s: Setting) -> int | None:
    found = re.search(r"gbs ?(\d{1,7})", s.notes.lower())
    return int(found[1]) if found else None


def _copy(s: Setting, gpu: Gpu, seq: int, accumulation: int) -> Work:
    assert s.model is not None and s.method is not None and s.micro_batch is not None
    dtype = s.compute if s.compute in gpu.peak_flops_per_s or s.compute == "fp4" else matmul_dtype(gpu)
    selective = s.checkpointing == "selective" or (not s.checkpointing and s.source == "torchtitan")
    usual = "none" if s.stack.name in ("nemo", "megatron", "torchtitan", "llm-foundry") else "full"
    how = "none" if selective else s.checkpointing if s.checkpointing in CHECKPOINTING else usual

    model, micro_batch = s.model, s.micro_batch
    # finetune.py names "c_proj", which peft finds in the MLP as well
    both = s.source == "qwen-readme" and "attn.c_proj" in s.method.targets
    method = replace(s.method, targets=(*s.method.targets, "mlp.c_proj")) if both else s.method

    def one(checkpointing: str) -> Work:
        return work(model, method, micro_batch=micro_batch, seq_len=seq, accumulation=accumulation,
                    checkpointing=checkpointing, attention=s.attention, dtype=dtype)  # fmt: skip

    found = one(how)
    if selective:  # every other product is computed again
        found = blend(found, one("full"), 0.5)
    if s.method.base_dtype.startswith("nf4") and s.upcast and not s.autocast:
        # the residual stream is fp32, and so is what the 4-bit matrices return: attention runs in fp32
        found = replace(found, attention_dtype="fp32", activation_bytes=FP32_STREAM * found.activation_bytes)
    if s.method.is_full and s.full_precision == "bf16":  # parameters, gradients and states
        found = replace(found, optimizer_bytes=adamw_bytes(s.model.total, 2, 2))
    if s.saved:
        found = _trained_too(found, s)
    return found


def blend(a: Work, b: Work, share: float) -> Work:
    """Work between two: selective checkpointing."""
    names = ("linear_flops", "adapter_flops", "activation_bytes", "weight_bytes_read", "kernels", "dequantised_params")
    mixed = {name: (1 - share) * getattr(a, name) + share * getattr(b, name) for name in names}
    return replace(a, **mixed)


def _trained_too(found: Work, s: Setting) -> Work:
    """Embedding and head trained beside the adapters: the head's weight gradient, and the optimizer's traffic."""
    assert s.model is not None
    params = s.model.hidden_size * s.model.vocab_size
    return replace(
        found,
        linear_flops=found.linear_flops + 2 * params * found.tokens * ("lm_head" in s.saved),
        optimizer_bytes=found.optimizer_bytes + adamw_bytes(len(s.saved) * params, 4, 4),
    )


def _divided(s: Setting, copy: Work, accumulation: int, method: str) -> Work:
    assert s.model is not None and s.method is not None
    p = s.parallel
    if s.source == "qwen-readme" and s.method.is_full:  # finetune_ds.sh: ZeRO-3, on one GPU too
        p = replace(p, weights=s.gpus, states=s.gpus)
        copy = replace(copy, kernels=ZERO3_LAUNCHES * copy.kernels)
    elif "zero3" in method.lower().replace("-", "").replace(" ", ""):
        copy = replace(copy, kernels=ZERO3_LAUNCHES * copy.kernels)
    if s.gpus == 1:
        return copy
    rack = 72 if s.gpu is not None and s.gpu.name.startswith("gb") else 8
    nodes = max(-(-s.gpus // rack), 2 if "multinode" in method.lower() or "multi-node" in method.lower() else 1)
    by = Division(s.gpus, p.weights, p.states, p.tensor, p.pipeline, p.context, p.expert, nodes, p.offload)
    stored = 2.0 * s.model.total
    if s.method.base_dtype.startswith("nf4") or s.method.base_dtype == "gptq":
        stored -= 1.5 * shape(s.model, s.method).quantised_params
    found = divided(copy, s.model, s.method, by, micro_batches=accumulation, checkpointing=s.checkpointing or "none",
                    stored_bytes=stored, gradient_bytes=2.0 if s.source in ("mosaicml", "litgpt", "fsdp-qlora") else 4.0)  # fmt: skip
    virtual = settings.whole(s.facts.get("vp"), 1e3) or 1
    return replace(found, bubble=found.bubble / virtual)


def measured(s: Setting, row: Row) -> list[tuple[str, str, float]]:
    """(quantity, unit, value) of what the row measured: tokens/s, else the minutes of a run.

    A row with both has one from the other, except MLPerf's, whose minutes are those to the target.
    """
    if s.tokens_per_s:
        return [("tokens/s", "tokens/s", s.tokens_per_s)]
    if s.seconds_per_step:
        return [("step seconds", "s", s.seconds_per_step)]
    return [("minutes", "min", s.minutes)] if s.minutes else []


def observed(row: Row, s: Setting | None = None) -> Observation | None:
    """The row as something to fit on; None where it has no time or is no setting."""
    s = s or settings.read(row)
    found = measured(s, row)
    if not found or s.source == "mlperf":
        return None
    try:
        seen, counted, _ = observation(s, row)
        return replace(seen, seconds=_step_seconds(s, row, found[0], counted) - LOOP_S.get(s.source, 0.0))
    except (Unpredictable, LoraPlanError, ArithmeticError, ValueError):
        return None


def steps_of_run(s: Setting, row: Row) -> float:
    """Optimizer steps in `time_min`, validation counted as steps.

    Raises Unpredictable where the row does not say how long the run was.
    """
    assert s.micro_batch is not None
    accumulation = _accumulation(s)
    if "1k micro-iterations" in s.notes:
        return 1000 / accumulation
    known = lengths_of(str(row.get("seq_len", "")))
    epochs = settings.number(s.facts.get("epochs"))
    if known and known.samples and epochs:
        return VALIDATION * known.samples * epochs / (s.micro_batch * s.gpus * accumulation)
    steps = settings.whole(s.facts.get("steps"), 1e9)
    if steps:
        return float(steps)
    raise Unpredictable("the number of steps or of tokens is not stated")


def _step_seconds(s: Setting, row: Row, found: tuple[str, str, float], counted: float) -> float:
    quantity, _, value = found
    if quantity == "tokens/s":
        return counted / value
    return value if quantity == "step seconds" else value * 60 / steps_of_run(s, row)


# ---------------------------------------------------------------- cases


def cases(s: Setting, row: Row) -> list[Case]:
    """A case for the throughput of a row of measured runs; none where it measured no time.

    MLPerf rows are those of calibrate/track/mlperf.py.
    """
    if s.source == "mlperf":
        from calibrate.track import mlperf

        return mlperf.measured_cases(s, row)
    return [_predicted(case, s, row, step_of) for case in _measured_cases(s, row)]


def _measured_cases(s: Setting, row: Row) -> list[Case]:
    return [
        Case(quantity, s.source, s.model_name, s.family, s.method_name, s.gpu.name if s.gpu else s.gpu_name, s.label, unit,
             value)
        for quantity, unit, value in measured(s, row)
    ]  # fmt: skip


def _predicted(case: Case, s: Setting, row: Row, predict: Callable[[Observation], Estimate]) -> Case:
    try:
        seen, counted, _ = observation(s, row)
        steps = steps_of_run(s, row) if case.quantity == "minutes" else 1.0
        step = _wider(predict(seen), s)
    except Unpredictable as why:
        return replace(case, reason=str(why))
    except (LoraPlanError, ArithmeticError, ValueError, TypeError) as why:
        return replace(case, reason=f"the planner refuses: {str(why)[:120]}")
    return replace(case, predicted=converted(step, case.quantity, counted, steps), fitted=is_fitted(s, row))


def step_of(seen: Observation) -> Estimate:
    """Seconds of the step by the packaged constants."""
    rows = stack(seen.stack, seen.gpu)
    found = step_time(seen.work, seen.gpu, rows).estimate()
    found.source = rows.rows["spread"].source
    return found


def _wider(step: Estimate, s: Setting) -> Estimate:
    """With what the loop of the source does besides; wider for an adapter of which the planner knows only the base."""
    wider = VARIANT_FACTOR if s.variant else 1.0
    factor = VARIANT_SLOWER if s.variant and s.variant not in PLAIN_VARIANTS else 1.0
    more = LOOP_S.get(s.source, 0.0)
    low, value, high = (factor * x + more for x in (step.low / wider, step.value, step.high * wider))
    return Estimate(low, value, high, "s", step.basis, step.source)


def converted(step: Estimate, quantity: str, counted: float, steps: float) -> Estimate:
    """Seconds of a step as what the row measured."""
    if quantity == "tokens/s":
        return Estimate(
            counted / step.high, counted / step.value, counted / step.low, "tokens/s", step.basis, step.source
        )
    return step if quantity == "step seconds" else step.scaled(steps / 60, "min")


@cache
def _fitted_on() -> frozenset[tuple[str, str]]:
    """(source, model) pairs of the tables that feed the fit."""
    from calibrate.track import TABLES, read

    found = set()
    for row in read(TABLES / "measured.csv"):
        s = settings.read(row)
        if measured(s, row):
            found.add(_identity(s, row))
    return frozenset(found)


def _identity(s: Setting, row: Row) -> tuple[str, str]:
    keys = ("source", "model", "method", "gpu", "n_gpus", "seq_len", "micro_batch", "extra")
    return s.source, "|".join(str(row.get(key, "")) for key in keys)


def is_fitted(s: Setting, row: Row) -> bool:
    """Whether a packaged constant was fitted on this very row."""
    return _identity(s, row) in _fitted_on()


def peft_row(row: Row) -> dict[str, str]:
    """A row of peft's method comparison in the columns of measured.csv."""
    name = str(row.get("exp", ""))
    kind, _, rest = name.partition("/")
    how = re.sub(r"^llama-[\d.]+-\d+b-?", "", rest, flags=re.I)
    return {
        "source": "huggingface/peft method_comparison", "model": "meta-llama/Llama-3.2-3B",
        "method": "full" if kind.startswith("full") else f"{kind}:{how}", "rank": str(row.get("r") or ""),
        "targets": str(row.get("targets", "")).replace("|", "+"), "precision": "bfloat16; adapter fp32",
        "gpu": str(row.get("gpu", "")), "n_gpus": "1", "seq_len": "<= 768 (padded batch, mean ~210 tok/sample)",
        "micro_batch": "4", "grad_ckpt": "False", "attention impl": "default(sdpa)", "peak_mem_GiB": "",
        "tokens_per_s": "", "time_min": "", "extra": f"steps=5000; trainable={row.get('trainable', '')}",
    }  # fmt: skip


def peft_cases(row: Row, predict: Callable[[Observation], Estimate] | None = None) -> list[Case]:
    """The seconds of training of a row of peft_l40s.csv; `predict`: by constants other than the packaged ones."""
    seconds = settings.number(str(row.get("train_s", "")))
    if seconds is None or seconds <= 0:
        return []
    name, suite = str(row.get("exp", "")), str(row.get("suite", ""))
    as_measured = peft_row(row)
    s = settings.read(as_measured)
    case = Case("train seconds", "peft", s.model_name, s.family, s.method_name, s.gpu.name if s.gpu else s.gpu_name,
                f"peft {suite} {name}", "s", seconds)  # fmt: skip
    if suite != "MetaMathQA":
        reason = f"the suite {suite[:30]!r} trains no language model"
        kind, _, model = name.partition("/")
        return [replace(case, model=model or suite, family="", method=kind, reason=reason)]
    try:
        seen, _, _ = observation(s, as_measured)
        tokens = settings.number(str(row.get("tokens", "")))
        steps = tokens / (4 * DATA[2][1].mean) if tokens else 5000.0
        step = _wider((predict or step_of)(seen), s)
    except (Unpredictable, LoraPlanError, ArithmeticError, ValueError, TypeError) as why:
        return [replace(case, reason=str(why)[:160])]
    return [replace(case, predicted=step.scaled(steps, "s"), fitted=not s.variant)]


def observations(rows: Sequence[Row]) -> list[Observation]:
    """Rows of measured.csv to fit on; adapters that the planner does not know say nothing of LoRA's constants."""
    found = []
    for row in rows:
        s = settings.read(row)
        seen = observed(row, s) if not s.variant else None
        if seen is not None and "multinode" in str(row.get("method", "")).lower():
            seen = replace(seen, weight=0.1)  # Qwen's are 1.75 times as slow at every length, which no traffic explains
        if seen is not None and math.isfinite(seen.seconds) and seen.seconds > 0:
            found.append(seen)
    return found


def held_out(rows: Sequence[Row]) -> list[Case]:
    """Every row of measured runs by constants fitted without any row of its source."""
    from calibrate import throughput
    from calibrate.track import TABLES, mlperf, read

    read_rows = [(settings.read(row), row) for row in rows]
    everything = observations(rows) + mlperf.observations(read(TABLES / "mlperf_llama2_70b_lora.csv"))
    whole = throughput.fit(everything)
    fits, errors = {}, []
    for source in dict.fromkeys(s.source for s, _ in read_rows if s.source != "mlperf"):
        by = fits[source] = throughput.fit([o for o in everything if o.source != source], whole, throughput.WARM)
        errors += [
            throughput.LeftOut(source, o.stack, o.gpu.name, by.tier(o.stack, o.gpu.name),
                               math.log(o.seconds / throughput.predicted_s(o, by)))
            for o in everything if o.source == source
        ]  # fmt: skip
    found: list[Case] = []
    for source, by in fits.items():
        width = throughput.elsewhere(throughput.widths([e for e in errors if e.source != source]))
        step = throughput.predictor(by, width)
        for s, row in read_rows:
            if s.source == source:
                found += [replace(_predicted(case, s, row, step), fitted=False) for case in _measured_cases(s, row)]
    return found


def peft_held_out(rows: Sequence[Row]) -> list[Case]:
    """The same as `peft_cases` by constants fitted without any row of peft's comparison.

    LOOP_S and VARIANT_SLOWER were read off the comparison itself, and are not left out.
    """
    from calibrate import throughput

    whole = throughput.everything()
    by = throughput.fit([o for o in throughput.observations() if o.source != "peft"], whole, throughput.WARM)
    packaged = {row.stack: math.log(row.high) for row in constants() if row.name == "spread" and row.gpu == ANY}
    width = dict.fromkeys((throughput.OWN, throughput.POOLED, throughput.BORROWED), packaged["hf-trl"])
    step = throughput.predictor(by, width)
    return [replace(case, fitted=False) for row in rows for case in peft_cases(row, step)]
