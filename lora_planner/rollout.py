"""How long it takes to sample for reinforcement learning, and what memory it needs: a roofline of decoding.

A step of decoding gives each of B sequences one token. Its kernels come in three families, and each takes

    max(bytes / (bandwidth * efficiency), flops / (peak * compute_efficiency)) + kernels * seconds   [s]

    matrices    all weights that every token passes, read once for all B sequences
    experts     only those that some token chose
    attention   the cache of every sequence, read once; or the state of a linear layer, read and written

The engine adds its host work, other kernels and sampling. Sequences start together and leave when they are done, so
that a few long ones run alone in the end; where not all fit into the memory, the next one starts when one leaves.

The constants are rows of `data/rollout_constants.json` by engine. Those of vLLM's kernels are fitted; what the
engine adds, and how lengths spread, is assumed. A change of `kernel_s`, `matrices`, `experts` or `attention` asks for
a new fit: python -m calibrate.rollout.

Letters: B sequences in flight, N samples of a step, m their mean length in generated tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from math import exp, floor, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING

from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import CPU, DATA, Constant, Gpu
from lora_planner.flops import split
from lora_planner.ledger import ASSUMED, BASES, DERIVED, EXACT, Estimate, Ledger, Term
from lora_planner.method import Method
from lora_planner.model import Attention, Model, Scan
from lora_planner.params import file_bytes
from lora_planner.throughput import BACKWARD, DEQUANTISE_BYTES, FORWARD, Stack, Work, kernel_count
from lora_planner.workload import shape

if TYPE_CHECKING:
    from lora_planner.data_file import DataFacts
    from lora_planner.lengths import Histogram

VLLM, HF = "vllm", "hf"
ENGINES = (VLLM, HF)
BF16, FP32 = 2, 4
#: how often a cache is read or written a token: transformers' DynamicCache copies it with torch.cat to append
CACHE_PASSES = {VLLM: 1, HF: 3}
#: bytes a logit in sampling: bf16 out and in, cast to fp32, scaled, softmax, the draw, each read and written
SAMPLING_BYTES = 2 * BF16 + 4 * 2 * FP32
#: products a layer in an engine that fuses q, k, v and gate, up
PRODUCTS = 4
#: segments in which the lengths of a step's samples are followed
SEGMENTS = 16
#: an answer may be so many times the mean where no limit is given
ASSUMED_LIMIT = 4.0
#: tokens of a prompt where nobody gave one
ASSUMED_PROMPT = 200
#: ranks from here on take the tax of large adapters
LARGE_RANK = 256
#: tensors that the trainer leaves on the GPU while an engine samples: name and bytes
Resident = tuple[tuple[str, float], ...]
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Sampling:
    """What is sampled: mean tokens of a prompt and of an answer, `group` answers a problem, the most tokens an answer
    may have. `limit` 0: ASSUMED_LIMIT times the mean."""

    prompt: float
    answer: float
    group: int
    engine: str = VLLM
    limit: float = 0.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UnknownName(f"no engine {self.engine!r}", "--engine", f"Known: {', '.join(ENGINES)}.", known=ENGINES)
        if not 0 < self.answer < 1e9 or not 0 <= self.prompt < 1e9 or self.group < 1:
            raise BadInput(f"{self.group} samples of {self.answer:g} tokens after {self.prompt:g}", "--sample-tokens",
                           "Use positive numbers.")  # fmt: skip

    @property
    def longest(self) -> float:
        """Tokens of the longest answer that memory has to hold."""
        return max(self.answer, self.limit or ASSUMED_LIMIT * self.answer)


# ---------------------------------------------------------------- constants


@cache
def rows() -> tuple[Constant, ...]:
    """Every row of data/rollout_constants.json, checked."""
    document = json.loads((DATA / "rollout_constants.json").read_text(encoding="utf-8"))
    found = tuple(Constant(**row) for row in document["constants"])
    for row in found:
        if not row.low <= row.value <= row.high or row.basis not in BASES:
            raise ValueError(f"constant {row.name!r} of {row.stack!r} on {row.gpu!r} is inconsistent")
    return found


@cache
def constants(engine: str, gpu_name: str) -> Mapping[str, Constant]:
    """Rows of an engine: those of every engine, then its own, and of each those of this GPU before the pooled ones.

    >>> constants("vllm", "h100-sxm-80gb")["cache_efficiency"].gpu, constants("vllm", "l4-24gb")["cache_efficiency"].gpu
    ('h100-sxm-80gb', '*')
    """
    found: dict[str, Constant] = {}
    for of, on in (("*", "*"), ("*", gpu_name), (engine, "*"), (engine, gpu_name)):
        found |= {row.name: row for row in rows() if row.stack == of and row.gpu == on}
    return found


# ---------------------------------------------------------------- what a sequence keeps


@dataclass(frozen=True, slots=True)
class Kept:
    """What one kind of layer keeps of a sequence: bytes a token, of the last `window` at most, and a fixed state.
    `pair_flops`: of a new token with one that is kept."""

    layers: int
    token_bytes: float
    window: int | None = None
    state_bytes: float = 0.0
    pair_flops: float = 0.0


@lru_cache(maxsize=1024)
def kept(model: Model, engine: str = VLLM, element_bytes: int = BF16) -> tuple[Kept, ...]:
    """What each kind of layer keeps.

        attention   kv_heads (qk_head_dim + v_head_dim)                   [elements a token]
        MLA         the latent and the rotary key
        scan        heads * head_dim * state in fp32, and the inputs of its convolution

    A layer with attention and a scan side by side (falcon_h1) counts its attention only, a convolution without a scan
    (lfm2) nothing. Source: caches of transformers 5.24, which tests/test_rollout.py compares; vLLM's gated delta
    kernel takes the time of an fp32 state.
    """
    found = []
    for block in model.blocks:
        mixer = block.mixer
        if isinstance(mixer, Attention):
            latent = next((r for r in block.linears if r.name.endswith("kv_a_proj_with_mqa")), None)
            widths = mixer.qk_head_dim + mixer.v_head_dim
            width, pair = mixer.kv_heads * widths, 2.0 * mixer.heads * widths
            if latent:
                up = next(r for r in block.linears if r.name.endswith("kv_b_proj"))
                width = latent.d_out
                # vLLM compares in the latent space; transformers makes keys and values of all heads anew
                pair = pair + 2.0 * up.d_in * up.d_out if engine == HF else 2.0 * mixer.heads * (latent.d_out + up.d_in)
            found.append(Kept(block.count, float(element_bytes * width), mixer.window, 0.0, pair))
        elif isinstance(mixer, Scan):
            state = FP32 * mixer.heads * mixer.head_dim * mixer.state
            inputs = element_bytes * mixer.conv_channels * mixer.conv_kernel
            found.append(Kept(block.count, 0.0, None, float(state + inputs)))
    return tuple(found)


def cache_bytes(model: Model, tokens: float, engine: str = VLLM, element_bytes: int = BF16) -> float:
    """What all layers keep of a sequence of `tokens`.

    sum over layers of token_bytes * min(tokens, window) + state_bytes        [bytes]
    """
    return sum(
        k.layers * (k.token_bytes * (tokens if k.window is None else min(tokens, k.window)) + k.state_bytes)
        for k in kept(model, engine, element_bytes)
    )


def distinct(experts: int, top_k: int, tokens: float) -> float:
    """Experts that some of `tokens` chose, where each token chooses `top_k` at random.

        E (1 - (1 - k / E)^tokens)        [experts]

    >>> distinct(128, 8, 1), round(distinct(128, 8, 32), 1)
    (8.0, 111.8)
    """
    if not experts or top_k >= experts:
        return float(experts)
    return float(experts * (1 - (1 - top_k / experts) ** tokens))


# ---------------------------------------------------------------- one step of decoding


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights of a model as an engine holds them. Elements, not bytes, but for `bytes`."""

    matrices: float  # elements that every token passes, unembedding included
    widths: float  # features in and out of them
    experts: tuple[tuple[int, int, float], ...]  # experts, top k, elements of one expert in all its layers
    expert_layers: int
    layers: int
    mixers: int
    vocab: int
    bytes: float


