"""Hits and false alarms of `lora-plan diagnose` on runs in which the cause was planted, and on healthy ones.

    python -m benchmarks.diagnose                         judges committed runs, writes reports/diagnose.md
    python -m benchmarks.diagnose --make                  trains what is missing in tests/golden/diagnose (minutes)

Rates, ranks and batches: runs of our own loop in reports/runs, beside the best full fine-tuning of their seed. Faults of
a set-up: transformers' Trainer on the same base, sabotaged at a known step. Thresholds were set on seed 3 (our loop) and
seed 0 (Trainer) alone; what is reported comes from the other seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibrate.diagnose.causes import MARGIN
from calibrate.diagnose.evidence import LIKELY, POSSIBLE, WORDS
from calibrate.diagnose.hygiene import CHECKS
from calibrate.diagnose.logs import Log, of_record_log, read_log
from calibrate.diagnose.settings import Settings
from calibrate.diagnose.verdict import Diagnosis, diagnose
from lora_planner.record import DIVERGED, FINISHED, RunRecord, RunSpec, read_runs

ROOT = Path(__file__).parents[1]
SWEEPS = [ROOT / "reports" / "runs" / name for name in ("cpu-first.jsonl", "cpu.jsonl")]
PLANTED = ROOT / "tests" / "golden" / "diagnose"
REPORT = ROOT / "reports" / "diagnose.md"
BASE = "qwen3-1m"
#: seeds that thresholds were set on: our loop's, the Trainer's
TUNED_SWEEP, TUNED_TRAINER = 3, 0
RATE, CAPACITY, BATCH, HYGIENE, NONE = "learning rate", "capacity", "batch", "hygiene", "none"
#: a rate that is planted as wrong is this factor from the best of its arm; one near it is within the other
WRONG, NEAR = 2.4, 1.3
#: the shared sweep: windows a run sees, its usual batch, what its adapters are on, ranks that are planted as too small
WINDOWS, BATCH_USUAL, TARGETS, SMALL = 800, 4, ("all-linear", "unembed"), 4


@dataclass(frozen=True, slots=True)
class Case:
    """One run, what was planted in it, and what it is held against. `causes`: every planted one; `way`: of the rate.

    `code`: the hygiene check that should fire. `tuned`: thresholds were set on it.
    """

    group: str
    name: str
    causes: tuple[str, ...]
    run: Log
    reference: Log | None = None
    way: str = ""
    code: str = ""
    tuned: bool = False

    @property
    def planted(self) -> str:
        """What was planted, in words; what moved the final loss by less than MARGIN was not."""
        words = [f"{cause} {self.way}".strip() if cause == RATE else cause for cause in self.causes]
        return " and ".join(words) or NONE

    def judged(self) -> Diagnosis:
        return diagnose(self.run, self.reference)


# ---------------------------------------------------------------- cases


def sweep_runs() -> list[RunRecord]:
    """Runs of the shared sweep: full and LoRA everywhere, at three batches over the same windows; also diverged ones."""
    return [
        r for file in SWEEPS if file.is_file() for r in read_runs(file)
        if r.status in (FINISHED, DIVERGED) and r.spec.task == "shift" and r.spec.init == "pretrained"
        and not r.spec.task_args and r.spec.base.startswith(BASE) and r.spec.steps * r.spec.batch == WINDOWS
        and (r.spec.method == "full" or (r.spec.method == "lora" and r.spec.targets == TARGETS))
    ]  # fmt: skip


def arm(r: RunRecord, batch: int = 0) -> tuple[str, int, float, int]:
    """What runs of one arm share; at `batch` sequences a step where given."""
    return (r.spec.method, r.spec.rank, r.spec.alpha, batch or r.spec.batch)


class Sweep:
    """The sweep with the best rate of each arm, and the log of each run."""

    def __init__(self, held_out: bool) -> None:
        self.runs = sweep_runs()
        self.held_out = held_out
        self.by_arm: dict[tuple[str, int, float, int], list[RunRecord]] = {}
        for r in self.runs:
            self.by_arm.setdefault(arm(r), []).append(r)
        self.best = {key: self._best(some) for key, some in self.by_arm.items()}

    @staticmethod
    def _best(some: Sequence[RunRecord]) -> float:
        """The rate of the lowest final loss, over all seeds that have the most rates in common."""
        by_rate: dict[float, list[float]] = {}
        for r in some:
            by_rate.setdefault(r.spec.lr, []).append(r.final_loss if r.final_loss is not None else 99.0)
        most = max(map(len, by_rate.values()))
        return min((sum(v) / len(v), lr) for lr, v in by_rate.items() if len(v) == most)[1]

    def tuned(self, key: tuple[str, int, float, int], seed: int) -> RunRecord | None:
        """The run of this arm and seed at the arm's best rate."""
        return next((r for r in self.by_arm.get(key, []) if r.spec.seed == seed and r.spec.lr == self.best[key]), None)

    def log(self, r: RunRecord) -> Log:
        log = of_record_log(r, "sweep")
        return log if self.held_out else replace(log, held_out=())


