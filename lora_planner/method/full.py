"""Full fine-tuning: every parameter is trained, there is no adapter."""

from __future__ import annotations

from lora_planner.method.adapter import Adapter


def trainable(adapter: Adapter) -> int:
    return 0


stored = trainable


def scaling(alpha: float, rank: int) -> float:
    return 1.0
