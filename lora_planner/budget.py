"""What a whole project costs: sweep, seeds, evaluation, failed and idle time, storage, contingency.

A run is one line of a project's bill. The others are counts (points of the sweep, seeds) and shares of
training time; nobody publishes the shares, so each is an assumption with a wide interval that an option
replaces. Intervals are combined by their cause, not by their line:

    the error of the predicted time is one factor a GPU, shared by every run on it;
    the price is one factor a GPU, until a provider is chosen;
    evaluation, failures, idling, set-up and the price of storage are one factor each, shared by all parts;
    factors are independent of each other.

So within a line and between lines errors mostly add up, and do not average out over runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import count
from statistics import NormalDist, median

from lora_planner.batch import MIN_STEPS
from lora_planner.errors import BadInput, UnknownName, nearest
from lora_planner.facts import STALE_DAYS, Price, age_days, is_stale
from lora_planner.ledger import ASSUMED, BASES, DERIVED, EXACT, Estimate
from lora_planner.units import GIB, HOUR

OURS = "ours: nobody publishes one"
#: shares of the time that they add to, and what else a bill needs; each has an option
EVALUATION = Estimate(0.03, 0.10, 0.40, "share", ASSUMED, OURS)
FAILED = Estimate(0.03, 0.15, 0.50, "share", ASSUMED, OURS)
IDLE = Estimate(0.03, 0.15, 0.60, "share", ASSUMED, OURS)
SETUP = Estimate(600.0, 1800.0, 7200.0, "s", ASSUMED, OURS)
STORAGE = Estimate(0.02, 0.08, 0.25, "USD/GiB-month", ASSUMED, "ours: from object storage to fast disks, list prices")
SWEEP_SHARE = 0.25
#: points of a sweep where a plan names none
RATES = 5
#: quantiles are taken over so many points: the second digit of a p90 is then fixed
POINTS = 4096
_NORMAL = NormalDist()
_Z95 = _NORMAL.inv_cdf(0.95)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a project consists of besides its plans. `rates` None: as many as the plan's own sweep has.

    `ranks`: how many ranks get that sweep each; `sweep_share`: length of a sweep's run, of a whole one;
    `checkpoints`: kept of every final run; `contingency` None: up to the p90.
    """

    rates: int | None = None
    ranks: int = 2
    sweep_share: float = SWEEP_SHARE
    seeds: int = 3
    evaluation: Estimate = field(default_factory=lambda: EVALUATION)
    failed: Estimate = field(default_factory=lambda: FAILED)
    idle: Estimate = field(default_factory=lambda: IDLE)
    setup: Estimate = field(default_factory=lambda: SETUP)
    checkpoints: int = 2
    months: float = 3.0
    storage: Estimate = field(default_factory=lambda: STORAGE)
    contingency: float | None = None
    provider: str | None = None
    hosted_usd: float | None = None  # per million tokens


