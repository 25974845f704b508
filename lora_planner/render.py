"""Plans, ledgers and rows as terminal text or JSON. No arithmetic: what is printed was computed elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_planner import __version__, units
from lora_planner.errors import LoraPlanError
from lora_planner.ledger import Estimate, Ledger, Term

if TYPE_CHECKING:
    from lora_planner.facts import Constant, Gpu
    from lora_planner.plan import Plan, Priced, Warning3
    from lora_planner.recommend import Advice
    from lora_planner.record import Verdict

SCHEMA = 1

# ---------------------------------------------------------------- text that a stranger may have written


def one_line(text: str) -> str:
    """No control characters, no line breaks: what a file name or a config may hide stays visible.

    >>> one_line("a" + chr(27) + "[31mb" + chr(10) + "c")
    'a?[31mb c'
    """
    return "".join(" " if c in "\n\t\r" else c if c.isprintable() else "?" for c in text)


def interval(e: Estimate, form: Callable[[float], str]) -> str:
    """Value with its interval; an exact number has none. A unit that all three share is said once.

    >>> interval(Estimate(1, 2, 3, "USD", "fitted"), units.usd), interval(Estimate(2, 2, 2, "USD", "exact"), units.usd)
    ('$2.00 [$1.00, $3.00]', '$2.00')
    >>> interval(Estimate(60, 90, 300, "s", "fitted"), units.duration)
    '1.5 min [1, 5]'
    """
    low, value, high = form(e.low), form(e.value), form(e.high)
    if low == value == high:
        return value
    unit = value.rpartition(" ")[2]
    if " " in value and low.endswith(" " + unit) and high.endswith(" " + unit):
        low, high = low.removesuffix(" " + unit), high.removesuffix(" " + unit)
    return f"{value} [{low}, {high}]"


FORMS: dict[str, Callable[[float], str]] = {
    "B": units.gib, "s": units.duration, "USD": units.usd, "FLOP/token": units.flops, "bit": units.bits,
    "params": lambda n: f"{n:,.0f}",
}  # fmt: skip


def shown(value: float, unit: str) -> str:
    form = FORMS.get(unit)
    return form(value) if form else f"{value:.4g}"


def place(why: str) -> str:
    """Where in the code a term is explained: "memory.logits" as file and line.

    >>> place("ledger.Ledger").startswith("lora_planner/ledger.py:")
    True
    """
    module, source = _function(why)
    if source is None:
        return module
    import inspect

    try:
        return f"{module}:{inspect.getsourcelines(source)[1]}"
    except (TypeError, OSError):
        return module


def source_of(why: str) -> str:
    """The `Source:` line of the function that explains a term."""
    _, function = _function(why)
    text = getattr(function, "__doc__", None) or ""
    if "Source:" not in text:
        return ""
    return " ".join(text.split("Source:", 1)[1].split(">>>")[0].split())


def _function(why: str) -> tuple[str, Any]:
    from importlib import import_module

    parts = why.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = import_module("lora_planner." + ".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        path = "lora_planner/" + "/".join(parts[:cut]) + ".py"
        for name in parts[cut:]:
            found = getattr(found, name, None)
        # a property is where its function is
        return path, getattr(found, "fget", None) or getattr(found, "func", None) or found
    return why, None


# ---------------------------------------------------------------- JSON


def plain(value: Any) -> Any:
    """Anything of ours as JSON types; an estimate keeps its interval, unit, basis and source."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(item) for key, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and value != value:
        return None
    return value


def to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, allow_nan=False)


def envelope(
    result: Any,
    inputs: Any = None,
    warnings: Iterable[Warning3] = (),
    provenance: Iterable[Any] = (),
    exit_code: int = 0,
) -> dict[str, Any]:
    """What every command prints under --json."""
    text = json.dumps(plain(inputs), sort_keys=True, default=str)
    return {
        "schema_version": SCHEMA,
        "tool_version": __version__,
        "inputs_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "result": result,
        "provenance": list(provenance),
        "warnings": [{"code": code, "msg": msg, "fix": fix} for code, msg, fix in warnings],
        "exit_code": exit_code,
    }


def error_object(error: LoraPlanError) -> dict[str, Any]:
    document = envelope(None, exit_code=error.exit_code)
    document["error"] = {"code": error.code, "what": error.what, "where": error.where, "fix": error.fix}
    return document


def ledger_object(ledger: Ledger) -> dict[str, Any]:
    return {
        "quantity": ledger.quantity,
        "unit": ledger.unit,
        "total": ledger.total if ledger.adds else None,
        "basis": ledger.basis,
        "convention": ledger.convention,
        "terms": [term_object(term) for term in ledger.terms],
    }


