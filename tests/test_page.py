"""The page of verdicts and its pictures: the same bytes from the same input, and no text of a stranger does anything."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from calibrate.family import Entry, RunSummary, corrected
from calibrate.figures import draw
from calibrate.page import verification
from lora_planner.errors import EnvironmentMissing
from lora_planner.ledger import Estimate
from lora_planner.record import (
    DIVERGED,
    FAILED,
    FAILS,
    FINISHED,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    Plot,
    Series,
    Verdict,
)

ROOT = Path(__file__).parents[1]
STATUSES = (HOLDS, FAILS, UNDECIDED, NOT_RUN)
RUNS = (
    RunSummary("aaaa1111", "shift lora r4 lr 1.0e-03 seed 0", FINISHED, 3.0, 2.2, 12.0),
    RunSummary("bbbb2222", "shift lora r4 lr 1.0e-01 seed 0", DIVERGED, 3.0, None, 2.0),
    RunSummary("cccc3333", "shift full lr 1.0e-04 seed 0", FAILED, None, None, 0.5),
)
ENTRY = Entry(
    id="C07", title="rate ratio", sentence="The best LoRA rate is 10x that of full fine-tuning.",
    source="LoRA Without Regret (2025)", published="9.8; others 3.5 to 20", metric="ratio of fitted optima",
    rule="holds if the 95 % interval lies in [7, 14]", traps=((4, "an optimum at the edge of its grid"),), size="cpu",
    verdict=Verdict("C07", HOLDS, "the ratio is 9.1", Estimate(7.25, 9.125, 13.5, "ratio", "fitted"), 42, ("aaaa1111",)),
    registered="0123456789ab", registration="written before the first of its runs", runs=RUNS,
    command="lora-plan verify --claims C07", picture="c07-cpu.svg", cost_s=1200.0,
)  # fmt: skip
ENVIRONMENT = {"torch": "2.13.0", "device": "cpu", "peft": "0.21"}


def entry(status: str = HOLDS, p: float | None = None, **words: Any) -> Entry:
    return replace(ENTRY, verdict=replace(ENTRY.verdict, status=status, p=p), **words)


class Rendered(HTMLParser):
    """What a reader of the page gets: its tags, table cells, code blocks, link targets and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.rows: list[list[str]] = []
        self.code: list[str] = []
        self.text = ""
        self._open: list[str] = []
        # CommonMark with tables and raw HTML, which is what GitHub shows
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(page))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src"):
                self.targets.append(value or "")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "code":
            self.code.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        if "code" in self._open:
            self.code[-1] += data


def rendered(*entries: Entry) -> Rendered:
    return Rendered(verification(entries, ENVIRONMENT))


# ---------------------------------------------------------------- the correction


@pytest.mark.parametrize(("p_values", "left"), [
    # Wikipedia, "Holm-Bonferroni method", example: at 0.05 only H1 and H4 are rejected
    ((0.01, 0.04, 0.03, 0.005), (HOLDS, UNDECIDED, UNDECIDED, HOLDS)),
    ((0.04,), (HOLDS,)),
    ((0.04, None), (HOLDS, HOLDS)),  # arithmetic is no test and makes no family larger
    ((0.03, 0.03), (UNDECIDED, UNDECIDED)),
    ((0.05,), (HOLDS,)),
    ((None, None), (HOLDS, HOLDS)),
])  # fmt: skip
def test_the_correction(p_values: tuple[float | None, ...], left: tuple[str, ...]) -> None:
    """A verdict that holds by a p above 0.05 after Holm is undecided, and says why and what it was before."""
    found = corrected([entry(p=p) for p in p_values])
    assert tuple(e.verdict.status for e in found) == left
    family = sum(p is not None for p in p_values)
    for e in found:
        reason = f"not significant after the correction for {family} claims; before it, holds: the ratio is 9.1"
        assert e.verdict.sentence == (reason if e.verdict.status == UNDECIDED else "the ratio is 9.1")


@given(st.lists(st.tuples(st.sampled_from(STATUSES), st.none() | st.floats(0, 1)), max_size=8))
def test_the_correction_only_takes_away(given: list[tuple[str, float | None]]) -> None:
    """Of any verdicts, some that were decided become undecided; nothing else changes, and a second time nothing at all."""
    before = tuple(entry(status, p) for status, p in given)
    after = corrected(before)
    for old, new in zip(before, after, strict=True):
        assert new == old or (old.verdict.status in (HOLDS, FAILS) and new.verdict.status == UNDECIDED)
        assert new.verdict.p is not None or new == old
        assert new.verdict.effect == old.verdict.effect
    assert corrected(after) == after


