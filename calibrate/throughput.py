"""Fit the constants of step time on the tables of public measurements:  python -m calibrate.throughput

    ln seconds = ln step_time(work; theta) + error        (lora_planner.throughput.step_time)

theta are logs: of shares of the card's peak and bandwidth, of seconds a launch, of the links' rate. Each is a sum

    class of stack + stack + GPU + this stack on this GPU

whose parts beyond the first are zero but for what rows say (their priors are PARTS), so that a stack nobody ran on a card
takes what the stack does elsewhere at what the card sustains under other stacks. The spread is that of rows left out of
the fit: with their model where the stack has rows on the card, with the card or with the source where it has none.

Writes lora_planner/data/constants.json; rows of the stacks in KEPT stay. Rows: calibrate/tables.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lora_planner.facts import Constant, Gpu
from lora_planner.ledger import ASSUMED, EXACT, FITTED, Estimate
from lora_planner.throughput import ANY, DEQUANTISE_BYTES, OWN_STACK, Stack, Work, other_peak, peak_of, step_time

OUT = Path(__file__).parents[1] / "lora_planner/data/constants.json"
Z90 = 1.6448536269514722
#: s.d. of ln(seconds) of a row beside its stack's and its card's own deviations
NOISE = 0.10
#: rows of a source on one GPU from which on more of them say nothing new
ENOUGH = 20
#: iterations of a fit that begins at one of nearly the same rows
WARM = 6
#: stacks whose rows are no fit of these tables
KEPT = (OWN_STACK,)

OWN, POOLED, BORROWED = "own", "pooled", "borrowed"
#: in words, for the source of a spread
RESTS_ON = {
    OWN: "rows of this stack on this GPU", POOLED: "no row of this stack on this GPU: its rows elsewhere, at what the GPU sustains",
    BORROWED: "no row of this stack: its class",
}  # fmt: skip
EAGER, FUSED = "eager", "fused"
#: what a stack is near where it has no rows of its own: modules as PyTorch runs them, or fused and compiled kernels
CLASSES = {
    "hf-trl": EAGER, "litgpt": EAGER, "fsdp-qlora": EAGER, "torchtune": EAGER, "ms-swift": EAGER, "axolotl": EAGER,
    "deepspeed-reference": EAGER, "llm-foundry": FUSED, "torchtitan": EAGER, "torchtitan-compile": FUSED, "nemo": FUSED,
    "nemo-automodel": FUSED, "unsloth": FUSED, "rocm-mlperf": FUSED, "gaudi-mlperf": EAGER,
}  # fmt: skip

#: name -> (value by class before any row, s.d. of its log, s.d. of: a stack, a GPU, a stack on a GPU)
PARTS: dict[str, tuple[dict[str, float], float, tuple[float, float, float]]] = {
    "matmul_efficiency": ({EAGER: 0.62, FUSED: 0.65}, 0.2, (0.2, 0.2, 0.1)),
    "attention_efficiency": ({EAGER: 0.5, FUSED: 0.45}, 0.3, (0.4, 0.3, 0.0)),
    "memory_efficiency": ({EAGER: 0.75, FUSED: 1.2}, 0.3, (0.2, 0.0, 0.0)),
    "adapter_efficiency": ({EAGER: 0.4, FUSED: 0.5}, 0.3, (0.1, 0.0, 0.0)),
    "dequantise_efficiency": ({EAGER: 0.46, FUSED: 0.46}, 0.3, (0.2, 0.0, 0.0)),
    "gptq_efficiency": ({EAGER: 0.2, FUSED: 0.2}, 0.7, (0.0, 0.0, 0.0)),
    "narrow_efficiency": ({EAGER: 0.85, FUSED: 0.85}, 0.2, (0.1, 0.15, 0.0)),
    "grouped_efficiency": ({EAGER: 0.6, FUSED: 0.7}, 0.4, (0.2, 0.0, 0.0)),
    "launch_s": ({EAGER: 2.7e-5, FUSED: 1.2e-5}, 0.3, (0.2, 0.0, 0.4)),
    "link_efficiency": ({EAGER: 0.5, FUSED: 0.6}, 0.3, (0.2, 0.8, 0.0)),
}
#: what large bf16 matmuls sustain of the data sheet's peak, over an A100, before any row: clocks fall where watts per
#: FLOP are few (H100 about 0.7 of its peak in cuBLAS, a T4 0.45), and GeForce cards boost above the clock of theirs
SUSTAINED = {
    "t4-16gb": 0.55, "l4-24gb": 0.6, "h100-sxm-80gb": 0.82, "h200-sxm-141gb": 0.85, "h200-nvl-141gb": 0.8,
    "h100-pcie-80gb": 0.7, "h100-nvl-94gb": 0.75, "gh200-96gb": 0.82, "b200-180gb": 0.8, "b300-270gb": 0.8,
    "gb200-186gb": 0.85, "gb300-278gb": 0.9, "mi300x-192gb": 0.6, "mi325x-256gb": 0.65, "mi350x-288gb": 0.65,
    "mi355x-288gb": 0.65, "l40s-48gb": 0.75, "l40-48gb": 0.9, "a10g-24gb": 0.8, "rtx3090-24gb": 1.35, "rtx4090-24gb": 1.35,
    "rtx5090-32gb": 1.2, "rtx4080-16gb": 1.3,
}  # fmt: skip
#: GPUs without a fused attention kernel for the lengths that people train: before Ampere
SLOW_ATTENTION = {"t4-16gb": 0.25, "v100-sxm-16gb": 0.4, "v100-sxm-32gb": 0.4}
#: part of the computing time under which a stack gathers weights; the rest of the gathering is waited for
OVERLAP = {
    "fsdp-qlora": 0.0,
    "litgpt": 0.0,
    "hf-trl": 0.0,
    "torchtune": 0.5,
    "axolotl": 0.5,
    "deepspeed-reference": 0.0,
}
OVERLAPPED = 0.7


@dataclass(frozen=True, slots=True)
class Observation:
    """A measured step: what one GPU was asked to do, by which stack, and the seconds that it took."""

    source: str
    model: str
    stack: str
    gpu: Gpu
    work: Work
    seconds: float
    weight: float = 1.0
    label: str = ""


# ---------------------------------------------------------------- links: facts, not fits


@dataclass(frozen=True, slots=True)
class Link:
    """Bytes/s that a GPU receives while it sends as many from its neighbours in the box, and that a box with eight of them
    receives from others: a ring through several machines crosses between them once for all cards of a box."""

    within: float
    between: float
    source: str


NVLINK3 = Link(300e9, 200e9, "A100 datasheet: NVLink 600 GB/s both ways; DGX A100: 8 x 200 Gb/s")
NVLINK4 = Link(450e9, 400e9, "H100 datasheet: NVLink 900 GB/s both ways; DGX H100: 8 x 400 Gb/s")
NVLINK5 = Link(900e9, 400e9, "B200 datasheet: NVLink 1800 GB/s both ways; DGX B200: 8 x 400 Gb/s")
RACK5 = Link(900e9, 900e9, "GB200 NVL72 datasheet: NVLink 1800 GB/s both ways within the rack")
XGMI = Link(448e9, 400e9, "MI300X datasheet: seven links of 128 GB/s both ways")
PCIE4 = Link(25e9, 12e9, "PCIe 4.0 x16: 32 GB/s each way less protocol; 100 Gb/s between machines")
LINKS = {
    "a100-sxm-80gb": NVLINK3, "a100-sxm-40gb": NVLINK3, "h100-sxm-80gb": NVLINK4, "h200-sxm-141gb": NVLINK4,
    "gh200-96gb": NVLINK4, "b200-180gb": NVLINK5, "b300-270gb": NVLINK5, "gb200-186gb": RACK5, "gb300-278gb": RACK5,
    "h200-nvl-141gb": Link(450e9, 200e9, "H200 NVL datasheet: four-way bridge, 900 GB/s both ways"),
    "h100-nvl-94gb": Link(300e9, 200e9, "H100 NVL datasheet: bridge of two, 600 GB/s both ways"),
    "mi300x-192gb": XGMI, "mi325x-256gb": XGMI, "mi350x-288gb": XGMI, "mi355x-288gb": XGMI,
    "hl225-96gb": Link(262e9, 300e9, "Gaudi 2 white paper: 21 ports of 100 Gb/s within, 3 a card outside"),
    "v100-sxm-16gb": Link(150e9, 12e9, "V100 datasheet"), "v100-sxm-32gb": Link(150e9, 12e9, "V100 datasheet"),
}  # fmt: skip
HOST = Constant(
    "host_bytes_per_s", ANY, ANY, 25e9, 10e9, 50e9, EXACT, 0, "PCIe 4.0 x16: 32 GB/s each way less protocol"
)


def link_of(gpu: Gpu) -> Link:
    return LINKS.get(gpu.name, PCIE4)


# ---------------------------------------------------------------- the fit


Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Fit:
    """theta by part, (constant, kind of part, its key) -> log, with their covariance; how many rows and which sources
    stand behind a (stack, GPU), with "*" for all."""

    theta: Mapping[Key, float]
    index: Mapping[Key, int]
    covariance: np.ndarray
    n: Mapping[tuple[str, str], int]
    sources: Mapping[tuple[str, str], tuple[str, ...]]

    def sd(self, keys: Iterable[Key]) -> float:
        """Of the sum of some parts: what rows left open, and the priors of parts that no row determined."""
        known, variance = [], 0.0
        for key in keys:
            if key in self.index:
                known.append(self.index[key])
            else:
                variance += prior_of(key)[1] ** 2
        return math.sqrt(variance + float(self.covariance[np.ix_(known, known)].sum()))

    def sum(self, keys: Iterable[Key]) -> float:
        return sum(self.theta.get(key, prior_of(key)[0]) for key in keys)

    def tier(self, stack: str, gpu: str) -> str:
        """What a prediction of this stack on this GPU rests on."""
        if (stack, gpu) in self.n:
            return OWN
        return POOLED if (stack, ANY) in self.n else BORROWED

    def value(self, name: str, stack: str, gpu: str) -> float:
        """A constant of a stack on a GPU, from the parts that rows determined and the priors of the rest."""
        return min(cap_of(name), math.exp(self.sum(parts_of(name, stack, gpu))))

    def stack(self, name: str, gpu: Gpu) -> Stack:
        """The rows that step_time asks for."""
        link = link_of(gpu)
        rows = {part: self.value(part, name, gpu.name) for part in PARTS}
        rows |= {"link_bytes_per_s": link.within, "node_link_bytes_per_s": link.between, "spread": 1.0,
                 "host_bytes_per_s": HOST.value, "overlap": OVERLAP.get(name, OVERLAPPED)}  # fmt: skip
        return Stack(name, gpu.name, {n: Constant(n, name, gpu.name, v, v, v, FITTED, 0, "") for n, v in rows.items()})


def cap_of(name: str) -> float:
    """An efficiency is a share of a peak; traffic is relative to unfused kernels, so that caches may beat the bandwidth."""
    return 1.0 if name.endswith("_efficiency") and name != "memory_efficiency" else math.inf


def parts_of(name: str, stack: str, gpu: str) -> tuple[Key, ...]:
    """The addends of a constant's log."""
    return (
        (name, "class", CLASSES.get(stack, EAGER)), (name, "stack", stack), (name, "gpu", gpu),
        (name, "both", f"{stack} {gpu}"),
    )  # fmt: skip


