"""LoRA: W + (alpha / r) B A, with A and B trained.   Hu et al. 2021, arXiv:2106.09685"""

from __future__ import annotations

from lora_planner.method.adapter import Adapter


def trainable(adapter: Adapter) -> int:
    """A is [r, d_in], B is [d_out, r].

        r * (d_in + d_out) * copies        [params]

    Source: Hu et al. 2021, sec. 4.1.

    >>> from lora_planner.model import Linear
    >>> trainable(Adapter.of(Linear("q_proj", 4096, 4096, count=32, used=32), rank=16))
    4194304
    """
    return adapter.a_params + adapter.b_params


stored = trainable


def scaling(alpha: float, rank: int) -> float:
    return alpha / rank
