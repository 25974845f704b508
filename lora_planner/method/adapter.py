"""One kind of adapter matrix pair, in all its copies."""

from __future__ import annotations

from dataclasses import dataclass

from lora_planner.model import Linear


@dataclass(frozen=True, slots=True)
class Adapter:
    """The pairs (A [rank * parts, d_in], B [d_out, rank]) that adapt one `Linear` in the whole model.

    `parts`: gate and up have an A each although they are stored as one matrix.
    A factor that the experts share has fewer stored copies than the other one.
    `fused`: peft's `target_parameters`, which adds B A to the weight of *all* copies before use,
    whatever a token needs.
    """

    linear: Linear
    rank: int
    a_copies: int
    b_copies: int
    a_used: int  # copies of A one token is multiplied with
    b_used: int
    parts: int = 1
    fused: bool = False

    @classmethod
    def of(cls, linear: Linear, rank: int) -> Adapter:
        """A plain pair on every copy of a matrix."""
        return cls(linear, rank, linear.count, linear.count, linear.used, linear.used)

    @property
    def a_params(self) -> int:
        return self.rank * self.parts * self.linear.d_in * self.a_copies

    @property
    def b_params(self) -> int:
        return self.rank * self.linear.d_out * self.b_copies

    @property
    def magnitudes(self) -> int:
        """DoRA's: one per output feature."""
        return self.linear.d_out * self.b_copies

    @property
    def a_active(self) -> int:
        """Elements of A one token is multiplied with."""
        return self.rank * self.parts * self.linear.d_in * self.a_used

    @property
    def b_active(self) -> int:
        return self.rank * self.linear.d_out * self.b_used