def prior_of(key: Key) -> tuple[float, float]:
    """Mean and s.d. of an addend before any row."""
    name, kind, of = key
    value, sd, (by_stack, by_gpu, by_both) = PARTS[name]
    if kind == "class":
        return math.log(value[of]), sd
    if kind == "gpu" and name == "matmul_efficiency":
        return math.log(SUSTAINED.get(of, 1.0)), by_gpu
    if kind == "gpu" and name == "attention_efficiency":
        return math.log(SLOW_ATTENTION.get(of, 1.0)), by_gpu
    return 0.0, {"stack": by_stack, "gpu": by_gpu, "both": by_both}[kind]


def fit(rows: Sequence[Observation], start: Fit | None = None, iterations: int = 60) -> Fit:
    """theta at the least squares of rows and priors.

    min over theta  sum rho(((ln predicted - ln measured) / NOISE)^2) weight + sum ((theta - prior) / sd)^2

    rho is soft_l1, for a table has rows that no constant explains. `start`: a fit of nearly the same rows, to begin
    from; few iterations are enough then.
    """
    keys: list[Key] = []
    index: dict[Key, int] = {}
    columns: dict[str, list[list[int]]] = {name: [] for name in PARTS}
    for row in rows:
        for name in PARTS:
            mine = []
            for key in parts_of(name, row.stack, row.gpu.name) if _asks(row.work, name) else ():
                if prior_of(key)[1] <= 0:
                    continue
                if key not in index:
                    index[key] = len(keys)
                    keys.append(key)
                mine.append(index[key])
            columns[name].append(mine)
    mean = np.array([prior_of(key)[0] for key in keys])
    sd = np.array([prior_of(key)[1] for key in keys])
    design = {name: _matrix(columns[name], len(keys)) for name in PARTS}
    model = Model(rows)
    measured = np.log([row.seconds for row in rows])
    per_card = Counter((row.source, row.gpu.name) for row in rows)
    weight = np.array([row.weight * min(1.0, ENOUGH / per_card[row.source, row.gpu.name]) for row in rows]) ** 0.5

    def logs_of(theta: np.ndarray) -> dict[str, np.ndarray]:
        return {name: design[name] @ theta for name in PARTS}

    def misfit(theta: np.ndarray) -> np.ndarray:
        off = (model.log_seconds(logs_of(theta)) - measured) / NOISE
        return np.concatenate([_robust(off) * weight, (theta - mean) / sd])

    def slope(theta: np.ndarray) -> np.ndarray:
        """A row depends on theta through its nine constants only."""
        logs, step = logs_of(theta), 1e-5
        here = model.log_seconds(logs)
        found = np.zeros((len(rows), len(theta)))
        for name in PARTS:
            there = model.log_seconds({**logs, name: logs[name] + step})
            found += ((there - here) / step)[:, None] * design[name]
        off = (here - measured) / NOISE
        steep = (_robust(off + step) - _robust(off)) / step
        return np.vstack([found * (steep * weight / NOISE)[:, None], np.diag(1 / sd)])

    begin = np.array([start.theta.get(key, prior_of(key)[0]) for key in keys]) if start else mean
    best, covariance = _minimum(misfit, slope, begin, iterations)
    counted: dict[tuple[str, str], int] = {}
    published: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for pair in ((row.stack, row.gpu.name), (row.stack, ANY), (ANY, row.gpu.name)):
            counted[pair] = counted.get(pair, 0) + 1
            published.setdefault(pair, set()).add(row.source)
    return Fit(
        dict(zip(keys, map(float, best), strict=True)), index, covariance, counted,
        {pair: tuple(sorted(some)) for pair, some in published.items()},
    )  # fmt: skip


