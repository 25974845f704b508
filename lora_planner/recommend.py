"""Enumerate, drop what does not fit, rank, say why. No opinions of its own: those are formulas with a source.

Order: predicted loss first, in classes of `capacity.PENALTY_MARGIN` (plans closer than that are not
told apart), then expected cost (time, where nobody has a price), then the smaller peak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import floor, log

from lora_planner import batch as batches
from lora_planner import capacity
from lora_planner.errors import BadInput, Infeasible, UnsupportedAdapter
from lora_planner.facts import Gpu
from lora_planner.memory import constants, p_fit
from lora_planner.method import Method, method
from lora_planner.params import trainable_params
from lora_planner.plan import Configuration, Job, Plan, Priced, Warning3, loss_penalty, make_plan, price
from lora_planner.rollout import rollout
from lora_planner.room import smallest_change_that_fits
from lora_planner.throughput import stack
from lora_planner.units import duration, gib, usd

METHODS = ("lora", "qlora", "full")
TARGETS = ("all-linear", "mlp", "attention")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
#: the 95 % end of the peak's 90 % interval is inside the GPU's memory
MIN_P_FIT = 0.95
#: plans whose expected cost is within this factor are told apart by their peak memory
SAME_COST = 1.02
NOFIT, LATE, OVERBUDGET = "NOFIT", "LATE", "OVERBUDGET"
RL_TIME: Warning3 = (
    "W-RL-TIME",
    "sampling is in time and cost; computing rewards (a verifier, an environment, a reward model) is not",
    "Time one batch of rewards and add it, or hide it behind sampling.",
)


@dataclass(slots=True)
class Rejected:
    """A configuration that would have been chosen, and why it was not."""

    priced: Priced
    code: str
    reason: str
    fix: str = ""


@dataclass(slots=True)
class Advice:
    """The answer to a job. `plan` is None where nothing is left; then `exit_code` says what was in the way."""

    job: Job
    need: capacity.Need
    rank: capacity.RankAdvice
    batch: batches.BatchAdvice
    plan: Plan | None
    runner_up: Plan | None
    rejected: Rejected | None
    considered: int
    dropped: Counter[str]
    warnings: list[Warning3] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if self.plan:
            return 0
        return 5 if set(self.dropped) == {OVERBUDGET} else 4


def recommend(job: Job) -> Advice:
    """Search every method, target set, rank, micro-batch and checkpointing over the job's GPUs."""
    check(job)
    need = job.need()
    per_rank = trainable_params(job.model, method("lora", 512, experts=job.experts)) / 512
    rank = capacity.recommend_rank(need, job.model.total, per_rank)
    batch = batches.recommend_batch(job.data.examples, job.epochs, max(1, job.data.p50))
    feasible: list[tuple[tuple[float, ...], Priced]] = []
    rejected: list[tuple[tuple[float, ...], Rejected]] = []
    for c in candidates(job, rank.rank, batch.batch):
        length = job.padded_length(c.micro_batch)
        found = price(c, job.book, job.data.examples * job.epochs * length)
        order = order_of(job, need, found)
        refusal = refusal_of(job, found)
        if refusal:
            rejected.append((order, refusal))
        else:
            feasible.append((order, found))
    feasible.sort(key=lambda pair: pair[0])
    rejected.sort(key=lambda pair: pair[0])
    chosen = [found for _, found in feasible]
    plan = make_plan(job, chosen[0].configuration, batch) if chosen else None
    other = next((p for p in chosen if _kind(p) != _kind(chosen[0])), None)
    # what could not be done at all says more than another way to cut up a step that can
    possible = {_kind(found) for found in chosen}
    refused = next((r for _, r in rejected if _kind(r.priced) not in possible), rejected[0][1] if rejected else None)
    if refused and refused.code == NOFIT:  # shown as it came closest to fitting
        same = [r for _, r in rejected if _kind(r.priced) == _kind(refused.priced)]
        refused = max(same, key=lambda r: r.priced.p_fit or 0.0)
    advice = Advice(
        job,
        need,
        rank,
        batch,
        plan,
        make_plan(job, other.configuration, batch) if other else None,
        refused,
        len(feasible) + len(rejected),
        Counter(refusal.code for _, refusal in rejected),
    )
    if advice.rejected:
        advice.rejected.fix = _fix(advice.rejected)
    advice.warnings.extend(_warnings(advice))
    return advice


