"""What `lora-plan recommend --json` wrote, read back: every value checked, as a plan may come from anybody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lora_planner import units
from lora_planner.budget import RATES, Part
from lora_planner.capacity import PENALTY_MARGIN
from lora_planner.checked import MAX_NUMBER, Node, plan_hash
from lora_planner.checkpoint import read_argument
from lora_planner.errors import BadInput, Infeasible, OverBudget
from lora_planner.facts import COMMITMENTS, MAX_USD_PER_GPU_HOUR, Price
from lora_planner.ledger import ASSUMED, EXACT, Estimate, exact
from lora_planner.recommend import SAME_COST
from lora_planner.render import SCHEMA, interval

MAX_BYTES = 8 << 20
MADE_BY = "Make it with `lora-plan recommend ... --json > plan.json`."
#: bytes a parameter of a base on disk; what nearly all are published in
BF16 = 2


@dataclass(frozen=True, slots=True)
class Assumed:
    """One number that the report stands on."""

    what: str
    value: str
    basis: str
    source: str
    as_of: str
    change: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """What was not chosen, and why."""

    plan: str
    gpu: str
    peak: str
    time: str
    cost: str
    why: str


@dataclass(frozen=True, slots=True)
class Sheet:
    """A plan as a reader needs it. `part`: what of it costs money."""

    part: Part
    data: str
    method: str
    sha256: str  # checked.plan_hash
    parameters: float
    trainable: float
    adapter_bytes: float
    lr: Estimate
    rates: tuple[float, ...]
    batch: str
    steps: float
    schedule: str
    peak: Estimate
    peak_phase: str
    p_fit: float
    card_bytes: float
    phases: tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
    step_s: Estimate
    capacity: tuple[str, Estimate, Estimate] | None  # verdict, need, capacity; None for full fine-tuning
    penalty: Estimate
    reasons: tuple[str, ...]
    alternatives: tuple[Alternative, ...]
    considered: str
    assumed: tuple[Assumed, ...]
    warnings: tuple[tuple[str, str, str], ...]
    seen: Estimate | None  # what the need grows with: trained tokens, each once, or RL episodes


def read(path: str) -> dict[str, Any]:
    """The document in a plan file, or on stdin as `-`."""
    return read_argument(path, MAX_BYTES)


def sheet(document: Mapping[str, Any], where: str) -> Sheet:
    """The recommended plan of a document, or an error that says what is missing."""
    top = Node(dict(document), where, fix=MADE_BY)
    if document.get("schema_version") != SCHEMA:
        raise top.at("schema_version").refuse(f"{SCHEMA}")
    result = top.at("result")
    if not isinstance(result.value, dict):
        raise result.refuse("a plan")
    plan = result.at("recommended")
    if "recommended" not in result.value:
        raise BadInput("no plan in it, though it is one of our documents", where, MADE_BY)
    if not plan.there:
        why = result.at("rejected.reason").text("nothing fits") if result.at("rejected").there else "nothing fits"
        error = OverBudget if document.get("exit_code") == 5 else Infeasible
        raise error(f"the plan has nothing to run: {why}", where, "Change what is in the way, then plan again.")
    part = _part(result, plan)
    lr = plan.at("learning_rate")
    verdict = None
    if plan.at("capacity").there:
        c = plan.at("capacity")
        verdict = c.at("verdict").text(), c.at("need").estimate(), c.at("capacity").estimate()
    phases = tuple(
        (name, tuple((t.at("name").text(), t.at("value").number(-MAX_NUMBER)) for t in phase.at("terms")))
        for name, phase in plan.at("memory.phases").items()
    )
    step = plan.at("step")
    return Sheet(
        part,
        _data(result),
        method_text(plan.at("method")),
        plan_hash(result.value),
        plan.at("params.total").number(1),
        plan.at("params.trainable").number(1),
        plan.at("params.file_bytes").number(),
        lr.at("lr").estimate(positive=True),
        tuple(rate.number() for rate in lr.at("sweep")),
        f"{plan.at('batch.batch').number(1):.0f} = {step.at('micro_batch').number(1):.0f} x "
        f"{step.at('accumulation').number(1):.0f}, checkpointing {step.at('checkpointing').text()}",
        part.steps,
        lr.at("schedule").text().split(" (")[0],
        plan.at("memory.peak_bytes").estimate(positive=True),
        plan.at("memory.peak_phase").text(),
        plan.at("memory.p_fit").number(0, 1),
        plan.at("gpu.memory_bytes").number(1),
        phases,
        plan.at("time.step_s").estimate(positive=True),
        verdict,
        plan.at("loss_penalty").estimate(),
        tuple(r.text() for r in (*result.at("rank.reasons"), *plan.at("batch.advice.reasons"))),
        tuple(_alternatives(result, plan)),
        _considered(result),
        tuple(_assumed(top, result, plan)),
        tuple((w.at("code").text(), w.at("msg").text(), w.at("fix").text("")) for w in top.at("warnings")),
        _seen(result),
    )


def _seen(result: Node) -> Estimate | None:
    """Trained tokens of one epoch, or episodes of all; None where the plan does not say."""
    job, tokens = result.at("job"), result.at("data.trained_tokens")
    if job.there and job.at("objective").value == "rl":
        episodes = job.at("problems").number(1) * job.at("group").number(1) * job.at("epochs").number(1e-6)
        return exact(episodes, "episodes")
    return replace(tokens.estimate(positive=True), unit="trained tokens") if tokens.there else None


def _part(result: Node, plan: Node) -> Part:
    steps, examples = plan.at("batch.steps").number(1), result.at("data.examples").number(1)
    epochs = steps * plan.at("batch.batch").number(1) / examples
    return Part(
        plan.at("model.name").text(),
        plan.at("gpu.name").text(),
        plan.at("time.run_s").estimate(positive=True),
        steps,
        sum(1 for _ in plan.at("learning_rate.sweep")) or RATES,
        plan.at("method.name").text() == "full",
        result.at("data.tokens").estimate(positive=True).scaled(epochs),
        plan.at("params.file_bytes").number(),
        _optimizer_bytes(plan),
        plan.at("params.total").number(1) * BF16,
        tuple(_price(row) for row in plan.at("cost.prices")) if plan.at("cost").there else (),
    )


def _optimizer_bytes(plan: Node) -> float:
    terms = plan.at("memory.phases.optimizer.terms")
    return sum(t.at("value").number() for t in terms if t.at("name").value == "optimizer states")


def _price(row: Node) -> Price:
    commitment = row.at("commitment").text()
    if commitment not in COMMITMENTS:
        raise row.at("commitment").refuse(f"one of {', '.join(COMMITMENTS)}")
    usd = row.at("usd_per_gpu_hour").number(1e-6, MAX_USD_PER_GPU_HOUR)
    basis = row.at("basis").text(EXACT)
    if basis not in (EXACT, ASSUMED):
        raise row.at("basis").refuse(f"{EXACT} or {ASSUMED}")
    return Price(row.at("gpu").text(), usd, row.at("provider").text(), commitment, row.at("source").text(), row.at("as_of").day(),
                 basis)  # fmt: skip


def method_text(method: Node) -> str:
    """ "LoRA r16, all-linear" """
    name = method.at("name").text()
    if name == "full":
        return "full fine-tuning"
    shown = {"lora": "LoRA", "qlora": "QLoRA", "rslora": "rsLoRA", "dora": "DoRA", "lora-fa": "LoRA-FA"}
    targets = ",".join(t.text() for t in method.at("targets"))
    return f"{shown.get(name, name)} r{method.at('rank').number():.0f}, {targets}"


def _data(result: Node) -> str:
    data = result.at("data")
    tokens = interval(data.at("tokens").estimate(), units.count)
    return f"{data.at('path').text('') or 'a number of tokens'}: {data.at('examples').number():,.0f} examples, {tokens} tokens"


def _row(plan: Node, why: str) -> Alternative:
    cost = units.usd(plan.at("cost.usd.value").number()) if plan.at("cost").there else ""
    return Alternative(
        method_text(plan.at("method")), plan.at("gpu.name").text(), units.gib(plan.at("memory.peak_bytes.value").number()),
        units.duration(plan.at("time.run_s.value").number()), cost, why,
    )  # fmt: skip


def _alternatives(result: Node, plan: Node) -> Iterator[Alternative]:
    other, rejected = result.at("runner_up"), result.at("rejected")
    if other.there:
        yield _row(other, _why_not(plan, other))
    if rejected.there:
        fix = rejected.at("fix").text("")
        why = f"{rejected.at('code').text()}: {rejected.at('reason').text()}"
        yield _row(rejected.at("plan"), f"{why}; {fix}" if fix else why)


def _why_not(plan: Node, other: Node) -> str:
    """By which of recommend's three orders the runner-up comes second: loss, cost, memory."""
    loss, its_loss = (p.at("loss_penalty.value").number() for p in (plan, other))
    if its_loss // PENALTY_MARGIN > loss // PENALTY_MARGIN:
        return f"second: predicted loss {units.percent(its_loss)} above full fine-tuning, not {units.percent(loss)}"
    place, form = ("cost.usd.value", units.usd) if plan.at("cost").there else ("time.run_s.value", units.duration)
    spent, its = (p.at(place).number() for p in (plan, other))
    if its > spent * SAME_COST:
        return (
            f"second: {form(its)} instead of {form(spent)}, and no loss to gain above {units.percent(PENALTY_MARGIN)}"
        )
    return f"second: within {units.percent(PENALTY_MARGIN)} of loss and {SAME_COST - 1:.0%} of cost, but it needs more memory"