def term_object(term: Term) -> dict[str, Any]:
    low = term.value if term.low is None else term.low
    high = term.value if term.high is None else term.high
    return {"name": term.name, "value": term.value, "low": low, "high": high, "basis": term.basis,
            "why": term.why, "note": term.note}  # fmt: skip


def ledger_envelope(ledger: Ledger) -> dict[str, Any]:
    result = ledger_object(ledger)
    for row in result["terms"]:
        row["place"], row["source"] = place(row["why"]), source_of(row["why"])
    return envelope(result, inputs=ledger.quantity)


def rows_envelope(rows: Sequence[Any]) -> dict[str, Any]:
    return envelope([plain(row) for row in rows])


def priced_object(p: Priced) -> dict[str, Any]:
    """One configuration; the names are a promise to programs."""
    c, model = p.configuration, p.configuration.model
    train, forward = p.train(), p.forward()
    result: dict[str, Any] = {
        "model": {"name": model.name, "model_type": model.model_type, "source": model.source},
        "method": plain(c.method) | {"scaling": c.method.scaling},
        "params": {"total": model.total, "active": model.active, "trainable": p.trainable, "stored": p.stored,
                   "file_bytes": p.file_bytes, "groups": dict(model.groups)},
        "flops": {"forward_per_token": forward.total, "train_per_token": train.total,
                  "ratio_to_full": p.flop_ratio(), "break_even_rank": p.break_even_rank(),
                  "forward": ledger_object(forward), "train": ledger_object(train)},
    }  # fmt: skip
    result["groups"] = result["params"]["groups"]
    if c.gpu and p.memory and p.step_s and p.tokens_per_s:
        result["gpu"] = {"name": c.gpu.name, "memory_bytes": c.gpu.memory_bytes, "source": c.gpu.source,
                         "as_of": c.gpu.as_of.isoformat()}  # fmt: skip
        result["step"] = {
            "micro_batch": c.micro_batch, "seq_len": c.seq_len, "accumulation": c.accumulation,
            "longest": c.longest or c.seq_len, "checkpointing": c.checkpointing, "attention": c.attention,
            "optimizer": c.optimizer, "loss": c.loss, "stack": c.stack,
        }  # fmt: skip
        result["memory"] = {
            "peak_bytes": plain(p.memory.peak),
            "peak_phase": p.memory.peak_phase,
            "p_fit": p.p_fit,
            "ledger": [term_object(t) for t in p.memory.phases[p.memory.peak_phase].terms],
            "phases": {name: ledger_object(ledger) for name, ledger in p.memory.phases.items()},
        }
        result["time"] = {"step_s": plain(p.step_s), "tokens_per_s": plain(p.tokens_per_s), "run_s": plain(p.run_s),
                          "run_tokens": p.run_tokens, "ledger": ledger_object(p.step) if p.step else None}  # fmt: skip
        if p.rollout and c.sampling:
            result["time"]["train_step_s"] = plain(p.train_s)
            result["phases"] = plain(p.phases)
            result["rollout"] = rollout_object(p)
        result["cost"] = cost_object(p)
    return result


def rollout_object(p: Priced) -> dict[str, Any]:
    """Sampling of one step of RL: what is sampled, its seconds by cause, its memory, and flags for a server."""
    r, s = p.rollout, p.configuration.sampling
    assert r and s
    return {
        "engine": s.engine, "prompt_tokens": s.prompt, "answer_tokens": s.answer, "longest_answer": s.longest,
        "samples_per_step": r.samples, "at_once": r.at_once, "last_tenth_share": r.last_tenth, "engine_share": r.engine_share,
        "ledger": ledger_object(r.ledger), "memory": ledger_object(r.memory), "serve": serve_flags(p),
    }  # fmt: skip


def serve_flags(p: Priced) -> str:
    """What vLLM has to be told: a rank above its maximum is refused, a higher maximum is slow, and by default it takes
    the memory that the trainer beside it needs.

    Source: vllm-project/vllm#2847, #22782; the ranks are capacity.SERVABLE_RANKS.
    """
    from lora_planner.capacity import SERVABLE_RANKS

    m, s, r = p.configuration.method, p.configuration.sampling, p.rollout
    if s is None or r is None or s.engine != "vllm":
        return ""
    share = f"--gpu-memory-utilization {r.engine_share:.2f}"
    if m.is_full:
        return share
    rank = next((rank for rank in SERVABLE_RANKS if rank >= m.rank), SERVABLE_RANKS[-1])
    return f"--enable-lora --max-lora-rank {rank} --max-loras 1 {share}"


