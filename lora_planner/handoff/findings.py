"""What is wrong with a training config. One check, one pure function, one code.

E- fails the gate: the run would not train what its author thinks, or would not run. W- costs quality, memory or
money. N- is worth knowing. Each finding has its evidence and the smallest change of the config that answers it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lora_planner import batch as batches
from lora_planner import capacity
from lora_planner.data_file import DataFacts
from lora_planner.handoff.manifest import Manifest
from lora_planner.handoff.recipe import RL, SFT, Recipe
from lora_planner.handoff.vllm import DEFAULT_MAX_RANK
from lora_planner.handoff.words import decimal, likely
from lora_planner.learning_rate import Advice
from lora_planner.ledger import Estimate
from lora_planner.method.targets import experts, top_k
from lora_planner.model import PARAMETER, Model
from lora_planner.units import count, gib, percent
from lora_planner.units import rate as rate_text

SEVERITIES = {"E": "error", "W": "warning", "N": "note"}
#: divergence begins about here, as a multiple of the best rate (72 of 80 diverged runs of the public sweep)
UNSTABLE = 10.0
#: within this factor of the other method's rate, on the far side of it: that method's rate was taken
NEAR = 1.25
#: an adapter's strength this far from alpha 32 moves the best rate by more than the rate's own band
FAR_SCALE = 4.0
#: samples of a problem below which most groups have no contrast
SMALL_GROUP = 4
#: more samples to the same loss than this, and a smaller batch is the cheaper run
DEAR_BATCH = 1.5
#: bf16 keeps 8 significant bits: a smaller change of a weight is rounded away
BF16_STEP = 2.0**-8
MIN_P_FIT = 0.95


@dataclass(frozen=True, slots=True)
class Finding:
    """`change`: the keys to set, in the tool's own words; empty where no single value answers it."""

    code: str
    evidence: str
    fix: str
    change: tuple[tuple[str, str], ...] = ()

    @property
    def severity(self) -> str:
        return SEVERITIES[self.code[0]]


@dataclass(frozen=True, slots=True)
class Seen:
    """Everything a check may look at. `words`: our fields in the tool's keys; `known`: the tool's keys.

    `advice` is None where no law of rates applies; `p_fit` and `peak` where no GPU was named.
    """

    recipe: Recipe
    label: str
    words: Mapping[str, str]
    known: frozenset[str]
    model: Model
    manifest: Manifest
    advice: Advice | None
    lora_rate: float  # what LoRA would want on this model, whatever is trained
    break_even: float | None = None
    steps: float | None = None
    data: DataFacts | None = None
    gpu_name: str = ""
    gpu_bytes: float = 0.0
    peak: Estimate | None = None
    p_fit: float | None = None
    whole_peak: Estimate | None = None  # with all logits at once, as older versions of the tool have them
    min_p_fit: float = MIN_P_FIT
    smallest: str = ""
    smallest_words: tuple[tuple[str, str], ...] = ()
    unsplit: tuple[float, float] | None = None  # P(fit) and seconds a step with whole weights on each GPU
    step_s: float = 0.0

    def key(self, name: str) -> str:
        return self.words.get(name, name)

    def said(self, name: str) -> str:
        """How the value came about: set by the file, or the tool's default."""
        key = self.key(name)
        return f"{key} is" if key in self.recipe.given else f"{self.label}'s default {key} is"

    def set(self, name: str, value: str) -> tuple[str, tuple[tuple[str, str], ...]]:
        key = self.key(name)
        return f"{key}: {value}", ((key, value),)


Found = Iterator[Finding]