@lru_cache(maxsize=1024)
def loaded(model: Model, element_bytes: int = BF16) -> Loaded:
    """The text model's weights, experts apart."""
    matrices = float(model.head.d_in * model.head.d_out)
    widths = float(model.head.d_in + model.head.d_out)
    chosen: list[tuple[int, int, float]] = []
    expert_layers = 0
    for row in model.extra_linears:
        matrices, widths = matrices + row.d_in * row.d_out * row.used, widths + (row.d_in + row.d_out) * row.used
    for block in model.blocks:
        each = 0.0
        for row in block.linears:
            if row.group == "experts" and block.experts:
                each += row.d_in * row.d_out * row.count / block.experts * block.count
            else:
                matrices += row.d_in * row.d_out * row.used * block.count
                widths += (row.d_in + row.d_out) * row.used * block.count
        if each:
            chosen.append((block.experts, block.top_k, each))
            expert_layers += block.count
    mixers = sum(block.count for block in model.blocks if block.mixer is not None)
    return Loaded(matrices, widths, tuple(chosen), expert_layers, model.layers, mixers, model.vocab_size,
                  float(element_bytes * model.total))  # fmt: skip


def kernel_s(moved: float, flops: float, bandwidth: float, peak: float) -> tuple[float, bool]:
    """Seconds of a family of kernels, and whether memory decides: max(moved / bandwidth, flops / peak).

    Source: Williams et al. 2009, "Roofline"; `bandwidth` and `peak` are what these kernels reach of the card's.

    >>> kernel_s(10.0, 10.0, 2.0, 4.0)
    (5.0, True)
    """
    return max(moved / bandwidth, flops / peak), moved / bandwidth >= flops / peak


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as an engine uses it: its rates, and the engine's constants."""

    bandwidth: float
    peak: float
    element_bytes: int
    on_host: bool  # the host executes the kernels itself
    known: Mapping[str, Constant] = field(hash=False, compare=False)

    def __getitem__(self, name: str) -> float:
        return self.known[name].value


