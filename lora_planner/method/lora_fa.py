"""LoRA-FA: as LoRA, but A is frozen too.   Zhang et al. 2023, arXiv:2308.03303"""

from __future__ import annotations

from lora_planner.method import lora
from lora_planner.method.adapter import Adapter


def trainable(adapter: Adapter) -> int:
    return adapter.b_params


stored = lora.stored  # the frozen A is still in the adapter file
scaling = lora.scaling
