"""Domain shift: a base that has seen only code learns English prose. The two share no document and no long line."""

from __future__ import annotations

from typing import Any

from runner.corpus import prose_documents
from runner.tasks import Task
from runner.tasks.code import packed


def build(
    tokenizer: Any, seq_len: int, seed: int, max_train_windows: int | None = None, held_out_windows: int = 64
) -> Task:
    """Windows of the standard library's docstrings and of the language reference."""
    return packed("shift", prose_documents(), tokenizer, seq_len, seed, max_train_windows, held_out_windows)
