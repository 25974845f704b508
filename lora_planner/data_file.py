"""The user's data set: JSON lines or Parquet in; tokens, lengths and padding out.

One pass, one row at a time: kept are a count per length and 8 bytes per row. Counting is either
assumed (bytes per token) or done with the model's own `tokenizer.json`. A chat template is code of a
stranger and is never executed; what it adds is taken from the rows of TEMPLATES.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from lora_planner.data_rows import COLUMNS, RENDERED, BadRow, Piece, pieces_of
from lora_planner.errors import BadInput, EnvironmentMissing, UsageError
from lora_planner.ledger import ASSUMED, DERIVED, EXACT, Estimate, Ledger, Term, exact
from lora_planner.lengths import Histogram, clipped, expected_longest, kept_tokens, packed_rows, percentile

LONGEST_LINE = 64 * 1024**2  # bytes; a longer line is a bad row, and is never held in memory
LONGEST_TOKENIZER = 128 * 1024**2  # bytes; the largest in use are near 35 MB
ASSUMED_LENGTH = 2048  # tokens per example when only a number of tokens is known
PADDED_BATCH = 8  # examples padded to the longest among them
MOST_TOKENS = 10**18

#: low, value, high
Range = tuple[float, float, float]

# fmt: off
#: UTF-8 bytes per token of the vocabularies of 100k to 260k in use since 2023
BYTES_PER_TOKEN: dict[str, Range] = {
    "ascii": (3.0, 4.2, 5.0),  # code, JSON and formulas low, plain English prose high
    "digit": (1.0, 1.6, 2.5),  # one token a digit (Qwen, Gemma) or a token for up to three (Llama 3, GPT-4)
    "cjk":   (2.2, 3.3, 5.0),  # 3 bytes a character; 0.75 to 1.65 characters a token
    "other": (1.8, 3.5, 6.5),  # accents, Cyrillic, Arabic, Indic, emoji: vocabularies differ most here
}
# fmt: on


# --- formulas ---------------------------------------------------------------------------------


def estimate_tokens(text: str) -> Range:
    """Tokens of a text nobody has tokenised: bytes of each class over the class's bytes per token.

        sum over classes (bytes / bytes_per_token)        [tokens]

    The class of a character is read off its first UTF-8 byte: E3 to ED starts CJK, kana and hangul.
    Source: assumed. Llama 3's vocabulary has 3.94 characters per token on its authors' English sample,
    Llama 2's had 3.17 (arXiv:2407.21783, sec. 3.2.1).

    >>> [round(n) for n in estimate_tokens("a" * 420)]
    [84, 100, 140]
    >>> [round(n) for n in estimate_tokens("好" * 110)]
    [66, 100, 150]
    """
    raw = text.encode()
    digit = len(raw) - len(raw.translate(None, b"0123456789"))
    low, value, high = _PER_ASCII
    low_digit, value_digit, high_digit = _PER_DIGIT
    size = len(raw) - digit
    if text.isascii():
        return (
            size * low + digit * low_digit,
            size * value + digit * value_digit,
            size * high + digit * high_digit,
        )
    wide = len(raw.translate(None, _ASCII))
    cjk = min(wide, 3 * (len(raw) - len(raw.translate(None, _CJK_LEADS))))
    parts = zip((size - wide, digit, cjk, wide - cjk), BYTES_PER_TOKEN.values(), strict=True)
    rates = [(n / most, n / usual, n / least) for n, (least, usual, most) in parts]
    return sum(r[0] for r in rates), sum(r[1] for r in rates), sum(r[2] for r in rates)


_ASCII = bytes(range(128))
_CJK_LEADS = bytes(range(0xE3, 0xEE))


def _tokens_per_byte(kind: str) -> Range:
    least, usual, most = BYTES_PER_TOKEN[kind]
    return 1 / most, 1 / usual, 1 / least


_PER_ASCII, _PER_DIGIT = _tokens_per_byte("ascii"), _tokens_per_byte("digit")


def parse_token_count(text: str) -> int:
    """A number of tokens as people write it.

    >>> parse_token_count("10M"), parse_token_count("1.5B"), parse_token_count("20k")
    (10000000, 1500000000, 20000)
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)([kmbt]?)", text.strip().replace("_", ""), re.I | re.A)
    if not match:
        raise BadInput(f"{text[:40]!r} is no number of tokens", "--tokens", "Write 10M, 1.5B, 20k or 123456.")
    number = Decimal(match[1]) * 1000 ** " kmbt".index(match[2].lower() or " ")
    if number != int(number) or not 1 <= number <= MOST_TOKENS:
        raise BadInput(f"{text[:40]!r} is not a whole number of tokens from 1 to 10^18", "--tokens")
    return int(number)


