"""A project's bill: what its lines add up to, how intervals are combined, and what the command refuses."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from datetime import date, timedelta
from math import exp, log, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_planner.budget import (
    Part,
    Settings,
    budget,
    draws,
    newest,
    quantile,
    share,
    spread,
    stored_bytes,
    sweep_share,
)
from lora_planner.cli import Commands
from lora_planner.commands.budget import budget as command
from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import Price
from lora_planner.ledger import Estimate
from lora_planner.units import GIB

TODAY = date(2026, 11, 27)
Z95, Z90 = (NormalDist().inv_cdf(p) for p in (0.95, 0.9))


def sure(value: float, unit: str = "share") -> Estimate:
    return Estimate(value, value, value, unit, "exact")


def price(usd: float, provider: str = "p", as_of: date = TODAY, gpu: str = "g", commitment: str = "on-demand") -> Price:
    return Price(gpu, usd, provider, commitment, "s", as_of)


#: every share is known, so that the bill is arithmetic
PLAIN = Settings(rates=4, ranks=2, sweep_share=0.25, seeds=3, evaluation=sure(0.1), failed=sure(0.2), idle=sure(0.5),
                 setup=sure(1800, "s"), checkpoints=2, months=2, storage=sure(0.1, "USD/GiB-month"))  # fmt: skip
PART = Part("m", "g", sure(7200, "s"), 1000, 5, False, sure(1e6, "tokens"), 1 * GIB, 2 * GIB, 16 * GIB, (price(2.0),))
UNSURE = Estimate(3600, 7200, 14400, "s", "fitted")


# ---------------------------------------------------------------- golden: by hand


def test_the_bill_by_hand() -> None:
    """8 short and 3 whole runs of 2 h, at 2 USD an hour, every share known: each line as on paper."""
    found = budget([PART], PLAIN, TODAY)
    hours = {item.name: item.hours.p50 for item in found.items if item.hours}
    # sweep 8 x 2 h / 4 = 4; final 6; evaluation 10 % of 10 = 1; failed 20 % of 11 = 2.2; idle 50 % of 13.2 + 0.5 = 7.1
    assert hours == pytest.approx(
        {"sweep": 4, "final runs": 6, "evaluation": 1, "failed runs": 2.2, "idle and set-up": 7.1}
    )
    # base 16, 8 adapters of 1, 3 x 2 checkpoints of 1 + 2: 16 + 8 + 18 = 42 GiB, 2 months at 0.10
    assert stored_bytes([PART], PLAIN) == 42 * GIB
    assert found.total.p50 == pytest.approx(2 * 20.3 + 8.4)
    assert found.total.p05 == pytest.approx(found.total.p95)
    assert found.contingency_usd == pytest.approx(0)
    assert found.runs == 11


def test_hosted_by_hand() -> None:
    """1M tokens a run, 5 run equivalents, 3 USD a million: 15 USD; the break-even price is rent over tokens."""
    found = budget([PART], replace(PLAIN, hosted_usd=3.0), TODAY)
    assert found.hosted.usd and found.hosted.usd.p50 == pytest.approx(15)
    assert found.hosted.break_even_usd == pytest.approx(49 / 5)
    assert found.hosted.verdict == "hosted is cheaper"
    assert budget([PART], replace(PLAIN, hosted_usd=30.0), TODAY).hosted.verdict == "renting is cheaper"
    unsure = replace(PART, run_s=UNSURE)
    assert budget([unsure], replace(PLAIN, hosted_usd=9.8), TODAY).hosted.verdict.startswith("a tie")


def test_product_of_lognormals_has_the_known_p90() -> None:
    """Time x2 either way and price x1.5 either way: the p90 is exp(z sqrt(sum of squares)), from the textbook."""
    drawn = draws({"a": Estimate(1, 2, 4, "", "fitted"), "b": Estimate(2, 3, 4.5, "", "fitted")})
    found = spread([a * b for a, b in zip(drawn["a"], drawn["b"], strict=True)], "USD")
    sigma = sqrt(log(2) ** 2 + log(1.5) ** 2) / Z95
    assert found.p50 == pytest.approx(6, rel=0.01)
    assert found.p90 == pytest.approx(6 * exp(Z90 * sigma), rel=0.01)
    assert found.p05 == pytest.approx(6 * exp(-Z95 * sigma), rel=0.02)


def test_draws_are_independent_and_the_same_every_time() -> None:
    """Seven factors: no pair is correlated by more than 0.01, and a second call gives the same points."""
    names = "abcdefg"
    factors = {n: Estimate(1, 2, 4, "", "fitted") for n in names}
    drawn = draws(factors)
    assert drawn == draws(factors)
    logs = {n: [log(x / 2) for x in drawn[n]] for n in names}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            dot = sum(x * y for x, y in zip(logs[a], logs[b], strict=True))
            norm = sqrt(sum(x * x for x in logs[a]) * sum(y * y for y in logs[b]))
            assert abs(dot / norm) < 0.01, (a, b)


# ---------------------------------------------------------------- relations


def test_errors_of_runs_do_not_average_out() -> None:
    """Ten seeds are as unsure as one: the error of the predicted time is shared."""
    plain = replace(PLAIN, rates=0, setup=sure(0, "s"), months=0)
    one, ten = (budget([replace(PART, run_s=UNSURE)], replace(plain, seeds=n), TODAY).total for n in (1, 10))
    assert ten.p50 == pytest.approx(10 * one.p50)
    assert ten.p90 / ten.p50 == pytest.approx(one.p90 / one.p50)
    assert one.p90 / one.p50 == pytest.approx(2 ** (Z90 / Z95), rel=0.01)


def test_two_gpus_err_apart_and_one_gpu_errs_together() -> None:
    """Two equal parts are surer in total on two GPUs than on one."""
    plain = replace(PLAIN, setup=sure(0, "s"), months=0)
    a = replace(PART, run_s=UNSURE)
    b = replace(a, gpu="h", prices=(price(2.0, gpu="h"),))
    same, apart = budget([a, a], plain, TODAY).total, budget([a, b], plain, TODAY).total
    assert same.p50 == pytest.approx(2 * budget([a], plain, TODAY).total.p50)
    assert apart.p90 - apart.p05 < 0.9 * (same.p90 - same.p05)


@given(st.floats(0.1, 100), st.floats(1, 4))
@settings(max_examples=20, deadline=None)
def test_rent_is_linear_in_the_price(usd: float, factor: float) -> None:
    """Twice the price, twice every quantile of what is rented."""
    plain = replace(PLAIN, months=0)
    part = replace(PART, run_s=UNSURE)
    one = budget([replace(part, prices=(price(usd),))], plain, TODAY).total
    more = budget([replace(part, prices=(price(usd * factor),))], plain, TODAY).total
    assert more.p50 == pytest.approx(one.p50 * factor)
    assert more.p90 == pytest.approx(one.p90 * factor)


@pytest.mark.parametrize("name", ["evaluation", "failed", "idle", "setup", "storage"])
def test_every_share_costs(name: str) -> None:
    """A larger share never makes a project cheaper, and zero removes the line."""
    totals = []
    for value in (0.0, 0.1, 0.3):
        totals.append(budget([PART], replace(PLAIN, **{name: sure(value)}), TODAY).total.p50)
    assert totals == sorted(totals)
    assert totals[0] < totals[2]


def test_more_seeds_rates_and_ranks_cost_more() -> None:
    """Each of the counts adds runs."""
    base = budget([PART], PLAIN, TODAY).total.p50
    for more in ({"seeds": 4}, {"rates": 5}, {"ranks": 3}, {"sweep_share": 0.5}, {"checkpoints": 3}, {"months": 3}):
        assert budget([PART], replace(PLAIN, **more), TODAY).total.p50 > base, more


def test_full_fine_tuning_has_no_ranks_to_sweep() -> None:
    """Its sweep is over rates only."""
    assert budget([replace(PART, full=True)], PLAIN, TODAY).runs == 4 + 3


def test_a_base_is_stored_once() -> None:
    """Two parts on one model share its weights; two models do not."""
    both, other = stored_bytes([PART, PART], PLAIN), stored_bytes([PART, replace(PART, model="n")], PLAIN)
    assert other - both == PART.base_bytes


def test_lines_add_up() -> None:
    """With unsure shares the parts of a total still sum to it, at the p50 and at the p90; lines of their own do not."""
    found = budget([replace(PART, run_s=UNSURE)], Settings(), TODAY)
    assert sum(item.usd_p50 for item in found.items) == pytest.approx(found.total.p50)
    assert sum(item.usd_p90 for item in found.items) == pytest.approx(found.total.p90)
    assert sum(item.hours_p50 for item in found.items) == pytest.approx(found.hours.p50)
    assert sum(item.usd.p90 for item in found.items) > found.total.p90  # not all goes wrong at once


@given(st.floats(0.5, 2), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None)
def test_quantiles_rise(value: float, p: float, q: float) -> None:
    """A quantile function is monotone and meets its three points, also with an end at 0."""
    for e in (Estimate(0.5 * value, value, 3 * value, "", "fitted"), Estimate(0, value, 3 * value, "", "fitted")):
        low, high = sorted((p, q))
        assert quantile(e, low) <= quantile(e, high)
        assert [quantile(e, at) for at in (0.05, 0.5, 0.95)] == pytest.approx([e.low, e.value, e.high])


def test_sweep_runs_are_long_enough() -> None:
    """Never under 100 steps, never longer than the run."""
    for steps in (10, 100, 127, 400, 10_000):
        assert sweep_share(steps, 0.25) * steps >= min(steps, 100) - 1e-9
        assert sweep_share(steps, 0.25) <= 1


def test_parts_on_two_gpus_by_hand() -> None:
    """Each GPU's hours at its own price; the base that both share is stored once; offers are of one GPU's parts."""
    other = replace(
        PART, gpu="h", run_s=sure(3600, "s"), prices=(price(5.0, gpu="h"), price(6.0, "q", gpu="h", commitment="spot"))
    )
    found = budget([PART, other], PLAIN, TODAY)
    # g as above: 20.3 h at 2 USD. h: 5 h of runs, x 1.1 x 1.2 x 1.5 + 0.5 = 10.4 h at 5 USD. 16 + 2 x 26 GiB, 2 months at 0.10.
    assert found.hours.p50 == pytest.approx(20.3 + 10.4)
    assert found.total.p50 == pytest.approx(20.3 * 2 + 10.4 * 5 + 68 * 2 * 0.1)
    assert [(o.price.gpu, o.usd.p50) for o in found.offers] == [
        ("g", pytest.approx(40.6)), ("h", pytest.approx(52)), ("h", pytest.approx(62.4))]  # fmt: skip
    assert sum(o.usd.p50 for o in found.offers if o.chosen) + found.items[-1].usd_p50 == pytest.approx(found.total.p50)
    assert [row.gpu for row in found.used] == ["g", "h"]
    assert sum(item.usd_p50 for item in found.items) == pytest.approx(found.total.p50)
    assert budget([other, PART], PLAIN, TODAY).total.p50 == pytest.approx(found.total.p50)


# ---------------------------------------------------------------- prices


def test_only_the_newest_row_of_a_provider_counts() -> None:
    """Prices are appended: the old row of a provider is history."""
    rows = (price(9.0, as_of=TODAY - timedelta(100)), price(2.0), price(1.0, commitment="spot"), price(3.0, "q"))
    assert [row.usd_per_gpu_hour for row in newest(rows, "g")] == [1.0, 2.0, 3.0]
    found = budget([replace(PART, prices=rows)], PLAIN, TODAY)
    assert [row.usd_per_gpu_hour for row in found.used] == [2.0, 3.0]  # spot is offered, not planned with
    assert len(found.offers) == 3


def test_a_provider_is_chosen_exactly() -> None:
    """Its price is the total's; a name that has no price is an error with the known ones."""
    part = replace(PART, prices=(price(2.0, "a"), price(4.0, "b"), price(1.0, "b", commitment="spot")))
    assert budget([part], replace(PLAIN, provider="b", months=0), TODAY).total.p50 == pytest.approx(4 * 20.3)
    assert budget([part], replace(PLAIN, provider="b, spot", months=0), TODAY).total.p50 == pytest.approx(20.3)
    with pytest.raises(UnknownName, match="a, b"):
        budget([part], replace(PLAIN, provider="c"), TODAY)


