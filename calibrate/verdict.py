"""What a set of runs says: the table of arms, and a verdict on each thing that the planner predicted."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lora_planner import capacity
from lora_planner.arch import from_config
from lora_planner.ledger import FITTED, Estimate
from lora_planner.method import DEFAULT_ALPHA
from lora_planner.predict import PROBE
from lora_planner.record import (
    DIVERGED,
    FAILS,
    HOLDS,
    INVALID,
    NOT_RUN,
    UNDECIDED,
    RunRecord,
    RunSpec,
    Score,
    Verdict,
)

#: share of measurements that a 90 % interval must hold before the prediction is said to hold
COVERED = 0.85
#: a fixed kernel that takes this much more or less after a run than before: clocks or neighbours changed
DRIFT = 0.05
#: the rank penalty was measured on models of 1B parameters and more; a factor of 4 beyond is extrapolation
SMALLEST_MEASURED = 1e9 / 4
LORA_AGAINST_FULL = "LoRA against full"


@dataclass(frozen=True, slots=True)
class Arm:
    """One method and rank on one base and task: held-out nats by learning rate, means over seeds."""

    base: str
    task: str
    name: str
    losses: dict[float, float]  # of rates at which no seed diverged
    diverged: tuple[float, ...]
    seeds: int

    @property
    def best(self) -> tuple[float, float]:
        """(learning rate, loss) of the lowest mean, of the grid, not of a fit; infinite where every rate diverged."""
        return min(self.losses.items(), key=lambda item: item[1], default=(math.nan, math.inf))

    @property
    def bracketed(self) -> bool:
        """Whether the best rate has a worse or a diverged one on both sides."""
        rate, _ = self.best
        tried = sorted([*self.losses, *self.diverged])
        return tried[0] < rate < tried[-1]


def arm_name(spec: RunSpec) -> str:
    """What tells an arm from the others of its base and task, the learning rate and the seed apart.

    >>> arm_name(RunSpec("b", "shift", rank=8, targets=("mlp",), alpha=16.0))
    'lora r8 mlp alpha 16'
    """
    words = ["full"]
    if spec.method != "full":
        words = [f"{spec.method} r{spec.rank}"]
        words += [",".join(spec.targets)] if spec.targets != ("all-linear",) else []
        words += [f"alpha {spec.alpha:g}"] if spec.alpha != DEFAULT_ALPHA else []
    return " ".join([*words, *(["from scratch"] if spec.init == "random" else [])])


def arms(runs: Iterable[RunRecord]) -> list[Arm]:
    """Arms in the order full, then by rank; from scratch last. Reruns of one seed are left to the noise floor.

    A rate at which one seed diverged has no loss: the mean of those that survived is none of the rate.
    """
    groups: dict[tuple[str, str, str], list[RunRecord]] = defaultdict(list)
    for run in runs:
        spec = run.spec
        if spec.task != PROBE and spec.objective == "sft" and not spec.repeat:
            data = " ".join([spec.task, *(f"{name} {value}" for name, value in spec.task_args if name != "sha256")])
            shape = f"{data}, {spec.steps} steps of {spec.batch} x {spec.seq_len}"
            groups[spec.base, shape, arm_name(spec)].append(run)
    found = []
    for (base, task, name), some in groups.items():
        diverged = sorted({run.spec.lr for run in some if run.status == DIVERGED})
        by_rate: dict[float, list[float]] = defaultdict(list)
        for run in some:
            if (loss := run.final_loss) is not None and run.spec.lr not in diverged:
                by_rate[run.spec.lr].append(loss)
        if by_rate or diverged:
            means = {rate: statistics.fmean(losses) for rate, losses in sorted(by_rate.items())}
            found.append(Arm(base, task, name, means, tuple(diverged), len({run.spec.seed for run in some})))

    def place(arm: Arm) -> tuple[str, str, bool, int, str]:
        rank = int(arm.name.split(" r")[1].split()[0]) if " r" in arm.name else 0
        return arm.base, arm.task, "scratch" in arm.name, rank, arm.name

    return sorted(found, key=place)


def noise_floor(runs: Iterable[RunRecord]) -> float | None:
    """Largest difference of final losses between runs whose specs differ in `repeat` alone; None without any."""
    groups: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        if (loss := run.final_loss) is not None:
            document = run.spec.to_json()
            document.pop("repeat")
            groups[str(sorted(document.items(), key=str))].append(loss)
    spans = [max(losses) - min(losses) for losses in groups.values() if len(losses) > 1]
    return max(spans) if spans else None


def verdicts(runs: Sequence[RunRecord], scores: Sequence[Score]) -> list[Verdict]:
    """One per prediction. Those of step time and memory are about this machine; those of losses about the paper."""
    sft = [run for run in runs if run.spec.task != PROBE]
    return [counts(scores), timed(runs, scores), covered("peak_bytes", "peak memory", scores),
            pretrained(sft), learned(sft), low_rank(sft)]  # fmt: skip


def counts(scores: Sequence[Score]) -> Verdict:
    """Trainable parameters as planned, to the last one."""
    some = [s for s in scores if s.quantity == "trainable"]
    wrong = [s for s in some if s.measured != s.predicted.value]
    sentence = f"trainable parameters equal the plan in {len(some) - len(wrong)} of {len(some)} runs"
    status = NOT_RUN if not some else FAILS if wrong else HOLDS
    return Verdict("counts", status, sentence, n=len(some), keys=tuple(s.key for s in wrong))


def covered(quantity: str, name: str, scores: Sequence[Score]) -> Verdict:
    """Whether the 90 % interval held what was measured, and by how much the value was off."""
    some = [s for s in scores if s.quantity == quantity]
    if not some:
        return Verdict(name, NOT_RUN, f"no run was measured for {name}")
    inside = [s for s in some if s.covered]
    ratios = sorted(s.ratio for s in some)
    effect = Estimate(ratios[0], statistics.median(ratios), ratios[-1], "measured / predicted", FITTED)
    width = statistics.median(s.predicted.high / max(s.predicted.low, 1e-30) for s in some) ** 0.5
    sentence = (
        f"{name}: {len(inside)} of {len(some)} inside the 90 % interval (typically a factor {width:.2f} either way); "
        f"measured / predicted {effect.value:.2f}, {effect.low:.2f} to {effect.high:.2f}"
    )
    status = HOLDS if len(inside) >= COVERED * len(some) else FAILS
    return Verdict(name, status, sentence, effect, len(some), tuple(s.key for s in some if not s.covered))


def timed(runs: Sequence[RunRecord], scores: Sequence[Score]) -> Verdict:
    """Step time, from runs during which the machine stayed what it was; undecided where most of them did not."""
    calm = {run.key for run in runs if abs(run.measured.get("drift") or 0.0) <= DRIFT}
    some = [s for s in scores if s.quantity == "step_s"]
    kept = [s for s in some if s.key in calm]
    if len(kept) * 2 >= len(some):
        return covered("step_s", "step time", kept)
    sentence = f"the control kernel drifted by over {DRIFT:.0%} in {len(some) - len(kept)} of {len(some)} runs"
    return Verdict("step time", UNDECIDED, sentence, n=len(kept))


def pretrained(runs: Sequence[RunRecord]) -> Verdict:
    """The base knows more than frequencies, and what it knows helps.

    A base of our own: below pairs counted in its own text, on held-out documents of that text; and after
    fine-tuning below the same steps from random weights. A user's: below token frequencies of the new text.
    """
    name = "base is pre-trained"
    some = [run for run in runs if _evaluated(run) and run.spec.init == "pretrained"]
    if not some:
        return Verdict(name, NOT_RUN, "no run tells")
    start = min(run.measured["held_out"][0][1] for run in some)
    facts = some[0].measured.get("task", {})
    story = some[0].measured.get("base", {})
    found = [arm for arm in arms(runs) if arm.losses]
    scratch = [arm.best[1] for arm in found if "scratch" in arm.name]
    tuned = [arm.best[1] for arm in found if arm.name == "full"]
    parts, tests = [], []
    if "bigram_nats" in story:
        parts.append(
            f"on its own text {story['nats']:.3f} nats per token, pairs counted there {story['bigram_nats']:.3f}"
        )
        tests.append(story["nats"] < story["bigram_nats"])
    parts.append(f"on the new text {start:.3f} before fine-tuning")
    if "bigram_nats" in facts:
        parts.append(f"tokens and pairs counted there {facts['unigram_nats']:.3f} and {facts['bigram_nats']:.3f}")
        if not story:
            tests.append(start < facts["unigram_nats"])
    if scratch and tuned:
        parts.append(
            f"full fine-tuning ends at {min(tuned):.3f}, the same steps from random weights at {min(scratch):.3f}"
        )
        tests.append(min(tuned) < min(scratch))
    status = UNDECIDED if not tests else HOLDS if all(tests) else FAILS
    return Verdict(name, status, "; ".join(parts), n=len(some))


def _evaluated(run: RunRecord) -> bool:
    return bool(run.measured.get("held_out"))


def learned(runs: Sequence[RunRecord]) -> Verdict:
    """Every arm's best run ends below its start, by more than the noise of a rerun. Where all of an arm's runs
    diverged it did not learn; where they ended otherwise (out of memory, killed) nobody knows."""
    found = [arm for arm in arms(runs) if "scratch" not in arm.name]
    invalid = [run.key for run in runs if run.status == INVALID]
    if not found and not invalid:
        return Verdict("both arms learn", NOT_RUN, "no arm finished")
    floor = noise_floor(runs)
    starts: dict[str, float] = {}
    for run in runs:
        if run.spec.init == "pretrained" and _evaluated(run):
            starts[run.spec.base] = run.measured["held_out"][0][1]
    worse = [arm.name for arm in found if arm.best[1] >= starts[arm.base] - 2 * (floor or 0.0)]
    noise = "no rerun measured the noise" if floor is None else f"a rerun differs by {floor:.2g}"
    listed = ", ".join(f"{arm.name} {arm.best[1]:.3f}" for arm in found)
    start = ", ".join(f"{value:.3f}" for value in sorted(set(starts.values())))
    asked = {arm_name(run.spec) for run in runs if run.spec.objective == "sft" and run.spec.init == "pretrained"}
    missing = sorted(asked - {arm.name for arm in found})
    status = FAILS if worse or invalid else UNDECIDED if missing else HOLDS
    sentence = f"held-out nats per token from {start} to {listed}; {noise}"
    if worse:
        sentence += f"; not better: {', '.join(worse)}"
    if missing:
        sentence += f"; no run finished: {', '.join(missing)}"
    return Verdict("both arms learn", status, sentence, n=len(runs), keys=tuple(invalid))


def low_rank(runs: Sequence[RunRecord]) -> Verdict:
    """Loss of each rank above full fine-tuning's, each at its own best rate, against the predicted penalty."""
    name = LORA_AGAINST_FULL
    found = [arm for arm in arms(runs) if arm.losses and "scratch" not in arm.name]
    full = {(arm.base, arm.task): arm for arm in found if arm.name == "full"}
    pairs = [(arm, full[arm.base, arm.task]) for arm in found
             if arm.name.startswith("lora r") and (arm.base, arm.task) in full]  # fmt: skip
    if not pairs:
        return Verdict(name, NOT_RUN, "no LoRA arm beside a full one")
    totals = {run.spec.base: from_config(run.config).total for run in runs}
    parts, gaps, outside, edge, extrapolated = [], [], [], [], False
    for arm, reference in pairs:
        gap = arm.best[1] / reference.best[1] - 1
        part = f"{arm.name} {gap:+.1%} at {arm.best[0] / reference.best[0]:.1f}x the rate of full"
        if totals[arm.base] < SMALLEST_MEASURED:
            extrapolated = True
        else:
            gaps.append(gap)
            predicted = capacity.rank_penalty(int(arm.name.split(" r")[1].split()[0]), totals[arm.base])
            part += f" (predicted {predicted.value:.1%} [{predicted.low:.1%}, {predicted.high:.1%}])"
            if not predicted.low <= gap <= predicted.high:
                outside.append(arm.name)
        parts.append(part)
        edge += [a.name for a in (arm, reference) if not a.bracketed]
    if extrapolated:
        parts.append("nothing was predicted: rank penalties were measured on models of 1B parameters and more")
    if edge:
        parts.append(f"best rate at the edge of the grid: {', '.join(sorted(set(edge)))}")
    status = UNDECIDED if extrapolated or edge else FAILS if outside else HOLDS
    effect = Estimate(min(gaps), statistics.median(gaps), max(gaps), "loss above full", FITTED) if gaps else None
    return Verdict(name, status, "; ".join(parts), effect, len(pairs))


