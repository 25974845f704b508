"""What goes wrong before any of the interesting causes: each check is a pure function from a log to evidence.

A check that could not look returns None and its `needs` say why: silence is not health.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, log, sqrt
from statistics import fmean, median, pstdev

from calibrate.diagnose.evidence import Evidence
from calibrate.diagnose.logs import Log
from calibrate.diagnose.shape import noise, quantile_t
from calibrate.diagnose.shape import usable as finite
from lora_planner.ledger import DERIVED, Estimate
from lora_planner.units import percent, rate

#: share of gradient norms that a loss scaler of fp16 may leave infinite
SCALER = 0.05
#: points on each side that make a level
WINDOW = 6
#: standard deviations of a point's noise: a spike, and a level that moved
SPIKE, JUMP = 8.0, 6.0
#: share of the held-out gain that one rise may take back
SET_BACK = 0.15
#: share of the loss below which a level is called the same
FLAT = 0.005
#: training over held-out loss at the start: more is another kind of text
UNLIKE = 1.4
#: a rate below this share of its peak trains nothing
ENDED = 1e-3
#: part of the logged steps without a rate that is worth saying
IDLE = 0.10


@dataclass(frozen=True, slots=True)
class Check:
    """`code` names it; `needs`: what must be logged for it; `fix`: what to do when it fires."""

    code: str
    title: str
    look: Callable[[Log, Log | None], Evidence | None]
    needs: str
    fix: str


def quarter_means(curve: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Mean of the first and of the last quarter, and the standard error of their difference; None below 8 points."""
    values = [v for _, v in finite(curve)]
    n = len(values) // 4
    if n < 2:
        return None
    sigma = noise(values)
    return fmean(values[:n]), fmean(values[-n:]), sigma * sqrt(2 / n)


# ---------------------------------------------------------------- numbers that are none


def nonfinite(run: Log, _: Log | None) -> Evidence | None:
    """NaN or infinity. A Trainer replaces a NaN loss by the mean before it (logging_nan_inf_filter): then only the
    gradient norm shows it. An infinite norm now and then is what a loss scaler of fp16 does."""
    if run.ended.startswith("diverged"):
        return Evidence(2, f"the run ended so: {run.ended}")
    bad = [(x, "loss", v) for x, v in (*run.train, *run.held_out) if not isfinite(v)]
    norms = [(x, "gradient norm", v) for x, v in run.grad_norm if not isfinite(v)]
    if bad or len(norms) > SCALER * len(run.grad_norm) or not any(isfinite(v) for _, v in run.grad_norm[-3:]):
        first = min([*bad, *norms], default=None)
        if first is not None:
            return Evidence(
                2, f"the {first[1]} is {first[2]:g} at step {first[0]:g}, {len(bad) + len(norms)} such points in all"
            )
    if norms:
        return Evidence(
            1,
            f"the gradient norm is {norms[0][2]:g} in {len(norms)} of {len(run.grad_norm)} points, as a loss scaler leaves it",
        )
    return Evidence(-1, "every logged number is finite")


def zero_gradient(run: Log, _: Log | None) -> Evidence | None:
    if run.ended.startswith("invalid"):
        return Evidence(2, f"the run ended so: {run.ended}")
    norms = [v for _, v in finite(run.grad_norm)]
    if len(norms) < 3:
        return None
    zero = sum(v == 0 for v in norms)
    if zero >= max(2, len(norms) / 2):
        return Evidence(2, f"the gradient norm is exactly 0 in {zero} of {len(norms)} points")
    if zero > 0.05 * len(norms):
        return Evidence(1, f"the gradient norm is exactly 0 in {zero} of {len(norms)} points")
    return Evidence(-1, f"gradients arrive: norm {median(norms):.3g} in the middle")


def unmoved(run: Log, _: Log | None) -> Evidence | None:
    if run.unmoved is not None and run.adapters:
        n = len(run.unmoved)
        if n == run.adapters:
            return Evidence(2, f"all {n} lora_B are zero: the adapter is what it was at the start")
        if n:
            return Evidence(1, f"{n} of {run.adapters} lora_B are zero, {run.unmoved[0]} among them")
        return Evidence(-1, f"all {run.adapters} lora_B have moved")
    values = [v for _, v in finite(run.held_out)]
    if len(values) >= 3 and len(set(values)) == 1:
        return Evidence(2, f"{len(values)} evaluations gave the same loss to the last digit, {values[0]:g}")
    return Evidence(-1, "evaluations differ: something moved") if len(values) >= 3 else None


