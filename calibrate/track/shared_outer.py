"""Adapter parameters per rank and component of a hosted trainer's models, whose experts share the outer factor."""

from __future__ import annotations

from collections.abc import Sequence

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import Subject, counted, family, named, number, text
from lora_planner.errors import BadInput
from lora_planner.ledger import Estimate
from lora_planner.method import method
from lora_planner.method.targets import adapter_table

NAME = "adapter parameters of a hosted trainer"
COLUMNS = ("hub", "config", "component")
SOURCE = "tinker-cookbook hyperparam_utils"
#: groups of matrices in each component
COMPONENTS = {
    "attn": ("attn", "ssm"),
    "mlp": ("mlp_dense", "shared", "latent", "experts"),
    "unembed": ("lm_head",),
}


def cases(rows: Sequence[Row]) -> list[Case]:
    return [_case(row) for row in rows]


def _case(row: Row) -> Case:
    hub, config, component = (text(row, name) for name in COLUMNS)
    subject = Subject(SOURCE, hub, "shared-outer", family(config, hub))
    return subject.case("adapter parameters", f"{hub} {component} per rank", "params",
                        number(row, "per_rank", "tinker_table"), lambda: per_rank(component, config, hub))  # fmt: skip


def per_rank(component: str, *names: str) -> Estimate:
    """Elements of A and B at rank 1.

    >>> per_rank("attn", "llama-3.1-8b").value
    851968
    """
    if component not in COMPONENTS:
        raise BadInput(f"component {component!r} is not one of {', '.join(COMPONENTS)}")
    table = adapter_table(named(*names), method("lora", 1, targets=("tinker", "unembed")))
    found = (a for a in table.adapters if a.linear.group in COMPONENTS[component])
    return counted(sum(a.a_params + a.b_params for a in found), "params", "method.targets")