def test_stale_is_thirty_days() -> None:
    """30 days are fresh, 31 are stale; only rows behind the total count."""
    part = replace(PART, prices=(price(2.0, "old", TODAY - timedelta(31)), price(3.0, "new", TODAY - timedelta(30))))
    assert [row.provider for row in budget([part], PLAIN, TODAY).stale] == ["old"]
    assert not budget([part], replace(PLAIN, provider="new"), TODAY).stale


def test_no_price_is_an_error() -> None:
    """Another GPU's price would be a guess."""
    with pytest.raises(UnknownName, match="--prices"):
        budget([replace(PART, prices=())], PLAIN, TODAY)


@pytest.mark.parametrize("text", ["", "x", "-1%", "5%,2%,9%", "1%,2%", "nan", "inf", "2000%", "1,2,3,4"])
def test_shares_that_are_none(text: str) -> None:
    """What is no share is refused with the form to write."""
    with pytest.raises(BadInput, match="low,value,high"):
        share(text, "--idle")


# ---------------------------------------------------------------- the command

DATA = str(Path(__file__).parents[1] / "examples/stdlib-docs.jsonl")
H100, L40S = "h100-sxm-80gb", "l40s-48gb"


def run(*words: str) -> Result:
    """The command in a group as the real one is, errors and exit codes included."""
    group = Commands("lora-plan")
    group.add_command(command)
    return CliRunner().invoke(group, ["budget", *words])


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan file as a user makes it."""
    from lora_planner.cli import main

    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--data", DATA, "--gpu", H100, "--json"])
    assert done.exit_code == 0
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(done.stdout)
    return path


def price_file(path: Path, as_of: date, usd: float = 2.0, provider: str = "ours") -> str:
    path.write_text(
        f'[[price]]\ngpu = "{H100}"\nusd_per_gpu_hour = {usd}\nprovider = """{provider}"""\nas_of = {as_of}\n'
    )
    return str(path)


def changed(plan: Path, tmp_path: Path, at: str, value: Any) -> str:
    """The plan with one value replaced; `at`: keys with points."""
    document = json.loads(plan.read_text())
    node = document
    *keys, last = at.split(".")
    for key in keys:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(document))
    return str(path)


def result(*words: str) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.output
    document: dict[str, Any] = json.loads(done.stdout)
    assert set(document) >= {"schema_version", "result", "provenance", "warnings", "exit_code"}
    return document["result"]


def test_a_plan_file_and_its_words_give_one_budget(plan: Path) -> None:
    """budget plan.json equals budget --model ... of the same plan, hash included."""
    direct = result("--model", "qwen3-8b", "--data", DATA, "--gpu", H100)
    assert result(str(plan)) == direct


def test_the_terminal_says_it_all(plan: Path) -> None:
    """What to approve, both quantiles, every line, every provider with its date, the plan's hash."""
    done = run(str(plan), "--hosted-price", "3")
    assert done.exit_code == 0
    for word in ("approve", "p50", "p90", "sweep", "final runs", "evaluation", "failed", "idle", "storage", "total", "2025-08-01",
                 "stale", "per million tokens", "sha256", "W-STALE-PRICE"):  # fmt: skip
        assert word in done.stdout, word


