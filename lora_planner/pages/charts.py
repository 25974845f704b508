"""Charts as lists of shapes, drawn without a library; `svg` writes them, `png` draws them with matplotlib.

A drawing is laid out once, in units of a CSS pixel at the width of a phone, so that one text size serves
phone, screen and paper. Colours are names of INKS: light ones stand in the shapes, dark ones in a style sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10
from typing import Any

from lora_planner import units
from lora_planner.errors import EnvironmentMissing
from lora_planner.ledger import Estimate
from lora_planner.render import MEMORY_KINDS, memory_kinds, one_line

#: name: (light, dark). The eight a..h are told apart by people without red or green sight (Okabe and Ito 2008,
#: darkened or lightened to 3:1 against the paper)
INKS = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1c2126", "#e6e8ea"),
    "soft": ("#5b646e", "#a3abb4"),
    "grid": ("#dde1e5", "#343a41"),
    "band": ("#eef1f4", "#22272d"),
    "alarm": ("#b3261e", "#ff8a80"),
    "a": ("#0072b2", "#56a8e0"),
    "b": ("#9a5b00", "#e69f00"),
    "c": ("#00795a", "#2bc49a"),
    "d": ("#a34f85", "#dd9cc4"),
    "e": ("#b84a00", "#ff8f4a"),
    "f": ("#2f7fae", "#8cc9f0"),
    "g": ("#6b6b00", "#d9d04a"),
    "h": ("#55606b", "#b9c1c9"),
}
SERIES = tuple("abcdefgh")
#: mean width of a character over the font size; charts leave room by it
CHARACTER = 0.56
LEGEND, SMALL, PLAIN = 9.0, 10.0, 11.5


@dataclass(frozen=True, slots=True)
class Rect:
    x: float
    y: float
    width: float
    height: float
    ink: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    points: tuple[tuple[float, float], ...]
    ink: str
    width: float = 1.0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    radius: float
    ink: str
    hollow: bool = False
    title: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float
    text: str
    ink: str = "ink"
    size: float = PLAIN
    anchor: str = "start"
    bold: bool = False


@dataclass(frozen=True, slots=True)
class Area:
    """A filled polygon: a band through which the grid shows, or with opacity 1 a marker."""

    points: tuple[tuple[float, float], ...]
    ink: str
    opacity: float = 0.16
    title: str = ""


@dataclass(slots=True)
class Drawing:
    """Shapes in the order in which they are drawn. `title` and `description` are what a screen reader says."""

    title: str
    description: str
    width: float
    height: float
    shapes: list[Rect | Line | Dot | Text | Area] = field(default_factory=list)


# ---------------------------------------------------------------- writing


def svg(d: Drawing, alone: bool = True) -> str:
    """The drawing as SVG. `alone`: as a file of its own, with its paper and dark colours.

    >>> svg(Drawing("<t>", "d", 10, 10, [Text(0, 5, "a<b")]), alone=False).count("&lt;")
    3
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {d.width:g} {d.height:g}" role="img" '
        f'aria-label="{_quoted(d.title)}. {_quoted(d.description)}"'
        + (f' width="{d.width:g}" height="{d.height:g}"' if alone else "")
        + ' font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        f"<title>{_quoted(d.title)}</title>",
    ]
    if alone:
        parts.append(f"<style>{dark_inks()}</style>")
        parts.append(_rect(Rect(0, 0, d.width, d.height, "paper")))
    writers: dict[type, Callable[[Any], str]] = {Rect: _rect, Line: _line, Dot: _dot, Text: _text, Area: _area}
    parts += [writers[type(shape)](shape) for shape in d.shapes]
    return "\n".join([*parts, "</svg>"])


def dark_inks() -> str:
    """The style sheet that turns light inks into dark ones on a dark screen; paper stays white."""
    rules = "".join(f".f-{n}{{fill:{dark}}}.s-{n}{{stroke:{dark}}}" for n, (_, dark) in INKS.items())
    return f"@media screen and (prefers-color-scheme:dark){{{rules}}}"


def _quoted(text: str) -> str:
    return escape(one_line(text))


def _rect(r: Rect) -> str:
    start = f'<rect x="{r.x:.2f}" y="{r.y:.2f}" width="{max(r.width, 0):.2f}" height="{r.height:.2f}" '
    start += f'fill="{INKS[r.ink][0]}" class="f-{r.ink}"'
    return f"{start}><title>{_quoted(r.title)}</title></rect>" if r.title else f"{start}/>"