def cost_object(p: Priced) -> dict[str, Any] | None:
    if p.cost is None:
        return None
    return {
        "usd": plain(p.cost.usd), "of": "run" if p.run_tokens else "step",
        "cheapest": plain(p.cost.cheapest), "cheapest_usd": plain(p.cost.cheapest_usd),
        "prices": [plain(row) for row in p.cost.rows], "stale_prices": p.cost.stale,
    }  # fmt: skip


def estimate_object(p: Priced) -> dict[str, Any]:
    c = p.configuration
    inputs = (c.model.name, c.model.total, c.method, c.gpu.name if c.gpu else None, c.micro_batch, c.seq_len,
              c.checkpointing, c.attention, c.optimizer, c.loss, c.stack)  # fmt: skip
    return envelope(priced_object(p), inputs, _all_warnings(p), provenance(p))


def _all_warnings(p: Priced) -> list[Warning3]:
    found = list(p.warnings)
    found += [("W-MODEL", text, "Check the files.") for text in p.configuration.model.warnings]
    if p.memory:
        found += [("W-MEMORY", text, "`lora-plan explain memory` shows every term.") for text in p.memory.warnings]
    return found


def provenance(p: Priced) -> list[dict[str, Any]]:
    """Which number stands on what."""
    c = p.configuration
    rows = [{"key": "params", "value": c.model.total, "kind": "exact", "source": c.model.source}]
    if c.gpu and p.memory and p.step_s:
        rows.append({"key": "memory", "value": p.memory.peak.value, "kind": p.memory.peak.basis,
                     "source": p.memory.peak.source})  # fmt: skip
        rows.append({"key": "time", "value": p.step_s.value, "kind": p.step_s.basis,
                     "source": f"data/constants.json, stack {c.stack}"})  # fmt: skip
        rows += [{"key": phase.name, "value": phase.seconds.value, "kind": phase.seconds.basis,
                  "source": "data/rollout_constants.json" if phase.name in ("rollout", "sync") else f"data/constants.json, stack {c.stack}"}
                 for phase in p.phases]  # fmt: skip
        rows.append({"key": "gpu", "value": c.gpu.name, "kind": "published", "source": c.gpu.source,
                     "as_of": c.gpu.as_of.isoformat()})  # fmt: skip
    if p.cost:
        rows += [{"key": "price", "value": row.usd_per_gpu_hour, "kind": row.basis, "source": row.source,
                  "as_of": row.as_of.isoformat()} for row in p.cost.rows]  # fmt: skip
    return rows


def plan_object(plan: Plan) -> dict[str, Any]:
    result = priced_object(plan.priced)
    result["learning_rate"] = plain(plan.lr)
    result["batch"] = {"batch": plan.accumulation.effective, "steps": plan.steps, "advice": plain(plan.batch),
                       "accumulation": plain(plan.accumulation)}  # fmt: skip
    result["capacity"] = plain(plan.verdict)
    result["loss_penalty"] = plain(plan.penalty)
    return result


def advice_object(advice: Advice) -> dict[str, Any]:
    job = advice.job
    data = plain(job.data)
    data.pop("histogram", None)
    data["path"] = Path(job.data.path).name
    data["lengths"] = {"p50": job.data.p50, "p90": job.data.p90, "p99": job.data.p99, "max": job.data.longest}
    rejected = None
    if advice.rejected:
        r = advice.rejected
        rejected = {"code": r.code, "reason": r.reason, "fix": r.fix, "plan": priced_object(r.priced)}
    result = {
        "job": {
            "objective": job.objective,
            "epochs": job.epochs,
            "max_length": job.max_length,
            "problems": job.problems,
            "group": job.group if job.rl else None,
        },
        "data": data,
        "need_bits": plain(advice.need.bits),
        "rank": plain(advice.rank),
        "recommended": plan_object(advice.plan) if advice.plan else None,
        "runner_up": plan_object(advice.runner_up) if advice.runner_up else None,
        "rejected": rejected,
        "considered": advice.considered,
        "dropped": dict(advice.dropped),
    }
    inputs: tuple[Any, ...] = (job.model.name, job.model.total, job.data.sha256, job.data.tokens.value, [g.name for g in job.gpus],
              job.epochs, job.max_length, job.budget_usd, job.deadline_s, job.rl, job.problems, job.group, job.pass_rate)  # fmt: skip
    if job.sampling:
        inputs = (*inputs, job.sampling)
    sources = provenance(advice.plan.priced) if advice.plan else []
    return envelope(result, inputs, advice.warnings, sources, advice.exit_code)