def test_strict_prices_refuse_stale_ones(plan: Path, tmp_path: Path) -> None:
    """Exit 3 for prices of 31 days, 0 for today's."""
    old = price_file(tmp_path / "old.toml", date.today() - timedelta(31))
    done = run(str(plan), "--prices", old, "--strict-prices", "--html", str(tmp_path / "x.html"))
    assert (done.exit_code, (tmp_path / "x.html").exists()) == (3, False)
    assert "stale" in done.stderr
    assert "W-STALE-PRICE" in run(str(plan), "--prices", old).stdout
    new = run(str(plan), "--prices", price_file(tmp_path / "new.toml", date.today()), "--strict-prices")
    assert new.exit_code == 0
    assert "stale" not in new.stdout


def test_over_budget_is_five(plan: Path) -> None:
    """The amount to approve decides, not the middle."""
    found = result(str(plan))
    between = (found["approve_usd"] + found["total_usd"]["p50"]) / 2
    assert run(str(plan), "--budget", str(between)).exit_code == 5
    assert run(str(plan), "--budget", str(found["approve_usd"] * 1.01)).exit_code == 0
    assert run(str(plan), "--budget", "0").exit_code == 4


def test_contingency_as_asked(plan: Path) -> None:
    """p90 by default, else a share of the p50."""
    found = result(str(plan))
    assert found["approve_usd"] == pytest.approx(found["total_usd"]["p90"])
    tenth = result(str(plan), "--contingency", "10%")
    assert tenth["approve_usd"] == pytest.approx(1.1 * found["total_usd"]["p50"])


