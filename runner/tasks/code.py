"""Source code: what a base learns first, and the control that later training must not forget."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from lora_planner.errors import BadInput
from runner.corpus import Document, code_documents, digest, split
from runner.tasks import Sample, Task

AT_ONCE = 32  # documents given to the tokenizer together


def build(
    tokenizer: Any, seq_len: int, seed: int, max_train_windows: int | None = None, held_out_windows: int = 64
) -> Task:
    """Windows of the standard library's code, without docstrings and comments."""
    return packed("code", code_documents(), tokenizer, seq_len, seed, max_train_windows, held_out_windows)


def packed(
    name: str,
    documents: Sequence[Document],
    tokenizer: Any,
    seq_len: int,
    seed: int,
    max_train_windows: int | None,
    held_out_windows: int,
) -> Task:
    """Windows of exactly `seq_len` tokens, every one of them trained; train and held-out share no document.

    Training takes the first `max_train_windows` in the corpus's hashed order (None: all), so that a shorter
    task is a part of the longer one. `seed` draws the held-out windows. Where the corpus has fewer windows
    than were asked for, all of them are taken: `facts` tells how many.
    """
    if seq_len < 2 or held_out_windows < 1 or (max_train_windows is not None and max_train_windows < 1):
        raise BadInput(f"windows of {seq_len} tokens, at most {max_train_windows} to train on, {held_out_windows} held out",
                       f"task {name}", "A window has 2 tokens or more, and both parts a window or more.")  # fmt: skip
    train_documents, held_out_documents = split(documents)
    train = list(islice(windows(train_documents, tokenizer, seq_len), max_train_windows))
    candidates = list(windows(held_out_documents, tokenizer, seq_len))
    held_out = random.Random(seed).sample(candidates, min(held_out_windows, len(candidates)))
    if not train or not held_out:
        raise BadInput(f"windows of {seq_len} tokens are longer than the text", f"task {name}", "Shorten seq_len.")
    facts = {
        "documents": len(documents),
        "train_windows": len(train),
        "held_out_windows": len(held_out),
        "trained_tokens": sum(sample.trained for sample in train),
        "corpus_sha256": digest(documents),
    }
    return Task(name, train, held_out, facts)


def windows(documents: Iterable[Document], tokenizer: Any, seq_len: int) -> Iterator[Sample]:
    """Documents, each closed by eos, as one stream that is cut every `seq_len` tokens; a short rest is dropped.

    A window is named after the document that it starts in.
    """
    if tokenizer.eos_token_id is None:
        raise BadInput("the tokenizer has no eos token, which separates documents", "tokenizer", "Set eos_token.")
    stream: list[int] = []
    starts_in = ""
    number = 0
    for document, tokens in encoded(documents, tokenizer):
        starts_in = starts_in if stream else document.id
        stream += [*tokens, tokenizer.eos_token_id]
        while len(stream) >= seq_len:
            cut = tuple(stream[:seq_len])
            yield Sample(f"{starts_in}, window {number}", cut, cut)
            del stream[:seq_len]
            starts_in = document.id
            number += 1


def encoded(documents: Iterable[Document], tokenizer: Any) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its tokens, encoded only as far as it is asked for."""
    remaining = iter(documents)
    while batch := list(islice(remaining, AT_ONCE)):
        texts = [document.text for document in batch]
        yield from zip(batch, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True)
