"""A configuration and a job in, every ledger and estimate out. Calls the subjects once and judges nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import date

from lora_planner import batch as batches
from lora_planner import capacity, findings, flops, learning_rate, rollout
from lora_planner.cost import Cost, cost
from lora_planner.data_file import DataFacts
from lora_planner.errors import BadInput, UnknownName, nearest
from lora_planner.facts import CPU, Gpu, Price, gpu, prices, remembered
from lora_planner.ledger import ASSUMED, DERIVED, EXACT, Estimate, Ledger, Term
from lora_planner.lengths import clipped, expected_longest
from lora_planner.memory import MemoryPlan, memory, p_fit
from lora_planner.memory import constants as memory_constants
from lora_planner.method import DEFAULT_EXPERTS, Method
from lora_planner.method.targets import adapter_table
from lora_planner.model import Model
from lora_planner.params import adapter_ledger, file_bytes, stored_params, trainable_params
from lora_planner.throughput import Stack, Work, stack, step_time
from lora_planner.workload import work

#: (code, sentence, fix)
Warning3 = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Configuration:
    """Everything `lora-plan estimate` is told. A step is `accumulation` micro-batches of one length."""

    model: Model
    method: Method
    gpu: Gpu | None = None
    micro_batch: int = 1
    seq_len: int = 2048
    accumulation: int = 1
    checkpointing: str = "none"
    attention: str = "sdpa"
    optimizer: str = "adamw"
    loss: str = "full"
    stack: str = "hf-trl"
    longest: int = 0  # of any sample: what memory must hold; 0 means seq_len
    sampling: rollout.Sampling | None = None  # RL: what is sampled before each step

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch * self.accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.samples_per_step * self.seq_len


@dataclass(frozen=True, eq=False)
class PriceBook:
    """Price rows by GPU, and the day on which their age is counted."""

    rows: dict[str, tuple[Price, ...]]
    today: date

    @classmethod
    def load(cls, path: str | None = None, today: date | None = None) -> PriceBook:
        by_gpu: dict[str, list[Price]] = {}
        for row in prices(path):
            by_gpu.setdefault(row.gpu, []).append(row)
        return cls({gpu: tuple(rows) for gpu, rows in by_gpu.items()}, today or date.today())


@dataclass(slots=True)
class Priced:
    """One configuration with all that follows from it. What needs a GPU is None without one."""

    configuration: Configuration
    trainable: int
    stored: int
    file_bytes: int
    memory: MemoryPlan | None = None
    p_fit: float | None = None
    step: Ledger | None = None  # training, by cause
    step_s: Estimate | None = None  # the whole step: in RL all its phases
    train_s: Estimate | None = None  # a step's training alone
    phases: tuple[rollout.Phase, ...] = ()  # of a step of RL
    rollout: rollout.Rollout | None = None
    tokens_per_s: Estimate | None = None
    run_tokens: float | None = None
    run_s: Estimate | None = None
    cost: Cost | None = None
    warnings: list[Warning3] = field(default_factory=list)

    def forward(self) -> Ledger:
        c = self.configuration
        return flops.forward(c.model, c.method, c.seq_len, c.micro_batch)

    def train(self) -> Ledger:
        c = self.configuration
        return flops.train(c.model, c.method, c.seq_len, c.attention, c.checkpointing, c.micro_batch)

    def flop_ratio(self) -> float:
        """Training FLOP of this method over those of full fine-tuning."""
        c = self.configuration
        return flops.lora_to_full_ratio(c.model, c.method, c.seq_len, c.attention, c.checkpointing, c.micro_batch)

    def break_even_rank(self) -> float | None:
        """The rank at which the ratio is 1; None for full fine-tuning."""
        c = self.configuration
        if c.method.is_full:
            return None
        return flops.break_even_rank(c.model, c.method, c.seq_len, c.attention, c.checkpointing, c.micro_batch)


@remembered
def _stack(name: str, gpu_name: str) -> Stack:
    return stack(name, gpu(gpu_name))


@remembered
def _sampled(
    model: Model,
    method: Method,
    gpu_name: str,
    sampling: rollout.Sampling,
    samples: int,
    stack_name: str,
    resident: rollout.Resident,
) -> rollout.Rollout:
    """A search asks for the same step of sampling with every way to cut up its training."""
    return rollout.rollout(model, method, gpu(gpu_name), sampling, samples, _stack(stack_name, gpu_name), resident)


def matmul_dtype(gpu: Gpu) -> str:
    """bf16 where the hardware has it, else fp16 (T4, V100): what the stacks fall back to; fp32 on a CPU."""
    if gpu.form == CPU:
        return "fp32"
    return "bf16" if "bf16" in gpu.peak_flops_per_s else "fp16"


def price(c: Configuration, book: PriceBook | None = None, run_tokens: float | None = None) -> Priced:
    """Parameters, memory, time and cost of one configuration.

    `run_tokens`: padded tokens of the whole run; without it time and cost are those of a step. In RL both are those
    of all phases, and the peak is that of the largest: an engine with weights of its own sleeps while the trainer works.
    """
    if c.micro_batch < 1 or c.seq_len < 1 or c.accumulation < 1:
        raise BadInput(f"{c.micro_batch} x {c.seq_len} x {c.accumulation} tokens are no step",
                       "--micro-batch, --seq-len", "Use 1 or more.")  # fmt: skip
    model, method = c.model, c.method
    found = Priced(c, trainable_params(model, method), stored_params(model, method), file_bytes(model, method))
    found.warnings.extend(adapter_table(model, method).warnings)
    if c.gpu is None:
        return found
    found.memory = memory(
        model,
        method,
        micro_batch=c.micro_batch,
        seq_len=max(c.seq_len, c.longest),
        checkpointing=c.checkpointing,
        attention=c.attention,
        optimizer=c.optimizer,
        loss=c.loss,
        accumulate=c.accumulation > 1,
        gpu_memory_bytes=c.gpu.memory_bytes,
        known=memory_constants(c.gpu.name, c.stack),
    )
    found.p_fit = found.memory.p_fit
    dtype = matmul_dtype(c.gpu)
    asked = work(
        model,
        method,
        micro_batch=c.micro_batch,
        seq_len=c.seq_len,
        accumulation=c.accumulation,
        checkpointing=c.checkpointing,
        attention=c.attention,
        dtype=dtype,
    )
    found.step = step_time(asked, c.gpu, _stack(c.stack, c.gpu.name))
    step = found.step_s = found.train_s = found.step.estimate()
    if c.sampling:
        step = _add_phases(found, c.sampling, asked)
    tokens = c.tokens_per_step
    found.tokens_per_s = Estimate(
        tokens / step.high, tokens / step.value, tokens / step.low, "tokens/s", step.basis, step.source
    )
    found.run_tokens = run_tokens
    found.run_s = step.scaled(run_tokens / tokens) if run_tokens else step
    rows = book.rows.get(c.gpu.name) if book else None
    if book and rows:
        found.cost = cost(found.run_s, c.gpu.name, rows, book.today)
    return found


def _add_phases(found: Priced, sampling: rollout.Sampling, asked: Work) -> Estimate:
    """The other phases of a step of RL, and its seconds.

    Old log-probabilities are one forward pass where another engine sampled, whose own differ (TRL's importance
    sampling correction); GRPO without a KL term needs no reference model.
    """
    c = found.configuration
    assert c.gpu and found.memory and found.train_s
    stack = _stack(c.stack, c.gpu.name)
    rest = found.memory.phases["optimizer"]
    resident = tuple((name, rest[name]) for name in ("weights", "adapters", "optimizer states"))
    sampled = _sampled(c.model, c.method, c.gpu.name, sampling, c.samples_per_step, c.stack, resident)
    found.rollout = sampled
    house = f"{sampled.at_once} of {sampled.samples} samples at once, {sampling.answer:,.0f} tokens each"
    tail = (
        "all of them run until the longest is done"
        if sampling.engine == rollout.HF
        else (f"the last tenth of them takes {sampled.last_tenth:.0%} of the time")
    )
    note = f"{house}; {tail}"
    parts = {"rollout": (sampled.ledger.estimate(), note)}
    if sampling.engine != rollout.HF:
        forward = rollout.forward_work(asked, c.model, c.method, micro_batch=c.micro_batch, seq_len=c.seq_len,
                                       accumulation=c.accumulation, attention=c.attention, checkpointing=c.checkpointing)  # fmt: skip
        again = step_time(forward, c.gpu, stack).estimate()
        parts["log-probabilities"] = (
            again,
            "one forward pass, as the engine's differ from the trainer's; no reference model",
        )
    parts["training"] = (found.train_s, f"stack {c.stack}")
    if sampling.engine != rollout.HF:
        moved = rollout.sync_ledger(c.model, c.method, c.gpu, sampling, stack, sampled.engine_bytes)
        what = "all weights" if c.method.is_full else "the adapter's file"
        parts["sync"] = (moved.estimate(), f"{what} into the engine, its own weights out of GPU memory and back")
    found.phases, found.step_s = rollout.phases_of(parts)
    found.memory = _with_rollout(found.memory, sampled)
    found.p_fit = found.memory.p_fit
    return found.step_s


def _with_rollout(trained: MemoryPlan, sampled: rollout.Rollout) -> MemoryPlan:
    """The peak is the largest phase, never a sum. The cache takes what is there, so that what must fit is one sample."""
    phases = {**trained.phases, "rollout": sampled.memory}
    fits = min(trained.p_fit or 0.0, p_fit(sampled.minimum, sampled.allowed_bytes) if sampled.fits else 0.0)
    peak = sampled.memory.estimate()
    if peak.value <= trained.peak.value:
        return replace(trained, phases=phases, p_fit=fits)
    peak.source = "rollout.rollout"
    return replace(trained, phases=phases, p_fit=fits, peak=peak, peak_phase="rollout", dominating=sampled.memory.largest(),
                   allocated=peak.value)  # fmt: skip


@dataclass(slots=True)
class Job:
    """What the user wants to train, before any choice."""

    model: Model
    data: DataFacts
    gpus: tuple[Gpu, ...]
    book: PriceBook
    epochs: float = 1.0
    max_length: int | None = None
    budget_usd: float | None = None
    deadline_s: float | None = None
    first_epoch_nats: float | None = None
    rl: bool = False
    problems: int = 0
    group: int = 0
    pass_rate: float | None = None
    sampling: rollout.Sampling | None = None
    experts: str = DEFAULT_EXPERTS  # how a mixture's experts are adapted
    _lengths: dict[int, float] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        return learning_rate.RL if self.rl else learning_rate.SFT

    def need(self) -> capacity.Need:
        """What there is to learn, in bits."""
        if self.rl:
            return capacity.rl_need(self.problems, self.group, self.pass_rate, self.epochs)
        tokens = self.data.trained_tokens
        need = capacity.sft_need(tokens.value, self.first_epoch_nats)
        # how many tokens there are is itself an estimate where nobody tokenised
        need.bits.low *= tokens.low / tokens.value
        need.bits.high *= tokens.high / tokens.value
        return need

    @property
    def longest(self) -> int:
        """Tokens of the longest sample after truncation: what memory must hold."""
        return min(self.data.longest, self.max_length or self.data.longest)

    def padded_length(self, micro_batch: int) -> float:
        """Mean length to which a micro-batch is padded; remembered, a search asks often."""
        if micro_batch not in self._lengths:
            lengths = clipped(self.data.histogram, self.max_length)
            self._lengths[micro_batch] = expected_longest(lengths, micro_batch)
        return self._lengths[micro_batch]


@dataclass(slots=True)
class Plan:
    """A job with one configuration chosen, and everything the user asked about it."""

    job: Job
    priced: Priced
    batch: batches.BatchAdvice
    accumulation: batches.Accumulation
    steps: float
    lr: learning_rate.Advice
    verdict: capacity.Verdict | None  # None for full fine-tuning: nothing to hold back
    penalty: Estimate  # predicted loss above the best choice, relative

    @property
    def configuration(self) -> Configuration:
        return self.priced.configuration


def make_plan(job: Job, c: Configuration, batch: batches.BatchAdvice) -> Plan:
    """The whole answer for one configuration of a job.

    Padded tokens of the run: examples x epochs x mean padded length of a micro-batch.
    """
    accumulation = batches.accumulate(batch.batch, c.micro_batch)
    length = job.padded_length(c.micro_batch)
    run_tokens = job.data.examples * job.epochs * length
    steps = max(1.0, job.data.examples * job.epochs / accumulation.effective)
    found = price(c, job.book, run_tokens)
    total = job.model.total
    lr = learning_rate.advise(
        total,
        job.model.model_type,
        c.method.name,
        max(c.method.rank, 1),
        c.method.alpha or 32.0,
        steps,
        job.objective,
        accumulation.effective,
    )
    verdict = None if c.method.is_full else capacity.verdict(job.need(), total, found.trainable)
    return Plan(job, found, batch, accumulation, steps, lr, verdict, loss_penalty(job, c.method))


#: (low, value, high): relative loss of adapting less than all layers. "LoRA Without Regret" finds MLP-only
#: as good as all layers, QLoRA's authors and kenkuuu's runs (NLL 1.8457, 1.8491, 1.8548 for all, MLP,
#: attention) a little worse: the value is the middle of the range. Attention-only is worse for everybody.
TARGET_PENALTY = {"all-linear": (0.0, 0.0, 0.0), "mlp": (0.0, 0.005, 0.01), "attention": (0.003, 0.02, 0.1)}
#: a 4-bit base: QLoRA's authors report none after tuning; a few tenths of a percent are usual
QUANTISED_PENALTY = (0.0, 0.002, 0.01)


def loss_penalty(job: Job, method: Method) -> Estimate:
    """Predicted loss above that of full fine-tuning, relative: rank + targets + 4-bit base.

    Source: capacity.rank_penalty; TARGET_PENALTY and QUANTISED_PENALTY above. In RL rank costs nothing
    (LWR: rank 1 matches full fine-tuning).
    """
    if method.is_full:
        return Estimate(0.0, 0.0, 0.0, "share of loss", DERIVED, "the reference")
    low = value = high = 0.0
    basis, source = ASSUMED, "LWR; kenkuuu; QLoRA"
    if not job.rl:
        rank = capacity.rank_penalty(method.rank, job.model.total)
        low, value, high, basis, source = rank.low, rank.value, rank.high, rank.basis, rank.source
    for part in (
        TARGET_PENALTY.get(method.targets[0], (0.0, 0.0, 0.0)),
        QUANTISED_PENALTY if method.base_dtype == "nf4" else (0.0, 0.0, 0.0),
    ):
        low, value, high = low + part[0], value + part[1], high + part[2]
        if part[2]:
            basis = ASSUMED
    return Estimate(low, value, high, "share of loss", basis, source)


QUANTITIES = ("params", "trainable", "flops", "memory", "time", "cost", "capacity", "learning-rate", "batch")


def explain(quantity: str, plan: Plan) -> Ledger:
    """The terms behind one quantity of a plan."""
    found, c = plan.priced, plan.configuration
    if quantity == "params":
        terms = [Term(g, n, EXACT, "model.Model.groups") for g, n in c.model.groups.items() if n]
        return Ledger("parameters", "params", terms, "stored, a tied unembedding once")
    if quantity == "trainable":
        return adapter_ledger(c.model, c.method)
    if quantity == "flops":
        return found.train()
    if quantity == "memory" and found.memory:
        return found.memory.phases[found.memory.peak_phase]
    if quantity == "time" and found.step:
        return found.step
    if quantity == "cost" and found.cost and found.run_s:
        return _cost_terms(found.cost, found.run_s)
    if quantity == "capacity" and plan.verdict:
        return _capacity_terms(plan.verdict)
    if quantity == "learning-rate":
        return _lr_terms(plan)
    if quantity == "batch":
        extra = plan.batch.extra
        terms = [
            Term("batch", plan.batch.batch, ASSUMED, "batch.recommend_batch", note="; ".join(plan.batch.reasons)),
            Term("samples relative to batch 32", extra.value, extra.basis, "batch.extra_samples", extra.low, extra.high,
                 extra.source),
            *findings.terms("C16"),
        ]  # fmt: skip
        return Ledger("batch", "", terms, "each line is a number of its own", adds=False)
    close = nearest(quantity, QUANTITIES, 1)
    raise UnknownName(
        f"nothing to explain about {quantity!r} here", "explain",
        f"Known: {', '.join(QUANTITIES)}." + (f" Nearest: {close[0]}." if close else ""),
    )  # fmt: skip


def _cost_terms(bill: Cost, run: Estimate) -> Ledger:
    terms = [
        Term(f"{row.provider}, {row.commitment}", run.value / 3600 * row.usd_per_gpu_hour, row.basis, "cost.usd_at",
             run.low / 3600 * row.usd_per_gpu_hour, run.high / 3600 * row.usd_per_gpu_hour,
             f"{row.usd_per_gpu_hour:g} USD/h as of {row.as_of}, {row.source}")
        for row in bill.rows
    ]  # fmt: skip
    return Ledger("cost", "USD", terms, "one line a price row; the bill is one of them", adds=False)


def _capacity_terms(verdict: capacity.Verdict) -> Ledger:
    terms = [
        Term(j.source.name, j.capacity.value, j.source.basis, "capacity.sources", j.capacity.low, j.capacity.high,
             f"asked for {j.need.value:.3g} [{j.need.low:.3g}, {j.need.high:.3g}] {j.source.counts}: {j.verdict}; "
             f"{j.source.regime}; {j.source.source}")
        for j in verdict.judgements
    ]  # fmt: skip
    terms += findings.terms("C11", "C18", "C22")
    return Ledger(
        "capacity", "", terms, f"verdict: {verdict.verdict}; one line a source, each in its own unit", adds=False
    )


def _lr_terms(plan: Plan) -> Ledger:
    lr, full = plan.lr.lr, plan.lr.full_lr
    notes = "; ".join((*plan.lr.sources, *plan.lr.labels))
    terms = [
        Term("this method", lr.value, lr.basis, "learning_rate.advise", lr.low, lr.high, notes),
        Term("full fine-tuning", full.value, full.basis, "learning_rate.full_lr", full.low, full.high, full.source),
        *findings.terms("C07", "C08", "C09", "C19"),
    ]  # fmt: skip
    convention = f"alpha {plan.lr.alpha:g}, {plan.lr.scaling} = {plan.lr.scale:g}; {plan.lr.schedule}"
    return Ledger("learning-rate", "", terms, convention, adds=False)