def test_two_plans_are_one_project(plan: Path) -> None:
    """Twice the plan: twice the runs, the base stored once."""
    one, two = result(str(plan)), result(str(plan), str(plan))
    assert two["runs"] == 2 * one["runs"]
    assert two["gpu_hours"]["p50"] == pytest.approx(2 * one["gpu_hours"]["p50"])
    assert two["total_usd"]["p50"] < 2 * one["total_usd"]["p50"]


@pytest.fixture(scope="module")
def other_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data on another GPU."""
    from lora_planner.cli import main

    done = CliRunner().invoke(main, ["recommend", "--model", "qwen3-8b", "--data", DATA, "--gpu", L40S, "--json"])
    assert done.exit_code == 0
    path = tmp_path_factory.mktemp("other") / "plan.json"
    path.write_text(done.stdout)
    return path


def test_parts_on_two_gpus_in_every_output(plan: Path, other_plan: Path, tmp_path: Path) -> None:
    """Totals are the sums, every GPU has its offers at its own prices, and no output forgets one of the two."""
    files = {name: tmp_path / name for name in ("b.html", "b.csv", "b.md")}
    nothing = ["--months", "0", "--provider", "aws us-east-1"]
    done = run(str(plan), str(other_plan), *nothing, *(f"--{name}={files[file]}" for name, file in
               (("html", "b.html"), ("csv", "b.csv"), ("markdown", "b.md"))))  # fmt: skip
    assert done.exit_code == 0, done.output
    both, one, two = (
        result(*words, *nothing) for words in ([str(plan), str(other_plan)], [str(plan)], [str(other_plan)])
    )
    assert both["runs"] == one["runs"] + two["runs"]
    assert both["gpu_hours"]["p50"] == pytest.approx(one["gpu_hours"]["p50"] + two["gpu_hours"]["p50"], rel=0.02)
    assert both["total_usd"]["p50"] == pytest.approx(one["total_usd"]["p50"] + two["total_usd"]["p50"], rel=0.02)
    assert both["total_usd"]["p95"] < one["total_usd"]["p95"] + two["total_usd"]["p95"]  # the GPUs err apart
    offers = {(o["price"]["gpu"], o["price"]["provider"]): o["usd"]["p50"] for o in both["offers"]}
    for alone in (one, two):
        for o in alone["offers"]:
            assert offers[o["price"]["gpu"], o["price"]["provider"]] == pytest.approx(o["usd"]["p50"], rel=0.02)
    rows = list(csv.DictReader(files["b.csv"].open(newline="")))
    assert {row["gpu"] for row in rows if row["section"] == "offer"} == {H100, L40S}
    assert [row["gpu"] for row in rows if row["section"] == "plan"] == [H100, L40S]
    total = next(row for row in rows if (row["section"], row["item"]) == ("cost", "total"))
    assert float(total["p50"]) == both["total_usd"]["p50"]
    for text in (done.stdout, files["b.html"].read_text(), files["b.md"].read_text()):
        assert H100 in text
        assert L40S in text
    for document in (plan, other_plan):
        assert result(str(document))["plans"][0]["sha256"] in files["b.html"].read_text()


def test_a_provider_of_one_gpu_is_none_of_the_other(plan: Path, other_plan: Path) -> None:
    """Who rents out no L40S cannot be the price of both; the message names the GPU and who does."""
    done = run(str(plan), str(other_plan), "--provider", "lambda")
    assert done.exit_code == 3
    assert L40S in done.stderr
    assert "runpod" in done.stderr


def test_several_cards_at_once_are_refused() -> None:
    """Plans are of one GPU: a name that asks for eight is no GPU, and nothing is priced as if it were one."""
    done = run("--model", "qwen3-8b", "--tokens", "10M", "--gpu", f"8x{H100}")
    assert (done.exit_code, done.stdout) == (3, "")
    assert H100 in done.stderr


def test_a_plan_comes_through_a_pipe_too(plan: Path) -> None:
    """`recommend --json | budget -` is the same as through a file."""
    group = Commands("lora-plan")
    group.add_command(command)
    piped = CliRunner().invoke(group, ["budget", "-", "--json"], input=plan.read_text())
    assert piped.exit_code == 0, piped.output
    assert json.loads(piped.stdout)["result"] == result(str(plan))


def test_each_part_has_its_charts(plan: Path, tmp_path: Path) -> None:
    """Charts of a plan are numbered where there are several; charts of the project are not."""
    memory, total = tmp_path / "memory.svg", tmp_path / "total.svg"
    assert run(str(plan), str(plan), "--plot", str(memory), "--plot", str(total)).exit_code == 0
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["memory-1.svg", "memory-2.svg", "total.svg"]


def test_other_gpus_are_alternatives_with_reasons() -> None:
    """Where several GPUs are named, one is bought, the others are priced or say why not."""
    found = result("--model", "qwen3-8b", "--tokens", "10M", "--gpu", f"{H100},l40s-48gb,t4-16gb")
    assert {o["gpu"] for o in found["elsewhere"]} < {H100, "l40s-48gb", "t4-16gb"}
    reasons = {o["gpu"]: o["reason"] for o in found["elsewhere"]}
    assert "nothing to run" in reasons["t4-16gb"] or reasons["t4-16gb"] == ""
    assert any(o["total_usd"] for o in found["elsewhere"])


def test_csv_is_a_table_of_numbers(plan: Path, tmp_path: Path) -> None:
    """The file reads back, its total is the one of --json, and lines carry basis, source and date."""
    path = tmp_path / "b.csv"
    found = result(str(plan), "--csv", str(path))
    rows = list(csv.DictReader(path.open(newline="")))
    total = next(row for row in rows if row["item"] == "total")
    assert float(total["p90"]) == found["total_usd"]["p90"]
    assert {row["section"] for row in rows} >= {"cost", "time", "offer", "assumption", "alternative", "plan", "hosted"}
    assert all(row["as_of"] for row in rows if row["section"] == "offer")
    assert all(row["source"] for row in rows if row["section"] == "assumption" and row["basis"] != "exact")


BROKEN = [
    ("schema_version", 2), ("result", None), ("result", []), ("result.recommended", 3), ("result.recommended.time.run_s.value", -1),
    ("result.recommended.time.run_s.value", "fast"), ("result.recommended.time.run_s.low", 1e9), ("result.recommended.time.run_s", None),
    ("result.recommended.params.total", True), ("result.recommended.params.total", 10**400), ("result.recommended.model.name", 7),
    ("result.recommended.model.name", "x" * 5000), ("result.recommended.cost.prices.0.usd_per_gpu_hour", 0),
    ("result.recommended.cost.prices.0.usd_per_gpu_hour", "2,69"), ("result.recommended.cost.prices.0.as_of", "yesterday"),
    ("result.recommended.cost.prices.0.as_of", "2999-01-01"), ("result.recommended.cost.prices.0.commitment", "handshake"),
    ("result.recommended.memory.phases.backward.terms", {}), ("result.recommended.memory.p_fit", 2),
    ("result.recommended.capacity.need.basis", "gut"), ("result.data.examples", 0), ("warnings", "many"), ("provenance", 1),
]  # fmt: skip


@pytest.mark.parametrize(("at", "value"), BROKEN, ids=[f"{at}={str(value)[:10]}" for at, value in BROKEN])
def test_a_plan_that_was_tampered_with_is_refused(plan: Path, tmp_path: Path, at: str, value: Any) -> None:
    """Exit 3, one line that names the place; no traceback, nothing written."""
    page = tmp_path / "b.html"
    done = run(changed(plan, tmp_path, at, value), "--html", str(page))
    assert done.exit_code == 3, done.output
    assert len(done.stderr.splitlines()) == 1
    assert not page.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN", "[" * 100_000, '{"a": NaN}', "\x00\xff"])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    """Exit 3 and one line for anything that is no plan document."""
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    done = run(str(path))
    assert (done.exit_code, len(done.stderr.splitlines())) == (3, 1)


def test_files_that_are_none(tmp_path: Path, plan: Path) -> None:
    """A missing file, a directory, a target that cannot be written: one line each."""
    for words in (
        [str(tmp_path / "no.json")],
        [str(tmp_path)],
        [str(plan), "--html", str(tmp_path)],
        [str(plan), "--csv", "/no/such/x.csv"],
    ):
        done = run(*words)
        assert (done.exit_code, len(done.stderr.splitlines())) == (3, 1), done.output


def test_a_plan_without_a_plan_is_four(tmp_path: Path) -> None:
    """What recommend could not plan cannot be budgeted: exit 4 with its reason."""
    from lora_planner.cli import main

    path = tmp_path / "none.json"
    words = ["recommend", "--model", "llama-3.1-70b", "--tokens", "1M", "--gpu", "t4-16gb", "--json"]
    path.write_text(CliRunner().invoke(main, words).stdout)
    done = run(str(path))
    assert done.exit_code == 4
    assert "does not fit" in done.stderr


def test_words_that_contradict() -> None:
    """Nothing to plan, a plan file and a model, an unknown chart: usage errors."""
    assert run().exit_code == 2
    assert run("plan.json", "--model", "qwen3-8b").exit_code == 2
    assert run("plan.json", "--plot", "pie.svg").exit_code == 2
    assert run("plan.json", "--sweep", "0%").exit_code == 3
    assert run("plan.json", "--hosted-price", "nan").exit_code == 3
    assert run("plan.json", "--months", "-1").exit_code == 3


def test_help_shows_an_example_and_fits() -> None:
    """One screen, with a line to copy."""
    done = run("--help")
    assert "lora-plan budget plan.json" in done.stdout
    assert len(done.stdout.splitlines()) <= 55


def test_options_of_recommend_work() -> None:
    """Those that the help leaves out are the same as recommend's."""
    from lora_planner.cli import main

    theirs = {p.name for p in main.commands["recommend"].params}
    assert theirs <= {p.name for p in command.params}
    found = result("--model", "qwen3-8b", "--tokens", "1M", "--gpu", H100, "--epochs", "3", "--max-length", "512")
    assert found["hosted"]["tokens"]["value"] > 3e6


