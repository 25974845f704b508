"""What a run costs: hours of GPUs at the prices of several providers, as an interval with dates.

Prices are facts of their day (`facts.Price`); this file multiplies and picks, it knows no price.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from statistics import median

from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import Price, age_days, is_stale
from lora_planner.ledger import BASES, Estimate
from lora_planner.units import HOUR


@dataclass(frozen=True, slots=True)
class Cost:
    """A bill before the run.

    `usd` spans providers and the uncertainty of the time; `cheapest_usd` is at the cheapest row alone.
    `stale`: how many of the rows used are over the age limit; `oldest_days`: the age of the oldest.
    """

    usd: Estimate
    cheapest: Price
    cheapest_usd: Estimate
    rows: tuple[Price, ...]
    stale: int
    oldest_days: int


def usd_at(price: Price, time: Estimate, gpus: int = 1) -> Estimate:
    """The bill at one price, as unsure as the time or the price, whichever is less sure.

        seconds / 3600 * gpus * usd_per_gpu_hour   [USD]

    >>> row = Price("l4-24gb", 0.5, "p", "on-demand", "s", date(2026, 11, 1))
    >>> usd_at(row, Estimate(3600, 7200, 14400, "s", "fitted"), gpus=2).value
    2.0
    """
    if gpus < 1 or time.unit != "s" or time.low < 0:
        raise BadInput("cost needs seconds >= 0 and at least one GPU", f"{gpus} GPUs, {time.unit!r}")
    bill = time.scaled(gpus * price.usd_per_gpu_hour / HOUR, "USD")
    bill.basis = max(time.basis, price.basis, key=BASES.index)
    bill.source = f"{price.provider}, {price.commitment}, {price.as_of}"
    return bill


def cost(
    time: Estimate, gpu_name: str, prices: Iterable[Price], today: date, gpus: int = 1,
    commitment: str = "on-demand",
) -> Cost:  # fmt: skip
    """What `time` on `gpus` GPUs costs at the rows for this GPU and commitment.

        low = shortest time at the lowest price, value = expected time at the median price,
        high = longest time at the highest price   [USD]

    A GPU without a price is an error: the price of another GPU would be a guess.

    >>> rows = [Price("g", usd, str(usd), "on-demand", "s", date(2026, 11, 1)) for usd in (1, 2, 6)]
    >>> bill = cost(Estimate(1800, 3600, 7200, "s", "fitted"), "g", rows, date(2026, 11, 23))
    >>> bill.usd.low, bill.usd.value, bill.usd.high, bill.cheapest.provider
    (0.5, 2.0, 12.0, '1')
    """
    rows = tuple(p for p in prices if p.gpu == gpu_name and p.commitment == commitment)
    if not rows:
        fix = "Pass a price file with gpu, usd_per_gpu_hour, provider, commitment, as_of."
        raise UnknownName(f"no {commitment} price for {gpu_name}", "prices", fix, gpu=gpu_name)
    rows = tuple(sorted(rows, key=lambda p: p.usd_per_gpu_hour))
    cheapest, dearest = usd_at(rows[0], time, gpus), usd_at(rows[-1], time, gpus)
    middle = time.value / HOUR * gpus * median(p.usd_per_gpu_hour for p in rows)
    basis = max((usd_at(p, time, gpus).basis for p in rows), key=BASES.index)
    providers = f"{len(rows)} prices of {gpu_name}"
    return Cost(
        usd=Estimate(cheapest.low, middle, dearest.high, "USD", basis, providers),
        cheapest=rows[0],
        cheapest_usd=cheapest,
        rows=rows,
        stale=sum(is_stale(p, today) for p in rows),
        oldest_days=max(age_days(p, today) for p in rows),
    )