def exit_code(found: Iterable[Verdict]) -> int:
    """0 all hold, 7 something failed, 8 something stayed undecided. What nobody predicted (LoRA against full on a
    model far smaller than any that was measured) is shown and counts for nothing."""
    asked = {v.status for v in found if v.claim != LORA_AGAINST_FULL or v.effect}
    return 7 if FAILS in asked else 8 if {UNDECIDED, NOT_RUN} & asked else 0


def arm_table(found: Sequence[Arm]) -> list[str]:
    """Markdown: an arm a row, a rate a column. A base and task on which every arm had one rate tells nothing of rates
    and is left out."""
    swept = {(arm.base, arm.task) for arm in found if len(arm.losses) + len(arm.diverged) > 1}
    found = [arm for arm in found if (arm.base, arm.task) in swept]
    if not found:
        return ["No arm finished at two learning rates."]
    lines: list[str] = []
    for shape in dict.fromkeys((arm.base, arm.task) for arm in found):
        some = [arm for arm in found if (arm.base, arm.task) == shape]
        rates = sorted({rate for arm in some for rate in (*arm.losses, *arm.diverged)})
        lines += [f"{shape[0]}, {shape[1]}, {max(arm.seeds for arm in some)} seed(s):", "",
                  "| arm | " + " | ".join(f"{rate:.1e}" for rate in rates) + " | best |",
                  "|---|" + "---|" * (len(rates) + 1)]  # fmt: skip
        for arm in some:
            cells = ["diverged" if r in arm.diverged else f"{arm.losses[r]:.3f}" if r in arm.losses else ""
                     for r in rates]  # fmt: skip
            edge = "" if arm.bracketed else " (edge)"
            best = f"{arm.best[1]:.3f} at {arm.best[0]:.1e}{edge}" if arm.losses else "none"
            lines.append(f"| {arm.name} | " + " | ".join(cells) + f" | {best} |")
        lines.append("")
    return lines