def test_tests_that_failed_are_in_the_family() -> None:
    """Three tests were made, whatever they found: 0.02 times 3 is above 0.05."""
    (found, *_) = corrected([entry(p=0.02), entry(FAILS, 0.5), entry(UNDECIDED, 0.6)])
    assert found.verdict.status == UNDECIDED


def test_a_failure_by_chance_is_corrected_too() -> None:
    """0.03 of two tests is 0.06: neither a finding nor its refutation."""
    (found, _) = corrected([entry(FAILS, 0.03), entry(p=0.5)])
    assert found.verdict.status == UNDECIDED and "before it, fails" in found.verdict.sentence


def test_what_has_not_run_yet_is_in_the_family() -> None:
    """A claim that needs runs and has none counts as a test, arithmetic does not: 0.02 of three is 0.06, of one 0.02."""
    waiting = [replace(entry(NOT_RUN), asked=5), replace(entry(UNDECIDED), asked=5)]
    assert corrected([entry(p=0.02), *waiting])[0].verdict.status == UNDECIDED
    assert corrected([entry(p=0.02), entry(NOT_RUN), entry(HOLDS)])[0].verdict.status == HOLDS


def test_the_page_shows_the_corrected_verdict() -> None:
    """In the table, in the count and in the section, with both p."""
    page = rendered(entry(p=0.03), entry(FAILS, p=0.001, size="gpu"), entry(UNDECIDED, p=0.5))
    assert page.rows[1][-1] == UNDECIDED
    assert "3 claims: 0 holds, 1 fails, 2 undecided, 0 not run." in page.text
    assert "not significant after the correction for 3 claims" in page.text
    assert "0.06 after Holm over 3 tests, 0.03 alone" in page.text


# ---------------------------------------------------------------- the page


def test_every_status_has_a_row_and_a_section() -> None:
    """The four words are explained, counted, and shown in the table and where the claim is."""
    entries = [entry(status, id=f"C{i}") for i, status in enumerate(STATUSES)]
    page = rendered(*entries)
    for i, status in enumerate(STATUSES):
        assert page.rows[i + 1] == [f"C{i}", ENTRY.sentence, ENTRY.published, "9.125 [7.25, 13.5] ratio", "42", "cpu", status]  # fmt: skip
        assert f"verdict: {status}: the ratio is 9.1" in page.text
        assert f"{status}: " in page.text.split("claims:")[0]
    assert "4 claims: 1 holds, 1 fails, 1 undecided, 1 not run." in page.text


def test_a_section_says_everything() -> None:
    """Source, metric, rule, traps, control, registration and cost are there, the command as code, the picture shown."""
    page = rendered(replace(ENTRY, verdict=replace(ENTRY.verdict, control="rank 1 was told apart")))
    for text in (ENTRY.source, ENTRY.metric, ENTRY.rule, "4: an optimum at the edge of its grid",
                 "control: rank 1 was told apart", "pre-registration: 0123456789ab, written before the first of its runs",
                 "cost: 20 min of processor time", "device cpu; peft 0.21; torch 2.13.0"):  # fmt: skip
        assert text in page.text, text
    assert page.code == ["lora-plan verify --claims C07\n"]
    assert page.targets == ["#c07-cpu", "c07-cpu.svg"]


def test_what_there_is_not() -> None:
    """Arithmetic without a pre-registration, runs, effect or picture: said, or left out, and no p is made up."""
    bare = replace(ENTRY, verdict=Verdict("C01", NOT_RUN, "no run tells"), registered="", registration="", runs=(),
                   picture="", command="", traps=(), cost_s=0.0)  # fmt: skip
    page = rendered(bare)
    assert "pre-registration: none\n" in page.text
    assert "No runs stand behind it." in page.text
    assert page.rows[1][3] == "-"
    assert not {"img", "details", "code"} & set(page.tags)
    for word in ("control:", "traps", "after Holm over", "cost:"):
        assert word not in page.text.split("C07 rate ratio")[1]


