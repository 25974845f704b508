"""All evidence weighed: a word for each cause, what cannot be told, and the cheapest experiment that would."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from shlex import quote
from statistics import fmean, pstdev

from calibrate.diagnose import causes
from calibrate.diagnose.evidence import CANNOT_TELL, LIKELY, POSSIBLE, UNLIKELY, Evidence, Finding, strength, word
from calibrate.diagnose.hygiene import CHECKS, SCALER, Check, differs
from calibrate.diagnose.logs import Log
from calibrate.diagnose.settings import Settings
from calibrate.diagnose.shape import FEWEST, Gap, at, gap, noise
from calibrate.diagnose.shape import usable as finite
from lora_planner.ledger import DERIVED, Estimate
from lora_planner.units import rate

#: what must be right before the next can be judged
ORDER = ("hygiene", "learning rate", "batch", "capacity")
RANKED = (LIKELY, POSSIBLE, CANNOT_TELL, UNLIKELY)
#: steps below which B, which starts at zero, decides everything: T_A = 1 / (sqrt(3 d) LR) is about 30
SHORTEST = 30
#: neighbouring training losses that move together this much were averaged before they were logged
SMOOTHED = 0.3


@dataclass(frozen=True, slots=True)
class Planner:
    """What the planner knows of this run: all of it optional. `words`: its --model and --data, for commands."""

    total_params: float | None = None
    model_type: str | None = None
    holds: causes.Holds | None = None
    model: str = ""
    data: str = ""


@dataclass(frozen=True, slots=True)
class Experiment:
    """The cheapest run that tells open causes apart. `expect`: what each of them predicts of it."""

    change: str
    steps: int
    expect: tuple[str, ...]
    command: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`findings`: the four causes, likeliest first. `checks`: every hygiene check with what it saw.

    `refused`: comparisons that would mean nothing. `cannot`: what these logs do not tell.
    """

    run: Log
    reference: Log | None
    gap: Gap | None
    findings: tuple[Finding, ...]
    checks: tuple[tuple[Check, Evidence | None], ...]
    refused: tuple[str, ...]
    cannot: tuple[str, ...]
    experiment: Experiment | None

    def __getitem__(self, cause: str) -> Finding:
        return next(f for f in self.findings if f.cause == cause)

    @property
    def healthy(self) -> bool:
        return not any(f.word in (LIKELY, POSSIBLE) for f in self.findings)


def diagnose(run: Log, reference: Log | None = None, planner: Planner = Planner()) -> Diagnosis:
    """The whole of it; a pure function of two logs and what the planner knows."""
    whole = cut(run)
    checks = tuple((c, c.look(run if c.code == "H-NONFINITE" else whole, reference)) for c in CHECKS)
    fired = {check.code: e for check, e in checks if e and e.weight > 0}
    refused = list(_refused(run, reference, fired))
    beside = None if refused else reference
    by_steps = compared(run, beside, "H-LOSS-SCALE" in fired) if beside else None
    by_samples = None
    one, other = run.settings.global_batch, beside.settings.global_batch if beside else None
    if beside and one and other and one != other:
        by_samples = compared(run, beside, "H-LOSS-SCALE" in fired, (one, other))
    main = by_samples or by_steps
    if beside and main is None:
        refused.append(
            f"no gap: the two logs share too few steps ({FEWEST} evaluations, or training losses, are the least)"
        )
    s = run.settings
    allowed = causes.band(run.settings, reference.settings if reference else None, planner.total_params or s.params,
                          planner.model_type or s.model_type, run.is_rl)  # fmt: skip
    rates = causes.learning_rate(run, beside, main, allowed)
    rates[causes.HIGH] += _own_curve(run, fired)
    if "H-CONSTANT" in fired and any(e.weight > 0 for e in rates[causes.LOW]):
        rates[causes.LOW].append(Evidence(1, "nothing was learned"))
        fired["H-CONSTANT"] = replace(fired["H-CONSTANT"], weight=1)
        checks = tuple((c, fired.get(c.code, e)) for c, e in checks)
    excluded = word(rates[causes.HIGH]) == UNLIKELY
    size = causes.capacity(run, beside, main, planner.holds, excluded)
    findings = [
        _rate_finding(run.settings, rates, allowed),
        Finding("capacity", word(size), "", tuple(size), _more_rank(run.settings)),
        Finding("batch", word(found := causes.batch(run, beside, by_steps, by_samples)), "", tuple(found),
                _smaller_batch(run.settings)),
        _hygiene(checks),
    ]  # fmt: skip
    findings.sort(key=lambda f: (RANKED.index(f.word), ORDER.index(f.cause)))
    cannot = tuple(_cannot(run, beside, main, checks, findings, allowed))
    d = Diagnosis(run, reference, main, tuple(findings), checks, tuple(refused), cannot, None)
    return replace(d, experiment=experiment(d, allowed, planner))


