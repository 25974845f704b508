"""What was spent, held against the bill: why it differs, and what the rest will cost.

The bill is a p50 and a p90 of a project (`budget.budget`). Against it stand the lines of what was paid. The
difference is split by cause (`causes`) and adds up to the cent; what is left is forecast anew with what the lines
teach (`forecast`): the price paid replaces the prices listed, the measured time of runs replaces the predicted one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import exp, floor, fsum, log, sqrt

from lora_planner.budget import (
    EVALUATED,
    FAILURES,
    FINAL,
    IDLING,
    SWEEP,
    Budget,
    Part,
    Settings,
    Spread,
    draws,
    parts_at,
    points,
    price_factor,
    spread,
    stored_bytes,
    sweep_share,
    time_factor,
)
from lora_planner.ledger import ASSUMED, EXACT, FITTED, Estimate
from lora_planner.units import GIB, HOUR

#: what money goes to; the first two are runs, the last takes no GPU
KINDS = ("sweep", "final", "evaluation", "failed", "idle", "setup", "storage")
RUNS = ("sweep", "final")
#: the bill's line that a kind belongs to
LINE = {"sweep": SWEEP, "final": FINAL, "evaluation": EVALUATED, "failed": FAILURES, "idle": IDLING, "setup": IDLING,
        "storage": "storage"}  # fmt: skip
PRICE, TIME, RERUNS, EVALUATION, IDLE, STORAGE = "price", "time", "reruns", "evaluation", "idle and set-up", "storage"
LEFT, ALLOWANCE = "still to do", "allowance in the p50"
CAUSES = (PRICE, TIME, RERUNS, EVALUATION, IDLE, STORAGE, LEFT, ALLOWANCE)
#: the last two are no fault of anybody's: what the plan still has to buy, and what its p50 held for bad luck
SO_FAR = CAUSES[:-2]
#: spread of the logarithm of a run's time over the runs of one project: the median of 23 models, 8 to 30 runs each,
#: thinking-machines-lab/tinker-cookbook@9dfcc3a2 sft_sweep.md (calibrate/tables/lr_rank_sweep.csv, wall_min)
RUN_SPREAD = 0.19
#: so many runs of one's own weigh as much as that number
RUN_SPREAD_WEIGHT = 3
_Z95 = 1.6448536269514722


@dataclass(frozen=True, slots=True)
class Spent:
    """A line of what was paid: one run, or one line of an invoice.

    `hours`: GPU-hours, so 3 for three hours of one GPU and 24 for three hours of eight. `runs`: how many runs the
    hours are of; 0 for further hours of runs that another line counts. `finished` False: still under way (of storage:
    more will be billed). `part`: place of its plan in the project, None where its GPU is shared by several and the
    line does not say; storage belongs to none.
    """

    kind: str
    gpu: str
    part: int | None
    hours: float
    usd: float
    runs: int = 1
    finished: bool = True
    day: date | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason for a difference, on one GPU or, with an empty `gpu`, on none. In whole cents."""

    name: str
    gpu: str
    usd: float


@dataclass(frozen=True, slots=True)
class Card:
    """What happened on one GPU beside what was planned for as much work. `allowed`: hours for the work that is done.

    `time_factor`: hours of finished runs over those predicted; None before the first. `paid`: USD an hour.
    `runs_beyond`: finished or under way though the plan has no more of them; `done`: finished part of the planned training.
    """

    gpu: str
    planned_usd_per_hour: float
    paid: Estimate | None
    predicted_factor: Estimate
    time_factor: Estimate | None
    runs_finished: int
    runs_under_way: int
    runs_planned: int
    runs_left: int
    runs_beyond: int
    hours: float
    usd: float
    run_hours: float
    run_hours_allowed: float
    failed_hours: float
    failed_hours_allowed: float
    evaluation_hours: float
    evaluation_hours_allowed: float
    idle_hours: float
    idle_hours_allowed: float
    done: float


@dataclass(frozen=True, slots=True)
class LineNow:
    """A line of the bill: its part of the planned p50, what is spent of it, its parts of what is left."""

    name: str
    planned_p50: float
    spent: float
    left_p50: float
    left_p90: float


