"""Facts as rows: GPUs, prices, fitted constants. Looked up by exact name, or an error; never a neighbour.

`data/gpus.toml` and `data/prices.toml` speak the datasheet's units; this file converts once to bytes,
bytes/s and FLOP/s. To add a GPU, append a block there; nothing here changes.

`measured.json` in `home()` holds what was measured on the user's own machines. Its rows come before the
packaged ones: the runner and calibrate/ write it, everything here only reads.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from lora_planner.errors import BadInput, UnknownName, nearest
from lora_planner.ledger import ASSUMED, BASES, EXACT
from lora_planner.units import MIB

DATA = Path(__file__).parent / "data"
HOME_VARIABLE = "LORA_PLAN_HOME"
MEASURED = "measured.json"
MEASURED_SCHEMA = 1

COMMITMENTS = ("on-demand", "spot", "reserved")
#: from this age on a price is called stale (GPU list prices moved by tens of percent within a year)
STALE_DAYS = 30
#: a price above this is a typing error; the dearest list price seen is about 15 USD
MAX_USD_PER_GPU_HOUR = 1000.0
MAX_FILE_BYTES = 1 << 20

CPU = "cpu"  # the `form` of a device whose kernels the host itself executes

GPU_BLOCK = "a block with reported_as, memory_mib, hbm_tb_per_s, tflops, form, source, as_of"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One product with one memory size and one form; its peaks are dense, never the sparse ones.

    `peak_flops_per_s` lacks a dtype that the hardware does not have (bf16 on a T4).
    `memory_basis` is "exact" where the number is the driver's, else "assumed".
    """

    name: str
    reported_as: tuple[str, ...]
    memory_bytes: int
    hbm_bytes_per_s: float
    peak_flops_per_s: Mapping[str, float]
    form: str
    source: str
    as_of: date
    also: tuple[str, ...] = ()
    memory_basis: str = EXACT

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s in `dtype`; a dtype without hardware is an error, not a slower number."""
        if dtype in self.peak_flops_per_s:
            return self.peak_flops_per_s[dtype]
        have = ", ".join(self.peak_flops_per_s)
        raise BadInput(f"{self.name} has no {dtype} hardware", self.source, f"Choose one of: {have}.")


@dataclass(frozen=True, slots=True)
class Price:
    """What one GPU cost for one hour at one provider on one day."""

    gpu: str
    usd_per_gpu_hour: float
    provider: str
    commitment: str
    source: str
    as_of: date
    basis: str = EXACT


@dataclass(frozen=True, slots=True)
class Constant:
    """A fitted or assumed number of one software stack; `gpu` is a name, or "*" for all others."""

    name: str
    stack: str
    gpu: str
    value: float
    low: float
    high: float
    basis: str
    n: int
    source: str


# ---------------------------------------------------------------- what was measured here

P = ParamSpec("P")
T = TypeVar("T")
_REMEMBERED: list[Callable[[], None]] = []


def remembered(function: Callable[P, T]) -> Callable[P, T]:
    """functools.cache for what depends on `measured()`: `forget` empties it."""
    found = cache(function)
    _REMEMBERED.append(found.cache_clear)
    return cast(Callable[P, T], found)


def forget() -> None:
    """Read `measured.json` again at the next question: after it was written, or `home()` moved."""
    for clear in _REMEMBERED:
        clear()


def home() -> Path:
    """Where the user's own measurements and cached models live: $LORA_PLAN_HOME, else ~/.lora-plan."""
    return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".lora-plan")


@dataclass(frozen=True, slots=True)
class Measured:
    """The rows of one `measured.json`. `memory` rows override those of memory_constants.json, by GPU and stack."""

    gpus: tuple[Gpu, ...] = ()
    constants: tuple[Constant, ...] = ()
    memory: tuple[Constant, ...] = ()


@remembered
def measured() -> Measured:
    """The user's own rows; none where nothing was measured."""
    return read_measured(home() / MEASURED)


