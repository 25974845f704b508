"""QLoRA: LoRA on a base held in 4 bits (nf4, block constants quantised again).

Dettmers et al. 2023, arXiv:2305.14314. What it changes is the base (see memory.py), not the adapter.
"""

from __future__ import annotations

from lora_planner.method import lora

trainable = lora.trainable
stored = lora.stored
scaling = lora.scaling
