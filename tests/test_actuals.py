"""What was spent against the bill: the causes add up, the re-forecast learns, and a usage file is read strictly."""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from dataclasses import replace
from datetime import date, timedelta
from math import fsum
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_planner.actuals import (
    CAUSES,
    KINDS,
    SO_FAR,
    Actuals,
    Spent,
    actuals,
    cents,
    learnt_share,
    measured_factor,
    paid_price,
)
from lora_planner.budget import Part, Settings, budget
from lora_planner.cli import Commands, main
from lora_planner.commands.budget import budget as command
from lora_planner.errors import BadInput
from lora_planner.facts import Price, gpus
from lora_planner.ledger import Estimate
from lora_planner.pages.usage_file import MAX_BYTES, Usage, read
from lora_planner.units import GIB

TODAY = date(2026, 11, 27)
ROOT = Path(__file__).parents[1]


def sure(value: float, unit: str = "share") -> Estimate:
    return Estimate(value, value, value, unit, "exact")


def price(usd: float, gpu: str = "g", provider: str = "p") -> Price:
    return Price(gpu, usd, provider, "on-demand", "s", TODAY)


#: every share is known, so that the bill is arithmetic: 20.3 GPU-hours at 2 USD and 8.40 of storage
PLAIN = Settings(rates=4, ranks=2, sweep_share=0.25, seeds=3, evaluation=sure(0.1), failed=sure(0.2), idle=sure(0.5),
                 setup=sure(1800, "s"), checkpoints=2, months=2, storage=sure(0.1, "USD/GiB-month"))  # fmt: skip
PART = Part("m", "g", sure(7200, "s"), 1000, 5, False, sure(1e6, "tokens"), 1 * GIB, 2 * GIB, 16 * GIB, (price(2.0),))
#: nothing is known but the counts
UNSURE = Settings(rates=4, ranks=2, seeds=3)
G = replace(
    PART,
    run_s=Estimate(3600, 7200, 14400, "s", "fitted"),
    prices=(price(1.0), price(2.0, provider="q"), price(5.0, provider="r")),
)
H = replace(
    G,
    model="n",
    gpu="h",
    run_s=Estimate(5000, 9000, 12000, "s", "fitted"),
    prices=(price(0.7, "h"), price(1.1, "h", "q")),
)


def run(kind: str, hours: float, usd: float, runs: int = 1, finished: bool = True, part: int = 0) -> Spent:
    return Spent(
        kind, "" if kind == "storage" else "gh"[part], None if kind == "storage" else part, hours, usd, runs, finished
    )


#: eight sweep runs and one final run a third slower than predicted, one under way, everything at 2.50 an hour
HALFWAY = [
    run("setup", 0.5, 1.25, 0), run("sweep", 5, 12.5, 8), run("final", 3, 7.5), run("failed", 2, 5), run("evaluation", 1, 2.5, 0),
    run("idle", 3, 7.5, 0), run("final", 1, 2.5, finished=False), run("storage", 0, 3, 0, False),
]  # fmt: skip


def exact_sum(a: Actuals) -> bool:
    """The causes are whole cents and add up to what was spent less the p50, both in cents."""
    each = [round(c.usd * 100) for c in a.causes]
    assert all(abs(c.usd * 100 - n) < 1e-6 for c, n in zip(a.causes, each, strict=True))
    by_name = sum(round(usd * 100) for usd in a.by_cause().values())
    return (
        sum(each) == by_name == round(a.spent_usd * 100) - round(a.planned_usd * 100) == round(a.difference_usd * 100)
    )


# ---------------------------------------------------------------- golden: by hand


def test_causes_by_hand() -> None:
    """Half a project, as on paper: each cause to the cent."""
    a = actuals(budget([PART], PLAIN, TODAY), HALFWAY)
    # 15.5 h at 2.50 instead of 2.00: 7.75. Finished: 8 h, predicted 8 x 0.5 + 2 = 6: 2 h x 2. Done: 6 of 10 h.
    # Failed 2 h, 0.6 x 2.2 planned: 0.68 x 2. Evaluation 1 h, 0.6 x 1 planned: 0.4 x 2.
    # Idle and set-up 3.5 h, 0.6 x 6.6 + 0.5 planned: -0.96 x 2. Left: 1 of 2 x 2 h, 0.4 x (1 + 2.2 + 6.6): -6.92 x 2,
    # and 3 of 8.40 for storage: -5.40.
    assert a.by_cause() == pytest.approx({
        "price": 7.75, "time": 4.0, "reruns": 1.36, "evaluation": 0.8, "idle and set-up": -1.92, "storage": 0.0,
        "still to do": -19.24, "allowance in the p50": 0.0,
    })  # fmt: skip
    assert (a.spent_usd, a.difference_usd, a.so_far_usd) == (41.75, -7.25, 11.99)
    assert exact_sum(a)


