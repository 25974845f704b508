"""A record.Plot as a picture, SVG or PNG: SVG whose bytes depend on the plot and on matplotlib's version, on nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from typing import Any

from lora_planner.errors import EnvironmentMissing
from lora_planner.record import Plot, Series
from lora_planner.render import one_line

#: Okabe and Ito 2008, "Color Universal Design", without the yellow, which white swallows
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>p"
INCHES = (6.4, 4.0)
DPI = 160
#: a line through more points than these goes without markers
MARKED = 16
#: characters that fit across the picture, in the sizes below
TITLE_WIDTH, X_WIDTH, Y_WIDTH, LEGEND_WIDTH = 76, 80, 38, 88
#: so many measured places on a log axis are its ticks, if their labels are short and stand apart
PLACES, DIGITS, APART = 10, 6, 1 / 14

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in a font that the reader has
    "svg.hashsalt": "lora-plan",  # or the ids are random
    "text.parse_math": False,  # "$" in a name is a dollar
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",  # also on a dark page
}


def draw(plot: Plot, path: Path) -> None:
    """Writes the plot as SVG, or as PNG where the name ends so. Lines have bands and points have bars where `low` and `high` are given.

    Series of one name, such as points and the fit through them, share a colour and a place in the legend.
    What a log axis has no place for is left out; an interval without an end runs out of the picture.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentMissing("matplotlib is not installed", "", "pip install 'lora-plan[report]'") from error

    picture = BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not those of the reader's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(fill(one_line(plot.title), TITLE_WIDTH))
        axes.set_xlabel(fill(one_line(plot.x_label), X_WIDTH))
        axes.set_ylabel(fill(one_line(plot.y_label), Y_WIDTH))
        handles = _series(axes, plot)
        _ticks(axes.xaxis, plot.x_log, places(plot))
        _ticks(axes.yaxis, plot.y_log, [])
        _legend(figure, handles)
        if path.suffix.lower() == ".png":
            figure.savefig(picture, format="png", dpi=DPI)
        else:
            figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    path.write_bytes(picture.getvalue())


def _series(axes: Any, plot: Plot) -> dict[str, list[Any]]:
    """Draws all of them; what the legend shows, by name."""
    axes.set_xscale("log" if plot.x_log else "linear")
    axes.set_yscale("log" if plot.y_log else "linear")
    order = {name: i for i, name in enumerate(dict.fromkeys(s.name for s in plot.series))}
    handles: dict[str, list[Any]] = {name: [] for name in order}
    for s in plot.series:
        x = drawable(s.x, plot.x_log)
        (line,) = axes.plot(x, drawable(s.y, plot.y_log), **_look(s, order[s.name]))
        handles[s.name].append(line)
        for ends in filter(None, (s.low, s.high)):
            axes.update_datalim(list(zip(x, drawable(ends, plot.y_log), strict=True)))
    axes.autoscale_view()
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)  # known before the bands, which may have no end
    for s in plot.series:
        if s.low and s.high:
            _interval(axes, s, drawable(s.x, plot.x_log), (bottom, top), PALETTE[order[s.name] % len(PALETTE)])
    return handles


def drawable(values: Iterable[float], log: bool) -> list[float]:
    """What has no place on the axis becomes NaN, a gap.

    >>> drawable((-1.0, 0.0, 2.0, math.inf), True), drawable((-1.0, math.nan), False)
    ([nan, nan, 2.0, nan], [-1.0, nan])
    """
    return [v if math.isfinite(v) and (v > 0 or not log) else math.nan for v in values]


def _look(s: Series, place: int) -> dict[str, Any]:
    """Colour, marker and dashes; also apart without colours."""
    turn, colour = divmod(place, len(PALETTE))
    marker = MARKERS[(colour + turn) % len(MARKERS)]
    look: dict[str, Any] = {"color": PALETTE[colour], "zorder": 3}
    if s.style == "points":
        return {**look, "marker": marker, "linestyle": "none"}
    if s.style == "fit":
        return {**look, "linestyle": (0, (4, 2)), "linewidth": 1.2}
    return {**look, "marker": marker if len(s.x) <= MARKED else None, "linestyle": ("-", "-.", ":")[turn % 3]}


def _interval(axes: Any, s: Series, x: Sequence[float], view: tuple[float, float], colour: str) -> None:
    """A band along a line, a bar at a point, cut at the edges of the picture."""
    low, high = ([min(max(v, view[0]), view[1]) for v in ends] for ends in (s.low, s.high))
    if s.style == "points":
        axes.vlines(x, low, high, color=colour, linewidth=1.1, zorder=2)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)


def places(plot: Plot) -> list[float]:
    """The measured x of a log axis as ticks, such as the ranks that were run; none where they are many or crowded.

    >>> series = Series("loss", (1, 4, 16), (2.3, 2.2, 2.1))
    >>> places(Plot("", "rank", "nats", (series,), x_log=True)), places(Plot("", "rank", "nats", (series,)))
    ([1, 4, 16], [])
    """
    found = sorted({x for s in plot.series for x in s.x if math.isfinite(x) and x > 0}) if plot.x_log else []
    if not 2 <= len(found) <= PLACES or max(len(f"{x:g}") for x in found) > DIGITS:
        return []
    nearest = min(math.log(b / a) for a, b in pairwise(found))
    return found if nearest >= APART * math.log(found[-1] / found[0]) else []


def _ticks(axis: Any, log: bool, at: Sequence[float]) -> None:
    """Plain numbers: 0.001 and not a power of ten, no offset in a corner."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    if not log:
        axis.get_major_formatter().set_useOffset(False)
        return
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(at) if at else LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    if at:
        axis.set_minor_locator(NullLocator())


def _legend(figure: Any, handles: dict[str, list[Any]]) -> None:
    """Below the axes, in as many columns as the names leave room for; none where there is no name."""
    shown = {name: tuple(some) for name, some in handles.items() if name.strip()}
    if not shown:
        return
    whole = [one_line(name) for name in shown]
    names = [name if len(name) <= LEGEND_WIDTH else f"{name[: LEGEND_WIDTH - 3]}..." for name in whole]
    columns = min(len(names), max(1, LEGEND_WIDTH // (max(map(len, names)) + 7)))
    # placeholders first: some versions of matplotlib hide a label that begins with "_"
    legend = figure.legend(list(shown.values()), ["x"] * len(names), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