def _line(line: Line) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in line.points)
    dashes = ' stroke-dasharray="4 3"' if line.dashed else ""
    return (f'<polyline points="{points}" fill="none" stroke="{INKS[line.ink][0]}" class="s-{line.ink}" '
            f'stroke-width="{line.width:g}"{dashes}/>')  # fmt: skip


def _dot(dot: Dot) -> str:
    fill, also = (
        ("paper", f' class="f-paper s-{dot.ink}"') if dot.hollow else (dot.ink, f' class="f-{dot.ink} s-paper"')
    )
    stroke = dot.ink if dot.hollow else "paper"
    start = f'<circle cx="{dot.x:.2f}" cy="{dot.y:.2f}" r="{dot.radius:g}" fill="{INKS[fill][0]}" '
    start += f'stroke="{INKS[stroke][0]}" stroke-width="1.5"{also}'
    return f"{start}><title>{_quoted(dot.title)}</title></circle>" if dot.title else f"{start}/>"


def _area(a: Area) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in a.points)
    start = f'<polygon points="{points}" fill="{INKS[a.ink][0]}" fill-opacity="{a.opacity:g}" class="f-{a.ink}"'
    return f"{start}><title>{_quoted(a.title)}</title></polygon>" if a.title else f"{start}/>"


def _text(t: Text) -> str:
    bold = ' font-weight="600"' if t.bold else ""
    return (f'<text x="{t.x:.2f}" y="{t.y:.2f}" font-size="{t.size:g}" text-anchor="{t.anchor}" '
            f'fill="{INKS[t.ink][0]}" class="f-{t.ink}"{bold}>{_quoted(t.text)}</text>')  # fmt: skip