def test_every_run_is_listed_once() -> None:
    """Also those that diverged or failed, without a number that they did not get to; those of the verdict in bold."""
    many = (*RUNS, *(RunSummary(f"k{i:03}", f"run {i}", FINISHED, 3.0, 2.0, 1.0) for i in range(40)))
    page = rendered(replace(ENTRY, runs=many))
    cells = [row for row in page.rows if len(row) == 6][1:]
    assert sorted(row[0] for row in cells) == sorted(run.key for run in many)
    assert ["bbbb2222", "shift lora r4 lr 1.0e-01 seed 0", DIVERGED, "3.0000", "-", "2 s"] in cells
    assert ["cccc3333", "shift full lr 1.0e-04 seed 0", FAILED, "-", "-", "500 ms"] in cells
    assert "By status: 1 diverged, 1 failed, 41 finished." in page.text
    source = verification([ENTRY], {})
    assert "| **aaaa1111** |" in source
    assert "| bbbb2222 |" in source


def test_the_page_depends_on_nothing_else() -> None:
    """Twice the same bytes, in whatever order the runs and the environment come."""
    first = verification([entry(p=0.01), entry(FAILS)], ENVIRONMENT)
    for seed in range(4):
        runs, around = list(RUNS), list(ENVIRONMENT.items())
        random.Random(seed).shuffle(runs)
        random.Random(seed).shuffle(around)
        assert verification([entry(p=0.01, runs=tuple(runs)), entry(FAILS, runs=tuple(runs))], dict(around)) == first


def test_every_link_has_its_place() -> None:
    """The same claim on two sizes, and twice on one, are three sections with names of their own."""
    page = rendered(ENTRY, replace(ENTRY, size="gpu"), ENTRY)
    assert page.ids == ["c07-cpu", "c07-gpu", "c07-cpu-2"]
    assert [t for t in page.targets if t.startswith("#")] == [f"#{name}" for name in page.ids]


EVIL = [
    "<script>alert(1)</script>", "a|b|c", "`code`", "``` x", "`````", "$x_1$ and $$y$$", "<!-- hidden", "[x](javascript:alert(1))",
    "![x](https://example.org/x.png)", "<https://example.org>", "**bold** _it_ ~~gone~~", "&lt;b&gt;", "\\|", "\\", "# x", "- x",
    "1. x", "    x", "> x", "| a |\n|---|\n| b |", "a\n\n# b\r\n```\nc", "</details>", "]", "</td>", "[^1]: x", "a\x1b[31mb\x00c\u202ed",
]  # fmt: skip


def plain(text: str) -> str:
    """What one line can show of it."""
    visible = "".join(" " if c in "\n\r\t" else c if c.isprintable() else "?" for c in text)
    return " ".join(visible.split())


TEXTS: dict[str, Callable[[str], Entry]] = {
    "id": lambda t: replace(ENTRY, id=t),
    "title": lambda t: replace(ENTRY, title=t),
    "sentence": lambda t: replace(ENTRY, sentence=t),
    "source": lambda t: replace(ENTRY, source=t),
    "published": lambda t: replace(ENTRY, published=t),
    "metric": lambda t: replace(ENTRY, metric=t),
    "rule": lambda t: replace(ENTRY, rule=t),
    "trap": lambda t: replace(ENTRY, traps=((1, t),)),
    "size": lambda t: replace(ENTRY, size=t),
    "registered": lambda t: replace(ENTRY, registered=t),
    "registration": lambda t: replace(ENTRY, registration=t),
    "command": lambda t: replace(ENTRY, command=t),
    "verdict": lambda t: replace(ENTRY, verdict=replace(ENTRY.verdict, sentence=t)),
    "control": lambda t: replace(ENTRY, verdict=replace(ENTRY.verdict, control=t)),
    "unit": lambda t: replace(ENTRY, verdict=replace(ENTRY.verdict, effect=Estimate(1, 2, 3, t, "fitted"))),
    "key": lambda t: replace(ENTRY, runs=(replace(RUNS[0], key=t), *RUNS[1:])),
    "label": lambda t: replace(ENTRY, runs=(replace(RUNS[0], label=t), *RUNS[1:])),
    "status": lambda t: replace(ENTRY, runs=(replace(RUNS[0], status=t), *RUNS[1:])),
}


@pytest.mark.parametrize("where", TEXTS)
def test_text_of_a_stranger_is_text(where: str) -> None:
    """Tags, pipes, code, formulas, links and control characters are shown as they are and change no structure."""
    harmless = rendered(TEXTS[where]("x"))
    for text in EVIL:
        built = TEXTS[where](text)
        page = rendered(built)
        skip = {"strong"} if where in ("key", "label") else set()  # the run in bold is another, or another row
        assert [t for t in page.tags if t not in skip] == [t for t in harmless.tags if t not in skip], text
        assert [len(row) for row in page.rows] == [len(row) for row in harmless.rows], text
        assert page.targets[1:] == ["c07-cpu.svg"]
        assert plain(text) in " ".join(page.text.split()), text
        source = verification([built], {})
        assert all(c.isprintable() or c == "\n" for c in source)
        if where != "command":  # it stands between fences, where nothing is read
            assert "$" not in source


