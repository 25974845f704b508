"""Real text that comes with every CPython: the standard library's own source.

Two kinds of documents that share no line of any length worth the name: code with its docstrings and comments
taken out, and the docstrings (with the language reference of `help()`) alone. The text varies with the Python
version, so every task records its digest.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import os
import re
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from pathlib import Path

from lora_planner.errors import EnvironmentMissing
from lora_planner.facts import home

#: not every CPython has the tests; tables and generated text are neither code nor prose
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "turtledemo", "pydoc_data"}
#: written when this Python was built: they differ between machines
BUILT = ("config-", "_sysconfigdata")
SHORTEST = 200  # characters of a document; what is shorter says nothing
HELD_OUT = 0.1
LONG_LINE = 50  # characters; two texts do not share such a line by chance
TOPICS = "pydoc_data/topics.py"

LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE)
#: from and to (line, column), and what takes its place
Cut = tuple[tuple[int, int], tuple[int, int], str]


@dataclass(frozen=True, slots=True)
class Document:
    id: str  # "code/asyncio/queues.py"
    text: str


@dataclass(frozen=True, slots=True)
class Module:
    """One source file, divided."""

    path: str
    code: str
    docstrings: tuple[str, ...]


def digest(documents: Iterable[Document]) -> str:
    """sha256 of ids and texts in their order.

    >>> digest([Document("a", "b")]) == digest([Document("ab", "")])
    False
    """
    sha = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text):
            data = part.encode("utf-8", "surrogatepass")
            sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()


def place(document: Document) -> float:
    """Where the document's id falls in [0, 1): the same on every machine, unrelated to its content."""
    return int.from_bytes(hashlib.sha256(document.id.encode()).digest()[:6], "big") / 2**48


def split(documents: Iterable[Document], held_out: float = HELD_OUT) -> tuple[list[Document], list[Document]]:
    """(train, held-out): whole documents, by the hash of the id, so that no window is of both.

    Both are in the order of that hash: any beginning of the list is a fair sample of all packages.
    """
    ordered = sorted(documents, key=place)
    return [d for d in ordered if place(d) >= held_out], [d for d in ordered if place(d) < held_out]


@lru_cache(maxsize=1)
def code_documents() -> tuple[Document, ...]:
    """One document a module: its source without docstrings and comments."""
    return tuple(Document(f"code/{m.path}", m.code) for m in modules() if len(m.code) >= SHORTEST)


@lru_cache(maxsize=1)
def prose_documents() -> tuple[Document, ...]:
    """One document a module: all its docstrings; and one for each topic of the language reference.

    A paragraph is left out where it, or a long line of it, came before in prose or stands in code: topics contain
    each other, subclasses repeat their parents and programs print their own docstrings, and all of that would put
    held-out text into training.
    """
    whole = [Document(f"docstrings/{m.path}", "\n\n".join(m.docstrings)) for m in modules()]
    whole += [Document(f"topics/{name}", text) for name, text in topics().items()]
    seen = {line for document in code_documents() for line in long_lines(document.text)}
    kept = []
    for document in sorted(whole, key=lambda d: d.id):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document.text):
            marks = {" ".join(paragraph.split()), *long_lines(paragraph)}
            if marks.isdisjoint(seen):
                paragraphs.append(paragraph.strip("\n"))
            seen |= marks
        text = "\n\n".join(paragraphs) + "\n"
        if len(text) >= SHORTEST:
            kept.append(Document(document.id, text))
    return tuple(kept)


def long_lines(text: str) -> set[str]:
    """The lines long enough to be one text's own, without their indentation."""
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= LONG_LINE}