def unlabelled(run: Log, _: Log | None) -> Evidence | None:
    if not run.train or run.is_rl:
        return None
    zero = sum(v == 0 for _, v in run.train)
    if zero >= 2 and zero >= len(run.train) / 4:
        return Evidence(
            2, f"the training loss is exactly 0 in {zero} of {len(run.train)} points: no label is trained on"
        )
    return Evidence(-1, "labels are trained on")


def constant(run: Log, _: Log | None) -> Evidence | None:
    """The loss ends where it began, although gradients and a rate are there."""
    levels = quarter_means(run.train)
    if levels is None:
        return None
    first, last, se = levels
    held = finite(run.held_out)
    moved = (held[0][1] - held[-1][1]) / abs(held[0][1]) if len(held) > 1 and held[0][1] else None
    change = Estimate(first - last - 1.645 * se, first - last, first - last + 1.645 * se, "nats", DERIVED)
    still = abs(first - last) < max(2 * se, FLAT * abs(first)) and 2 * se < 0.05 * abs(first)
    text = f"training loss {first:.3f} in the first quarter, {last:.3f} in the last"
    if still and (moved is None or abs(moved) < FLAT):
        vocab = run.settings.vocab
        guess = f", that of guessing among {vocab:,} tokens" if vocab and abs(last / log(vocab) - 1) < 0.05 else ""
        return Evidence(2, text + guess, change)
    return Evidence(-1, text, change)


# ---------------------------------------------------------------- the scale of the loss


def scaled(run: Log, reference: Log | None) -> Evidence | None:
    """Training loss a multiple of the held-out loss, or of the reference's, from start to end: summed over
    micro-batches instead of averaged, as transformers 4.46 and its neighbours logged it."""
    pairs = []
    for x, held in finite(run.held_out):
        near = [v for y, v in finite(run.train) if abs(y - x) <= max(0.1 * x, 5)]
        if near and held > 0:
            pairs.append(fmean(near) / held)
    beside = "the held-out loss"
    if len(pairs) < 2 and reference and not differs(run, reference):
        other = dict(finite(reference.train))
        pairs = [v / other[x] for x, v in finite(run.train) if other.get(x, 0) > 0]
        pairs = [fmean(pairs[i : i + 10]) for i in range(0, len(pairs), 10)]
        beside = "the reference's"
    if len(pairs) < 2:
        return None
    k = median(pairs)
    if k <= 0:
        return None
    spread = pstdev(pairs) / k
    value = Estimate(min(pairs), k, max(pairs), "x", DERIVED)
    text = f"the training loss is {k:.2f}x [{min(pairs):.2f}, {max(pairs):.2f}] {beside}"
    n = run.settings.accumulation
    if k > 1.6 and spread < 0.25:
        if n and n > 1 and abs(k / n - 1) < 0.15:
            return Evidence(2, f"{text}, and {n} is the accumulation: the loss is a sum over micro-batches", value)
        whole = round(k)
        return Evidence(
            2 if abs(k / whole - 1) < 0.1 and spread < 0.15 else 1,
            f"{text} from start to end: a sum where a mean should be?",
            value,
        )
    return Evidence(-1, text, value)


def unlike(run: Log, _: Log | None) -> Evidence | None:
    """Before anything is learned, training and held-out text should cost about the same: if they were made alike."""
    held = finite(run.held_out)
    early = max(5.0, 0.05 * run.last)
    if not held or held[0][0] > early:
        return None
    near = [v for x, v in finite(run.train) if x <= early][:2]  # before a rate that is too high shows
    sigma = noise([v for _, v in finite(run.train)])
    if len(near) < 2 or held[0][1] <= 0:
        return None
    half = 4 * sigma / sqrt(len(near))
    k = fmean(near) / held[0][1]
    value = Estimate((fmean(near) - half) / held[0][1], k, (fmean(near) + half) / held[0][1], "x", DERIVED)
    text = f"at the start the training loss is {k:.2f}x [{value.low:.2f}, {value.high:.2f}] the held-out loss"
    if k > UNLIKE and value.low > 1:
        return Evidence(2, f"{text}: training text or labels are not made as the held-out ones are", value)
    return Evidence(1 if k > 1.2 and value.low > 1 else -1, text, value)


