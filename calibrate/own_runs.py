"""What a page of own runs shows: predictions against measurements, the U of every arm, loss curves, as data.

Every number comes from elsewhere: scores and misses from score.py, arms and the noise floor from verdict.py, parabolas from
curves.py, intervals from stats.py. Whoever draws a Plot adds none.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from calibrate.curves import BESIDE, Optimum, best_rate
from calibrate.diagnose.picture import averaged
from calibrate.stats import ratio_interval
from calibrate.verdict import SMALLEST_MEASURED, Arm, arms
from lora_planner import capacity, units
from lora_planner.arch import from_config
from lora_planner.ledger import Estimate
from lora_planner.record import DIVERGED, OOM, Plot, RunRecord, Series
from lora_planner.render import interval

#: points of a parabola have lost at most this share of the best gain, as in runner/claims/lab.py
NEAR = 0.3
#: rates of a seed below which no parabola is asked for
FEWEST = 3
#: arms beside the first one in a picture
BESIDE_FULL = 4
#: with fewer held-out losses than these the training loss is drawn too
FEW_POINTS = 4
Losses = Mapping[float, float | None]


# ---------------------------------------------------------------- predicted against measured


def out_of_memory(runs: Iterable[RunRecord]) -> list[tuple[str, str, Estimate | None]]:
    """(key, label, predicted peak) of every run that died for memory."""
    return [(run.key, run.spec.label(), run.predicted.get("peak_bytes")) for run in runs if run.status == OOM]


def statuses(runs: Iterable[RunRecord]) -> list[tuple[str, int]]:
    return sorted(Counter(run.status for run in runs).items())


# ---------------------------------------------------------------- arms, seed by seed


@dataclass(frozen=True, slots=True)
class Swept:
    """An arm with its runs and what its learning rates say.

    rate        the best rate with its 95 % interval over seeds (of one seed: endless), where every seed has two finite
                rates on each side of its lowest point, else None
    why_not     what keeps it from that
    loss, curvature   of the parabola, means over seeds
    """

    arm: Arm
    runs: tuple[RunRecord, ...]
    seeds: int
    rate: Estimate | None
    why_not: str = ""
    loss: float = math.nan
    curvature: float = math.nan

    @property
    def is_swept(self) -> bool:
        return len(self.arm.losses) + len(self.arm.diverged) > 1

    @property
    def optimum(self) -> str:
        """What is known of the best rate, in words.

        >>> arm = Arm("base", "task", "full", {1e-3: 2.0}, (), 1)
        >>> Swept(arm, (), 0, None, "at the high edge").optimum
        'no optimum: at the high edge'
        """
        if self.rate is None:
            return f"no optimum: {self.why_not}"
        if self.seeds == 1:
            return f"{units.rate(self.rate.value)}, one seed"
        return interval(self.rate, units.rate)


@dataclass(frozen=True, slots=True)
class Group:
    """Arms of one base and task; those from scratch, whose losses lie elsewhere, are a group of their own."""

    title: str
    arms: tuple[Swept, ...]

    @property
    def tells_of_losses(self) -> bool:
        """Whether it was swept, or a loss was read between start and end."""
        best = [run for a in self.arms if (run := best_run(a))]
        return any(a.is_swept for a in self.arms) or any(len(_held_out(run)) >= FEW_POINTS for run in best)

    def pictures(self, some: Sequence[Swept]) -> list[tuple[str, list[Swept]]]:
        """Arms in pictures of a few, the first arm in each, with titles."""
        if len(some) <= 1 + BESIDE_FULL:
            return [(self.title, list(some))] if some else []
        others, n = some[1:], math.ceil((len(some) - 1) / BESIDE_FULL)
        cuts = [round(i * len(others) / n) for i in range(n + 1)]
        return [
            (f"{self.title} ({i} of {n})", [some[0], *others[a:b]]) for i, (a, b) in enumerate(pairwise(cuts), start=1)
        ]


def groups(runs: Iterable[RunRecord]) -> list[Group]:
    """Every arm of verdict.arms with the runs behind it."""
    known = list(runs)
    behind: dict[tuple[str, str, str], list[RunRecord]] = defaultdict(list)
    for run in known:
        for alone in arms([run]):  # a run by itself is an arm of the same name
            behind[alone.base, alone.task, alone.name].append(run)
    found: dict[tuple[str, str, bool], list[Swept]] = defaultdict(list)
    for arm in arms(known):
        scratch = arm.name.endswith(" from scratch")
        found[arm.base, arm.task, scratch].append(swept(arm, behind[arm.base, arm.task, arm.name]))
    return [
        Group(f"{base}, {task}" + (", from scratch" if scratch else ""), tuple(some))
        for (base, task, scratch), some in found.items()
    ]


def seed_losses(runs: Iterable[RunRecord]) -> dict[int, dict[float, float | None]]:
    """By seed: learning rate -> held-out nats at the end, None where it diverged."""
    ends: dict[tuple[int, float], list[float | None]] = defaultdict(list)
    for run in runs:
        if run.status == DIVERGED or run.final_loss is not None:
            ends[run.spec.seed, run.spec.lr].append(run.final_loss)
    found: dict[int, dict[float, float | None]] = defaultdict(dict)
    for (seed, rate), some in sorted(ends.items()):
        known = [loss for loss in some if loss is not None]
        found[seed][rate] = statistics.fmean(known) if len(known) == len(some) else None
    return dict(found)


def optimum(losses: Losses, start: float) -> Optimum | None:
    """The fitted optimum of one seed, by the rule of our claims: the parabola goes through points that keep most of the
    best gain over `start`; where that one has no lowest point among them, through all neighbours.

    >>> optimum({1e-4: 2.5, 2e-4: 2.1, 4e-4: 2.0, 8e-4: 2.1, 1.6e-3: 2.5}, start=4.0).bracketed
    True
    """
    known = [v for v in losses.values() if v is not None]
    if not known:
        return None
    window = NEAR * (start - min(known))
    near = best_rate(losses, window if window > 0 else None)
    return near if near is None or near.bracketed else best_rate(losses)


def start_of(runs: Iterable[RunRecord]) -> float:
    """Held-out nats before the first step, infinite where no run tells."""
    first = (run.measured["held_out"][0] for run in runs if run.measured.get("held_out"))
    return next((float(v) for step, v in first if step == 0 and v is not None), math.inf)


def swept(arm: Arm, runs: Sequence[RunRecord]) -> Swept:
    """An arm's best rate from the optima of its seeds; a seed with fewer than three rates asks for none."""
    losses = {seed: known for seed, known in seed_losses(runs).items() if len(known) >= FEWEST}
    ordered = tuple(sorted(runs, key=lambda run: (run.spec.seed, run.spec.lr)))
    if not losses:
        return Swept(arm, ordered, 0, None, f"no seed has {FEWEST} rates")
    start = start_of(runs)
    found = {seed: optimum(known, start) for seed, known in losses.items()}
    for seed, one in found.items():
        if reason := _why_not(one):
            return Swept(arm, ordered, len(found), None, reason + (f", seed {seed}" if len(found) > 1 else ""))
    best = [one for one in found.values() if one]
    return Swept(arm, ordered, len(best), ratio_interval([one.log_rate for one in best]), "",
                 statistics.fmean(one.loss for one in best), statistics.fmean(one.curvature for one in best))  # fmt: skip


