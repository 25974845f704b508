"""Curves without a library, and what own runs put into them: to scale, inside the picture, and nothing nobody measured."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from calibrate import own_runs
from calibrate.stats import ratio_interval
from lora_planner import capacity, units
from lora_planner.capacity import rl_need, sft_need, verdict
from lora_planner.cli import main
from lora_planner.ledger import Estimate, exact
from lora_planner.pages import budget_report, plan_file
from lora_planner.pages.charts import Area, Dot, Drawing, Line, Rect, Text, png, svg
from lora_planner.pages.curves import Axis, capacity_curve, curve, domain, room
from lora_planner.record import DIVERGED, FINISHED, Plot, RunRecord, RunSpec, Series, line, read_events, read_runs
from lora_planner.render import interval

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "reports/runs"
INF = math.inf
BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)  # fmt: skip


@cache
def cpu_runs() -> list[RunRecord]:
    return read_runs(RUNS / "cpu.jsonl")


# ---------------------------------------------------------------- drawing


def boxes(d: Drawing) -> list[tuple[float, float, float, float]]:
    """Each text as left, top, right, bottom, by the width that curves leaves for it."""
    found = []
    for t in d.shapes:
        if isinstance(t, Text) and t.text:
            width = room(t.text, t.size, t.bold)
            left = t.x - {"start": 0.0, "middle": width / 2, "end": width}[t.anchor]
            found.append((left, t.y - t.size * 0.76, left + width, t.y + t.size * 0.24))
    return found


def assert_apart(found: Sequence[Sequence[float]], d: Drawing) -> None:
    for left, top, right, bottom in found:
        assert -0.1 <= left <= right <= d.width + 0.1
        assert -0.1 <= top <= bottom <= d.height + 0.1
    for i, a in enumerate(found):
        for b in found[:i]:
            assert a[2] <= b[0] + 0.1 or b[2] <= a[0] + 0.1 or a[3] <= b[1] + 0.1 or b[3] <= a[1] + 0.1, (a, b)


def assert_inside(d: Drawing) -> None:
    for s in d.shapes:
        if isinstance(s, Line | Area):
            points = list(s.points)
        elif isinstance(s, Rect):
            points = [(s.x, s.y), (s.x + s.width, s.y + s.height)]
        else:
            points = [(s.x, s.y)]
        for x, y in points:
            assert -8 <= x <= d.width + 8 and -8 <= y <= d.height + 8, s
            assert math.isfinite(x) and math.isfinite(y)


def discs(d: Drawing) -> list[tuple[float, float]]:
    """Markers of the first name, the one in the legend left out."""
    return [(s.x, s.y) for s in d.shapes if isinstance(s, Dot)][:-1]


@pytest.mark.parametrize("log", [False, True])
def test_points_are_to_scale(log: bool) -> None:
    """Equal steps of the axis are equal lengths, up is more, right is more."""
    values = (1.0, 10.0, 100.0) if log else (1.0, 2.0, 3.0)
    d = curve(Plot("t", "x", "y", (Series("a", values, values, style="points"),), log, log))
    (x0, y0), (x1, y1), (x2, y2) = discs(d)
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y1 < y0


def test_an_axis_reads_as_its_labels_say() -> None:
    """A grid line stands where a point of that value would."""
    d = curve(Plot("t", "x", "y", (Series("a", (0.0, 40.0), (4.5, 5.0), style="points"),)))
    lines = {s.points[0][1]: s for s in d.shapes if isinstance(s, Line) and s.ink == "grid" and s.points[0][1] == s.points[1][1]}  # fmt: skip
    labelled = {float(s.text): s.y - 3.5 for s in d.shapes if isinstance(s, Text) and s.anchor == "end"}
    assert set(labelled) >= {4.5, 5.0}
    for value, y in zip((4.5, 5.0), (y for _, y in discs(d)), strict=True):
        assert labelled[value] == pytest.approx(y)
        assert any(at == pytest.approx(y) for at in lines)


@given(
    st.lists(st.floats(1e-9, 1e12) | st.floats(-1e6, 1e6), min_size=1, max_size=9),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_ticks_are_round_and_tell_apart(values: list[float], log: bool) -> None:
    """A label says its value to the digits shown, no two are alike, and each is a multiple of 1, 2 or 5."""
    low, high = domain([abs(v) for v in values] if log else values, log)
    found = Axis(low, high, log, 0, 330).labels(None, lambda text: room(text, 10))
    assert len({text for _, text in found}) == len(found)
    for value, text in found:
        assert low <= value <= high
        assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-6, abs=1e-9 * (high - low))
    steps = [b - a for (a, _), (b, _) in pairwise(found)]
    if len(steps) > 1 and max(steps) < 1.01 * min(steps):
        lead = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert any(lead == pytest.approx(m, rel=1e-6) for m in (1, 2, 5, 10))


def test_what_has_no_value_is_a_cross_and_no_point() -> None:
    """Diverged runs stand above the axis, one below another; NaN and what a log axis cannot hold are left out."""
    series = (
        Series("a", (1.0, 2.0, 3.0), (5.0, 4.0, math.nan), style="points"),
        Series("a", (4.0,), (INF,), style="points"),
        Series("b", (4.0, 5.0), (INF, 0.0), style="points"),
    )
    d = curve(Plot("t", "x", "y", series, y_log=True))
    assert len(discs(d)) == 2
    strip = next(s for s in d.shapes if isinstance(s, Rect) and s.ink == "band")
    crosses = [s for s in d.shapes if isinstance(s, Line) and s.width == 1.6 and len(s.points) == 2 and s.points[0][1] < strip.y + strip.height]  # fmt: skip
    assert len(crosses) == 4
    assert len({s.ink for s in crosses}) == 2
    assert all(strip.y <= y <= strip.y + strip.height for s in crosses for _, y in s.points)
    assert all(y > strip.y + strip.height for _, y in discs(d))


def test_an_interval_without_end_runs_out_of_the_picture() -> None:
    """A band from minus infinity begins at the axis, and its end does not move the axis."""
    open_, closed = (
        curve(Plot("t", "x", "y", (Series("a", (1.0, 2.0), (3.0, 3.0), (low, low), (4.0, 4.0)),)))
        for low in (-INF, 2.0)
    )
    band = next(s for s in open_.shapes if isinstance(s, Area))
    grid = [y for s in open_.shapes if isinstance(s, Line) and s.ink == "grid" for _, y in s.points]
    assert max(y for _, y in band.points) == pytest.approx(max(grid))
    bounded = next(s for s in closed.shapes if isinstance(s, Area))
    assert max(y for _, y in bounded.points) < max(grid)


def test_a_name_has_one_colour_and_one_place_in_the_legend() -> None:
    series = (Series("a", (1, 2, 3), (1, 2, 3), style="points"), Series("a", (1, 3), (1, 3), style="fit"), Series("b", (1, 2, 3), (3, 2, 1)))  # fmt: skip
    d = curve(Plot("t", "x", "y", series))
    assert [s.text for s in d.shapes if isinstance(s, Text) and s.text in ("a", "b")] == ["a", "b"]
    dashed = next(s for s in d.shapes if isinstance(s, Line) and s.dashed)
    solid = next(s for s in d.shapes if isinstance(s, Line) and s.width == 1.6)
    assert dashed.ink == next(s.ink for s in d.shapes if isinstance(s, Dot)) != solid.ink


numbers = (
    st.floats(allow_nan=True, allow_infinity=True) | st.floats(-10, 10) | st.sampled_from([0.0, 1e-320, 1e308, 5e-4])
)
texts = st.text(max_size=80) | st.sampled_from(["<script>", "M" * 200, "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 60, "a b " * 60, "", "=1+1"])  # fmt: skip


@st.composite
def plots(draw: st.DrawFn) -> Plot:
    series = []
    for _ in range(draw(st.integers(0, 12))):
        n = draw(st.integers(0, 20))
        x, y, low, high = (tuple(draw(st.lists(numbers, min_size=n, max_size=n))) for _ in range(4))
        band = draw(st.booleans())
        series.append(Series(draw(texts), x, y, low if band else (), high if band else (), draw(st.sampled_from(["line", "points", "fit"]))))  # fmt: skip
    return Plot(draw(texts), draw(texts), draw(texts), tuple(series), draw(st.booleans()), draw(st.booleans()))


@given(plots())
@settings(max_examples=100, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_whatever_the_plot_nothing_leaves_the_drawing(plot: Plot) -> None:
    """Any numbers and any text: shapes are inside, texts apart, the SVG is XML."""
    d = curve(plot)
    assert_inside(d)
    assert_apart(boxes(d), d)
    ElementTree.fromstring(svg(d))


def example_drawings() -> list[Drawing]:
    own = own_runs.groups(cpu_runs())
    found = [curve(plot) for plot in (*own_runs.sweep_plots(own), *own_runs.loss_plots(own))]
    long = tuple(Series(f"{name} {i}", (1e-5 * 3**i, 1e-4, 1e-1), (1e-9, 1e9, INF)) for i in range(9) for name in ("LoRA MMMMWWWW of all layers " * 3,))  # fmt: skip
    found.append(curve(Plot("A VERY LONG TITLE WITH WWW AND MMM " * 5, "steps " * 40, "loss " * 50, long, True, True)))
    need = sft_need(1e6).bits
    return [*found, capacity_curve(need, HELD, "surely fits", MILLION, "LoRA r16, " + "q_proj," * 30)]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_texts_are_apart_in_a_browser(tmp_path: Path) -> None:
    """Measured by the browser, in the font that it has: no text overlaps another or leaves the drawing."""
    assert BROWSER
    drawings = example_drawings()
    probe = """<script>
    document.title = ""; const all = [...document.querySelectorAll("svg")].map(s => [...s.querySelectorAll("text")].map(t => {
      const b = t.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height]; }));
    document.body.innerHTML = "RESULT " + JSON.stringify(all);</script>"""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><body>" + "".join(svg(d, alone=False) for d in drawings) + probe
    )
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"RESULT (\[.*?\])</body>", done.stdout, re.S)
    assert found, done.stderr[-2000:]
    seen = json.loads(unescape(found[1]))
    assert len(seen) == len(drawings)
    for d, rows in zip(drawings, seen, strict=True):
        assert len(rows) > 4
        # a browser's box is the font's line, of which letters fill the middle
        assert_apart([(left, top + 0.2 * (bottom - top), right, bottom - 0.15 * (bottom - top)) for left, top, right, bottom in rows], d)  # fmt: skip


def test_a_png_shows_the_band(tmp_path: Path) -> None:
    """matplotlib draws areas too, so that the grid shows through."""
    image = pytest.importorskip("matplotlib.image")
    d = Drawing("t", "d", 40, 40, [Area(((0, 0), (20, 0), (20, 40), (0, 40)), "a", 0.5)])
    png(d, str(tmp_path / "x.png"), dpi=72)
    pixels = image.imread(tmp_path / "x.png")
    half = [(int(c, 16) / 255 + 1) / 2 for c in ("00", "72", "b2")]
    assert list(pixels[20, 10, :3]) == pytest.approx(half, abs=0.02)
    assert list(pixels[20, 30, :3]) == pytest.approx([1, 1, 1])


# ---------------------------------------------------------------- need against capacity

HELD, MILLION = capacity.capacity(8e9, 4e7), exact(1e6, "trained tokens")


def test_need_follows_tokens_and_capacity_does_not() -> None:
    """The band at the plan's tokens is what planning them says, at ten times as many ten times that; the adapter's is flat."""
    need, ten, held = sft_need(1e6).bits, sft_need(1e7).bits, HELD
    d = capacity_curve(need, held, "surely fits", MILLION, "LoRA r16, all-linear")
    data, adapter = (
        s for s in d.shapes if isinstance(s, Area) and s.opacity < 1 and s.points[1][0] - s.points[0][0] > 50
    )
    xs, tops = [x for x, _ in data.points[:2]], [y for _, y in data.points[:2]]
    bottoms = [y for _, y in reversed(data.points[2:])]
    assert tops[0] - bottoms[0] == pytest.approx(tops[1] - bottoms[1])
    assert len({round(y, 6) for _, y in adapter.points}) == 2
    # four decades wide; the ends differ by four decades of bits
    decades = 4 * (math.log10(held.high / held.low) / (adapter.points[2][1] - adapter.points[1][1])) ** -1
    assert bottoms[0] - bottoms[1] == pytest.approx(decades)
    assert need.high / need.low == pytest.approx(ten.high / ten.low)
    bar = next(s for s in d.shapes if isinstance(s, Line) and s.width == 1.1)
    assert bar.points[0][0] == pytest.approx(sum(xs) / 2)
    assert bar.points[0][1] - bar.points[1][1] == pytest.approx(bottoms[0] - tops[0])
    assert "derived from the plan's bits per trained token" in d.description


def test_the_meeting_point_is_where_the_verdict_turns() -> None:
    """At the tokens that the description names the need's high end is the capacity's low end."""
    d = capacity_curve(sft_need(1e6).bits, HELD, "surely fits", MILLION, "r16")
    at = re.search(r"at ([\d.]+)([kMB]) trained tokens", d.description)
    assert at
    tokens = float(at[1]) * {"k": 1e3, "M": 1e6, "B": 1e9}[at[2]]
    assert sft_need(tokens).bits.high == pytest.approx(HELD.low, rel=0.01)
    words = {verdict(sft_need(tokens * f), 8e9, 4e7).judgements[2].verdict for f in (0.9, 1.1)}
    assert len(words) == 2


def test_episodes_are_an_axis_too() -> None:
    """An RL need begins at 0 bits: its band runs out of the picture, and the unit is the episode."""
    need = rl_need(10_000, 16, 0.3).bits
    d = capacity_curve(need, HELD, "surely fits", exact(160_000, "episodes"), "LoRA r8")
    assert_inside(d)
    said = " ".join(s.text for s in d.shapes if isinstance(s, Text))
    assert "0.881 [0, 0.881] bit an episode" in said
    assert "160k episodes" in said


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (("--tokens", "10M"), (3e6, 1e7, 1e7, "trained tokens")),
        (("--tokens", "10M", "--epochs", "3", "--first-epoch-loss", "0.9"), (3e6, 1e7, 1e7, "trained tokens")),
        (("--tokens", "10M", "--rl", "--problems", "1000", "--group", "16", "--epochs", "2"), (32e3, 32e3, 32e3, "episodes")),
    ],
)  # fmt: skip
def test_a_plan_says_what_its_need_grows_with(words: tuple[str, ...], seen: tuple[Any, ...]) -> None:
    """Tokens count once however many epochs, episodes in every pass; the chart's point is the plan's own."""
    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--gpu", "h100-sxm-80gb", *words, "--json"])
    sheet = plan_file.sheet(json.loads(done.stdout), "plan")
    assert sheet.seen
    assert (sheet.seen.low, sheet.seen.value, sheet.seen.high, sheet.seen.unit) == seen
    d = budget_report.capacity_chart(sheet)
    assert d
    assert any(interval(sheet.seen, units.count) in s.text for s in d.shapes if isinstance(s, Text))


# ---------------------------------------------------------------- own runs

BASE = RunSpec("base", "shift", steps=40, method="full", alpha=0.0)
LORA = replace(BASE, method="lora", rank=8, alpha=32.0)
RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
#: Llama 3.2 1B, and a model too small for anything to be predicted
LARGE = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}  # fmt: skip
SMALL = LARGE | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def run(spec: RunSpec, end: float | None, config: dict[str, Any] | None = None, start: float = 5.0) -> RunRecord:
    path = [[0, start], [20, (start + (end or 0)) / 2], [30, end], [40, end]] if end is not None else [[0, start]]
    predicted = {"step_s": Estimate(0.5, 1.0, 2.0, "s", "fitted")}
    measured = {"held_out": path, "losses": [start, start - 0.1], "step_s": [1.1] * 5}
    return RunRecord(
        spec.key, spec, config or SMALL, predicted, FINISHED if end is not None else DIVERGED, measured=measured
    )


def u(spec: RunSpec, best: float, floor: float, seeds: Sequence[int] = (0,), rates: Sequence[float] = RATES) -> list[RunRecord]:  # fmt: skip
    """Runs on an exact parabola; the vertex moves a little from seed to seed."""
    return [run(replace(spec, lr=rate, seed=seed), floor + 0.2 * (math.log(rate / best) - 0.05 * seed) ** 2)
            for seed in seeds for rate in rates]  # fmt: skip


def test_a_planted_optimum_is_found_with_its_interval() -> None:
    """The best rate is the geometric mean over seeds, its interval Student's, the parabola the planted one."""
    (group,) = own_runs.groups(u(BASE, 4e-4, 4.0, seeds=(0, 1, 2)))
    (a,) = group.arms
    assert a.rate
    logs = [math.log(4e-4) + 0.05 * seed for seed in range(3)]
    expected = ratio_interval(logs)
    assert (a.rate.low, a.rate.value, a.rate.high) == pytest.approx((expected.low, expected.value, expected.high))
    assert (a.loss, a.curvature) == pytest.approx((4.0, 0.4))
    (plot,) = own_runs.sweep_plots([group])
    points, fit, best = plot.series
    assert points.style == "points"
    for rate, loss in zip(fit.x, fit.y, strict=True):
        assert loss == pytest.approx(4.0 + 0.2 * math.log(rate / a.rate.value) ** 2)
    assert best.x == pytest.approx((a.rate.low, a.rate.high))
    assert best.low == (-INF, -INF)
    assert f"[{a.rate.low:.1e}".replace("e-0", "e-") in best.name