def cut(run: Log) -> Log:
    """The run until its first number that is none: a Trainer logs a loss of 0 after it, which means nothing."""
    bad = [x for curve in (run.train, run.held_out) for x, v in curve if not isfinite(v)]
    norms = [x for x, v in run.grad_norm if not isfinite(v)]
    if len(norms) > SCALER * len(run.grad_norm):
        bad += norms
    if not bad:
        return run
    train, held_out, grad_norm = (
        tuple((x, v) for x, v in curve if x < min(bad)) for curve in (run.train, run.held_out, run.grad_norm)
    )
    return replace(run, train=train, held_out=held_out, grad_norm=grad_norm)


def compared(run: Log, reference: Log, scaled: bool, batches: tuple[int, int] = (1, 1)) -> Gap | None:
    """The gap in held-out loss where both have enough of it, else in training loss, unless its scale is wrong."""
    axis = "steps" if batches[0] == batches[1] else "samples"
    one, other = (_by(log.held_out, b) for log, b in zip((run, reference), batches, strict=True))
    end = min(one[-1][0], other[-1][0]) if one and other else 0.0
    if sum(0 < x <= end and at(other, x) is not None for x, _ in one) >= FEWEST and (
        found := gap(one, other, "held-out", axis)
    ):
        return found
    if scaled:
        return None
    return gap(_by(run.train, batches[0]), _by(reference.train, batches[1]), "training", axis)


def _by(curve: Sequence[tuple[float, float]], batch: int) -> list[tuple[float, float]]:
    return [(x * batch, v) for x, v in finite(curve)]


def _refused(run: Log, reference: Log | None, fired: dict[str, Evidence]) -> Iterable[str]:
    if reference is None:
        return
    a, b = run.settings, reference.settings
    if differs(run, reference):
        if a.task is not None and b.task is not None and a.task != b.task:
            yield f"the data differ ({a.task}; {b.task}): losses of two data sets are not compared"
        else:
            yield (f"the bases differ ({a.model or a.vocab}; {b.model or b.vocab}): nats per token of two tokenizers are "
                   "not compared; bits per byte of one text would be")  # fmt: skip
    elif fired.get("H-START"):
        yield f"they do not start alike: {fired['H-START'].text}"
    if run.is_rl or reference.is_rl:
        yield "RL: the loss of a policy gradient is no likelihood, and rewards of one run each are too noisy to compare"


def _own_curve(run: Log, fired: dict[str, Evidence]) -> list[Evidence]:
    """What too high a rate does to a run without any reference."""
    found = []
    if "H-NONFINITE" in fired and fired["H-NONFINITE"].weight == 2:
        found.append(Evidence(1, "the run diverged, as too high a rate makes it"))
    elif "H-SPIKE" in fired:
        found.append(Evidence(1, "the loss has a spike, as too high a rate makes it"))
    held = finite(run.held_out)
    if len(held) >= 3 and held[0][0] == 0 and not fired.keys() & {"H-UNLIKE", "H-MEMORISED", "H-CONSTANT"}:
        top = max(held[1:], key=lambda p: p[1])
        if top[1] > 1.01 * held[0][1] and top[0] <= run.last / 4:
            text = f"the held-out loss first rose from {held[0][1]:.3f} to {top[1]:.3f} at step {top[0]:g}"
            rise = top[1] - held[0][1]
            found.append(Evidence(1, text, Estimate(rise, rise, rise, "nats", DERIVED)))
    return found


def _rate_finding(s: Settings, rates: dict[str, list[Evidence]], allowed: causes.Band | None) -> Finding:
    way = min(rates, key=lambda w: (RANKED.index(word(rates[w])), -strength(rates[w])))
    chosen = rates[way]
    found = word(chosen)
    others = [word(rates[w]) for w in rates if w != way]
    if found == UNLIKELY and CANNOT_TELL in others:
        found = CANNOT_TELL
    fix = ""
    if found in (LIKELY, POSSIBLE):
        known = [rate(lr) for lr in better_rates(s.lr, way, allowed)]
        fix = (
            f"learning rate {' and '.join(known)}"
            if known
            else f"a learning rate three times as {'high' if way == causes.LOW else 'low'}"
        )
    return Finding("learning rate", found, way if found in (LIKELY, POSSIBLE) else "", tuple(chosen), fix)