def read_measured(path: Path) -> Measured:
    """A `measured.json`, every row checked; a damaged one is refused, never half used."""
    try:
        if not path.exists():
            return Measured()
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != MEASURED_SCHEMA:
            raise ValueError(f"schema {document['schema']!r} is unknown here")
        return Measured(
            tuple(device(row) for row in document.get("gpus", [])),
            tuple(_measured_constant(row) for row in document.get("constants", [])),
            tuple(_measured_constant(row) for row in document.get("memory", [])),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = "not JSON" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: {str(error)[:80]}"
        fix = "Delete the file and measure again: lora-plan calibrate."
        raise BadInput(f"the file of measured constants is damaged, {why}", str(path), fix) from None


def device(row: Mapping[str, Any]) -> Gpu:
    """A measured device from a row with the keys of `data/gpus.toml` and its name, or ValueError."""
    found = _gpu(str(row["name"]), {**row, "as_of": date.fromisoformat(row["as_of"])})
    rates = (found.memory_bytes, found.hbm_bytes_per_s, *found.peak_flops_per_s.values())
    if not found.peak_flops_per_s or not all(isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"device {found.name!r} has no positive peaks")
    return found


def device_row(g: Gpu) -> dict[str, Any]:
    """The inverse of `device`."""
    return {
        "name": g.name,
        "reported_as": list(g.reported_as),
        "memory_mib": g.memory_bytes // MIB,
        "hbm_tb_per_s": g.hbm_bytes_per_s / 1e12,
        "tflops": {dtype: peak / 1e12 for dtype, peak in g.peak_flops_per_s.items()},
        "form": g.form,
        "source": g.source,
        "as_of": g.as_of.isoformat(),
    }


def _measured_constant(row: Mapping[str, Any]) -> Constant:
    found = Constant(**row)
    _check(found)
    return found


# ---------------------------------------------------------------- GPUs


@remembered
def gpus() -> tuple[Gpu, ...]:
    """Every GPU of `data/gpus.toml`, in the file's order, then the devices that were measured here.

    A measured row of a packaged name replaces it; a name that a packaged card is reported as stays with it.
    """
    packaged = tuple(_gpu(name, row) for name, row in _packaged_toml("gpus.toml").items())
    own = measured().gpus
    names = {g.name for g in own}
    return tuple(g for g in packaged if g.name not in names) + own


def gpu(name: str) -> Gpu:
    """The GPU of exactly this name: ours, or the one its driver reports.

    "h100" (SXM, PCIe or NVL?), a laptop part or a MIG slice raise `UnknownName` with candidates.

    >>> gpu("NVIDIA H100 80GB HBM3").name
    'h100-sxm-80gb'
    >>> gpu("h100")
    Traceback (most recent call last):
    ...
    lora_planner.errors.UnknownName: 'h100' is no exact name of a GPU (data/gpus.toml). Did you mean \
h100-sxm-80gb, h100-pcie-80gb, h100-nvl-94gb? Or add a block with reported_as, memory_mib, \
hbm_tb_per_s, tflops, form, source, as_of.
    """
    found = _gpu_by_any_name().get(name)
    if found is not None:
        return found
    shown = name if len(name) <= 60 else name[:57] + "..."
    known = [g.name for g in gpus()]
    candidates = gpu_candidates(name)
    hint = f"Did you mean {', '.join(candidates)}?" if candidates else f"Known: {', '.join(known)}."
    raise UnknownName(
        f"{shown!r} is no exact name of a GPU", "data/gpus.toml", f"{hint} Or add {GPU_BLOCK}.",
        name=name, candidates=candidates, known=known,
    )  # fmt: skip


def gpu_candidates(name: str) -> list[str]:
    """Names to show beside a refusal: the products whose model number is in it, else look-alikes.

    >>> gpu_candidates("A100"), gpu_candidates("RTX 4090 Laptop")
    (['a100-sxm-80gb', 'a100-sxm-40gb', 'a100-pcie-80gb', 'a100-pcie-40gb'], ['rtx4090-24gb'])
    """
    wanted = _squeezed(name)
    if not wanted:
        return []
    parts = {g.name: next((part for part in g.name.split("-") if _has_digit(part)), g.name) for g in gpus()}
    hits = {known: part for known, part in parts.items() if part in wanted}
    longest = max(map(len, hits.values()), default=0)  # "a100" holds "a10" too
    sharing = [known for known, part in hits.items() if len(part) == longest]
    return sharing or [g for g in parts if wanted in _squeezed(g)] or nearest(name, parts)


def _has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)