def card(gpu: Gpu, engine: str) -> Card:
    """The dtype is that of training: bf16 where there is hardware for it, else fp16, fp32 on a CPU."""
    cpu = gpu.form == CPU
    if cpu and engine == VLLM:
        raise BadInput(f"nobody timed vLLM on {gpu.name}", "--engine", "Use --engine hf on a processor.")
    dtype = "fp32" if cpu else "bf16" if "bf16" in gpu.peak_flops_per_s else "fp16"
    return Card(gpu.hbm_bytes_per_s, gpu.peak(dtype), FP32 if cpu else BF16, cpu, constants(engine, gpu.name))


@dataclass(frozen=True, slots=True)
class Host:
    """What an engine that starts its kernels one by one needs besides: kernels, seconds each, 4-bit weights to expand
    and the share of the bandwidth at which it does."""

    launches: float = 0.0
    launch_s: float = 0.0
    expanded: float = 0.0
    expand_efficiency: float = 1.0


def decode_step(w: Loaded, caches: tuple[Kept, ...], sequences: float, context: float, c: Card, engine: str = VLLM,
                host: Host = Host()) -> dict[str, float]:  # fmt: skip
    """Seconds of one step of decoding by cause; their sum is the step.

    matrices    max(b (W + B widths) / bandwidth', 2 B W / peak')
    experts     max(b distinct(E, k, B) w / bandwidth', 2 B k w / peak')
    cache       max(B cache_bytes(context) / bandwidth', B pairs / peak')
    kernels     (4 layers + 1) product_s + mixers attention_s + expert layers experts_s + layers layer_s
    sampling    B V SAMPLING_BYTES / bandwidth'
    host        host_s + B sequence_s
    launches    for engines that start each kernel from Python: what is left of kernels * launch_s   [s]
    """
    e = float(c.element_bytes)
    stream, peak = c.bandwidth * c["matrix_efficiency"], c.peak * c["compute_efficiency"]
    found = dict.fromkeys(CAUSES, 0.0)
    s, by_memory = kernel_s(e * (w.matrices + sequences * w.widths), 2 * sequences * w.matrices, stream, peak)
    found["matrices" if by_memory else "products"] += s
    for experts, top_k, each in w.experts:
        moved = e * distinct(experts, top_k, sequences) * each
        s, by_memory = kernel_s(moved, 2 * sequences * top_k * each, c.bandwidth * c["expert_efficiency"], peak)
        found["experts" if by_memory else "products"] += s
    for k in caches:
        seen = context if k.window is None else min(context, k.window)
        moved = sequences * k.layers * (CACHE_PASSES[engine] * k.token_bytes * seen + 2 * k.state_bytes)
        flops = sequences * k.layers * k.pair_flops * seen
        s, by_memory = kernel_s(moved, flops, c.bandwidth * c["cache_efficiency"], peak)
        found["cache" if by_memory else "products"] += s
    found["sampling"] = sequences * w.vocab * SAMPLING_BYTES / stream
    found["dequantise"] = host.expanded * DEQUANTISE_BYTES / (c.bandwidth * host.expand_efficiency)
    if host.launches:
        floor_s = host.launches * host.launch_s
        found["launches"] = floor_s if c.on_host else max(0.0, floor_s - sum(found.values()))
    else:
        found["kernels"] = (
            (PRODUCTS * w.layers + 1) * c["product_s"] + w.mixers * c["attention_s"]
            + w.expert_layers * c["experts_s"] + w.layers * c["layer_s"]
        )  # fmt: skip
    found["host"] = c["host_s"] + sequences * c["sequence_s"]
    return found


