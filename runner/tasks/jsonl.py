"""The user's own file: chats, prompts with completions, or plain text; the loss is on the answers alone.

A run is known by the file's sha256, never by its path: `register` says where the file lies, `build` finds
it by its hash and refuses one that has changed. Every row that is not trained on is counted, with a reason.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_planner.data_file import LONGEST_LINE, json_rows, parquet_rows, read_data
from lora_planner.data_rows import BadRow, Piece, pieces_of
from lora_planner.errors import BadInput
from runner.tasks import IGNORED, Sample, Task

HELD_OUT = 0.1  # of the different samples
MOST_SKIPPED = 0.05  # of the rows
#: a template with this marker says itself which tokens are the assistant's
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: ShareGPT's word for the role that every template calls user
ROLES = {"human": "user"}

Encoded = tuple[list[int], list[int]]  # tokens and labels of a row

_paths: dict[str, Path] = {}


def register(path: str | os.PathLike[str]) -> str:
    """Read the file once, refuse it if the planner would, and remember where it lies: its sha256."""
    sha256 = read_data(path).sha256
    _paths[sha256] = Path(path).absolute()
    return sha256


def build(tokenizer: Any, seq_len: int, seed: int, *, path: str = "", sha256: str = "") -> Task:
    """The file with this hash, or the one at `path`; rows are cut at `seq_len` tokens."""
    if path:
        found = register(path)
        sha256 = sha256 or found
    if sha256 not in _paths:
        raise BadInput(f"no file with sha256 {sha256[:12] or '(none)'} was given", "data",
                       "Name the file that the run was planned with.")  # fmt: skip
    file = _paths[sha256]
    rows = truncated = 0
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    first = ""
    for number, row in _rows(file, sha256):
        rows += 1
        try:
            tokens, labels = _encode(tokenizer, row, f"{file.name}:{number}")
            sample = Sample(f"{file.name}:{number}", tuple(tokens[:seq_len]), tuple(labels[:seq_len]))
            if not sample.trained:
                cut = len(tokens) > seq_len and any(label != IGNORED for label in labels[seq_len:])
                raise BadRow("all truncated" if cut else "no token to train on")
        except BadRow as bad:
            skipped[str(bad).partition(":")[0]] += 1
            first = first or f"line {number}: {bad}"
            continue
        truncated += len(tokens) > seq_len
        samples.append(sample)
    bad_rows = sum(skipped.values())
    if not samples or bad_rows > MOST_SKIPPED * rows:
        raise BadInput(f"{bad_rows} of {rows} rows cannot be trained on, first {first}", file.name,
                       f"At most {MOST_SKIPPED:.0%} may be skipped: mend the rows, or the sequence length of "
                       f"{seq_len}, or use a chat template with {{% generation %}}.", skipped=dict(skipped))  # fmt: skip
    train, held_out = split(samples, seed)
    if not train:
        raise BadInput("all rows are the same, none is left to hold out", file.name, "Give at least two.")
    facts = {
        "sha256": sha256,
        "rows": rows,
        "skipped": dict(skipped),
        "first_skipped": first,
        "truncated": truncated,
        "duplicates": len(samples) - len({s.tokens for s in samples}),
        "train": len(train),
        "held_out": len(held_out),
        "trained_tokens": sum(s.trained for s in train),  # of one epoch
    }
    return Task("jsonl", train, held_out, facts)


def split(samples: list[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Train and held-out part: the tenth of the different token sequences whose hashes are lowest.

    What is equal after truncation falls on one side, so nothing held out was trained on.
    """

    def place(sample: Sample) -> bytes:
        return hashlib.sha256(f"{seed}:{sample.tokens}".encode()).digest()

    places = [place(s) for s in samples]
    different = sorted(set(places))
    last = different[max(1, round(HELD_OUT * len(different))) - 1]
    train = [s for s, at in zip(samples, places, strict=True) if at > last]
    return train, [s for s, at in zip(samples, places, strict=True) if at <= last]


