"""Domain shift: a base that has seen only code learns English prose. The two share no document and no long line."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from runner.corpus import prose_documents
from runner.tasks import Sample, Task
from runner.tasks.code import packed


def build(
    tokenizer: Any, seq_len: int, seed: int, max_train_windows: int | None = None, held_out_windows: int = 64,
    shuffled: bool = False,
) -> Task:  # fmt: skip
    """Windows of the standard library's docstrings and of the language reference.

    `shuffled`: the tokens of each training window in random order, a control. Frequencies can be learned from it and
    nothing else, so whatever a run gains beyond that did not come from the text.
    """
    task = packed("shift", prose_documents(), tokenizer, seq_len, seed, max_train_windows, held_out_windows)
    if shuffled:
        task.train = [mixed(sample, seed) for sample in task.train]
    return task


def mixed(sample: Sample, seed: int) -> Sample:
    """The same tokens in an order that its id and the seed decide."""
    tokens = list(sample.tokens)
    random.Random(f"{seed} {sample.id}").shuffle(tokens)
    return replace(sample, tokens=tuple(tokens), labels=tuple(tokens))
