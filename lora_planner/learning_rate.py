"""Learning rates: where to start, how far to sweep, and what the number was measured on.

An LR of LoRA means nothing without (alpha, scaling, rank, init, optimizer), so the scale travels with
it. Everything here is for Adam with A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)), B = 0, one LR for both.

    N total parameters of the base   h hidden size   r rank   s scale (alpha / r or alpha / sqrt r)
    LWR: "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025)

The fitted numbers are in data/lr_constants.json, written by `python -m calibrate.learning_rate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import exp, isclose, log, sqrt

from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import DATA
from lora_planner.findings import covering
from lora_planner.ledger import ASSUMED, FITTED, Estimate, around
from lora_planner.method import DEFAULT_ALPHA, method

SFT, RL = "sft", "rl"
OBJECTIVES = (SFT, RL)

#: model_type -> the family whose offset was fitted; a family shares its pretraining, not only its layers
FAMILIES: Mapping[str, str] = {
    "llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3",
    "qwen3_5": "qwen3.5", "qwen3_5_text": "qwen3.5", "qwen3_5_moe": "qwen3.5", "qwen3_5_moe_text": "qwen3.5",
    "deepseek_v3": "deepseek", "kimi_k2": "deepseek", "kimi_k25": "deepseek",
    "nemotron_h": "nemotron", "gpt_oss": "gpt-oss",
}  # fmt: skip

#: exponents of the published formula; no other family was calibrated
PUBLISHED_POWERS = {"llama": 0.781, "qwen3": 0.0775}

#: the sweep behind the fit
SWEPT_PARAMS, SWEPT_RANKS, SWEPT_STEPS, SWEPT_BATCH = (1.2e9, 1.1e12), (1, 128), 780, 128
REFERENCE_RANK = 32  # at which the LoRA : full ratio is applied; full fine-tuning has no rank

#: LoRA LR over full LR: 9.8 (LWR), 10 and 20 (Biderman), 10 / 8.8 / 4.8 (kenkuuu), 3 to 10 (Brokttv).
#: Log-normal, sigma x1.6, as a 90 % interval.
SFT_RATIO = around(10.0, 1.6**1.645, "ratio", FITTED, "LWR and four replications: 3.5 to 20")
RL_RATIO = Estimate(3.5, 5.9, 10.0, "ratio", ASSUMED, "3.5 to 5 in kenkuuu's GRPO runs, 10 in LWR")

#: extra factor of the band for what the sweep did not contain
BEYOND_SWEEP = 1.5
UNSWEPT_METHODS = {
    "qlora": "the sweep's base was not quantised",
    "dora": "DoRA was not swept",
    "lora-fa": "LoRA-FA was not swept; with A frozen only the first steps are LoRA's",
}


@dataclass(frozen=True, slots=True)
class Advice:
    """A learning rate and all it depends on. `lr` is of the chosen method, `full_lr` beside it.

    `sweep`: rates to try when the run is worth a sweep, +-4x. `labels`: why the band is as wide as it is.
    """

    lr: Estimate
    full_lr: Estimate
    alpha: float
    scaling: str
    scale: float
    schedule: str
    sources: tuple[str, ...]
    labels: tuple[str, ...]
    sweep: tuple[float, ...]


@cache
def constants() -> Mapping[str, Estimate]:
    """Every row of data/lr_constants.json by name."""
    document = json.loads((DATA / "lr_constants.json").read_text(encoding="utf-8"))
    return {
        row["name"]: Estimate(row["low"], row["value"], row["high"], "", row["basis"], row["source"])
        for row in document["constants"]
    }


def published_lora_lr(hidden_size: int, family: str) -> float:
    """The formula that a hosted trainer ships, for comparison; `sft_lora_lr` is what we advise.

        5e-5 * 10 * (2000 / h)^p        [1],  p = 0.781 (Llama), 0.0775 (Qwen3)

    Source: LWR, "Optimal learning rate and rank"; constants of tinker-cookbook. On
    its makers' own sweep it lands further from the optimum than a flat 3e-4 does.

    >>> round(published_lora_lr(4096, "llama"), 6), round(published_lora_lr(4096, "qwen3"), 6)
    (0.000286, 0.000473)
    """
    if family not in PUBLISHED_POWERS:
        raise UnknownName(f"the published formula has no exponent for {family!r}", "family",
                          f"Calibrated: {', '.join(PUBLISHED_POWERS)}.")  # fmt: skip
    if hidden_size < 1:
        raise BadInput(f"hidden_size {hidden_size} is no width", "hidden_size", "Use 1 or more.")
    return float(5e-5 * 10 * (2000 / hidden_size) ** PUBLISHED_POWERS[family])


def checked_lr(lr: float, where: str = "--lr") -> float:
    """The same LR, or an error outside (0, 1].

    >>> checked_lr(3e-4)
    0.0003
    """
    if not 0 < lr <= 1:
        raise BadInput(f"learning rate {lr:g} is outside (0, 1]", where, "LoRA starts near 3e-4, full near 3e-5.")
    return lr


def sft_lora_lr(total_params: float, rank: int, family: str | None) -> Estimate:
    """The best LR of LoRA in supervised tuning at alpha = 32, scaling alpha / r.

        exp(a + b ln(N / 8e9) + c ln(r / 16) + u_family)        [1]

    u is shrunken towards 0 and is 0 for a family that was not swept (`family=None`), whose band is
    that of leaving a whole family out: there the law is no better than a flat 3e-4, and one family of
    six was outside the band that the others gave it. Rank 1 comes out at half of rank 64, as
    replications report.
    Source: our fit to the tinker-cookbook sweep (23 models, 84 cells of which 61 bracket their optimum).
    Each model predicted by the other 22: within x1.5 of the optimum in 90 %, loss above the sweep's
    best by 0.04 % (median) and 0.34 % (90 % quantile), 78 of 84 cells in the band.

    >>> llama_8b = sft_lora_lr(8.03e9, 16, "llama")
    >>> 2e-4 < llama_8b.low < llama_8b.value < llama_8b.high < 8e-4
    True
    """
    fit = constants()
    offset = fit[f"lr.family.{family}"].value if family else 0.0
    size = fit["lr.size_exponent"].value * log(total_params / 8e9)
    value = exp(fit["lr.ln_lr"].value + size + fit["lr.rank_exponent"].value * log(rank / 16) + offset)
    band = fit["lr.band" if family else "lr.band_new_family"]
    inside = SWEPT_PARAMS[0] <= total_params <= SWEPT_PARAMS[1] and rank <= SWEPT_RANKS[1]
    return around(value, _jointly(band.value, 1 if inside else BEYOND_SWEEP), "1", FITTED, band.source)


def short_run_factor(steps: float) -> float:
    """How much higher the LR of a short run is: B starts at 0 and must grow first.

        1 + 0.5 exp(-steps / 100)        [1]

    Source: LWR gives 15x full for up to about 100 steps and 10x for long runs; the curve between is
    our interpolation.

    >>> short_run_factor(0), round(short_run_factor(100), 2), round(short_run_factor(780), 3)
    (1.5, 1.18, 1.0)
    """
    return 1 + 0.5 * exp(-steps / 100)


def short_ratio(steps: float) -> Estimate:
    """How much larger LoRA's multiple of full fine-tuning's rate is in a short run.

        1 + 0.5 exp(-steps / 100)        [ratio], between 1 and what our own runs had after 30 steps, likewise fading

    LWR puts it all into LoRA's rate; in our runs a half of it was a lower rate of full fine-tuning (claim C09).
    Source: `short_run_factor`; claim C09.

    >>> short_ratio(1e6).high
    1.0
    """
    told = covering(
        Estimate(1.0, 1.5, 1.5, "ratio", ASSUMED, "LWR: 15x for up to about 100 steps, 10x for long runs"), "C09"
    )
    fading = exp(-steps / 100)
    return Estimate(1.0, 1 + (told.value - 1) * fading, 1 + (told.high - 1) * fading, "ratio", ASSUMED, told.source)


def scale_factor(scale: float, rank: int) -> Estimate:
    """What an adapter scale other than 32 / r does to the best LR.

        (s r / 32)^-3/4,   -1 ... -1/2 as interval        [1]

    Exact under Adam (epsilon 0) is only: alpha k and LR_B / k at unchanged LR_A. With one LR for both
    matrices the first steps want 1 / k (slope alpha init_A LR_B), the muA analysis 1 / sqrt(k), and
    a sweep with alpha = 10 r found about 1 / k; the middle exponent is our choice.
    Source: LWR, invariance; arXiv:2602.06204; Brokttv, tinker-feedback issue 67.

    >>> scale_factor(2.0, 16).value, round(scale_factor(8.0, 16).value, 3)
    (1.0, 0.354)
    """
    k = scale * rank / DEFAULT_ALPHA
    ends = sorted((k**-1.0, k**-0.5))
    return Estimate(ends[0], k**-0.75, ends[1], "1", ASSUMED, "LWR invariance; arXiv:2602.06204")


def full_lr(total_params: float, model_type: str, objective: str = SFT, steps: float | None = None) -> Estimate:
    """The best LR of full fine-tuning: LoRA's at rank 32, alpha 32, over the measured ratio.

        LR_lora(N, r=32) / ratio        [1],  ratio 10 (4.6 ... 21.7) in SFT, 5.9 (3.5 ... 10) in RL

    A short run (`steps`) has the same value and a lower end that reaches further down: `short_ratio`.

    Source: LWR and replications. No theory gives the ratio: matching first-step slopes predicts
    sqrt(3) h / alpha, 222 at h = 4096.

    >>> 1e-5 < full_lr(8.03e9, "llama").value < 6e-5
    True
    """
    _check(total_params, None, objective)
    family = FAMILIES.get(model_type)
    ratio = RL_RATIO if objective == RL else covering(SFT_RATIO, "C07")
    lora = rl_lora_lr(total_params, family) if objective == RL else sft_lora_lr(total_params, REFERENCE_RANK, family)
    short = short_ratio(steps) if steps is not None and objective == SFT else None
    below = _jointly(lora.value / lora.low, ratio.high / ratio.value, short.high if short else 1.0)
    above = _jointly(lora.high / lora.value, ratio.value / ratio.low)
    value = lora.value / ratio.value
    source = f"{ratio.source}; {short.source}" if short and short.high > 1.01 else ratio.source
    return Estimate(value / below, value, value * above, "1", ratio.basis, source)


def rl_lora_lr(total_params: float, family: str | None) -> Estimate:
    """The best LR of LoRA in policy-gradient RL: lower than in SFT and without a trend in rank.

        LR_sft(N, r=16) * f        [1],  f about 0.14

    Source: one sweep (GRPO, Qwen3-1.7B, one seed): best 8e-5, 1e-4, 7e-5 at rank 1, 16, 256, and final
    accuracy above 0.80 from 2e-5 to 2e-4. One model, so the basis is "assumed".

    >>> rl_lora_lr(8.2e9, "qwen3").value < sft_lora_lr(8.2e9, 16, "qwen3").value / 3
    True
    """
    sft, f = sft_lora_lr(total_params, 16, family), constants()["lr.rl_factor"]
    below = _jointly(sft.value / sft.low, f.value / f.low)
    above = _jointly(sft.high / sft.value, f.high / f.value)
    value = sft.value * f.value
    return Estimate(value / below, value, value * above, "1", ASSUMED, f.source)


def advise(
    total_params: float,
    model_type: str,
    method_name: str = "lora",
    rank: int = 16,
    alpha: float = DEFAULT_ALPHA,
    steps: float | None = None,
    objective: str = SFT,
    batch: int | None = None,
) -> Advice:
    """The LR to start from, its 90 % band, and the tuple that gives it a meaning.

        LR = LR_lora(N, r, family) * scale_factor * short_run_factor        [1]

    Factors multiply, so the half-widths of their logarithms add in quadrature. `batch` only widens:
    one source scales LR with sqrt(batch), MLPerf submitters used the same LR from 8 to 128.
    Source: the functions above.

    >>> a = advise(8.03e9, "llama", rank=16)
    >>> a.scale, a.labels, len(a.sweep)
    (2.0, (), 5)
    >>> advise(2.5e9, "gemma2").labels[0]
    "uncalibrated family: 'gemma2' was not swept; a flat 3e-4 is as good a guess"
    """
    chosen = method(method_name, rank=rank, alpha=alpha)
    _check(total_params, steps, objective, batch)
    family = FAMILIES.get(model_type)
    full = full_lr(total_params, model_type, objective, steps)
    labels = _labels(total_params, model_type, family, method_name, rank, steps, objective)
    if chosen.is_full:
        schedule = "constant or linear decay; Adam; keep float32 master weights at rates this small"
        return Advice(full, full, 0.0, "none", 0.0, schedule, (full.source,), labels, sweep_around(full.value))

    base = rl_lora_lr(total_params, family) if objective == RL else sft_lora_lr(total_params, rank, family)
    scaled = scale_factor(chosen.scaling, rank)
    short = short_run_factor(steps) if steps is not None else 1.0
    other = _jointly(scaled.high / scaled.value, short, BEYOND_SWEEP if method_name in UNSWEPT_METHODS else 1.0)
    batch_low = sqrt(min(1.0, batch / SWEPT_BATCH)) if batch else 1.0
    batch_high = sqrt(max(1.0, batch / SWEPT_BATCH)) if batch else 1.0
    value = checked_lr(base.value * scaled.value * short, "alpha")
    low = value / _jointly(base.value / base.low, other, batch_low)
    high = min(1.0, value * _jointly(base.high / base.value, other, batch_high))
    as_swept = other < 1.01  # the fit's own alpha, method and length of run
    lr = Estimate(low, value, high, "1", base.basis if as_swept else ASSUMED, base.source)
    sources = [base.source]
    if not isclose(scaled.value, 1.0):
        sources.append(scaled.source)
    if short > 1.01:
        sources.append("LWR: 15x for up to about 100 steps, 10x for long runs; our interpolation")
    scaling = "alpha / sqrt(r)" if method_name == "rslora" else "alpha / r"
    schedule = "constant without warm-up (LWR), or linear decay (the sweep); B = 0 is a warm-up of its own"
    return Advice(lr, full, alpha, scaling, chosen.scaling, schedule, tuple(sources), labels, sweep_around(value))


def sweep_around(lr: float) -> tuple[float, ...]:
    """Five rates a factor two apart around `lr`: +-4x, which replications' optima needed.

    >>> sweep_around(3e-4)
    (7.5e-05, 0.00015, 0.0003, 0.0006, 0.0012)
    """
    return tuple(float(f"{lr * 2.0**i:.2g}") for i in range(-2, 3) if lr * 2.0**i <= 1)


def _labels(
    total_params: float, model_type: str, family: str | None, method_name: str, rank: int,
    steps: float | None, objective: str,
) -> tuple[str, ...]:  # fmt: skip
    labels = []
    if family is None:
        labels.append(f"uncalibrated family: {model_type!r} was not swept; a flat 3e-4 is as good a guess")
    if not SWEPT_PARAMS[0] <= total_params <= SWEPT_PARAMS[1]:
        labels.append("extrapolated: the sweep's models have 1.2 to 1026 billion parameters")
    if method_name != "full" and rank > SWEPT_RANKS[1]:
        labels.append(f"extrapolated: the sweep's ranks end at {SWEPT_RANKS[1]}")
    if method_name in UNSWEPT_METHODS:
        labels.append(f"uncalibrated method: {UNSWEPT_METHODS[method_name]}")
    if objective == RL:
        labels.append("RL: from one sweep of one 1.7B model")
    if steps is not None and steps < 100:
        labels.append("short run: fewer than 100 steps want up to 1.5x the rate (LWR, anecdotal)")
    if steps is not None and steps > 4 * SWEPT_STEPS:
        labels.append(f"extrapolated: {steps:,.0f} steps, the sweep ran {SWEPT_STEPS}")
    return tuple(labels)


def _check(total_params: float, steps: float | None, objective: str, batch: int | None = None) -> None:
    if objective not in OBJECTIVES:
        raise UnknownName(f"objective {objective!r} is not known", "--objective", f"Use {' or '.join(OBJECTIVES)}.")
    if not 0 < total_params < 1e15:
        raise BadInput(f"{total_params:g} parameters are no model", "total_params", "Use the model's total count.")
    if steps is not None and not 0 < steps < float("inf"):
        raise BadInput(f"{steps:g} steps are no run", "--steps", "Use 1 or more.")
    if batch is not None and batch < 1:
        raise BadInput(f"batch {batch} is empty", "--batch", "Use 1 or more.")


def _jointly(*factors: float) -> float:
    """Independent log-symmetric bands of a product: exp(sqrt(sum ln^2))."""
    return exp(sqrt(sum(log(f) ** 2 for f in factors)))