def test_one_seed_has_an_optimum_and_no_interval() -> None:
    (group,) = own_runs.groups(u(BASE, 4e-4, 4.0))
    plot = own_runs.sweep_plots([group])[0]
    assert group.arms[0].optimum == "4.0e-4, one seed"
    assert [s.x for s in plot.series if s.low == (-INF,)] == [pytest.approx((4e-4,))]


@pytest.mark.parametrize(
    ("best", "said"),
    [(1e-2, "at the high edge"), (1e-6, "at the low edge"), (9e-4, "1 rate above the best")],
)
def test_no_optimum_is_named_where_none_is_bracketed(best: float, said: str) -> None:
    """At an edge, or with one rate beside it: the points are joined, and there is no parabola and no interval."""
    (group,) = own_runs.groups(u(BASE, best, 4.0))
    assert group.arms[0].optimum == f"no optimum: {said}"
    (plot,) = own_runs.sweep_plots([group])
    assert {s.style for s in plot.series} == {"points", "line"}
    assert all(f"no optimum: {said}" in s.name for s in plot.series)


def test_diverged_rates_are_marked_and_have_no_loss() -> None:
    """A diverged rate, and one that ended worse than it began, is a cross at its rate; the others are a curve."""
    runs = [*u(BASE, 4e-4, 4.0), run(replace(BASE, lr=6.4e-3), None), run(replace(BASE, lr=3.2e-3), 5.5)]
    (plot,) = own_runs.sweep_plots(own_runs.groups(runs))
    lost = [s for s in plot.series if INF in s.y]
    assert [s.x for s in lost] == [(3.2e-3, 6.4e-3)]
    assert all(max(s.y) < 5 for s in plot.series if s not in lost)
    assert "cross" in plot.y_label
    assert "cross" not in own_runs.sweep_plots(own_runs.groups(u(BASE, 4e-4, 4.0)))[0].y_label


