"""The findings of "LoRA Without Regret", one a file: what is claimed, which runs tell, and by which rule.

A claim is a module with these names. Its rule is fixed before its first run: `registry.document` hashes all of it.

    SENTENCE    the claim, as one sentence
    SOURCE      where it is made
    PUBLISHED   what was published, with its numbers, also by those who disagree
    UNIT        of the effect
    METRIC      what is measured
    RULE        how the measurement becomes a verdict, with every margin
    TRAPS       numbers of `traps.TRAPS` that this design has to avoid

    specs(size, runs) -> list[RunSpec]    designs (lab.arm) that it wants run, given what there is: grids grow
    verdict(runs, size) -> Verdict        from records alone; `size` is "cpu" or "gpu", a name of lab.SIZES
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lora_planner.errors import UnknownName, nearest

#: id -> module of this package, in the order of the page
BY_ID = {
    "C01": "counts",
    "C02": "flops",
    "C03": "adam_invariance",
    "C04": "first_update",
    "C05": "early_curves",
    "C06": "matches_full",
    "C07": "rate_ratio",
    "C08": "rate_over_ranks",
    "C09": "short_runs",
    "C10": "departure",
    "C11": "memorised_bits",
    "C13": "placement",
    "C16": "batch_penalty",
    "C17": "rl_rank_one",
    "C18": "reward_bits",
    "C19": "rate_band",
    "C20": "norms",
    "C22": "update_rank",
    "C23": "kernel",
    "MOE": "experts",
}


def claim(name: str) -> tuple[str, ModuleType]:
    """(id, module) of a claim by its id or its module's name, in any case and with "-" for "_"."""
    asked = name.strip().replace("-", "_")
    for key, module in BY_ID.items():
        if asked.upper() == key or asked.lower() == module:
            return key, import_module(f"runner.claims.{module}")
    close = nearest(name, [*BY_ID, *BY_ID.values()], 1)
    raise UnknownName(f"no claim is called {name!r}", "CLAIM",
                      "See `lora-plan verify --list`." + (f" Nearest: {close[0]}." if close else ""))  # fmt: skip