def test_strangers_in_the_environment_and_the_picture() -> None:
    """A driver's name is text, and a file name is one target with no scheme."""
    for text in EVIL:
        page = Rendered(verification([replace(ENTRY, picture=text)], {text: text}))
        assert plain(text) in " ".join(page.text.split()), text
        assert "script" not in page.tags
        (target,) = [t for t in page.targets if not t.startswith("#")]
        assert not {":", "<", " ", ")"} & set(target)


# ---------------------------------------------------------------- pictures

SVG = "{http://www.w3.org/2000/svg}"
#: Okabe and Ito 2008, jfly.uni-koeln.de/color: RGB of the eight colours
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}
LINE = Series("full", (1.0, 10.0, 100.0), (1.0, 2.0, 3.0), (0.5, 1.5, 2.5), (1.5, 2.5, 3.5))
PLOT = Plot("Loss by rate", "learning rate", "nats", (
    LINE, Series("lora r4", (1.0, 10.0, 100.0), (2.0, 1.0, 2.0), (1.5, 0.5, 1.5), (2.5, 1.5, 2.5), "points"),
    Series("lora r4", (1.0, 10.0, 100.0), (2.0, 1.0, 2.0), style="fit")), x_log=True)  # fmt: skip


def drawn(plot: Plot, folder: Path) -> ElementTree.Element:
    draw(plot, folder / "x.svg")
    return ElementTree.parse(folder / "x.svg").getroot()


def texts(picture: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in picture.iter(SVG + "text")]


def styles(picture: ElementTree.Element) -> list[dict[str, str]]:
    """The CSS of every path and marker."""
    found = [e.get("style", "") for name in ("path", "use") for e in picture.iter(SVG + name)]
    return [dict(item.split(": ", 1) for item in style.split("; ") if item) for style in found]


def series_points(picture: ElementTree.Element, colour: str) -> list[list[tuple[float, float]]]:
    """Corners of the lines of a colour that are cut at the axes: the series, and not the legend."""
    paths = [e for e in picture.iter(SVG + "path") if e.get("clip-path") and f"stroke: {colour}" in e.get("style", "")]
    words = [[w for w in p.get("d", "").replace("\n", " ").split() if w not in "MLz"] for p in paths]
    return [list(zip(map(float, w[::2]), map(float, w[1::2]), strict=True)) for w in words]


def test_the_same_plot_is_the_same_bytes(tmp_path: Path) -> None:
    """Twice here and once in a fresh process with another seed of its hashes; no date and no version in it."""
    for name in ("a", "b"):
        draw(PLOT, tmp_path / name)
    code = "import sys; from pathlib import Path; from tests.test_page import PLOT, draw; draw(PLOT, Path(sys.argv[1]))"
    around = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, timeout=60, cwd=ROOT, env=around)
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert b"<dc:date>" not in first
    assert b"Matplotlib v" not in first


def test_settings_of_the_reader_do_not_matter(tmp_path: Path) -> None:
    """A matplotlibrc changes no byte, and is what it was afterwards."""
    import matplotlib

    draw(PLOT, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 20, "axes.labelsize": 30, "svg.fonttype": "path"}):
        draw(PLOT, tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_size_and_colours(tmp_path: Path) -> None:
    """6.4 by 4 inches on white; fifteen series have colours of Okabe and Ito, and no two look the same."""
    many = tuple(Series(f"lora r{i}", (1.0, 2.0), (float(i), i + 1.0)) for i in range(15))
    picture = drawn(Plot("t", "x", "y", many), tmp_path)
    assert (picture.get("width"), picture.get("height")) == (f"{6.4 * 72:.1f}pt", f"{4 * 72}pt")
    assert styles(picture)[0]["fill"] == "#ffffff"
    lines = {(s["stroke"], s.get("stroke-dasharray")) for s in styles(picture) if s.get("stroke-width") == "1.5"}
    assert {colour for colour, _ in lines} <= OKABE_ITO
    assert len(lines) == len(many)


def test_styles_of_series(tmp_path: Path) -> None:
    """A line and its band, points and their bars, a dashed fit; one place in the legend for one name."""
    picture = drawn(PLOT, tmp_path)
    ours = styles(picture)
    assert sum("fill-opacity" in s for s in ours) == 1, "the band"
    blue, red = series_points(picture, "#0072b2"), series_points(picture, "#d55e00")
    assert [len(path) for path in blue] == [3]
    assert sorted(len(path) for path in red) == [2, 2, 2, 3], "three bars and the fit"
    dashed = [s for s in ours if s.get("stroke") == "#d55e00" and s.get("stroke-dasharray")]
    assert len(dashed) == 2, "the fit, and it in the legend"
    assert [t for t in texts(picture) if t in ("full", "lora r4")] == ["full", "lora r4"]


def test_log_axes(tmp_path: Path) -> None:
    """1, 10 and 100 stand equally far apart on a log axis, and on both axes a power law is a straight line."""
    (line,) = series_points(drawn(PLOT, tmp_path), "#0072b2")
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=1e-4)
    (line,) = series_points(drawn(replace(PLOT, x_log=False), tmp_path), "#0072b2")
    assert line[2][0] - line[1][0] == pytest.approx(10 * (line[1][0] - line[0][0]), abs=1e-3)
    power = Series("p", (1.0, 3.0, 20.0), tuple(5 * x**0.7 for x in (1.0, 3.0, 20.0)))
    (line,) = series_points(drawn(Plot("t", "x", "y", (power,), x_log=True, y_log=True), tmp_path), "#0072b2")
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in ((line[0], line[1]), (line[1], line[2]))]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)
    assert slopes[0] < 0, "up is down in SVG"