def differs(run: Log, reference: Log) -> bool:
    """The two are not about the same thing: another base, tokenizer or data set."""
    a, b = run.settings, reference.settings
    return any(
        x is not None and y is not None and x != y
        for x, y in ((a.model, b.model), (a.vocab, b.vocab), (a.task, b.task))
    )


def start(run: Log, reference: Log | None) -> Evidence | None:
    """An untouched adapter leaves the model as it is: both runs must start from one loss."""
    if reference is None or differs(run, reference):
        return None
    for name, mine, theirs in (
        ("held-out", run.held_out, reference.held_out),
        ("training", run.train, reference.train),
    ):
        if mine and theirs and mine[0][0] == theirs[0][0] <= (0 if name == "held-out" else 1):
            a, b = mine[0][1], theirs[0][1]
            # the order of the data may differ between seeds; the held-out set may not
            one, other = run.settings, reference.settings
            alike = one.seed is not None and (one.seed, one.global_batch) == (other.seed, other.global_batch)
            if name == "training" and not alike:
                continue
            apart = abs(a - b) / max(abs(b), 1e-9)
            value = Estimate(a - b, a - b, a - b, "nats", DERIVED)
            text = f"{name} loss before training {a:.4g} and {b:.4g}"
            return Evidence(
                2 if apart > 0.01 else -1,
                text + (": another base, template, tokenizer or evaluation set" if apart > 0.01 else ""),
                value,
            )
    return None


# ---------------------------------------------------------------- the schedule


def schedule_ended(run: Log, _: Log | None) -> Evidence | None:
    rates = finite(run.lr)
    if len(rates) < 5:
        return None
    peak = max(v for _, v in rates)
    if peak <= 0:
        return Evidence(2, "the learning rate is 0 throughout")
    alive = [x for x, v in rates if v > ENDED * peak]
    idle = (rates[-1][0] - alive[-1]) / max(rates[-1][0], 1)
    text = f"the learning rate is {rate(rates[-1][1]) if rates[-1][1] else '0'} at the end, {rate(peak)} at its peak"
    if idle > IDLE:
        return Evidence(2, f"{text}: the last {percent(idle)} of the steps, from {alive[-1]:g} on, trained nothing")
    return Evidence(-1, text)


def warmup(run: Log, _: Log | None) -> Evidence | None:
    rates = [(x, v) for x, v in finite(run.lr)]
    if len(rates) < 5:
        return None
    values = [v for _, v in rates]
    peak = max(values)
    rising = all(b >= a for a, b in itertools.pairwise(values))
    if rising and values[0] < 0.5 * values[-1] and values[-1] > values[-2]:
        return Evidence(
            2, f"the rate still rises at the last step, {rates[-1][0]:g}: {rate(values[-1])}; warm-up never ended"
        )
    top = next(x for x, v in rates if v >= 0.99 * peak)
    share = top / max(rates[-1][0], 1)
    planned = run.settings.steps
    if share > 0.3 and values[0] < 0.5 * peak and (not planned or rates[-1][0] >= 0.9 * planned):
        return Evidence(1, f"warm-up took {percent(share)} of the steps, to {top:g}")
    return Evidence(-1, f"the peak rate, {rate(peak)}, was reached at step {top:g} of {rates[-1][0]:g}")


# ---------------------------------------------------------------- what the curve does


