"""What a training config says will be trained, in one form whatever tool it is written for."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt

from lora_planner.handoff.sharding import WHOLE, Sharding

SFT, RL = "sft", "rl"
#: forms of the experts' adapters that a tool can be told: peft's pair for each fused tensor, at the rank of the other
#: modules or at that over the active experts; or none
FUSED, OVER_ACTIVE, NONE = "fused", "fused-over-active", "none"
#: the two meanings of "all linear layers": peft's own word, and a list of leaf names that a tool collects
PEFT_ALL, LEAF_NAMES = "peft", "names"


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter in peft's terms. Of `targets`, `pattern` and `everything` at most one says which modules;
    none of them: peft's default for the model type, unless `parameters` are named.

    `ranks`, `alphas`: (pattern, number), peft's rank_pattern and alpha_pattern. `saved`: modules_to_save.
    `text_only`: the tool leaves a vision tower alone; `leaves`: what a `pattern` is to such a tool.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    pattern: str = ""
    everything: str = ""
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    excluded_pattern: str = ""
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    dtype: str = "float32"
    text_only: bool = False
    leaves: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied with: alpha / r, under rsLoRA alpha / sqrt(r).

        >>> Lora(64, 16).scale, Lora(64, 16, rslora=True).scale
        (0.25, 2.0)
        """
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run. `lora` is None for full fine-tuning; None elsewhere: the config does not say.

    `objective`: sft, rl, or the tool's own word for another one. `micro_batch` sequences a device and pass,
    `accumulation` passes a step. `max_length` 0: nothing is cut. `group`: samples a problem in RL.
    `weights`: dtype of what is loaded (float32, bfloat16, float16, nf4, int8); `pure`: weights in 16 bits are
    what the optimizer updates. `given`: the keys that the file itself sets; everything else is the tool's default.
    `unknown`: keys that the tool does not know. `notes`: what was read but is not counted.
    `sharding`: how GPUs share a copy of the model; `gpus`: how many there are, which the config does not decide.
    """

    tool: str
    model: str = ""
    objective: str = SFT
    lora: Lora | None = None
    weights: str = "bfloat16"
    pure: bool = False
    experts_quantised: bool = False
    learning_rate: float | None = None
    scheduler: str = ""
    micro_batch: int | None = None
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = 0
    max_length: int | None = None
    packing: bool = False
    packed_attention: bool = True  # rows of a pack are kept apart
    checkpointing: bool = False
    reentrant: bool = False
    wired: bool = True  # the tool makes inputs require gradients when it recomputes
    optimizer: str = "adamw"
    attention: str = "sdpa"
    loss: str = "full"
    group: int = 0
    answer: int = 0  # RL: the longest one in tokens
    engine_share: float = (
        0.0  # RL: of the GPU's memory, for an engine that samples beside the trainer; 0: the trainer samples
    )
    half: str = "bf16"  # what matmuls run in: bf16, or fp16 where the GPU has none
    remote_code: bool = False
    dataset: str = ""
    dataset_kind: str = ""
    label: str = ""  # what reads the file, where that is not the tool's usual version
    given: frozenset[str] = frozenset()
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    sharding: Sharding = WHOLE
    gpus: int = 1
    plan: str = ""  # the first digits of checked.plan_hash, where the file was exported from a plan

    @property
    def batch(self) -> int | None:
        """Sequences a step on all GPUs.

        >>> Recipe("trl", micro_batch=2, accumulation=4, gpus=8).batch
        64
        """
        return None if self.micro_batch is None else self.micro_batch * self.accumulation * self.gpus


@dataclass(frozen=True, slots=True)
class File:
    """One file of an export, not yet written."""

    name: str
    text: str
