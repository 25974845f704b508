"""MLPerf Training, Llama-2-70B LoRA: tokens a second, samples to the target loss, minutes.

    minutes = samples_to_target(batch, learning rate) / samples per second + evaluations

Samples per second are those of the roofline (lora_planner.throughput), as for every other table; what is special here is
the law of samples to target and the evaluations between.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from calibrate.throughput import Fit, Observation
from calibrate.track import names
from calibrate.track.case import Case
from calibrate.track.setting import Setting, number, whole
from calibrate.track.speed import Unpredictable, gpu_like, step_of
from lora_planner.errors import LoraPlanError
from lora_planner.facts import Constant, Gpu, constants
from lora_planner.ledger import FITTED, Estimate
from lora_planner.method import Method
from lora_planner.throughput import ANY, FP4_OVER_FP8
from lora_planner.units import GIB
from lora_planner.workload import Division, divided, work

Row = Mapping[str, str]

NAME = "MLPerf Training, Llama-2-70B LoRA"
COLUMNS = ("mlperf_round", "submitter", "system", "accelerator", "n_accel", "global_batch_seqs", "olympic_mean_min",
           "median_samples_to_converge")  # fmt: skip

SEQ_LEN = 8192
#: samples between two evaluations, and of one
EVAL_EVERY, EVAL_SAMPLES = 384, 173
#: evaluations that the rules let a submission skip at the start
SKIPPED = 3
#: the name under which this file's constants are rows of constants.json
STACK = "mlperf"
#: ln of the 95 % quantile of a normal distribution over its s.d.
Z90 = 1.6448536269514722
#: from this round on NVIDIA's submissions run their matmuls in nvfp4 on Blackwell
NVFP4_FROM = 5.1


@dataclass(frozen=True, slots=True)
class Entry:
    """A submission: what it ran on and with, and what it reached. None where the row does not say."""

    round: str
    submitter: str
    system: str
    accelerator: str
    gpu: Gpu | None
    n: int | None
    framework: str
    batch: float | None
    rank: int
    lr: float | None
    accumulation: float | None
    minutes: float | None
    samples: float | None
    wall_rate: float | None
    train_rate: float | None

    @property
    def label(self) -> str:
        return f"{self.round} {self.submitter}: {self.system}, {self.n or '?'} x {self.accelerator}, batch {self.batch or 0:g}"

    @property
    def gpu_name(self) -> str:
        return self.gpu.name if self.gpu else self.accelerator

    @property
    def stack(self) -> str:
        """The software, from the words of the submission."""
        text = f"{self.framework} {self.system} {self.submitter}".lower()
        card = self.accelerator.lower()
        if "gaudi" in card or "habana" in text:
            return "gaudi-mlperf"
        if re.search(r"\bmi\d{3}|instinct|\bamd\b", card):
            return "rocm-mlperf"
        return "deepspeed-reference" if "deepspeed" in text else "nemo"

    @property
    def dtype(self) -> str:
        """Of the matmuls: the reference is bf16; the others take the narrowest format that their round had.

        Source: NVIDIA's and AMD's notes on v4.0 (fp8) and v5.1 (nvfp4 on Blackwell).
        """
        peaks = self.gpu.peak_flops_per_s if self.gpu else {}
        if self.stack == "deepspeed-reference" or "fp8" not in peaks:
            return "bf16"
        released = number(self.round)
        blackwell = self.gpu is not None and self.gpu.name in FP4_OVER_FP8 and self.stack == "nemo"
        return "fp4" if blackwell and released is not None and released >= NVFP4_FROM else "fp8"

    @property
    def together(self) -> int:
        """GPUs that work on one sequence: stated by the accumulation, else as many as the batch leaves or memory asks for.

        n * accumulation / batch; a 70B base in fp8 and its activations need four cards of 80 GB.
        """
        n, batch = self.n or 1, self.batch or 1
        if self.accumulation:
            return max(1, min(n, round(n * self.accumulation / batch)))
        room = self.gpu.memory_bytes / GIB if self.gpu else 80
        least = 8 if room < 60 else 4 if room < 100 else 2 if room < 160 else 1
        return max(1, min(n, max(least, round(n / batch))))


def read_entry(row: Row) -> Entry:
    """A row as an Entry; what cannot be read is None."""
    cells = {key: str(value or "") for key, value in row.items() if isinstance(key, str)}

    def positive(key: str) -> float | None:
        value = number(cells.get(key, ""))
        return value if value is not None and 0 < value < 1e12 else None

    accelerator = cells.get("accelerator", "")
    return Entry(
        cells.get("mlperf_round", ""), cells.get("submitter", ""), cells.get("system", ""), accelerator,
        card(accelerator), whole(cells.get("n_accel"), 1e6), cells.get("framework", ""), positive("global_batch_seqs"),
        whole(cells.get("lora_rank"), 1e4) or 16, positive("base_lr"), positive("grad_accum"),
        positive("olympic_mean_min"), positive("median_samples_to_converge"), positive("wall_samples_per_s_incl_eval"),
        positive("logged_train_samples_per_s"),
    )  # fmt: skip


def card(text: str) -> Gpu | None:
    """The accelerator of a submission. None for one that gpus.toml does not have.

    >>> card("NVIDIA Blackwell GPU (GB200)").name, card("NVIDIA H100-SXM5-80GB").name, card("TPU v9")
    ('gb200-186gb', 'h100-sxm-80gb', None)
    """
    from lora_planner.facts import gpus

    known = {g.name: g for g in gpus()}
    low = text.lower()
    for pattern, name in ((r"gb300", "gb300-278gb"), (r"gb200", "gb200-186gb"), (r"b300", "b300-270gb"),
                          (r"mi355x", "mi355x-288gb"), (r"mi350x", "mi350x-288gb"), (r"gaudi\D*2", "hl225-96gb")):  # fmt: skip
        if re.search(pattern, low):
            return known.get(name)
    return names.gpu_of(text) or gpu_like(text)


def observation(e: Entry) -> Observation:
    """What one accelerator does in an optimizer step; `seconds` NaN where no rate is logged.

    Raises Unpredictable.
    """
    if e.gpu is None:
        raise Unpredictable(f"the accelerator {e.accelerator[:50]!r} is not in data/gpus.toml")
    if not e.n or not e.batch:
        raise Unpredictable("the number of accelerators or the batch is not stated")
    model = names.model_of("Llama-2-70B")
    if model is None or e.batch > 1e6 or e.rank > 8192:
        raise Unpredictable("the numbers of the row are out of range")
    method = Method("lora", e.rank, 32.0, ("attention",), "none", "bfloat16", "bfloat16")
    together = 1 if e.stack in ("deepspeed-reference", "gaudi-mlperf") else e.together
    groups = max(1, e.n // together)
    micro_batches = max(1, round(e.batch / groups))
    dtype = e.dtype if e.dtype in e.gpu.peak_flops_per_s or e.dtype == "fp4" else "bf16"
    copy = work(model, method, micro_batch=1, seq_len=SEQ_LEN, accumulation=micro_batches, attention="flash", dtype=dtype,
                checkpointing="full" if e.stack in ("deepspeed-reference", "gaudi-mlperf") else "none")  # fmt: skip
    tensor = min(4, together)
    rack = 72 if e.gpu.name.startswith("gb") else 8
    whole_weights = e.stack in ("deepspeed-reference", "gaudi-mlperf")
    by = Division(e.n, weights=e.n if whole_weights else 1, tensor=tensor, context=max(1, together // tensor),
                  nodes=-(-e.n // rack))  # fmt: skip
    asked = divided(copy, model, method, by, micro_batches=micro_batches,
                    stored_bytes=model.total * (1.0 if dtype != "bf16" else 2.0), gradient_bytes=2.0)  # fmt: skip
    rate = e.train_rate or (e.wall_rate / TRAINING_SHARE if e.wall_rate else None)
    seconds = groups * micro_batches / rate if rate else math.nan
    return Observation("mlperf", f"{e.submitter}", e.stack, e.gpu, asked, seconds, label=e.label)


#: of the wall time of a reference run, which logs no rate of its own: training, not evaluation
TRAINING_SHARE = 0.87


def step_samples(e: Entry) -> float:
    """Sequences of a step as `observation` divides them: the batch, rounded to whole micro-batches."""
    together = 1 if e.stack in ("deepspeed-reference", "gaudi-mlperf") else e.together
    groups = max(1, (e.n or 1) // together)
    return groups * max(1, round((e.batch or 1) / groups))


def observations(rows: Sequence[Row]) -> list[Observation]:
    """Rows to fit on."""
    found = []
    for row in rows:
        try:
            seen = observation(read_entry(row))
        except (Unpredictable, LoraPlanError, ArithmeticError, ValueError):
            continue
        if math.isfinite(seen.seconds) and seen.seconds > 0:
            found.append(seen)
    return found


# ---------------------------------------------------------------- samples to target


@dataclass(frozen=True, slots=True)
class SampleLaw:
    """Sequences until the target: floor + per_step * batch / learning rate.

    per_step / learning rate is the least number of steps: Adam moves an adapter by about one learning rate a step, and the
    target lies some distance off, however large the batch.
    """

    floor: float
    per_step: float
    sd: float
    rate_law: tuple[float, float]  # ln of the rate where none is stated: intercept and slope in ln batch
    unstated_sd: float
    n: int = 0

    def samples(self, batch: float, lr: float | None) -> Estimate:
        """
        >>> law = SampleLaw(2500, 0.045, 0.08, (-7.7, 0.1), 0.15)
        >>> round(law.samples(64, 5e-4).value), round(law.samples(64, 3e-4).value)
        (8260, 12100)
        """
        rate = lr if lr else math.exp(self.rate_law[0] + self.rate_law[1] * math.log(batch))
        value = self.floor + self.per_step * batch / rate
        band = math.exp(Z90 * (self.sd if lr else math.hypot(self.sd, self.unstated_sd)))
        return Estimate(
            value / band, value, value * band, "sequences", FITTED, "mlperf: floor + per_step * batch / rate"
        )


def fit_samples(entries: Sequence[Entry]) -> SampleLaw:
    """The law, every (batch, rate) weighing the same: most rows are batch 8."""
    cells: dict[tuple[float, float], list[float]] = {}
    for e in entries:
        if e.batch and e.samples and e.lr:
            cells.setdefault((e.batch, e.lr), []).append(math.log(e.samples))
    batch = np.array([b for b, _ in cells])
    lr = np.array([r for _, r in cells])
    mean = np.array([np.mean(v) for v in cells.values()])
    from scipy.optimize import least_squares

    def misfit(t: np.ndarray) -> np.ndarray:
        out: np.ndarray = np.log(np.exp(t[0]) + np.exp(t[1]) * batch / lr) - mean
        return out

    found = least_squares(misfit, [math.log(2500), math.log(0.045)], loss="soft_l1", f_scale=0.1)
    left = misfit(found.x)
    sd = max(0.04, float(np.sqrt(np.sum(left**2) / max(1, len(left) - 2))))
    slope, intercept = (
        np.polyfit(np.log(batch), np.log(lr), 1) if len(set(batch)) > 1 else (0.0, float(np.mean(np.log(lr))))
    )
    scatter = float(np.std(np.log(lr) - intercept - slope * np.log(batch)))
    return SampleLaw(float(np.exp(found.x[0])), float(np.exp(found.x[1])), sd, (float(intercept), float(slope)), scatter,
                     len(entries))  # fmt: skip


# ---------------------------------------------------------------- evaluations


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Seconds beside training: share of a training step that a sample's forward pass takes, and seconds of each."""

    share: float
    each_s: float
    sd: float

    def seconds(self, samples: float, rate: float) -> float:
        """
            n (173 share / rate + each_s),   n = max(1, samples / 384 - 3)        [s]

        >>> round(Evaluation(0.5, 1.0, 0.1).seconds(3072, 2.0), 1)
        221.2
        """
        n = max(1.0, samples / EVAL_EVERY - SKIPPED)
        return n * (EVAL_SAMPLES * self.share / rate + self.each_s)


