"""C09. Short runs want a higher ratio of LoRA's rate to full fine-tuning's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import one_sided, ratio_interval
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import SIZES, Size
from runner.claims.shared import LWR, count, full, log_rates, lora, margin_nats, sharp, unready
from runner.claims.shared import specs as sweep

RANK = 16
SENTENCE = "In a short run LoRA's best rate is a larger multiple of full fine-tuning's than in a long one."
SOURCE = LWR + ", 'Parametrization': B starts at zero and has to grow"
PUBLISHED = "about 15 below some 100 steps, falling to 10: 1.5 times, told as anecdotal"
UNIT = "ratio of ratios"
METRIC = f"(best LoRA rate / best full rate) at the short step over the same at the last one, rank {RANK}"
RULE = ("Holds if it is above 1 (one-sided t test over seeds, 5 %); fails if it is below 1 likewise; else undecided. "
        "Both steps are read off the same runs, whose rate is constant. Control: at both steps, in both arms, a rate off by "
        "a factor of 2 must cost more than 0.5 % of the loss.")  # fmt: skip
TRAPS = (4, 5, 7, 13)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return sweep(size, runs, (RANK,), steps=(None, size.short))


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    designs = [full(s), lora(s, RANK)]
    for step in (None, s.short):
        if (missing := unready("C09", runs, designs, step=step)) is not None:
            return missing
    at = {step: [a - b for a, b in zip(log_rates(runs, designs[1], step=step), log_rates(runs, designs[0], step=step),
                                       strict=True)] for step in (s.short, None)}  # fmt: skip
    logs = [a - b for a, b in zip(at[s.short], at[None], strict=True)]
    effect = replace(ratio_interval(logs), unit=UNIT)
    above, below = one_sided(logs), one_sided(logs, greater=False)
    checks = [sharp(runs, designs, margin_nats(runs, s), step=step) for step in (s.short, None)]
    seen = all(found for found, _ in checks)
    status = UNDECIDED if not seen else HOLDS if above < 0.05 else FAILS if below < 0.05 else UNDECIDED
    short, long = ratio_interval(at[s.short]), ratio_interval(at[None])
    sentence = f"ratio {short.value:.1f} after {s.short} steps, {long.value:.1f} after {s.steps}"
    moved = [ratio_interval([a - b for a, b in zip(log_rates(runs, d, step=s.short), log_rates(runs, d), strict=True)]).value
             for d in designs]  # fmt: skip
    sentence += f"; best rates after {s.short} over after {s.steps} steps: full {moved[0]:.2f}, LoRA {moved[1]:.2f}"
    control = "; ".join(
        f"after {step} steps {told}" for step, (_, told) in zip((s.short, s.steps), checks, strict=True)
    )
    return Verdict("C09", status, sentence, effect, count(runs, designs), p=min(above, below), control=control,
                   plot=over_steps(runs, s, designs))  # fmt: skip


def over_steps(runs: Sequence[RunRecord], size: Size, designs: Sequence[RunSpec]) -> Plot:
    """The ratio at every step at which both optima are bracketed in every seed."""
    found: dict[int, tuple[float, float, float]] = {}
    for step in (*size.eval_at, size.steps):
        if unready("C09", runs, designs, step=step) is None:
            logs = [a - b for a, b in zip(log_rates(runs, designs[1], step=step),
                                          log_rates(runs, designs[0], step=step), strict=True)]  # fmt: skip
            ratio = ratio_interval(logs)
            found[step] = (ratio.value, ratio.low, ratio.high)
    values, lows, highs = zip(*found.values(), strict=True) if found else ((), (), ())
    series = Series("LoRA / full", tuple(map(float, found)), tuple(values), tuple(lows), tuple(highs))
    return Plot("ratio of the best rates by length of the run", "steps", "ratio", (series,), True, True)
