"""A document as Markdown or on a terminal, and rows as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lora_planner.errors import BadInput, UsageError
from lora_planner.pages.charts import Drawing, png, svg
from lora_planner.pages.document import (
    Block,
    Document,
    Facts,
    Figure,
    Figures,
    Heading,
    Prose,
    Signature,
    Table,
    Warnings,
)
from lora_planner.render import one_line

# ---------------------------------------------------------------- Markdown

_MARKS = re.compile(r"([\\`*_\[\]|~#!])")


def inert(text: str) -> str:
    """Text that Markdown shows as it stands: no tag, no link, no emphasis, no cell border.

    >>> inert("<b>[x](y)|*z*")
    '&lt;b&gt;\\\\[x\\\\](y)\\\\|\\\\*z\\\\*'
    """
    return _MARKS.sub(r"\\\1", escape(one_line(text), quote=False))


def markdown(d: Document) -> str:
    """The document as Markdown for a pull request or a wiki; a chart is the sentence that it shows."""
    parts = [f"# {inert(d.title)}", inert(d.subtitle), *(_markdown(block) for block in d.blocks), inert(d.footer)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {inert(block.text)}"
    if isinstance(block, Prose):
        return inert(block.text)
    if isinstance(block, Figures):
        return "\n".join(f"- **{inert(number)}** {inert(what)}" for number, what in block.rows)
    if isinstance(block, Facts):
        return "\n".join(f"- {inert(a)}: {inert(b)}" if a else f"  {inert(b)}" for a, b in block.rows)
    if isinstance(block, Figure):
        return "\n\n".join(f"*{inert(d.title)}: {inert(d.description)}*" for d in block.drawings)
    if isinstance(block, Warnings):
        return "\n".join(f"- **{inert(code)}** {inert(msg)}. {inert(fix)}" for code, msg, fix in block.rows)
    if isinstance(block, Signature):
        return f"{inert(block.sentence)}\n\nApproved by: ____________  Date: ____________  Amount: ____________"
    rule = ["---:" if i in block.numeric else "---" for i in range(len(block.columns))]
    rows = [[inert(cell) for cell in row] for row in block.rows]
    rows = [[f"**{c}**" if c and n in block.strong else c for c in row] for n, row in enumerate(rows)]
    lines = [[inert(name) for name in block.columns], rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- CSV

#: what makes a spreadsheet calculate, also in the wide forms that some of them accept
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


def cell(value: Any) -> str:
    """A number as it is, text so that no spreadsheet calculates it.

    >>> cell("=HYPERLINK(1)"), cell(-1.5), cell(" @x"), cell(None)
    ("'=HYPERLINK(1)", '-1.5', "' @x", '')
    """
    if value is None:
        return ""
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    start = "'" if text.startswith(FORMULA) or text.lstrip().startswith(FORMULA) else ""
    return start + one_line(text)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the columns of the first one."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(rows[0])
    writer.writerows([cell(row[name]) for name in rows[0]] for row in rows)
    return file.getvalue()


def write(path: str, text: str) -> None:
    """A file as asked for, whole or not at all; an impossible one is one line, not a traceback."""
    target = Path(path)
    try:
        if target.is_dir() or (target.exists() and not target.is_file()):
            raise BadInput("not a plain file", path, "Name a file.")
        unfinished = target.with_name(target.name + ".part")
        unfinished.write_text(text, encoding="utf-8", newline="")
        unfinished.replace(target)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadInput(f"cannot write: {why}", path, "Name another file.") from None


def chart_of(path: str, charts: Sequence[str]) -> str:
    """Which chart a file is named after.

    >>> chart_of("out/Memory-8b.svg", ("memory", "cost"))
    'memory'
    """
    name = Path(path)
    kind = next((chart for chart in charts if name.stem.lower().startswith(chart)), None)
    if kind is None or name.suffix.lower() not in (".svg", ".png"):
        known = (" or " if len(charts) == 2 else ", ").join(charts)
        raise UsageError(f"--plot {path}: no such chart", "", f"Name a file {known}, as .svg or .png.")
    return kind


def plots(path: str, drawings: Sequence[Drawing]) -> None:
    """One drawing under the file's name, several under that name with -1, -2, ..."""
    file = Path(path)
    for i, drawing in enumerate(drawings, start=1):
        plot(path if len(drawings) == 1 else str(file.with_stem(f"{file.stem}-{i}")), drawing)


def plot(path: str, drawing: Drawing) -> None:
    """A drawing as the file's name says, .svg or .png."""
    if Path(path).suffix.lower() == ".svg":
        write(path, svg(drawing) + "\n")
        return
    try:
        png(drawing, path)
    except OSError as error:
        raise BadInput(f"cannot write: {error.strerror or error}", path, "Name another file.") from None


# ---------------------------------------------------------------- terminal


def show(d: Document) -> None:
    """The brief blocks on a terminal."""
    from rich.table import Table as Rich
    from rich.text import Text

    from lora_planner.render import grid, print_warnings, terminal

    console = terminal()
    console.print(Text.assemble((one_line(d.title), "bold"), "  ", (one_line(d.subtitle), "dim")))
    for block in d.brief:
        if isinstance(block, Warnings):
            print_warnings(console, [(one_line(c), m, one_line(fix)) for c, m, fix in block.rows])
        elif isinstance(block, Heading):
            console.print()
        elif isinstance(block, Prose):
            console.print(Text(one_line(block.text), style="dim" if block.quiet else ""))
        elif isinstance(block, Figures | Facts):
            pairs: Iterable[tuple[str, str]] = block.rows
            if isinstance(block, Figures):
                pairs = [(what, number) for number, what in block.rows]
            console.print(grid([(one_line(a), Text(one_line(b))) for a, b in pairs]))
        elif isinstance(block, Table):
            table = Rich(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
            for i, name in enumerate(block.columns):
                numeric = i in block.numeric
                table.add_column(
                    one_line(name),
                    overflow="fold",
                    justify="right" if numeric else "left",
                    no_wrap=numeric or i in block.whole,
                )
            for number, row in enumerate(block.rows):
                style = "bold" if number in block.strong else "dim" if number in block.dim else ""
                table.add_row(*(Text(one_line(c)) for c in row), style=style)
            console.print(table)