def fit_evaluation(entries: Sequence[Entry]) -> Evaluation:
    """share and each_s at the least squares of ln minutes."""
    from scipy.optimize import least_squares

    usable = [
        (e.minutes, e.samples, e.train_rate) for e in entries if e.train_rate and e.minutes and e.samples
    ]  # fmt: skip

    def misfit(t: np.ndarray) -> np.ndarray:
        law = Evaluation(math.exp(t[0]), math.exp(t[1]), 0.0)
        return np.array([
            math.log((samples / rate + law.seconds(samples, rate)) / (60 * minutes)) for minutes, samples, rate in usable
        ])  # fmt: skip

    found = least_squares(misfit, [math.log(0.45), 0.0], loss="soft_l1", f_scale=0.05)
    return Evaluation(math.exp(found.x[0]), math.exp(found.x[1]), float(np.std(misfit(found.x))))


# ---------------------------------------------------------------- cases

Step = Callable[[Observation], Estimate]


def _cases(e: Entry, source: str, step: Step, law: SampleLaw, evaluation: Evaluation, fitted: bool) -> list[Case]:
    """Tokens/s of an accelerator, samples to target, minutes."""
    found: list[Case] = []

    def case(quantity: str, unit: str, value: float) -> Case:
        return Case(quantity, source, "Llama-2-70B", "llama", f"lora, {e.stack}, {e.dtype}", e.gpu_name, e.label, unit, value,
                    fitted=fitted)  # fmt: skip

    rate: Estimate | None = None
    reason = ""
    try:
        seen = observation(e)
        per_step = step_samples(e)
        s = step(seen)
        rate = Estimate(per_step / s.high, per_step / s.value, per_step / s.low, "samples/s", s.basis, s.source)
    except Unpredictable as why:
        reason = str(why)
    except (LoraPlanError, ArithmeticError, ValueError, TypeError) as why:
        reason = f"the planner refuses: {str(why)[:120]}"
    samples = law.samples(e.batch, e.lr) if e.batch else None
    measured_rate = e.train_rate or e.wall_rate
    if measured_rate:
        one = case("tokens/s", "tokens/s a GPU", measured_rate * SEQ_LEN / (e.n or 1))
        if rate is not None:
            train = rate if e.train_rate else _with_evaluation(rate, samples, evaluation)
            one = replace(one, predicted=train.scaled(SEQ_LEN / (e.n or 1), "tokens/s a GPU"))
        found.append(one if rate is not None else replace(one, reason=reason, fitted=False))
    if e.samples:
        told = {"error of 2791 (1 + B / 38)": abs(2791 * (1 + e.batch / 38) / e.samples - 1)} if e.batch else {}
        one = replace(case("samples to target", "sequences", e.samples), details=told)
        found.append(
            replace(one, predicted=samples) if samples else replace(one, reason="the batch is not stated", fitted=False)
        )
    if e.minutes:
        one = case("minutes", "min", e.minutes)
        if rate is not None and samples is not None:
            one = replace(one, predicted=_minutes(samples, rate, evaluation))
        else:
            one = replace(one, reason=reason or "the batch is not stated", fitted=False)
        found.append(one)
    return found


