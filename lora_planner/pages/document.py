"""A report as blocks; each writer turns the same blocks into HTML, Markdown or terminal text.

Text in blocks is plain: whatever a file or a user put into it, the writers make it inert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_planner.pages.charts import Drawing


@dataclass(frozen=True, slots=True)
class Heading:
    text: str


@dataclass(frozen=True, slots=True)
class Prose:
    """A paragraph. `quiet`: a note that explains what stands above it."""

    text: str
    quiet: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """The few numbers that the page is about: (number, what it is)."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Facts:
    """Label and value, a line each; an empty label goes on with the one above."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Table:
    """`numeric`: columns set right, in figures of one width; `strong`: rows that sum up; `dim`: rows that are out.

    `whole`: columns of names that a terminal does not break.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    dim: frozenset[int] = frozenset()
    whole: frozenset[int] = frozenset({0})


@dataclass(frozen=True, slots=True)
class Figure:
    """Charts that belong together: side by side where there is room."""

    drawings: Sequence[Drawing]


@dataclass(frozen=True, slots=True)
class Warnings:
    """(code, sentence, fix)"""

    rows: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Signature:
    """Lines to sign on, and what is signed."""

    sentence: str


Block = Heading | Prose | Figures | Facts | Table | Figure | Warnings | Signature


@dataclass(slots=True)
class Document:
    """`brief`: blocks that a terminal shows; `blocks`: all of them, for a page."""

    title: str
    subtitle: str
    brief: list[Block] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    footer: str = ""

    def add(self, *blocks: Block, brief: bool = False) -> None:
        self.blocks += blocks
        if brief:
            self.brief += blocks
