"""Work per token: multiplications and additions of matrix products, convolutions and scans.

What is counted is what transformers and peft execute: the scores over all S x S pairs (a causal or
windowed kernel does fewer, see `visible_share`), padded convolutions, the plain PyTorch scans. Norms,
softmax, rotary embeddings, look-ups, dequantisation and the optimizer are no matrix products.

A backward pass computes for each matrix the gradient of its input (dX) where anything before it
trains, and of its weight (dW) where it trains itself. Which input gradients nobody needs follows
from `Linear.reads`, layer by layer, until the first adapted one.

Letters: T tokens of a pass, S sequence length, r rank, N heads, D head width, C chunk of a scan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

from lora_planner.errors import BadInput, UnknownName, UnsupportedAdapter
from lora_planner.ledger import EXACT, Ledger, Term
from lora_planner.method import Method
from lora_planner.method import method as checked_method
from lora_planner.method.adapter import Adapter
from lora_planner.method.targets import adapter_table, top_k
from lora_planner.model import Attention, Block, Linear, Model, Scan

UNIT = "FLOP/token"
#: eager: scores are stored; sdpa: a fused kernel where the layer has one; flash: a fused kernel always
ATTENTION = ("sdpa", "eager", "flash")
CHECKPOINTING = ("none", "full")
#: they drop out the MLP's output, whose mask is saved after the layer's last product
DROPOUT_LAST = frozenset({"gpt2", "gpt_bigcode", "opt", "seed_oss"})

FORWARD, BACKWARD, SKIPPED, AGAIN, STOPPED = "forward", "backward", "skipped", "again", "stopped"
#: kinds of work that a model of time rates alike
SCANS = ("scans", "convolutions")
ADAPTERS = ("adapters", "merged adapters", "DoRA norms")
CONVENTION = (
    "matrix products, convolutions and scans as transformers and peft execute them, 2 FLOP a "
    "multiply-add; attention over all S x S pairs"
)


def matrix(row: Linear) -> int:
    """One token through the copies of a matrix that it passes.

        2 * d_in * d_out * used        [FLOP/token]

    Its two gradients, dX and dW, cost as much each.

    >>> matrix(Linear("q", 4096, 4096))
    33554432
    """
    return 2 * row.d_in * row.d_out * row.used


def idle(row: Linear) -> int:
    """Experts that transformers multiplies although no token chose them (Llama-4).

        2 * d_in * d_out * (computed - used)        [FLOP/token]

    >>> idle(Linear("experts.down_proj", 8192, 5120, count=16, used=1, computed=16))
    1258291200
    """
    return 2 * row.d_in * row.d_out * max(0, row.computed - row.used)


def scores(attention: Attention) -> int:
    """q k^T and the product with v, per token and per token that it could see.

        2 * N * (D_qk + D_v)        [FLOP/token/S]

    >>> scores(Attention(32, 8, 128, 128, (), (), ()))
    16384
    """
    return 2 * attention.heads * (attention.qk_head_dim + attention.v_head_dim)


def scores_backward(attention: Attention, q: bool, k: bool, v: bool, fused: bool) -> int:
    """Of the gradients of probabilities, v, q and k those that lead to something trained.

        2 * N * (D_v [q or k] + D_v [v] + D_qk [q] + D_qk [k])        [FLOP/token/S]

    A fused kernel computes all four or none, and q k^T again: 3 D_qk + 2 D_v, 2.5 times the forward.

    Source: torch 2.13 FlopCounterMode; Dao 2023, arXiv:2307.08691.
    """
    heads, qk, value = attention.heads, attention.qk_head_dim, attention.v_head_dim
    if not (q or k or v):
        return 0
    if fused:
        return 2 * heads * (3 * qk + 2 * value)
    return 2 * heads * (value * (q or k) + value * v + qk * q + qk * k)


def visible_share(window: int | None, seq_len: int) -> float:
    """Pairs that a causal, windowed mask leaves, of all S x S: what a kernel that skips the rest does.

        sum_i min(i, window) / S^2        [share]

    >>> visible_share(None, 4), visible_share(2, 4)
    (0.625, 0.4375)
    """
    w = min(window or seq_len, seq_len)
    return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len**2


def chunks(scan: Scan, seq_len: int) -> int:
    """A scan pads the sequence to whole chunks."""
    return -(-seq_len // scan.chunk)


def scan_forward(scan: Scan, seq_len: int) -> float:
    """The products of a chunked scan, n chunks of C tokens, state width K, head width V.

        gated_delta: N n C (4 C K + 2 C V + 6 K V) / S
        mamba2:      N (n C (2 C K + 2 C V + 4 K V) + 2 K V (n + 1)^2) / S        [FLOP/token]

    Source: torch_chunk_gated_delta_rule and mamba2_chunk_scan of transformers 5.23; the triangular
    solves of the former are no products.
    """
    n, c, key, value = chunks(scan, seq_len), scan.chunk, scan.state, scan.head_dim
    if scan.kind == "gated_delta":
        work = n * c * (4 * c * key + 2 * c * value + 6 * key * value)
    else:
        work = n * c * (2 * c * key + 2 * c * value + 4 * key * value) + 2 * key * value * (n + 1) ** 2
    return scan.heads * work / seq_len


def scan_backward(scan: Scan, seq_len: int) -> float:
    """Twice the forward; a delta rule's two triangular solves add a product each, its first state
    (zero) and its last (unread) save two each.

        2 forward + N (2 n C^2 (K + V) - 8 C K V) / S        [FLOP/token]
    """
    twice = 2 * scan_forward(scan, seq_len)
    if scan.kind != "gated_delta":
        return twice
    n, c, key, value = chunks(scan, seq_len), scan.chunk, scan.state, scan.head_dim
    return twice + scan.heads * (2 * n * c * c * (key + value) - 8 * c * key * value) / seq_len


def convolution(scan: Scan, seq_len: int) -> float:
    """A depthwise convolution, whose padding transformers computes too. Its gradients cost as much.

        2 * channels * kernel * (S + kernel - 1) / S        [FLOP/token]

    Source: causal_conv1d_fn of transformers 5.23.
    """
    return 2 * scan.conv_channels * scan.conv_kernel * (seq_len + scan.conv_kernel - 1) / seq_len


def adapter_flops(adapter: Adapter) -> tuple[int, int]:
    """x A and (x A) B of one token, through the copies that it passes.

        2 * r * d_in * copies of A,  2 * r * d_out * copies of B        [FLOP/token]

    >>> adapter_flops(Adapter.of(Linear("q", 4096, 4096), rank=16))
    (131072, 131072)
    """
    return 2 * adapter.a_active, 2 * adapter.b_active


def adapter_backward(a: float, b: float, train_a: bool, live: bool) -> float:
    """dB, always; the gradient of x A, dA and dX where there is a use for them.

        b + b [A or anything before it trains] + a [A trains] + a [anything before it trains]

    with a and b of `adapter_flops`        [FLOP/token]
    """
    return b + b * (train_a or live) + a * train_a + a * live


def merge(adapter: Adapter) -> int:
    """peft's `target_parameters`: W + B A of every copy, whatever a token needs.

        2 * r * d_in * d_out * copies        [FLOP/pass]

    Forward it is computed twice, because registering a parametrization evaluates it once more; a
    router, one matrix, takes the way of plain LoRA and is computed once. Backward: dA and dB.

    Source: peft 0.21 ParamWrapper._activate_lora.
    """
    row = adapter.linear
    return 2 * adapter.rank * row.d_in * row.d_out * row.count


def dora_norm(adapter: Adapter) -> int:
    """peft's DoRA multiplies B A out to take the length of each row of W + B A; without gradients.

        2 * r * d_in * (d_in + d_out) * copies        [FLOP/pass]

    Source: peft 0.21 DoraLinearLayer.get_lora_weight (a product with the identity).
    """
    row = adapter.linear
    return 2 * adapter.rank * row.d_in * (row.d_in + row.d_out) * row.count


@dataclass(frozen=True, slots=True)
class Work:
    """FLOP as a function of sequence length and batch.

    `token`: per token; `pair`: per token and sequence length; `once`: per pass, whatever its tokens;
    `scans`: how often the forward, the backward and the convolution of a scan.
    """

    token: float = 0
    pair: float = 0
    once: float = 0
    scans: tuple[tuple[Scan, int, int, int], ...] = ()

    def __add__(self, other: Work) -> Work:
        counts: dict[Scan, tuple[int, int, int]] = {}
        for scan, *n in (*self.scans, *other.scans):
            old = counts.get(scan, (0, 0, 0))
            counts[scan] = (old[0] + n[0], old[1] + n[1], old[2] + n[2])
        return Work(
            self.token + other.token,
            self.pair + other.pair,
            self.once + other.once,
            tuple((scan, *n) for scan, n in counts.items() if any(n)),
        )

    def times(self, n: int) -> Work:
        scans = tuple((scan, f * n, b * n, c * n) for scan, f, b, c in self.scans)
        return Work(self.token * n, self.pair * n, self.once * n, scans)

    def at(self, seq_len: int, batch: int) -> float:
        """[FLOP/token]"""
        value = self.token + self.pair * seq_len
        if self.once:
            value += self.once / (seq_len * batch)
        for scan, forward, backward, conv in self.scans:
            value += forward * scan_forward(scan, seq_len) if forward else 0
            value += backward * scan_backward(scan, seq_len) if backward else 0
            value += conv * convolution(scan, seq_len) if conv else 0
        return value

    def __bool__(self) -> bool:
        return bool(self.token or self.pair or self.once or self.scans)


@dataclass(slots=True)
class Tally:
    """Work by kind: "matrices", "scores", "adapters" ..."""

    by_kind: dict[str, Work] = field(default_factory=dict)

    def add(self, kind: str, work: Work) -> None:
        if work:
            self.by_kind[kind] = self.by_kind.get(kind, Work()) + work

    def join(self, other: Tally, n: int = 1) -> None:
        for kind, work in other.by_kind.items():
            self.add(kind, work.times(n))


@dataclass(frozen=True, slots=True)
class Pair:
    """An adapter as one layer sees it: `adapter_flops`, `merge` and how often, `dora_norm`."""

    a: float
    b: float
    merged: int
    merges: int
    norm: int


Pairs = Mapping[str, list[Pair]]


def _pairs(rows: Iterable[Linear], layers: int, pool: Counter[Adapter], equal: Counter[Linear], dora: bool) -> Pairs:
    """The adapters of these rows, per layer. A convention may adapt parts of a matrix's outputs, each
    on its own: so rows and adapters are matched without d_out. Rows that are equal in two kinds of
    layer have their adapters twice in the table."""
    found: dict[str, list[Pair]] = {}
    for row in rows:
        whole = row.times(layers)
        for adapter, times in pool.items():
            if replace(adapter.linear, d_out=row.d_out) != whole:
                continue
            a, b = adapter_flops(adapter)
            pair = Pair(
                a / layers,
                b / layers,
                merge(adapter) // layers if adapter.fused else 0,
                2 if row.count > 1 else 1,
                dora_norm(adapter) // layers if dora and not adapter.fused else 0,
            )
            found.setdefault(row.name, []).extend([pair] * max(1, times // equal[whole]))
    return found


@dataclass(frozen=True, slots=True)
class Trained:
    """What trains: everything, or adapters; A of an adapter may be frozen."""

    full: bool
    train_a: bool
    dora: bool


def _forward(rows: Iterable[Linear], mixer: Attention | Scan | None, pairs: Pairs, kind: str = "matrices") -> Tally:
    tally = Tally()
    for row in rows:
        tally.add(kind, Work(matrix(row)))
        tally.add("idle experts", Work(idle(row)))
        for pair in pairs.get(row.name, ()):
            if pair.merged:
                tally.add("merged adapters", Work(once=pair.merges * pair.merged))
            else:
                tally.add("adapters", Work(pair.a + pair.b))
            tally.add("DoRA norms", Work(once=pair.norm))
    if isinstance(mixer, Attention):
        tally.add("scores", Work(pair=scores(mixer)))
    elif isinstance(mixer, Scan):
        tally.add("scans", Work(scans=((mixer, 1, 0, 0),)))
        tally.add("convolutions", Work(scans=((mixer, 0, 0, 1),)))
    return tally


def _row_backward(row: Linear, pairs: list[Pair], live: bool, trained: Trained) -> Tally:
    """`live`: something before this matrix trains, so the gradient of its input is needed."""
    tally = Tally()
    merged = any(pair.merged for pair in pairs)
    tally.add("input gradients", Work(matrix(row) * live))
    tally.add("weight gradients", Work(matrix(row) * (trained.full or merged)))
    tally.add("idle experts", Work(idle(row) * (live + (trained.full or merged))))
    for pair in pairs:
        if pair.merged:
            tally.add("merged adapters", Work(once=pair.merged * (1 + trained.train_a)))
        else:
            tally.add("adapters", Work(adapter_backward(pair.a, pair.b, trained.train_a, live)))
    return tally


def layer_backward(block: Block, pairs: Pairs, live: bool, trained: Trained, attention: str) -> tuple[Tally, bool]:
    """One layer's gradients, given whether anything before it trains; and whether anything up to it does.

    The gradient of a matrix's input is needed where a matrix that it reads from is live: trains or
    reads from a live one. So attention's adapters spare the first layer its q, k and v, the MLP's
    all of its attention; the scores follow q, k and v, each on its own unless in a fused kernel.

    Source: reproduces FlopCounterMode for every target set of peft that was tried.
    """
    tally = Tally()
    lives = {"in": live}
    for row in block.linears:
        before = any(lives.get(name, live) for name in row.reads)
        tally.join(_row_backward(row, pairs.get(row.name, []), before, trained))
        lives[row.name] = before or trained.full or row.name in pairs
    mixer = block.mixer

    def reach(names: tuple[str, ...]) -> bool:
        return any(lives.get(name, live) for name in names)

    if isinstance(mixer, Attention):
        flash = attention == "flash" or (attention == "sdpa" and not mixer.math_only)
        needed = scores_backward(mixer, reach(mixer.q), reach(mixer.k), reach(mixer.v), flash)
        tally.add("scores", Work(pair=needed))
    elif isinstance(mixer, Scan) and reach(mixer.reads):
        tally.add("scans", Work(scans=((mixer, 0, 1, 0),)))
        tally.add("convolutions", Work(scans=((mixer, 0, 0, 2 if trained.full else 1),)))
    return tally, any(lives.values())


def not_repeated(block: Block, pairs: Pairs, trained: Trained, model_type: str) -> Work:
    """What recomputation leaves out of a layer: it stops when the last tensor that the backward needs
    is there, so the last product is not run, unless a norm, a dropout or the experts' weights follow.
    With an adapter on that last matrix it is the adapter's B."""
    last = block.linears[-1]
    norm_follows = any(w.name.startswith(("post_feedforward", "post_mlp")) for w in block.weights if w.width)
    weighed = last.group == "router" or (last.group == "experts" and not last.computed)
    if norm_follows or weighed or model_type in DROPOUT_LAST:
        return Work()
    adapted = [pair for pair in pairs.get(last.name, []) if not pair.merged]
    if adapted:
        return Work() if trained.dora else Work(adapted[-1].b)
    return Work(matrix(last) + idle(last))