def better_rates(lr: float | None, way: str, allowed: causes.Band | None) -> list[float]:
    """Three times as far, or the near end of what is expected where that is further; and its middle where it lies beyond.

    >>> from lora_planner.ledger import FITTED
    >>> better_rates(1e-5, causes.LOW, causes.Band(Estimate(2e-5, 1e-4, 2e-4, "1", FITTED), True, ""))
    [3e-05, 0.0001]
    >>> better_rates(1e-3, causes.HIGH, None)
    [0.00033]
    """
    if lr is None:
        return []
    up = way == causes.LOW
    near, middle = lr * (3 if up else 1 / 3), None
    if allowed and allowed.firm:
        b = allowed.lr
        near, middle = (max(near, b.low), b.value) if up else (min(near, b.high), b.value)
    found = [near] + ([middle] if middle and (middle > near * 1.5 if up else middle < near / 1.5) else [])
    return [float(f"{min(x, 1.0):.2g}") for x in found]


def _more_rank(s: Settings) -> str:
    return f"rank {4 * s.rank}" if s.rank else ""


def _smaller_batch(s: Settings) -> str:
    b = s.global_batch
    return f"batch {max(1, b // 4)} for the same samples" if b and b > 1 else ""


def _hygiene(checks: Sequence[tuple[Check, Evidence | None]]) -> Finding:
    seen = [(c, e) for c, e in checks if e is not None]
    bad = sorted(((c, e) for c, e in seen if e.weight > 0), key=lambda p: -p[1].weight)
    if not seen:
        return Finding("hygiene", CANNOT_TELL, "", ())
    if not bad:
        return Finding(
            "hygiene",
            UNLIKELY,
            "",
            (Evidence(-1, f"{len(seen)} checks found nothing: {', '.join(c.title for c, _ in seen)}"),),
        )
    return Finding("hygiene", LIKELY if bad[0][1].weight == 2 else POSSIBLE, ", ".join(c.title for c, _ in bad),
                   tuple(replace(e, text=f"{c.code} {e.text}") for c, e in bad), bad[0][0].fix)  # fmt: skip


# ---------------------------------------------------------------- what cannot be told


def _cannot(run: Log, beside: Log | None, main: Gap | None, checks: Sequence[tuple[Check, Evidence | None]],
            findings: Sequence[Finding], allowed: causes.Band | None) -> Iterable[str]:  # fmt: skip
    words = {f.cause: f for f in findings}
    if beside is None:
        yield "whether anything is lost: capacity, a batch penalty and most wrong rates show only beside another run (--ref)"
    if run.settings.method is None:
        yield "what was trained: the log does not say (--config)"
    if beside is not None and beside.settings.method is None:
        yield "what the reference trained (--ref-config)"
    if run.is_rl:
        yield "the learning rate from the curve: the loss of a policy gradient is no likelihood; rewards alone are too noisy"
    if main and causes.opens(main) == "unclear" and main.growth:
        g = main.growth
        yield f"whether the gap opens late: its growth is {g.value:+.2f} [{g.low:+.2f}, {g.high:+.2f}]; evaluations at more steps would tell"
    rates, size = words["learning rate"], words["capacity"]
    if rates.detail == causes.HIGH and rates.word == size.word == POSSIBLE:
        yield "too high a rate from a full adapter: both part the curves late; the experiment does"
    if allowed and not allowed.firm and allowed.source.startswith("for any"):
        yield f"whether LR {rate(run.settings.lr) if run.settings.lr else ''} suits this model (--model)".replace(
            "LR  ", "the rate "
        )
    if beside is not None and beside.settings.lr:
        yield f"whether the reference's own rate, {rate(beside.settings.lr)}, is its best"
    if (text := smoothed(run)) is not None:
        yield text
    missing = [
        c
        for c, e in checks
        if (e is None and c.code not in ("H-ADVANTAGE", "H-START")) or (c.code == "H-START" and e is None and beside)
    ]
    if missing:
        yield "not looked at: " + ", ".join(f"{c.title} (needs {c.needs})" for c in missing)


def smoothed(run: Log) -> str | None:
    """Averaged curves hide spikes and make intervals too narrow: their steps go on in the direction they went."""
    values = [v for _, v in finite(run.train)]
    steps = [b - a for a, b in itertools.pairwise(values)]
    if len(steps) < 30 or not (spread := pstdev(steps)):
        return None
    mean = fmean(steps)
    pairs = itertools.pairwise(steps)
    together = fmean((a - mean) * (b - mean) for a, b in pairs) / spread**2
    return (
        f"spikes and noise: the training loss looks smoothed (its steps correlate by {together:.2f})"
        if together > SMOOTHED
        else None
    )