def _why_not(best: Optimum | None) -> str:
    if best is None:
        return "every rate diverged"
    if best.bracketed:
        return ""
    if best.at_edge:
        return f"at the {best.at_edge} edge"
    for count, side in ((best.finite_left, "below"), (best.finite_right, "above")):
        if count < BESIDE:
            return f"{count or 'no'} rate {side} the best"
    return "no parabola has its lowest point there"


# ---------------------------------------------------------------- the U


def sweep_plots(found: Iterable[Group]) -> list[Plot]:
    """Held-out loss over the learning rate: means over seeds with the seeds' range, fit, optimum with its interval."""
    return [
        Plot(
            title,
            "learning rate",
            "held-out nats per token, mean over seeds" + _note(some),
            tuple(s for arm in some for s in _u(arm)),
            x_log=True,
        )
        for group in found
        for title, some in group.pictures([arm for arm in group.arms if arm.is_swept])
    ]


def _note(some: Sequence[Swept]) -> str:
    return "; cross: diverged, or worse than untrained" if any(_lost(arm) for arm in some) else ""


def _lost(a: Swept) -> list[float]:
    """Rates at which the arm diverged or ended above its start."""
    start = start_of(a.runs)
    return sorted([*a.arm.diverged, *(rate for rate, loss in a.arm.losses.items() if loss > start)])


def _u(a: Swept) -> list[Series]:
    name, lost = f"{a.arm.name}: {a.optimum}", _lost(a)
    means = {rate: loss for rate, loss in sorted(a.arm.losses.items()) if rate not in lost}
    every = seed_losses(a.runs).values()
    spread = {rate: [v for known in every if (v := known.get(rate)) is not None] for rate in means}
    rates, losses = tuple(means), tuple(means.values())
    low, high = (tuple(end(spread[rate]) for rate in rates) for end in (min, max))
    found = [Series(name, rates, losses, low, high, "points")]
    if a.rate is None:
        found.append(Series(name, rates, losses))
    elif rates:
        found += [_parabola(name, a, rates), _optimum(name, a, rates)]
    if lost:
        found.append(Series(name, tuple(lost), (math.inf,) * len(lost), style="points"))
    return found


