"""DoRA: LoRA, and a trained length for every row of W.   Liu et al. 2024, arXiv:2402.09353"""

from __future__ import annotations

from lora_planner.method import lora
from lora_planner.method.adapter import Adapter


def trainable(adapter: Adapter) -> int:
    """LoRA's, plus one magnitude per output feature: r * (d_in + d_out) + d_out."""
    return lora.trainable(adapter) + adapter.magnitudes


stored = trainable
scaling = lora.scaling
