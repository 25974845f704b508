"""Random tokens of one length, for timing and memory: no padding, no text, nothing to learn."""

from __future__ import annotations

import random
from typing import Any

from lora_planner.errors import BadInput
from runner.tasks import Sample, Task
from runner.tasks.facts import alphabet, samples_digest


def build(tokenizer: Any, seq_len: int, seed: int, n: int = 64, vocab_size: int = 0) -> Task:
    """`n` samples of exactly `seq_len` tokens, all trained, and one more held out.

    `vocab_size`: draw from that many tokens where there is no tokenizer, as for the random weights of a bare config.
    """
    if n < 1 or seq_len < 2:
        raise BadInput(f"{n} samples of {seq_len} tokens", "task probe", "Take 1 sample or more, of 2 tokens or more.")
    words, rng = alphabet(tokenizer) if tokenizer else list(range(vocab_size)), random.Random(seed)
    drawn = [tuple(rng.choices(words, k=seq_len)) for _ in range(n + 1)]
    *train, held_out = (Sample(f"probe {number}", tokens, tokens) for number, tokens in enumerate(drawn))
    facts = {
        "documents": n + 1,
        "train_windows": n,
        "held_out_windows": 1,
        "trained_tokens": sum(sample.trained for sample in train),
        "corpus_sha256": samples_digest([*train, held_out]),
    }
    return Task("probe", train, [held_out], facts)
