"""Efficiencies of decoding, fitted to single kernels that others timed:  python -m calibrate.rollout

Writes the fitted rows of lora_planner/data/rollout_constants.json again from calibrate/decode_kernels.csv and leaves the
assumed ones; prints the errors, of all cards and of each card left out of the fit.

    seconds = max(bytes / (bandwidth * efficiency), flops / (peak * compute_efficiency)) + fixed
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lora_planner.facts import DATA, Constant, gpu
from lora_planner.ledger import FITTED
from lora_planner.rollout import distinct, kernel_s

TABLE = Path(__file__).parent / "decode_kernels.csv"
OUT = DATA / "rollout_constants.json"
GEMM = "gemm"
#: what the two constants of a kind of kernel are called; that of products has the compute efficiency too
NAMES = {GEMM: ("matrix_efficiency", "product_s"), "attention": ("cache_efficiency", "attention_s"),
         "experts": ("expert_efficiency", "experts_s")}  # fmt: skip
ANY = "*"
SOURCE = "kernels of vLLM timed by NVIDIA: aiconfigurator-core 0.12.0"
#: no kernel starts in less
LEAST_S = 1e-6


class Kernel(NamedTuple):
    """One measured kernel of vLLM in bf16: bytes and FLOPs that our formulas say it needs, and its seconds."""

    gpu: str
    kind: str
    moved: float
    flops: float
    seconds: float


@cache
def measured() -> tuple[Kernel, ...]:
    """Single kernels of vLLM timed by NVIDIA. Source: aiconfigurator-core 0.12.0 (PyPI, Apache-2.0), systems/data,
    gemm_perf, generation_attention_perf and moe_perf (power_law_1.2); a selection of shapes, copied as numbers.

    gemm: a x c times c x b. attention: a sequences of b tokens, c heads, d of keys, width e. experts: a tokens,
    hidden b, inner c, top d of e.
    """
    found = []
    with TABLE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            a, b, c, d, e = (int(row[x] or 0) for x in "abcde")
            if row["kind"] == GEMM:
                need = 2.0 * (b * c + a * (b + c)), 2.0 * a * b * c
            elif row["kind"] == "attention":
                need = 2.0 * a * b * 2 * d * e, 4.0 * a * b * c * e
            else:
                need = 2.0 * distinct(e, d, a) * 3 * b * c, 2.0 * a * d * 3 * b * c
            found.append(Kernel(row["gpu"], row["kind"], *need, float(row["us"]) * 1e-6))
    return tuple(found)


def cards() -> list[str]:
    return sorted({k.gpu for k in measured()})


def seconds(k: Kernel, memory: float, compute: float, fixed: float) -> float:
    card = gpu(k.gpu)
    return kernel_s(k.moved, k.flops, card.hbm_bytes_per_s * memory, card.peak("bf16") * compute)[0] + fixed


def fit(kernels: Sequence[Kernel], compute: float | None = None) -> tuple[float, float, float]:
    """Efficiency of memory and of compute, and fixed seconds: least sum of |ln predicted / measured|, by steps that halve.

    The sum of absolute logarithms has kinks, which a smooth method stumbles over. `compute` given: it stays.
    """

    def loss(p: Sequence[float]) -> float:
        return sum(abs(math.log(seconds(k, *p) / k.seconds)) for k in kernels)

    at, size = [0.8, compute or 0.7, 5e-6], 0.5
    best = loss(at)
    while size > 0.004:
        moved = False
        for i in (0, 2) if compute else (0, 1, 2):
            for factor in (math.exp(size), math.exp(-size)):
                tried = [x * factor if j == i else x for j, x in enumerate(at)]
                tried[2] = max(tried[2], LEAST_S)
                if (now := loss(tried)) < best - 1e-12:
                    at, best, moved = tried, now, True
        if not moved:
            size /= 2
    return at[0], at[1], at[2]


def of_kinds(kernels: Sequence[Kernel]) -> dict[str, tuple[float, float, float]]:
    """A fit a kind; the compute efficiency is that of matrices in all of them."""
    compute = fit([k for k in kernels if k.kind == GEMM])[1]
    return {kind: fit([k for k in kernels if k.kind == kind], None if kind == GEMM else compute) for kind in NAMES}


def errors(kernels: Sequence[Kernel], p: tuple[float, float, float]) -> list[float]:
    return [abs(math.log(seconds(k, *p) / k.seconds)) for k in kernels]


def left_out(kind: str) -> list[float]:
    """Errors of every kernel of a kind by constants fitted without its card."""
    found = []
    for left in cards():
        p = of_kinds([k for k in measured() if k.gpu != left])[kind]
        found += errors([k for k in measured() if k.gpu == left and k.kind == kind], p)
    return found


def constant_rows() -> list[Constant]:
    """Of all cards, from the least to the most of them; then of each card, its median error either way."""
    own: list[Constant] = []
    for card in cards():
        some = [k for k in measured() if k.gpu == card]
        for kind, p in of_kinds(some).items():
            here = [k for k in some if k.kind == kind]
            factor = math.exp(statistics.median_high(errors(here, p)))
            own += [
                Constant(name, ANY, card, digits(x), digits(x / factor), digits(x * factor), FITTED, len(here),
                         f"{SOURCE}; interval: its median error")
                for name, x in _named(kind, p).items()
            ]  # fmt: skip
    pooled = []
    for kind, p in of_kinds(measured()).items():
        n = sum(k.kind == kind for k in measured())
        for name, x in _named(kind, p).items():
            each = [row.value for row in own if row.name == name]
            pooled.append(Constant(name, ANY, ANY, digits(x), min(each), max(each), FITTED, n,
                                   f"{SOURCE}; interval: the least and the most of {len(each)} GPUs"))  # fmt: skip
    return pooled + own


def _named(kind: str, p: tuple[float, float, float]) -> dict[str, float]:
    efficiency, fixed = NAMES[kind]
    return {efficiency: p[0], fixed: p[2]} | ({"compute_efficiency": p[1]} if kind == GEMM else {})


def digits(x: float) -> float:
    """Four of them: more says nothing.

    >>> digits(0.84495), digits(3.6577e-6)
    (0.8449, 3.658e-06)
    """
    return float(f"{x:.4g}")


def main() -> None:
    for kind in NAMES:
        mine = errors([k for k in measured() if k.kind == kind], of_kinds(measured())[kind])
        print(
            f"{kind}: {len(mine)} kernels, median {statistics.median(mine):.3f}; a card left out {statistics.median(left_out(kind)):.3f}"
        )
    fitted = constant_rows()
    kept = [row for row in json.loads(OUT.read_text(encoding="utf-8"))["constants"] if row["basis"] != FITTED]
    lines = [json.dumps(row) for row in [*(asdict(row) for row in fitted), *kept]]
    OUT.write_text('{"schema": 1, "constants": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    print(f"wrote {len(fitted)} constants to {OUT.name}")


if __name__ == "__main__":
    main()