def png(d: Drawing, path: str, dpi: int = 200) -> None:
    """The same shapes through matplotlib (`report` extra), on white."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Circle, Polygon, Rectangle
    except ImportError as error:
        raise EnvironmentMissing(
            f"{error.name} is not installed", "PNG", "pip install 'lora-plan[report]', or name a .svg file."
        ) from None
    figure = Figure(figsize=(d.width / 72, d.height / 72), dpi=dpi, facecolor=INKS["paper"][0])
    FigureCanvasAgg(figure)  # no window, whatever the machine's default is
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, d.width)
    axes.set_ylim(d.height, 0)
    axes.axis("off")
    sides = {"start": "left", "middle": "center", "end": "right"}
    for order, s in enumerate(d.shapes):
        ink = INKS[s.ink][0]
        if isinstance(s, Rect):
            axes.add_patch(Rectangle((s.x, s.y), s.width, s.height, facecolor=ink, edgecolor="none", zorder=order))
        elif isinstance(s, Line):
            xs, ys = zip(*s.points, strict=True)
            axes.add_line(
                Line2D(xs, ys, color=ink, linewidth=s.width, linestyle="--" if s.dashed else "-", zorder=order)
            )
        elif isinstance(s, Dot):
            face, edge = (INKS["paper"][0], ink) if s.hollow else (ink, INKS["paper"][0])
            axes.add_patch(Circle((s.x, s.y), s.radius, facecolor=face, edgecolor=edge, linewidth=1.5, zorder=order))
        elif isinstance(s, Area):
            axes.add_patch(Polygon(s.points, facecolor=ink, edgecolor="none", alpha=s.opacity, zorder=order))
        else:
            # a name may hold a $, which would start a formula; a tenth smaller, as its font is wider than a browser's
            axes.text(s.x, s.y, one_line(s.text), color=ink, fontsize=s.size * 0.9, ha=sides[s.anchor],
                      fontweight="bold" if s.bold else "normal", zorder=order, parse_math=False)  # fmt: skip
    figure.savefig(path, format="png", dpi=dpi, metadata={"Software": None})


def cut(text: str, room: float, size: float = PLAIN) -> str:
    """As much of a text as fits into `room`.

    >>> cut("a-very-long-name", 60, 10)
    'a-very-lo…'
    """
    most = max(1, int(room / (CHARACTER * size)))
    return text if len(text) <= most else text[: most - 1] + "…"


# ---------------------------------------------------------------- scales


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover an axis from 0 or `low` to `high`: 1, 2 or 5 times a power of ten apart.

    >>> ticks(0, 79.6), ticks(0, 7)
    ([0.0, 20.0, 40.0, 60.0], [0.0, 2.0, 4.0, 6.0])
    """
    span = max(high - low, 1e-12)
    step = 10.0 ** floor(log10(span / most))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
    first = ceil(low / step - 1e-9)
    return [i * step for i in range(first, floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten, and 2 and 5 times them where there is room.

    >>> log_ticks(0.3, 30)
    [0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    """
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for multiples in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = [m * 10.0**k for k in decades for m in multiples if low <= m * 10.0**k <= high]
        if len(found) <= most:
            return found
    stride = ceil(len(found) / most)
    return found[::stride]


def log_place(value: float, low: float, high: float, left: float, right: float) -> float:
    """Where a value lies on a logarithmic axis, kept inside it."""
    share = (log10(min(max(value, low), high)) - log10(low)) / (log10(high) - log10(low))
    return left + share * (right - left)


# ---------------------------------------------------------------- the charts


#: of render.MEMORY_KINDS, in their order
MEMORY_INKS = ("a", "d", "b", "c")


def memory_bars(
    phases: Sequence[tuple[str, Sequence[tuple[str, float]]]], peak: Estimate, peak_phase: str, card_bytes: float, card: str
) -> Drawing:  # fmt: skip
    """A bar a phase, by kind of memory, under the card's size; the peak's 90 % interval is a line on its bar."""
    width, left, bar, gap, top = 380.0, 76.0, 18.0, 9.0, 22.0
    most = max([card_bytes, peak.high, *(sum(v for _, v in terms) for _, terms in phases)]) / units.GIB * 1.04
    right = width - 10
    bottom = top + len(phases) * (bar + gap)

    def x(n: float) -> float:
        return left + (right - left) * max(n, 0.0) / units.GIB / most

    d = Drawing("Memory by phase", f"Peak {units.gib(peak.value)} of {units.gib(card_bytes)} on {card}, in {peak_phase}",
                width, bottom + 62)  # fmt: skip
    for tick in ticks(0, most):
        at = x(tick * units.GIB)
        d.shapes += [
            Line(((at, top - 4), (at, bottom)), "grid"),
            Text(at, bottom + 12, f"{tick:g}", "soft", SMALL, "middle"),
        ]
    d.shapes.append(Text(left - 8, bottom + 12, "GiB", "soft", SMALL, "end"))
    for i, (name, terms) in enumerate(phases):
        y, start = top + i * (bar + gap), 0.0
        d.shapes.append(Text(left - 8, y + 13, cut(name, left - 12), "ink", PLAIN, "end", name == peak_phase))
        for ink, (kind, value) in zip(MEMORY_INKS, memory_kinds(terms).items(), strict=True):
            if value > 0:
                d.shapes.append(Rect(x(start), y, x(start + value) - x(start), bar, ink, f"{kind} {units.gib(value)}"))
                start += value
        if name == peak_phase:
            d.shapes += _whisker(x(peak.low), x(peak.high), y + bar / 2)
    at = x(card_bytes)
    side = "end" if at > width * 0.6 else "start"
    d.shapes += [Line(((at, top - 6), (at, bottom)), "alarm", 1.5),
                 Text(at + (-3 if side == "end" else 3), 11, f"{cut(card, 150, SMALL)} {units.gib(card_bytes)}", "alarm", SMALL, side)]  # fmt: skip
    y = bottom + 32
    for i, ((kind, _), ink) in enumerate(zip(MEMORY_KINDS, MEMORY_INKS, strict=True)):
        at = left + (i % 2) * 140
        d.shapes += [Rect(at, y - 8 + 16 * (i // 2), 9, 9, ink), Text(at + 14, y + 16 * (i // 2), kind, "soft", SMALL)]
    return d


def _whisker(low: float, high: float, y: float, ink: str = "ink") -> list[Rect | Line | Dot | Text]:
    return [Line(((low, y), (high, y)), ink, 1.5), Line(((low, y - 4), (low, y + 4)), ink, 1.5),
            Line(((high, y - 4), (high, y + 4)), ink, 1.5)]  # fmt: skip


def capacity_bar(need: Estimate, capacity: Estimate, verdict: str) -> Drawing:
    """What the data may ask for beside what the adapter holds, both as intervals on one logarithmic axis."""
    width, left, right, top = 380.0, 104.0, 362.0, 12.0
    ends = [e for e in (need.low, need.high, capacity.low, capacity.high) if e > 0] or [1.0]
    low, high = 10.0 ** floor(log10(min(ends))), 10.0 ** ceil(log10(max(ends)) + 1e-9)
    high = high if high > low else low * 10

    def x(bits: float) -> float:
        return log_place(bits, low, high, left, right)

    d = Drawing("Capacity", f"{verdict}: {units.bits(need.value)} to learn at most, the adapter holds "
                f"{units.bits(capacity.low)} to {units.bits(capacity.high)}", width, 92)  # fmt: skip
    for tick in log_ticks(low, high, 6):
        d.shapes += [
            Line(((x(tick), top), (x(tick), 64)), "grid"),
            Text(x(tick), 78, units.bits(tick), "soft", SMALL, "middle"),
        ]
    for y, name, e, ink in ((top + 4, "to learn, at most", need, "b"), (top + 30, "adapter holds", capacity, "a")):
        d.shapes += [
            Text(left - 8, y + 12, name, "ink", PLAIN, "end"),
            Rect(x(e.low), y, max(2.0, x(e.high) - x(e.low)), 16, ink, f"{units.bits(e.low)} to {units.bits(e.high)}"),
            Line(((x(e.value), y - 2), (x(e.value), y + 18)), "ink", 2),
        ]
    return d


@dataclass(frozen=True, slots=True)
class Range:
    """A row of `ranges`: the 5 to 95 % interval with its middle, and the p90 where one is asked for."""

    name: str
    low: float
    value: float
    high: float
    p90: float | None = None
    ink: str = "a"


def ranges(title: str, rows: Sequence[Range], form: Callable[[float], str], limit: float | None = None) -> Drawing:
    """Intervals on one axis: a band from 5 to 95 %, a line at the middle, a dot at the p90.

    Logarithmic where the ends are more than thirtyfold apart. `limit`: a budget or a deadline.
    """
    width, left, right, row, top = 380.0, 120.0, 332.0, 24.0, 16.0
    bottom = top + row * len(rows)
    ends = [r.low for r in rows if r.low > 0] + [r.high for r in rows if r.high > 0] + ([limit] if limit else [])
    largest, smallest = max(ends, default=1.0), min(ends, default=1.0)
    log = largest / smallest > 30
    low, high = (smallest / 1.15, largest * 1.15) if log else (0.0, largest * 1.06)

    def x(value: float) -> float:
        if log:
            return log_place(value, low, high, left, right)
        return left + (right - left) * min(max(value, low), high) / high

    said = "; ".join(f"{r.name} {form(r.value)} [{form(r.low)}, {form(r.high)}]" for r in rows)
    d = Drawing(title, said, width, bottom + 34)
    for tick in log_ticks(low, high, 4) if log else ticks(0, high, 4):
        d.shapes += [
            Line(((x(tick), top - 4), (x(tick), bottom)), "grid"),
            Text(x(tick), bottom + 13, form(tick), "soft", SMALL, "middle"),
        ]
    for i, r in enumerate(rows):
        y = top + i * row
        d.shapes += [
            Text(left - 8, y + 13, cut(r.name, left - 12), "ink", PLAIN, "end"),
            Rect(x(r.low), y + 3, max(1.5, x(r.high) - x(r.low)), 12, r.ink, f"{form(r.low)} to {form(r.high)}"),
            Line(((x(r.value), y), (x(r.value), y + 18)), "ink", 2),
        ]
        if r.p90 is not None:
            d.shapes.append(Dot(x(r.p90), y + 9, 3.6, "ink", title=f"p90 {form(r.p90)}"))
            d.shapes.append(Text(width - 4, y + 13, form(r.p90), "ink", SMALL, "end"))
    if limit:
        d.shapes += [Line(((x(limit), top - 8), (x(limit), bottom)), "alarm", 1.5, True)]
    d.shapes.append(Text(left, bottom + 29, "band 5 to 95 %, line p50" + (", dot and number p90" if any(r.p90 for r in rows) else ""),
                         "soft", SMALL))  # fmt: skip
    return d


@dataclass(frozen=True, slots=True)
class Point:
    """One cell of `front`: seconds and USD with their intervals; `outside`: over budget or late."""

    number: str
    name: str
    group: str
    time: Estimate
    usd: Estimate
    time_p90: float
    usd_p90: float
    on_front: bool
    outside: str = ""


def front(points: Sequence[Point], budget_usd: float | None, deadline_s: float | None, legend: bool = True) -> Drawing:
    """Cost against time, both p90 and logarithmic, an ink a group; the Pareto set is joined by steps.

    Thin lines reach from the 5 to the 95 % end of the interval. Hollow: over budget or late.
    """
    width, left, right, top, bottom = 420.0, 52.0, 408.0, 18.0, 290.0
    groups = list(dict.fromkeys(p.group for p in points))
    ink = {group: SERIES[i % len(SERIES)] for i, group in enumerate(groups)}
    xs = [e for p in points for e in (p.time.low, p.time.high) if e > 0] + [v for v in (deadline_s,) if v]
    ys = [e for p in points for e in (p.usd.low, p.usd.high) if e > 0] + [v for v in (budget_usd,) if v]
    x0, x1, y0, y1 = min(xs) / 1.3, max(xs) * 1.3, min(ys) / 1.3, max(ys) * 1.3

    def at(time: float, usd: float) -> tuple[float, float]:
        return log_place(time, x0, x1, left, right), log_place(usd, y0, y1, bottom, top)

    columns = 1 if len(points) <= 8 else 2
    lines = ceil(len(points) / columns) if legend else 0
    d = Drawing("Cost against time", f"{len(points)} cells; Pareto set: "
                + "; ".join(p.name for p in points if p.on_front), width, bottom + 38 + (13 * lines + 12 if lines else 0))  # fmt: skip
    for seconds in _time_ticks(x0, x1):
        x, _ = at(seconds, y0)
        d.shapes += [
            Line(((x, top), (x, bottom)), "grid"),
            Text(x, bottom + 14, units.duration(seconds), "soft", SMALL, "middle"),
        ]
    for dollars in log_ticks(y0, y1):
        _, y = at(x0, dollars)
        d.shapes += [
            Line(((left, y), (right, y)), "grid"),
            Text(left - 6, y + 3.5, units.usd(dollars), "soft", SMALL, "end"),
        ]
    if deadline_s:
        x, _ = at(deadline_s, y0)
        d.shapes += [
            Line(((x, top), (x, bottom)), "alarm", 1.5, True),
            Text(x - 4, top + 9, "deadline", "alarm", SMALL, "end"),
        ]
    if budget_usd:
        _, y = at(x0, budget_usd)
        d.shapes += [Line(((left, y), (right, y)), "alarm", 1.5, True), Text(left + 4, y - 4, "budget", "alarm", SMALL)]
    for p in points:
        faint = Line((at(p.time.low, p.usd_p90), at(p.time.high, p.usd_p90)), ink[p.group], 0.6)
        d.shapes += [faint, Line((at(p.time_p90, p.usd.low), at(p.time_p90, p.usd.high)), ink[p.group], 0.6)]
    steps: list[tuple[float, float]] = []
    for p in sorted((p for p in points if p.on_front), key=lambda p: p.time_p90):
        x, y = at(p.time_p90, p.usd_p90)
        steps += [(x, steps[-1][1]), (x, y)] if steps else [(x, y)]
    if len(steps) > 1:
        d.shapes.append(Line(tuple(steps), "ink", 1.5))
    dots = [at(p.time_p90, p.usd_p90) for p in points]
    labels: list[tuple[float, float]] = []
    for p, (x, y) in zip(points, dots, strict=True):
        d.shapes.append(
            Dot(x, y, 5.5 if p.on_front else 4.2, ink[p.group], bool(p.outside), f"{p.name} {p.outside}".strip())
        )
        place = _free_place((x, y), [other for other in dots if other != (x, y)] + labels)
        labels.append(place)
        d.shapes.append(Text(place[0], place[1] + 3.5, p.number, ink[p.group], SMALL, "middle", True))
    d.shapes.append(Text((left + right) / 2, bottom + 30, "time of a run, p90", "soft", SMALL, "middle"))
    d.shapes.append(Text(4, 10, "cost of a run, p90", "soft", SMALL))
    for i, p in enumerate(points if legend else ()):
        x, y = 4 + (i // lines) * (width - 8) / columns, bottom + 54 + 13 * (i % lines)
        d.shapes.append(Text(x + 14, y, p.number, ink[p.group], LEGEND, "end", True))
        named = f"{p.name}, {p.outside}" if p.outside else p.name
        room = (width - 8) / columns - 22
        d.shapes.append(
            Text(x + 19, y, cut(named, room, LEGEND), "ink" if p.on_front else "soft", LEGEND, bold=p.on_front)
        )
    return d


def _free_place(dot: tuple[float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Beside a dot, where a label is farthest from other dots and labels."""
    sides = ((11, 0), (0, -11), (-11, 0), (0, 11), (9, -9), (9, 9), (-9, -9), (-9, 9))
    spots = [(dot[0] + x, dot[1] + y) for x, y in sides]
    return max(
        spots, key=lambda s: min([((s[0] - x) ** 2 + (s[1] - y) ** 2) ** 0.5 for x, y in taken], default=99.0) // 3
    )


def _time_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round times between two ends.

    >>> [units.duration(s) for s in _time_ticks(100, 9000)]
    ['5 min', '15 min', '1.0 h', '2.0 h']
    """
    steps = [1, 5, 15, 60, 300, 900, 3600, 7200, 14400, 43200, 86400, 2 * 86400, 7 * 86400, 30 * 86400, 365 * 86400]
    found = [float(s) for s in steps if low <= s <= high]
    while len(found) > most:
        found = found[1::2]
    return found or log_ticks(low, high, most)
