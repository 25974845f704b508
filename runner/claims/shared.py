"""The sweep that most claims read: full fine-tuning and LoRA of several ranks, each over its learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from calibrate.stats import mean_interval
from lora_planner.record import NOT_RUN, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SEEDS, Size, arm, grid, mean_points, of_arm, optimum, points, start, why_not

LWR = 'Schulman et al. 2025, "LoRA Without Regret", thinkingmachines.ai/blog/lora'
#: two losses within this share of the reference's are the same for a user
MARGIN = 0.005
#: factor by which a rate of the sharpness control is off
OFF = 2.0


def full(size: Size) -> RunSpec:
    return arm(size)


def lora(size: Size, rank: int) -> RunSpec:
    return arm(size, "lora", rank)


def specs(size: Size, runs: Sequence[RunRecord], ranks: Sequence[int], steps: Sequence[int | None] = (None,),
          ) -> list[RunSpec]:  # fmt: skip
    """Full fine-tuning and these ranks, each at all the rates that its optimum needs at each of `steps`."""
    found = grid(runs, full(size), size.full_rates, steps=steps)
    for rank in ranks:
        found += grid(runs, lora(size, rank), size.lora_rates, steps=steps)
    return found


def unready(claim: str, runs: Sequence[RunRecord], designs: Sequence[RunSpec], seeds: Sequence[int] = SEEDS,
            step: int | None = None) -> Verdict | None:  # fmt: skip
    """Not run, or undecided, where an arm's optimum is not known; None where every arm has one in every seed."""
    if not any(of_arm(runs, design) for design in designs):
        return Verdict(claim, NOT_RUN, "no run of it in these records")
    for design in designs:
        if reason := why_not(runs, design, seeds, step):
            return Verdict(
                claim, UNDECIDED, reason, n=count(runs, designs, seeds), plot=u_curves(runs, designs, seeds, step)
            )
    return None


def count(runs: Sequence[RunRecord], designs: Sequence[RunSpec], seeds: Sequence[int] = SEEDS) -> int:
    """Runs that ended, of the judged seeds."""
    return sum(run.is_final and run.spec.seed in seeds for design in designs for run in of_arm(runs, design))


def name(design: RunSpec) -> str:
    return "full" if design.method == "full" else f"{design.method} r{design.rank}"


def best_run(runs: Sequence[RunRecord], design: RunSpec, seed: int) -> RunRecord:
    """The run at the lowest point of this seed's grid; only for arms that are not `unready`."""
    known = {rate: loss for rate, loss in points(runs, design, seed).items() if loss is not None}
    sign = -1.0 if design.objective == "rl" else 1.0
    rate = min(known, key=lambda r: sign * known[r])
    return next(run for run in of_arm(runs, design) if run.spec.seed == seed and run.spec.lr == rate)


def held_out(run: RunRecord) -> list[tuple[int, float]]:
    return [(int(step), float(value)) for step, value in run.measured.get("held_out", []) if value is not None]


def tuned_losses(runs: Sequence[RunRecord], design: RunSpec, seeds: Sequence[int] = SEEDS, step: int | None = None,
                 ) -> list[float]:  # fmt: skip
    """Each seed's loss at the vertex of its parabola (rewards come back as rewards)."""
    sign = -1.0 if design.objective == "rl" else 1.0
    return [sign * best.loss for seed in seeds if (best := optimum(runs, design, seed, step))]


def log_rates(runs: Sequence[RunRecord], design: RunSpec, seeds: Sequence[int] = SEEDS, step: int | None = None,
              ) -> list[float]:  # fmt: skip
    return [best.log_rate for seed in seeds if (best := optimum(runs, design, seed, step))]


def margin_nats(runs: Sequence[RunRecord], size: Size, seeds: Sequence[int] = SEEDS) -> float:
    """0.5 % of full fine-tuning's tuned loss, known before any comparison with it."""
    return MARGIN * mean_interval(tuned_losses(runs, full(size), seeds)).value


def sharp(runs: Sequence[RunRecord], designs: Sequence[RunSpec], margin: float, seeds: Sequence[int] = SEEDS,
          step: int | None = None) -> tuple[bool, str]:  # fmt: skip
    """A control for best rates: by the fitted parabolas a rate off by a factor of OFF costs more than the margin in every
    arm, in the mean over seeds. Where it does not, the U is too flat to say where its lowest point lies.

        cost = curvature ln(OFF)^2 / 2        [nats]
    """
    best = [[b for seed in seeds if (b := optimum(runs, design, seed, step))] for design in designs]
    costs = [mean_interval([b.curvature * math.log(OFF) ** 2 / 2 for b in row]).value for row in best]
    seen = min(costs) > margin
    return seen, (f"a rate off by a factor of {OFF:g} costs at least {min(costs):.3f} nats, margin {margin:.3f}: "
                  + ("found" if seen else "not found"))  # fmt: skip


def u_curves(runs: Sequence[RunRecord], designs: Sequence[RunSpec], seeds: Sequence[int] = SEEDS,
             step: int | None = None, title: str = "", y_label: str = "held-out nats per token") -> Plot:  # fmt: skip
    """Loss over the learning rate, a line an arm, the seeds' range as its band; what lost more than it began with
    is left out of the picture, never of the fit."""
    series = []
    for design in designs:
        ceiling = start(runs, design) if of_arm(runs, design) and design.objective != "rl" else math.inf
        mean = {r: v for r, v in mean_points(runs, design, seeds, step).items() if v is not None and v <= ceiling}
        every = [points(runs, design, seed, step) for seed in seeds]
        spread = {r: [p[r] for p in every if p.get(r) is not None] for r in mean}
        label = name(design) + (f", {design.base}" if len({d.base for d in designs}) > 1 else "")
        series.append(Series(label, tuple(mean), tuple(mean.values()), tuple(min(v) for v in spread.values()),  # type: ignore[type-var]
                             tuple(max(v) for v in spread.values())))  # type: ignore[type-var]  # fmt: skip
    return Plot(title or "loss by learning rate", "learning rate", y_label, tuple(series), x_log=True)


def curves_plot(runs: Sequence[RunRecord], designs: Sequence[RunSpec], seed: int = SEEDS[0], title: str = "") -> Plot:
    """Held-out loss over steps of each arm's best run of one seed."""
    series = []
    for design in designs:
        path = held_out(best_run(runs, design, seed))[1:]
        series.append(Series(name(design), tuple(float(s) for s, _ in path), tuple(v for _, v in path)))
    return Plot(title or "held-out loss over steps", "step", "held-out nats per token", tuple(series), x_log=True)
