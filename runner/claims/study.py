"""From the name of a claim to its verdict: register, run what is missing, judge, and gather it for the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from calibrate.family import Entry, RunSummary
from calibrate.verdict import arm_name
from lora_planner.record import FINAL, Json, RunRecord, RunSpec, Verdict, merge, read_events
from runner import journal
from runner.claims import BY_ID, claim, lab, registry
from runner.claims.lab import Lab, Size, base_name
from runner.claims.traps import TRAPS
from runner.journal import JOURNAL, Journal

SHOWN = ("device", "torch", "transformers", "peft", "python", "threads", "commit")


def chosen(names: Sequence[str]) -> list[tuple[str, ModuleType]]:
    """The claims of these names; "all" is every one."""
    asked = list(BY_ID) if "all" in (name.lower() for name in names) else names
    return [claim(name) for name in dict.fromkeys(asked)]


def family(size: str, asked: Sequence[tuple[str, ModuleType]]) -> list[tuple[str, ModuleType]]:
    """The claims that are corrected for one another: all that need runs, besides those asked for."""
    wanted = dict(asked)
    return [(key, m) for key, m in chosen(["all"]) if key in wanted or m.specs(lab.SIZES[size], [])]


def register(out: Path, claims: Sequence[tuple[str, ModuleType]], size: str) -> None:
    """Write what each claim decides by, unless the journal has it. Nothing of it has run by then, or the page says so."""
    with Journal.open(out) as log:
        known = {event["key"] for event in read_events(out / JOURNAL)[0] if event["event"] == "registered"}
        for key, module in claims:
            document = registry.document(key, module, size)
            if registry.digest(document) not in known:
                log.append(journal.registered(document, registry.digest(document)))


def execute(place: Lab, claims: Sequence[tuple[str, ModuleType]]) -> None:
    """Run all that these claims want, the grids that several share but once."""
    register(place.out, claims, place.size_name)

    def read() -> list[RunRecord]:
        return list(merge(read_events(place.out / JOURNAL)[0]).values())

    def wanted(runs: list[RunRecord]) -> list[RunSpec]:
        return [design for _, module in claims for design in module.specs(place.size, runs)]

    runs = read()
    if set(wanted(runs)) <= {lab.as_design(run.spec) for run in runs if run.status in FINAL}:
        return  # records that were made elsewhere are judged as they are, without a base being made for nothing
    lab.complete(place, read, wanted)


def used(module: ModuleType, size: Size, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that a claim asked for, as far as they are there."""
    asked = set(module.specs(size, runs))
    return [run for run in runs if lab.as_design(run.spec) in asked]


def entries(events: Sequence[Json], size: str, claims: Sequence[tuple[str, ModuleType]]) -> list[Entry]:
    """What the page shows of each claim, from the journal's events alone."""
    runs = list(merge(events).values())
    found = []
    for key, module in claims:
        mine = used(module, lab.SIZES[size], runs)
        # of the runs that it asked for alone: those of other claims must not move a margin or a count
        verdict: Verdict = module.verdict(mine, size)
        begin = module.specs(lab.SIZES[size], [])
        if begin:
            digest, sentence = registry.standing(events, key, module, size, mine)
        else:
            digest, sentence = "", "arithmetic: nothing to register"
        title = module.__name__.rpartition(".")[2].replace("_", " ")
        found.append(Entry(
            id=key, title=title, sentence=module.SENTENCE, source=module.SOURCE, published=module.PUBLISHED,
            metric=module.METRIC, rule=module.RULE, traps=tuple((n, TRAPS[n]) for n in module.TRAPS), size=size,
            verdict=verdict, registered=digest, registration=sentence, runs=tuple(summary(run) for run in mine),
            asked=len(begin),
            command=f"lora-plan verify {key} --size {size}",
            picture=f"figures/{key.lower()}-{size}.svg" if verdict.plot and verdict.plot.series else "",
            cost_s=sum(run.measured.get("wall_s") or 0.0 for run in mine),
        ))  # fmt: skip
    return found


def summary(run: RunRecord) -> RunSummary:
    spec, path = run.spec, run.measured.get("held_out") or []
    words = [base_name(spec.base), spec.task, spec.objective if spec.objective != "sft" else "", arm_name(spec),
             f"lr {spec.lr:.3g}",
             f"{spec.steps} x {spec.batch} x {spec.seq_len}", f"seed {spec.seed}",
             *(f"{name} {value}" for name, value in spec.task_args)]  # fmt: skip
    first, last = (path[0][1], path[-1][1]) if path else (None, None)
    return RunSummary(run.key, " ".join(word for word in words if word), run.status, first, last,
                      run.measured.get("wall_s") or 0.0)  # fmt: skip


def plain_entry(entry: Entry) -> Json:
    """What `--json` says of a claim: all but the picture's data."""
    verdict = entry.verdict
    return {
        "claim": entry.id, "name": entry.title, "sentence": entry.sentence, "source": entry.source,
        "published": entry.published, "status": verdict.status, "effect": verdict.effect, "n": verdict.n,
        "p": verdict.p, "control": verdict.control, "reason": verdict.sentence, "rule": entry.rule,
        "registered": entry.registered, "registration": entry.registration, "command": entry.command,
        "cost_s": entry.cost_s,
    }  # fmt: skip


def environment(events: Sequence[Json]) -> dict[str, str]:
    """What all attempts ran with; several values of one name are all listed."""
    found: dict[str, set[str]] = {}
    for event in events:
        for name in SHOWN:
            if event["event"] == "started" and name in event.get("env", {}):
                found.setdefault(name, set()).add(str(event["env"][name]))
    return {name: ", ".join(sorted(values)) for name, values in found.items()}