def _asks(work: Work, name: str) -> bool:
    """Whether a step depends on a constant at all: a row without links says nothing of them."""
    asked = {
        "link_efficiency": work.exchanged_bytes + work.gathered_bytes + work.host_bytes,
        "narrow_efficiency": float(work.dtype in ("fp8", "fp4")), "grouped_efficiency": work.grouped_flops,
        "gptq_efficiency": work.dequantised_params * (work.dequantised_as == "gptq"),
        "dequantise_efficiency": work.dequantised_params * (work.dequantised_as != "gptq"),
        "adapter_efficiency": work.adapter_flops,
    }  # fmt: skip
    return asked.get(name, 1.0) > 0


def _solved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x of a x = b for a positive definite a, by elimination in plain numpy: a threaded LAPACK takes longer to wake than
    these small matrices take."""
    n = len(a)
    work = np.concatenate([a, b.reshape(n, -1)], axis=1)
    for k in range(n):  # eliminate below the diagonal, the right side too
        work[k + 1 :, k:] -= np.multiply.outer(work[k + 1 :, k] / work[k, k], work[k, k:])
    x = work[:, n:]
    for k in range(n - 1, -1, -1):
        x[k] -= (work[k, k + 1 : n, None] * x[k + 1 :]).sum(axis=0)
        x[k] /= work[k, k]
    found: np.ndarray = x.reshape(b.shape)
    return found


def _minimum(
    misfit: Callable[[np.ndarray], np.ndarray],
    slope: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares by Levenberg and Marquardt, and the covariance of the unknowns from the curvature at the minimum.

    Products by einsum, for the same reason as `_solved`.
    """
    here, damping = start.copy(), 1e-3
    off = misfit(here)
    cost = float(np.sum(off**2))
    curved = np.eye(len(start))
    for _ in range(iterations):
        j = slope(here)
        curved = np.einsum("ki,kj->ij", j, j, optimize=False)
        downhill = np.einsum("ki,k->i", j, off, optimize=False)
        while damping < 1e8:
            step = _solved(curved + damping * np.diag(np.diag(curved)), -downhill)
            there = misfit(here + step)
            lower = float(np.sum(there**2))
            if lower < cost:
                break
            damping *= 4
        else:
            break
        gained, cost = cost - lower, lower
        here, off, damping = here + step, there, max(damping / 5, 1e-9)
        if gained < 1e-4 * (1 + cost):
            break
    return here, _solved(curved, np.eye(len(curved)))