def test_the_rule_is_that_of_the_claims() -> None:
    """The same optima as the verdicts on the paper's claims, of the same runs, to the last digit."""
    lab, shared = pytest.importorskip("runner.claims.lab"), pytest.importorskip("runner.claims.shared")
    assert own_runs.NEAR == lab.NEAR
    runs, size = [r for r in cpu_runs() if r.spec.seed in lab.SEEDS], lab.SIZES["cpu"]
    found = {(lab.base_name(a.arm.base), a.arm.task.split(",")[0], a.runs[0].spec.steps, a.arm.name): a
             for group in own_runs.groups(runs) for a in group.arms}  # fmt: skip
    for design in (shared.full(size), *(shared.lora(size, rank) for rank in size.ranks)):
        name = "full" if design.method == "full" else f"lora r{design.rank} all-linear,unembed"
        expected = ratio_interval(shared.log_rates(runs, design))
        assert found[size.base, "shift", size.steps, name].rate == expected


def test_no_band_that_nobody_predicted() -> None:
    """A LoRA arm of a model of 1B beside a full one has the end that the planner predicts; no other arm has any."""
    runs = [run(BASE, 4.0, LARGE), run(LORA, 4.1, LARGE), run(replace(LORA, method="lora-fa"), 4.2, LARGE)]
    (group,) = own_runs.groups(runs)
    full = group.arms[0]
    ends = {a.arm.name: own_runs.predicted_end(a, a.runs[0], full) for a in group.arms}
    assert [name for name, end in ends.items() if end] == ["lora r8"]
    total = own_runs.from_config(LARGE).total
    penalty, end = capacity.rank_penalty(8, total), ends["lora r8"]
    assert end
    assert (end.low, end.value, end.high) == pytest.approx(tuple(4.0 * (1 + p) for p in (penalty.low, penalty.value, penalty.high)))  # fmt: skip

    def bands(some: list[RunRecord]) -> list[Series]:
        return [s for plot in own_runs.loss_plots(own_runs.groups(some)) for s in plot.series if s.low]

    assert len(bands(runs)) == 1
    assert bands(runs)[0].x[-1] == 40.0
    assert not bands([replace(r, config=SMALL) for r in runs])
    assert not bands(runs[1:]), "nothing to add the penalty to"
    assert not bands(cpu_runs())


