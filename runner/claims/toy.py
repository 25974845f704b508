"""One linear layer under a frozen readout, with LoRA and Adam, in float64: where arithmetic can be seen to hold.

    logits = U (W0 + s B A) x,   s = scaling of the method,   A ~ U(-init, init) / sqrt(d),   B = 0

x is ten letters of English, y the letter that follows. The text is the Zen of Python, which every CPython has and
no release changes. U and W0 are random: what is shown here holds for any of them.

Letters: n samples of the one batch, d width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO

import numpy as np
from numpy.typing import NDArray

from lora_planner.method import DEFAULT_ALPHA, lora

Array = NDArray[np.float64]

LETTERS = "abcdefghijklmnopqrstuvwxyz "  # everything else is one sign more
CONTEXT = 10
WIDTH = 256
SAMPLES = 128
BETAS = (0.9, 0.999)


@dataclass(frozen=True, slots=True, eq=False)
class Toy:
    """`base`: logits without an adapter [n, signs]; `readout`: U [signs, d]; `right`: one-hot y [n, signs]."""

    x: Array
    right: Array
    base: Array
    readout: Array


def text() -> str:
    """The Zen of Python, in small letters; importing it prints it."""
    with redirect_stdout(StringIO()):
        import this
    return "".join(this.d.get(c, c) for c in this.s).lower()


@lru_cache(maxsize=1)
def toy() -> Toy:
    """The batch: letters spread over the text, each context embedded by a fixed random table."""
    draw = np.random.default_rng(0)
    signs = np.array([LETTERS.find(c) % (len(LETTERS) + 1) for c in text()])
    ends = np.linspace(CONTEXT, len(signs) - 1, SAMPLES).astype(int)
    table = draw.standard_normal((CONTEXT, len(LETTERS) + 1, WIDTH)) / CONTEXT**0.5
    x = sum((table[i, signs[ends - CONTEXT + i]] for i in range(CONTEXT)), np.zeros((SAMPLES, WIDTH)))
    w = draw.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    readout = draw.standard_normal((len(LETTERS) + 1, WIDTH)) / WIDTH**0.5
    return Toy(x, np.eye(len(LETTERS) + 1)[signs[ends]], x @ w.T @ readout.T, readout)


def loss(logits: Array, right: Array) -> tuple[float, Array]:
    """Mean cross-entropy [nats] and its gradient by the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    odds = np.exp(shifted)
    total = odds.sum(axis=1, keepdims=True)
    nats = float(np.mean(np.log(total[:, 0]) - (shifted * right).sum(axis=1)))
    return nats, (odds / total - right) / len(right)


def adam(gradient: Array, mean: Array, square: Array, step: int, eps: float) -> Array:
    """The step of Adam at rate 1; `mean` and `square` are updated. 0 / 0 is 0: B = 0 leaves A no gradient at first.

        m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Source: Kingma and Ba 2014, arXiv:1412.6980, algorithm 1.

    >>> float(adam(np.array([-3.0]), np.zeros(1), np.zeros(1), 1, 0.0).round(12)[0])
    -1.0
    """
    mean += (1 - BETAS[0]) * (gradient - mean)
    square += (1 - BETAS[1]) * (gradient**2 - square)
    below = np.sqrt(square / (1 - BETAS[1] ** step)) + eps
    return np.divide(mean / (1 - BETAS[0] ** step), below, out=np.zeros_like(mean), where=below > 0)


def losses(
    rank: int,
    steps: int,
    rate_a: float,
    rate_b: float,
    seed: int = 0,
    alpha: float = DEFAULT_ALPHA,
    init: float = 1.0,
    eps_a: float = 0.0,
    eps_b: float = 0.0,
    scaling: Callable[[float, int], float] = lora.scaling,
) -> Array:
    """Nats before the first step and after each, all on the one batch; the same seed draws the same A / init."""
    batch, scale = toy(), scaling(alpha, rank)
    a = init * np.random.default_rng(seed).uniform(-1, 1, (rank, WIDTH)) / WIDTH**0.5
    b = np.zeros((WIDTH, rank))
    mean_a, square_a, mean_b, square_b = (np.zeros_like(m) for m in (a, a, b, b))
    found = np.empty(steps + 1)
    for step in range(steps + 1):
        low = batch.x @ a.T
        found[step], back = loss(batch.base + scale * low @ (batch.readout @ b).T, batch.right)
        if step < steps:
            hidden = back @ batch.readout
            to_a, to_b = scale * (hidden @ b).T @ batch.x, scale * hidden.T @ low
            a = a - rate_a * adam(to_a, mean_a, square_a, step + 1, eps_a)
            b = b - rate_b * adam(to_b, mean_b, square_b, step + 1, eps_b)
    return found