def _minutes(samples: Estimate, rate: Estimate, evaluation: Evaluation) -> Estimate:
    value = samples.value / rate.value + evaluation.seconds(samples.value, rate.value)
    below = math.sqrt(
        math.log(samples.value / samples.low) ** 2 + math.log(rate.high / rate.value) ** 2 + (Z90 * evaluation.sd) ** 2
    )
    above = math.sqrt(
        math.log(samples.high / samples.value) ** 2 + math.log(rate.value / rate.low) ** 2 + (Z90 * evaluation.sd) ** 2
    )
    return Estimate(value * math.exp(-below) / 60, value / 60, value * math.exp(above) / 60, "min", FITTED, rate.source)


def _with_evaluation(rate: Estimate, samples: Estimate | None, evaluation: Evaluation) -> Estimate:
    """Samples a second of wall time."""
    if samples is None:
        return rate
    share = 1 / (1 + evaluation.seconds(samples.value, rate.value) * rate.value / samples.value)
    return rate.scaled(share)


@cache
def _packaged() -> tuple[SampleLaw, Evaluation]:
    rows = {row.name: row for row in constants() if row.stack == STACK and row.gpu == ANY}

    def value(name: str) -> float:
        return rows[name].value

    law = SampleLaw(value("samples_floor"), value("samples_per_step"), value("samples_sd"),
                    (value("rate_intercept"), value("rate_slope")), value("rate_sd"))  # fmt: skip
    return law, Evaluation(value("eval_share"), value("eval_s"), value("eval_sd"))