#: causes of a step's seconds, and the constants that say how sure each is: seconds go as 1 / a rate, or as a time
CAUSES: dict[str, tuple[str, ...]] = {
    "matrices": ("matrix_efficiency",), "experts": ("expert_efficiency",), "products": ("compute_efficiency",),
    "cache": ("cache_efficiency",), "sampling": ("matrix_efficiency",), "dequantise": (), "kernels": ("layer_s",),
    "launches": (), "host": ("host_s", "sequence_s"),
}  # fmt: skip


# ---------------------------------------------------------------- lengths


def quantile(mean: float, sigma: float, share: float, limit: float) -> float:
    """The length that this share of the samples does not exceed, log-normal and cut at a limit.

        min(limit, mean * exp(sigma z - sigma^2 / 2))        [tokens]

    >>> round(quantile(1000, 0.5, 0.5, 1e9)), round(quantile(1000, 0.5, 0.99, 1e9)), quantile(1000, 0.5, 0.99, 2048)
    (882, 2824, 2048)
    """
    return min(limit, mean * exp(sigma * _NORMAL.inv_cdf(share) - sigma * sigma / 2))


def answer_histogram(s: Sampling, samples: int, sigma: float) -> Histogram:
    """Lengths of prompt and answer, for what pads and holds them in training: equal shares, then the longest."""
    bins = min(32, samples)
    found: dict[int, int] = {}
    for i in range(bins):
        length = max(1, round(s.prompt + quantile(s.answer, sigma, (i + 0.5) / bins, s.longest)))
        n = samples * (i + 1) // bins - samples * i // bins
        found[length] = found.get(length, 0) + n
    last = max(found)
    longest = max(last, round(s.prompt + quantile(s.answer, sigma, 1 - 0.5 / max(2, samples), s.longest)))
    if longest > last and found[last] > 1:
        found[last] -= 1
        found[longest] = 1
    return tuple(sorted(found.items()))