@dataclass(frozen=True, slots=True)
class Row:
    """Work of one kind in one phase."""

    kind: str
    phase: str
    work: Work


@dataclass(frozen=True, slots=True, eq=False)
class FlopTable:
    """All that depends on the model and the method, not on sequence length or batch."""

    rows: tuple[Row, ...]
    terms: tuple[tuple[str, str, str, Work], ...]  # as `rows`, skipped and repeated work summed
    windows: tuple[tuple[int | None, int], ...]  # (window, FLOP/token/S) of the layers with scores


#: (phase, kind): name of the term, function that explains it
TERMS = {
    (FORWARD, "matrices"): ("matrices, forward", "flops.matrix"),
    (FORWARD, "unembedding"): ("unembedding, forward", "flops.matrix"),
    (FORWARD, "idle experts"): ("experts computed but not chosen, forward", "flops.idle"),
    (FORWARD, "adapters"): ("adapters, forward", "flops.adapter_flops"),
    (FORWARD, "merged adapters"): ("adapters merged into experts, forward", "flops.merge"),
    (FORWARD, "DoRA norms"): ("DoRA norms", "flops.dora_norm"),
    (FORWARD, "scores"): ("attention scores, forward", "flops.scores"),
    (FORWARD, "scans"): ("scans, forward", "flops.scan_forward"),
    (FORWARD, "convolutions"): ("convolutions, forward", "flops.convolution"),
    (BACKWARD, "input gradients"): ("input gradients", "flops.matrix"),
    (BACKWARD, "weight gradients"): ("weight gradients", "flops.matrix"),
    (BACKWARD, "idle experts"): ("experts computed but not chosen, backward", "flops.idle"),
    (BACKWARD, "adapters"): ("adapters, backward", "flops.adapter_backward"),
    (BACKWARD, "merged adapters"): ("adapters merged into experts, backward", "flops.merge"),
    (BACKWARD, "scores"): ("attention scores, backward", "flops.scores_backward"),
    (BACKWARD, "scans"): ("scans, backward", "flops.scan_backward"),
    (BACKWARD, "convolutions"): ("convolutions, backward", "flops.convolution"),
    (SKIPPED, ""): ("gradients that nobody needs", "flops.layer_backward"),
    (AGAIN, ""): ("recomputed forward", "flops.not_repeated"),
    (STOPPED, ""): ("recomputation stops early", "flops.not_repeated"),
}  # fmt: skip