def _squeezed(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


@remembered
def _gpu_by_any_name() -> dict[str, Gpu]:
    table: dict[str, Gpu] = {}
    for row in gpus():
        for name in (row.name, *row.also, *row.reported_as):
            if name in table:
                raise BadInput(f"two GPUs are called {name!r}", "data/gpus.toml")
            table[name] = row
    return table


def _gpu(name: str, row: Mapping[str, Any]) -> Gpu:
    return Gpu(
        name=name,
        reported_as=tuple(row["reported_as"]),
        memory_bytes=row["memory_mib"] * MIB,
        hbm_bytes_per_s=row["hbm_tb_per_s"] * 1e12,
        peak_flops_per_s={dtype: tflops * 1e12 for dtype, tflops in row["tflops"].items()},
        form=row["form"],
        source=row["source"],
        as_of=row["as_of"],
        also=tuple(row.get("also", ())),
        memory_basis=row.get("memory", EXACT),
    )


# ---------------------------------------------------------------- prices


def prices(path: str | Path | None = None) -> tuple[Price, ...]:
    """The built-in prices; a user's file replaces all rows of the GPUs that it names."""
    own = read_prices(path) if path is not None else ()
    named = {price.gpu for price in own}
    return own + tuple(price for price in _built_in_prices() if price.gpu not in named)


def read_prices(path: str | Path) -> tuple[Price, ...]:
    """A user's price file: `[[price]]` tables, every value checked, or `BadInput` with the place."""
    where = Path(path).name
    try:
        if Path(path).stat().st_size > MAX_FILE_BYTES:
            raise BadInput("a price file of over 1 MiB", where)
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the price file: {type(error).__name__}", where) from None
    return parse_prices(text, where)


def parse_prices(text: str, where: str = "prices") -> tuple[Price, ...]:
    """Rows of a price file in TOML.

    >>> parse_prices('''[[price]]
    ... gpu = "l4-24gb"
    ... usd_per_gpu_hour = 0.71
    ... provider = "ours"
    ... as_of = 2026-11-01''')[0].commitment
    'on-demand'
    """
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        fix = "A price is a plain number with a point: usd_per_gpu_hour = 1.99."
        raise BadInput(f"not TOML: {error}", where, fix) from None
    rows = tables.get("price")
    others = sorted(set(tables) - {"price"})
    if not isinstance(rows, list) or not rows or others:
        raise BadInput("expected [[price]] tables" + (f", not {others[0]!r}" if others else ""), where)
    return tuple(_price(row, f"{where}: price {i}") for i, row in enumerate(rows, start=1))


def age_days(price: Price, today: date) -> int:
    """Days since the price was true; a date after `today` is refused (a day's grace for time zones).

    >>> age_days(Price("g", 1, "p", "spot", "s", date(2026, 11, 1)), date(2026, 11, 23))
    22
    """
    days = (today - price.as_of).days
    if days < -1:
        raise BadInput(f"a price dated in the future, {price.as_of}", f"{price.provider}, {price.gpu}")
    return max(days, 0)


def is_stale(price: Price, today: date) -> bool:
    """Whether the price is over `STALE_DAYS` old."""
    return age_days(price, today) > STALE_DAYS


@cache
def _built_in_prices() -> tuple[Price, ...]:
    return parse_prices(_packaged("prices.toml"), "data/prices.toml")


def _price(row: object, where: str) -> Price:
    if not isinstance(row, dict):
        raise BadInput("expected a table", where)
    known = ("gpu", "usd_per_gpu_hour", "provider", "commitment", "source", "as_of", "basis", "currency")
    for key in row:
        if key not in known:
            raise BadInput(f"unknown key {str(key)[:40]!r}", where, f"Known: {', '.join(known)}.")
    currency = row.get("currency", "USD")
    if currency != "USD":
        fix = "Convert to USD and say so in source; currencies are never mixed."
        raise BadInput(f"currency {currency!r}", f"{where}: currency", fix)
    as_of = row.get("as_of")
    if not isinstance(as_of, date) or isinstance(as_of, datetime):
        raise BadInput("as_of is missing or no date", f"{where}: as_of", "Write as_of = 2026-11-23.")
    return Price(
        gpu=gpu(_text(row, "gpu", where)).name,
        usd_per_gpu_hour=_usd(row.get("usd_per_gpu_hour"), f"{where}: usd_per_gpu_hour"),
        provider=_text(row, "provider", where),
        commitment=_one_of(row.get("commitment", "on-demand"), COMMITMENTS, f"{where}: commitment"),
        source=_text(row, "source", where, default="the user's price file"),
        as_of=as_of,
        basis=_one_of(row.get("basis", EXACT), (EXACT, ASSUMED), f"{where}: basis"),
    )


def _usd(value: object, where: str) -> float:
    """A positive plain number. Text is refused: "1,99" is 1.99 to one reader and 199 to another."""
    fix = "Write a plain positive number with a point: 1.99."
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"no number: {str(value)[:40]!r}" if value is not None else "missing", where, fix)
    if not 0 < value <= MAX_USD_PER_GPU_HOUR:  # NaN fails this too
        raise BadInput(f"{value} USD per GPU-hour is out of range", where, fix)
    return float(value)


