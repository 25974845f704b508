"""One small file per fine-tuning method says what it trains, stores and scales by.

To add a method: a file with `trainable(adapter)`, `stored(adapter)` and `scaling(alpha, rank)`,
and a row in BY_NAME. What all of them share, which matrices get an adapter, is in targets.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from lora_planner.errors import UnknownName, UnsupportedAdapter, nearest
from lora_planner.method import dora, full, lora, lora_fa, qlora, rslora

BY_NAME: dict[str, ModuleType] = {
    "full": full, "lora": lora, "qlora": qlora, "rslora": rslora, "dora": dora, "lora-fa": lora_fa,
}  # fmt: skip

#: "LoRA Without Regret" adapts every expert, at the rank divided by the active experts
DEFAULT_EXPERTS = "per-expert-over-active"
EXPERTS = ("per-expert", DEFAULT_EXPERTS, "shared-outer", "fused", "none")
DEFAULT_ALPHA = 32.0


@dataclass(frozen=True, slots=True)
class Method:
    """What to train. `alpha` and `rank` mean nothing for "full".

    `base_dtype`: of the frozen weights ("nf4" under QLoRA); for "full" that of the working copy.
    `adapter_dtype`: peft's default is float32 even on a bfloat16 base (autocast_adapter_dtype).
    """

    name: str = "lora"
    rank: int = 16
    alpha: float = DEFAULT_ALPHA
    targets: tuple[str, ...] = ("all-linear",)
    experts: str = DEFAULT_EXPERTS
    base_dtype: str = "bfloat16"
    adapter_dtype: str = "float32"

    @property
    def is_full(self) -> bool:
        return self.name == "full"

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return float(BY_NAME[self.name].scaling(self.alpha, self.rank))


def method(
    name: str,
    rank: int = 16,
    alpha: float = DEFAULT_ALPHA,
    targets: tuple[str, ...] = ("all-linear",),
    experts: str = DEFAULT_EXPERTS,
    base_dtype: str = "bfloat16",
    adapter_dtype: str = "float32",
) -> Method:
    """A checked Method.

    >>> method("rslora", rank=16, alpha=32).scaling
    8.0
    """
    if name not in BY_NAME:
        hint = nearest(name, BY_NAME)
        raise UnknownName(f"method {name!r} is not known", "--method", f"Known: {', '.join(BY_NAME)}."
                          + (f" Nearest: {hint[0]}." if hint else ""))  # fmt: skip
    if experts not in EXPERTS:
        raise UnknownName(f"expert parameterisation {experts!r} is not known", "--experts",
                          f"Known: {', '.join(EXPERTS)}.")  # fmt: skip
    if name == "full":
        return Method("full", 0, 0.0, (), "none", base_dtype, adapter_dtype)
    if rank < 1:
        raise UnsupportedAdapter(f"rank {rank} is no rank", "--rank", "Use 1 or more; servers accept 8, 16, 32, 64 ...")
    if not 0 < alpha < 1e6:
        raise UnsupportedAdapter(f"alpha {alpha:g} scales the adapter to nothing or to infinity", "--alpha",
                                 "Use a positive number; the paper uses 32 at every rank.")  # fmt: skip
    if not targets:
        raise UnsupportedAdapter("no targets", "--targets", "Use all-linear, or name modules.")
    return Method(name, rank, alpha, targets, experts, "nf4" if name == "qlora" else base_dtype, adapter_dtype)
