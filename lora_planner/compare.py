"""Models x GPUs x methods: which cells are possible, which of them nothing beats, and which are ties.

A cell is one model, one GPU and one kind of method; in it stands the best of the configurations that
`recommend` would try, chosen as there. Cells are ranked by the p90 of a run's cost. Two cells whose cost
intervals overlap are a tie: the planner cannot tell which of them will be cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_planner import capacity
from lora_planner.batch import recommend_batch
from lora_planner.budget import quantile
from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.ledger import Estimate
from lora_planner.method import method
from lora_planner.params import trainable_params
from lora_planner.plan import Job, Priced, loss_penalty, price
from lora_planner.recommend import (
    LATE,
    METHODS,
    NOFIT,
    OVERBUDGET,
    Rejected,
    candidates,
    check,
    order_of,
    refusal_of,
)  # fmt: skip

UNSUPPORTED = "UNSUPPORTED"
CODES = (NOFIT, OVERBUDGET, LATE, UNSUPPORTED)
#: of a cell's refused configurations the one that came furthest is shown: memory is asked first, money last
_FURTHEST = (OVERBUDGET, LATE, NOFIT)
PARETO, TIE, BEATEN = "best", "tie", "beaten"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination. `code` is empty where it can be run; `priced` is None where nothing could be computed."""

    model: str
    gpu: str
    method: str
    code: str = ""
    reason: str = ""
    priced: Priced | None = None
    loss: Estimate | None = None

    @property
    def usd(self) -> Estimate:
        assert self.priced and self.priced.cost
        return self.priced.cost.usd

    @property
    def time(self) -> Estimate:
        assert self.priced and self.priced.run_s
        return self.priced.run_s

    @property
    def usd_p90(self) -> float:
        return quantile(self.usd, 0.9)

    @property
    def time_p90(self) -> float:
        return quantile(self.time, 0.9)

    @property
    def measured(self) -> bool:
        """Whether there are time and cost to compare."""
        return self.priced is not None and self.priced.cost is not None and self.priced.run_s is not None


@dataclass(frozen=True, slots=True)
class Ranked:
    """A possible cell and its place. Cells of one place are ties of its first.

    `standing`: "best" where no cell has both a lower cost and a lower time (p90), "tie" where one has and
    an interval overlaps, "beaten" where one surely is better in both. `of_model`: the same among the cells of
    its own model, as cost and time say nothing about which model is worth more.
    """

    place: int
    tied: bool
    cell: Cell
    standing: str
    of_model: str
    by: Cell | None


@dataclass(slots=True)
class Comparison:
    """`ranked`: what can be run, the cheapest p90 first; `out`: the rest, each with its reason."""

    ranked: list[Ranked]
    out: list[Cell]

    @property
    def counts(self) -> dict[str, int]:
        """How many cells are out, by code."""
        return {code: n for code in CODES if (n := sum(cell.code == code for cell in self.out))}

    @property
    def exit_code(self) -> int:
        """0 where something can be run; 5 where only money is missing for some cell; else 4."""
        if self.ranked:
            return 0
        return 5 if any(cell.code == OVERBUDGET for cell in self.out) else 4