def _robust(off: np.ndarray) -> np.ndarray:
    """sqrt(soft_l1), with the sign of the error."""
    found: np.ndarray = np.sqrt(2 * (np.sqrt(1 + off**2) - 1) + 1e-12) * np.sign(off)
    return found


def _matrix(columns: list[list[int]], width: int) -> np.ndarray:
    found = np.zeros((len(columns), width))
    for i, mine in enumerate(columns):
        found[i, mine] = 1.0
    return found


class Model:
    """step_time for many rows at once; tests hold it against the formula itself."""

    def __init__(self, rows: Sequence[Observation]) -> None:
        def column(of: Callable[[Observation], float]) -> np.ndarray:
            return np.array([of(row) for row in rows], dtype=float)

        self.linear = column(lambda r: (r.work.linear_flops - r.work.grouped_flops) / peak_of(r.gpu, r.work.dtype))
        self.grouped = column(lambda r: r.work.grouped_flops / peak_of(r.gpu, r.work.dtype))
        self.weights = column(lambda r: r.work.weight_bytes_read / r.gpu.hbm_bytes_per_s)
        self.adapter = column(lambda r: r.work.adapter_flops / other_peak(r.work, r.gpu))
        self.attention = column(lambda r: r.work.attention_flops / other_peak(r.work, r.gpu))
        self.elementwise = column(lambda r: r.work.activation_bytes / r.gpu.hbm_bytes_per_s)
        self.optimizer = column(lambda r: r.work.optimizer_bytes / r.gpu.hbm_bytes_per_s)
        self.expand = column(lambda r: r.work.dequantised_params * DEQUANTISE_BYTES / r.gpu.hbm_bytes_per_s)
        self.gptq = column(lambda r: r.work.dequantised_as == "gptq") > 0
        self.narrow = column(lambda r: {"fp8": 1, "fp4": 2}.get(r.work.dtype, 0))
        self.kernels = column(lambda r: r.work.kernels)
        self.exchanged = column(lambda r: r.work.exchanged_bytes / link_of(r.gpu).within)
        self.gathered = column(
            lambda r: (
                r.work.gathered_bytes
                / (min(link_of(r.gpu).within, link_of(r.gpu).between) if r.work.nodes > 1 else link_of(r.gpu).within)
            )
        )
        self.host = column(lambda r: r.work.host_bytes / HOST.value)
        self.bubble = column(lambda r: r.work.bubble)
        self.overlap = column(lambda r: OVERLAP.get(r.stack, OVERLAPPED))

    def log_seconds(self, logs: Mapping[str, np.ndarray]) -> np.ndarray:
        of = {name: np.exp(log) for name, log in logs.items()}
        share = {name: np.minimum(1.0, of[name]) for name in of if name.endswith("_efficiency")}
        matmul = np.minimum(1.0, share["matmul_efficiency"] * share["narrow_efficiency"] ** self.narrow)
        busy = np.maximum((self.linear + self.grouped / share["grouped_efficiency"]) / matmul, self.weights)
        busy = busy + self.adapter / share["adapter_efficiency"] + self.attention / share["attention_efficiency"]
        busy = busy + self.elementwise / of["memory_efficiency"]
        busy = busy + self.expand / np.where(self.gptq, share["gptq_efficiency"], share["dequantise_efficiency"])
        last = self.optimizer / of["memory_efficiency"]
        waiting = np.maximum(0.0, self.kernels * of["launch_s"] - busy - last)
        links = (self.exchanged + self.host) / share["link_efficiency"]
        links = links + np.maximum(0.0, self.gathered / share["link_efficiency"] - self.overlap * (busy + last))
        found: np.ndarray = np.log((busy + waiting + links) * (1 + self.bubble) + last)
        return found