@dataclass(frozen=True, slots=True)
class Actuals:
    """`forecast` = spent + left, in USD; `approve_usd` = spent + p50 of what is left + contingency."""

    lines: int
    first: date | None
    last: date | None
    spent_usd: float
    spent_hours: float
    planned_usd: float
    causes: tuple[Cause, ...]
    cards: tuple[Card, ...]
    items: tuple[LineNow, ...]
    left: Spread
    left_hours: Spread
    forecast: Spread
    contingency_usd: float
    approved_usd: float
    shares: Mapping[str, Estimate]
    kinds: tuple[str, ...]  # that the lines tell apart
    done: float

    @property
    def approve_usd(self) -> float:
        return self.spent_usd + self.left.p50 + self.contingency_usd

    @property
    def difference_usd(self) -> float:
        """Spent less planned, in whole cents."""
        return round(round(self.spent_usd, 2) - round(self.planned_usd, 2), 2)

    @property
    def so_far_usd(self) -> float:
        """The difference for the work that is done."""
        return round(fsum(c.usd for c in self.causes if c.name in SO_FAR), 2)

    def on_gpu(self, name: str, gpu: str) -> float:
        return round(fsum(c.usd for c in self.causes if (c.name, c.gpu) == (name, gpu)), 2)

    def by_cause(self, names: Sequence[str] = CAUSES) -> dict[str, float]:
        """The causes over all GPUs."""
        return {name: round(fsum(c.usd for c in self.causes if c.name == name), 2) for name in names}


# ---------------------------------------------------------------- why it differs


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of one kind of one part: planned and paid for."""

    planned: int
    hours_each: float  # predicted
    finished: int
    hours: float  # of the finished
    under_way: int
    under_way_hours: float

    @property
    def left(self) -> int:
        return max(0, self.planned - self.finished)

    @property
    def beyond(self) -> int:
        return max(0, self.finished - self.planned)

    @property
    def open_beyond(self) -> int:
        return 0 if self.left else self.under_way


@dataclass(frozen=True, slots=True)
class _Ledger:
    """One GPU: lines, runs by (part, kind), and the planned hours of the bill's other lines at middle values."""

    gpu: str
    lines: tuple[Spent, ...]
    runs: Mapping[tuple[int, str], _Runs]
    price: float
    evaluation: float
    failed: float
    idle: float
    setup_each: float
    plans: int
    begun: int  # plans that a line names

    @property
    def setup(self) -> float:
        return self.plans * self.setup_each

    @property
    def setup_done(self) -> float:
        return self.begun * self.setup_each

    def hours(self, *kinds: str) -> float:
        return fsum(line.hours for line in self.lines if line.kind in kinds)

    @property
    def training(self) -> float:
        return fsum(r.planned * r.hours_each for r in self.runs.values())

    @property
    def done(self) -> float:
        """Finished part of the planned training, runs beyond it not counted."""
        planned = self.training
        return fsum(min(r.finished, r.planned) * r.hours_each for r in self.runs.values()) / planned if planned else 1.0


def _ledgers(parts: Sequence[Part], s: Settings, prices: Mapping[str, float], lines: Sequence[Spent]) -> list[_Ledger]:
    """Per GPU, in the order of the plans."""
    found = []
    for gpu, price in prices.items():
        here = tuple(line for line in lines if line.gpu == gpu)
        runs = {}
        for i, part in enumerate(parts):
            if part.gpu == gpu:
                hour = part.run_s.value / HOUR
                runs[i, "sweep"] = _runs(
                    "sweep", i, points(part, s), hour * sweep_share(part.steps, s.sweep_share), here
                )
                runs[i, "final"] = _runs("final", i, s.seeds, hour, here)
        training = fsum(r.planned * r.hours_each for r in runs.values())
        evaluation = s.evaluation.value * training
        failed = s.failed.value * (training + evaluation)
        idle = s.idle.value * (training + evaluation + failed)
        begun = len({line.part for line in here if line.part is not None})
        plans = len({part for part, _ in runs})
        found.append(_Ledger(gpu, here, runs, price, evaluation, failed, idle, s.setup.value / HOUR, plans, begun))
    return found


def _runs(kind: str, part: int, planned: int, hours_each: float, lines: Iterable[Spent]) -> _Runs:
    """Hours of runs that none has finished of are under way, whatever their lines say."""
    here = [line for line in lines if (line.kind, line.part) == (kind, part)]
    ended = [line for line in here if line.finished]
    finished = sum(line.runs for line in ended)
    hours = fsum(line.hours for line in ended) if finished else 0.0
    open_hours = fsum(line.hours for line in here) - hours
    return _Runs(planned, hours_each, finished, hours, sum(line.runs for line in here if not line.finished), open_hours)