def test_many_arms_are_several_pictures() -> None:
    """The first arm is in each, every other in one, and none is alone."""
    runs = [r for rank in range(1, 11) for r in u(replace(LORA, rank=rank), 4e-4, 4.2)] + u(BASE, 4e-4, 4.0)
    plots = own_runs.sweep_plots(own_runs.groups(runs))
    names = [list(dict.fromkeys(s.name.split(":")[0] for s in plot.series)) for plot in plots]
    assert all(some[0] == "full" and 3 <= len(some) <= 5 for some in names)
    assert sorted(name for some in names for name in some[1:]) == sorted(f"lora r{rank}" for rank in range(1, 11))


# ---------------------------------------------------------------- the command


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["report", *words])


def journal(path: Path, runs: Sequence[RunRecord]) -> Path:
    lines = []
    for r in runs:
        predicted = {name: asdict(e) for name, e in r.predicted.items()}
        lines += [line({"event": "planned", "key": r.key, "spec": r.spec.to_json(), "config": r.config, "predicted": predicted}),
                  line({"event": "ended", "key": r.key, "status": r.status, "measured": r.measured})]  # fmt: skip
    path.write_text("".join(lines))
    return path


def test_pictures_change_no_byte_of_the_markdown(tmp_path: Path) -> None:
    """--html and --plot add files; several charts are numbered, one keeps its name."""
    words = ["--to", str(tmp_path / "o.md"), "--html", str(tmp_path / "o.html"), "--plot", str(tmp_path / "sweep.svg"),
             "--plot", str(tmp_path / "loss-curves.svg")]  # fmt: skip
    assert invoke(str(RUNS / "verify-cpu.jsonl"), *words).exit_code == 0
    assert (tmp_path / "o.md").read_text() == (ROOT / "reports/own-runs.md").read_text()
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["loss-curves-1.svg", "loss-curves-2.svg", "sweep-1.svg", "sweep-2.svg"]  # fmt: skip
    single = journal(tmp_path / "one.jsonl", u(BASE, 4e-4, 4.0))
    assert invoke(str(single), "--plot", str(tmp_path / "sweep-alone.svg")).exit_code == 0
    assert "4.0e-4, one seed" in (tmp_path / "sweep-alone.svg").read_text()