def predicted_s(row: Observation, by: Fit) -> float:
    """Seconds of a row by a fit: step_time itself."""
    return step_time(row.work, row.gpu, by.stack(row.stack, row.gpu)).total


# ---------------------------------------------------------------- how far off it is


@dataclass(frozen=True, slots=True)
class LeftOut:
    """ln(measured / predicted) of a row whose source, model or card fed no constant, and what the prediction rested on."""

    source: str
    stack: str
    gpu: str
    tier: str
    error: float


def left_out(rows: Sequence[Observation], group: Callable[[Observation], object], whole: Fit) -> list[LeftOut]:
    """Each row by a fit without the rows of its group."""
    found = []
    for name in dict.fromkeys(group(row) for row in rows):
        by = fit([row for row in rows if group(row) != name], whole, WARM)
        for row in rows:
            if group(row) == name:
                error = math.log(row.seconds / predicted_s(row, by))
                found.append(LeftOut(row.source, row.stack, row.gpu.name, by.tier(row.stack, row.gpu.name), error))
    return found


def half_width(errors: Iterable[LeftOut], share: float = 0.92) -> float:
    """ln of the factor around a prediction inside which `share` of left-out rows lie, each source weighing as its root."""
    rows = [(abs(e.error), e.source) for e in errors]
    if not rows:
        return math.log(2.0)
    counted: dict[str, int] = {}
    for _, source in rows:
        counted[source] = counted.get(source, 0) + 1
    rows.sort()
    weight = np.array([counted[source] ** -0.5 for _, source in rows])
    reached = np.cumsum(weight) / weight.sum()
    return max(math.log(1.1), float(rows[int(np.searchsorted(reached, share - 1e-9))][0]))


