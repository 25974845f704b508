"""GPUs and prices: exact names only, dense peaks, dated prices, strict parsing."""

import csv
from datetime import date
from pathlib import Path

import pytest

from lora_planner import facts
from lora_planner.errors import BadInput, UnknownName
from lora_planner.facts import Price, age_days, gpu, gpus, is_stale, parse_prices, prices

GOLDEN = Path(__file__).parent / "golden"
TODAY = date(2026, 11, 23)
ROW = """[[price]]
gpu = "h100-sxm-80gb"
usd_per_gpu_hour = 2.49
provider = "ours"
as_of = 2026-11-01
"""


def golden_peaks():
    with (GOLDEN / "gpu_peaks.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", golden_peaks(), ids=lambda r: f"{r['gpu']}-{r['dtype']}")
def test_peaks_are_the_dense_datasheet_figures(row):
    """Peaks equal the datasheet's dense TFLOP/s, never the ones with sparsity."""
    expected = float(row["dense_tflops"]) * 1e12
    assert gpu(row["gpu"]).peak(row["dtype"]) == pytest.approx(expected, rel=float(row["rel_tol"]))


def test_every_gpu_row_says_where_it_comes_from():
    """Each row has a source, a date not in the future, a memory basis and plausible sizes."""
    for row in gpus():
        assert row.source
        assert isinstance(row.as_of, date)
        assert row.as_of <= TODAY
        assert row.memory_basis in ("exact", "assumed")
        assert row.reported_as
        assert 8 * 2**30 < row.memory_bytes < 300 * 2**30
        assert 0.1e12 < row.hbm_bytes_per_s < 10e12
        assert set(row.peak_flops_per_s) <= {"fp32", "tf32", "bf16", "fp16", "fp8"}


def test_faster_formats_have_higher_peaks():
    """fp32 <= tf32 <= 16 bit <= fp8 on every card."""
    for row in gpus():
        peaks = row.peak_flops_per_s
        order = [peaks[dtype] for dtype in ("fp32", "tf32", "fp16", "fp8") if dtype in peaks]
        assert order == sorted(order), row.name


def test_memory_is_what_the_driver_prints_and_below_the_sticker():
    """H100 reports 81559 MiB, not 80 GB; no driver prints more than the sticker in GiB."""
    assert gpu("h100-sxm-80gb").memory_bytes == 81559 * 2**20
    for row in gpus():
        sticker = row.name.rsplit("-", 1)[1].removesuffix("gb")
        assert row.memory_bytes <= int(sticker) * 2**30, row.name


def test_a_gpu_answers_to_its_driver_name():
    """The exact string of nvidia-smi finds the row."""
    for row in gpus():
        for name in row.reported_as:
            assert gpu(name) is row


@pytest.mark.parametrize(
    ("name", "candidate"),
    [
        ("h100", "h100-nvl-94gb"),
        ("A100", "a100-pcie-40gb"),
        ("h100-80g", "h100-pcie-80gb"),
        ("rtx4090 laptop", "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx4090-24gb"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "a100-sxm-80gb"),
        ("H100-SXM-80GB", "h100-sxm-80gb"),
        ("l40s ", "l40s-48gb"),
    ],
)
def test_an_ambiguous_or_unknown_gpu_is_refused_with_candidates(name, candidate):
    """A name that is not exact raises, lists candidates and says what block to add."""
    with pytest.raises(UnknownName) as caught:
        gpu(name)
    assert candidate in str(caught.value)
    assert "add a block" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["", "gaudi2", "x" * 5000, "../../etc", "\0"])
def test_a_hopeless_name_is_refused_on_one_short_line(name):
    """Nonsense raises too, without echoing kilobytes."""
    with pytest.raises(UnknownName) as caught:
        gpu(name)
    assert len(str(caught.value)) < 1500
    assert "\n" not in str(caught.value)


def test_a_dtype_without_hardware_is_an_error():
    """A T4 has no bf16: asking for it raises and names what there is."""
    with pytest.raises(BadInput, match="fp16"):
        gpu("t4-16gb").peak("bf16")


