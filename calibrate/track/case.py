"""One published measurement and what the planner says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_planner.ledger import Estimate


@dataclass(frozen=True, slots=True)
class Case:
    """A quantity of one row.

    quantity    "peak memory", "tokens/s", "minutes", "learning rate", "rank penalty", "samples to target", ...
    source      who published it, short; what is left out together when a source is left out
    model, family, method, gpu    to group errors by; "" where it has none
    label       the row in words, for a list of the worst
    measured    in `unit`, converted where the source has another
    predicted   None where the planner has no prediction, `reason` then says why
    fitted      whether a constant that predicts it was fitted on this row
    at_least, at_most    the measurement is only a bound (out of memory; an optimum at the end of its grid)
    details     further numbers of this case by name, such as a regret
    """

    quantity: str
    source: str
    model: str
    family: str
    method: str
    gpu: str
    label: str
    unit: str
    measured: float
    predicted: Estimate | None = None
    reason: str = ""
    fitted: bool = False
    at_least: bool = False
    at_most: bool = False
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """predicted / measured - 1: below 0 where too little was predicted. None without a prediction or of a bound."""
        if self.predicted is None or self.at_least or self.at_most or not self.measured:
            return None
        return self.predicted.value / self.measured - 1

    @property
    def covered(self) -> bool | None:
        """Whether the interval holds the measurement; of a bound, whether it reaches beyond it."""
        if self.predicted is None or math.isnan(self.measured):
            return None
        if self.at_least:
            return self.predicted.high >= self.measured
        if self.at_most:
            return self.predicted.low <= self.measured
        return self.predicted.low <= self.measured <= self.predicted.high