def test_forecast_by_hand() -> None:
    """Two of three final runs left, at the measured time and the paid price, one of them begun."""
    a = actuals(budget([PART], PLAIN, TODAY), HALFWAY)
    # 2 x 2 h x 4/3 - 1 h = 4.333 h; shares 0.1, 0.2, 0.5 moved by 0.6 to 1/9, 2/10, 3/12
    e, f, i = (planned**0.4 * measured**0.6 for planned, measured in ((0.1, 1 / 9), (0.2, 0.2), (0.5, 0.25)))
    hours = (13 / 3) * (1 + e) * (1 + f) * (1 + i)
    assert a.left_hours.p50 == pytest.approx(hours, rel=0.01)
    assert a.left.p50 == pytest.approx(2.5 * hours + 5.4, rel=0.01)
    assert a.forecast.p50 == pytest.approx(a.spent_usd + a.left.p50)
    assert a.approve_usd == pytest.approx(a.forecast.p90)
    assert fsum(item.spent for item in a.items) == pytest.approx(a.spent_usd)
    assert fsum(item.left_p50 for item in a.items) == pytest.approx(a.left.p50)
    assert fsum(item.left_p90 for item in a.items) == pytest.approx(a.left.p90)


def test_runs_beyond_the_plan_are_reruns() -> None:
    """Five final runs instead of three, as long and as dear as predicted: two runs too many, nothing else."""
    plain = replace(PLAIN, rates=0, evaluation=sure(0), failed=sure(0), idle=sure(0), setup=sure(0, "s"), months=0)
    b = budget([PART], plain, TODAY)
    five = actuals(b, [run("final", 10, 20, 5)])
    assert {name: usd for name, usd in five.by_cause().items() if usd} == {"reruns": 8.0}
    assert five.left.p95 == 0
    # and so is a fourth one under way; 3 of 3 are done
    more = actuals(b, [run("final", 6, 12, 3), run("final", 1, 2, finished=False)])
    assert {name: usd for name, usd in more.by_cause().items() if usd} == {"reruns": 2.0}
    assert [(a.cards[0].runs_beyond, a.cards[0].runs_left) for a in (five, more)] == [(2, 0), (1, 0)]


# ---------------------------------------------------------------- relations


def test_without_a_line_the_forecast_is_the_bill() -> None:
    """Nothing spent, nothing learnt: all that differs is what is still to do and the allowance."""
    b = budget([G, H], UNSURE, TODAY)
    a = actuals(b, [])
    assert [a.forecast.p05, a.forecast.p50, a.forecast.p90] == pytest.approx([b.total.p05, b.total.p50, b.total.p90])
    assert [i.left_p50 for i in a.items] == pytest.approx([i.usd_p50 for i in b.items])
    assert a.approve_usd == pytest.approx(b.approve_usd)
    assert not any(a.by_cause(SO_FAR).values())
    assert a.by_cause()["allowance in the p50"] < 0
    assert exact_sum(a)


def test_a_project_that_goes_as_planned_has_no_variance() -> None:
    """Half of all runs with half of all else at the planned price: every cause so far is nought, on both GPUs."""
    b = budget([G, H], UNSURE, TODAY)
    lines = []
    for i, (part, usd) in enumerate(((G, 2.0), (H, 0.9))):
        hour = part.run_s.value / 3600
        sweep, final = hour / 4, hour
        training = 4 * sweep + 1.5 * final
        evaluation = 0.10 * training
        failed = 0.15 * (training + evaluation)
        idle = 0.15 * (training + evaluation + failed)
        # 2 of 3 final runs and 2 of 8 sweep runs are as much work as half of each
        share = (2 * sweep + 2 * final) / (2 * training)
        for kind, hours, runs in (("sweep", 2 * sweep, 2), ("final", 2 * final, 2), ("evaluation", 2 * share * evaluation, 0),
                                  ("failed", 2 * share * failed, 1), ("idle", 2 * share * idle, 0), ("setup", 0.5, 0)):  # fmt: skip
            lines.append(run(kind, hours, hours * usd, runs, part=i))
    a = actuals(b, lines)
    assert a.by_cause(SO_FAR) == pytest.approx(dict.fromkeys(SO_FAR, 0.0), abs=0.02)
    assert [c.time_factor.value for c in a.cards if c.time_factor] == pytest.approx([1, 1])
    assert exact_sum(a)