def cases(rows: Sequence[Row]) -> list[Case]:
    """A case for every quantity of every row, by the packaged constants."""
    law, evaluation = _packaged()
    found = []
    for row in rows:
        e = read_entry(row)
        found += _cases(e, "mlperf", step_of, law, evaluation, _identity(e) in _fitted_on())
    return found


def _identity(e: Entry) -> tuple[str, str, str]:
    return e.round, e.submitter, e.system


@cache
def _fitted_on() -> frozenset[tuple[str, str, str]]:
    from calibrate.track import TABLES, read

    return frozenset(_identity(read_entry(row)) for row in read(TABLES / "mlperf_llama2_70b_lora.csv"))


def measured_cases(s: Setting, row: Row) -> list[Case]:
    """The same of a row of measured.csv, which names a submission in `source` and its batch in `extra`."""
    law, evaluation = _packaged()
    e = entry_of(s, row)
    found = _cases(e, "mlperf", step_of, law, evaluation, _identity(e) in _fitted_on())
    return [_of_all(case, e) if case.quantity == "tokens/s" else case for case in found]


def _of_all(case: Case, e: Entry) -> Case:
    """That table gives tokens/s of all accelerators together."""
    n = e.n or 1
    p = case.predicted.scaled(n, "tokens/s") if case.predicted else None
    return replace(case, unit="tokens/s", measured=case.measured * n, predicted=p)