def samples_of(
    data: DataFacts | None, problems: int, group: int, answer: float | None, engine: str, max_length: int | None
) -> tuple[DataFacts, Sampling]:
    """What a pass over the problems trains on, and what it samples: problems x group samples.

    a file     a row is a problem with one answer: its length is a sample's; with `answer` given, a prompt
    a number   of tokens of all samples; with `answer` given, the rest of a sample is prompt
    neither    `answer` tokens after a prompt of ASSUMED_PROMPT
    """
    from lora_planner.data_file import DataFacts

    samples = problems * group
    if samples < 1:
        raise BadInput(f"{problems} problems x {group} samples", "--problems, --group", "Use positive numbers.")
    if answer is not None and not 1 <= answer < 1e9:
        raise BadInput(f"answers of {answer:g} tokens", "--sample-tokens", "Use 1 or more.")
    if data is None or not data.path:
        mean = data.tokens.value / samples if data else ASSUMED_PROMPT + (answer or 0.0)
        prompt = mean - answer if answer else 0.0
    else:
        mean = data.tokens.value / max(1, data.examples)
        prompt = mean if answer else mean - data.trained_tokens.value / max(1, data.examples)
        mean = prompt + answer if answer else mean
    answered = answer or mean - prompt
    if prompt < 0 or answered < 1:
        raise BadInput(f"{mean:.3g} tokens a sample of {samples:,}, {answered:.3g} of them its answer",
                       "--tokens, --sample-tokens", "--tokens counts all samples: problems x group x their length.")  # fmt: skip
    most = max_length or (data.longest if data and data.path and not answer else 0)
    limit = most - prompt if most else 0.0
    if max_length and limit < answered:
        raise BadInput(f"answers of {answered:,.0f} tokens on average after {prompt:,.0f} do not fit into {max_length}",
                       "--max-length", "Allow more, or sample less.")  # fmt: skip
    sampling = Sampling(prompt, answered, group, engine, limit)
    warnings = []
    if data is None or not data.path or answer:
        warnings.append(f"lengths of answers are assumed: log-normal around {answered:,.0f} tokens, at most "
                        f"{sampling.longest:,.0f}; they often grow in training")  # fmt: skip
        lengths = answer_histogram(sampling, samples, constants(engine, "*")["length_sigma"].value)
    else:
        lengths = data.histogram
        if data.examples != samples:
            warnings.append(
                f"{data.examples:,} rows for {samples:,} samples a pass: the lengths are the file's, the number is not"
            )
    base = data or DataFacts.from_tokens(round(mean * samples), max_length)
    kept_ = tuple(w for w in base.warnings if base.path)
    spread = Estimate(0.5, 1.0, 2.0, "tokens", ASSUMED, "the mean length of answers; it changes as the model learns")
    trained = spread.scaled(answered * samples)
    told = data is not None and not (data.path and answer)  # else the answers' part is somebody's guess
    tokens = base.tokens.scaled(mean * samples / base.tokens.value) if told else spread.scaled(mean * samples)
    return replace(base, rows=samples, examples=samples, tokens=tokens, trained_tokens=trained, histogram=lengths,
                   warnings=(*kept_, *warnings)), sampling  # fmt: skip


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of decoding: `sequences` in flight at a mean context, for so many steps."""

    sequences: float
    context: float
    steps: float


def segments(samples: int, at_once: int, s: Sampling, sigma: float, leave: bool = True) -> tuple[Segment, ...]:
    """What runs when: a full house while more samples wait, then the last ones until the longest is done.

        full    (N - C) m / C steps of C sequences, at a mean context of prompt + E[l^2] / 2 E[l]
        last    C sequences that start together and leave at the quantiles of the lengths

    `leave` False: a batch runs until its longest sample is done, all of it (transformers' generate).
    """
    limit = s.longest
    longest = quantile(s.answer, sigma, 1 - 0.5 / max(2, samples), limit)
    if not leave:
        rounds = -(-samples // at_once)
        return (Segment(samples / rounds, s.prompt + longest / 2, rounds * longest),)
    found = []
    if samples > at_once:
        age = s.answer * exp(sigma * sigma) / 2
        found.append(Segment(at_once, s.prompt + min(age, limit), (samples - at_once) * s.answer / at_once))
    last = min(samples, at_once)
    bins = min(SEGMENTS, last)
    done = 0.0
    for i in range(bins):
        until = quantile(s.answer, sigma, (i + 0.5) / bins, limit)
        if until > done:
            found.append(Segment(last * (bins - i) / bins, s.prompt + (done + until) / 2, until - done))
            done = until
    if longest > done:
        found.append(Segment(1.0, s.prompt + (done + longest) / 2, longest - done))
    return tuple(found)


# ---------------------------------------------------------------- the sampling of one step


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampling for one step of training. `last_tenth`: share of its time in which at most a tenth of the sequences
    still run; `fits`: whether there is room for one sample of the largest length, and how surely."""

    ledger: Ledger
    memory: Ledger
    minimum: Estimate
    samples: int
    at_once: int
    last_tenth: float
    allowed_bytes: float
    engine_bytes: float
    engine_share: float  # of the GPU's memory that the engine takes: its weights, graphs and cache
    resident: Resident

    @property
    def fits(self) -> bool:
        return self.at_once > 0


def tax(method: Method, known: Mapping[str, Constant]) -> Constant:
    """Factor on the GPU's work of an engine that serves the adapter beside the base; 1 where nothing is added."""
    if method.is_full:
        return Constant("none", "*", "*", 1.0, 1.0, 1.0, EXACT, 0, "no adapter")
    return known["adapter_tax_large" if method.rank >= LARGE_RANK else "adapter_tax"]


def rollout(
    model: Model, method: Method, gpu: Gpu, s: Sampling, samples: int, stack: Stack, resident: Resident = ()
) -> Rollout:
    """Seconds and memory of sampling `samples` answers on one GPU.

    resident: what the trainer keeps on the GPU meanwhile: base, adapters, optimizer states. An engine "vllm" has a base of its own in 16 bit beside it and sleeps while the trainer works (its weights wait in the host's
    memory); "hf" samples with the trainer's model.
    """
    if s.engine not in ENGINES or samples < 1:
        raise BadInput(f"{samples} samples", "--group", "Use 1 or more.")
    c = card(gpu, s.engine)
    w = loaded(model, c.element_bytes)
    caches = kept(model, s.engine, c.element_bytes)
    sigma = c.known["length_sigma"]
    engine_bytes = w.bytes if s.engine == VLLM else 0.0
    # ------------------------------------------------ memory
    allowed = c["memory_share"] * gpu.memory_bytes
    beside = c.known["graph_bytes"]
    one = cache_bytes(model, s.prompt + s.longest, s.engine, c.element_bytes)
    mean = cache_bytes(model, s.prompt + s.answer, s.engine, c.element_bytes)
    logits = float(w.vocab * (c.element_bytes + 2 * FP32))
    room = allowed - sum(size for _, size in resident) - engine_bytes - beside.value
    at_once = min(samples, floor(room / (max(mean, 1.0) + logits))) if room >= one + logits else 0
    terms = [Term(name, size, EXACT, "memory.memory") for name, size in resident if size]
    if engine_bytes:
        terms.append(Term("engine weights", engine_bytes, EXACT, "rollout.loaded"))
    terms.append(Term("graphs and workspace", beside.value, beside.basis, "rollout.constants", beside.low, beside.high,
                      beside.source))  # fmt: skip
    smallest = Ledger("memory", "B", [*terms, Term("cache", one + logits, DERIVED, "rollout.cache_bytes")]).estimate()
    terms.append(Term("cache", max(1, at_once) * mean, DERIVED, "rollout.cache_bytes"))
    terms.append(Term("sampled logits", max(1, at_once) * logits, DERIVED, "rollout.rollout"))
    memory = Ledger("memory", "B", terms, f"one GPU, sampling with {s.engine}")
    # ------------------------------------------------ time
    host = _host(model, method, s, stack)
    house = max(1, at_once)

    def seconds(of: float) -> tuple[dict[str, float], float, float]:
        sums, last, all_ = dict.fromkeys(CAUSES, 0.0), 0.0, 0.0
        for part in segments(samples, house, s, of, leave=s.engine == VLLM):
            step = decode_step(w, caches, part.sequences, part.context, c, s.engine, host)
            for cause, value in step.items():
                sums[cause] += value * part.steps
            total = sum(step.values()) * part.steps
            all_ += total
            last += total if part.sequences <= samples / 10 else 0.0
        return sums, all_, last

    sums, all_, last = seconds(sigma.value)
    found = [_term(cause, value, c.known) for cause, value in sums.items() if value]
    worked = sum(value for cause, value in sums.items() if cause not in ("host", "launches"))
    if s.engine == VLLM:
        factor = tax(method, c.known)
        if factor.high > 1:
            found.append(Term("serving the adapter", worked * (factor.value - 1), factor.basis, "rollout.tax",
                              worked * (factor.low - 1), worked * (factor.high - 1), factor.source))  # fmt: skip
    prompts = samples / s.group if s.engine == VLLM else samples  # a group shares its prompt's cache
    found.append(_prefill(w, caches, prompts * s.prompt, s.prompt, c))
    total = sum(term.value for term in found)
    short, long = seconds(sigma.low)[1], seconds(sigma.high)[1]
    found.append(Term("spread of lengths", 0.0, sigma.basis, "rollout.quantile", min(0.0, short - all_),
                      max(0.0, long - all_), sigma.source))  # fmt: skip
    spread = c.known["spread"]
    found.append(Term("spread", 0.0, spread.basis, "rollout.rollout", total * (spread.low - 1), total * (spread.high - 1),
                      spread.source))  # fmt: skip
    ledger = Ledger("rollout", "s", found, f"engine {s.engine}, {gpu.name}, {samples} samples, {house} at once")
    taken = memory.total - sum(size for _, size in resident)
    return Rollout(ledger, memory, smallest, samples, at_once, last / all_ if all_ else 0.0, allowed, engine_bytes,
                   taken / gpu.memory_bytes, resident)  # fmt: skip


def _host(model: Model, method: Method, s: Sampling, stack: Stack) -> Host:
    """What transformers' generate asks of the host: the kernels of a forward pass, adapter and 4-bit ones included."""
    if s.engine == VLLM:
        return Host()
    widths = shape(model, method)
    launches = kernel_count(layers=model.layers, adapted=widths.adapted, quantised=widths.quantised, passes=FORWARD)
    return Host(launches, stack["launch_s"], widths.quantised_params, stack["dequantise_efficiency"])


def _term(cause: str, value: float, known: Mapping[str, Constant]) -> Term:
    """Seconds of a cause; its interval is that of the constants behind it, as if they erred together."""
    names = CAUSES[cause]
    if not names:
        return Term(cause, value, DERIVED, "rollout.decode_step")
    low, high = value, value
    for c in (known[name] for name in names):
        if not c.value:
            continue
        below, above = (c.low, c.high) if c.name.endswith("_s") else (c.value**2 / c.high, c.value**2 / c.low)
        low, high = min(low, value * below / c.value), max(high, value * above / c.value)
    basis = max((known[name].basis for name in names), key=BASES.index)
    return Term(cause, value, basis, "rollout.decode_step", low, high, ", ".join(names))


def _prefill(w: Loaded, caches: tuple[Kept, ...], tokens: float, length: float, c: Card) -> Term:
    """A forward pass over the prompts.

    (2 active tokens + pairs) / (peak * compute_efficiency)        [s]
    """
    active = w.matrices + sum(top_k * each for _, top_k, each in w.experts)
    pairs = sum(k.layers * k.pair_flops for k in caches) * length / 2
    s = tokens * (2 * active + pairs) / (c.peak * c["compute_efficiency"])
    return replace(_term("products", s, c.known), name="prompts", why="rollout._prefill")


# ---------------------------------------------------------------- the phases beside it


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a step: seconds a step, and its share of the whole."""

    name: str
    seconds: Estimate
    share: float
    note: str = ""


def forward_work(asked: Work, model: Model, method: Method, *, micro_batch: int, seq_len: int, accumulation: int,
                 attention: str, checkpointing: str = "none") -> Work:  # fmt: skip
    """The forward passes of a step alone, as log-probabilities of the samples need them once more."""
    parts = split(model, method, seq_len, attention, "none", micro_batch)
    widths = shape(model, method)
    scores = parts.scores_forward if attention == "eager" else parts.scores_visible_forward
    share = parts.matrices_forward / (asked.linear_flops / asked.tokens)
    passes = FORWARD + BACKWARD + (FORWARD if checkpointing == "full" else 0)
    return replace(
        asked,
        linear_flops=parts.matrices_forward * asked.tokens,
        grouped_flops=asked.grouped_flops * share,
        adapter_flops=(parts.adapters_forward + parts.scans_forward) * asked.tokens,
        attention_flops=scores * asked.tokens,
        activation_bytes=asked.activation_bytes * FORWARD / passes,
        weight_bytes_read=float(BF16) * widths.matrix_params * accumulation,
        optimizer_bytes=0.0,
        dequantised_params=widths.quantised_params * accumulation,
        kernels=kernel_count(layers=model.layers, adapted=widths.adapted, quantised=widths.quantised, passes=FORWARD,
                             micro_batches=accumulation),
    )  # fmt: skip


def sync_ledger(model: Model, method: Method, gpu: Gpu, s: Sampling, stack: Stack, engine_bytes: float) -> Ledger:
    """Seconds until the engine samples with the new weights.

        adapter file, or all weights, into the engine, and its weights out of and into GPU memory, for it sleeps
        (file + 2 weights) / host rate + sync_s        [s]

    Full fine-tuning copies all weights on the GPU instead of loading a file: 2 weights / bandwidth.
    """
    known = constants(s.engine, gpu.name)
    link = stack.rows["host_bytes_per_s"]
    rate = stack["link_efficiency"] * link.value
    fixed = known["sync_s"]
    sent = 2 * engine_bytes / gpu.hbm_bytes_per_s if method.is_full else file_bytes(model, method) / rate
    asleep = 2 * engine_bytes / rate
    return Ledger("sync", "s", [
        Term("new weights", sent, ASSUMED, "rollout.sync_ledger", sent / 2, sent * 2),
        Term("sleeping and waking", asleep, ASSUMED, "rollout.sync_ledger", asleep * link.value / link.high,
             asleep * link.value / link.low, link.source),
        Term("calls", fixed.value, fixed.basis, "rollout.constants", fixed.low, fixed.high, fixed.source),
    ])  # fmt: skip


def phases_of(parts: Mapping[str, tuple[Estimate, str]]) -> tuple[tuple[Phase, ...], Estimate]:
    """Phases with their shares, and the step: errors of different phases are independent, so they add in quadrature.

    >>> e = lambda low, value, high: Estimate(low, value, high, "s", ASSUMED)
    >>> rows_, step = phases_of({"rollout": (e(3, 6, 9), ""), "training": (e(0, 4, 8), "")})
    >>> step.value, step.high, [p.share for p in rows_]
    (10, 15.0, [0.6, 0.4])
    """
    total = sum(e.value for e, _ in parts.values())
    below = sqrt(sum((e.value - e.low) ** 2 for e, _ in parts.values()))
    above = sqrt(sum((e.high - e.value) ** 2 for e, _ in parts.values()))
    basis = max((e.basis for e, _ in parts.values()), key=BASES.index)
    found = tuple(Phase(name, e, e.value / total if total else 0.0, note) for name, (e, note) in parts.items())
    return found, Estimate(total - below, total, total + above, "s", basis, "sum of the phases of a step")