def test_ranks_are_the_ticks(tmp_path: Path) -> None:
    """Few measured places on a log axis are labelled; many are not."""
    ranks = (1.0, 4.0, 16.0, 64.0)
    assert {"1", "4", "16", "64"} <= set(
        texts(drawn(Plot("t", "x", "y", (Series("r", ranks, ranks),), True), tmp_path))
    )
    steps = tuple(float(n) for n in range(1, 130, 3))
    found = set(texts(drawn(Plot("t", "x", "y", (Series("r", steps, steps),), True), tmp_path)))
    assert {"10", "100"} <= found
    assert "4" not in found


def test_what_an_axis_has_no_place_for(tmp_path: Path) -> None:
    """A loss that is not finite and a zero on a log axis are gaps; an interval without an end reaches the edge."""
    holes = Series("a", (0.0, 1.0, 2.0, 3.0, 4.0), (1.0, 1.0, math.inf, 3.0, math.nan))
    open_ended = Series("b", (1.0, 3.0), (2.0, 2.0), (-5.0, 1.5), (2.5, math.inf), "points")
    picture = drawn(Plot("t", "x", "y", (holes, open_ended), x_log=True, y_log=True), tmp_path)
    clip = next(e for e in picture.iter(SVG + "clipPath"))[0]
    top = float(clip.get("y", ""))
    bottom = top + float(clip.get("height", ""))
    bars = sorted(path for path in series_points(picture, "#d55e00") if len(path) == 2)
    (low, high) = ((max(y for _, y in bars[0])), min(y for _, y in bars[1]))
    assert low == pytest.approx(bottom, abs=0.01)
    assert high == pytest.approx(top, abs=0.01)
    circles = [e for e in picture.iter(SVG + "use") if "fill: #0072b2" in e.get("style", "")]
    assert len(circles) == 2 + 1, "two places that exist, and the legend"


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Dollars, underscores, tags and control characters: one text each, no formula, and the SVG is well-formed."""
    names = ["$x_1$", "_hidden", "<script>alert(1)</script>", "a & b | c", "\\frac{", "a\x00b\x1b[31m", "x" * 400]
    series = tuple(Series(name, (1.0, 2.0), (1.0, float(i))) for i, name in enumerate(names))
    for bad in ("$\\alpha$ <b>", "$\\nonsense$"):
        picture = drawn(Plot(bad, bad + " x", bad + " y", series), tmp_path)
        found = texts(picture)
        assert {bad, bad + " x", bad + " y"} <= set(found)
        for name in names[:-1]:
            assert plain(name) in found, name
        assert max(map(len, found)) < 100
        assert not list(picture.iter(SVG + "script"))


def test_an_empty_plot_is_drawn(tmp_path: Path) -> None:
    """No series yet: axes with their labels."""
    assert {"t", "x", "y"} <= set(texts(drawn(Plot("t", "x", "y", (), True, True), tmp_path)))


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install, exit code 6, and no file."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        EnvironmentMissing, match=r"^matplotlib is not installed. pip install 'lora-plan\[report\]'"
    ) as e:
        draw(PLOT, tmp_path / "x.svg")
    assert e.value.exit_code == 6
    assert not list(tmp_path.iterdir())