def compare(jobs: Mapping[str, Job | str], methods: Sequence[str]) -> Comparison:
    """Every cell of the jobs' models and GPUs. A job that is text is the reason why its model is unsupported.

    >>> compare({"x": "model_type 'x' is not known"}, ["lora"]).exit_code
    4
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise BadInput(f"no search for {', '.join(unknown) or 'no method'}", "--methods", f"Use {', '.join(METHODS)}.")
    cards = list(dict.fromkeys(g.name for job in jobs.values() if isinstance(job, Job) for g in job.gpus)) or [
        "any GPU"
    ]
    cells: list[Cell] = []
    for name, job in jobs.items():
        if isinstance(job, str):
            cells += [Cell(name, gpu, m, UNSUPPORTED, job) for gpu in cards for m in methods]
        else:
            cells += cells_of(name, job, methods)
    return Comparison(rank(c for c in cells if not c.code), [c for c in cells if c.code])


def cells_of(name: str, job: Job, methods: Sequence[str]) -> list[Cell]:
    """The best configuration of each GPU and method of one job, or the reason why there is none."""
    check(job)
    try:
        need = job.need()
        per_rank = trainable_params(job.model, method("lora", 512, experts=job.experts)) / 512
        rank_ = capacity.recommend_rank(need, job.model.total, per_rank).rank
        batch = recommend_batch(job.data.examples, job.epochs, max(1, job.data.p50)).batch
        tried = list(candidates(job, rank_, batch))
    except LoraPlanError as error:
        return [Cell(name, g.name, m, UNSUPPORTED, error.what) for g in job.gpus for m in methods]
    found = []
    for gpu in job.gpus:
        for kind in methods:
            best: tuple[tuple[float, ...], Priced] | None = None
            refused: list[Rejected] = []
            here = [c for c in tried if c.gpu is gpu and c.method.name == kind]
            try:
                for c in here:
                    priced = price(c, job.book, job.data.examples * job.epochs * job.padded_length(c.micro_batch))
                    refusal = refusal_of(job, priced)
                    if refusal:
                        refused.append(refusal)
                    elif best is None or order_of(job, need, priced) < best[0]:
                        best = order_of(job, need, priced), priced
            except LoraPlanError as error:
                found.append(Cell(name, gpu.name, kind, UNSUPPORTED, error.what))
                continue
            found.append(_cell(name, gpu.name, kind, job, best[1] if best else None, refused))
    return found


def _cell(name: str, gpu: str, kind: str, job: Job, best: Priced | None, refused: Sequence[Rejected]) -> Cell:
    if best:
        loss = loss_penalty(job, best.configuration.method)
        cell = Cell(name, gpu, kind, priced=best, loss=loss)
        if best.cost is None:
            return replace(cell, code=UNSUPPORTED, reason=f"no price for {gpu}: pass --prices FILE with a row for it")
        return cell
    if refused:
        near = min(refused, key=_distance)
        loss = loss_penalty(job, near.priced.configuration.method)
        return Cell(name, gpu, kind, near.code, near.reason, near.priced, loss)
    return Cell(name, gpu, kind, UNSUPPORTED, f"{kind} cannot be attached to this model at the ranks tried")


def _distance(refused: Rejected) -> tuple[int, float]:
    """How far a refused configuration is from being possible: less money, less time, or more of a chance to fit."""
    p = refused.priced
    missing = {
        OVERBUDGET: p.cost.usd.value if p.cost else 0.0,
        LATE: p.run_s.value if p.run_s else 0.0,
        NOFIT: -(p.p_fit or 0.0),
    }
    return _FURTHEST.index(refused.code), missing[refused.code]


# ---------------------------------------------------------------- order


def overlap(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals have a value in common.

    >>> overlap(Estimate(1, 2, 3, "s", "fitted"), Estimate(3, 4, 5, "s", "fitted"))
    True
    """
    return a.low <= b.high and b.low <= a.high


def dominates(a: Cell, b: Cell) -> bool:
    """a is at least as good as b in both p90s, and better in one."""
    no_worse = a.usd_p90 <= b.usd_p90 and a.time_p90 <= b.time_p90
    return no_worse and (a.usd_p90 < b.usd_p90 or a.time_p90 < b.time_p90)


def standing(cell: Cell, others: Iterable[Cell]) -> tuple[str, Cell | None]:
    """ "best", or "tie" or "beaten" with the cheapest cell that is better in both p90s.

    "beaten" needs a cell whose whole interval is below, in cost and in time.
    """
    better = sorted((o for o in others if dominates(o, cell)), key=lambda o: o.usd_p90)
    surely = [o for o in better if not overlap(o.usd, cell.usd) and not overlap(o.time, cell.time)]
    if surely:
        return BEATEN, surely[0]
    return (TIE, better[0]) if better else (PARETO, None)


def places(ordered: Sequence[Estimate]) -> list[int]:
    """Places of estimates in rank order: one that overlaps the first of the place before it shares that place.

    >>> e = lambda low, high: Estimate(low, (low + high) / 2, high, "USD", "fitted")
    >>> places([e(1, 3), e(2, 4), e(3.5, 6), e(10, 11)])
    [1, 1, 3, 4]
    """
    found: list[int] = []
    for i, e in enumerate(ordered):
        first = found[-1] if found else 1
        found.append(first if i and overlap(ordered[first - 1], e) else i + 1)
    return found


def rank(cells: Iterable[Cell]) -> list[Ranked]:
    """Cells by the p90 of their cost (then time, then name), with ties and the Pareto set."""
    ordered = sorted(cells, key=lambda c: (c.usd_p90, c.time_p90, c.model, c.gpu, c.method))
    at = places([c.usd for c in ordered])
    found = []
    for place, cell in zip(at, ordered, strict=True):
        how, better = standing(cell, ordered)
        own, _ = standing(cell, [c for c in ordered if c.model == cell.model])
        found.append(Ranked(place, at.count(place) > 1, cell, how, own, better))
    return found
