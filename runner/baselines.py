"""What counting alone reaches: the losses that a model must beat before it may be said to know the text.

Over the tokens that the model's loss counts, in nats per trained token. Letters: c() a count in the training
samples, N all of them, V the vocabulary, u the token before, v the token to predict.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lora_planner.errors import BadInput
from runner.tasks import IGNORED, Sample

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]

WEIGHTS = np.linspace(0.05, 0.95, 19)  # of the bigram in the mixture
TUNED_ON = 10  # one in so many training samples, the last ones, chooses the weight


def unigram_nats(train: Sequence[Sample], held_out: Sequence[Sample], vocab: int, alpha: float = 1.0) -> float:
    """Held-out cross entropy of token frequencies.

        -mean ln p(v),   p(v) = (c(v) + alpha) / (N + alpha V)        [nats/token]

    Source: add-alpha (Lidstone) smoothing; Jurafsky & Martin, Speech and Language Processing, ch. 3.
    """
    return float(-np.log(unigram(pairs(train)[1], vocab, alpha)[pairs(held_out)[1]]).mean())


def bigram_nats(train: Sequence[Sample], held_out: Sequence[Sample], vocab: int, alpha: float = 1.0) -> float:
    """Held-out cross entropy of pair frequencies, mixed with token frequencies.

        -mean ln [w c(u, v) / c(u) + (1 - w) p(v)],   p(v) alone where c(u) = 0        [nats/token]

    The weight w is the best one on the last tenth of the training samples with the counts of the others; the
    counts are then those of all. Held-out text chooses nothing. Two training samples are the least.
    Source: Jelinek & Mercer 1980; Chen & Goodman 1998, TR-10-98, sec. 2.3.
    """
    tuned = -(-len(train) // TUNED_ON)
    parts = mixture(train[:-tuned], train[-tuned:], vocab, alpha)
    weight = min(WEIGHTS, key=lambda w: mixed_nats(w, *parts))
    return mixed_nats(weight, *mixture(train, held_out, vocab, alpha))


def pairs(samples: Sequence[Sample]) -> tuple[Ids, Ids]:
    """(u, v) of every trained position; the first token of a sample has nothing before it."""
    found = [
        (before, label)
        for sample in samples
        for before, label in zip(sample.tokens, sample.labels[1:], strict=False)
        if label != IGNORED
    ]
    if not found:
        raise BadInput("samples without a trained token", "baselines", "Give samples with labels.")
    u, v = np.array(found, dtype=np.int64).T
    return u, v


def unigram(v: Ids, vocab: int, alpha: float) -> Floats:
    """p(v) of each token of the vocabulary."""
    return (np.bincount(v, minlength=vocab) + alpha) / (len(v) + alpha * vocab)


def mixture(train: Sequence[Sample], text: Sequence[Sample], vocab: int, alpha: float) -> tuple[Floats, Floats, Ids]:
    """At each trained position of the text: c(u, v) / c(u), p(v) and c(u)."""
    (u, v), (before, label) = pairs(train), pairs(text)
    known, counts = np.unique(u * vocab + v, return_counts=True)
    wanted = before * vocab + label
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    together = np.where(known[at] == wanted, counts[at], 0)
    contexts = np.bincount(u, minlength=vocab)[before]
    return together / np.maximum(contexts, 1), unigram(v, vocab, alpha)[label], contexts


def mixed_nats(weight: float, conditional: Floats, single: Floats, contexts: Ids) -> float:
    """Mean nats per token with this weight of the bigram."""
    mixed = np.where(contexts > 0, weight * conditional + (1 - weight) * single, single)
    return float(-np.log(mixed).mean())