def causes(ledgers: Sequence[_Ledger], storage: tuple[float, float, bool], planned_p50: float) -> list[Cause]:
    """Why spent differs from the bill's p50. The causes add up to the difference, in whole cents.

        price       = USD paid - hours * p
        time        = (hours of finished runs - finished * h) * p
        reruns      = (failed hours - c * failed planned + runs beyond the plan * h) * p
        evaluation  = (evaluation hours - c * evaluation planned) * p
        idle        = (idle and set-up hours - c * idle planned - set-up planned of plans begun) * p
        storage     = max(0, paid - planned); once closed, paid - planned
        still to do = hours of runs under way * p - everything planned and not allowed for above
        allowance   = the plan at its middle values - its p50        [USD]

    p: planned USD an hour, the median of the rows; h: predicted hours of a run; c: finished part of the planned
    training, which is what of evaluation, failures and idling the plan allows for so far. Each but storage and allowance is a
    sum over GPUs. Time is counted on the runs that finished, not on those planned: a run that has not begun is not late.
    The allowance is there because the p50 of a sum of skewed quantities is above the sum of their middles.
    Source: definition; price and efficiency variance of standard costing, against a flexed budget.
    """
    found: list[tuple[str, str, float]] = []
    middle = storage[1]
    for g in ledgers:
        c, p = g.done, g.price
        usd, hours = fsum(line.usd for line in g.lines), g.hours(*KINDS)
        finished = fsum(r.hours for r in g.runs.values())
        allowed = fsum(r.finished * r.hours_each for r in g.runs.values())
        beyond = fsum(r.beyond * r.hours_each + (0.0 if r.left else r.under_way_hours) for r in g.runs.values())
        to_do = fsum((r.under_way_hours - r.left * r.hours_each) if r.left else 0.0 for r in g.runs.values())
        to_do -= (1 - c) * (g.evaluation + g.failed + g.idle) + g.setup - g.setup_done
        found += [
            (PRICE, g.gpu, usd - hours * p),
            (TIME, g.gpu, (finished - allowed) * p),
            (RERUNS, g.gpu, (g.hours("failed") - c * g.failed + beyond) * p),
            (EVALUATION, g.gpu, (g.hours("evaluation") - c * g.evaluation) * p),
            (IDLE, g.gpu, (g.hours("idle", "setup") - c * g.idle - g.setup_done) * p),
            (LEFT, g.gpu, to_do * p),
        ]
        middle += p * (g.training + g.evaluation + g.failed + g.idle + g.setup)
    paid, planned, closed = storage
    over = paid - planned if closed else max(0.0, paid - planned)
    found += [(STORAGE, "", over), (LEFT, "", paid - planned - over), (ALLOWANCE, "", middle - planned_p50)]
    spent = paid + fsum(line.usd for g in ledgers for line in g.lines)
    whole = cents([usd for _, _, usd in found], round(spent, 2) - round(planned_p50, 2))
    return [Cause(name, gpu, usd) for (name, gpu, _), usd in zip(found, whole, strict=True)]


def cents(values: Sequence[float], total: float) -> list[float]:
    """Each value in whole cents, so that they add up to the total: those that lose most are rounded up.

    >>> cents([0.004, 0.004, -0.001], 0.01)
    [0.01, 0.0, 0.0]
    """
    found = [floor(v * 100) for v in values]
    missing = round(total * 100) - sum(found)
    order = sorted(range(len(values)), key=lambda i: found[i] - values[i] * 100)
    for k in range(abs(missing)):
        if missing > 0:
            found[order[k % len(order)]] += 1
        else:
            found[order[-1 - k % len(order)]] -= 1
    return [n / 100 for n in found]


# ---------------------------------------------------------------- what was learnt


def measured_factor(lines: Sequence[tuple[float, float, int]], runs_left: int) -> Estimate | None:
    """How much longer the remaining runs will take than predicted, from those that finished.

        m = sum(hours) / sum(predicted hours)
        tau^2 = (w * 0.19^2 + sum n_j * ln(r_j / m)^2) / (w + J - 1),  w = 3
        m * exp(-+ 1.645 * tau * sqrt(1 / n + 1 / left))        [1]

    `lines`: hours, predicted hours and number n_j of the finished runs of each of J lines; r_j their ratio; n: all runs.
    The predicted factor and its interval drop out: what was measured knows the machine. tau is the spread of single
    runs; the mean of n of them, and that of those left, are as unsure as their number says.
    Source: definition of a prediction interval; 0.19: RUN_SPREAD. On the 23 models of that table, one to ten runs of which were
    told, 90 % intervals held the mean of the others in 86 to 91 % (tests/test_actuals.py).

    >>> one, ten = measured_factor([(2.6, 2, 1)], 3), measured_factor([(2.6, 2, 1)] * 10, 3)
    >>> round(one.value, 2), one.high > ten.high > 1.3
    (1.3, True)
    """
    n = sum(runs for _, _, runs in lines)
    if not n:
        return None
    m = fsum(hours for hours, _, _ in lines) / fsum(predicted for _, predicted, _ in lines)
    scatter = fsum(runs * log(hours / predicted / m) ** 2 for hours, predicted, runs in lines)
    tau = sqrt((RUN_SPREAD_WEIGHT * RUN_SPREAD**2 + scatter) / (RUN_SPREAD_WEIGHT + len(lines) - 1))
    factor = exp(_Z95 * tau * sqrt(1 / n + (1 / runs_left if runs_left else 0.0)))
    return Estimate(m / factor, m, m * factor, "1", FITTED, f"yours: {n} finished run{'' if n == 1 else 's'}")