def memorised(run: Log, _: Log | None) -> Evidence | None:
    """The training loss falls away from the held-out one: rows seen again and again, or held-out text unlike it."""
    held, train = finite(run.held_out), finite(run.train)
    if len(held) < 3 or len(train) < 8 or sum(v == 0 for _, v in train) >= len(train) / 4:
        return None
    end = [v for x, v in train if x >= 0.9 * train[-1][0]]
    if len(end) < 3:
        end = [v for _, v in train[-3:]]
    sigma = noise([v for _, v in train])
    apart = held[-1][1] - fmean(end)
    half = quantile_t(len(end) - 1) * sigma / sqrt(len(end)) if len(end) > 1 else sigma
    share = apart / held[-1][1] if held[-1][1] > 0 else 0.0
    best = min(held, key=lambda p: p[1])
    rise = (held[-1][1] - best[1]) / best[1] if best[1] > 0 else 0.0
    value = Estimate(apart - half, apart, apart + half, "nats", DERIVED)
    epochs = run.settings.epochs or (run.epoch[-1][1] if run.epoch else None)
    seen = f" after {epochs:.3g} epochs" if epochs else ""
    text = f"held-out {held[-1][1]:.3f}, training {fmean(end):.3f} at the end{seen}"
    if rise > 0.02 and share > 0.1:
        return Evidence(
            2, f"{text}; held-out was best at step {best[0]:g} with {best[1]:.3f} and rose by {percent(rise)}", value
        )
    if share > 0.3 and apart > half:
        return Evidence(2, f"{text}: duplicates, or far too many epochs", value)
    if share > 0.15 and apart > 2 * half:
        return Evidence(1, f"{text}: duplicates, or too many epochs", value)
    return Evidence(-1, text, value)


def _moves(run: Log) -> tuple[list[tuple[float, float, float]], list[tuple[float, float, float]]] | None:
    """(step, before, after) of levels that rose and stayed, and of spikes that went away; None: too few points."""
    curve = finite(run.train)
    if len(curve) < 3 * WINDOW:
        return None
    values = [v for _, v in curve]
    sigma = max(noise(values), 1e-6 * abs(median(values)))
    jumps, spikes = [], []
    i = WINDOW
    while i < len(values):
        before, after = values[i - WINDOW : i], values[i : i + WINDOW]
        level = median(before)
        far = values[i] - level > SPIKE * sigma and values[i] > 1.1 * level
        if far and len(after) >= 3:
            stayed = median(after) - level
            if stayed > JUMP * sigma / 2 and stayed > 0.03 * level:
                jumps.append((curve[i][0], level, median(after)))
            else:
                spikes.append((curve[i][0], level, max(after)))
            i += WINDOW
            continue
        # a level may also move without one far point
        if len(after) == WINDOW:
            step = fmean(after) - fmean(before)
            if step > JUMP * sigma * sqrt(2 / WINDOW) and step > 0.05 * level and min(after) > median(before):
                jumps.append((curve[i][0], level, fmean(after)))
                i += WINDOW
                continue
        i += 1
    return jumps, spikes


def set_back(run: Log) -> tuple[float, float, float] | None:
    """(step, before, after) of a held-out loss that fell, rose once by a good part of its gain, and fell again."""
    held = finite(run.held_out)
    for i in range(2, len(held) - 1):
        before, after = held[i - 1][1], held[i][1]
        gained = held[0][1] - before
        rose = after - before
        if (
            gained > 0
            and held[i - 2][1] > before
            and held[i + 1][1] < after
            and rose > max(SET_BACK * gained, FLAT * before)
        ):
            return held[i][0], before, after
    return None


def resumed(run: Log, _: Log | None) -> Evidence | None:
    """A level that rises in one step and stays, or is worked off again: a resume without the adapter, the optimizer
    or the order of the data."""
    found, back = _moves(run), set_back(run)
    if found is None and len(finite(run.held_out)) < 4:
        return None
    jumps, spikes = found or ([], [])
    again = sorted({*run.restarts, *run.resumed})
    told = f"; the log says it was resumed at step {again[0]:g}" if again else ""
    if jumps:
        step, before, after = jumps[0]
        first = fmean(v for _, v in finite(run.train)[:3])
        lost = first > before and after > before + 0.6 * (first - before)
        what = ", about where the run began: was the adapter loaded?" if lost else ""
        text = f"the training loss rises from {before:.3f} to {after:.3f} at step {step:g} and stays{what}{told}"
        return Evidence(2, text, Estimate(after - before, after - before, after - before, "nats", DERIVED))
    if back and not spikes:
        step, before, after = back
        text = f"the held-out loss rises once, from {before:.3f} to {after:.3f} before step {step:g}, and falls again{told}"
        return Evidence(2, text, Estimate(after - before, after - before, after - before, "nats", DERIVED))
    return Evidence(-1, "no step in the level of the loss" + told)


