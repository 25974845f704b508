"""Random facts, pure memorisation: nothing but their own bits can be learned, and these are counted exactly."""

from __future__ import annotations

import random
from math import log2
from typing import Any

from lora_planner.errors import BadInput
from runner.corpus import Document, digest
from runner.tasks import IGNORED, Sample, Task

KEY_TOKENS = 4
ARROW = " ->"


def build(tokenizer: Any, seq_len: int, seed: int, n: int = 1000, value_tokens: int = 4) -> Task:
    """`n` samples "key -> value" of random tokens with different keys; only the value is trained.

    The held-out samples are the training samples: what was memorised is measured where it was learned, and
    there is nothing to generalise to.
    """
    words, arrow = alphabet(tokenizer), tokenizer.encode(ARROW, add_special_tokens=False)
    length = KEY_TOKENS + len(arrow) + value_tokens
    if n < 1 or value_tokens < 1 or length > seq_len:
        raise BadInput(f"{n} facts of {length} tokens in windows of {seq_len}", "task facts",
                       "Take n and value_tokens of 1 or more, and a seq_len that holds a fact.")  # fmt: skip
    if 2 * n > len(words) ** KEY_TOKENS:
        raise BadInput(f"{n} facts need more keys than {KEY_TOKENS} of {len(words)} tokens give", "task facts",
                       "Take a smaller n.")  # fmt: skip
    rng = random.Random(seed)
    keys: dict[tuple[int, ...], None] = {}  # a set in the order of drawing
    while len(keys) < n:
        keys[tuple(rng.choices(words, k=KEY_TOKENS))] = None
    samples = []
    for number, key in enumerate(keys):
        value = rng.choices(words, k=value_tokens)
        head = (*key, *arrow)
        samples.append(Sample(f"fact {number}", (*head, *value), (*[IGNORED] * len(head), *value)))
    facts = {
        "documents": n,
        "train_windows": n,
        "held_out_windows": n,
        "trained_tokens": n * value_tokens,
        "corpus_sha256": samples_digest(samples),
        "alphabet": len(words),
        "information_bits": information_bits(n, value_tokens, len(words)),
    }
    return Task("facts", samples, samples, facts)


def information_bits(n: int, value_tokens: int, alphabet: int) -> float:
    """What must be stored to give every value back: each of its tokens is drawn evenly and independently.

        n * value_tokens * log2(alphabet)        [bits]

    Source: Shannon 1948, sec. 6; as counted by Morris et al. 2025, arXiv:2505.24832.

    >>> information_bits(10, 3, 256)
    240.0
    """
    return n * value_tokens * log2(alphabet)


def alphabet(tokenizer: Any) -> list[int]:
    """Every token that is not special, in the order of ids."""
    special = set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def samples_digest(samples: list[Sample]) -> str:
    """The corpus digest of data that was drawn, not read: over ids and tokens."""
    return digest(Document(sample.id, " ".join(map(str, sample.tokens))) for sample in samples)