def widths(errors: Sequence[LeftOut]) -> dict[str, float]:
    """Half-width by what a prediction rests on; no less sure a basis is narrower."""
    own = half_width(e for e in errors if e.tier == OWN)
    pooled = max(own, half_width(e for e in errors if e.tier == POOLED))
    return {OWN: own, POOLED: pooled, BORROWED: max(pooled, half_width(e for e in errors if e.tier == BORROWED))}


def elsewhere(width: Mapping[str, float]) -> dict[str, float]:
    """For a source that fed no constant: its stack and card are known only as another source ran them."""
    return {**width, OWN: width[POOLED]}


def own_width(errors: Sequence[LeftOut], stack: str, gpu: str, usual: float, n: float = 12.0) -> float:
    """Half-width of a stack on a GPU: its own left-out rows, drawn towards the usual one as if that were n rows."""
    mine = [e.error for e in errors if (e.stack, e.gpu, e.tier) == (stack, gpu, OWN)]
    if not mine:
        return usual
    here = float(np.quantile(np.abs(mine), 0.9))
    return math.sqrt((len(mine) * here**2 + n * usual**2) / (len(mine) + n))


def predictor(by: Fit, width: Mapping[str, float]) -> Callable[[Observation], Estimate]:
    """Seconds of a row by a fit, with the interval of what it rests on."""

    def step(row: Observation) -> Estimate:
        value = predicted_s(row, by)
        tier = by.tier(row.stack, row.gpu.name)
        factor = math.exp(width[tier])
        return Estimate(value / factor, value, value * factor, "s", FITTED, RESTS_ON[tier])

    return step


# ---------------------------------------------------------------- rows of constants.json