def test_epochs_reach_the_hosted_tokens() -> None:
    """Three epochs are three times the tokens of one."""
    one, three = (result("--model", "qwen3-8b", "--tokens", "10M", "--gpu", H100, "--epochs", n, "--sweep", "100%")["hosted"]["tokens"]["value"]
                  for n in ("1", "3"))  # fmt: skip
    assert three == pytest.approx(3 * one, rel=1e-6)


def test_rl_says_what_is_missing() -> None:
    """Sampling is in the time, rewards are not, and the report says so."""
    done = run(
        "--model", "qwen3-8b", "--tokens", "10M", "--gpu", H100, "--rl", "--problems", "1000", "--pass-rate", "0.3"
    )
    assert done.exit_code == 0, done.output
    assert "W-RL-TIME" in done.stdout


def test_one_run_costs_what_recommend_says(plan: Path) -> None:
    """A project of a single run, nothing else and one provider: time times price, at the p50 and at the p95."""
    document = json.loads(plan.read_text())
    bill = document["result"]["recommended"]["cost"]
    cheapest = bill["prices"][0]["provider"]
    nothing = [word for name in ("rates", "eval", "failed", "idle", "setup", "months") for word in (f"--{name}", "0")]
    found = result(str(plan), "--seeds", "1", "--provider", cheapest, *nothing)
    assert found["total_usd"]["p50"] == pytest.approx(bill["cheapest_usd"]["value"], rel=0.01)
    assert found["total_usd"]["p95"] == pytest.approx(bill["cheapest_usd"]["high"], rel=0.01)