def test_the_page_says_everything(tmp_path: Path) -> None:
    """Ratios, statuses, misses, sweeps with optima, curves, noise floor, damaged lines."""
    runs = [*u(BASE, 4e-4, 4.0, seeds=(0, 1)), *u(LORA, 1e-2, 4.2), run(replace(BASE, lr=1e-2), None)]
    repeat = run(replace(BASE, lr=4e-4, repeat=1), 4.25)
    bad = replace(repeat, spec=replace(repeat.spec, seed=7), measured=repeat.measured | {"step_s": [9.0] * 5})
    path = journal(tmp_path / "runs.jsonl", [*runs, repeat, replace(bad, key="f" * 16)])
    path.write_text(path.read_text() + "torn\n")
    done = invoke(str(path), "--html", str(tmp_path / "o.html"))
    assert done.exit_code == 0, done.output
    text = unescape((tmp_path / "o.html").read_text())
    for word in ("Predicted against measured", "Runs by status", "Worst misses", "Learning rates", "Loss over steps", "0.25 nats", "noise floor",
                 "no optimum: at the high edge", "W-DAMAGED", "skipped line", "half-widths off",
                 "1 diverged", "1.0e-2", "f" * 16, "In bold"):  # fmt: skip
        assert word in text, word
    assert text.count("<svg") == 3
    assert re.search(r"\d\.\de-4 \[\d", text)