def constant_rows(by: Fit, errors: Sequence[LeftOut]) -> list[Constant]:
    """What step_time reads: every stack pooled and on its own GPUs, every GPU, links, spreads."""
    found: list[Constant] = []
    width = widths(errors)

    def add(name: str, stack: str, gpu: str, keys: Sequence[Key], n: int, source: str) -> None:
        value, sd = by.sum(keys), by.sd(keys)
        cap = cap_of(name) if gpu != ANY else math.inf
        low, middle, high = (min(cap, math.exp(value + z * Z90 * sd)) for z in (-1, 0, 1))
        found.append(
            Constant(name, stack, gpu, _short(middle), _short(low), _short(high), FITTED if n else ASSUMED, n, source)
        )

    def spread(stack: str, gpu: str, half: float, n: int, source: str) -> None:
        basis = FITTED if n else ASSUMED
        found.append(
            Constant("spread", stack, gpu, 1.0, _short(math.exp(-half)), _short(math.exp(half)), basis, n, source)
        )

    for stack in CLASSES:
        n = by.n.get((stack, ANY), 0)
        kind = CLASSES[stack]
        source = (
            ", ".join(by.sources.get((stack, ANY), ())) or f"no rows: as other stacks of its class ({kind} kernels)"
        )
        for name in PARTS:
            add(name, stack, ANY, parts_of(name, stack, "")[:2], n, source)
        overlap = OVERLAP.get(stack, OVERLAPPED)
        found.append(
            Constant(
                "overlap",
                stack,
                ANY,
                overlap,
                min(overlap, 0.0),
                1.0,
                ASSUMED,
                0,
                "share of computing that hides gathering",
            )
        )
        tier = POOLED if n else BORROWED
        spread(stack, ANY, width[tier], n, f"{RESTS_ON[tier]}; 90 % of rows whose source or card was left out")
        for gpu in sorted(g for s, g in by.n if s == stack and g != ANY):
            n, source = by.n[stack, gpu], ", ".join(by.sources[stack, gpu])
            for name, (_, _, parts) in PARTS.items():
                if any(parts[1:]):
                    add(name, stack, gpu, parts_of(name, stack, gpu), n, source)
            half = own_width(errors, stack, gpu, width[OWN])
            spread(stack, gpu, half, n, f"{RESTS_ON[OWN]}: {n}; 90 % of rows left out with their model or source")
    for gpu in sorted({g for s, g in by.n if s == ANY} | set(SLOW_ATTENTION) | set(SUSTAINED)):
        n, source = by.n.get((ANY, gpu), 0), ", ".join(by.sources.get((ANY, gpu), ())) or "assumed: no rows of this GPU"
        for name, (_, _, parts) in PARTS.items():
            if parts[1]:
                add(name.replace("_efficiency", "_sustained"), ANY, gpu, [(name, "gpu", gpu)], n, source)
    for name in (
        "narrow_efficiency",
        "grouped_efficiency",
        "gptq_efficiency",
        "link_efficiency",
        "dequantise_efficiency",
    ):
        add(name, ANY, ANY, [(name, "class", EAGER)], by.n.get(("hf-trl", ANY), 0), f"{EAGER} stacks together")
    for gpu, link in {ANY: PCIE4, **LINKS}.items():
        basis = ASSUMED if gpu == ANY else EXACT
        for name, rate in (("link_bytes_per_s", link.within), ("node_link_bytes_per_s", link.between)):
            found.append(Constant(name, ANY, gpu, rate, rate, rate, basis, 0, link.source))
    found.append(HOST)
    found.append(Constant("overlap", ANY, ANY, 0.0, 0.0, 1.0, ASSUMED, 0, "nothing hides gathering"))
    return found


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def observations() -> list[Observation]:
    """Every row of calibrate/tables that has a time and is a setting of the planner."""
    from calibrate.track import TABLES, mlperf, read, speed

    measured = speed.observations(read(TABLES / "measured.csv"))
    return measured + mlperf.observations(read(TABLES / "mlperf_llama2_70b_lora.csv"))


@cache
def everything() -> Fit:
    """The fit of all rows."""
    return fit(observations())


def main() -> None:
    from calibrate.track import TABLES, mlperf, read

    rows = observations()
    by = everything()
    errors = left_out(rows, lambda r: (r.source, r.model), by) + left_out(rows, lambda r: r.source, by)
    errors += [e for e in left_out(rows, lambda r: (r.stack, r.gpu.name), by) if e.tier == POOLED]
    for tier, half in widths(errors).items():
        some = [abs(e.error) for e in errors if e.tier == tier]
        print(f"{tier}: {len(some)} rows, median {np.median(some):.3f}, 90 % factor {math.exp(half):.3g}")
    fitted = constant_rows(by, errors) + mlperf.constant_rows(read(TABLES / "mlperf_llama2_70b_lora.csv"))
    kept = [row for row in json.loads(OUT.read_text(encoding="utf-8"))["constants"] if row["stack"] in KEPT]
    lines = [json.dumps(row) for row in [*(asdict(row) for row in fitted), *kept]]
    OUT.write_text('{"schema": 1, "constants": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    print(f"{len(rows)} rows; wrote {len(fitted)} constants to {OUT.name}")


if __name__ == "__main__":
    main()