# ---------------------------------------------------------------- the experiment


def command(planner: Planner, steps: int, ranks: Sequence[int]) -> str:
    """Our own loop on the same model and data: full and LoRA, each at three rates and more where the best is at an end."""
    model, data = planner.model or "MODEL", planner.data or "DATA"
    listed = ",".join(str(r) for r in ranks if r) or "16"
    return f"lora-plan verify --model {quote(model)} --data {quote(data)} --ranks {listed} --steps {steps} --rates 3"


def telling_step(main: Gap) -> int:
    """The first step at which half of the final gap is there and stands above its noise.

    A repeat that ends there either closes the gap or does not.
    """
    shared = [(x, v - r) for x, v in main.run if x > 0 and (r := at(main.reference, x)) is not None]
    half = max(main.nats.value / 2, 2 * (main.nats.high - main.nats.value))
    for i, (x, _) in enumerate(shared):
        rest = [g for _, g in shared[i : i + 3]]
        if x >= SHORTEST and fmean(rest) >= half:
            return round(x)
    return round(main.end)


def experiment(d: Diagnosis, allowed: causes.Band | None, planner: Planner) -> Experiment | None:
    """Hygiene first, since nothing else means anything before; then what the open causes predict differently."""
    s = d.run.settings
    rates, size, lots, dirty = d["learning rate"], d["capacity"], d["batch"], d["hygiene"]
    open_ = [f for f in (rates, size, lots) if f.word in (LIKELY, POSSIBLE)]
    rank = s.rank or 16
    own = [] if s.is_full else [rank]
    if dirty.word == LIKELY:
        change = f"first: {dirty.fix} Then our own loop on the same model and data:"
        falls = "if the loss falls there, the fault is in the other set-up; if it does not, in the data or the model"
        return _experiment(d, planner, change, SHORTEST, own, [falls])
    if not open_:
        if d.reference is not None:
            return None
        steps = max(SHORTEST, min(200, round(d.run.last)))
        change = f"a reference: {steps} steps of full fine-tuning, or of rank {4 * rank} where that does not fit"
        return _experiment(d, planner, change, steps, [rank, 4 * rank], ["diagnose again with it as --ref"])
    behind = d.gap is not None and d.gap.axis == "steps" and d.gap.nats.value > 0
    steps = telling_step(d.gap) if d.gap and behind else max(SHORTEST, min(200, round(d.run.last / 2)))
    if rates in open_:
        change, ranks = f"the first {steps} steps again at {rates.fix}", [*own, *([4 * rank] if size in open_ else [])]
    elif size in open_:
        change, ranks = f"the first {steps} steps again at rank {4 * rank}, all else as it is", [rank, 4 * rank]
    else:
        change, ranks = f"{lots.fix or 'a quarter of the batch for the same samples'}, at half the rate", own
    told: list[str] = []
    if d.gap and behind and open_ != [lots]:
        told.append(_expectation(d.gap, steps, rates in open_, size in open_))
    if rates in open_ and size in open_:
        told.append(f"rank {4 * rank} at the present rate moves it only if it is capacity")
    return _experiment(d, planner, change, steps, ranks, told)


def _expectation(found: Gap, steps: int, by_rate: bool, by_size: bool) -> str:
    """What the repeated run ends at under one cause and under the other; the reference is where it could be."""
    level, mine = at(found.reference, steps), at(found.run, steps)
    if level is None or mine is None:
        return "towards the reference, if that is the cause"
    sigma = noise([v for x, v in found.run if x > 0]) if found.channel == "training" else _half(found) / 1.645
    other = "if it is capacity" if by_rate and by_size else "if it is not"
    return (f"{found.channel} loss from {mine:.3f} towards {level:.3f} if it is {'the rate' if by_rate else 'capacity'}, "
            f"no lower {other}; noise {sigma:.3f}")  # fmt: skip


def _half(found: Gap) -> float:
    return (found.nats.high - found.nats.low) / 2


def _experiment(
    d: Diagnosis, planner: Planner, change: str, steps: int, ranks: Sequence[int], told: Sequence[str]
) -> Experiment:
    seconds = d.run.seconds * steps if d.run.seconds else None
    return Experiment(change, steps, tuple(told), command(planner, steps, ranks), seconds)
