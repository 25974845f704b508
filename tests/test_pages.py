"""What leaves the terminal: one page that loads nothing and runs nothing, whatever stands in a name."""

from __future__ import annotations

import csv
import html as html_library
import io
import json
import re
import shutil
import subprocess
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_planner.cli import Commands, main
from lora_planner.commands.budget import budget
from lora_planner.ledger import Estimate
from lora_planner.pages import charts
from lora_planner.pages.curves import capacity_curve
from lora_planner.pages.document import Document, Facts, Figures, Heading, Prose, Signature, Table, Warnings
from lora_planner.pages.html import html
from lora_planner.pages.text import cell, csv_text, inert, markdown

SCRIPT = "<script>alert(1)</script>"
FORMULA = '=HYPERLINK("http://evil.example","click")'
IMAGE = '"><img src=x onerror=alert(1)>'
H100 = "h100-sxm-80gb"
#: what a page may consist of: nothing that loads, links, posts or runs
TAGS = {
    "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "div", "b", "span", "dl", "dt", "dd", "table", "thead", "tbody",
    "tr", "th", "td", "figure", "ul", "li", "code", "footer", "svg", "rect", "polyline", "polygon",
    "circle", "text",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_inert(text: str) -> Page:
    """No tag that could run or load, no handler, no address."""
    page = Page(text)
    assert set(page.tags) <= TAGS, set(page.tags) - TAGS
    names = {name for name, _ in page.attributes}
    assert not [
        name
        for name in names
        if name.startswith("on") or name in ("href", "src", "srcset", "style", "action", "data", "xlink:href")
    ]
    for name, value in page.attributes:
        assert (
            "://" not in value
            or (name, value) == ("xmlns", "http://www.w3.org/2000/svg")
            or name in ("aria-label", "data-name")
        ), value
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "default-src 'none'" in html_library.unescape(text)
    return page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan whose model, data, GPU, provider and reasons are attacks."""
    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--tokens", "10M", "--gpu", H100, "--json"])
    document = json.loads(done.stdout)
    plan = document["result"]["recommended"]
    plan["model"] |= {"name": SCRIPT, "source": FORMULA}
    plan["gpu"]["name"] = IMAGE
    for row in plan["cost"]["prices"]:
        row |= {"gpu": IMAGE, "provider": FORMULA, "source": SCRIPT}
    document["result"]["data"]["path"] = FORMULA
    document["result"]["rank"]["reasons"] = [SCRIPT, "\x1b[31mred\x1b[0m", "| a | b |", "x" * 300]
    document["result"]["rejected"]["reason"] = IMAGE
    document["warnings"].append({"code": SCRIPT, "msg": FORMULA, "fix": "`" + IMAGE})
    plan["memory"]["phases"][SCRIPT] = plan["memory"]["phases"].pop("load")
    path = tmp_path_factory.mktemp("hostile") / "plan.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def written(hostile: Path) -> dict[str, Path]:
    """Every file that `budget` writes about it."""
    group = Commands("lora-plan")
    group.add_command(budget)
    files = {
        name: hostile.parent / name
        for name in ("b.html", "b.md", "b.csv", "memory.svg", "capacity.svg", "time.svg", "cost.svg", "total.svg")
    }
    words = [
        "--html",
        str(files["b.html"]),
        "--markdown",
        str(files["b.md"]),
        "--csv",
        str(files["b.csv"]),
        "--hosted-price",
        "3",
    ]
    for name, path in files.items():
        words += ["--plot", str(path)] if name.endswith(".svg") else []
    done = CliRunner().invoke(group, ["budget", str(hostile), *words])
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.stdout
    return files


def test_nothing_in_the_page_runs(written: dict[str, Path]) -> None:
    """Names that are scripts, images and formulas are text in the page, all of them."""
    page = assert_inert(written["b.html"].read_text())
    for attack in (SCRIPT, FORMULA, IMAGE):
        assert attack in page.text


def test_the_page_says_everything(written: dict[str, Path]) -> None:
    """What is bought and why, breakdown, time, memory, capacity, offers, alternatives, assumptions with dates, hash, signature."""
    text = written["b.html"].read_text()
    page = Page(text)
    for word in ("What is bought and why", "Cost breakdown", "Time and cost", "Memory and capacity", "By GPU and provider", "Rent or hosted training",
                 "Alternatives considered", "Every assumption", "Approved by", "to approve", "2025-08-01", "stale", "NOFIT", "--prices"):  # fmt: skip
        assert word in page.text, word
    assert re.search(r"[0-9a-f]{64}", page.text)
    assert page.tags.count("svg") == 5
    assert "Capacity against data: " in written["capacity.svg"].read_text()
    assert "derived from the plan&#x27;s bits per trained token" in text


def test_charts_are_inert_xml(written: dict[str, Path]) -> None:
    """Each SVG is well-formed, loads nothing and holds no script."""
    for name, path in written.items():
        if name.endswith(".svg"):
            tree = ElementTree.fromstring(path.read_text())
            tags = {element.tag.split("}")[1] for element in tree.iter()}
            assert tags <= {"svg", "title", "style", "rect", "polyline", "polygon", "circle", "text"}, tags
            for element in tree.iter():
                assert not [key for key in element.keys() if key.startswith("on") or "href" in key]  # noqa: SIM118


def test_no_spreadsheet_calculates(written: dict[str, Path]) -> None:
    """No text cell begins like a formula; numbers stay numbers; no control character is left."""
    with written["b.csv"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert any(FORMULA in c for row in rows for c in row)
    for row in rows:
        assert len(row) == len(rows[0])
        for c in row:
            try:
                float(c)
            except ValueError:
                assert not c.startswith(("=", "+", "-", "@", "\t", "\r")), c
                assert c.isprintable()


def test_markdown_is_inert(written: dict[str, Path]) -> None:
    """No tag survives, no table cell breaks its row, no link is made."""
    text = written["b.md"].read_text()
    assert "<" not in text
    assert "](" not in text.replace("\\](", "")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1, block


attacks = st.text(max_size=60) | st.sampled_from(
    [SCRIPT, FORMULA, IMAGE, "</style>", "`<b>`", "\x00\x1b]0;x\x07", "\u202egnp", "a|b\n|c"]
)


@given(attacks, attacks)
@settings(max_examples=150, deadline=None)
def test_any_text_is_inert_everywhere(a: str, b: str) -> None:
    """Every kind of block, with any text in every place."""
    d = Document(a, b, footer=a)
    drawing = charts.ranges(a, [charts.Range(b, 1, 2, 3, 2.5)], lambda x: f"{x:g}")
    from lora_planner.pages.document import Figure

    d.add(Heading(a), Prose(a), Prose(b, quiet=True), Figures([(a, b)]), Facts([(a, b)]), Table((a, b), [(a, b), (b, a)]),
          Figure([drawing]), Warnings([(a, b, a)]), Signature(a))  # fmt: skip
    assert_inert(html(d))
    text = markdown(d)
    assert "<" not in text
    for c in (cell(a), cell(b)):
        assert not c.startswith(("=", "+", "-", "@", "\t", "\r", "＝"))
        assert all(sign.isprintable() for sign in c)
    ElementTree.fromstring(charts.svg(drawing))


@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=20), min_size=2, max_size=2
    )
)
@settings(max_examples=50, deadline=None)
def test_numbers_survive_csv(values: list[float | int | str]) -> None:
    """Numbers read back exactly, negative ones too."""
    row = dict(zip("ab", values, strict=True))
    read = next(csv.DictReader(io.StringIO(csv_text([row]), newline="")))
    for name, value in row.items():
        if not isinstance(value, str):
            assert float(read[name]) == float(value)


def test_inert_text_reads_the_same() -> None:
    """Escaping adds signs and takes none away: what Markdown shows is what was given."""
    for text in (SCRIPT, FORMULA, "a_b*c`d|e", "# no heading"):
        shown = html_library.unescape(re.sub(r"\\([\\`*_\[\]|~#!])", r"\1", inert(text)))
        assert shown == text


# ---------------------------------------------------------------- charts


def rects(d: charts.Drawing, ink: str) -> list[charts.Rect]:
    return [s for s in d.shapes if isinstance(s, charts.Rect) and s.ink == ink]


def test_memory_bars_are_to_scale() -> None:
    """A kind twice as large is a bar twice as long, and phases end at their sum; the card's line is at its size."""
    gib = 1024**3
    phases = [
        ("load", [("weights", 10.0 * gib)]),
        ("backward", [("weights", 10.0 * gib), ("logits", 20.0 * gib), ("mask", 5.0 * gib)]),
    ]
    peak = Estimate(30 * gib, 35 * gib, 40 * gib, "B", "fitted")
    d = charts.memory_bars(phases, peak, "backward", 80 * gib, "card")
    weights, logits, rest = (rects(d, ink) for ink in ("a", "b", "c"))
    assert weights[0].width == pytest.approx(weights[1].width)
    assert logits[0].width == pytest.approx(2 * weights[0].width)
    assert rest[0].x == pytest.approx(logits[0].x + logits[0].width)
    scale = weights[0].width / 10
    card = next(s for s in d.shapes if isinstance(s, charts.Line) and s.ink == "alarm")
    assert (card.points[0][0] - weights[0].x) / scale == pytest.approx(80)
    whisker = next(s for s in d.shapes if isinstance(s, charts.Line) and s.ink == "ink")
    assert [(x - weights[0].x) / scale for x, _ in whisker.points] == pytest.approx([30, 40])


def test_the_capacity_axis_is_logarithmic() -> None:
    """Ten times as many bits are as far as from 1 to 10."""
    need = Estimate(1e5, 2e5, 1e6, "bit", "assumed")
    held = Estimate(1e7, 2e7, 1e8, "bit", "fitted")
    d = charts.capacity_bar(need, held, "surely fits")
    a, b = rects(d, "b")[0], rects(d, "a")[0]
    assert a.width == pytest.approx(b.width)
    assert b.x - a.x == pytest.approx(2 * a.width)


def test_shapes_stay_on_the_paper() -> None:
    """Whatever the numbers, nothing is drawn outside the drawing."""
    tiny, huge = Estimate(1e-6, 1e-5, 1e-4, "USD", "fitted"), Estimate(1e6, 1e9, 1e12, "USD", "fitted")
    time = Estimate(1e-3, 1, 1e9, "s", "fitted")
    points = [
        charts.Point("A", "x" * 200, "m", time, tiny, 2.0, 5e-5, True),
        charts.Point("B", "y", "n", time, huge, 1e8, 1e11, False, "LATE"),
    ]
    zero = charts.Range("nothing", 0, 0, 0, 0)
    drawings = [
        charts.front(points, 100.0, 3600.0),
        charts.ranges("r", [charts.Range("a", 1e-6, 1, 1e6, 10), zero], lambda x: f"{x:.2g}", 3.0),
        charts.ranges("r", [zero], lambda x: f"{x:.2g}"),
        charts.memory_bars(
            [("p", [("weights", -1.0), ("logits", 1e12)])], Estimate(1, 2, 3, "B", "fitted"), "p", 1e9, "z" * 99
        ),
        charts.capacity_bar(Estimate(0, 0, 0, "bit", "assumed"), Estimate(0, 1, 1e30, "bit", "fitted"), "contested"),
        capacity_curve(
            Estimate(0, 0, 1e30, "bit", "assumed"),
            Estimate(0, 1, 1e30, "bit", "fitted"),
            "x" * 200,
            Estimate(1, 2, 1e30, "trained tokens", "exact"),
            "y" * 200,
        ),
    ]
    for d in drawings:
        for s in d.shapes:
            if isinstance(s, charts.Line | charts.Area):
                xs, ys = [p[0] for p in s.points], [p[1] for p in s.points]
            elif isinstance(s, charts.Rect):
                xs, ys = [s.x, s.x + s.width], [s.y, s.y + s.height]
            else:
                xs, ys = [s.x], [s.y]
            assert min(xs) >= -0.01, s
            assert max(xs) <= d.width + 0.01, s
            assert min(ys) >= -0.01, s
            assert max(ys) <= d.height + 0.01, s


def contrast(a: str, b: str) -> float:
    """WCAG 2.2, relative luminance."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read(side: int) -> None:
    """Text has 4.5:1 against the paper, bars and lines of data 3:1 (WCAG 2.2 AA)."""
    paper = charts.INKS["paper"][side]
    for name in ("ink", "soft", "alarm"):
        assert contrast(charts.INKS[name][side], paper) >= 4.5, name
    for name in charts.SERIES:
        assert contrast(charts.INKS[name][side], paper) >= 3, name


def test_png_shows_what_svg_shows(tmp_path: Path) -> None:
    """matplotlib draws the same shapes; a $ in a name is no formula to it."""
    image = pytest.importorskip("matplotlib.image")
    d = charts.Drawing("t", "d", 100, 50, [charts.Rect(0, 0, 50, 50, "a"), charts.Text(60, 20, "$x^2$ $", "ink")])
    path = tmp_path / "x.png"
    charts.png(d, str(path), dpi=72)
    pixels = image.imread(path)
    assert pixels.shape[:2] == (50, 100)
    blue = [int(charts.INKS["a"][0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    assert list(pixels[25, 25, :3]) == pytest.approx(blue, abs=0.02)
    assert list(pixels[45, 95, :3]) == pytest.approx([1, 1, 1], abs=0.02)


# ---------------------------------------------------------------- in a browser

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=4000"]  # fmt: skip
#: measures the page in a frame of a phone's width, from outside, as the page itself can run nothing
PROBE = """<!doctype html><meta charset=utf-8><body style="margin:0"><iframe id=f style="width:390px;height:800px;border:0"></iframe>
<pre id=out></pre><script>
let alerts = 0; window.alert = () => alerts++;
const f = document.getElementById("f");
f.onload = () => { const w = f.contentWindow; w.alert = window.alert; const d = f.contentDocument;
  document.getElementById("out").textContent = "RESULT " + JSON.stringify({
    alerts: alerts, scripts: d.scripts.length, images: d.images.length, width: d.documentElement.scrollWidth, headings: d.querySelectorAll("h2").length,
    background: getComputedStyle(d.body).backgroundColor, bar: getComputedStyle(d.querySelector(".f-a")).fill}); };
f.srcdoc = PAGE;
</script>"""


def look(page: str, home: Path, *flags: str) -> dict[str, int | str]:
    """What a browser makes of the page at 390 px."""
    assert BROWSER
    home.mkdir()
    probe = home / "probe.html"
    probe.write_text(PROBE.replace("PAGE", json.dumps(page).replace("</", "<\\/")))
    done = subprocess.run(
        [BROWSER, *FLAGS, *flags, f"--user-data-dir={home / 'profile'}", "--window-size=1200,900", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"RESULT (\{.*?\})", done.stdout)
    assert found, done.stderr[-2000:]
    result: dict[str, int | str] = json.loads(html_library.unescape(found[1]))
    return result


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(written: dict[str, Path], tmp_path: Path) -> None:
    """No script and no image element comes out of the attacks, nothing is wider than a phone, and dark is dark."""
    page = written["b.html"].read_text()
    light = look(page, tmp_path / "light", "--blink-settings=preferredColorScheme=1")
    dark = look(page, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    for seen in (light, dark):
        assert (seen["alerts"], seen["scripts"], seen["images"]) == (0, 0, 0)
        assert seen["width"] == 390
        assert int(seen["headings"]) >= 8
    assert (light["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    assert light["bar"] != dark["bar"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_probe_would_see_an_attack(tmp_path: Path) -> None:
    """The same probe on a page that does not escape finds the script and the image: the test above can fail."""
    attack = f"{SCRIPT}{IMAGE}".replace("alert(1)", "0")  # an open alert would stop the browser
    bad = f"<body class=f-a><h2>{attack}</h2><p style='width:900px'>wide</p>"
    seen = look(bad, tmp_path / "bad")
    assert int(seen["scripts"]) >= 1
    assert int(seen["images"]) >= 1
    assert int(seen["width"]) > 390


def test_pages_carry_todays_date(written: dict[str, Path]) -> None:
    """A report is of its day."""
    assert date.today().isoformat() in Page(written["b.html"].read_text()).text