def rates(s: Seen) -> Found:
    """The learning rate against the bands of this method and of the other one."""
    lr, advice = s.recipe.learning_rate, s.advice
    if lr is None:
        return
    if not 0 < lr <= 1:
        fix, change = s.set("learning_rate", decimal(_two(s.lora_rate)))
        yield Finding(
            "E-LR-RANGE",
            f"{s.said('learning_rate')} {lr:g}, outside (0, 1]: nothing is learnt or all is lost",
            fix,
            change,
        )
        return
    if advice is None:
        return
    own, other = advice.lr, s.lora_rate if s.recipe.lora is None else advice.full_lr.value
    fix, change = s.set("learning_rate", decimal(_two(own.value)))
    band = f"{rate_text(own.value)} [{rate_text(own.low)}, {rate_text(own.high)}]"
    method = "full fine-tuning" if s.recipe.lora is None else "LoRA"
    if lr < own.low and s.recipe.lora and lr <= NEAR * other:
        yield Finding("E-LR-FULL", f"{s.said('learning_rate')} {rate_text(lr)}: a rate of full fine-tuning "
                      f"({rate_text(other)}); LoRA here wants {band}, {own.value / lr:.0f} times more", fix, change)  # fmt: skip
    elif lr > own.high and s.recipe.lora is None and lr >= other / NEAR:
        yield Finding("E-LR-LORA", f"{s.said('learning_rate')} {rate_text(lr)}: a rate of LoRA ({rate_text(other)}); "
                      f"full fine-tuning here wants {band}", fix, change)  # fmt: skip
    elif lr > UNSTABLE * own.value:
        yield Finding("E-LR-UNSTABLE", f"{s.said('learning_rate')} {rate_text(lr)}, {lr / own.value:.0f} times the best "
                      f"rate of {method}, {band}: runs diverge from about {UNSTABLE:.0f} times", fix, change)  # fmt: skip
    elif lr > own.high:
        yield Finding(
            "W-LR-HIGH", f"{s.said('learning_rate')} {rate_text(lr)}, above the band of {method}, {band}", fix, change
        )
    elif lr < own.low:
        yield Finding(
            "W-LR-LOW", f"{s.said('learning_rate')} {rate_text(lr)}, below the band of {method}, {band}", fix, change
        )


def scale(s: Seen) -> Found:
    """Alpha: what the adapter's output is multiplied with, against 32 / r that the rates were measured at."""
    lora = s.recipe.lora
    if lora is None:
        return
    k = lora.scale * lora.rank / 32.0
    moved = f"; the advised rate already counts with it ({rate_text(s.advice.lr.value)})" if s.advice else ""
    fix, change = s.set("alpha", "32")
    formula = "alpha / sqrt(r)" if lora.rslora else "alpha / r"
    what = f"alpha {lora.alpha:g} at rank {lora.rank} multiplies the adapter by {lora.scale:.3g} ({formula}), {k:.3g} times alpha 32 at alpha / r"
    if lora.rslora and k > FAR_SCALE:
        fix, change = s.set("rslora", "false")
        yield Finding("W-ALPHA-RSLORA", f"{what}: a rate of LoRA without rsLoRA is too high here{moved}", fix, change)
    elif not 1 / FAR_SCALE <= k <= FAR_SCALE:
        yield Finding("W-ALPHA", f"{what}: rates of other recipes do not carry over{moved}", fix, change)
    elif abs(k - 1) > 1e-9:
        yield Finding("N-ALPHA", f"{what}{moved}", f"keep it, or {fix} with the rates of the paper", change)


def targets(s: Seen) -> Found:
    """Names that reach nothing, and an adapter that reaches nothing at all."""
    if s.recipe.lora is None:
        return
    m, lora = s.manifest, s.recipe.lora
    close = f" Nearest: {', '.join(dict.fromkeys(m.nearest))}." if m.nearest else ""
    if m.refused:
        yield Finding("E-PEFT-REFUSES", m.refused, f"change {s.key('targets')}")
        return
    if not m.rows:
        asked = lora.pattern or ", ".join((*lora.targets, *lora.parameters))
        alone = ""
        fix, change = s.set("targets", "all-linear")
        if s.recipe.tool == "trl" and lora.pattern.isidentifier():
            alone = f": {s.label} takes a single name as a pattern for the whole path of a module"
            fix, change = s.set("targets", rf".*\.{lora.pattern}")
        text = f"{s.key('targets')} {asked} reaches no module of {s.model.name}{alone}.{close}"
        if not asked:
            text = f"{s.key('targets')} is not set, and peft has no default for {s.model.model_type}"
        yield Finding("E-TARGET-NONE", text, fix, change)
    elif m.missed:
        yield Finding("W-TARGET-MISSED", f"{', '.join(m.missed)} reach no module of {s.model.name}.{close}",
                      f"correct {s.key('targets')}")  # fmt: skip