def sweep_cases(held_out: bool = True) -> list[Case]:
    """Every run of the usual batch beside the best full fine-tuning of its seed, beside the best of its own arm, beside
    LoRA r32, and alone; runs at larger batches beside their arm at the usual one; every arm beside its next seed.

    `held_out`: False drops the held-out losses, as in a log without evaluations.
    """
    sweep, cases = Sweep(held_out), []
    for r in sweep.runs:
        s, best = r.spec, sweep.best[arm(r)]
        off, tuned = s.lr / best, s.seed == TUNED_SWEEP
        if r.status == DIVERGED:
            cases.append(
                Case(
                    "diverged, alone", s.label(), (RATE, HYGIENE), sweep.log(r), None, "too high", "H-NONFINITE", tuned
                )
            )
            continue
        if s.batch != BATCH_USUAL:
            if s.lr == best and (reference := sweep.tuned(arm(r, BATCH_USUAL), s.seed)):
                cases.append(Case("larger batch", f"{s.label()} batch {s.batch}", (BATCH,) if worse(r, reference) else (),
                                  sweep.log(r), sweep.log(reference), tuned=tuned))  # fmt: skip
            continue
        way = "too low" if off <= 1 / WRONG else "too high" if off >= WRONG else ""
        if not way and not 1 / NEAR <= off <= NEAR:
            continue  # neither near nor planted
        wrong = (RATE,) if way else ()
        label = s.label() + (f" alpha {s.alpha:g}" if s.alpha not in (32.0, 0.0) else "")
        log = sweep.log(r)
        cases.append(Case("alone", label, wrong, log, None, way, tuned=tuned))
        full, own = sweep.tuned(("full", 0, 0.0, BATCH_USUAL), s.seed), sweep.tuned(arm(r), s.seed)
        kind = "full" if s.method == "full" else "LoRA"
        if full and r is not full:
            small = s.method == "lora" and s.rank <= SMALL
            felt = worse(r, full)
            causes = (*wrong, *((CAPACITY,) if small else ())) if felt else ()
            cases.append(
                Case(f"{kind} beside full", label, causes, log, sweep.log(full), way if felt else "", tuned=tuned)
            )
        if own and way:
            felt = worse(r, own)
            cases.append(
                Case(
                    "beside its own arm",
                    label,
                    wrong if felt else (),
                    log,
                    sweep.log(own),
                    way if felt else "",
                    tuned=tuned,
                )
            )
        if (
            kind == "LoRA"
            and r is own
            and s.rank <= SMALL
            and (large := sweep.tuned(("lora", 32, 32.0, BATCH_USUAL), s.seed))
        ):
            cases.append(Case("LoRA beside LoRA r32", label, (CAPACITY,), log, sweep.log(large), tuned=tuned))
        if r is own and (other := sweep.tuned(arm(r), s.seed + 1)):
            pair = f"{label} / {s.seed + 1}"
            cases.append(
                Case("another seed", pair, (), log, sweep.log(other), tuned=TUNED_SWEEP in (s.seed, s.seed + 1))
            )
    return cases


def worse(run: RunRecord, reference: RunRecord) -> bool:
    """Whether the run ends above its reference by more than the margin below which two runs are the same."""
    return (run.final_loss or 99.0) > (reference.final_loss or 0.0) * (1 + MARGIN)


