"""rsLoRA: LoRA scaled by alpha / sqrt(r).   Kalajdzievski 2023, arXiv:2312.03732"""

from __future__ import annotations

from math import sqrt

from lora_planner.method import lora

trainable = lora.trainable
stored = lora.stored


def scaling(alpha: float, rank: int) -> float:
    return alpha / sqrt(rank)