def mixture(s: Seen) -> Found:
    """Routed experts: adapted or not, quantised or not, and what peft cannot do with them."""
    lora, model = s.recipe.lora, s.model
    if lora is None or not experts(model):
        return
    bare = [row for row in model.linears if row.kind == PARAMETER and row.group == "experts"]
    share = sum(row.params for row in bare) / model.total
    names = sorted({row.name for row in bare})
    if "experts" not in s.manifest.groups:
        text = f"the {experts(model)} experts of a layer, {share:.0%} of the parameters, get no adapter: they are bare 3-D parameters"
        if "parameters" in s.words:
            fix, change = s.set("parameters", f"[{', '.join(names)}]")
        else:
            fix, change = f"{s.label} cannot name them: train with peft or TRL, whose target_parameters reach them", ()
        yield Finding("W-EXPERTS-FROZEN", text, fix, change)
    else:
        if lora.dropout > 0:
            fix, change = s.set("dropout", "0.0")
            yield Finding("E-EXPERTS-DROPOUT", f"{s.said('dropout')} {lora.dropout:g}: peft refuses dropout on the experts' "
                          "parameters", fix, change)  # fmt: skip
        if lora.dora:
            fix, change = s.set("dora", "false")
            yield Finding("E-EXPERTS-DORA", "peft has no DoRA for the experts' parameters", fix, change)
        k = top_k(model)
        rank = max((row.rank for row in s.manifest.rows if row.group == "experts"), default=lora.rank)
        if k and rank > max(1, lora.rank // k):
            yield Finding("N-EXPERT-RANK", f"every expert gets rank {rank}, {count(s.manifest.adapter_params)} parameters; the paper divides "
                          f"the rank by the {k} active experts: {max(1, lora.rank // k)}", "a rank_pattern for the experts")  # fmt: skip
    if s.recipe.weights in ("nf4", "int8") and bare and not s.recipe.experts_quantised:
        stay = 2 * sum(row.params for row in bare)
        if "experts_quantised" in s.words:
            fix, change = s.set("experts_quantised", "true")
        else:
            fix, change = "count with bf16 experts, or quantise them with axolotl's quantize_moe_experts", ()
        yield Finding("W-EXPERTS-16-BIT", f"4-bit loading leaves the fused experts in bf16: {gib(stay)}, {share:.0%} of the parameters",
                      fix, change)  # fmt: skip


def whole_modules(s: Seen) -> Found:
    """Modules trained in full beside an adapter."""
    m = s.manifest
    if s.recipe.lora is None or not m.saved:
        return
    names = ", ".join(f"{w.name} ({count(w.params)})" for w in m.saved)
    share = m.saved_params / max(1, m.adapter_params)
    text = (f"{s.key('saved')} trains {names} in full beside {count(m.adapter_params)} adapter parameters: "
            f"{share:.3g} times them, {percent(m.saved_params / s.model.total)} of the model")  # fmt: skip
    heavy = {w.group for w in m.saved} & {"embed", "lm_head"} and share > 0.5
    yield Finding("W-EMBEDDINGS" if heavy else "N-SAVED", text, f"remove {s.key('saved')} unless the vocabulary grew",
                  ((s.key("saved"), "null"),))  # fmt: skip


def head(s: Seen) -> Found:
    """TRL multiplies hidden states with lm_head's weight itself: an adapter on it would never be trained."""
    if s.recipe.lora is None or s.recipe.tool != "trl" or s.recipe.objective != SFT:
        return
    if "lm_head" in s.manifest.groups:
        yield Finding("E-HEAD-ADAPTER", f"{s.label} refuses an adapter on lm_head: its loss reads the weight directly",
                      f"remove lm_head from {s.key('targets')}")  # fmt: skip


def attention_only(s: Seen) -> Found:
    groups = s.manifest.groups
    if s.recipe.lora is None or not groups or not groups <= {"attn"}:
        return
    if not any(row.group in ("mlp_dense", "shared") for row in s.model.linears):
        return
    fix, change = s.set("targets", "all" if s.recipe.tool == "llamafactory" else "all-linear")
    if s.recipe.tool == "axolotl":
        fix, change = "lora_target_linear: true", (("lora_target_linear", "true"),)
    yield Finding("W-ATTENTION-ONLY", "only attention is adapted: worse than the MLPs at equal parameters in every source, 0.3 to 10 % of loss",
                  fix, change)  # fmt: skip


def rank(s: Seen) -> Found:
    lora = s.recipe.lora
    if lora is None:
        return
    if s.break_even is not None and lora.rank > s.break_even:
        fix, change = s.set("rank", str(_servable_below(s.break_even)))
        yield Finding("W-RANK-BREAK-EVEN", f"rank {lora.rank} costs more FLOPs than full fine-tuning, which it equals at rank "
                      f"{s.break_even:.0f}", fix, change)  # fmt: skip
    narrow = [row.name for row in s.manifest.rows if _width(s.model, row.name) < row.rank]
    if narrow:
        yield Finding("E-RANK-WIDE", f"rank {lora.rank} exceeds the width of {', '.join(dict.fromkeys(narrow))}: the adapter is larger than the "
                      "matrix", f"lower {s.key('rank')}")  # fmt: skip
    top = max((row.rank for row in s.manifest.rows), default=lora.rank)
    if top > capacity.SERVABLE_RANKS[-1]:
        fix, change = s.set("rank", str(capacity.SERVABLE_RANKS[-1]))
        yield Finding(
            "W-RANK-SERVED",
            f"rank {top}: vLLM loads adapters up to rank {capacity.SERVABLE_RANKS[-1]}",
            f"{fix}, or merge before serving",
            change,
        )
    elif top > DEFAULT_MAX_RANK:
        served = next(n for n in capacity.SERVABLE_RANKS if n >= top)
        yield Finding(
            "N-RANK-SERVED",
            f"rank {top}: vLLM loads adapters up to rank {DEFAULT_MAX_RANK} unless it is told more",
            f"serve with --max-lora-rank {served}",
        )


def batch(s: Seen) -> Found:
    size = s.recipe.batch
    if s.recipe.lora is None or size is None or s.recipe.objective != SFT or s.recipe.packing:
        return
    r = s.recipe
    mean = r.max_length or batches.LAW_SEQ_LEN
    extra = batches.extra_samples(size, mean)
    if extra.value > DEAR_BATCH:
        on = f" = {r.micro_batch} x {r.accumulation} on {r.gpus} GPUs" if r.gpus > 1 else ""
        text = (f"batch {size}{on} needs {extra.value:.2g} [{extra.low:.2g}, {extra.high:.2g}] times the samples of batch "
                f"{batches.DEFAULT_BATCH} for the same loss; LoRA pays this more than full fine-tuning does")  # fmt: skip
        yield Finding("W-BATCH-LARGE", text, *_smaller_batch(s, mean))
    if s.steps is not None and s.steps < batches.MIN_STEPS:
        yield Finding("W-FEW-STEPS", f"{s.steps:.0f} steps: below {batches.MIN_STEPS} the adapter, which starts at zero, is still growing",
                      "a smaller batch or more epochs")  # fmt: skip


def _smaller_batch(s: Seen, mean: int) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The default batch from these GPUs: fewer passes, then smaller ones, then fewer GPUs."""
    r = s.recipe
    micro = min(r.micro_batch or 1, max(1, batches.DEFAULT_BATCH // r.gpus))
    passes = max(1, batches.DEFAULT_BATCH // (micro * r.gpus))
    if batches.extra_samples(micro * passes * r.gpus, mean).value > DEAR_BATCH:
        return (
            f"fewer GPUs: {batches.DEFAULT_BATCH} of them make a batch of {batches.DEFAULT_BATCH} with one sequence each",
            (),
        )
    fix, change = s.set("accumulation", str(passes))
    if micro != r.micro_batch:
        first, narrower = s.set("micro_batch", str(micro))
        return f"{first}, {fix}", (*narrower, *change)
    return fix, change


def sharding(s: Seen) -> Found:
    """How the model is shared out over GPUs, and whether the launch is the one that was asked about."""
    r = s.recipe
    p = r.sharding
    if p.processes and s.gpu_name and p.processes != r.gpus:
        yield Finding("W-GPUS", f"the launch starts {p.processes} processes; {'one GPU is' if r.gpus == 1 else f'{r.gpus} GPUs are'} named",
                      f"--gpu {p.processes}x{s.gpu_name}")  # fmt: skip
    if p.batch and (s.gpu_name or p.processes) and r.batch and p.batch != r.batch:
        least = (r.micro_batch or 1) * r.gpus
        what = f"{r.micro_batch} x {r.accumulation} on {r.gpus} GPU{'s' if r.gpus > 1 else ''} are {r.batch}"
        fix = (
            f"at most {max(1, p.batch // (r.micro_batch or 1))} GPUs, or train_batch_size: auto"
            if p.batch < least
            else "train_batch_size: auto"
        )
        yield Finding(
            "E-WORLD-BATCH", f"DeepSpeed is told a train_batch_size of {p.batch}, but {what}: it refuses to start", fix
        )
    if p.weights and r.gpus > 1 and r.weights == "nf4" and not p.floats:
        yield Finding("W-4BIT-WHOLE", f"{p.name}: 4-bit weights are stored as integers, which are not split: every GPU holds them all",
                      "bnb_4bit_quant_storage: bfloat16", (("bnb_4bit_quant_storage", "bfloat16"),))  # fmt: skip
    if (
        s.unsplit
        and s.p_fit is not None
        and s.p_fit >= s.min_p_fit
        and s.unsplit[0] >= s.min_p_fit
        and s.step_s > 1.05 * s.unsplit[1] > 0
    ):
        yield Finding("N-SHARD-WIDE", f"{p.name} gathers the weights in every pass; whole on each GPU they fit too (P {s.unsplit[0]:.2f}), "
                      f"and a step takes {s.unsplit[1] / s.step_s:.2g} of the time", "ZeRO-2 or DDP")  # fmt: skip
    if r.lora is None and p.engine == "fsdp" and p.version == 2:
        yield Finding("N-FSDP2-MASTER", "FSDP2 updates fp32 copies of 16-bit weights, but accelerate 1.13 did not, and converged 28 times slower",
                      "another accelerate than 1.13")  # fmt: skip


def group(s: Seen) -> Found:
    r = s.recipe
    if r.objective != RL or not r.group:
        return
    if r.group == 1:
        fix, change = s.set("group", "8")
        yield Finding(
            "E-GROUP-ONE",
            "a group of one sample is its own mean: every advantage is zero, nothing is learnt",
            fix,
            change,
        )
        return
    if r.group < SMALL_GROUP:
        fix, change = s.set("group", "8")
        yield Finding("W-GROUP-SMALL", f"groups of {r.group}: most have no contrast between their samples", fix, change)
    if r.tool == "trl" and r.batch and r.batch % r.group:
        fix, change = s.set("accumulation", str(r.group))
        yield Finding(
            "E-GROUP-BATCH",
            f"{r.batch} sequences a step on {'one GPU' if r.gpus == 1 else f'{r.gpus} GPUs'} are no multiple of the group of {r.group}: "
            "TRL refuses it",
            fix,
            change,
        )


def precision(s: Seen) -> Found:
    """Weights in 16 bits that an optimizer updates; a base in 32 bits that nothing updates."""
    r = s.recipe
    if r.lora is None and r.pure and r.learning_rate:
        if s.recipe.tool == "trl":
            fix, change = s.set("weights", "float32")
        elif s.recipe.tool == "llamafactory":
            fix, change = s.set("weights", "false")
        elif s.recipe.tool == "unsloth":
            fix, change = "float32_mixed_precision: true", (("float32_mixed_precision", "true"),)
        else:
            fix, change = s.set("weights", "false")
        yield Finding("W-BF16-FULL", f"the optimizer updates bf16 weights: it moves a weight by about {rate_text(r.learning_rate)} a step, and bf16 "
                      f"rounds away what is below {BF16_STEP / 2:.2g} of the weight, so weights above {2 * r.learning_rate / BF16_STEP:.2g} hardly "
                      "move", fix, change)  # fmt: skip
    if r.lora and r.weights == "float32":
        fix, change = s.set("weights", "true" if r.tool == "axolotl" else "bfloat16")
        yield Finding("W-FP32-BASE", f"{s.said('weights')} float32: the frozen base takes {gib(4.0 * s.model.total)} instead of "
                      f"{gib(2.0 * s.model.total)}", fix, change)  # fmt: skip


def recomputing(s: Seen) -> Found:
    r = s.recipe
    if r.lora and r.checkpointing and r.reentrant and not r.wired and "embed" not in s.manifest.groups:
        yield Finding("E-CHECKPOINT-GRAD", "re-entrant checkpointing of a frozen embedding's output: no gradient reaches the adapter, lora_B stays 0",
                      "gradient_checkpointing_kwargs: {use_reentrant: false}",
                      (("gradient_checkpointing_kwargs", "{use_reentrant: false}"),))  # fmt: skip


def packing(s: Seen) -> Found:
    r = s.recipe
    if r.packing and not r.packed_attention:
        if r.tool == "llamafactory":
            fix, change = s.set("packed_attention", "true")
        else:
            fix, change = s.set("attention", "flash_attention_2")
        yield Finding("W-PACKING-ATTENTION", "samples packed into a row attend to each other unless the attention is told where they end",
                      fix, change)  # fmt: skip
    if (
        s.data
        and s.data.path
        and "packing" in s.words
        and not r.packing
        and r.objective == SFT
        and s.data.packing_efficiency > 1.5 * s.data.batch_efficiency
    ):
        fix, change = s.set("packing", "true")
        yield Finding("N-PACKING", f"padded in batches {s.data.batch_efficiency:.0%} of the computed tokens are real, packed "
                      f"{s.data.packing_efficiency:.0%}", f"{fix}, which changes what a batch is", change)  # fmt: skip
    if s.data and s.data.truncated:
        yield Finding("W-CUT", f"{s.data.truncated:,} of {s.data.examples:,} examples are longer than {r.max_length} tokens: "
                      f"{s.data.tokens_lost:,} tokens are lost", *s.set("max_length", str(s.data.longest)))  # fmt: skip


def length(s: Seen) -> Found:
    longest = s.recipe.max_length or 0
    if s.model.max_positions and longest > s.model.max_positions:
        fix, change = s.set("max_length", str(s.model.max_positions))
        yield Finding("E-LENGTH", f"{longest} tokens exceed the model's {s.model.max_positions} positions", fix, change)


def keys(s: Seen) -> Found:
    """A key that the tool does not know: a typo of one that it knows, or one of another version."""
    for key in s.recipe.unknown:
        meant = likely(key, s.known)
        if meant:
            yield Finding("E-KEY", f"{s.label} knows no {key}: it is refused or ignored", f"{meant} is the nearest key")
        else:
            yield Finding("W-KEY", f"{s.label} knows no {key}", "remove it, or check it against your version")


def trust(s: Seen) -> Found:
    if s.recipe.remote_code:
        fix, change = s.set("remote_code", "false")
        yield Finding("W-REMOTE-CODE", "trust_remote_code runs Python that comes with the model", fix, change)


def fit(s: Seen) -> Found:
    if s.p_fit is None or s.peak is None:
        return
    if s.p_fit < s.min_p_fit:
        peak = f"peak {gib(s.peak.value)} [{gib(s.peak.low)}, {gib(s.peak.high)}] of {gib(s.gpu_bytes)}"
        if s.smallest_words:
            fix = f"{', '.join(f'{key}: {value}' for key, value in s.smallest_words)} ({s.smallest})"
        else:
            fix = s.smallest or "no single change or pair of changes fits: a larger GPU, or a smaller model"
        yield Finding(
            "E-NOFIT", f"P(fit) {s.p_fit:.2f} on {s.gpu_name} is below {s.min_p_fit:g}: {peak}", fix, s.smallest_words
        )
    if s.whole_peak is not None and s.whole_peak.value > 1.05 * s.peak.value:
        yield Finding("N-LOSS", f"{s.label} computes its loss in pieces; a version that has all logits at once needs "
                      f"{gib(s.whole_peak.value)} [{gib(s.whole_peak.low)}, {gib(s.whole_peak.high)}]", "nothing with this version")  # fmt: skip


CHECKS: tuple[Callable[[Seen], Found], ...] = (
    fit, sharding, rates, scale, targets, mixture, whole_modules, head, attention_only, rank, batch, group, precision,
    recomputing, packing, length, keys, trust,
)  # fmt: skip


def findings(s: Seen) -> list[Finding]:
    """Every check's findings, errors first."""
    found = [finding for check in CHECKS for finding in check(s)]
    return sorted(found, key=lambda f: "EWN".index(f.code[0]))


def _two(value: float) -> float:
    """Two significant digits: the third would be noise.

    >>> _two(2.8642e-4)
    0.00029
    """
    return float(f"{value:.1e}")


def _servable_below(rank: float) -> int:
    return max((n for n in capacity.SERVABLE_RANKS if n <= rank), default=1)


def _width(model: Model, name: str) -> int:
    rows = [row for row in (*model.linears, *model.tower, model.head) if row.name == name]
    return min((min(row.d_in, row.d_out) for row in rows), default=10**9)
