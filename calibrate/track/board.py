"""Errors of cases by whom and what they are of, as Markdown or as numbers. It predicts nothing."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.page import inert, number
from calibrate.track.case import Case
from lora_planner.record import Json

#: by what errors are listed, besides all together
GROUPS = ("source", "gpu", "method", "family")
#: of the cases that are farthest off
WORST = 5


@dataclass(frozen=True, slots=True)
class Summary:
    """Of n predictions that a measurement can be held against.

    median, p95, worst    of |predicted / measured - 1|
    bias                  median of predicted / measured - 1: below 0 where too little is predicted
    covered, asked        measurements and bounds inside the 90 % interval, of all that are predicted
    """

    n: int
    median: float
    p95: float
    worst: float
    bias: float
    covered: int
    asked: int


def spread(errors: Sequence[float]) -> tuple[float, float, float]:
    """Median, 95 % quantile and worst of their sizes.

    >>> spread([0.1, -0.3, 0.2])[::2]
    (0.2, 0.3)
    """
    size = np.abs(errors)
    return float(np.median(size)), float(np.quantile(size, 0.95)), float(size.max())


def summary(cases: Sequence[Case]) -> Summary:
    """
    >>> from lora_planner.ledger import Estimate
    >>> def case(measured, predicted):
    ...     e = Estimate(0.9 * predicted, predicted, 1.1 * predicted, "GiB", "fitted")
    ...     return Case("peak memory", "us", "", "", "", "", "", "GiB", measured, e)
    >>> s = summary([case(10, 10), case(10, 11), case(10, 6)])
    >>> round(s.median, 9), round(s.worst, 9), round(s.bias, 9), s.covered
    (0.1, 0.4, 0.0, 2)
    """
    errors = [error for case in cases if (error := case.error) is not None]
    inside = [covered for case in cases if (covered := case.covered) is not None]
    if not errors:
        return Summary(0, math.nan, math.nan, math.nan, math.nan, sum(inside), len(inside))
    return Summary(len(errors), *spread(errors), float(np.median(errors)), sum(inside), len(inside))


def grouped(cases: Sequence[Case], by: Callable[[Case], str]) -> dict[str, list[Case]]:
    """In alphabetical order, the nameless last."""
    found: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        found[by(case)].append(case)
    return dict(sorted(found.items(), key=lambda pair: (not pair[0], pair[0].lower())))


def by_quantity(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """In the order in which they come."""
    found: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        found[case.quantity].append(case)
    return dict(found)


def reasons(cases: Sequence[Case]) -> list[tuple[str, int]]:
    """Why cases have no prediction, the most frequent first."""
    counted = Counter(case.reason or "no reason given" for case in cases if case.predicted is None)
    return sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))


def worst(cases: Sequence[Case], n: int = WORST) -> list[Case]:
    off = [case for case in cases if case.error]
    return sorted(off, key=lambda c: (-abs(math.log(max(1 + (c.error or 0.0), 1e-12))), c.label))[:n]


def percent(x: float) -> str:
    """
    >>> percent(0.0123), percent(1.5), percent(float("nan"))
    ('1.2 %', '150 %', '-')
    """
    return "-" if math.isnan(x) else f"{100 * x:.1f} %" if abs(x) < 1 else f"{100 * x:.0f} %"


def cells(s: Summary) -> list[str]:
    covered = f"{s.covered} of {s.asked}" if s.asked else "-"
    return [str(s.n), percent(s.median), percent(s.p95), percent(s.worst), percent(s.bias), covered]


HEADER = ("n", "median", "p95", "worst", "bias", "covered")


def table(first: str, rows: Sequence[tuple[str, Sequence[Case]]]) -> list[str]:
    """A Markdown table with a line for each group of cases."""
    lines = [f"| {' | '.join((first, *HEADER))} |", f"|{'---|' * (1 + len(HEADER))}"]
    return lines + [f"| {inert(name) or '-'} | {' | '.join(cells(summary(some)))} |" for name, some in rows]


def section(title: str, cases: Sequence[Case], groups: Sequence[str] = GROUPS) -> list[str]:
    """All cases together, with and without those that a constant was fitted on; by each of `groups`; the worst; and
    what has no prediction."""
    fitted = [case for case in cases if case.fitted]
    unseen = [case for case in cases if not case.fitted]
    rows = [("all", cases)]
    if fitted:
        rows += [("fed a fit", fitted), ("no constant saw it", unseen)]
    lines = [f"### {title}", "", *table("rows", rows), ""]
    for name in groups:
        some = grouped(cases, lambda case, name=name: getattr(case, name))  # type: ignore[misc]
        if len(some) > 1:
            lines += [*table(name, list(some.items())), ""]
    off = worst(cases)
    if off:
        lines += ["Worst:", ""]
        lines += [f"- {inert(c.label)}: predicted {number(c.predicted.value)} {c.unit}, "  # type: ignore[union-attr]
                  f"measured {number(c.measured)} ({percent(c.error or 0.0)})" for c in off]  # fmt: skip
        lines.append("")
    more = details(cases)
    if more:
        lines += ["| beside it | n | median | 90 % below | worst |", "|---|---|---|---|---|"]
        lines += [f"| {inert(name)} | {d['n']} | {d['median']:.4g} | {d['p90']:.4g} | {d['worst']:.4g} |"
                  for name, d in more.items()]  # fmt: skip
        lines.append("")
    missing = reasons(cases)
    if missing:
        lines += [f"Without a prediction ({sum(n for _, n in missing)} of {len(cases)}): "
                  + "; ".join(f"{inert(why)} ({n})" for why, n in missing) + ".", ""]  # fmt: skip
    return lines


def details(cases: Sequence[Case]) -> dict[str, Json]:
    """Further numbers that cases have, such as a regret: median, 90 % quantile and worst of each."""
    found: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        for name, value in case.details.items():
            if math.isfinite(value):
                found[name].append(value)
    return {name: {"n": len(v), "median": float(np.median(v)), "p90": float(np.quantile(v, 0.9)), "worst": max(v)}
            for name, v in found.items()}  # fmt: skip


def plain_summary(cases: Sequence[Case]) -> Json:
    """What `--json` says of some cases."""
    s = summary(cases)
    numbers = {"median": s.median, "p95": s.p95, "worst": s.worst, "bias": s.bias}
    return {"n": s.n, "rows": len(cases), "predicted": sum(case.predicted is not None for case in cases),
            **{name: None if math.isnan(x) else x for name, x in numbers.items()},
            "covered": s.covered, "asked": s.asked}  # fmt: skip


def plain_case(case: Case) -> Json:
    """A case as a flat row."""
    p = case.predicted
    return {
        "quantity": case.quantity, "source": case.source, "model": case.model, "family": case.family,
        "method": case.method, "gpu": case.gpu, "label": case.label, "unit": case.unit, "measured": case.measured,
        "bound": "at least" if case.at_least else "at most" if case.at_most else "",
        "predicted": p.value if p else None, "low": p.low if p else None, "high": p.high if p else None,
        "basis": p.basis if p else "", "error": case.error, "covered": case.covered, "fitted": case.fitted,
        "reason": case.reason, **dict(case.details),
    }  # fmt: skip
