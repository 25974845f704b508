"""Learning rate, capacity, batch: from two curves and their settings to evidence. Each is one pure function.

What curves look like under each cause was measured on runs in which it was planted; thresholds come from one seed,
hits and false alarms from the others: reports/diagnose.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibrate.diagnose.evidence import Evidence
from calibrate.diagnose.logs import Log
from calibrate.diagnose.settings import Settings
from calibrate.diagnose.shape import Gap
from lora_planner.batch import DEFAULT_BATCH, MIN_STEPS, extra_samples
from lora_planner.capacity import FITS, OVER, Verdict
from lora_planner.findings import covering
from lora_planner.learning_rate import (
    REFERENCE_RANK,
    RL,
    RL_RATIO,
    SFT,
    SFT_RATIO,
    SWEPT_PARAMS,
    advise,
    constants,
    scale_factor,
    sft_lora_lr,
)
from lora_planner.ledger import ASSUMED, Estimate
from lora_planner.method import DEFAULT_ALPHA
from lora_planner.units import bits, percent, rate

#: two runs are the same within this share of the loss, the usual equivalence margin
MARGIN = 0.005
#: growth of the lag, d ln(lag) / d ln(steps), from which a gap opens late; below STILL it stands still
GROWS, STILL = 0.20, 0.05
#: an interval of the growth wider than this to either side says nothing
VAGUE = 0.30
#: rates closer than this are one rate
SAME_RATE = 1.25
#: within this factor of a band's end
FAR_END = 1.5
#: batches above these: LWR's one good batch, and where a replication began to lose
LARGE_BATCH = 128
OURS = "reports/diagnose.md"

LOW, HIGH = "too low", "too high"


@dataclass(frozen=True, slots=True)
class Band:
    """Learning rates that this run should have. `firm`: measured for such a model; `source`: where."""

    lr: Estimate
    firm: bool
    source: str


def opens(gap: Gap | None) -> str:
    """ "none", "ahead", or what the lag does late: "grows", "stands", "between", "shrinks", "unclear".

    A gap of less than MARGIN, or one whose interval contains zero, is none.
    """
    if gap is None:
        return "unclear"
    if abs(gap.relative) < MARGIN or gap.nats.low <= 0 <= gap.nats.high:
        return "none"
    if gap.nats.value < 0:
        return "ahead"
    g = gap.growth
    if g is None:
        return "unclear"
    if g.low > STILL and g.value > GROWS:
        return "grows"
    if max(g.high - g.value, g.value - g.low) > VAGUE:
        return "unclear"
    if g.high < 0 and g.value < -STILL:
        return "shrinks"
    return "stands" if g.value <= STILL else "between"


def same_adapter(a: Settings, b: Settings) -> bool:
    """Both train the same weights, as far as is known."""
    if a.method is None or b.method is None or a.is_full != b.is_full:
        return False
    return a.is_full or (a.rank, a.alpha, a.targets) == (b.rank, b.alpha, b.targets)


# ---------------------------------------------------------------- learning rate


def band(
    run: Settings, reference: Settings | None, total_params: float | None, model_type: str | None, rl: bool
) -> Band | None:
    """The rate that this run should have: from the reference's, from the model, or for any model at all.

        beside full fine-tuning at LR_f:  LR_f * ratio * scale_factor        [1]

    firm only at scales within 2 of alpha 32's: what other scales do to the best rate is assumed.

    Source: lora_planner.learning_rate. The reference's rate is taken to be near its best.
    """
    objective = RL if rl else SFT
    if reference and reference.is_full and run.is_adapter and reference.lr:
        ratio = RL_RATIO if rl else covering(SFT_RATIO, "C07")
        factor = scale_factor(scale_of(run), run.rank or REFERENCE_RANK)
        f = reference.lr
        lr = Estimate(f * ratio.low * factor.low, f * ratio.value * factor.value, f * ratio.high * factor.high, "1",
                      ratio.basis, ratio.source)  # fmt: skip
        usual = 0.5 <= scale_of(run) * (run.rank or REFERENCE_RANK) / DEFAULT_ALPHA <= 2
        return Band(lr, usual, f"{ratio.value:g}x [{ratio.low:.2g}, {ratio.high:.3g}] the reference's {rate(f)}")
    if run.method is None:
        return None
    if total_params and model_type:
        advice = advise(total_params, model_type, run.method if run.method in ("full", "qlora", "rslora", "dora", "lora-fa") else "lora",
                        run.rank or 16, run.alpha or DEFAULT_ALPHA, run.steps, objective, run.global_batch)  # fmt: skip
        firm = not any(
            label.startswith(("extrapolated: the sweep's models", "uncalibrated")) for label in advice.labels
        )
        return Band(advice.lr, firm, "the model's own" if firm else f"the model's, but {advice.labels[0]}")
    return Band(any_model(run, rl), False, "for any model of 1B or more")


def scale_of(run: Settings) -> float:
    rank, alpha = run.rank or 16, run.alpha or DEFAULT_ALPHA
    return alpha / rank**0.5 if run.method == "rslora" else alpha / rank


def any_model(run: Settings, rl: bool) -> Estimate:
    """Where nothing is known of the model: from the lowest end of the largest swept one to the highest of the smallest.

    >>> b = any_model(Settings(method="lora", rank=16, alpha=32.0), False)
    >>> 2e-5 < b.low < 3e-4 < b.high < 5e-3
    True
    """
    rank = run.rank or 16 if not run.is_full else REFERENCE_RANK
    ends = [sft_lora_lr(n, rank, None) for n in SWEPT_PARAMS]
    low, value, high = min(e.low for e in ends), (ends[0].value * ends[1].value) ** 0.5, max(e.high for e in ends)
    if rl:
        f = constants()["lr.rl_factor"]
        low, value, high = low * f.low, value * f.value, high * f.high
    if run.is_full:
        ratio = RL_RATIO if rl else covering(SFT_RATIO, "C07")
        low, value, high = low / ratio.high, value / ratio.value, high / ratio.low
    else:
        k = scale_factor(scale_of(run), rank)
        low, value, high = low * k.low, value * k.value, high * k.high
    return Estimate(low, value, min(high, 1.0), "1", ASSUMED, ends[0].source)


def by_band(lr: float | None, allowed: Band | None) -> dict[str, list[Evidence]]:
    """What the rate itself says. A band that is not the model's own counts only from a factor of three outside.

    Inside of a firm band only its far end excludes a direction: nobody sets too low a rate near the highest good one.

    >>> allowed = Band(Estimate(1e-4, 3e-4, 9e-4, "1", ASSUMED), True, "")
    >>> [[e.weight for e in some] for some in by_band(1e-5, allowed).values()]
    [[2], [-2]]
    >>> [[e.weight for e in some] for some in by_band(2e-4, allowed).values()]
    [[0], [-1]]
    """
    if lr is None or allowed is None:
        return {LOW: [], HIGH: []}
    b = allowed.lr
    said = f"LR {rate(lr)}; expected {rate(b.value)} [{rate(b.low)}, {rate(b.high)}], {allowed.source}"
    ways = ((LOW, b.low / lr, lr / b.value, b.high / lr), (HIGH, lr / b.high, b.value / lr, lr / b.low))
    found = {}
    for way, outside, inside, to_far_end in ways:
        weight = 0
        if allowed.firm:
            if outside > 1:
                weight = 2 if outside >= SAME_RATE else 0
            elif inside >= 1:
                weight = -2 if to_far_end <= FAR_END else -1
        elif outside >= 3:
            weight = 2 if outside >= 10 else 1
        found[way] = [Evidence(weight, said, b, b.source)]
    return found


def learning_rate(run: Log, reference: Log | None, gap: Gap | None, allowed: Band | None) -> dict[str, list[Evidence]]:
    """Evidence for a rate that is too low, and for one that is too high.

    Full fine-tuning, rate too low: the run is a constant factor behind from the first steps on. Too high: it starts
    far behind and catches up. LoRA, too low: behind from the start, and the factor stands still. Too high: the gap
    grows late, as it does where an adapter is full; only the rate itself or an experiment tells the two apart.
    """
    s, r = run.settings, reference.settings if reference else None
    found = by_band(s.lr, allowed)
    how = opens(gap) if reference else "unclear"
    if gap and how in ("none", "ahead"):
        text = "no gap to explain" if how == "none" else "the run is ahead of the reference"
        for way in found:
            found[way].append(Evidence(-2, f"{text}: {gap_text(gap)}", gap.nats, OURS))
        return found
    if gap is None or r is None:
        return found
    lag = gap.lag
    behind = f"{lag.value:.2g}x [{lag.low:.2g}, {lag.high:.2g}] behind" if lag else "never where the reference was"
    moved = f" (growth {gap.growth.value:+.2f} [{gap.growth.low:+.2f}, {gap.growth.high:+.2f}])" if gap.growth else ""
    rates = f"LR {rate(s.lr)} against {rate(r.lr)}" if s.lr and r.lr else ""
    if same_adapter(s, r):
        if s.lr and r.lr and max(s.lr / r.lr, r.lr / s.lr) < SAME_RATE:
            for way in found:
                found[way].append(Evidence(-2, f"both train the same weights at one rate, {rate(s.lr)}"))
        elif s.lr and r.lr:
            way, other = (LOW, HIGH) if s.lr < r.lr else (HIGH, LOW)
            one, two = s.global_batch, r.global_batch
            if one and two and one != two:
                usual = min(1.0, one / two) / SAME_RATE <= s.lr / r.lr <= max(1.0, one / two) * SAME_RATE
                text = f"{rates} at batch {one} against {two}" + (": rates go with batches so" if usual else "")
                found[way].append(Evidence(0 if usual else 1, text))
            else:
                text = f"{rates}, {behind}{moved}; nothing else that we know of differs"
                found[way].append(Evidence(2, text, lag, OURS))
            found[other].append(Evidence(-2, f"{rates}: the reference, at the other side, is better"))
        return found
    if s.method is None or r.method is None:
        if s.lr and r.lr and max(s.lr / r.lr, r.lr / s.lr) >= SAME_RATE:
            way, other = (LOW, HIGH) if s.lr < r.lr else (HIGH, LOW)
            text = f"{rates}, {behind}{moved}; what was trained is not known"
            found[way].append(Evidence(1, text, lag, OURS))
            found[other].append(Evidence(-1, f"{rates}: the reference, at the other side, is better"))
        return found
    if not s.is_full and not r.is_full and s.lr and r.lr and max(s.lr / r.lr, r.lr / s.lr) < SAME_RATE:
        for way in found:
            found[way].append(Evidence(-1, f"one rate in both, {rate(s.lr)}, and the best one hardly moves with rank"))
        return found
    if how in ("stands", "between"):
        found[LOW].append(
            Evidence(
                1,
                f"{behind} from the start, a factor that {'stands still' if how == 'stands' else 'hardly grows'}{moved}",
                gap.growth,
                OURS,
            )
        )
        found[HIGH].append(Evidence(-1, f"too high a rate would open the gap late{moved}", gap.growth, OURS))
    elif how == "grows":
        found[HIGH].append(
            Evidence(
                1,
                f"{behind}, and more and more{moved}: too high a rate does that, a full adapter too",
                gap.growth,
                OURS,
            )
        )
        found[LOW].append(Evidence(-1, f"too low a rate lags by a factor that stands still{moved}", gap.growth, OURS))
    elif how == "shrinks":
        way = HIGH if s.is_full else LOW
        found[way].append(Evidence(2 if s.is_full else 1, f"{behind} and catching up{moved}", gap.growth, OURS))
    return found


def gap_text(gap: Gap) -> str:
    n = gap.nats
    return (f"{n.value:+.3f} [{n.low:+.3f}, {n.high:+.3f}] nats ({percent(gap.relative)}) at "
            f"{'step' if gap.axis == 'steps' else 'sample'} {gap.end:,.0f}, {gap.channel}")  # fmt: skip


# ---------------------------------------------------------------- capacity


@dataclass(frozen=True, slots=True)
class Holds:
    """What the planner says of this adapter and these data. `penalty`: predicted loss of the rank, relative."""

    verdict: Verdict
    trainable: int
    penalty: Estimate | None = None


def capacity(
    run: Log, reference: Log | None, gap: Gap | None, holds: Holds | None, rate_excluded: bool
) -> list[Evidence]:
    """Evidence that the adapter is too small: curves agree early and part late, the later the higher the rank.

    `rate_excluded`: too high a learning rate, which parts curves in the same way, is known not to be the cause.
    Source: LWR, claim 2; our runs in reports/diagnose.md.
    """
    s, r = run.settings, reference.settings if reference else None
    found: list[Evidence] = []
    if s.is_full:
        return [Evidence(-2, "all weights are trained")]
    if holds:
        v = holds.verdict
        weight = {FITS: -1, OVER: 1}.get(v.verdict, 0)
        found.append(Evidence(weight, f"{v.verdict}: {bits(v.need.value)} to learn at most, {holds.trainable:,} parameters hold "
                              f"{bits(v.capacity.low)} to {bits(v.capacity.high)}", v.capacity, v.capacity.source))  # fmt: skip
    if s.targets and all(
        any(t in name for t in ("attention", "q_proj", "k_proj", "v_proj", "o_proj", "qkv")) for name in s.targets
    ):
        found.append(Evidence(1, f"only attention is adapted ({', '.join(s.targets)}): worse than MLP at equal parameters",
                              source="LWR, claim 5"))  # fmt: skip
    if gap is None or r is None:
        return found
    how = opens(gap)
    if how in ("none", "ahead"):
        text = "no gap to explain" if how == "none" else "the run is ahead of the reference"
        found.append(Evidence(-2, f"{text}: {gap_text(gap)}", gap.nats, OURS))
        return found
    if same_adapter(s, r):
        return [*found, Evidence(-2, f"both train the same weights ({s.label().split(',')[0]})")]
    if r.is_adapter and s.rank and r.rank and s.rank >= r.rank and s.targets == r.targets:
        return [*found, Evidence(-2, f"the reference has rank {r.rank}, no more than {s.rank}")]
    g = gap.growth
    grown = f"{g.value:+.2f} [{g.low:+.2f}, {g.high:+.2f}]" if g else ""
    if how == "grows":
        text = f"the gap opens late: the lag grows with steps to the power {grown}"
        text += "" if rate_excluded else "; too high a learning rate does that too"
        found.append(Evidence(2 if rate_excluded else 1, text, g, OURS))
    elif how == "stands" or how == "shrinks":
        found.append(Evidence(-1, f"no late-growing gap: the lag moves with steps to the power {grown}", g, OURS))
    elif how == "between":
        found.append(Evidence(0, f"the lag grows a little, with steps to the power {grown}", g, OURS))
    if holds and holds.penalty and r.is_full:
        p = holds.penalty
        inside = p.low <= gap.relative <= p.high
        found.append(Evidence(int(inside), f"a gap of {percent(gap.relative)}; rank {s.rank} is predicted to cost "
                              f"{percent(p.value)} [{percent(p.low)}, {percent(p.high)}] at its best rate", p, p.source))  # fmt: skip
    return found


# ---------------------------------------------------------------- batch


def batch(run: Log, reference: Log | None, by_steps: Gap | None, by_samples: Gap | None) -> list[Evidence]:
    """Evidence that the batch is too large: behind at equal samples, not behind at equal steps.

    Beside full fine-tuning at the same batch only the size itself speaks: LoRA pays more for a large one, in some
    settings, at every rank alike. Source: LWR, claim 4; samples_to_target.
    """
    s, r = run.settings, reference.settings if reference else None
    size, steps = s.global_batch, s.steps or run.last
    found: list[Evidence] = []
    if size is None:
        return found
    differs = bool(r and r.global_batch and r.global_batch != size)
    if r and differs and by_samples and by_steps:
        other = r.global_batch or 1
        how, at_steps = opens(by_samples), opens(by_steps)
        if how in ("none", "ahead"):
            return [
                Evidence(
                    -2,
                    f"batch {size} against {other}, and no gap at equal samples: {gap_text(by_samples)}",
                    by_samples.nats,
                    OURS,
                )
            ]
        if size < other:
            return [Evidence(-1, f"batch {size} is smaller than the reference's {other}")]
        extra = extra_samples(size, s.seq_len or 8192, other)
        law = f"{extra.value:.2g}x [{extra.low:.2g}, {extra.high:.2g}] the samples expected"
        text = f"batch {size} against {other} ({law}): {gap_text(by_samples)}; at equal steps {gap_text(by_steps)}"
        reach = by_steps.nats.low <= 0 or by_steps.relative < MARGIN or at_steps in ("none", "ahead")
        return [Evidence(2 if reach else 1, text, by_samples.nats, OURS)]
    if r and same_adapter(s, r) and r.global_batch == size:
        return [Evidence(-2, f"the same batch of {size}, the same weights trained")]
    if by_steps and opens(by_steps) in ("none", "ahead"):
        return [Evidence(-2, f"no gap to explain: {gap_text(by_steps)}", by_steps.nats, OURS)]
    if s.is_full:
        return [Evidence(-1 if size <= LARGE_BATCH else 1, f"batch {size}")]
    few = f"{steps:.0f} steps: below {MIN_STEPS} B, which starts at zero, is still growing" if steps < MIN_STEPS else ""
    told = 1 if r else 0  # alone there is nothing that a common batch or a short run would have to explain
    if size > DEFAULT_BATCH:
        extra = extra_samples(size, s.seq_len or 8192)
        text = f"batch {size} needs {extra.value:.2g}x [{extra.low:.2g}, {extra.high:.2g}] the samples of batch {DEFAULT_BATCH}"
        weight = 1 if size > LARGE_BATCH else told
        return [Evidence(weight, text + (f"; {few}" if few else ""), extra, extra.source)]
    if few and size > 1:
        return [
            Evidence(told, f"batch {size}, {few}: a smaller batch gives more steps", None, "LWR; lora_planner.batch")
        ]
    return [Evidence(-1, f"batch {size} is not large ({DEFAULT_BATCH} is LWR's)", None, "LWR, claim 4")]