def test_a_finished_project_has_nothing_left() -> None:
    """All runs done, set-up done, storage closed: the forecast is what was spent, without any doubt."""
    lines = [run("sweep", 9, 20, 8), run("final", 7, 15, 3), run("storage", 0, 1, 0)]
    a = actuals(budget([G], UNSURE, TODAY), lines)
    assert (a.forecast.p05, a.forecast.p95, a.approve_usd) == (36, 36, 36)
    assert a.by_cause()["still to do"] == 0
    assert exact_sum(a)


LINE = st.builds(
    lambda kind, part, hours, usd, runs, finished: run(kind, hours, usd, runs, finished, part),
    st.sampled_from(KINDS), st.sampled_from([0, 1]), st.floats(0.001, 300), st.floats(0, 3000), st.integers(0, 9), st.booleans(),
)  # fmt: skip
BILL = budget([G, H], UNSURE, TODAY)


@given(st.lists(LINE, max_size=25))
@settings(max_examples=30, deadline=None)
def test_causes_always_add_up(lines: list[Spent]) -> None:
    """Whatever was spent on two GPUs, the causes are the difference, to the cent; and what is left is never less than nothing."""
    a = actuals(BILL, lines)
    assert exact_sum(a)
    assert a.left.p05 >= 0
    assert a.forecast.p50 == pytest.approx(a.spent_usd + a.left.p50)
    assert set(a.by_cause()) == set(CAUSES)


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=12), st.floats(-0.5, 0.5))
@settings(max_examples=100, deadline=None)
def test_cents_keep_the_sum(values: list[float], more: float) -> None:
    """Rounded values add up to the rounded total, and each moves by less than what has to be shared out and a cent."""
    total = round(fsum(values) + more, 2)
    found = cents(values, total)
    assert round(fsum(found) * 100) == round(total * 100)
    assert all(abs(a - b) <= abs(more) + 0.011 for a, b in zip(found, values, strict=True))
    plain = cents(values, round(fsum(values), 2))
    assert all(abs(a - b) < 0.01 + 1e-9 for a, b in zip(plain, values, strict=True))


# ---------------------------------------------------------------- what is learnt


def test_measured_time_replaces_the_predicted_one_on_its_gpu_only() -> None:
    """Sweep runs of twice the time: final runs are forecast at twice the time there, as predicted elsewhere."""
    plain = replace(UNSURE, failed=sure(0), idle=sure(0), evaluation=sure(0), setup=sure(0, "s"), months=0)
    b = budget([G, H], plain, TODAY)
    a = actuals(b, [run("sweep", 8, 16, 8)])
    before = actuals(b, [])
    g, h = a.cards
    assert (g.time_factor and g.time_factor.value, h.time_factor) == (2.0, None)
    slow = 3 * 2 * 2.0 + (8 * 0.625 + 3 * 2.5)  # final runs on g, all runs on h
    assert a.left_hours.p50 == pytest.approx(slow, rel=0.02)
    assert before.left_hours.p50 == pytest.approx(10 + 12.5, rel=0.02)


def test_more_runs_narrow_it() -> None:
    """The same ratio from more runs gives a narrower interval, and less of the total is open."""
    b = budget([G], replace(UNSURE, seeds=9, months=0), TODAY)
    widths = []
    for n in (0, 1, 3, 8):
        a = actuals(b, [run("final", 2.2 * n, 4.4 * n, n)] if n else [])
        e = a.cards[0].time_factor or a.cards[0].predicted_factor
        widths.append(e.high / e.low)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.6 * widths[0]


def test_scattered_runs_widen_it() -> None:
    """Runs of 0.5 and 2 times the prediction say less about the next one than two alike."""
    alike = measured_factor([(1.25, 1, 1)] * 4, 3)
    apart = measured_factor([(0.5, 1, 1), (2.0, 1, 1)] * 2, 3)
    assert alike and apart
    assert alike.value == apart.value == 1.25
    assert apart.high / apart.low > 1.5 * (alike.high / alike.low)


