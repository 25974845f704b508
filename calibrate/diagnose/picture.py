"""The curves of a diagnosis as a record.Plot; pages.curves draws it."""

from __future__ import annotations

from statistics import fmean

from calibrate.diagnose.logs import Log
from calibrate.diagnose.shape import Curve
from calibrate.diagnose.shape import usable as finite
from calibrate.diagnose.verdict import Diagnosis
from lora_planner.ledger import Estimate
from lora_planner.record import Plot, Series

#: points to which a noisy curve is averaged
POINTS = 60


def averaged(curve: Curve, points: int = POINTS) -> list[tuple[float, float]]:
    """Means of equal stretches, at most `points`.

    >>> averaged([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)], points=2)
    [(1.5, 2.0), (3.5, 6.0)]
    """
    n = -(-len(curve) // points)
    parts = [curve[i : i + n] for i in range(0, len(curve), n)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def plot(d: Diagnosis, penalty: Estimate | None = None) -> Plot:
    """Held-out loss of both runs, training losses averaged; the bar is where the planner puts the run's end: that
    of the reference times one plus the predicted penalty of the rank. Nothing is predicted of the way there."""
    series: list[Series] = []
    for log, who in ((d.run, "run"), (d.reference, "reference")):
        if log is None:
            continue
        label = f"{who}: {log.settings.label().split(',')[0]}"
        series += _curves(log, label)
    if penalty and d.reference and (known := finite(d.reference.held_out) or averaged(finite(d.reference.train))):
        x, end = known[-1]
        bar = [end * (1 + share) for share in (penalty.value, penalty.low, penalty.high)]
        series.append(Series("predicted end of the run", (x,), (bar[0],), (bar[1],), (bar[2],), "points"))
    top = d.findings[0]
    title = f"{top.cause}: {top.word.lower()}" + (f", {top.detail}" if top.detail else "")
    unit = "reward" if d.run.is_rl else "nats per trained token"
    return Plot(title, "step", unit, tuple(series))


def _curves(log: Log, label: str) -> list[Series]:
    if log.is_rl:
        x, y = zip(*averaged(finite(log.reward)), strict=True)
        return [Series(label, tuple(x), tuple(y))]
    found = []
    if held := finite(log.held_out):
        x, y = zip(*held, strict=True)
        found.append(Series(f"{label}, held-out", tuple(x), tuple(y)))
    if train := finite(log.train):
        x, y = zip(*averaged(train), strict=True)
        found.append(Series(f"{label}, training", tuple(x), tuple(y), style="fit"))
    return found