@dataclass(frozen=True, slots=True)
class Part:
    """One plan of a project: what its run needs. `tokens`: real ones of one run, every epoch counted."""

    model: str
    gpu: str
    run_s: Estimate
    steps: float
    rates: int
    full: bool  # full fine-tuning has no ranks to sweep
    tokens: Estimate
    file_bytes: float  # what one finished run leaves: an adapter, or all weights
    optimizer_bytes: float  # what a checkpoint holds besides
    base_bytes: float  # the base on disk
    prices: tuple[Price, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles of one quantity."""

    p05: float
    p50: float
    p90: float
    p95: float
    unit: str


@dataclass(frozen=True, slots=True)
class Item:
    """A line of the bill; `hours` is None for what takes no GPU.

    `usd` is the line on its own. `hours_p50`, `usd_p50` and `usd_p90` are its parts of the totals' quantiles
    and add up to them (`parts_at`).
    """

    name: str
    detail: str
    hours: Spread | None
    usd: Spread
    hours_p50: float
    usd_p50: float
    usd_p90: float
    basis: str


@dataclass(frozen=True, slots=True)
class Offer:
    """The parts on one GPU at one price; storage is in it where there is one GPU.

    `chosen`: the total is at this price, or is spread over it.
    """

    price: Price
    hours: Spread
    usd: Spread
    age_days: int
    stale: bool
    chosen: bool


@dataclass(frozen=True, slots=True)
class Hosted:
    """The same training bought by the token. `break_even_usd`: price a million tokens at which both cost the same."""

    tokens: Estimate
    break_even_usd: float
    usd_per_million: float | None = None
    usd: Spread | None = None
    verdict: str = ""


@dataclass(slots=True)
class Budget:
    """The bill. `approve_usd` = p50 + contingency."""

    parts: tuple[Part, ...]
    settings: Settings
    items: list[Item]
    hours: Spread
    total: Spread
    contingency_usd: float
    offers: list[Offer]
    hosted: Hosted
    runs: int
    basis: str
    used: tuple[Price, ...] = field(default=())

    @property
    def approve_usd(self) -> float:
        return self.total.p50 + self.contingency_usd

    @property
    def stale(self) -> tuple[Price, ...]:
        """The rows behind the total that are over the age limit."""
        old = {id(o.price) for o in self.offers if o.stale}
        return tuple(row for row in self.used if id(row) in old)


# ---------------------------------------------------------------- distributions


def quantile(e: Estimate, p: float) -> float:
    """The p-quantile of an estimate whose low, value and high are its 5, 50 and 95 % quantiles.

        value * (end / value)^(|z(p)| / z(0.95)),   end = low for p < 1/2, else high

    A log-normal of two halves: factors of time and price are as often doubled as halved. Where an end
    is 0 its half is normal, cut at 0.
    Source: definition; the intervals are 90 % intervals (ledger.Estimate).

    >>> e = Estimate(1, 2, 8, "h", ASSUMED)
    >>> [round(quantile(e, p), 3) for p in (0.05, 0.5, 0.9, 0.95)]
    [1.0, 2.0, 5.89, 8.0]
    """
    z = _NORMAL.inv_cdf(min(max(p, 1e-9), 1 - 1e-9)) / _Z95
    end = e.low if z < 0 else e.high
    if e.value > 0 and end > 0:
        return float(e.value * (end / e.value) ** abs(z))
    return max(0.0, e.value + (end - e.value) * abs(z))


def draws(factors: Mapping[str, Estimate], n: int = POINTS) -> dict[str, list[float]]:
    """n points of independent factors, spread evenly over their joint distribution; the same ones every time.

        quantile(factor_j, digits of i in the j-th prime, reversed behind the point),   i = 1 ... n

    Source: Halton 1960. At 4096 points no two of eleven factors are correlated by more than 0.005; other
    sequences (additive ones, shuffled strata) had ten times that.

    >>> halves = draws({"a": Estimate(1, 2, 4, "", ASSUMED), "b": Estimate(3, 3, 3, "", EXACT)}, n=1000)
    >>> round(median(halves["a"]), 2), set(halves["b"])
    (2.0, {3})
    """
    found, primes = {}, _primes()
    for name, e in factors.items():
        if e.low == e.value == e.high:
            found[name] = [e.value] * n
        else:
            base = next(primes)
            found[name] = [quantile(e, _reversed_digits(i, base)) for i in range(1, n + 1)]
    return found


def _primes() -> Iterator[int]:
    known: list[int] = []
    for n in count(2):
        if all(n % p for p in known):
            known.append(n)
            yield n


def _reversed_digits(i: int, base: int) -> float:
    """
    >>> _reversed_digits(6, 2)
    0.375
    """
    share, found = 1.0, 0.0
    while i:
        share /= base
        found += share * (i % base)
        i //= base
    return found


def value_at(values: Sequence[float], p: float) -> float:
    """The p-quantile of equally likely values, in between them by their distance.

    >>> value_at([0, 10, 20], 0.25)
    5.0
    """
    ordered = sorted(values)
    place = p * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def spread(values: Sequence[float], unit: str) -> Spread:
    """Quantiles of equally likely values.

    >>> spread(range(101), "USD").p90
    90.0
    """
    ordered = sorted(values)
    return Spread(
        value_at(ordered, 0.05), value_at(ordered, 0.5), value_at(ordered, 0.9), value_at(ordered, 0.95), unit
    )


def parts_at(columns: Sequence[Sequence[float]], p: float, width: float = 0.05) -> list[float]:
    """What each addend is where the sum is at its p-quantile; the parts add up to that quantile.

        quantile_p(sum) * mean of (addend / sum) over the draws whose sum lies between the (p - w/2)- and (p + w/2)-quantile

    The quantile of a sum is not the sum of quantiles: not all goes wrong at once.
    Source: Euler allocation (Tasche 1999), its mean over a window.

    >>> parts_at([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], 0.5)
    [2.0, 2.0]
    """
    sums = _sum(columns)
    order = sorted(range(len(sums)), key=sums.__getitem__)
    last = len(order) - 1
    near = order[max(0, round((p - width / 2) * last)) : round((p + width / 2) * last) + 1]
    whole = value_at(sums, p)
    return [whole * sum(c[i] / sums[i] if sums[i] else 0.0 for i in near) / len(near) for c in columns]


# ---------------------------------------------------------------- what a project is made of


def sweep_share(steps: float, asked: float) -> float:
    """Length of one run of the sweep over that of a whole run: as asked, but never under 100 steps.

        min(1, max(asked, 100 / steps))        [1]

    Source: batch.MIN_STEPS (B starts at zero and must grow). A short run's best rate is up to 1.5 times
    that of a long one (learning_rate.short_run_factor), so a sweep of short runs is the cheaper and the
    less certain one.

    >>> sweep_share(1000, 0.25), sweep_share(127, 0.25) > 0.78, sweep_share(50, 0.25)
    (0.25, True, 1.0)
    """
    return min(1.0, max(asked, MIN_STEPS / steps))


def points(part: Part, s: Settings) -> int:
    """Runs of the sweep: rates x ranks."""
    return (part.rates if s.rates is None else s.rates) * (1 if part.full else s.ranks)


def run_equivalents(part: Part, s: Settings) -> float:
    """Sweep and final runs in units of one whole run.

    rates * ranks * sweep_share + seeds        [runs]
    """
    return points(part, s) * sweep_share(part.steps, s.sweep_share) + s.seeds


def stored_bytes(parts: Iterable[Part], s: Settings) -> float:
    """What lies on disk: each base once, the result of every run, checkpoints of the final runs.

        base + points * file + seeds * checkpoints * (file + optimizer)        [B]

    Source: definition. A checkpoint holds what the optimizer holds; adapters without it are what is served.
    """
    bases: dict[str, float] = {}
    total = 0.0
    for part in parts:
        bases[part.model] = part.base_bytes
        total += points(part, s) * part.file_bytes
        total += s.seeds * max(1, s.checkpoints) * part.file_bytes + s.seeds * s.checkpoints * part.optimizer_bytes
    return total + sum(bases.values())


def newest(rows: Iterable[Price], gpu: str) -> tuple[Price, ...]:
    """The last row of every provider and commitment for one GPU, the cheapest first: prices are appended."""
    found: dict[tuple[str, str], Price] = {}
    for row in rows:
        key = row.provider, row.commitment
        if row.gpu == gpu and (key not in found or found[key].as_of < row.as_of):
            found[key] = row
    return tuple(sorted(found.values(), key=lambda row: (row.usd_per_gpu_hour, row.provider)))


def chosen_rows(rows: tuple[Price, ...], gpu: str, provider: str | None) -> tuple[Price, ...]:
    """The rows that the total is at: those of one provider, else every on-demand one.

    `provider`: a name as in the price file, or "name, commitment".
    """
    ready = tuple(row for row in rows if row.commitment == "on-demand")
    if provider is None:
        if ready:
            return ready
        fix = f"Pass --prices FILE with a [[price]] of {gpu}, or name --provider."
        raise UnknownName(f"no on-demand price for {gpu}", "prices", fix, gpu=gpu)
    same = [row for row in rows if provider in (row.provider, f"{row.provider}, {row.commitment}")]
    if not same:
        known = [row.provider for row in rows]
        close = nearest(provider, known, 1)
        hint = f"Known for {gpu}: {', '.join(known) or 'none'}." + (f" Nearest: {close[0]}." if close else "")
        raise UnknownName(f"no price of {provider!r} for {gpu}", "--provider", hint)
    return tuple(row for row in same if row.commitment == "on-demand")[:1] or tuple(same[:1])


def price_factor(rows: tuple[Price, ...]) -> Estimate:
    """USD a GPU-hour: cheapest, median and dearest of the rows, one of which the bill will be at.

    >>> rows = [Price("g", usd, str(usd), "on-demand", "s", date(2026, 11, 1)) for usd in (1, 2, 6)]
    >>> price_factor(tuple(rows)).value
    2
    """
    usd = [row.usd_per_gpu_hour for row in rows]
    basis = max((row.basis for row in rows), key=BASES.index)
    return Estimate(min(usd), median(usd), max(usd), "USD/h", basis, f"{len(rows)} prices")


# ---------------------------------------------------------------- the bill


def budget(parts: Sequence[Part], s: Settings, today: date) -> Budget:
    """Every line of a project's bill with its p50 and p90.

        training  = T * run_equivalents, T shared by all runs on a GPU
        evaluation = e * training;   failed = f * (training + evaluation)
        idle      = i * (training + evaluation + failed) + set-up
        USD       = price * GPU-hours + storage * GiB * months        [USD]

    Source: definition; how factors are drawn: `draws`; how a total is divided: `parts_at`.
    """
    _check(parts, s)
    cards = list(dict.fromkeys(part.gpu for part in parts))
    rows = {gpu: newest((row for part in parts for row in part.prices), gpu) for gpu in cards}
    used = {gpu: chosen_rows(rows[gpu], gpu, s.provider) for gpu in cards}
    factors = {f"time {gpu}": time_factor(parts, gpu) for gpu in cards}
    factors |= {f"price {gpu}": price_factor(used[gpu]) for gpu in cards}
    factors |= {"evaluation": s.evaluation, "failed": s.failed, "idle": s.idle, "setup": s.setup, "storage": s.storage}
    drawn = draws(factors)

    hours: dict[str, dict[str, list[float]]] = {gpu: _hours(parts, s, gpu, drawn) for gpu in cards}
    gib_months = stored_bytes(parts, s) / GIB * s.months
    stored = [gib_months * usd for usd in drawn["storage"]]
    names = [name for name, _ in _lines(parts, s)]
    line_hours = [_sum(hours[gpu][name] for gpu in cards) for name in names]
    line_usd = [_sum(_times(hours[gpu][name], drawn[f"price {gpu}"]) for gpu in cards) for name in names]
    some_hours = parts_at(line_hours, 0.5)
    p50s, p90s = parts_at([*line_usd, stored], 0.5), parts_at([*line_usd, stored], 0.9)
    items = [
        Item(name, detail, spread(h, "h"), spread(usd, "USD"), part_h, p50, p90, _basis(factors.values()))
        for (name, detail), h, usd, part_h, p50, p90 in zip(_lines(parts, s), line_hours, line_usd, some_hours, p50s[:-1],
                                                            p90s[:-1], strict=True)
    ]  # fmt: skip
    detail = f"{stored_bytes(parts, s) / GIB:.3g} GiB for {s.months:g} months"
    items.append(Item("storage", detail, None, spread(stored, "USD"), 0.0, p50s[-1], p90s[-1], s.storage.basis))

    all_hours = {gpu: _sum(hours[gpu].values()) for gpu in cards}
    total = spread(_sum([*line_usd, stored]), "USD")
    besides = stored if len(cards) == 1 else [0.0] * POINTS
    offers = [
        Offer(row, spread(all_hours[gpu], "h"),
              spread([h * row.usd_per_gpu_hour + more for h, more in zip(all_hours[gpu], besides, strict=True)], "USD"),
              age_days(row, today), is_stale(row, today), row in used[gpu])
        for gpu in cards for row in rows[gpu]
    ]  # fmt: skip
    spare = total.p90 - total.p50 if s.contingency is None else s.contingency * total.p50
    runs = sum(points(part, s) + s.seeds for part in parts)
    return Budget(
        tuple(parts), s, items, spread(_sum(all_hours.values()), "h"), total, spare, offers,
        hosted(parts, s, total), runs, _basis(factors.values()), tuple(row for some in used.values() for row in some),
    )  # fmt: skip


def hosted(parts: Sequence[Part], s: Settings, rent: Spread) -> Hosted:
    """The project's sweep and final runs bought by the token.

        tokens of the data * epochs * run_equivalents / 10^6 * USD per million tokens        [USD]

    Padding, set-up, idle time and restarts are the host's; evaluation and storage are left out here, as hosts
    price them apart. Which is cheaper is open where the 90 % intervals overlap.
    Source: definition.
    """
    tokens = [part.tokens.scaled(run_equivalents(part, s)) for part in parts]
    basis = _basis(tokens)
    low, value, high = (sum(getattr(t, end) for t in tokens) for end in ("low", "value", "high"))
    sum_ = Estimate(low, value, high, "tokens", basis, "data x epochs x runs")
    even = rent.p50 / (value / 1e6)
    if s.hosted_usd is None:
        return Hosted(sum_, even)
    bill = sum_.scaled(s.hosted_usd / 1e6, "USD")
    usd = Spread(bill.low, bill.value, quantile(bill, 0.9), bill.high, "USD")
    if usd.p95 < rent.p05:
        verdict = "hosted is cheaper"
    elif rent.p95 < usd.p05:
        verdict = "renting is cheaper"
    else:
        verdict = "a tie: the intervals overlap"
    return Hosted(sum_, even, s.hosted_usd, usd, verdict)


def _check(parts: Sequence[Part], s: Settings) -> None:
    if not parts:
        raise BadInput("no plan to budget", "PLAN", "Give a plan file, or --model, --data and --gpu.")
    if not all(points(part, s) + s.seeds for part in parts):
        raise BadInput("a project without a run", "--seeds, --rates", "Use --seeds 1 or more.")


def time_factor(parts: Sequence[Part], gpu: str) -> Estimate:
    """The relative error of every run's time on one GPU; the widest of the parts', as it is one error."""
    runs = [part.run_s for part in parts if part.gpu == gpu]
    return Estimate(min(r.low / r.value for r in runs), 1.0, max(r.high / r.value for r in runs), "1", _basis(runs))


SWEEP, FINAL, EVALUATED, FAILURES, IDLING = (
    "sweep", "final runs", "evaluation", "failed runs", "idle and set-up",
)  # fmt: skip


def _hours(parts: Sequence[Part], s: Settings, gpu: str, drawn: dict[str, list[float]]) -> dict[str, list[float]]:
    """GPU-hours of each line on one GPU, a value a draw."""
    here = [part for part in parts if part.gpu == gpu]
    sweep_h = sum(p.run_s.value * points(p, s) * sweep_share(p.steps, s.sweep_share) for p in here) / HOUR
    final_h = sum(p.run_s.value * s.seeds for p in here) / HOUR
    lines: dict[str, list[float]] = {name: [] for name in (SWEEP, FINAL, EVALUATED, FAILURES, IDLING)}
    for t, e, f, i, setup in zip(drawn[f"time {gpu}"], drawn["evaluation"], drawn["failed"], drawn["idle"],
                                 drawn["setup"], strict=True):  # fmt: skip
        sweep, final = t * sweep_h, t * final_h
        evaluated = e * (sweep + final)
        failed = f * (sweep + final + evaluated)
        lines[SWEEP].append(sweep)
        lines[FINAL].append(final)
        lines[EVALUATED].append(evaluated)
        lines[FAILURES].append(failed)
        lines[IDLING].append(i * (sweep + final + evaluated + failed) + setup / HOUR * len(here))
    return lines


def _lines(parts: Sequence[Part], s: Settings) -> list[tuple[str, str]]:
    """The lines that take GPU time, each with what it consists of."""
    sweeps = []
    for part in parts:
        rates, share = part.rates if s.rates is None else s.rates, sweep_share(part.steps, s.sweep_share)
        ranks = "" if part.full else f" x {s.ranks} ranks"
        sweeps.append(f"{rates} rates{ranks}, {share * part.steps:,.0f} of {part.steps:,.0f} steps each")
    each = "" if len(parts) == 1 else " each"
    return [
        (SWEEP, "; ".join(dict.fromkeys(sweeps))),
        (FINAL, f"{s.seeds} seeds{each}"),
        (EVALUATED, f"{s.evaluation.value:.0%} of training"),
        (FAILURES, f"{s.failed.value:.0%} again"),
        (IDLING, f"{s.idle.value:.0%}, and {s.setup.value / 60:.0f} min to set up{each}"),
    ]


def _sum(columns: Iterable[Sequence[float]]) -> list[float]:
    return [sum(values) for values in zip(*columns, strict=True)]


def _times(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x * y for x, y in zip(a, b, strict=True)]


def _basis(estimates: Iterable[Estimate]) -> str:
    return max((e.basis for e in estimates), key=BASES.index, default=EXACT)


def share(text: str, option: str) -> Estimate:
    """What a user gives for a share: "15%" as it stands, "5%,15%,50%" with its 90 % interval.

    >>> share("15%", "--idle").value, share("0.05,0.15,0.5", "--idle").high
    (0.15, 0.5)
    """
    numbers = _numbers(text, option)
    low, value, high = (numbers * 3)[:3] if len(numbers) == 1 else numbers
    return Estimate(low, value, high, "share", DERIVED if low == high else ASSUMED, f"yours: {option}")


def _numbers(text: str, option: str) -> list[float]:
    fix = "Write 15%, or low,value,high: 5%,15%,50%."
    words = [word.strip() for word in text.split(",")]
    try:
        found = [float(word.removesuffix("%")) / (100 if word.endswith("%") else 1) for word in words]
    except ValueError:
        raise BadInput(f"no share: {text[:40]!r}", option, fix) from None
    if len(found) not in (1, 3) or found != sorted(found) or not all(0 <= x <= 10 for x in found):
        raise BadInput(f"no share: {text[:40]!r}", option, f"{fix} From 0 to 1000%, in order.")
    return found


def stale_words(rows: Iterable[Price], today: date) -> str:
    """How old prices are at most, and whose."""
    some = list(rows)
    names = ", ".join(dict.fromkeys(row.provider for row in some))
    return f"up to {max(age_days(row, today) for row in some)} days old, {STALE_DAYS} are the limit: {names}"