# --- the result -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What the planner knows of a data set.

    `tokens` and `trained_tokens` are one epoch's, after truncation at `max_length`; `tokens_lost` is
    what truncation removed. `histogram` holds lengths before truncation. The efficiencies are real
    tokens over computed tokens: padded to `max_length` (to the longest where there is none), in shuffled
    batches of 8 padded to their longest, and packed.
    """

    path: str
    sha256: str
    kind: str  # messages, conversations, prompt_completion, instruction, text, mixed, or tokens
    kinds: tuple[tuple[str, int], ...]
    rows: int
    examples: int
    bad_rows: int
    first_bad: tuple[int, str] | None  # line (Parquet: row) and reason
    duplicates: int
    tokens: Estimate
    trained_tokens: Estimate
    histogram: Histogram
    max_length: int | None
    longest_line: int
    truncated: int
    tokens_lost: int
    untrained: int  # examples whose every trained token was cut off
    pad_efficiency: float
    batch_efficiency: float
    packing_efficiency: float
    template: str  # how the tokens around a message were counted
    warnings: tuple[str, ...] = ()

    @property
    def basis(self) -> str:
        return self.tokens.basis

    @property
    def p50(self) -> int:
        return percentile(self.histogram, 0.5)

    @property
    def p90(self) -> int:
        return percentile(self.histogram, 0.9)

    @property
    def p99(self) -> int:
        return percentile(self.histogram, 0.99)

    @property
    def longest(self) -> int:
        return self.histogram[-1][0]

    @classmethod
    def from_tokens(cls, n: int, max_length: int | None = None) -> DataFacts:
        """No file, only a number of tokens: full examples of `max_length` (2048), all of them trained on.

        >>> DataFacts.from_tokens(10_000, max_length=1000).examples
        10
        """
        if not 1 <= n <= MOST_TOKENS:
            raise BadInput(f"{n} tokens", "--tokens", "Give a whole number from 1 to 10^18.")
        _check_max_length(max_length)
        length = min(max_length or ASSUMED_LENGTH, n)
        examples = -(-n // length)
        share = "assumed: every token is trained on; chat data trains on 30 to 100 %"
        return cls(
            path="",
            sha256="",
            kind="tokens",
            kinds=(("tokens", examples),),
            rows=examples,
            examples=examples,
            bad_rows=0,
            first_bad=None,
            duplicates=0,
            tokens=exact(n, "tokens", "given"),
            trained_tokens=Estimate(0.3 * n, n, n, "tokens", ASSUMED, share),
            histogram=((length, examples),),
            max_length=max_length,
            longest_line=0,
            truncated=0,
            tokens_lost=0,
            untrained=0,
            pad_efficiency=n / (examples * length),
            batch_efficiency=n / (examples * length),
            packing_efficiency=n / (examples * length),
            template="none",
            warnings=(f"lengths are unknown: {length} tokens per example assumed",),
        )


# --- reading ----------------------------------------------------------------------------------


class _Hashed(io.RawIOBase):
    """A raw file that hashes what is read from it: one pass gives content and sha256."""

    def __init__(self, raw: io.FileIO) -> None:
        self.raw, self.sha256 = raw, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self.raw.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:n])
        return n


def _lines(stream: BinaryIO, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one over the limit, which is skipped in pieces."""
    number = 0
    while line := stream.readline(longest + 1):
        number += 1
        if len(line) > longest and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(1024**2)
            yield number, None
        else:
            yield number, line