def _considered(result: Node) -> str:
    dropped = ", ".join(f"{n.number():,.0f} {code}" for code, n in result.at("dropped").items()) or "none"
    return f"{result.at('considered').number():,.0f} configurations considered; dropped: {dropped}"


def _assumed(top: Node, result: Node, plan: Node) -> Iterator[Assumed]:
    model, gpu = plan.at("model"), plan.at("gpu")
    yield Assumed(
        "parameters", f"{plan.at('params.total').number():,.0f}", EXACT, model.at("source").text(""), "", "--model"
    )
    data = result.at("data")
    tokens = data.at("tokens").estimate()
    template = data.at("template").text("")
    yield Assumed("tokens of an epoch", interval(tokens, units.count), tokens.basis, template or tokens.source, "",
                  "--tokenizer")  # fmt: skip
    yield Assumed("memory of the GPU", units.gib(gpu.at("memory_bytes").number()), "published", gpu.at("source").text(""),
                  gpu.at("as_of").text(""), "--gpu")  # fmt: skip
    peak, step = plan.at("memory.peak_bytes").estimate(), plan.at("time.step_s").estimate()
    yield Assumed("peak memory", interval(peak, units.gib), peak.basis, peak.source, "", "lora-plan calibrate")
    time_source = next(
        (r.at("source").text("") for r in top.at("provenance") if r.at("key").value == "time"), step.source
    )
    yield Assumed("time of a step", interval(step, units.duration), step.basis, time_source, "", "lora-plan calibrate")
    lr = plan.at("learning_rate.lr").estimate()
    yield Assumed("learning rate", interval(lr, units.rate), lr.basis, lr.source, "", "the sweep")
    penalty = plan.at("loss_penalty").estimate()
    yield Assumed(
        "loss above full fine-tuning", interval(penalty, units.percent), penalty.basis, penalty.source, "", "seeds"
    )
    if not plan.at("capacity").there:
        return
    need = plan.at("capacity.need").estimate()
    yield Assumed("to learn, at most", interval(need, units.bits), need.basis, need.source, "", "--first-epoch-loss")
    for j in plan.at("capacity.judgements"):
        held, source = j.at("capacity").estimate(), j.at("source")
        if source.at("counts").text() == "description bits":
            yield Assumed(f"adapter holds, {source.at('name').text()}", interval(held, units.bits), held.basis,
                          f"{source.at('source').text()}; {source.at('regime').text()}", "", "")  # fmt: skip