def spike(run: Log, _: Log | None) -> Evidence | None:
    found = _moves(run)
    if found is None:
        return None
    if found[1]:
        step, before, top = found[1][0]
        more = f", and {len(found[1]) - 1} more" if found[1][1:] else ""
        return Evidence(2, f"the loss leaps from {before:.3f} to {top:.3f} at step {step:g} and comes back{more}",
                        Estimate(top - before, top - before, top - before, "nats", DERIVED))  # fmt: skip
    return Evidence(-1, "no spike")


# ---------------------------------------------------------------- settings


def also_in_full(run: Log, reference: Log | None) -> Evidence | None:
    s = run.settings
    if not s.is_adapter:
        return None
    if s.full_modules and not (reference and reference.settings.full_modules == s.full_modules):
        return Evidence(
            1,
            f"{', '.join(s.full_modules)} trained in full beside the adapter: its best rate is that of full fine-tuning",
        )
    return Evidence(-1, "nothing is trained in full beside the adapter") if s.said_by else None


def no_advantage(run: Log, _: Log | None) -> Evidence | None:
    """RL: a group whose samples all get one reward teaches nothing."""
    if not run.is_rl:
        return None
    if run.settings.group == 1:
        return Evidence(2, "a group of one sample: its mean is its only reward, every advantage is zero")
    shares = [v for _, v in finite(run.zero_std)]
    if not shares:
        return None
    mean = fmean(shares)
    text = f"{percent(mean)} of the groups have one reward in all samples"
    return Evidence(2 if mean > 0.8 else 1 if mean > 0.5 else -1, text)


CHECKS = (
    Check("H-NONFINITE", "NaN or infinity", nonfinite, "a loss", "Lower the rate, clip gradients, use bf16 instead of fp16; look at the batch of that step."),
    Check("H-NO-LABELS", "no labels", unlabelled, "a training loss", "Decode one batch: every label is -100. Look at the template's assistant mask, the response marker and the length limit."),
    Check("H-ZERO-GRAD", "no gradients", zero_gradient, "grad_norm", "With gradient checkpointing: use_reentrant=False or enable_input_require_grads(); check which weights require gradients."),
    Check("H-UNMOVED", "adapter never moved", unmoved, "evaluations or the adapter's file", "Check that targets lie in the forward pass and that the optimizer got their weights."),
    Check("H-CONSTANT", "nothing learned", constant, "8 training losses", "Decode one batch: labels that are not -100 must be the answer, in the model's own template."),
    Check("H-LOSS-SCALE", "scale of the loss", scaled, "held-out losses or a reference at the same steps", "Upgrade transformers (4.46 to 4.47 and custom loops sum over accumulation), or divide by the accumulation."),
    Check("H-UNLIKE", "training text unlike held-out", unlike, "a held-out loss at the start", "Decode one training batch and one held-out batch: one template, one masking of labels."),
    Check("H-START", "same start", start, "losses before the first step, of both runs", "Use one base, one template, one evaluation set."),
    Check("H-SCHEDULE", "schedule ended", schedule_ended, "learning_rate", "Set the schedule's steps to those of the run."),
    Check("H-WARMUP", "warm-up", warmup, "learning_rate", "Shorten warm-up: B = 0 is one of its own."),
    Check("H-MEMORISED", "training far below held-out", memorised, "3 evaluations and 8 training losses", "Drop duplicates, stop at the best evaluation, or use fewer epochs."),
    Check("H-RESUME", "jump", resumed, "18 training losses or 4 evaluations", "Resume with resume_from_checkpoint (weights, optimizer, scheduler and data order), not from the adapter alone."),
    Check("H-SPIKE", "spike", spike, "18 training losses", "Clip gradients at 1, lower the rate by a third, look at the samples of that step."),
    Check("H-FULL-MODULES", "modules_to_save", also_in_full, "adapter_config.json or --config", "Leave modules_to_save empty, or adapt these modules too."),
    Check("H-ADVANTAGE", "groups without signal", no_advantage, "frac_reward_zero_std", "Use larger groups, and problems that are solved sometimes."),
)  # fmt: skip