# ---------------------------------------------------------------- terminal


def terminal() -> Any:
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would exit with 1, our code for a bug; `cli.Commands` knows better

    return Terminal(highlight=False, soft_wrap=False)


def grid(rows: Sequence[tuple[str, Any]]) -> Any:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2), pad_edge=False)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(ratio=1)
    for label, body in rows:
        grid.add_row(label, body)
    return grid


def styled(*parts: str | tuple[str, str]) -> Any:
    from rich.text import Text

    return Text.assemble(*parts)


def dim(text: str) -> tuple[str, str]:
    return text, "dim"


def basis_note(text: str) -> tuple[str, str]:
    """What kind of number stands before it."""
    return f"({text})", "dim"


def method_line(p: Priced) -> str:
    """ "LoRA r16, all-linear" """
    m = p.configuration.method
    names = {"lora": "LoRA", "qlora": "QLoRA", "rslora": "rsLoRA", "dora": "DoRA", "lora-fa": "LoRA-FA"}
    if m.is_full:
        return "full fine-tuning"
    return f"{names[m.name]} r{m.rank}, {','.join(m.targets)}"


def _recipe(p: Priced) -> list[Any]:
    c, m = p.configuration, p.configuration.method
    share = units.percent(p.trainable / c.model.total)
    if m.is_full:
        return [styled(("full fine-tuning", "bold green"), f", all {units.count(p.trainable)} parameters")]
    rows = [
        styled((method_line(p), "bold green"), f"  alpha {m.alpha:g}, scale {m.scaling:g}"),
        styled(f"{p.trainable:,} trained ({share}), adapter file {units.gib(p.file_bytes)} ", basis_note("exact")),
    ]
    if c.model.active != c.model.total:
        rows.append(styled(f"experts: {m.experts}"))
    return rows


def _memory_lines(p: Priced) -> list[Any]:
    c = p.configuration
    assert c.gpu and p.memory
    peak, p_fit = p.memory.peak, p.p_fit or 0.0
    word = ("yes", "bold green") if p_fit >= 0.95 else ("maybe", "bold yellow") if p_fit >= 0.5 else ("no", "bold red")
    line = styled(word, f", P {p_fit:.2f}: peak {interval(peak, units.gib)} of {units.gib(c.gpu.memory_bytes)} ",
                 basis_note(f"{peak.basis}, {p.memory.peak_phase}"))  # fmt: skip
    return [line, memory_bar(p), styled(dim(_largest(p)))]


def _largest(p: Priced, most: int = 5) -> str:
    assert p.memory
    terms = sorted(p.memory.phases[p.memory.peak_phase].terms, key=lambda t: -t.value)
    return ", ".join(f"{t.name} {units.gib(t.value)}" for t in terms[:most])


#: kinds of memory that a bar shows, and the terms of each; the last one has all others
MEMORY_KINDS = (
    ("weights", ("weights", "adapters", "engine weights")),
    ("training state", ("gradients", "optimizer states", "optimizer temporary")),
    ("logits", ("logits", "logit gradients", "head", "model output")),
    ("activations and rest", ()),
)
_KIND_STYLES = ("blue", "magenta", "yellow", "cyan")