def paid_price(lines: Iterable[Spent]) -> Estimate | None:
    """USD a GPU-hour that was paid: all money over all hours, between the 5 and 95 % of hours by their price.

    Lines without hours (fees) are no price of an hour. None where nothing ran yet.

    >>> paid_price([Spent("final", "g", 0, 1, 3), Spent("sweep", "g", 0, 3, 6)]).value
    2.25
    """
    rates = sorted((line.usd / line.hours, line.hours) for line in lines if line.hours > 0)
    hours = fsum(h for _, h in rates)
    if not hours:
        return None
    mean = fsum(rate * h for rate, h in rates) / hours
    low, high = (_rate_at(rates, p * hours) for p in (0.05, 0.95))
    return Estimate(min(low, mean), mean, max(high, mean), "USD/h", EXACT, "yours: what was paid")


def _rate_at(rates: Sequence[tuple[float, float]], place: float) -> float:
    passed = 0.0
    for rate, hours in rates:
        passed += hours
        if passed >= place:
            return rate
    return rates[-1][0]


def learnt_share(planned: Estimate, hours: float, of_hours: float, done: float) -> Estimate:
    """A share after a part of the project: between the planned one and the measured one, by how much is done.

        end^(1 - done) * measured^done,  end = low, value, high        [share]

    Source: ours (logarithmic pooling, the weight is the finished part of the training). Where the lines have none of the
    kind it stays as planned: none happened, and none was told apart, look the same.

    >>> learnt_share(Estimate(0.05, 0.1, 0.4, "share", ASSUMED), 20, 100, 0.5).value
    0.1414213562373095
    """
    if not (hours > 0 and of_hours > 0 and planned.value > 0):
        return planned
    low, value, high = (
        e ** (1 - done) * (hours / of_hours) ** done for e in (planned.low, planned.value, planned.high)
    )
    return Estimate(low, value, high, planned.unit, ASSUMED, f"{planned.source}, and yours by {done:.0%}")


# ---------------------------------------------------------------- the whole


def actuals(b: Budget, lines: Sequence[Spent]) -> Actuals:
    """The lines against the bill, and the rest forecast anew.

        left = T * max(0, predicted hours of runs left) - hours under way, then evaluation, failures, idling and set-up
               on top as in `budget.budget`; * price; storage less what was paid of it        [USD]

    T and the price of a GPU are those learnt where there is something to learn from, else the plan's. Without a line
    this is the bill itself.
    Source: definition.
    """
    s, parts = b.settings, b.parts
    cards = list(dict.fromkeys(part.gpu for part in parts))
    listed = {gpu: price_factor(tuple(row for row in b.used if row.gpu == gpu)) for gpu in cards}
    ledgers = _ledgers(parts, s, {gpu: e.value for gpu, e in listed.items()}, lines)
    stored = [line for line in lines if line.kind == "storage"]
    paid_storage = fsum(line.usd for line in stored)
    closed = any(line.finished for line in stored)
    gib_months = stored_bytes(parts, s) / GIB * s.months
    reasons = causes(ledgers, (paid_storage, gib_months * s.storage.value, closed), b.total.p50)

    told = tuple(kind for kind in KINDS if any(line.kind == kind for line in lines))
    done = _done(ledgers)
    shares = _shares(ledgers, s, done)
    found = [_card(g, listed[g.gpu], time_factor(parts, g.gpu)) for g in ledgers]
    factors = {f"time {c.gpu}": c.time_factor or c.predicted_factor for c in found}
    factors |= {f"price {c.gpu}": c.paid or listed[c.gpu] for c in found}
    factors |= {**shares, "setup": s.setup, "storage": s.storage}
    drawn = draws(factors)

    columns: dict[str, list[float]] = {}
    hours = [0.0] * len(drawn["storage"])
    for g in ledgers:
        for name, h in _hours_left(g, drawn).items():
            usd = [x * p for x, p in zip(h, drawn[f"price {g.gpu}"], strict=True)]
            columns[name] = [a + x for a, x in zip(columns[name], usd, strict=True)] if name in columns else usd
            hours = [a + x for a, x in zip(hours, h, strict=True)]
    rest = [0.0 if closed else max(0.0, gib_months * usd - paid_storage) for usd in drawn["storage"]]
    columns[STORAGE] = rest

    table = list(columns.values())
    sums = [fsum(row) for row in zip(*table, strict=True)]
    left = spread(sums, "USD")
    items = [
        LineNow(name, planned.usd_p50, fsum(line.usd for line in lines if LINE[line.kind] == name), p50, p90)
        for name, planned, p50, p90 in zip(columns, b.items, parts_at(table, 0.5), parts_at(table, 0.9), strict=True)
    ]
    spent = fsum(line.usd for line in lines)
    days = sorted(line.day for line in lines if line.day)
    spare = left.p90 - left.p50 if s.contingency is None else s.contingency * left.p50
    return Actuals(
        len(lines), days[0] if days else None, days[-1] if days else None, spent, fsum(line.hours for line in lines),
        b.total.p50, tuple(reasons), tuple(found), tuple(items), left, spread(hours, "h"),
        spread([spent + x for x in sums], "USD"), spare, b.approve_usd, shares, told, done,
    )  # fmt: skip