def candidates(job: Job, rank: int, batch: int) -> Iterator[Configuration]:
    """Every configuration worth a price: the recommended rank, and the next one that servers take."""
    at = capacity.SERVABLE_RANKS.index(rank)
    ranks = capacity.SERVABLE_RANKS[at : at + 2]
    longest = job.longest
    seen: set[Method] = set()
    for name, targets, r in product(METHODS, TARGETS, ranks):
        try:
            chosen = method(name, r, targets=(targets,), experts=job.experts)
            trainable_params(job.model, chosen)
        except UnsupportedAdapter:
            continue  # a rank wider than a narrow model, or a model without this kind of matrix
        if chosen in seen:
            continue  # full fine-tuning has no rank
        seen.add(chosen)
        for gpu, micro, checkpointing in product(job.gpus, MICRO_BATCHES, ("none", "full")):
            if micro > batch:
                continue
            yield Configuration(
                job.model,
                chosen,
                gpu,
                micro,
                max(1, round(job.padded_length(micro))),
                batches.accumulate(batch, micro).steps,
                checkpointing,
                longest=longest,
                sampling=job.sampling,
            )


def order_of(job: Job, need: capacity.Need, found: Priced) -> tuple[float, ...]:
    """What is better sorts first: loss class, cost class, peak memory."""
    c = found.configuration
    over = 0
    if not c.method.is_full:
        held = capacity.capacity(job.model.total, found.trainable)
        over = 10 * (need.bits.low > held.high)
    loss = floor(loss_penalty(job, c.method).value / capacity.PENALTY_MARGIN) + over
    spent = found.cost.usd.value if found.cost else found.run_s.value if found.run_s else 0.0
    peak = found.memory.peak.value if found.memory else 0.0
    return loss, floor(log(max(spent, 1e-12)) / log(SAME_COST)), peak


def refusal_of(job: Job, found: Priced) -> Rejected | None:
    """The first constraint a configuration breaks, with both numbers."""
    c = found.configuration
    assert c.gpu and found.memory and found.run_s and found.p_fit is not None
    if found.rollout and not found.rollout.fits:
        room, need = found.rollout.allowed_bytes, found.rollout.minimum
        return Rejected(
            found, NOFIT, f"sampling does not fit: {gib(need.value)} [{gib(need.low)}, {gib(need.high)}] for one sample "
            f"beside the trainer, of {gib(room)} that the engine may use",
        )  # fmt: skip
    if found.p_fit < MIN_P_FIT:
        peak = found.memory.peak
        return Rejected(
            found, NOFIT,
            f"does not fit: peak {gib(peak.value)} [{gib(peak.low)}, {gib(peak.high)}] of "
            f"{gib(c.gpu.memory_bytes)}, P(fit) {found.p_fit:.2f}",
        )  # fmt: skip
    if job.deadline_s and found.run_s.value > job.deadline_s:
        return Rejected(
            found, LATE, f"late: {duration(found.run_s.value)} for a deadline of {duration(job.deadline_s)}"
        )
    if job.budget_usd and found.cost and found.cost.usd.value > job.budget_usd:
        return Rejected(found, OVERBUDGET, f"over budget: {usd(found.cost.usd.value)} of {usd(job.budget_usd)}")
    return None


def _kind(found: Priced) -> tuple[object, ...]:
    """Two plans of one kind differ only in how the step is cut up."""
    c = found.configuration
    return c.method, c.gpu.name if c.gpu else ""


def _fix(refused: Rejected) -> str:
    """The smallest change that would have made it fit."""
    c, sampled = refused.priced.configuration, refused.priced.rollout
    if refused.code != NOFIT or c.gpu is None:
        return ""
    if sampled and p_fit(sampled.minimum, sampled.allowed_bytes) < MIN_P_FIT:
        if sampled.engine_bytes and sampled.minimum.high - sampled.engine_bytes < sampled.allowed_bytes:
            return "sample with the trainer's model: --engine hf"
        return "" if sampled.engine_bytes else "allow shorter answers: --max-length"
    change = smallest_change_that_fits(
        c.model,
        c.method,
        c.gpu.memory_bytes,
        micro_batch=c.micro_batch,
        seq_len=max(c.seq_len, c.longest),
        checkpointing=c.checkpointing,
        attention=c.attention,
        min_p_fit=MIN_P_FIT,
        known=constants(c.gpu.name, c.stack),
    )
    return str(change) if change else ""


