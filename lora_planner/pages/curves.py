"""A record.Plot as a Drawing, without a library: loss curves, learning-rate sweeps, need against capacity.

What it draws is in the plot; it adds no number. Room for text is measured generously, so that labels stay apart and
inside the drawing in whatever font the reader has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import cos, floor, inf, isfinite, log10, nan, pi, sin
from unicodedata import east_asian_width

from lora_planner import units
from lora_planner.ledger import Estimate
from lora_planner.pages.charts import (
    LEGEND,
    PLAIN,
    SERIES,
    SMALL,
    Area,
    Dot,
    Drawing,
    Line,
    Rect,
    Text,
    log_ticks,
    ticks,
)
from lora_planner.record import Plot, Series
from lora_planner.render import interval, one_line

Form = Callable[[float], str]
Shape = Rect | Line | Dot | Text | Area
WIDTH, HEIGHT, EDGE = 380.0, 220.0, 4.0
#: a line through more points than these goes without markers; one through two is a straight line or a bar
MARKED = 16
#: beyond these the arithmetic of an axis would overflow; such a value counts as infinite
LARGEST = 1e150
#: as many title and label lines as are ever drawn
MOST_LINES = 3
#: corners of markers, and where on the circle the first one lies; None is a disc
CORNERS: tuple[tuple[int, float] | None, ...] = (None, (4, 0.125), (3, 0.75), (4, 0.0), (3, 0.25))


def curve(plot: Plot, described: str = "", x_form: Form | None = None, y_form: Form | None = None) -> Drawing:
    """Axes, bands, lines, points and a legend below.

    style "line"    a solid line, with markers where it has few points; `low` and `high` are a band
          "fit"     a dashed line and its band
          "points"  markers; `low` and `high` are bars

    Series of one name share colour, marker and place in the legend. An infinite y has a place and no value: it is a
    cross in a strip above the axis (a run that diverged). An infinite end of an interval runs out of the picture; what
    a logarithmic axis has no place for is left out.
    """
    names = list(dict.fromkeys(s.name for s in plot.series))
    d = Drawing(plot.title, described or _said(plot), WIDTH, 0.0)
    top = _text_lines(d, plot.title, PLAIN, EDGE + 9, "ink", bold=True)
    top = _text_lines(d, plot.y_label, SMALL, top, "soft") - 3
    strip = 11.0 * max(_crosses(plot).values(), default=0)
    bottom = top + strip + HEIGHT
    y = Axis(*domain(_ends(plot), plot.y_log), plot.y_log, bottom, top + strip)
    y_labels = y.labels(y_form, lambda text: SMALL)
    left = EDGE + min(WIDTH / 3, max((room(text, SMALL) for _, text in y_labels), default=0.0)) + 6
    x = Axis(*domain(_places(plot), plot.x_log), plot.x_log, left, WIDTH - 10)
    x_labels = x.labels(x_form, lambda text: room(text, SMALL), WIDTH)
    if strip:
        d.shapes.append(Rect(left, top, WIDTH - 10 - left, strip, "band"))
    for value, text in y_labels:
        at = y.at(value)
        d.shapes += [Line(((left, at), (WIDTH - 10, at)), "grid"), Text(left - 6, at + 3.5, fitted(text, left - 6 - EDGE, SMALL), "soft", SMALL, "end")]  # fmt: skip
    for value, text in x_labels:
        at = x.at(value)
        d.shapes += [
            Line(((at, top), (at, bottom)), "grid"),
            Text(inside(at, room(text, SMALL) / 2, WIDTH), bottom + 14, text, "soft", SMALL, "middle"),
        ]
    for draw in (_bands, _lines, _marks):
        for s in plot.series:
            d.shapes += draw(s, _look(names.index(s.name)), x, y)
    d.shapes += _strip(plot, names, x, top)
    below = _text_lines(d, plot.x_label, SMALL, bottom + 30, "soft", middle=(left + WIDTH - 10) / 2)
    d.height = _legend(d, plot, names, below + 4)
    return d


# ---------------------------------------------------------------- axes


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` lie between the coordinates `start` and `end`."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of a value; of one beyond an end, that end.

        >>> Axis(1, 100, True, 0, 50).at(10), Axis(0, 4, False, 50, 0).at(9)
        (25.0, 0.0)
        """
        known = min(max(value, self.low), self.high)
        if self.log:
            share = (log10(known) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            share = (known - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def labels(
        self, form: Form | None, size: Callable[[str], float], most_wide: float = inf
    ) -> list[tuple[float, str]]:
        """As many round numbers as stand apart, and their texts. `size`: of a text along the axis; `most_wide`: of the
        drawing, into which labels at the ends are moved.

        >>> [text for _, text in Axis(4.6, 5.2, False, 0, 200).labels(None, lambda text: 10)]
        ['4.6', '4.7', '4.8', '4.9', '5.0', '5.1', '5.2']
        """
        found: list[tuple[float, str]] = []
        for most in range(7, 0, -1):
            values = self._ticks(most)
            texts = [one_line(text) for text in (map(form, values) if form else numbers(values, self.log))]
            found = list(zip(values, texts, strict=True))
            halves = [size(text) / 2 for text in texts]
            centres = [inside(self.at(v), half, most_wide) for v, half in zip(values, halves, strict=True)]
            places = list(zip(centres, halves, strict=True))
            gaps = (abs(b - a) - half - other for (a, half), (b, other) in pairwise(places))
            distinct = len({text for _, text in found}) == len(found)
            if distinct and all(gap >= 7 for gap in gaps):
                return found
        return found[:1]

    def _ticks(self, most: int) -> list[float]:
        if self.log:
            found = log_ticks(self.low, self.high, most)
            if len(found) >= min(most, 3):
                return found[:most]
        return [v for v in ticks(self.low, self.high, most) if self.low <= v <= self.high][: most + 1]


def inside(centre: float, half: float, width: float) -> float:
    """Where the middle of a text of that half width stays inside a drawing; of an endless one, where it is."""
    return min(max(centre, EDGE + half), width - EDGE - half) if width < inf else centre


def domain(values: Iterable[float], log: bool) -> tuple[float, float]:
    """Where an axis begins and ends: a little beyond the data, and at 0 where they stay above it.

    >>> domain([0, 10], False), domain([], False), domain([3.0], True)
    ((0.0, 10.4), (0.0, 1.0), (1.5, 6.0))
    """
    known = [float(v) for v in values if abs(v) < LARGEST and (not log or v > 1 / LARGEST)]
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        margin = (high / low) ** 0.04
        return (low / margin, high * margin) if high > low * 1.001 else (low / 2, high * 2)
    span = high - low
    margin = 0.04 * span if span > 1e-6 * max(abs(low), abs(high)) else 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low < margin + 1e-12 * high else low - margin), high + margin


def numbers(values: Sequence[float], log: bool) -> list[str]:
    """Ticks as text, all of one kind.

    >>> numbers([0.0001, 0.001], True), numbers([0.01, 10], True), numbers([4.5, 5.0], False), numbers([0, 2e7], False)
    (['1e-4', '1e-3'], ['0.01', '10'], ['4.5', '5.0'], ['0', '2e7'])
    """
    if not values:
        return []
    most = max(abs(v) for v in values)
    step = min((b - a for a, b in pairwise(values)), default=most)
    least = min((abs(v) for v in values if abs(v) > 1e-9 * most), default=1.0)
    if most >= 1e6 or (least * 1.001 < 0.01 if log else step * 1.001 < 1e-3):
        digits = _digits(values, 1e-6 * min(step, least))
        return [_power(v, digits) for v in values]
    if log:
        return [f"{v:,.10g}" if v >= 1 else f"{v:.10g}" for v in values]
    return [f"{v:,.{max(0, -floor(log10(step) + 1e-9))}f}" for v in values]


def _digits(values: Sequence[float], near: float) -> int:
    """Decimals of a mantissa that say every value to within `near`."""
    known = (d for d in range(12) if all(abs(float(f"{v:.{d}e}") - v) <= near for v in values))
    return next(known, 12)


def _power(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(power)}"


# ---------------------------------------------------------------- what an axis holds


def _kept(value: float, log: bool) -> float:
    """The value where the axis has a place for it, an infinity that runs out of the picture, or NaN.

    >>> _kept(2.0, True), _kept(1e300, False), _kept(-inf, False), _kept(0.0, True)
    (2.0, inf, -inf, nan)
    """
    if value != value or (log and value <= 1 / LARGEST):
        return nan
    return value if abs(value) < LARGEST else inf if value > 0 else -inf


def _points(s: Series, x_log: bool, y_log: bool) -> list[tuple[float, float]]:
    """Every point of a series; NaN where it has no place."""
    return [(_kept(a, x_log), _kept(b, y_log)) for a, b in zip(s.x, s.y, strict=False)]


def _places(plot: Plot) -> list[float]:
    """The x of all that is drawn, crosses too."""
    found = [x for s in plot.series for x, y in _points(s, plot.x_log, plot.y_log) if y == y and y > -inf]
    return [x for x in found if isfinite(x)]


def _ends(plot: Plot) -> list[float]:
    found = [y for s in plot.series for x, y in _points(s, plot.x_log, plot.y_log) if isfinite(x)]
    found += [_kept(end, plot.y_log) for s in plot.series for end in (*s.low, *s.high)]
    return [y for y in found if isfinite(y)]


def _crosses(plot: Plot) -> dict[float, int]:
    """How many series have no value at an x."""
    found: dict[float, int] = {}
    for s in plot.series:
        for x in dict.fromkeys(x for x, y in _points(s, plot.x_log, plot.y_log) if y == inf and isfinite(x)):
            found[x] = found.get(x, 0) + 1
    return found


# ---------------------------------------------------------------- series


@dataclass(frozen=True, slots=True)
class _Look:
    """Colour and marker of a name: told apart also without colours."""

    ink: str
    corners: tuple[int, float] | None
    hollow: bool


def _look(place: int) -> _Look:
    return _Look(SERIES[place % len(SERIES)], CORNERS[place % len(CORNERS)], place // len(SERIES) % 2 == 1)


def _bands(s: Series, look: _Look, x: Axis, y: Axis) -> Iterator[Shape]:
    if s.style == "points" or not (s.low and s.high):
        return
    rows = zip(_points(s, x.log, y.log), s.low, s.high, strict=False)
    placed = [(a, _end(low, -inf, y), _end(high, inf, y)) for (a, _), low, high in rows]
    for known, stretch in groupby(placed, lambda row: isfinite(row[0])):
        some = list(stretch)
        if known and len(some) > 1:
            upper = [(x.at(a), y.at(high)) for a, _, high in some]
            yield Area((*upper, *((x.at(a), y.at(low)) for a, low, _ in reversed(some))), look.ink)


def _end(value: float, unknown: float, y: Axis) -> float:
    """An end of an interval: an `unknown` one runs out of the picture, one below a logarithmic axis lies at its foot.

    >>> y = Axis(1, 10, True, 0, 50)
    >>> _end(2.0, inf, y), _end(nan, inf, y), _end(0.0, inf, y)
    (2.0, inf, -inf)
    """
    kept = _kept(value, y.log)
    return kept if kept == kept else unknown if value != value else -inf


def _lines(s: Series, look: _Look, x: Axis, y: Axis) -> Iterator[Shape]:
    if s.style == "points":
        rows = zip(_points(s, x.log, y.log), s.low, s.high, strict=False)
        for (a, b), low, high in rows:
            if isfinite(a) and isfinite(b):
                ends = y.at(_end(low, -inf, y)), y.at(_end(high, inf, y))
                yield Line(((x.at(a), ends[0]), (x.at(a), ends[1])), look.ink, 1.1)
        return
    fit = s.style == "fit"
    for known, stretch in groupby(_points(s, x.log, y.log), lambda point: isfinite(point[0]) and isfinite(point[1])):
        some = [(x.at(a), y.at(b)) for a, b in stretch] if known else []
        if len(some) > 1:
            yield Line(tuple(some), look.ink, 1.2 if fit else 1.6, fit)


def _marks(s: Series, look: _Look, x: Axis, y: Axis) -> Iterator[Shape]:
    points = [(a, b) for a, b in _points(s, x.log, y.log) if isfinite(a) and isfinite(b)]
    if s.style == "fit" or (s.style == "line" and not (len(points) == 1 or 2 < len(points) <= MARKED)):
        return
    for a, b in points:
        yield from _marker(x.at(a), y.at(b), look, f"{s.name} {a:.4g}, {b:.4g}".strip())


def _marker(x: float, y: float, look: _Look, title: str = "") -> Iterator[Shape]:
    if look.corners is None:
        yield Dot(x, y, 3.6, look.ink, look.hollow, title)
        return
    count, turn = look.corners
    size = 4.6 if count == 4 else 4.8

    def polygon(radius: float) -> tuple[tuple[float, float], ...]:
        angles = [2 * pi * (turn + k / count) for k in range(count)]
        return tuple((x + radius * cos(a), y + radius * sin(a)) for a in angles)

    yield Area(polygon(size + 1.2), "paper", 1.0)
    yield Area(polygon(size), look.ink, 1.0, title)
    if look.hollow:
        yield Area(polygon(size - 2.2), "paper", 1.0)


def _strip(plot: Plot, names: Sequence[str], x: Axis, top: float) -> Iterator[Shape]:
    """Crosses for what has no value, those of one x below one another."""
    taken: dict[float, int] = {}
    for s in plot.series:
        look = _look(names.index(s.name))
        for a in dict.fromkeys(a for a, b in _points(s, plot.x_log, plot.y_log) if b == inf and isfinite(a)):
            y = top + 5.5 + 11 * taken.get(a, 0)
            taken[a] = taken.get(a, 0) + 1
            yield from _cross(x.at(a), y, look.ink)


def _cross(x: float, y: float, ink: str) -> Iterator[Shape]:
    for way in (-1, 1):
        yield Line(((x - 3, y - 3 * way), (x + 3, y + 3 * way)), ink, 1.6)


# ---------------------------------------------------------------- text


def room(text: str, size: float, bold: bool = False) -> float:
    """Most width of a text, in the widest of the usual fonts (DejaVu Sans, Verdana).

    >>> room("iii", 10) < room("xxx", 10) < room("MMM", 10) < room("\N{CJK UNIFIED IDEOGRAPH-4E00}" * 3, 10)
    True
    """
    return sum(map(_em, text)) * size * (1.1 if bold else 1.0)


def _em(sign: str) -> float:
    if east_asian_width(sign) in "WF" or ord(sign) > 0xFFFF:
        return 1.3
    if sign in "mwMW@%—…":
        return 1.0
    if sign in "frtijlI.,:;'|![]()/- ":
        return 0.42
    return 0.79 if sign.isupper() or ord(sign) > 0x2FF else 0.64


def fitted(text: str, width: float, size: float, bold: bool = False) -> str:
    """As much of a text as surely fits.

    >>> fitted("lora r16 attention", 58, 10)
    'lora r16…'
    """
    if room(text, size, bold) <= width:
        return text
    while text and room(text + "…", size, bold) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrapped(text: str, width: float, size: float, bold: bool = False, most: int = MOST_LINES) -> list[str]:
    """A text in lines, broken between words; the last one is cut.

    >>> wrapped("one two three", 50, 10)
    ['one two', 'three']
    """
    lines: list[str] = []
    words = one_line(text).split()
    while words and len(lines) < most - 1:
        line = fitted(words.pop(0), width, size, bold)
        while words and room(f"{line} {words[0]}", size, bold) <= width:
            line += f" {words.pop(0)}"
        lines.append(line)
    return [*lines, fitted(" ".join(words), width, size, bold)] if words else lines


def _text_lines(d: Drawing, text: str, size: float, y: float, ink: str, bold: bool = False, middle: float | None = None) -> float:  # fmt: skip
    """Draws a text from y down, and says where the next line goes. `middle`: of centred lines, as far as they fit."""
    for line in wrapped(text, WIDTH - 2 * EDGE, size, bold):
        if middle is None:
            d.shapes.append(Text(EDGE, y, line, ink, size, "start", bold))
        else:
            at = inside(middle, room(line, size, bold) / 2, WIDTH)
            d.shapes.append(Text(at, y, line, ink, size, "middle", bold))
        y += size * 1.3
    return y


def _legend(d: Drawing, plot: Plot, names: Sequence[str], y: float) -> float:
    """A row or a column of names with their lines and markers; the height at which the drawing ends."""
    shown = [name for name in names if name.strip()]
    if not shown:
        return y
    swatch, gap = 24.0, 14.0
    widest = max(room(one_line(name), LEGEND) for name in shown) + swatch
    columns = max(1, min(len(shown), floor((WIDTH - 2 * EDGE + gap) / (widest + gap))))
    pitch = (WIDTH - 2 * EDGE + gap) / columns
    for start in range(0, len(shown), columns):
        rows = [wrapped(name, pitch - gap - swatch, LEGEND, most=2) for name in shown[start : start + columns]]
        for i, (name, lines) in enumerate(zip(shown[start:], rows, strict=False)):
            at = EDGE + i * pitch
            d.shapes += _key([s for s in plot.series if s.name == name], _look(names.index(name)), at, y)
            d.shapes += [Text(at + swatch, y + 11 * k, text, "ink", LEGEND) for k, text in enumerate(lines)]
        y += 3 + 11 * max(map(len, rows))
    return y - 6


def _key(some: Sequence[Series], look: _Look, x: float, y: float) -> Iterator[Shape]:
    """What stands before a name in the legend."""
    line = next((s for s in some if s.style == "line"), None) or next((s for s in some if s.style == "fit"), None)
    if any(s.style != "points" and s.low for s in some):
        yield Area(((x, y - 8), (x + 18, y - 8), (x + 18, y + 2), (x, y + 2)), look.ink)
    if line:
        dashed = line.style == "fit"
        yield Line(((x, y - 3), (x + 18, y - 3)), look.ink, 1.2 if dashed else 1.6, dashed)
    if any(s.style == "points" or (s.style == "line" and len(s.x) != 2 and len(s.x) <= MARKED) for s in some):
        yield from _marker(x + 9, y - 3, look)


def _said(plot: Plot) -> str:
    """What a screen reader says of it: each name with the ends of its values."""
    parts = []
    for name in dict.fromkeys(s.name for s in plot.series):
        some = [s for s in plot.series if s.name == name and s.style != "fit"] or [s for s in plot.series if s.name == name]  # fmt: skip
        known = [y for s in some for y in s.y if isfinite(y)]
        span = f"{min(known):.4g} to {max(known):.4g}" if known else "no value"
        parts.append(f"{name}: {span}" if name else span)
    return f"{plot.y_label} over {plot.x_label}. " + "; ".join(parts)


# ---------------------------------------------------------------- need against capacity


def capacity_curve(need: Estimate, held: Estimate, verdict: str, seen: Estimate, adapter: str) -> Drawing:
    """What data may ask for, growing with them, against what the adapter holds; the plan's own data are the point.

        bits = seen * need / seen of the plan        each end by its own end        [bit]

    `seen`: trained tokens, each once, or RL episodes, with their unit; `adapter`: method and rank, in words.
    """
    one = seen.unit.removesuffix("s")
    each = Estimate(need.low / seen.low, need.value / seen.value, need.high / seen.high, f"bit/{one}", need.basis)
    ends = seen.value / 100, seen.value * 100
    data = f"data may ask for: {interval(each, lambda b: f'{b:.3g}')} bit {'an' if one[0] in 'aeiou' else 'a'} {one}"
    mine = f"this plan: {interval(seen, units.count)} {seen.unit}, {interval(need, units.bits)}"
    holds = f"adapter holds {units.bits(held.low)} to {units.bits(held.high)}: {adapter}"
    series = (
        Series(data, ends, _times(ends, each.value), _times(ends, each.low), _times(ends, each.high), "fit"),
        Series(holds, ends, (held.value,) * 2, (held.low,) * 2, (held.high,) * 2, "fit"),
        Series(mine, (seen.low, seen.high), (need.value,) * 2),
        Series(mine, (seen.value,), (need.value,), (need.low,), (need.high,), "points"),
    )
    full = (
        f"at {units.count(held.low / each.high)} {seen.unit} the most that they may ask for is the least that it holds"
    )
    said = f"{verdict}: {mine}; {holds}. The band of data is derived from the plan's bits per {one}; {full}"
    x_label = f"{seen.unit}{', each counted once' if one.endswith('token') else ''}"
    plot = Plot(f"Capacity against data: {verdict}", x_label, "bits", series, True, True)
    return curve(plot, said, units.count, units.bits)


def _times(xs: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(x * factor for x in xs)