@lru_cache(maxsize=4096)
def table(
    model: Model,
    method: Method,
    attention: str = "sdpa",
    checkpointing: str = "none",
    input_grads: bool = False,
) -> FlopTable:
    """Every kind of work of one training step, in closed form in sequence length and batch.

    `input_grads`: as `enable_input_require_grads`; peft turns it on when checkpointing is on.
    """
    for name, value, known in (
        ("attention", attention, ATTENTION), ("checkpointing", checkpointing, CHECKPOINTING)
    ):  # fmt: skip
        if value not in known:
            raise UnknownName(f"{name} {value!r} is not known", f"--{name}", f"Known: {', '.join(known)}.")
    trained = Trained(method.is_full, method.name != "lora-fa", method.name == "dora")
    pool = Counter(adapter_table(model, method).adapters)
    equal = Counter(row.times(block.count) for block in model.blocks for row in block.linears)
    equal.update(model.extra_linears)
    equal[model.head] += 1
    by_block = [_pairs(block.linears, block.count, pool, equal, trained.dora) if block.count else {}
                for block in model.blocks]  # fmt: skip
    ends = _pairs((*model.extra_linears, model.head), 1, pool, equal, trained.dora)
    again = checkpointing == "full"
    live = trained.full or input_grads or again
    phases = {phase: Tally() for phase in (FORWARD, BACKWARD, SKIPPED, AGAIN, STOPPED)}

    before = [row for row in model.extra_linears if not row.name.endswith("project_out")]
    after = [row for row in model.extra_linears if row.name.endswith("project_out")]
    for row in before:
        phases[BACKWARD].join(_row_backward(row, ends.get(row.name, []), live, trained))
        live = live or row.name in ends
    for block, pairs in zip(model.blocks, by_block, strict=True):
        forward = _forward(block.linears, block.mixer, pairs)
        phases[FORWARD].join(forward, block.count)
        phases[BACKWARD].join(layer_backward(block, pairs, True, trained, attention)[0], block.count)
        if again:
            phases[AGAIN].join(forward, block.count)
            spared = not_repeated(block, pairs, trained, model.model_type)
            phases[STOPPED].add("early stop", spared.times(-block.count))
    for i in model.order:
        if live:
            break
        block, pairs = model.blocks[i], by_block[i]
        needed, live = layer_backward(block, pairs, False, trained, attention)
        phases[SKIPPED].join(needed)
        phases[SKIPPED].join(layer_backward(block, pairs, True, trained, attention)[0], -1)
    phases[FORWARD].join(_forward(model.extra_linears, None, ends))
    for row in after:
        phases[BACKWARD].join(_row_backward(row, ends.get(row.name, []), live, trained))
        live = live or row.name in ends
    phases[FORWARD].join(_forward([model.head], None, ends, "unembedding"))
    phases[BACKWARD].join(_row_backward(model.head, ends.get(model.head.name, []), live, trained))
    windows: Counter[int | None] = Counter()
    for block in model.blocks:
        if isinstance(block.mixer, Attention):
            windows[block.mixer.window] += scores(block.mixer) * block.count
    rows = tuple(
        Row(kind, phase, work) for phase, tally in phases.items() for kind, work in tally.by_kind.items() if work
    )
    return FlopTable(rows, _terms(rows), tuple(windows.items()))