def entry_of(s: Setting, row: Row) -> Entry:
    """A submission from a row of measured.csv.

    >>> from calibrate.track import setting
    >>> row = {"source": "MLPerf Training v5.0 closed/open llama2_70b_lora (Dell/1xXE9680)", "gpu": "NVIDIA H100-SXM5-80GB",
    ...        "n_gpus": "8", "extra": "GBS=8 seqs; median samples=3072; lr=0.0004"}
    >>> e = entry_of(setting.read(row), row)
    >>> e.submitter, e.batch, e.samples, e.lr
    ('Dell', 8.0, 3072.0, 0.0004)
    """
    source = str(row.get("source", ""))
    who = re.search(r"\((.*)\)\s*$", source)
    submitter, _, system = (who[1] if who else "").partition("/")
    version = re.search(r"v\d+\.\d+", source)

    def stated(pattern: str) -> float | None:
        found = re.search(pattern, s.notes)
        value = number(found[1]) if found else None
        return value if value is not None and 0 < value < 1e12 else None

    samples = stated(r"median samples=([\d.]+)")
    tokens = s.tokens_per_s
    wall = "incl. eval" in s.notes
    rate = tokens / SEQ_LEN if tokens else None
    return Entry(
        version[0] if version else "", submitter, system, s.gpu_name, card(s.gpu_name), s.gpus, "", stated(r"GBS=([\d.]+)"),
        s.method.rank if s.method else 16, stated(r"\blr=([\d.eE+-]+)"), None, s.minutes, samples, rate if wall else None,
        None if wall else rate,
    )  # fmt: skip


def held_out(rows: Sequence[Row]) -> list[Case]:
    """Every submission by constants fitted without its submitter's rows, of this table and its copies in measured.csv."""
    from calibrate import throughput
    from calibrate.track import TABLES, read, speed

    entries = [read_entry(row) for row in rows]
    mine = observations(rows)
    everything = [*speed.observations(read(TABLES / "measured.csv")), *mine]
    all_rows = throughput.fit(everything)
    fits: dict[str, Fit] = {}
    errors = []
    for who in dict.fromkeys(e.submitter for e in entries):
        left = [o for o in everything if (o.source, o.model) != ("mlperf", who)]
        by = fits[who] = throughput.fit(left, all_rows, 3)
        errors += [
            throughput.LeftOut(who, o.stack, o.gpu.name, by.tier(o.stack, o.gpu.name),
                               math.log(o.seconds / throughput.predicted_s(o, by)))
            for o in mine if o.model == who
        ]  # fmt: skip
    found: list[Case] = []
    for who, by in fits.items():
        rest = [e for e in entries if e.submitter != who]
        law, evaluation = fit_samples(rest), fit_evaluation(rest)
        step = throughput.predictor(by, throughput.widths([e for e in errors if e.source != who]))
        for e in entries:
            if e.submitter == who:
                found += _cases(e, f"mlperf {who}", step, law, evaluation, False)
    return found


def constant_rows(rows: Sequence[Row]) -> list[Constant]:
    """What this file reads from constants.json, fitted on all rows."""
    entries = [read_entry(row) for row in rows]
    law, evaluation = fit_samples(entries), fit_evaluation(entries)
    source = f"mlcommons training results v4.0 to v5.0, llama2_70b_lora, {len(entries)} submissions"

    def one(name: str, value: float, sd: float = 0.0) -> Constant:
        low, high = (value * math.exp(-Z90 * sd), value * math.exp(Z90 * sd)) if value > 0 else (value, value)
        return Constant(name, STACK, ANY, value, low, high, FITTED, len(entries), source)

    return [
        one("samples_floor", law.floor, law.sd), one("samples_per_step", law.per_step, law.sd), one("samples_sd", law.sd),
        one("rate_intercept", law.rate_law[0]), one("rate_slope", law.rate_law[1]), one("rate_sd", law.unstated_sd),
        one("eval_share", evaluation.share, evaluation.sd), one("eval_s", evaluation.each_s), one("eval_sd", evaluation.sd),
    ]  # fmt: skip