def check(job: Job) -> None:
    if not job.gpus:
        raise BadInput("no GPU to plan for", "--gpu", "Name at least one; `lora-plan gpus` lists them.")
    if job.budget_usd is not None and not 0 < job.budget_usd < float("inf"):
        raise Infeasible(
            f"nothing costs {job.budget_usd:g} USD", "--budget", "Give a positive number, or leave it out."
        )
    if job.deadline_s is not None and not 0 < job.deadline_s < float("inf"):
        raise Infeasible("the deadline is in the past", "--deadline", "Give hours from now, above 0.")
    if not 0 < job.epochs <= 1e6:
        raise BadInput(f"{job.epochs:g} epochs are no run", "--epochs", "Use a positive number.")


def _warnings(advice: Advice) -> Iterator[Warning3]:
    job, plan = advice.job, advice.plan
    for text in job.model.warnings:
        yield "W-MODEL", text, "See `lora-plan models`, or check the files."
    for text in job.data.warnings:
        yield "W-DATA", text, "Give --data and --tokenizer for exact counts."
    for text in (*advice.rank.warnings, *advice.batch.warnings):
        yield "W-SCIENCE", text, "`lora-plan explain capacity` and `explain batch` show the sources."
    if plan is None:
        return
    yield from plan.priced.warnings
    if plan.priced.memory:
        for text in plan.priced.memory.warnings:
            yield "W-MEMORY", text, "`lora-plan explain memory` shows every term."
    bill, run = plan.priced.cost, plan.priced.run_s
    if bill is None:
        name = _gpu(plan).name
        yield "W-NO-PRICE", f"no price for {name}", "Pass --prices FILE with a row for it."
    elif bill.stale:
        yield ("W-STALE-PRICE", f"{bill.stale} of {len(bill.rows)} prices are older than 30 days (up to "
               f"{bill.oldest_days} days)", "Pass --prices FILE with today's.")  # fmt: skip
    if job.deadline_s and run and run.high > job.deadline_s:
        yield "W-DEADLINE", f"the slow end, {duration(run.high)}, misses the deadline", "Plan for a faster GPU."
    if job.budget_usd and bill and bill.usd.high > job.budget_usd:
        yield "W-BUDGET", f"the dear end, {usd(bill.usd.high)}, exceeds the budget", "Fix a price with --prices."
    if job.rl:
        yield RL_TIME
        yield from _small_house(plan)
        step = plan.accumulation.effective
        if step % job.group:
            yield ("W-RL-GROUP", f"a step of {step} samples holds no whole number of groups of {job.group}",
                   f"Use a --group that divides {plan.batch.batch}: trainers refuse a broken group.")  # fmt: skip


#: samples in flight by which a step of few samples is judged
MANY = 8


def _small_house(plan: Plan) -> Iterator[Warning3]:
    """Decoding reads all weights for every token of a few samples: what more of them at once would save."""
    found, c = plan.priced, plan.configuration
    if not (found.rollout and c.sampling and c.gpu and found.rollout.fits):
        return
    many = MANY * c.samples_per_step
    more = rollout(c.model, c.method, c.gpu, c.sampling, many, stack(c.stack, c.gpu), found.rollout.resident)
    saved = 1 - more.ledger.total / MANY / found.rollout.ledger.total
    if saved > 0.25:
        yield ("W-RL-BATCH", f"sampling {c.samples_per_step} at a time reads all weights for few tokens: {many} at a time would take "
               f"{saved:.0%} less time a sample", "Sample for several steps at once (TRL: steps_per_generation); the later ones "
               "then train on samples of an older policy.")  # fmt: skip


def _gpu(plan: Plan) -> Gpu:
    assert plan.configuration.gpu
    return plan.configuration.gpu