def _text(row: Mapping[str, object], key: str, where: str, default: str = "") -> str:
    value = row.get(key, default)
    if not isinstance(value, str) or not value.strip() or len(value) > 300:
        raise BadInput(f"{key} is missing or no text", f"{where}: {key}")
    return value


def _one_of(value: object, allowed: Iterable[str], where: str) -> str:
    if value in (options := tuple(allowed)):
        return str(value)
    raise BadInput(f"{str(value)[:40]!r} is not one of {', '.join(options)}", where)


# ---------------------------------------------------------------- constants


@remembered
def constants() -> tuple[Constant, ...]:
    """Every row of `data/constants.json`, overridden by the user's own of the same name, stack and GPU."""
    document = json.loads(_packaged("constants.json"))
    rows = tuple(Constant(**row) for row in document["constants"])
    for row in rows:
        _check(row)
    own = {(row.name, row.stack, row.gpu) for row in measured().constants}
    return tuple(row for row in rows if (row.name, row.stack, row.gpu) not in own) + measured().constants


def _check(row: Constant) -> None:
    """low <= value <= high and a known basis, or ValueError."""
    if not row.low <= row.value <= row.high or row.basis not in BASES or not isfinite(row.high - row.low):
        raise ValueError(f"constant {row.name!r} of {row.stack!r} on {row.gpu!r} is inconsistent")


def _packaged(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")


def _packaged_toml(name: str) -> dict[str, Any]:
    return tomllib.loads(_packaged(name))


@dataclass(frozen=True, slots=True)
class GpuRow:
    """A line of `lora-plan gpus`: the data sheet beside the prices known for it."""

    name: str
    memory_gib: float
    bf16_tflops: float | None  # dense
    hbm_tb_per_s: float
    usd_per_hour: str
    as_of: str
    also: str


def gpu_rows(prices_path: str | None = None) -> list[GpuRow]:
    """Every GPU with the range of its prices and the newest date among them."""
    found = []
    for g in gpus():
        rows = [row for row in prices(prices_path) if row.gpu == g.name]
        usd = sorted(row.usd_per_gpu_hour for row in rows)
        bf16 = g.peak_flops_per_s.get("bf16")
        found.append(
            GpuRow(
                g.name,
                round(g.memory_bytes / (1024 * MIB), 1),
                round(bf16 / 1e12, 1) if bf16 else None,
                round(g.hbm_bytes_per_s / 1e12, 2),
                f"{usd[0]:.2f} - {usd[-1]:.2f}" if usd else "no price",
                max((row.as_of.isoformat() for row in rows), default=""),
                ", ".join((*g.also, *g.reported_as)),
            )
        )
    return found