def test_the_interval_of_the_rest_holds_on_published_runs() -> None:
    """23 models' runs with their wall times: after 1 to 10 of them the mean of the others lies in the 90 % interval in 82 to 95 %."""
    times: dict[str, list[float]] = defaultdict(list)
    with (ROOT / "calibrate/tables/lr_rank_sweep.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["wall_min"]:
                times[row["model"]].append(float(row["wall_min"]))
    shuffle = random.Random(0)
    for n in (1, 2, 3, 5, 10):
        inside = []
        for some in times.values():
            for _ in range(20 if len(some) >= n + 3 else 0):
                shuffle.shuffle(some)
                e = measured_factor([(t, 100.0, 1) for t in some[:n]], len(some) - n)
                rest = fsum(some[n:]) / (len(some) - n) / 100
                assert e
                inside.append(e.low <= rest <= e.high)
        assert len(inside) > 200
        assert 0.82 <= sum(inside) / len(inside) <= 0.95, n


def test_hours_of_one_run_on_two_lines() -> None:
    """An invoice a day: hours with runs 0 belong to the run that another line counts, and the ratio is of both."""
    b = budget([G], UNSURE, TODAY)
    one = actuals(b, [run("final", 3, 6)])
    two = actuals(b, [run("final", 1, 2, 0), run("final", 2, 4)])
    assert one.cards[0].time_factor == two.cards[0].time_factor
    assert one.causes == two.causes
    assert one.left == two.left
    # before any has finished they are under way
    none = actuals(b, [run("final", 1, 2, 0)])
    assert none.cards[0].time_factor is None
    assert none.by_cause()["time"] == 0


def test_prices_paid_replace_the_spread() -> None:
    """One price paid leaves no spread; two leave what lies between them; a fee is no price of an hour."""
    plain = replace(UNSURE, months=0)
    b = budget([replace(G, run_s=sure(7200, "s"))], plain, TODAY)
    a = actuals(b, [run("setup", 1, 3, 0)])
    assert a.cards[0].paid == Estimate(3, 3, 3, "USD/h", "exact", "yours: what was paid")
    assert a.left.p50 == pytest.approx(3 * a.left_hours.p50)
    assert a.left.p90 == pytest.approx(3 * a.left_hours.p90)
    two = paid_price([run("sweep", 1, 2), run("sweep", 3, 12), run("idle", 0, 50)])
    assert two and (two.low, two.value, two.high) == (2, 3.5, 4)
    assert paid_price([run("idle", 0, 50)]) is None


def test_shares_move_with_the_work() -> None:
    """At the start as planned, at the end as measured; a kind that the lines do not tell apart stays as planned."""
    planned = Estimate(0.03, 0.15, 0.5, "share", "assumed")
    assert learnt_share(planned, 30, 100, 0.0).value == pytest.approx(0.15)
    late = learnt_share(planned, 30, 100, 1.0)
    assert (late.low, late.value, late.high) == pytest.approx((0.3, 0.3, 0.3))
    half = learnt_share(planned, 30, 100, 0.5)
    assert 0.15 < half.value < 0.3
    assert half.high / half.low < planned.high / planned.low
    assert learnt_share(planned, 0, 100, 0.5) == planned


def test_storage_is_paid_off_or_closed() -> None:
    """What was paid for storage is off what is left of it; more than planned is a cause; closed leaves nothing."""
    b = budget([PART], PLAIN, TODAY)  # 8.40 planned
    left = {usd: actuals(b, [run("storage", 0, usd, 0, False)]).items[-1].left_p50 for usd in (0.0, 3.0, 20.0)}
    assert left == pytest.approx({0.0: 8.4, 3.0: 5.4, 20.0: 0.0})
    assert actuals(b, [run("storage", 0, 20, 0, False)]).by_cause()["storage"] == pytest.approx(11.6)
    closed = actuals(b, [run("storage", 0, 3, 0)])
    assert (closed.by_cause()["storage"], closed.items[-1].left_p50) == (pytest.approx(-5.4), 0)


def test_contingency_is_on_what_is_left() -> None:
    """A tenth of what is left, not of what is spent."""
    a = actuals(budget([G], replace(UNSURE, contingency=0.1), TODAY), [run("sweep", 9, 200, 8)])
    assert a.approve_usd == pytest.approx(200 + 1.1 * a.left.p50)


# ---------------------------------------------------------------- the file

H100, L40S = "h100-sxm-80gb", "l40s-48gb"
ONE = [(H100, "ab" * 32)]
TWO = [(H100, "ab" * 32), (L40S, "cd" * 32)]
HEADER = "kind,gpu,hours,usd,usd_per_gpu_hour,runs,finished,date\n"


def usage(tmp_path: Path, content: str | bytes, plans: list[tuple[str, str]] = ONE) -> Usage:
    path = tmp_path / "usage.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(str(path), plans, TODAY)


def test_every_column(tmp_path: Path) -> None:
    """A line a kind, as in the docstring of the reader."""
    found = usage(
        tmp_path,
        HEADER + f"sweep,{H100},2.5,,3,10,yes,2026-11-03\nfinal,,1,4,4,,no,\nfailed,,.5,1.5,,,,\nstorage,,,1.10,,,,\n",
    )
    assert found.lines == (
        Spent("sweep", H100, 0, 2.5, 7.5, 10, True, date(2026, 11, 3)), Spent("final", H100, 0, 1, 4, 1, False),
        Spent("failed", H100, 0, 0.5, 1.5, 1, True), Spent("storage", "", None, 0, 1.1, 0, False),
    )  # fmt: skip


def test_the_example_of_the_docstring_is_read(tmp_path: Path) -> None:
    """What the documentation shows works as it stands."""
    from lora_planner.pages import usage_file

    lines = [line.strip() for line in (usage_file.__doc__ or "").splitlines()]
    start = lines.index("kind,gpu,hours,usd,runs,finished,date")
    assert len(usage(tmp_path, "\n".join(lines[start:])).lines) == 5


LAYOUTS = [
    "KIND,GPU,Hours,USD\nSweep,H100-SXM-80GB,2,5\n",
    "usd;hours;gpu;kind\n5;2;;sweep\n",
    "usd\thours\tkind\n5\t2\tsweep\n",
    "\ufeffkind,hours,usd\r\nsweep,2,5\r\n\r\n",
    "kind,hours,usd\rsweep,2,5\r",
    '"kind","GPU","hours","usd","who, where"\n" sweep ","NVIDIA H100 80GB HBM3"," 2 ","5","a, b"\n',
    "Kind,GPU hours ,USD,usd-per-gpu-hour\nsweep,2,5,2.5\n".replace("GPU hours", "Hours"),
    "kind,hours,usd,currency\nsweep,2.0,5.00,usd\n",
    "kind,hours,usd\n,,\nsweep,2,5\n,,\n",
    "kind,hours,usd,Kommentar\nsweep,2,5\n",
]


@pytest.mark.parametrize("text", LAYOUTS)
def test_layouts_that_are_the_same(tmp_path: Path, text: str) -> None:
    """Order, case, spaces, separators, byte order mark, line ends, empty lines and strange columns do not matter."""
    assert usage(tmp_path, text).lines == (Spent("sweep", H100, 0, 2, 5, 1, True),)


BAD = [  # (cells of the second line, what the message says)
    ("sweep,,-3,5,,,,", "usage.csv:2", "negative"),
    ("sweep,,3,-5,,,,", "usage.csv:2", "credits"),
    ('sweep,,"3,5",5,,,,', "usage.csv:2", "a comma"),
    ('sweep,,3,"1.234,50",,,,', "usage.csv:2", "a comma"),
    ("sweep,,3,5,50,,,,,", "usage.csv:2", "hours x usd_per_gpu_hour is 150.00"),
    ("sweep,,3,$5,,,,", "usage.csv:2", "currency sign"),
    ("sweep,,three,5,,,,", "usage.csv:2", "no number"),
    ("sweep,,nan,5,,,,", "usage.csv:2", "no number"),
    ("sweep,,inf,5,,,,", "usage.csv:2", "no number"),
    ("sweep,,1e300,5,,,,", "usage.csv:2", "out of range"),
    ("sweep,,=2+1,5,,,,", "usage.csv:2", "a formula"),
    ('sweep,,3,"=HYPERLINK(""x"")",,,,', "usage.csv:2", "a formula"),
    ("=sweep,,3,5,,,,", "usage.csv:2", "a formula"),
    ("@sweep,,3,5,,,,", "usage.csv:2", "a formula"),
    ("sweep,=A1,3,5,,,,", "usage.csv:2", "a formula"),
    ("training,,3,5,,,,", "usage.csv:2", "sweep, final, evaluation"),
    (",,3,5,,,,", "usage.csv:2", "kind '': empty"),
    ("Total,,3,5,,,,", "usage.csv:2", "leave sums out"),
    ("sweep,h100,3,5,,,,", "usage.csv:2", H100),
    ("sweep,quantum-1,3,5,,,,", "usage.csv:2", "unknown"),
    ("sweep,8xh100-sxm-80gb,3,5,,,,", "usage.csv:2", "unknown"),
    (f"sweep,{L40S},3,5,,,,", "usage.csv:2", f"no plan is on {L40S}"),
    ("sweep,,,5,,,,", "usage.csv:2", "GPU-hours"),
    ("sweep,,0,5,,,,", "usage.csv:2", "took none"),
    ("sweep,,3,,,,,", "usage.csv:2", "neither usd nor"),
    ("sweep,,3,5,,1.5,,", "usage.csv:2", "no whole number"),
    ("sweep,,3,5,,-1,,", "usage.csv:2", "negative"),
    ("sweep,,3,5,,,perhaps,", "usage.csv:2", "yes or no"),
    ("sweep,,3,5,,,,27.11.2026", "usage.csv:2", "2026-11-23"),
    ("sweep,,3,5,,,,2027-11-27", "usage.csv:2", "in the future"),
    ("storage,,700,5,,,,", "usage.csv:2", "no GPU-hours"),
    ("storage,,,,3,,,", "usage.csv:2", "what the storage cost"),
    ("sweep,,3,5,,,,,more", "usage.csv:2", "9 cells under 8 columns"),
    ('sweep,,"3,5,,,,', "usage.csv:2", "quotation mark"),
    ("sweep,,3,5,2000,,,", "usage.csv:2", "out of range"),
]


@pytest.mark.parametrize(("line", "where", "why"), BAD, ids=[line for line, _, _ in BAD])
def test_values_are_strict(tmp_path: Path, line: str, where: str, why: str) -> None:
    """File and line, the cause, and what to write instead."""
    with pytest.raises(BadInput) as caught:
        usage(tmp_path, HEADER + line + "\n")
    said = str(caught.value)
    assert where in said
    assert why in said
    assert caught.value.fix
    assert len(said.splitlines()) == 1


FILES = [
    (b"", "empty"), (b"\n\n", "empty"), (HEADER.encode(), "no line under"), (b"hours,usd\n3,5\n", "no column kind"),
    (b"kind,usd\nsweep,5\n", "no column hours"), (b"kind,hours\nsweep,5\n", "usd_per_gpu_hour"),
    (b"kind,hours,usd,finishd\nsweep,3,5,no\n", "Did you mean finished"), (b"kind,hours,usd,USD\nsweep,3,5,5\n", "two columns usd"),
    (b"kind,hours,usd\nsweep,3,\x005\n", "NUL"), (b"kind,hours,usd\nsweep,3,5\xff\n", "UTF-8"),
    ("kind,hours,usd\nsweep,3,5\n".encode("utf-16"), "UTF-16"), (b"kind,hours,usd,currency\nsweep,3,5,EUR\n", "not USD"),
    (b"kind,hours,usd\n" + b"sweep,3,5\n" * (MAX_BYTES // 10), "over 1 MiB"), (b"\x89PNG\r\n\x1a\n" + b"a" * 50, "UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "why"), FILES, ids=[why for _, why in FILES])
def test_files_that_are_no_usage(tmp_path: Path, content: bytes, why: str) -> None:
    """Each is refused with one line."""
    with pytest.raises(BadInput, match=why):
        usage(tmp_path, content)


def test_a_large_file_is_read(tmp_path: Path) -> None:
    """Just under the cap, with every line counted."""
    n = (MAX_BYTES - 100) // 10
    found = usage(tmp_path, "kind,hours,usd\n" + "sweep,3,5\n" * n)
    assert len(found.lines) == n
    assert actuals(BILL, [replace(line, gpu="g") for line in found.lines[:2000]]).spent_usd == 10_000


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    """Also behind a cell of two lines and an empty line."""
    with pytest.raises(BadInput, match=r"usage.csv:6"):
        usage(tmp_path, 'kind,hours,usd,note\nsweep,3,5,"two\nlines"\n\nsweep,3,5,\nsweep,x,5,\n')


def test_two_gpus_and_two_plans_on_one(tmp_path: Path) -> None:
    """The GPU says whose a line is where each plan has its own; a number or the hash does where they share it."""
    with pytest.raises(BadInput, match=f"Name one of {H100}, {L40S}"):
        usage(tmp_path, "kind,hours,usd\nsweep,3,5\n", TWO)
    assert usage(tmp_path, f"kind,gpu,hours,usd\nsweep,{L40S},3,5\n", TWO).lines[0].part == 1
    shared = [(H100, "ab" * 32), (H100, "cd" * 32)]
    with pytest.raises(BadInput, match="plans 1, 2 share"):
        usage(tmp_path, "kind,hours,usd\nsweep,3,5\n", shared)
    found = usage(tmp_path, "kind,hours,usd,plan\nsweep,3,5,2\nsweep,3,5,ABABAB\nidle,3,5,\n", shared)
    assert [line.part for line in found.lines] == [1, 0, None]
    for wrong in ("3", "0", "abab", "efefef", "x" * 100):
        with pytest.raises(BadInput, match="no such plan"):
            usage(tmp_path, f"kind,hours,usd,plan\nsweep,3,5,{wrong}\n", shared)
    with pytest.raises(BadInput, match="plan 2 is on"):
        usage(tmp_path, f"kind,gpu,hours,usd,plan\nsweep,{H100},3,5,2\n", TWO)


def test_names_of_gpus_differ_in_more_than_case() -> None:
    """The reader asks for no exact case, so no two GPUs may differ by it alone."""
    names: dict[str, str] = {}
    for g in gpus():
        for name in (g.name, *g.also, *g.reported_as):
            assert names.setdefault(name.lower(), g.name) == g.name


# ---------------------------------------------------------------- the command


def call(*words: str) -> Result:
    group = Commands("lora-plan")
    group.add_command(command)
    return CliRunner().invoke(group, ["budget", *words])


def recommended(gpu: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--tokens", "10M", "--gpu", gpu, "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Plans on two GPUs, usage of one and of both, and a hostile pair."""
    home = tmp_path_factory.mktemp("actuals")
    h100, l40s = recommended(H100), recommended(L40S)
    (home / "h100.json").write_text(json.dumps(h100))
    (home / "l40s.json").write_text(json.dumps(l40s))
    h100["result"]["recommended"]["model"]["name"] = "<script>alert(1)</script>"
    (home / "hostile.json").write_text(json.dumps(h100))
    one = f"kind,gpu,hours,usd,runs,finished,date\nsweep,{H100},3.1,10.20,10,yes,2026-11-03\nfailed,{H100},0.9,2.96,,,2026-11-04\n"
    (home / "one.csv").write_text(one)
    (home / "both.csv").write_text(one + f"sweep,{L40S},12,13,10,yes,2026-11-05\n")
    note = one.replace("date\n", 'date,"=HYPERLINK(""x"")","<img src=x onerror=alert(1)>"\n').replace(
        "11-03\n", '11-03,"=HYPERLINK(""x"")",\n'
    )
    (home / '=HYPERLINK("x")<b>.csv').write_text(note)
    return {p.name: str(p) for p in home.iterdir()}


def test_every_output_says_it(files: dict[str, str], tmp_path: Path) -> None:
    """Terminal, JSON, Markdown, CSV, HTML and the chart hold the same re-forecast, and the causes add up in each."""
    out = {name: tmp_path / name for name in ("b.html", "b.md", "b.csv", "variance.svg", "total.svg")}
    words = [files["h100.json"], "--actuals", files["one.csv"]]
    done = call(*words, "--html", str(out["b.html"]), "--markdown", str(out["b.md"]), "--csv", str(out["b.csv"]),
                "--plot", str(out["variance.svg"]), "--plot", str(out["total.svg"]))  # fmt: skip
    assert done.exit_code == 0, done.output
    document = json.loads(call(*words, "--json").stdout)
    found = document["result"]["actuals"]
    assert found["spent_usd"] == 13.16
    assert (
        round(sum(found["variance_usd"].values()), 2)
        == found["difference_usd"]
        == round(13.16 - found["planned_usd"], 2)
    )
    assert round(sum(row["usd"] for row in found["by_gpu"]), 2) == found["difference_usd"]
    assert any(row["key"] == f"price paid, {H100}" and row["as_of"] == "2026-11-04" for row in document["provenance"])
    assert found["approved_usd"] == document["result"]["approve_usd"]
    for text in (done.stdout, out["b.html"].read_text(), out["b.md"].read_text()):
        for word in ("13.16", "reruns", "idle and set-up", "still to do", "allowance", "at the end", "2026-11-04"):
            assert word in text, word
    assert "Planned against actual" in out["b.html"].read_text()
    rows = list(csv.DictReader(out["b.csv"].open(newline="")))
    by_section = defaultdict(list)
    for row in rows:
        by_section[row["section"]].append(row)
    variance = {row["item"] for row in by_section["variance"]}
    assert variance >= set(CAUSES)
    causes = [float(row["p50"]) for row in by_section["variance"] if row["item"] in CAUSES]
    assert round(sum(causes), 2) == found["difference_usd"]
    total = next(row for row in by_section["re-forecast"] if row["item"] == "total")
    assert float(total["p90"]) == found["forecast_usd"]["p90"]
    assert {row["item"] for row in by_section["learnt"]} == {"time of a run, of the predicted one", "price paid"}
    assert "price" in out["variance.svg"].read_text()
    assert "re-forecast" in out["total.svg"].read_text()


def test_the_file_is_in_the_hash_of_the_inputs(files: dict[str, str]) -> None:
    """Another usage file, another hash; none, as before."""
    hashes = [json.loads(call(*words, "--json").stdout)["inputs_sha256"]
              for words in ([files["h100.json"]], [files["h100.json"], "--actuals", files["one.csv"]])]  # fmt: skip
    assert hashes[0] != hashes[1]
    assert "actuals" not in json.loads(call(files["h100.json"], "--json").stdout)["result"]


def test_the_re_forecast_is_held_against_the_budget(files: dict[str, str]) -> None:
    """Exit 5 where spent and what is left are over it, though the plan was inside, and the other way round."""
    found = json.loads(call(files["h100.json"], "--actuals", files["one.csv"], "--json").stdout)["result"]
    now, planned = found["actuals"]["approve_usd"], found["approve_usd"]
    assert now < planned
    words = [files["h100.json"], "--actuals", files["one.csv"], "--budget"]
    assert call(*words, str(now * 1.01)).exit_code == 0
    over = call(*words, str(now * 0.99))
    assert over.exit_code == 5
    assert "W-OVERBUDGET" in over.stdout
    assert call(files["h100.json"], "--budget", str(now * 1.01)).exit_code == 5


def test_a_price_that_was_paid_is_not_stale(files: dict[str, str]) -> None:
    """Where nothing is forecast at a listed price its age does not matter; on a GPU without a line it still does."""
    assert call(files["h100.json"], "--actuals", files["one.csv"], "--strict-prices").exit_code == 0
    both = call(files["h100.json"], files["l40s.json"], "--actuals", files["one.csv"], "--strict-prices")
    assert both.exit_code == 3
    assert "3 of 7 prices are stale" in both.stderr


def test_two_gpus_are_one_forecast(files: dict[str, str], tmp_path: Path) -> None:
    """Causes by GPU, one forecast; each GPU learns from its own lines."""
    page = tmp_path / "b.html"
    words = [files["h100.json"], files["l40s.json"], "--actuals", files["both.csv"]]
    found = json.loads(call(*words, "--json", "--html", str(page)).stdout)["result"]["actuals"]
    assert {row["gpu"] for row in found["by_gpu"]} == {H100, L40S, None}
    assert found["spent_usd"] == 26.16
    factors = {card["gpu"]: card["time_factor"]["value"] for card in found["gpus"]}
    assert len(set(factors.values())) == 2
    assert f"price, {L40S}" in page.read_text()


def test_runs_outside_the_prediction_are_said_loudly(files: dict[str, str], tmp_path: Path) -> None:
    """A factor of five is no bad luck."""
    path = tmp_path / "slow.csv"
    path.write_text("kind,hours,usd,runs\nsweep,13,40,10\n")
    assert "W-TIME-MISS" in call(files["h100.json"], "--actuals", str(path)).stdout
    assert "W-TIME-MISS" not in call(files["h100.json"], "--actuals", files["one.csv"]).stdout


def test_nothing_of_the_file_runs(files: dict[str, str], tmp_path: Path) -> None:
    """A model's name, a file's name, a column and a cell that attack are text in every output."""
    page, table, text = tmp_path / "b.html", tmp_path / "b.csv", tmp_path / "b.md"
    done = call(files["hostile.json"], "--actuals", files['=HYPERLINK("x")<b>.csv'], "--html", str(page), "--csv", str(table),
                "--markdown", str(text))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "&lt;script&gt;" in page.read_text()
    for wrong in ("<script", "<img", "<b>.csv"):
        assert wrong not in page.read_text()
        assert wrong not in text.read_text()
    cells = [cell for row in csv.reader(table.open(newline="")) for cell in row]
    assert any("HYPERLINK" in cell for cell in cells)
    assert not any(cell.startswith(("=", "+", "@")) for cell in cells)


def test_refusals_write_nothing(files: dict[str, str], tmp_path: Path) -> None:
    """A bad file ends with 3 and one line, before any output is written; a missing one too."""
    bad, page = tmp_path / "bad.csv", tmp_path / "b.html"
    bad.write_text('kind,hours,usd\nsweep,3,"=HYPERLINK(""x"")"\n')
    for path in (str(bad), str(tmp_path / "none.csv"), str(tmp_path), "/dev/null"):
        done = call(files["h100.json"], "--actuals", path, "--html", str(page))
        assert (done.exit_code, len(done.stderr.splitlines()), page.exists()) == (3, 1, False), done.output
    assert call(files["h100.json"], "--plot", str(tmp_path / "variance.svg")).exit_code == 2


def test_dates_are_of_today(tmp_path: Path) -> None:
    """Tomorrow is a time zone, the day after is not yet spent; a time of day is read over."""
    for day, seen in ((TODAY + timedelta(1), TODAY + timedelta(1)), ("2026-11-03T10:15:00Z", date(2026, 11, 3))):
        assert usage(tmp_path, f"kind,hours,usd,date\nidle,3,5,{day}\n").lines[0].day == seen
    for day in (TODAY + timedelta(2), "2026-11-03 and later", "2026-13-01", "46000"):
        with pytest.raises(BadInput, match="date"):
            usage(tmp_path, f"kind,hours,usd,date\nidle,3,5,{day}\n")


def test_help_fits_one_screen() -> None:
    """40 lines at 100 columns, with the columns of the file."""
    done = CliRunner().invoke(main, ["budget", "--help"], env={"COLUMNS": "100"}, terminal_width=100)
    assert len(done.stdout.splitlines()) <= 40
    assert "kind,gpu,hours,usd" in done.stdout