def _terms(rows: tuple[Row, ...]) -> tuple[tuple[str, str, str, Work], ...]:
    """(name, phase, why, work): one term a kind, but one for all that is skipped, one for all repeated."""
    summed: dict[tuple[str, str], Work] = {}
    for row in rows:
        key = (row.phase, row.kind if row.phase in (FORWARD, BACKWARD) else "")
        summed[key] = summed.get(key, Work()) + row.work
    return tuple((TERMS[phase, kind][0], phase, TERMS[phase, kind][1], work) for (phase, kind), work in summed.items())


def _checked(seq_len: int, batch: int) -> None:
    if seq_len < 1 or batch < 1:
        raise BadInput(f"{batch} x {seq_len} tokens are no batch", "batch, seq_len", "Use 1 or more of each.")


def _ledger(
    quantity: str,
    seq_len: int,
    batch: int,
    found: FlopTable,
    keep: Callable[[str, str], bool],
    note: str = "",
) -> Ledger:
    _checked(seq_len, batch)
    terms = [
        Term(name, work.at(seq_len, batch), EXACT, why) for name, phase, why, work in found.terms if keep(phase, name)
    ]
    return Ledger(quantity, UNIT, terms, CONVENTION + note)


def forward(model: Model, method: Method, seq_len: int, batch: int = 1) -> Ledger:
    """One forward pass, per token.

        2 * matmul_active + S * scores + adapters + scans + convolutions        [FLOP/token]

    Source: torch 2.13 FlopCounterMode on transformers 5.23, exact.
    """
    return _ledger("forward FLOP", seq_len, batch, table(model, method), lambda phase, _: phase == FORWARD)


