"""What would make a run fit: the largest micro-batch, the smallest change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, Unpack

from lora_planner.ledger import Estimate
from lora_planner.memory import MIN_P_FIT, QUANTISED_BITS, MemoryPlan, Options, memory, p_fit
from lora_planner.method import Method
from lora_planner.model import Model
from lora_planner.units import gib

#: a max length below this share of the present one is no answer to "what would fit"
SHORTEST = 0.5


def largest_micro_batch(
    model: Model,
    method: Method,
    capacity_bytes: float,
    *,
    seq_len: int,
    min_p_fit: float = MIN_P_FIT,
    limit: int = 4096,
    **options: Unpack[Options],
) -> int:
    """The largest micro-batch up to `limit` that fits; 0 where not even one sample does. By bisection."""
    return _largest(limit, lambda n: _fits(Run(model, method, n, seq_len, options), capacity_bytes, min_p_fit))


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 1..limit for which a condition holds that holds for every smaller n too, else 0."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Run(NamedTuple):
    """A configuration that the search for what fits changes one part of."""

    model: Model
    method: Method
    micro_batch: int
    seq_len: int
    options: Options

    def plan(self) -> MemoryPlan:
        return memory(self.model, self.method, micro_batch=self.micro_batch, seq_len=self.seq_len, **self.options)

    def having(self, options: Options) -> Run:
        return self._replace(options={**self.options, **options})


def _fits(run: Run, capacity: float, min_p_fit: float) -> bool:
    return p_fit(run.plan().peak, capacity) >= min_p_fit


@dataclass(frozen=True, slots=True)
class Change:
    """What makes a configuration fit: one change, or two; the peak after them and what they save."""

    what: tuple[str, ...]
    peak: Estimate
    saved_bytes: float

    def __str__(self) -> str:
        return f"{' and '.join(self.what)}: {gib(self.saved_bytes)} less, peak {gib(self.peak.value)}"


Step = Callable[[Run, float, float], tuple[str, Run] | None]


def _checkpointing(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    if run.options.get("checkpointing", "none") == "full":
        return None
    return "full checkpointing", run.having({"checkpointing": "full"})


def _chunked(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    if run.options.get("loss", "full") == "chunked":
        return None
    return "chunked loss", run.having({"loss": "chunked"})


def _smaller_batch(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    n = _largest(run.micro_batch - 1, lambda n: _fits(run._replace(micro_batch=n), capacity, sure))
    return (f"micro-batch {n}", run._replace(micro_batch=n)) if n else None


def _shorter(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    n = _largest(run.seq_len - 1, lambda n: _fits(run._replace(seq_len=n), capacity, sure)) // 64 * 64
    return (f"max length {n}", run._replace(seq_len=n)) if n >= SHORTEST * run.seq_len else None


def _nf4(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    m = run.method
    if m.is_full or m.base_dtype in QUANTISED_BITS:
        return None
    return "nf4 base", run._replace(method=replace(m, name="qlora" if m.name == "lora" else m.name, base_dtype="nf4"))


def _bf16_adapter(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    if run.method.is_full or run.method.adapter_dtype == "bfloat16":
        return None
    return "adapter in bf16", run._replace(method=replace(run.method, adapter_dtype="bfloat16"))


def _small_states(run: Run, capacity: float, sure: float) -> tuple[str, Run] | None:
    if run.options.get("optimizer", "adamw") == "adamw-8bit":
        return None
    return "8-bit optimizer", run.having({"optimizer": "adamw-8bit"})


#: in the order in which they cost least: time, then statistics, then precision
STEPS: tuple[Step, ...] = (
    _checkpointing, _chunked, _smaller_batch, _shorter, _nf4, _bf16_adapter, _small_states,
)  # fmt: skip
#: these look for the largest value that fits, so that in a pair they come second
SEARCHES = (_smaller_batch, _shorter)


def smallest_change_that_fits(
    model: Model,
    method: Method,
    capacity_bytes: float,
    *,
    micro_batch: int,
    seq_len: int,
    min_p_fit: float = MIN_P_FIT,
    **options: Unpack[Options],
) -> Change | None:
    """The first single change of STEPS after which it fits, else the first pair; None where none does.

    A configuration that fits already gives a change of nothing.
    """
    run = Run(model, method, micro_batch, seq_len, options)
    before = run.plan().peak
    for steps in ((), *combinations(STEPS, 1), *combinations(STEPS, 2)):
        done, after = [], run
        for step in sorted(steps, key=lambda s: s in SEARCHES):
            changed = step(after, capacity_bytes, min_p_fit)
            if changed is None:
                break
            done.append(changed[0])
            after = changed[1]
        else:
            peak = after.plan().peak
            if p_fit(peak, capacity_bytes) >= min_p_fit:
                return Change(tuple(done), peak, before.value - peak.value)
    return None