def _parabola(name: str, a: Swept, rates: Sequence[float]) -> Series:
    """loss + curvature (ln rate - ln best)^2 / 2, among the rates, as far up as the highest of them."""
    assert a.rate
    centre, top = math.log(a.rate.value), max(loss for rate, loss in a.arm.losses.items() if rate in rates)
    reach = math.sqrt(max(0.0, 2 * (top - a.loss) / a.curvature)) if a.curvature > 0 else 0.0
    near = sorted(rates, key=lambda rate: abs(math.log(rate) - centre))[: 2 * BESIDE + 1]
    ends = max(math.log(min(near)), centre - reach), min(math.log(max(near)), centre + reach)
    x = np.linspace(*ends, 33)
    y = a.loss + a.curvature * (x - centre) ** 2 / 2
    return Series(name, tuple(map(float, np.exp(x))), tuple(map(float, y)), style="fit")


def _optimum(name: str, a: Swept, rates: Sequence[float]) -> Series:
    """A line at the loss of the vertex, as long as the interval of its rate, and down from it to the axis; of one seed
    a point. An interval beyond the rates that were tried ends with them."""
    assert a.rate
    if a.seeds == 1:
        return Series(name, (a.rate.value,), (a.loss,), (-math.inf,), (a.loss,), "points")
    ends = max(a.rate.low, min(rates)), min(a.rate.high, max(rates))
    return Series(name, ends, (a.loss,) * 2, (-math.inf,) * 2, (a.loss,) * 2)


# ---------------------------------------------------------------- curves over steps


def best_run(a: Swept) -> RunRecord | None:
    """The run at the arm's best rate, of its first seed."""
    return next((run for run in a.runs if run.spec.lr == a.arm.best[0] and run.final_loss is not None), None)


def loss_plots(found: Iterable[Group]) -> list[Plot]:
    """Held-out loss over steps of each arm's best run; the end of a LoRA run is a band where one was predicted.

    A group that was neither swept nor evaluated on its way, such as short runs that measure time and memory, is left out
    beside others.
    """
    known = list(found)
    plots = []
    for group in [group for group in known if group.tells_of_losses] or known:
        full = next((a for a in group.arms if a.arm.name == "full" and a.arm.losses), None)
        for title, some in group.pictures([a for a in group.arms if best_run(a)]):
            series, words = [], ["held-out nats per token"]
            for arm in some:
                run = best_run(arm)
                assert run
                end = predicted_end(arm, run, full)
                curves = _curves(arm, run, end)
                words += ["dashed: training, averaged"] * any(s.style == "fit" and not s.low for s in curves)
                words += ["band: end predicted from that of full fine-tuning"] * bool(end)
                series += curves
            plots.append(Plot(title, "step", "; ".join(dict.fromkeys(words)), tuple(series)))
    return plots


def predicted_end(a: Swept, run: RunRecord, full: Swept | None) -> Estimate | None:
    """Held-out nats at the end of a LoRA run, where the planner predicts any.

        full fine-tuning's best * (1 + rank penalty)        [nats per token]

    Nothing is predicted of other methods, of models far smaller than any that was measured, or of the way there.
    """
    if full is None or not a.arm.name.startswith("lora r") or run.spec.init != "pretrained":
        return None
    total = from_config(run.config).total
    if total < SMALLEST_MEASURED:
        return None
    penalty, end = capacity.rank_penalty(run.spec.rank, total), full.arm.best[1]
    low, value, high = (end * (1 + share) for share in (penalty.low, penalty.value, penalty.high))
    return Estimate(low, value, high, "nats per token", penalty.basis, penalty.source)


def _curves(a: Swept, run: RunRecord, end: Estimate | None) -> list[Series]:
    name = f"{a.arm.name} at {units.rate(run.spec.lr)}"
    if end:
        name += f", predicted {interval(end, lambda nats: f'{nats:.3f}')}"
    held = _held_out(run)
    steps, nats = (tuple(column) for column in zip(*held, strict=True))
    few = len(held) < FEW_POINTS  # a line between them would be no curve
    found = [Series(name, steps, nats, style="points" if few else "line")]
    train = [(step, float(v)) for step, v in enumerate(run.measured.get("losses") or [], start=1) if v is not None]
    if few and len(train) > 1:
        x, y = zip(*averaged(train, 30), strict=True)
        found.append(Series(name, tuple(x), tuple(y), style="fit"))
    if end:
        reach = (0.92 * steps[-1], steps[-1])
        found.append(Series(name, reach, (end.value,) * 2, (end.low,) * 2, (end.high,) * 2, "fit"))
    return found


def _held_out(run: RunRecord) -> list[tuple[float, float]]:
    return [(float(step), float(nats)) for step, nats in run.measured.get("held_out") or [] if nats is not None]