def train(
    model: Model,
    method: Method,
    seq_len: int,
    attention: str = "sdpa",
    checkpointing: str = "none",
    batch: int = 1,
    input_grads: bool = False,
) -> Ledger:
    """Forward, backward and recomputation of one training step, per token.

    Full fine-tuning: 3 forward. LoRA: forward + dX of the frozen matrices + 2 adapters + 2 scores
    (2.5 in a fused kernel), less what nobody needs before the first adapter.

    Source: torch 2.13 FlopCounterMode on transformers 5.23 and peft 0.21, exact.
    """
    found = table(model, method, attention, checkpointing, input_grads)
    return _ledger(
        "training FLOP", seq_len, batch, found, lambda phase, _: True,
        f"; attention {attention}, checkpointing {checkpointing}",
    )  # fmt: skip


def model_flops(model: Model, method: Method, seq_len: int, batch: int = 1) -> Ledger:
    """What the mathematics needs, for MFU: no recomputation (not of layers, not in a fused kernel), no
    experts that nobody chose.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    return _ledger(
        "model FLOP", seq_len, batch, table(model, method, "eager"),
        lambda _, name: not name.startswith("experts computed"), "; without recomputation and idle experts",
    )  # fmt: skip


def full_of(method: Method) -> Method:
    """Full fine-tuning with the same base dtype, to compare with."""
    return checked_method("full", base_dtype=method.base_dtype if method.name != "qlora" else "bfloat16")


def lora_to_full_ratio(
    model: Model,
    method: Method,
    seq_len: int,
    attention: str = "sdpa",
    checkpointing: str = "none",
    batch: int = 1,
) -> float:
    """Training FLOP of the method, of those of full fine-tuning on the same tokens.

    Towards 2/3 for a small rank in a deep, wide model; more for attention scores and adapters, less
    for what the first layer skips.
    """
    ours = train(model, method, seq_len, attention, checkpointing, batch).total
    return ours / train(model, full_of(method), seq_len, attention, checkpointing, batch).total


def linear_break_even_rank(model: Model, method: Method) -> float:
    """The rank at which the matrices and adapters of LoRA cost what full fine-tuning costs.

        r* = P / (3 * sum of (d_in + d_out) over the adapted matrices a token passes)        [rank]

    from 4 P + 6 r sum = 6 P, with P the matrix elements a token meets. Merged experts have none.

    >>> from lora_planner.arch import from_config
    >>> round(linear_break_even_rank(from_config({"model_type": "llama"}), Method()))
    881
    """
    rank = top_k(model) or 1  # whole ranks per expert, where experts share the rank
    pairs = adapter_table(model, replace(method, rank=rank)).adapters
    met = [pair for pair in pairs if not pair.fused and pair.linear not in model.tower]
    if not met:
        raise _no_rank(method)
    return model.matmul_active * rank / (3 * sum(pair.a_active + pair.b_active for pair in met))


def _no_rank(method: Method) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"targets {','.join(method.targets)} put no adapter in a text token's way: no rank breaks even",
        "--targets",
        "Adapt a matrix of the language model, with --experts other than fused.",
    )


def break_even_rank(
    model: Model,
    method: Method,
    seq_len: int,
    attention: str = "sdpa",
    checkpointing: str = "none",
    batch: int = 1,
) -> float:
    """The rank at which LoRA's FLOP equal those of full fine-tuning, everything counted; 0 where they
    exceed it at any rank.

        r* = r1 (full - at 0) / (at r1 - at 0),  FLOP being linear in the rank        [rank]
    """
    rank = top_k(model) or 1

    def total(m: Method) -> float:
        return train(model, m, seq_len, attention, checkpointing, batch).total

    one, two = (total(replace(method, rank=n * rank)) for n in (1, 2))
    if one == two:
        raise _no_rank(method)
    full = total(full_of(method))
    return max(0.0, rank * (1 + (full - one) / (two - one)))


@dataclass(frozen=True, slots=True)
class FlopSplit:
    """Executed FLOP per token by what runs them, for a model of time. Recomputation is in `forward`.

    `scores_visible_*`: what a causal, windowed kernel does of the scores, instead of `scores_*`.
    """

    matrices_forward: float
    matrices_backward: float
    adapters_forward: float
    adapters_backward: float
    scores_forward: float
    scores_backward: float
    scores_visible_forward: float
    scores_visible_backward: float
    scans_forward: float
    scans_backward: float


def split(
    model: Model,
    method: Method,
    seq_len: int,
    attention: str = "sdpa",
    checkpointing: str = "none",
    batch: int = 1,
    input_grads: bool = False,
) -> FlopSplit:
    """`train` by kind of kernel: matrices (experts that nobody chose included), adapters (merging and
    DoRA norms included), scores, scans with their convolutions. The parts sum to `train().total`."""
    _checked(seq_len, batch)
    found = table(model, method, attention, checkpointing, input_grads)
    parts = dict.fromkeys((*SCANS, *ADAPTERS, "scores", "matrices"), 0.0)
    back = dict(parts)
    for row in found.rows:
        kind = row.kind if row.kind in parts else "matrices"
        target = back if row.phase in (BACKWARD, SKIPPED) else parts
        target[kind] += row.work.at(seq_len, batch)
    everything = sum(weight for _, weight in found.windows) or 1
    visible = sum(weight * visible_share(window, seq_len) for window, weight in found.windows) / everything
    return FlopSplit(
        parts["matrices"],
        back["matrices"],
        sum(parts[kind] for kind in ADAPTERS),
        sum(back[kind] for kind in ADAPTERS),
        parts["scores"],
        back["scores"],
        parts["scores"] * visible,
        back["scores"] * visible,
        sum(parts[kind] for kind in SCANS),
        sum(back[kind] for kind in SCANS),
    )