def test_names_from_a_journal_are_inert(tmp_path: Path) -> None:
    """A journal may come from anybody: its task, its method and its device are text."""
    from tests.test_pages import FORMULA, IMAGE, SCRIPT, assert_inert

    hostile = replace(LORA, base=IMAGE, task=SCRIPT, targets=(FORMULA,))
    path = journal(tmp_path / "runs.jsonl", [*u(hostile, 4e-4, 4.0), *u(replace(hostile, method="full"), 4e-4, 3.9)])
    words = ["--to", str(tmp_path / "o.md"), "--html", str(tmp_path / "o.html"), "--plot", str(tmp_path / "sweep.svg")]
    done = invoke(str(path), *words)
    assert done.exit_code == 0, done.output
    page = assert_inert((tmp_path / "o.html").read_text())
    assert SCRIPT in page.text
    tree = ElementTree.fromstring((tmp_path / "sweep.svg").read_text())
    assert {e.tag.split("}")[1] for e in tree.iter()} <= {"svg", "title", "style", "rect", "polyline", "polygon", "circle", "text"}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--html", "x.html"], 2, "of own runs"),
        (["{runs}", "--claims", "--plot", "sweep.svg"], 2, "without --claims"),
        (["{runs}", "--plot", "curve.svg"], 2, "Name a file sweep or loss"),
        (["{runs}", "--plot", "sweep.pdf"], 2, ".svg or .png"),
        (["{runs}", "--plot", "sweep.svg"], 3, "no arm was run at two learning rates"),
        (["{runs}", "--html", "."], 3, "not a plain file"),
        (["missing.jsonl", "--html", "x.html"], 3, "there is no such journal"),
    ],
)
def test_bad_words_are_one_line(words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Cause, place and fix, and nothing is written."""
    path = journal(tmp_path / "runs.jsonl", [run(BASE, 4.0)])
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    done = invoke(*(word.format(runs=path) for word in words))
    assert not list(here.iterdir())
    assert done.exit_code == code, done.output
    assert said in done.output
    assert "Traceback" not in done.output


def test_an_empty_journal_is_a_page(tmp_path: Path) -> None:
    """Nothing planned, nothing drawn, and the page says so."""
    (tmp_path / "runs.jsonl").write_text("")
    assert invoke(str(tmp_path / "runs.jsonl"), "--html", str(tmp_path / "o.html")).exit_code == 0
    text = (tmp_path / "o.html").read_text()
    assert "Nothing was both predicted and measured." in text
    assert "No arm was run at two learning rates." in text
    assert not read_events(tmp_path / "runs.jsonl")[0]