def memory_kinds(terms: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Bytes by kind, of the terms of one phase.

    >>> memory_kinds([("weights", 3.0), ("mask", 1.0)])
    {'weights': 3.0, 'training state': 0.0, 'logits': 0.0, 'activations and rest': 1.0}
    """
    kind_of = {term: kind for kind, some in MEMORY_KINDS for term in some}
    sums = {kind: 0.0 for kind, _ in MEMORY_KINDS}
    for name, value in terms:
        sums[kind_of.get(name, MEMORY_KINDS[-1][0])] += value
    return sums


def memory_bar(p: Priced, width: int = 48) -> Any:
    """The peak's terms as a bar of the GPU's memory."""
    from rich.text import Text

    c = p.configuration
    assert c.gpu and p.memory
    ledger = p.memory.phases[p.memory.peak_phase]
    full, empty = ("█", "░") if terminal().encoding.startswith("utf") else ("#", ".")
    bar, legend, used = Text(), [], 0
    kinds = memory_kinds((t.name, t.value) for t in ledger.terms)
    for (name, value), style in zip(kinds.items(), _KIND_STYLES, strict=True):
        cells = min(width - used, round(width * value / c.gpu.memory_bytes))
        bar.append(full * cells, style)
        used += cells
        if value > 0:
            legend.append((name, style))
    bar.append(empty * (width - used), "dim")
    for name, style in legend:
        bar.append(f"  {full} {name}", style)
    return bar


def _plan_rows(plan: Plan) -> list[tuple[str, Any]]:
    p, c = plan.priced, plan.configuration
    lr, a = plan.lr, plan.accumulation
    assert p.step_s and p.run_s and p.tokens_per_s
    rows: list[tuple[str, Any]] = []
    recipe = _recipe(p)
    rows.append(("run", recipe[0]))
    rows += [("", line) for line in recipe[1:]]
    rows.append(
        ("", styled(f"LR {interval(lr.lr, units.rate)} ", basis_note(lr.lr.basis), f", {lr.schedule.split(' (')[0]}"))
    )
    if lr.labels:
        rows.append(("", styled(("; ".join(lr.labels), "yellow"))))
    if not c.method.is_full:
        sweep = " ".join(units.rate(rate) for rate in lr.sweep)
        rows.append(
            ("", styled(dim(f"worth a sweep: {sweep}; full fine-tuning would want {interval(lr.full_lr, units.rate)}")))
        )
    rows.append(("", styled(f"batch {a.effective} = {c.micro_batch} x {a.steps}, {plan.steps:,.0f} steps, "
                           f"checkpointing {c.checkpointing}, attention {c.attention}")))  # fmt: skip
    fits = _memory_lines(p)
    rows.append(("fits", fits[0]))
    rows += [("", line) for line in fits[1:]]
    rows.append(("time", styled(f"{interval(p.run_s, units.duration)}, {units.count(p.tokens_per_s.value)} tokens/s, "
                               f"step {units.duration(p.step_s.value)} ", basis_note(f"{p.run_s.basis}, stack {c.stack}"))))  # fmt: skip
    rows += _phase_rows(p)
    rows.append(("cost", cost_line(p)))
    rows.append(("flops", _flops_line(p)))
    rows.append(("capacity", _capacity_line(plan)))
    if not c.method.is_full:
        rows.append(
            (
                "loss",
                styled(
                    f"{interval(plan.penalty, units.percent)} above full fine-tuning, predicted ",
                    basis_note(plan.penalty.basis),
                ),
            )
        )
    return rows


def _phase_rows(p: Priced) -> list[tuple[str, Any]]:
    """RL: hours of each phase of the run, then what decides them."""
    if not (p.phases and p.rollout and p.memory and p.run_s and p.step_s):
        return []
    r, run = p.rollout, p.run_s.value / p.step_s.value
    parts = [
        f"{phase.name} {interval(phase.seconds.scaled(run), units.duration)} ({phase.share:.0%})" for phase in p.phases
    ]
    rows: list[tuple[str, Any]] = [("phases", styled(", ".join(parts) + " ", basis_note(p.phases[0].seconds.basis)))]
    engine = p.configuration.sampling.engine if p.configuration.sampling else ""
    rows.append(("", styled(dim(f"{engine}: {p.phases[0].note}"))))
    trained = max(ledger.total for name, ledger in p.memory.phases.items() if name != "rollout")
    kept = ", ".join(
        f"{t.name} {units.gib(t.value)}" for t in sorted(r.memory.terms, key=lambda t: -t.value) if t.value
    )
    asleep = "the engine sleeps while the trainer works" if r.engine_bytes else "the trainer's model samples"
    rows.append(
        ("", styled(f"sampling takes {units.gib(r.memory.total)} ({kept}), training {units.gib(trained)}; {asleep}"))
    )
    if flags := serve_flags(p):
        rows.append(("serve", styled(flags)))
    return rows


def _flops_line(p: Priced) -> Any:
    """Work a token; for LoRA its share of full fine-tuning's and the rank at which it would cost as much."""
    train, at = p.train(), p.break_even_rank()
    share = f", {p.flop_ratio():.3f} of full fine-tuning (equal at rank {at:.0f})" if at else ""
    return styled(f"{units.flops(p.forward().total)} forward, {units.flops(train.total)} training a token{share} ",
                 basis_note(train.basis))  # fmt: skip


def cost_line(p: Priced) -> Any:
    if p.cost is None:
        return styled(("no price for this GPU", "yellow"), "; pass --prices FILE")
    row = p.cost.cheapest
    old = f", {p.cost.stale} of {len(p.cost.rows)} prices are stale" if p.cost.stale else ""
    return styled(f"{interval(p.cost.usd, units.usd)}; cheapest {units.usd(p.cost.cheapest_usd.value)} at {row.provider}, "
                 f"{row.usd_per_gpu_hour:g}/h as of {row.as_of} ", basis_note(p.cost.usd.basis + old))  # fmt: skip


STYLE = {"surely fits": "green", "contested": "yellow", "surely over": "red"}


def _capacity_line(plan: Plan) -> Any:
    if plan.verdict is None:
        return styled("all parameters train: nothing holds the data back")
    v = plan.verdict
    return styled((v.verdict, STYLE[v.verdict]), f": {interval(v.need, units.bits)} to learn at most, "
                 f"the adapter holds {units.bits(v.capacity.low)} to {units.bits(v.capacity.high)} ",
                 basis_note(f"{v.need.basis}; {len(v.judgements)} sources"))  # fmt: skip


def _data_rows(advice: Advice) -> list[tuple[str, Any]]:
    job, data = advice.job, advice.job.data
    name = one_line(Path(data.path).name) if data.path else "a number of tokens"
    rows: list[tuple[str, Any]] = []
    first = styled(f"{name}: {data.examples:,} examples, {interval(data.tokens, units.count)} tokens, "
                  f"{interval(data.trained_tokens, units.count)} trained ", basis_note(data.basis))  # fmt: skip
    rows.append(("data", first))
    if data.path:
        rows.append(("", styled(f"lengths p50 {data.p50}, p90 {data.p90}, p99 {data.p99}, longest {data.longest} "
                               f"(line {data.longest_line}); real tokens {data.batch_efficiency:.0%} padded in batches, "
                               f"{data.packing_efficiency:.0%} packed")))  # fmt: skip
    bad = []
    if data.bad_rows and data.first_bad:
        bad.append(f"{data.bad_rows:,} bad rows, first at {data.first_bad[0]}: {one_line(data.first_bad[1])}")
    if data.truncated:
        bad.append(f"{data.truncated:,} cut at {data.max_length}, {data.tokens_lost:,} tokens lost")
    if data.duplicates:
        bad.append(f"{data.duplicates:,} duplicates")
    if bad:
        rows.append(("", styled(("; ".join(bad), "yellow"))))
    if job.rl:
        rows.append(("", styled(f"RL: {job.problems:,} problems x {job.group} samples")))
    return rows


def show_advice(advice: Advice) -> None:
    """The whole answer on a terminal: recommendation, runner-up, first rejected, what to watch."""
    from rich.table import Table

    console, job = terminal(), advice.job
    model = job.model
    rows: list[tuple[str, Any]] = [("model", styled((one_line(model.name), "bold"), f"  {model.total:,} parameters"
        + (f", {model.active:,} active" if model.active != model.total else "") + f", {model.layers} layers ",
        basis_note("exact")))]  # fmt: skip
    rows += _data_rows(advice)
    if advice.plan:
        assert advice.plan.configuration.gpu
        rows.append(("gpu", styled(advice.plan.configuration.gpu.name)))
        rows += _plan_rows(advice.plan)
        rows.append(("why", styled("; ".join(advice.rank.reasons))))
    else:
        rows.append(("plan", styled(("nothing satisfies the constraints", "bold red"))))
    console.print(grid(rows))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("", "plan", "gpu", "peak", "time", "cost", "loss"):
        table.add_column(heading, overflow="fold")
    for label, plan in (("recommended", advice.plan), ("runner-up", advice.runner_up)):
        if plan:
            loss = units.percent(plan.penalty.value)
            table.add_row(label, *_cells(plan.priced), loss)
    if advice.rejected:
        table.add_row("rejected", *_cells(advice.rejected.priced), "", style="dim")
    console.print()
    console.print(table)
    if advice.rejected:
        fix = f"; {advice.rejected.fix}" if advice.rejected.fix else ""
        console.print(styled(dim(f"rejected: {advice.rejected.reason}{fix}")))
    reasons = ", ".join(f"{n:,} {code}" for code, n in sorted(advice.dropped.items())) or "none dropped"
    console.print(styled(dim(f"{advice.considered:,} configurations considered; dropped: {reasons}")))
    print_warnings(console, advice.warnings)


def _cells(p: Priced) -> tuple[str, str, str, str, str]:
    c = p.configuration
    peak = units.gib(p.memory.peak.value) if p.memory else ""
    run = units.duration(p.run_s.value) if p.run_s else ""
    cost = units.usd(p.cost.usd.value) if p.cost else ""
    return method_line(p), c.gpu.name if c.gpu else "", peak, run, cost


def print_warnings(console: Any, warnings: Sequence[Warning3]) -> None:
    if not warnings:
        return
    console.print()
    rows = [("watch" if i == 0 else "", styled((code, "yellow"), f" {one_line(msg)}. ", dim(fix)))
            for i, (code, msg, fix) in enumerate(warnings)]  # fmt: skip
    console.print(grid(rows))


def show_estimate(p: Priced) -> None:
    """One explicit configuration on a terminal."""
    console, c = terminal(), p.configuration
    rows: list[tuple[str, Any]] = [("model", styled((one_line(c.model.name), "bold"), f"  {c.model.total:,} parameters, "
                                                   f"{c.model.active:,} active ", basis_note("exact")))]  # fmt: skip
    recipe = _recipe(p)
    rows += [("run" if i == 0 else "", line) for i, line in enumerate(recipe)]
    rows.append(("flops", _flops_line(p)))
    if c.gpu and p.memory and p.step_s and p.tokens_per_s and p.run_s:
        rows.append(("gpu", styled(c.gpu.name)))
        fits = _memory_lines(p)
        rows += [("fits" if i == 0 else "", line) for i, line in enumerate(fits)]
        rows.append(("time", styled(f"step {interval(p.step_s, units.duration)}, "
                                   f"{interval(p.tokens_per_s, units.count)} tokens/s ", basis_note(p.step_s.basis))))  # fmt: skip
        if p.run_tokens:
            rows.append(("run", styled(f"{interval(p.run_s, units.duration)} for {units.count(p.run_tokens)} tokens")))
            rows.append(("cost", cost_line(p)))
    console.print(grid(rows))
    print_warnings(console, _all_warnings(p))


def show_explanation(ledger: Ledger) -> None:
    """Every term with its value, basis, place in the code and source."""
    from rich.table import Table

    console = terminal()
    console.print(styled((ledger.quantity, "bold"), f"  {ledger.convention}"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    table.add_column("term")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("basis", no_wrap=True)
    table.add_column("where, source", overflow="fold", ratio=1)
    for term in ledger.terms:
        value = shown(term.value, ledger.unit)
        if term.low is not None and term.high is not None:
            value += f"\n[{shown(term.low, ledger.unit)}, {shown(term.high, ledger.unit)}]"
        table.add_row(styled(term.name), styled(value), term.basis, styled(_why(term)))
    console.print(table)
    if ledger.adds:
        console.print(styled("total ", (shown(ledger.total, ledger.unit), "bold"), f" {ledger.basis}"))


def _why(term: Term) -> str:
    return "\n".join(line for line in (place(term.why), source_of(term.why), one_line(term.note)) if line)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return units.count(value)
    return "" if value is None else one_line(str(value))


HEADINGS = {"memory_gib": "GiB", "bf16_tflops": "TFLOP/s", "hbm_tb_per_s": "TB/s", "usd_per_hour": "USD/h"}


def show_rows(title: str, rows: Sequence[Any]) -> None:
    """A catalogue: one line a row."""
    from rich.table import Table

    console = terminal()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    records = [plain(row) for row in rows]
    for i, name in enumerate(records[0]):
        heading = HEADINGS.get(name, name.replace("_", " "))
        table.add_column(
            heading, overflow="fold", no_wrap=i == 0 or name == "as_of", min_width=7 if name == "also" else None
        )
    for record in records:
        table.add_row(*(styled(_cell(value)) for value in record.values()))
    console.print(table)
    console.print(styled(dim(f"{len(records)} {title}")))


def show_verification(gpu: Gpu, base: str, arms: Sequence[Any], verdicts: Sequence[Verdict], out: str) -> None:
    """Held-out losses by arm and rate, then a line a verdict. `arms`: calibrate.verdict.Arm."""
    from rich.table import Table

    console = terminal()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("arm", "held-out nats per token by learning rate", "best"):
        table.add_column(heading, overflow="fold")
    for arm in arms:
        cells = [f"{rate:.1e} {loss:.3f}" for rate, loss in arm.losses.items()]
        cells += [f"{rate:.1e} diverged" for rate in arm.diverged]
        best = f"{arm.best[1]:.3f}" + ("" if arm.bracketed else " (edge)") if arm.losses else "none"
        table.add_row(one_line(arm.name), "  ".join(cells), best)
    console.print(styled(("base ", "bold"), base, ("  device ", "bold"), gpu.name, dim("  runs "), dim(one_line(out))))
    console.print(table)
    console.print()
    colours = {"holds": "green", "fails": "red"}
    console.print(
        grid([(v.claim, styled((v.status, colours.get(v.status, "yellow")), f"  {v.sentence}")) for v in verdicts])
    )


def show_calibration(gpu: Gpu, before: Mapping[str, Constant], rows: Sequence[Constant],
                     errors: Mapping[str, Sequence[Any]],
                     path: str) -> None:  # fmt: skip
    """Constants before and after, and errors on runs that the fit has not seen, by kind of run: probe.Errors."""
    from rich.table import Table

    console = terminal()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("constant", "before", "now", "runs"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        old = before.get(row.name)
        table.add_row(row.name, f"{old.value:.3g} [{old.low:.3g}, {old.high:.3g}]" if old else "",
                      f"{row.value:.3g} [{row.low:.3g}, {row.high:.3g}]", str(row.n))  # fmt: skip
    console.print(styled((gpu.name, "bold")))
    console.print(table)
    console.print()
    for title, some in errors.items():
        if not some:
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in (title, "n", "median error", "worst error", "inside the 90 % interval"):
            table.add_column(heading, overflow="fold")
        for e in some:
            table.add_row(e.quantity, str(e.n), f"{e.median_before:.1%} -> {e.median_after:.1%}",
                          f"{e.worst_before:.1%} -> {e.worst_after:.1%}", f"{e.covered_before} -> {e.covered_after}")  # fmt: skip
        console.print(table)
        console.print()
    console.print(styled(dim(f"written to {one_line(path)}; later plans for {gpu.name} use it")))


def show_claims(entries: Sequence[Any], detailed: bool) -> None:
    """A line a claim; `detailed`: what came out, and by which rule. `entries`: calibrate.family.Entry."""
    from rich.table import Table

    console = terminal()
    colours = {"holds": "green", "fails": "red"}
    if not detailed:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in ("claim", "says", "source", "cost", "last verdict"):
            table.add_column(heading, overflow="fold")
        for e in entries:
            cost = units.duration(e.cost_s) if e.cost_s else "seconds" if not e.asked else f"{e.asked} runs"
            verdict = (e.verdict.status, colours.get(e.verdict.status, "yellow"))
            table.add_row(f"{e.id} {e.title}", one_line(e.sentence), one_line(e.source), cost, styled(verdict))
        console.print(table)
        return
    for e in entries:
        v = e.verdict
        rows: list[tuple[str, Any]] = [
            (e.id, styled((v.status, colours.get(v.status, "yellow")), f"  {one_line(e.sentence)}"))
        ]
        if v.effect:
            rows.append(("ours", styled(f"{v.effect.value:.3g} [{v.effect.low:.3g}, {v.effect.high:.3g}] {v.effect.unit}, "
                                       f"{v.n} runs")))  # fmt: skip
        rows += [("", styled(one_line(v.sentence))), ("published", styled(dim(one_line(e.published))))]
        if v.control:
            rows.append(("control", styled(one_line(v.control))))
        rows.append(("rule", styled(dim(one_line(e.rule)))))
        if e.registered:
            rows.append(("prereg", styled(dim(f"{e.registered}  {e.registration}"))))
        console.print(grid(rows))
        console.print()


def show_scores(board: Any, cases: Sequence[Any]) -> None:
    """Errors of predictions by quantity and source; `board`: calibrate.track.board, `cases`: its cases."""
    from rich.table import Table

    console = terminal()
    for quantity, some in board.by_quantity(cases).items():
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for heading in (quantity, *board.HEADER):
            table.add_column(heading, overflow="fold")
        table.add_row("all", *board.cells(board.summary(some)))
        sources = board.grouped(some, lambda case: case.source)
        for name, rows in sources.items() if len(sources) > 1 else ():
            table.add_row(one_line(name), *board.cells(board.summary(rows)))
        console.print(table)
        for name, values in board.details(some).items():
            console.print(styled(f"{one_line(name)}: median {values['median']:.4g}, 90 % below {values['p90']:.4g}, "
                                f"worst {values['worst']:.4g} (n {values['n']})"))  # fmt: skip
        for case in board.worst(some, 3):
            console.print(styled(dim(one_line(f"worst: {case.label}: predicted {case.predicted.value:.4g} {case.unit}, "
                                              f"measured {case.measured:.4g}"))))  # fmt: skip
        for why, n in board.reasons(some):
            console.print(styled(dim(one_line(f"no prediction ({n}): {why}"))))
        console.print()