@lru_cache(maxsize=1)
def modules() -> tuple[Module, ...]:
    """Every module of the standard library that can be tokenized, by path.

    Dividing them takes seconds and every worker needs them, so the result is kept in `home()`, under a hash of
    the files' names and sizes and of this file.
    """
    root = library()
    files = sorted(sources(root), key=lambda path: path.relative_to(root).as_posix())
    listing = [Path(__file__).read_text("utf-8"), *(f"{p.relative_to(root)} {p.stat().st_size}" for p in files)]
    cache = home() / "text" / f"{hashlib.sha256(chr(10).join(listing).encode()).hexdigest()[:16]}.json"
    try:
        return tuple(Module(path, code, tuple(docs)) for path, code, docs in json.loads(cache.read_bytes()))
    except (OSError, ValueError, TypeError):
        pass  # not there yet, or damaged: made again
    found = []
    for path in files:
        try:
            with tokenize.open(path) as file:
                found.append(Module(path.relative_to(root).as_posix(), *divide(file.read())))
        except (SyntaxError, tokenize.TokenError, ValueError, OSError):
            continue  # examples of broken source, and other encodings
    if not found:
        raise EnvironmentMissing("this Python has no source of its standard library", str(root),
                                 "Use a CPython that is installed with its .py files, or the task jsonl.")  # fmt: skip
    remember(cache, json.dumps([[m.path, m.code, m.docstrings] for m in found]))
    return tuple(found)


def sources(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if is_source(name)]
        yield from (Path(folder, name) for name in names if name.endswith(".py") and is_source(name))


def remember(cache: Path, text: str) -> None:
    """A reader sees all of it or nothing; without a writable home it is made again next time."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cache.parent)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        os.replace(temporary, cache)
    except OSError:
        return


def is_source(name: str) -> bool:
    return name not in SKIPPED and not name.startswith(BUILT)


def library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def topics() -> dict[str, str]:
    """The language reference that `help()` shows, read as data; a Python built without it has none."""
    path = library() / TOPICS
    if not path.exists():
        return {}
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign):
            table: dict[str, str] = ast.literal_eval(statement.value)
            return table
    return {}


def divide(source: str) -> tuple[str, tuple[str, ...]]:
    """(source without docstrings and comments, the docstrings).

    A docstring is a string that is a whole statement, wherever it stands: attributes are documented so too.
    Where it was the only statement of its block, `pass` takes its place.

    >>> divide('def f(x):\\n    "Doubles."\\n    return x + x  # or 2 * x\\n')
    ('def f(x):\\n    return x + x\\n', ('Doubles.',))
    >>> divide('class E(Exception):\\n    "Bad."\\n')
    ('class E(Exception):\\n    pass\\n', ('Bad.',))
    """
    lines = logical_lines(source)
    cuts: list[Cut] = [(t.start, t.end, "") for line in lines for t in line if t.type == tokenize.COMMENT]
    docstrings = []
    for line, following in pairwise([*lines, []]):
        words = [t for t in line if t.type not in LAYOUT]
        strings = list(takewhile(lambda t: t.type == tokenize.STRING, reversed(words)))[::-1]
        head = words[: len(words) - len(strings)]
        one_liner = bool(head) and head[0].string in ("def", "class", "async") and head[-1].string == ":"
        if not strings or (head and not one_liner):
            continue
        value = ast.literal_eval("(" + " ".join(t.string for t in strings) + ")")
        if isinstance(value, str):
            docstrings.append(inspect.cleandoc(value))
            whole_block = has(line, tokenize.INDENT) and has(following, tokenize.DEDENT)
            cuts.append((strings[0].start, strings[-1].end, "pass" if whole_block or one_liner else ""))
    return cut(source, cuts), tuple(docstrings)


def logical_lines(source: str) -> list[list[tokenize.TokenInfo]]:
    """Tokens by statement; a change of indentation belongs to the statement that follows it."""
    lines: list[list[tokenize.TokenInfo]] = [[]]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines[-1].append(token)
        if token.type == tokenize.NEWLINE:
            lines.append([])
    return lines


def has(line: Sequence[tokenize.TokenInfo], kind: int) -> bool:
    return any(token.type == kind for token in line)


def cut(source: str, cuts: Iterable[Cut]) -> str:
    """The source with each span replaced; lines that this empties go, and blank lines are at most two."""
    lines = source.split("\n")
    for (first, start), (last, end), new in sorted(cuts, reverse=True):
        line = (lines[first - 1][:start] + new + lines[last - 1][end:]).rstrip()
        lines[first - 1 : last] = [line] if line else []
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"
