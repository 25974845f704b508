"""A quantity is a list of named terms; every term says what kind of number it is.

Basis: "exact" (counted), "derived" (follows from exact numbers by a stated formula),
"fitted" (from measurements, with an interval), "assumed" (a default that a caller can change).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

EXACT, DERIVED, FITTED, ASSUMED = "exact", "derived", "fitted", "assumed"
#: from the surest to the least sure; a sum is as sure as its least sure part
BASES = (EXACT, DERIVED, FITTED, ASSUMED)


@dataclass(slots=True)
class Estimate:
    """A value with its 90 % interval. `low == value == high` only where nothing is unsure."""

    low: float
    value: float
    high: float
    unit: str
    basis: str
    source: str = ""

    def scaled(self, factor: float, unit: str = "") -> Estimate:
        """The same estimate in another unit, or times an exact number."""
        return Estimate(
            self.low * factor,
            self.value * factor,
            self.high * factor,
            unit or self.unit,
            self.basis,
            self.source,
        )


def exact(value: float, unit: str, source: str = "") -> Estimate:
    return Estimate(value, value, value, unit, EXACT, source)


def around(value: float, factor: float, unit: str, basis: str, source: str = "") -> Estimate:
    """A log-symmetric interval: value / factor ... value * factor.

    >>> around(10, 2, "x", ASSUMED).high
    20
    """
    return Estimate(value / factor, value, value * factor, unit, basis, source)


@dataclass(slots=True)
class Term:
    """One addend. `why` names the function whose docstring explains it ("memory.logits")."""

    name: str
    value: float
    basis: str
    why: str
    low: float | None = None  # None: as sure as `value`
    high: float | None = None
    note: str = ""


@dataclass(slots=True)
class Ledger:
    """Terms of one quantity and the convention under which they were counted.

    `adds`: False where each line is a number of its own (one price row, one source).
    """

    quantity: str
    unit: str
    terms: list[Term]
    convention: str = ""
    adds: bool = True

    @property
    def total(self) -> float:
        return sum(term.value for term in self.terms)

    @property
    def basis(self) -> str:
        return max((t.basis for t in self.terms if t.value), key=BASES.index, default=EXACT)

    def estimate(self) -> Estimate:
        """Total with an interval: the terms' errors are independent, so half-widths add in
        quadrature.

            total -+ sqrt(sum (value - low)^2),  total + sqrt(sum (high - value)^2)

        >>> terms = [Term("a", 3, FITTED, "", 0, 6), Term("b", 5, FITTED, "", 1, 9)]
        >>> Ledger("x", "B", terms).estimate().high
        13.0
        """
        below = above = total = 0.0
        for t in self.terms:
            total += t.value
            if t.low is not None:
                below += (t.value - t.low) ** 2
            if t.high is not None:
                above += (t.high - t.value) ** 2
        return Estimate(total - sqrt(below), total, total + sqrt(above), self.unit, self.basis)

    def share(self, basis: str) -> float:
        """Part of the total that is of this basis, 0 to 1."""
        total = self.total
        return sum(t.value for t in self.terms if t.basis == basis) / total if total else 0.0

    def largest(self) -> Term:
        return max(self.terms, key=lambda t: t.value)

    def __getitem__(self, name: str) -> float:
        """The sum of the terms of this name; 0 when there is none."""
        return sum(t.value for t in self.terms if t.name == name)