def json_rows(stream: BinaryIO, longest: int) -> Iterator[tuple[int, object]]:
    """Numbered rows of a JSON lines file; a BadRow where a line is none."""
    for number, line in _lines(stream, longest):
        if line is None:
            yield number, BadRow(f"line longer than {longest // 1024**2} MiB")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.isspace() or not text:
                continue
            yield number, json.loads(text)
        except UnicodeDecodeError as error:
            yield number, BadRow(f"not UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            yield number, BadRow(f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError):  # an integer of 5,000 digits; 10,000 open brackets
            yield number, BadRow("not JSON that can be read: a number too long, or nested too deep")


def parquet_rows(path: str) -> Iterator[tuple[int, object]]:
    parquet = _optional("pyarrow.parquet", "parquet")
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        if not columns:
            names = ", ".join(repr(name[:30]) for name in file.schema_arrow.names[:5])
            raise BadInput(f"no known column among {names}", path, _SCHEMAS)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise BadInput("the Parquet file cannot be read", path, "Write it again.") from error


_SCHEMAS = "Known: messages; conversations; prompt and completion; instruction, input and output; text."


def _optional(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise EnvironmentMissing(
            f"{module.partition('.')[0]} is not installed", "", f"pip install 'lora-plan[{extra}]'"
        ) from error


def _regular_file(path: str | os.PathLike[str]) -> str:
    """The path, if opening it can neither block nor be endless."""
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "not a path"
        raise BadInput(f"cannot open: {why}", name, "Give the path of a file.") from error
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "a pipe or device"
        raise BadInput(f"{what}, not a file", name, "Give one regular file.")
    return name


def _check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 1:
        raise UsageError(f"max_length is {max_length}", "--max-length", "Give a number of tokens, 1 or more.")


# --- counting ---------------------------------------------------------------------------------

#: Templates whose text around a message is the same for every turn.
#: name, before the content, after it. Source: the chat_template of Qwen2.5, Llama-3 and Gemma-2.
TEMPLATES = (
    ("chatml", "<|im_start|>{role}\n", "<|im_end|>\n"),
    ("llama-3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    ("gemma", "<start_of_turn>{role}\n", "<end_of_turn>\n"),
)
MARK = re.compile(r"<[^<>]+>")
#: tokens of a system prompt that a template may add to every example: Llama-3.1 writes 25 to 30
HIDDEN_SYSTEM = 30
#: tokens of the empty think block that Qwen3's template puts before an answer
THINK_BLOCK = 4


@dataclass(frozen=True, slots=True)
class _Counting:
    """How text becomes tokens, and what is added around it.

    A chat example is `start` tokens, then per message `before`, its content, the end of its turn (one
    token, trained on after an answer) and `after`. Any other example is `plain_start`, its text and one
    end token. The spreads say how far below and above another template may be, per message and
    per example.
    """

    count: Callable[[list[str]], list[Range]]
    before: Callable[[str], int] = lambda role: 3
    after: int = 1
    start: int = 1
    plain_start: int = 1
    message_spread: tuple[int, int] = (4, 1)  # Mistral writes 1 or 2 tokens, others 6
    example_spread: tuple[int, int] = (1, HIDDEN_SYSTEM)
    plain_spread: tuple[int, int] = (1, 1)
    text_basis: str = ASSUMED
    chat_basis: str = ASSUMED
    template: str = "assumed: 5 tokens a message (1 to 6), as ChatML, Llama 3 and Gemma have"


def _assumed(texts: list[str]) -> list[Range]:
    return [estimate_tokens(text) for text in texts]


def _with_tokenizer(path: str) -> _Counting:
    """Counting with a `tokenizer.json`, or with a folder that has one beside its chat template."""
    library = _optional("tokenizers", "tokenizer")
    folder = Path(path)
    template_text = None
    if folder.is_dir():
        template_text, path = _template_text(folder), str(folder / "tokenizer.json")
    name = _regular_file(path)
    if os.path.getsize(name) > LONGEST_TOKENIZER:
        raise BadInput("larger than 128 MiB", name, "A tokenizer.json is expected.")
    try:
        tokenizer = library.Tokenizer.from_file(name)
    except Exception as error:  # the library raises bare Exception
        raise BadInput("not a tokenizer.json", name, "Use the file of that name from the model.") from error
    tokenizer.no_truncation()  # the file may carry the settings of somebody's last run
    tokenizer.no_padding()

    def count(texts: list[str]) -> list[Range]:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [(n, n, n) for n in map(len, encoded)]

    added = tokenizer.num_special_tokens_to_add(False)
    counting = _Counting(count, plain_start=added, plain_spread=(0, 0), text_basis=EXACT)
    for template, before, after in TEMPLATES:
        marks = MARK.findall(before.replace("{role}", "") + after)
        known = all(tokenizer.token_to_id(mark) is not None for mark in marks)
        if known and (template_text is None or marks[0] in template_text):
            return replace(
                counting,
                before=_memoised_size(tokenizer, before),
                after=int(count([after])[0][1]) - 1,
                start=added if template_text is None or "bos_token" in template_text else 0,
                message_spread=(0, 0),
                example_spread=(0, HIDDEN_SYSTEM),
                chat_basis=DERIVED,
                template=f"{template}, by its special tokens; the template itself was not run",
            )
    return counting


def _memoised_size(tokenizer: Any, before: str) -> Callable[[str], int]:
    """Tokens before the content of a message, by role; a file has a handful of roles."""

    @lru_cache(maxsize=64)
    def size(role: str) -> int:
        return len(tokenizer.encode(before.format(role=role), add_special_tokens=False).ids)

    return size


def _template_text(folder: Path) -> str | None:
    """The chat template of a model folder, read as text: to look for marks, never to run it."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size <= 8 * 1024**2:
            return path.read_text("utf-8", "replace")
    return None


# --- the pass over the file -------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    """Tokens of text (with bounds) and tokens around it (a count)."""

    low: float = 0.0
    value: float = 0.0
    high: float = 0.0
    around: int = 0


@dataclass(slots=True)
class _Tally:
    """Sums over the rows read so far. Memory: a count per length, 8 bytes per row."""

    counting: _Counting
    max_length: int | None
    unit: str = "line"  # what numbers the rows: lines, or rows of a Parquet file
    kinds: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    hashes: list[array[int]] = field(default_factory=lambda: [array("q") for _ in range(256)])
    bad_rows: int = 0
    first_bad: tuple[int, str] | None = None
    all: _Sums = field(default_factory=_Sums)
    trained: _Sums = field(default_factory=_Sums)
    trained_kept: int = 0
    longest: int = 0
    longest_line: int = 0
    first_cut: int = 0
    untrained: int = 0
    chats: int = 0
    messages: int = 0  # of chats
    answers: int = 0  # of chats
    rendered: int = 0

    def add_bad(self, line: int, reason: str) -> None:
        self.bad_rows += 1
        if self.first_bad is None:
            self.first_bad = line, reason

    def add(self, line: int, schema: str, pieces: list[Piece], chat: bool, counts: list[Range]) -> None:
        low = value = high = trained_low = trained = trained_high = 0.0
        answers = 0
        for (_, _, is_trained), (n_low, n, n_high) in zip(pieces, counts, strict=True):
            low += n_low
            value += n
            high += n_high
            if is_trained:
                answers += 1
                trained_low += n_low
                trained += n
                trained_high += n_high
        how = self.counting
        if chat:
            around = how.start + len(pieces) * (1 + how.after) + sum([how.before(p[0]) for p in pieces])
            self.chats += 1
            self.messages += len(pieces)
            self.answers += answers
        else:
            around = how.plain_start + 1
        for sums, a, b, c, d in (
            (self.all, low, value, high, around),
            (self.trained, trained_low, trained, trained_high, answers),
        ):
            sums.low += a
            sums.value += b
            sums.high += c
            sums.around += d
        length, kept = round(value + around), round(trained + answers)
        self.kinds[schema] += 1
        self.lengths[length] += 1
        if length > self.longest:
            self.longest, self.longest_line = length, line
        if self.max_length is not None and length > self.max_length:
            kept = kept_tokens(self._spans(pieces, chat, counts), self.max_length)
            self.first_cut = self.first_cut or line
        self.trained_kept += kept
        self.untrained += kept < 1
        digest = hash(tuple(pieces))  # compared within this run only: Python's own 64 bits will do
        self.hashes[digest & 255].append(digest)

    def _spans(self, pieces: list[Piece], chat: bool, counts: list[Range]) -> Iterator[tuple[float, bool]]:
        """A row's tokens in order, trained on or not: what a cut at max_length needs."""
        how = self.counting
        yield how.start if chat else how.plain_start, False
        for (role, _, is_trained), (_, n, _) in zip(pieces, counts, strict=True):
            if chat:
                yield how.before(role), False
            yield n + (1 if chat or is_trained else 0), is_trained
            if chat:
                yield how.after, False

    def duplicates(self) -> int:
        return sum(len(bucket) - len(set(bucket)) for bucket in self.hashes)

    def estimate(self, sums: _Sums, kept: int, trained: bool) -> Estimate:
        """Tokens left after truncation. The text's and the template's errors are independent.

        Truncation removes a smaller share of fewer tokens, so the middle's share bounds both sides.
        """
        how = self.counting
        plain = sum(self.lengths.values()) - self.chats
        basis = how.chat_basis if self.chats else how.text_basis
        if basis == EXACT:
            return exact(kept, "tokens", "counted with the tokenizer")
        spreads = [(plain, how.plain_spread)]
        if trained:
            spreads += [(self.answers, (1, THINK_BLOCK))]  # some trainers mask the end of a turn
        else:
            spreads += [(self.answers, (0, THINK_BLOCK))]
            spreads += [(self.messages, how.message_spread), (self.chats, how.example_spread)]
        below, above = (sum(n * spread[side] for n, spread in spreads) for side in (0, 1))
        text = Term("text", sums.value, basis, "data_file.estimate_tokens", sums.low, sums.high)
        around = Term("template", sums.around, basis, "", sums.around - below, sums.around + above)
        total = Ledger("tokens", "tokens", [text, around]).estimate()
        share = kept / total.value
        return Estimate(total.low * share, kept, total.high * share, "tokens", basis, "data_file")


def read_data(
    path: str | os.PathLike[str], *, tokenizer: str | None = None, max_length: int | None = None
) -> DataFacts:
    """Token and length facts of a JSON lines or Parquet file."""
    _check_max_length(max_length)
    name = _regular_file(path)
    counting = _with_tokenizer(tokenizer) if tokenizer is not None else _Counting(_assumed)
    tally = _Tally(counting, max_length)
    try:
        with open(name, "rb", buffering=0) as raw:
            hashed = _Hashed(raw)
            stream = io.BufferedReader(hashed, 1024**2)
            start = stream.peek(4096)[:4096]
            if _is_parquet(name, start, raw):
                tally.unit = "row"
                _tally_rows(parquet_rows(name), tally)
                raw.seek(0)
                sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            else:
                _check_text(name, start)
                _tally_rows(json_rows(stream, LONGEST_LINE), tally)
                sha256 = hashed.sha256.hexdigest()
    except OSError as error:
        raise BadInput(f"cannot read: {error.strerror}", name, "Check the file and its permissions.") from error
    return _facts(name, sha256, tally)


def _is_parquet(name: str, start: bytes, raw: io.FileIO) -> bool:
    """Decided by the magic number at both ends; the name only decides what the error says."""
    if not start.startswith(b"PAR1"):
        if name.endswith(".parquet"):
            raise BadInput("named .parquet, but no Parquet file", name, "Rename it, or write it again.")
        return False
    at = raw.tell()
    raw.seek(-4, os.SEEK_END)
    whole = raw.read(4) == b"PAR1"
    raw.seek(at)
    if not whole:
        raise BadInput("a Parquet file without its end", name, "Copy it again: it is cut short.")
    return True


def _check_text(name: str, start: bytes) -> None:
    if not start:
        raise BadInput("the file is empty", name, "Give one JSON object per line.")
    if start.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd")):
        raise BadInput("a compressed file", name, "Decompress it first.")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise BadInput("a JSON array, not JSON lines", name, "jq -c '.[]' in.json > out.jsonl converts it.")
    if b"\0" in start:
        raise BadInput("a binary file", name, "Give UTF-8 JSON lines or Parquet.")


def _tally_rows(rows: Iterable[tuple[int, object]], tally: _Tally) -> None:
    """Rows in batches: tokenizers are fast only on many texts at once."""
    batch: list[tuple[int, str, list[Piece], bool]] = []
    texts: list[str] = []
    size = 0

    def flush() -> None:
        counts = tally.counting.count(texts)
        at = 0
        for line, schema, pieces, chat in batch:
            of_row = counts[at : at + len(pieces)]
            if schema == "prompt_completion" and not chat:
                of_row = _apart(*of_row)
            tally.add(line, schema, pieces, chat, of_row)
            at += len(pieces)

    for line, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            schema, pieces, chat = pieces_of(row)
            found = [text for _, text, _ in pieces]
            for text in found:
                if not text.isascii():
                    text.encode()  # a lone surrogate is valid JSON and no text
                size += len(text)
        except UnicodeEncodeError:
            tally.add_bad(line, "a lone surrogate (half a character) in the text")
            continue
        except BadRow as bad:
            tally.add_bad(line, str(bad))
            continue
        batch.append((line, schema, pieces, chat))
        if schema == "prompt_completion" and not chat:
            texts += [found[0], found[0] + found[1]]
        else:
            texts += found
        tally.rendered += chat and any(mark in text for text in found for mark in RENDERED)
        if len(batch) == 256 or size > 4 * 1024**2:
            flush()
            batch, texts, size = [], [], 0
    flush()


def _apart(prompt: Range, joined: Range) -> list[Range]:
    """Prompt and completion out of the prompt and both joined, as TRL does it: a token may span the two."""
    first = (min(prompt[0], joined[0]), min(prompt[1], joined[1]), min(prompt[2], joined[2]))
    return [first, (joined[0] - first[0], joined[1] - first[1], joined[2] - first[2])]


def _facts(name: str, sha256: str, tally: _Tally) -> DataFacts:
    histogram = tuple(sorted(tally.lengths.items()))
    examples = sum(tally.lengths.values())
    rows = examples + tally.bad_rows
    if not rows:
        raise BadInput("the file has no rows", name, "Give one JSON object per line.")
    if not examples:
        line, reason = tally.first_bad or (0, "")
        raise BadInput(
            f"none of {rows:,} rows can be trained on; {tally.unit} {line}: {reason}",
            f"{name}:{line}",
            _SCHEMAS,
            line=line,
        )
    max_length = tally.max_length
    kept = clipped(histogram, max_length)
    total = sum(length * count for length, count in histogram)
    tokens = sum(length * count for length, count in kept)
    truncated = sum(count for length, count in histogram if max_length is not None and length > max_length)
    if not tally.trained_kept:
        raise BadInput(
            f"no trained token is left: max_length {max_length} cuts every answer off",
            f"{name}:{tally.first_cut}",
            f"Raise it; the median example has {percentile(histogram, 0.5):,} tokens.",
            line=tally.first_cut,
        )
    row_length = max_length or histogram[-1][0]
    return DataFacts(
        path=name,
        sha256=sha256,
        kind=next(iter(tally.kinds)) if len(tally.kinds) == 1 else "mixed",
        kinds=_by_count(tally.kinds),
        rows=rows,
        examples=examples,
        bad_rows=tally.bad_rows,
        first_bad=tally.first_bad,
        duplicates=tally.duplicates(),
        tokens=tally.estimate(tally.all, tokens, trained=False),
        trained_tokens=tally.estimate(tally.trained, tally.trained_kept, trained=True),
        histogram=histogram,
        max_length=max_length,
        longest_line=tally.longest_line,
        truncated=truncated,
        tokens_lost=total - tokens,
        untrained=tally.untrained,
        pad_efficiency=tokens / (examples * row_length),
        batch_efficiency=tokens / (examples * expected_longest(kept, PADDED_BATCH)),
        packing_efficiency=tokens / (packed_rows(histogram, row_length) * row_length),
        template=tally.counting.template if tally.chats else "none: the text and one end token",
        warnings=tuple(_warnings(tally, rows, examples, truncated)),
    )


def _by_count(kinds: Counter[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _warnings(tally: _Tally, rows: int, examples: int, truncated: int) -> Iterator[str]:
    if tally.bad_rows and tally.first_bad:
        line, reason = tally.first_bad
        yield f"{tally.bad_rows:,} of {rows:,} rows are left out; the first, {tally.unit} {line}: {reason}"
    if len(tally.kinds) > 1:
        shares = ", ".join(f"{kind} {count:,}" for kind, count in _by_count(tally.kinds))
        yield f"mixed schemas: {shares}"
    if examples == 1:
        yield "a single example: nothing about lengths or learning can be said from it"
    if duplicates := tally.duplicates():
        yield f"{duplicates:,} examples repeat an earlier one"
    if truncated:
        every = "every example" if truncated == examples else f"{truncated:,} of {examples:,} examples"
        yield f"{every} longer than {tally.max_length:,} tokens, cut there"
    if tally.untrained:
        yield f"{tally.untrained:,} examples have no trained token before the cut"
    if tally.rendered:
        yield f"{tally.rendered:,} examples already contain a template's tokens: a template would double them"