def _rows(file: Path, sha256: str) -> Iterator[tuple[int, object]]:
    """Numbered rows of the file, after a look whether it is still the one that was registered."""
    try:
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise BadInput("the file has changed since the run was planned", file.name,
                               "Restore it, or plan a new run.")  # fmt: skip
            stream.seek(0)
            parquet = stream.read(4) == b"PAR1"
            stream.seek(0)
            yield from parquet_rows(str(file)) if parquet else json_rows(stream, LONGEST_LINE)
    except OSError as error:
        raise BadInput(f"cannot read: {error.strerror}", file.name, "Was it moved since it was named?") from error


def _encode(tokenizer: Any, row: object, where: str) -> Encoded:
    if isinstance(row, BadRow):
        raise row
    _, pieces, chat = pieces_of(row)
    if chat and not tokenizer.chat_template:
        raise BadInput("the row is a chat and the tokenizer has no chat template", where,
                       "Use the tokenizer of an instruction-tuned model, or rows of prompt and completion.")  # fmt: skip
    try:
        return _chat(tokenizer, pieces) if chat else _plain(tokenizer, pieces)
    except BadRow:
        raise
    except Exception as error:  # template and tokenizer are a stranger's code; one row must not end the run
        said = (str(error).splitlines() or [""])[0][:80]
        raise BadRow(f"tokenizer or chat template failed: {type(error).__name__} {said}") from error


def _plain(tokenizer: Any, pieces: list[Piece]) -> Encoded:
    """Prompt and completion in one text, trained from the first token that the prompt alone lacks, and an end."""
    tokens: list[int] = list(tokenizer("".join(text for _, text, _ in pieces))["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and tokens[-1:] != [end]:
        tokens.append(end)
    prompt = "".join(text for _, text, trained in pieces if not trained)
    alone = tokenizer(prompt)["input_ids"] if prompt else []
    start = next(
        (i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b), min(len(alone), len(tokens))
    )
    return tokens, [IGNORED] * start + tokens[start:]


def _chat(tokenizer: Any, pieces: list[Piece]) -> Encoded:
    """A chat through the tokenizer's template, trained on the assistant's tokens.

    The template's own marks decide where it has them. They cover every answer, so a chat some of whose
    answers are only context goes by prefixes too.
    """
    messages = [{"role": ROLES.get(role, role), "content": text} for role, text, _ in pieces]
    answers = [i for i, (role, _, trained) in enumerate(pieces) if trained and role == "assistant"]
    if not answers:
        raise BadRow("no assistant turn")
    all_trained = len(answers) == sum(role == "assistant" for role, _, _ in pieces)
    if all_trained and GENERATION.search(tokenizer.get_chat_template()):
        return _by_marks(tokenizer, messages)
    return _by_prefixes(tokenizer, messages, answers)


def _by_marks(tokenizer: Any, messages: list[dict[str, str]]) -> Encoded:
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokens = list(out["input_ids"])
    return tokens, [t if mine else IGNORED for t, mine in zip(tokens, out["assistant_masks"], strict=True)]


def _by_prefixes(tokenizer: Any, messages: list[dict[str, str]], answers: list[int]) -> Encoded:
    """An answer is what its turn adds to the prompt that asks for it; the end of the turn belongs to it.

        prompt(messages[:i]) < tokens(messages[:i + 1]) < prompt of the next answer < tokens(messages)

    Each must be a prefix of the next. A template that drops earlier turns' thoughts, or adds empty ones to the last
    turn alone, breaks the chain: what the model sees then differs from turn to turn, and no single sequence can train
    all of them. Then the last answer alone is trained, which is what the model would see when it gives it.
    """

    def render(upto: int, ask: bool) -> list[int]:
        out = tokenizer.apply_chat_template(messages[:upto], return_dict=True, add_generation_prompt=ask)
        return list(out["input_ids"])

    tokens = render(len(messages), ask=False)
    if answers[0] == 0:
        raise BadRow("the chat begins with an answer, which no prompt asks for")
    for wanted in (answers, answers[-1:]):
        labels = [IGNORED] * len(tokens)
        end = 0
        for i in wanted:
            prompt, turn = render(i, ask=True), render(i + 1, ask=False)
            if len(prompt) < end or turn[: len(prompt)] != prompt or tokens[: len(turn)] != turn:
                break
            end = len(turn)
            labels[len(prompt) : end] = turn[len(prompt) :]
        else:
            return tokens, labels
    raise BadRow(f"the chat template rewrites earlier turns: turn {answers[-1] + 1} is no continuation")