def _done(ledgers: Sequence[_Ledger]) -> float:
    """Finished part of the planned training over all GPUs, in predicted hours."""
    planned = fsum(g.training for g in ledgers)
    return fsum(g.done * g.training for g in ledgers) / planned if planned else 1.0


def _shares(ledgers: Sequence[_Ledger], s: Settings, done: float) -> dict[str, Estimate]:
    training, evaluation, failed, idle = (
        fsum(g.hours(*kinds) for g in ledgers) for kinds in (RUNS, ("evaluation",), ("failed",), ("idle",))
    )
    return {
        "evaluation": learnt_share(s.evaluation, evaluation, training, done),
        "failed": learnt_share(s.failed, failed, training + evaluation, done),
        "idle": learnt_share(s.idle, idle, training + evaluation + failed, done),
    }


def _card(g: _Ledger, listed: Estimate, predicted: Estimate) -> Card:
    runs = g.runs.values()
    return Card(
        g.gpu, listed.value, paid_price(g.lines), predicted, measured_factor(list(_ratios(g)), sum(r.left for r in runs)),
        sum(r.finished for r in runs), sum(r.under_way for r in runs), sum(r.planned for r in runs), sum(r.left for r in runs),
        sum(r.beyond + r.open_beyond for r in runs),
        g.hours(*KINDS), fsum(line.usd for line in g.lines), fsum(r.hours for r in runs), fsum(r.finished * r.hours_each for r in runs),
        g.hours("failed"), g.done * g.failed, g.hours("evaluation"), g.done * g.evaluation,
        g.hours("idle", "setup"), g.done * g.idle + g.setup_done, g.done,
    )  # fmt: skip


def _ratios(g: _Ledger) -> Iterator[tuple[float, float, int]]:
    """Hours, predicted hours and runs of each line of finished runs; one for all where lines share their runs."""
    for (part, kind), r in g.runs.items():
        ended = [line for line in g.lines if (line.kind, line.part) == (kind, part) and line.finished]
        if not r.finished:
            continue
        if all(line.runs for line in ended):
            yield from ((line.hours, line.runs * r.hours_each, line.runs) for line in ended)
        else:
            yield r.hours, r.finished * r.hours_each, r.finished


def _hours_left(g: _Ledger, drawn: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """GPU-hours of each line that are still to be paid on one GPU, a value a draw."""
    found: dict[str, list[float]] = {name: [] for name in (SWEEP, FINAL, EVALUATED, FAILURES, IDLING)}
    rest = {kind: [(r.left * r.hours_each, r.under_way_hours) for (_, k), r in g.runs.items() if k == kind and r.left]
            for kind in RUNS}  # fmt: skip
    plans = g.plans - g.begun
    for t, e, f, i, setup in zip(drawn[f"time {g.gpu}"], drawn["evaluation"], drawn["failed"], drawn["idle"],
                                 drawn["setup"], strict=True):  # fmt: skip
        sweep, final = (sum(max(0.0, t * hours - begun) for hours, begun in rest[kind]) for kind in RUNS)
        evaluated = e * (sweep + final)
        failed = f * (sweep + final + evaluated)
        found[SWEEP].append(sweep)
        found[FINAL].append(final)
        found[EVALUATED].append(evaluated)
        found[FAILURES].append(failed)
        found[IDLING].append(i * (sweep + final + evaluated + failed) + plans * setup / HOUR)
    return found