def trainer_cases() -> list[Case]:
    """What transformers' Trainer logged of a run, alone and beside the healthy run of its seed."""
    found = []
    for file in sorted(PLANTED.glob("*-s*.json")):
        name, _, seed = file.stem.rpartition("-s")
        fault = FAULTS[name]
        log = known(read_log(str(file)), fault, int(seed))
        tuned = int(seed) == TUNED_TRAINER
        found.append(Case("Trainer, alone", file.stem, fault.causes, log, None, fault.way, fault.code, tuned))
        healthy = PLANTED / f"healthy-s{seed}.json"
        if name != "healthy" and healthy.is_file():
            reference = known(read_log(str(healthy)), FAULTS["healthy"], int(seed))
            causes = fault.causes if fault.causes or name == "linear" else ()
            found.append(
                Case("Trainer, beside healthy", file.stem, causes, log, reference, fault.way, fault.code, tuned)
            )
    return found


def known(log: Log, fault: Fault, seed: int) -> Log:
    """With what a user would have said in --config."""
    words = settings_of(fault, seed)
    said = Settings(method="lora", rank=words["rank"], alpha=32.0, targets=("all-linear",), accumulation=words["accumulation"],
                    micro_batch=words["batch"] // words["accumulation"], steps=STEPS)  # fmt: skip
    return replace(log, settings=said.over(log.settings))


# ---------------------------------------------------------------- runs that are made


STEPS, EVERY, EVALUATE = 80, 2, 10
#: the step at which a run is sabotaged
AT = 44


@dataclass(frozen=True, slots=True)
class Fault:
    """How a run is spoilt. `words`: changes to the healthy settings. `code`: the check that should see it."""

    causes: tuple[str, ...]
    code: str = ""
    way: str = ""
    words: tuple[tuple[str, Any], ...] = ()


def _fault(code: str = "", **words: Any) -> Fault:
    return Fault((HYGIENE,) if code else (), code, "", tuple(words.items()))


FAULTS: dict[str, Fault] = {
    "healthy": _fault(),
    "linear": _fault(schedule="linear"),
    "accumulated": _fault(accumulation=2),
    "nan": _fault("H-NONFINITE", sabotage="nan"),
    "no-gradient": _fault("H-ZERO-GRAD", sabotage="no-gradient"),
    "unmoved": _fault("H-UNMOVED", sabotage="unmoved"),
    "unlabelled": _fault("H-NO-LABELS", sabotage="unlabelled"),
    "random-labels": _fault("H-UNLIKE", sabotage="random-labels"),
    "summed-loss": _fault("H-LOSS-SCALE", sabotage="summed-loss", accumulation=4),
    "schedule-ended": _fault("H-SCHEDULE", schedule="half"),
    "warming-up": _fault("H-WARMUP", warmup=1000),
    "duplicates": _fault("H-MEMORISED", rows=8),
    "adapter-lost": _fault("H-RESUME", sabotage="adapter-lost"),
    "bad-batch": _fault("H-SPIKE", sabotage="bad-batch"),
    "rate-low": Fault((RATE,), "", "too low", (("factor", 0.02),)),
    "rate-high": Fault((RATE,), "", "too high", (("factor", 16.0),)),
}  # fmt: skip
#: differ from seed to seed, so that what was tuned on one is tested on another
RATES = {0: 2e-3, 1: 1e-3, 2: 3e-3}
RANKS = {0: 8, 1: 16, 2: 4}


def settings_of(fault: Fault, seed: int) -> dict[str, Any]:
    words: dict[str, Any] = {
        "sabotage": "",
        "schedule": "constant",
        "warmup": 0,
        "rows": 0,
        "factor": 1.0,
        "accumulation": 1,
    }
    words |= dict(fault.words)
    return {**words, "lr": RATES[seed] * words["factor"], "rank": RANKS[seed], "batch": 4}


def make_trainer_run(home: Path, name: str, seed: int) -> None:
    """One sabotaged run of transformers' Trainer; keeps of its trainer_state.json what a log has."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from lora_planner.arch import from_config
    from runner import adapt, base, tasks

    torch.set_num_threads(1)
    words = settings_of(FAULTS[name], seed)
    sabotage = words["sabotage"]
    source = _base(home)
    spec = RunSpec(source.key, "shift", rank=words["rank"], lr=words["lr"], steps=STEPS, micro_batch=4, seed=seed)
    module, _ = base.load(source, spec, torch.device("cpu"))
    module = adapt.attach(module, from_config(source.config()), spec.plan_method(), seed)
    task = tasks.build("shift", base.tokenizer(source), 128, 0, {})
    rows = task.train[seed * 600 :][: words["rows"] or STEPS * 4]
    generator = torch.Generator().manual_seed(seed)
    vocab = module.config.vocab_size
    step_of = {"now": 0}

    ours = {id(row) for row in rows}

    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        tokens = torch.tensor([s.tokens for s in samples])
        labels = tokens.clone()
        if id(samples[0]) not in ours:
            return {"input_ids": tokens, "labels": labels}
        if sabotage == "random-labels":
            labels = torch.randint(vocab, labels.shape, generator=generator)
        if sabotage == "unlabelled":
            labels[:] = -100
        if sabotage == "bad-batch" and AT <= step_of["now"] < AT + 2:
            tokens = torch.randint(vocab, tokens.shape, generator=generator)
            labels = tokens.clone()
        return {"input_ids": tokens, "labels": labels}

    class Spoilt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step_of["now"] = state.global_step
            if state.global_step != AT:
                return
            with torch.no_grad():
                for key, parameter in module.named_parameters():
                    if sabotage == "nan" and "lora_A" in key:
                        parameter.mul_(1e30)
                    if sabotage == "adapter-lost" and "lora_B" in key:
                        parameter.zero_()
            if sabotage == "adapter-lost":
                trainer.optimizer.state.clear()

    class Sabotaged(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            loss = result[0] if return_outputs else result
            if model.training and sabotage == "summed-loss":
                loss = loss * words["accumulation"]
            if model.training and sabotage == "no-gradient":
                loss = loss.detach() + 0.0 * loss
            return (loss, result[1]) if return_outputs else loss

    trained = [p for p in module.parameters() if p.requires_grad]
    held = [torch.nn.Parameter(torch.zeros(1))] if sabotage == "unmoved" else trained
    optimizer = torch.optim.AdamW(held, lr=words["lr"], eps=1e-10, weight_decay=0.0)
    end = STEPS // 2 if words["schedule"] == "half" else STEPS
    shape: Callable[[int], float] = (
        (lambda s: 1.0) if words["schedule"] == "constant" else (lambda s: max(0.0, 1 - s / end))
    )
    rise = words["warmup"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: shape(s) * (min(1.0, (s + 1) / rise) if rise else 1.0)
    )
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=STEPS, per_device_train_batch_size=4 // words["accumulation"], seed=seed,
            gradient_accumulation_steps=words["accumulation"], logging_steps=EVERY, eval_strategy="steps", eval_steps=EVALUATE,
            eval_on_start=True, per_device_eval_batch_size=8, save_strategy="no", report_to=[], use_cpu=True,
            remove_unused_columns=False, disable_tqdm=True, max_grad_norm=1e9, logging_first_step=True,
        )  # fmt: skip
        trainer = Sabotaged(module, arguments, data_collator=collate, train_dataset=rows, eval_dataset=task.held_out[:16],
                            optimizers=(optimizer, scheduler), callbacks=[Spoilt()])  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.state.save_to_json(str(Path(scratch) / "trainer_state.json"))
        state = json.loads((Path(scratch) / "trainer_state.json").read_text())
    kept = ("step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate")
    history = [
        {k: _short(v) for k, v in e.items() if k in kept}
        for e in state["log_history"]
        if {"loss", "eval_loss"} & e.keys()
    ]
    document = {
        "log_history": history,
        **{k: state[k] for k in ("global_step", "max_steps", "num_train_epochs", "train_batch_size")},
    }
    PLANTED.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(e) for e in document.pop("log_history"))
    (PLANTED / f"{name}-s{seed}.json").write_text(json.dumps(document)[:-1] + f', "log_history": [\n{lines}\n]}}\n')


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _base(home: Path) -> Any:
    from runner import base

    found = sorted((home / "bases").glob(f"{BASE}-*"))
    if not found:
        raise SystemExit(f"no {BASE} in {home}: run `lora-plan verify` once")
    return base.Base(found[0].name, found[0])


def make(home: Path, names: Iterable[str], seeds: Sequence[int]) -> None:
    for name in names:
        for seed in seeds:
            if not (PLANTED / f"{name}-s{seed}.json").is_file():
                print(f"{name} seed {seed}", file=sys.stderr, flush=True)
                make_trainer_run(home, name, seed)


# ---------------------------------------------------------------- the report


def named(case: Case, d: Diagnosis, words: tuple[str, ...]) -> tuple[str, ...]:
    """The causes with one of these words; a rate in the wrong direction is not the planted one."""
    found = []
    for f in d.findings:
        if f.word in words:
            wrong_way = f.cause == RATE and case.way and f.detail != case.way
            found.append("learning rate, wrong way" if wrong_way else f.cause)
    return tuple(found)


Judged = Sequence[tuple[Case, Diagnosis]]


def judge(cases: Sequence[Case]) -> Judged:
    return [(c, c.judged()) for c in cases]


def rows(judged: Judged) -> list[list[str]]:
    """By group and planted cause: how often it was named, and what else was."""
    table = []
    for group, what in sorted(dict.fromkeys((c.group, c.planted) for c, _ in judged)):
        some = [(c, d) for c, d in judged if (c.group, c.planted) == (group, what)]
        planted = some[0][0].causes
        n = len(some)
        likely = sum(set(planted) <= set(named(c, d, (LIKELY,))) for c, d in some)
        either = sum(set(planted) <= set(named(c, d, (LIKELY, POSSIBLE))) for c, d in some)
        first = sum(d.findings[0].cause in planted and d.findings[0].word in (LIKELY, POSSIBLE) for _, d in some)
        alarms = Counter(cause for c, d in some for cause in named(c, d, (LIKELY,)) if cause not in planted)
        hints = Counter(cause for c, d in some for cause in named(c, d, (POSSIBLE,)) if cause not in planted)
        hits = (str(likely), str(either), str(first)) if planted else ("", "", "")
        table.append([group, what, str(n), *hits, listed(alarms), listed(hints)])
    return table


def listed(found: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in found.most_common()) or "0"


def confusion(judged: Judged) -> list[list[str]]:
    """Planted cause by the word that each cause got."""
    table = []
    for planted in sorted(dict.fromkeys(" and ".join(c.causes) or NONE for c, _ in judged)):
        some = [d for c, d in judged if (" and ".join(c.causes) or NONE) == planted]
        cells = []
        for cause in (RATE, CAPACITY, BATCH, HYGIENE):
            count = Counter(d[cause].word for d in some)
            cells.append(" / ".join(str(count[word]) for word in WORDS))
        table.append([planted, str(len(some)), *cells])
    return table


def checks(judged: Judged) -> list[list[str]]:
    """Each hygiene check: planted and seen, and how often it fired on runs without a fault of the set-up."""
    alone = [(c, d) for c, d in judged if c.reference is None]
    table = []
    for check in CHECKS:
        planted = [d for c, d in alone if c.code == check.code]
        hit = sum(any(k.code == check.code and e and e.weight > 0 for k, e in d.checks) for d in planted)
        looked = [e for c, d in alone if not c.code for k, e in d.checks if k.code == check.code and e]
        table.append([check.code, check.title, f"{hit} of {len(planted)}" if planted else "not planted",
                      f"{sum(e.weight == 2 for e in looked)} of {len(looked)}", str(sum(e.weight == 1 for e in looked))])  # fmt: skip
    return table


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in body),
        "",
    ]


def found(d: Diagnosis, words: tuple[str, ...]) -> str:
    some = [f"{f.cause} {f.word}" + (f" {f.detail}" if f.detail else "") for f in d.findings if f.word in words]
    return ", ".join(some) or "nothing"


def report() -> str:
    every = judge([*sweep_cases(), *trainer_cases()])
    held = [(c, d) for c, d in every if not c.tuned]
    training = judge([c for c in sweep_cases(held_out=False) if not c.tuned and c.reference])
    head = ["runs", "planted", "n", "LIKELY", "LIKELY or POSSIBLE", "ranked first", "also LIKELY", "also POSSIBLE"]
    missed = [
        f"- {c.group}, {c.name}: planted {c.planted}; found {found(d, (LIKELY, POSSIBLE))}" for c, d in held
        if c.group != "alone" and c.causes and not set(c.causes) <= set(named(c, d, (LIKELY, POSSIBLE)))
    ]  # fmt: skip
    false = [
        f"- {c.group}, {c.name}: {found(d, (LIKELY,))}" for c, d in held if not c.causes and named(c, d, (LIKELY,))
    ]
    seeds = sorted({c.run.settings.seed for c, _ in held if c.run.settings.seed is not None})
    return "\n".join([
        "# What `lora-plan diagnose` finds, and where it is wrong", "",
        "Written by `python -m benchmarks.diagnose`. Every run is a real one: our own loop's in reports/runs "
        "(one base of 1.3M parameters, code to English prose, 800 windows), and transformers' Trainer on the same base in "
        "tests/golden/diagnose (80 steps), sabotaged at a known step. A rate is planted where it is "
        f"{WRONG:g} or more from the best of its arm; capacity: rank 1 and 4, whose loss stays 0.3 to 0.5 nats above full "
        "fine-tuning's at any rate; batch: 2 and 5 times the usual one at its own best rate, over the same windows; none: within a "
        f"factor of {NEAR:g} of the best rate, another seed, or a planted cause that moved the final loss by less than "
        f"{100 * MARGIN:g} %. Thresholds were set on seed {TUNED_SWEEP} (our loop) and seed {TUNED_TRAINER} (Trainer, with its own "
        f"rate and rank) before the others were looked at; the tables hold the others (seeds {', '.join(map(str, seeds))}; Trainer 1, 2): "
        f"{len(held)} diagnoses. They are not independent: a seed's reference serves many. One base, one task: how well it "
        "does on models of a real size is not known.", "",
        "## Planted and found", "",
        "`LIKELY`: every planted cause got that word, a rate in the right direction. `ranked first`: the first line of the "
        "answer is a planted cause.", "",
        *markdown(head, rows(held)),
        "LoRA at its best rate still ends above full fine-tuning here (3 to 4 % at rank 16 and 32): `none` beside full means "
        "that no cause was planted, not that there is nothing to find. Too high a rate of LoRA parts from full fine-tuning "
        "as a full adapter does: POSSIBLE for both is the right answer there. A run alone says little of its rate unless "
        "the model is one whose rate is known; this base is not. A warm-up that never ends is a rate that is too low: both are said.", "",
        "## Without evaluations", "",
        "The same pairs with training losses only. These seeds showed one fault of the code, which was mended: first training losses "
        "were held against each other although the batches differed, a false H-START in all 18 larger batches.", "", *markdown(head, rows(training)),
        "## Confusion", "",
        f"Cells: {' / '.join(WORDS)}. Beside a reference.", "",
        *markdown(["planted", "n", RATE, CAPACITY, BATCH, HYGIENE], confusion([(c, d) for c, d in held if c.reference])),
        "## Hygiene checks, one run alone", "",
        *markdown(["code", "check", "planted and seen", "false LIKELY", "false POSSIBLE"], checks(held)),
        "## Missed", "", "Beside a reference, or diverged, or sabotaged.", "", *(missed or ["None."]), "",
        "## False alarms (LIKELY, nothing planted)", "", *(false or ["None."]), "",
        "## On the seeds that thresholds were set on", "", *markdown(head, rows([(c, d) for c, d in every if c.tuned])),
    ]).rstrip() + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", help="train what is missing first")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--faults", nargs="*", default=list(FAULTS))
    arguments = parser.parse_args()
    if arguments.make:
        from lora_planner.facts import home

        make(home(), arguments.faults, arguments.seeds)
    REPORT.write_text(report())
    print(REPORT.relative_to(ROOT))


if __name__ == "__main__":
    main()