def test_built_in_prices_are_marked_assumed_and_stale():
    """The built-in list is dated, from memory, over a month old, and says so."""
    rows = prices()
    assert len(rows) > 40
    for row in rows:
        assert row.basis == "assumed"
        assert row.source
        assert is_stale(row, TODAY)


def test_a_users_file_replaces_all_rows_of_its_gpus(tmp_path):
    """One own H100 row leaves no built-in H100 row, and every other GPU as it was."""
    path = tmp_path / "prices.toml"
    path.write_text(ROW, encoding="utf-8")
    rows = prices(path)
    assert [p.provider for p in rows if p.gpu == "h100-sxm-80gb"] == ["ours"]
    assert {p.gpu for p in rows} == {p.gpu for p in prices()}
    assert rows[0].basis == "exact"


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("2.49", "-1", "usd_per_gpu_hour"),
        ("2.49", "0", "usd_per_gpu_hour"),
        ("2.49", "nan", "usd_per_gpu_hour"),
        ("2.49", "inf", "usd_per_gpu_hour"),
        ("2.49", "1e400", "usd_per_gpu_hour"),
        ("2.49", "true", "usd_per_gpu_hour"),
        ("2.49", '"free"', "usd_per_gpu_hour"),
        ("2.49", '"1,99"', "usd_per_gpu_hour"),
        ("2.49", "1,99", "prices"),
        ("2.49", '"2.49 EUR"', "usd_per_gpu_hour"),
        ("usd_per_gpu_hour = 2.49", "", "usd_per_gpu_hour"),
        ("usd_per_gpu_hour", "eur_per_gpu_hour", "price 1"),
        ("as_of = 2026-11-01", "", "as_of"),
        ("as_of = 2026-11-01", 'as_of = "yesterday"', "as_of"),
        ("as_of = 2026-11-01", "as_of = 2026-11-01T00:00:00", "as_of"),
        ("as_of = 2026-11-01", 'as_of = 2026-11-01\ncurrency = "EUR"', "currency"),
        ('provider = "ours"', "provider = 3", "provider"),
        ('provider = "ours"', 'provider = "ours"\ncommitment = "often"', "commitment"),
        ('"h100-sxm-80gb"', '"h100"', "gpus.toml"),
        ("[[price]]", "[price]", "prices"),
        (ROW, "", "prices"),
        (ROW, "[" * 5000, "prices"),
    ],
)
def test_a_bad_price_is_refused_with_its_place(old, new, place):
    """Negative, zero, text, EU decimals, other currencies, no date: exit 3, one line, the place."""
    with pytest.raises(BadInput) as caught:
        parse_prices(ROW.replace(old, new))
    assert place in str(caught.value)
    assert caught.value.exit_code == 3


def test_an_unreadable_price_file_is_refused(tmp_path):
    """A missing file, a folder and binary data raise BadInput without the folder's path."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path, binary):
        with pytest.raises(BadInput) as caught:
            prices(path)
        assert str(tmp_path.parent) not in str(caught.value)


def test_the_age_of_a_price_is_counted_from_the_given_day():
    """Thirty days old is fresh, thirty-one is stale, tomorrow's price is refused."""
    row = Price("l4-24gb", 1.0, "p", "on-demand", "s", date(2026, 10, 24))
    assert (age_days(row, TODAY), is_stale(row, TODAY)) == (30, False)
    assert is_stale(row, date(2026, 11, 24))
    with pytest.raises(BadInput, match="future"):
        age_days(row, date(2026, 10, 1))


def test_constants_are_consistent_and_sourced():
    """Every constant lies in its interval, has a source, and is fitted only where n > 0."""
    rows = facts.constants()
    assert rows
    assert len({(r.name, r.stack, r.gpu) for r in rows}) == len(rows)
    for row in rows:
        assert row.source
        assert (row.basis == "fitted") == (row.n > 0)
        assert row.gpu == "*" or gpu(row.gpu).name == row.gpu
