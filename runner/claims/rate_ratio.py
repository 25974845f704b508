"""C07. The best learning rate of LoRA is about ten times that of full fine-tuning, at every width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from calibrate.stats import one_sided, ratio_interval, slope_by_group
from lora_planner.record import FAILS, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict
from runner.claims.lab import FEW, SEEDS, SIZES, Size, grid, of_arm
from runner.claims.shared import LWR, count, full, log_rates, lora, margin_nats, sharp, unready

ACCEPTED = (7.0, 14.0)
RANK = 16
SENTENCE = "LoRA's best learning rate is about ten times that of full fine-tuning, whatever the model's width."
SOURCE = LWR + ", 'Optimal learning rate and rank'"
PUBLISHED = ("9.8 over 14 models, no trend with width; 10 and 20 (Biderman et al. 2024), 10, 8.8 and 4.8 at rank 256, "
             "16 and 1 (kenkuuu), 3.5 to 5 in RL; theory: sqrt(width) (arXiv 2602.06204) or width / 64")  # fmt: skip
UNIT = "ratio"
METRIC = f"fitted best rate of LoRA at rank {RANK} over that of full fine-tuning, main width, last step"
RULE = ("Holds if the 95 % t interval over seeds lies inside 7 to 14; fails if it lies outside; else undecided. "
        "Beside it the exponent of the width over three widths at one earlier step, three seeds. "
        "Control: in both arms a rate off by a factor of 2 must cost more than 0.5 % of the loss.")  # fmt: skip
TRAPS = (1, 2, 4, 5, 6, 7, 9, 11)


def at_width(size: Size, base: str) -> tuple[RunSpec, RunSpec]:
    """Full and LoRA on this width; other widths than the main one run only as far as they are compared."""
    if base == size.base:
        return full(size), lora(size, RANK)
    early = tuple(step for step in size.eval_at if step < size.compared_at)
    words = {"base": base, "steps": size.compared_at, "eval_at": early}
    return replace(full(size), **words), replace(lora(size, RANK), **words)


def specs(size: Size, runs: Sequence[RunRecord]) -> list[RunSpec]:
    found = []
    for base in (size.narrow, size.base, size.wide):
        steps = (None, size.compared_at) if base == size.base else (None,)
        for design, rates in zip(at_width(size, base), (size.full_rates, size.lora_rates), strict=True):
            found += grid(runs, design, rates, SEEDS if base == size.base else FEW, steps)
    return found


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    s = SIZES[size]
    designs = [d for base in (s.narrow, s.base, s.wide) for d in at_width(s, base)]
    main = at_width(s, s.base)
    if (missing := unready("C07", runs, main)) is not None:
        return missing
    logs = [a - b for a, b in zip(log_rates(runs, main[1]), log_rates(runs, main[0]), strict=True)]
    ratio = ratio_interval(logs)
    low, high = ACCEPTED
    status = (
        HOLDS
        if low <= ratio.low and ratio.high <= high
        else FAILS
        if ratio.high < low or ratio.low > high
        else UNDECIDED
    )
    inside = max(one_sided(logs, math.log(low)), one_sided(logs, math.log(high), greater=False))
    outside = min(one_sided(logs, math.log(low), greater=False), one_sided(logs, math.log(high)))
    seen, control = sharp(runs, main, margin_nats(runs, s))
    if not seen:
        status = UNDECIDED
    effect = replace(ratio, unit=UNIT)
    by_width, sentence = widths(runs, s)
    lead = f"{ratio.value:.1f} [{ratio.low:.1f}, {ratio.high:.1f}] after {s.steps} steps at rank {RANK}"
    plot = Plot(
        f"ratio of the best rates after {s.compared_at} steps", "hidden size", "LoRA / full", by_width, True, True
    )
    return Verdict("C07", status, f"{lead}; {sentence}", effect, count(runs, designs), p=min(inside, outside),
                   control=control, plot=plot)  # fmt: skip


def widths(runs: Sequence[RunRecord], size: Size) -> tuple[tuple[Series, ...], str]:
    """Ratio by width at the step at which widths are compared, and the exponent over them, seed by seed."""
    found: dict[int, list[float]] = {}
    for base in (size.narrow, size.base, size.wide):
        step = size.compared_at if base == size.base else None
        pair = at_width(size, base)
        if unready("C07", runs, pair, FEW, step) is None:
            hidden = int(of_arm(runs, pair[0])[0].config["hidden_size"])
            one, other = (log_rates(runs, design, FEW, step) for design in (pair[1], pair[0]))
            found[hidden] = [a - b for a, b in zip(one, other, strict=True)]
    if len(found) < 2:
        return (), f"fewer than two widths have both optima after {size.compared_at} steps"
    means = {hidden: ratio_interval(logs) for hidden, logs in found.items()}
    series = Series("ratio", tuple(map(float, means)), tuple(m.value for m in means.values()),
                    tuple(m.low for m in means.values()), tuple(m.high for m in means.values()))  # fmt: skip
    listed = ", ".join(f"{m.value:.1f} at width {hidden}" for hidden, m in means.items())
    text = f"after {size.compared_at} steps {listed}"
    if len(found) == 3:
        x = [math.log(hidden) for hidden in found]
        groups = [(x, [logs[i] for logs in found.values()]) for i in range(len(FEW))]
        power = slope_by_group(groups)
        text += f", exponent of the width {power.value:+.2f} [{power.low:+.2f}, {power.high:+.2f}]"
    return (series,), text
