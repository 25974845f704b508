"""vLLM: the YAML file of `vllm serve --config`, so that the server loads the adapter that was trained.

Keys: vLLM's engine arguments; the ranks it takes are capacity.SERVABLE_RANKS (vllm-project/vllm#22782).
"""

from __future__ import annotations

from typing import Any

from lora_planner.capacity import SERVABLE_RANKS
from lora_planner.errors import BadInput
from lora_planner.handoff.recipe import FUSED, NONE, OVER_ACTIVE, File, Recipe
from lora_planner.handoff.words import yaml

LABEL = "vLLM"
#: what it can be told of experts; other forms it is served merged, as `write` says
EXPERTS = (NONE, OVER_ACTIVE, FUSED, "planned")
#: what a server loads when it is told nothing
DEFAULT_MAX_RANK = 16


def served_rank(rank: int) -> int:
    """The smallest max_lora_rank that vLLM takes and that holds the adapter; larger ones slow it down.

    >>> served_rank(1), served_rank(16), served_rank(48), served_rank(300)
    (1, 16, 64, 320)
    """
    fits = [n for n in SERVABLE_RANKS if n >= rank]
    if not fits:
        raise BadInput(f"vLLM loads no adapter of rank {rank}", "--to vllm",
                       f"Its largest max_lora_rank is {SERVABLE_RANKS[-1]}: merge the adapter, or plan a lower rank.")  # fmt: skip
    return fits[0]


def write(recipe: Recipe, header: tuple[str, ...]) -> tuple[File, ...]:
    """`vllm serve --config vllm.yaml`: the base with the adapter beside it, or the fully trained model."""
    if recipe.lora is None:
        return (File("vllm.yaml", yaml({"model": "lora-plan-output"}, header)),)
    if recipe.lora.parameters:
        raise BadInput("adapters of fused experts have loaded wrongly in vLLM (pull requests 41384 and 52194)", "--to vllm",
                       "Merge the adapter into the base (peft's merge_and_unload) and serve the merged model, or leave the experts out: "
                       "--experts none.")  # fmt: skip
    if recipe.lora.dora:
        raise BadInput("vLLM loads no DoRA adapter", "--to vllm", "Merge the adapter and serve the merged model.")
    rows: dict[str, Any] = {
        "model": recipe.model,
        "enable-lora": True,
        "max-lora-rank": served_rank(max([recipe.lora.rank, *(rank for _, rank in recipe.lora.ranks)])),
        "max-loras": 1,
        "lora-modules": ["tuned=./lora-plan-output"],
    }
    return (File("vllm.yaml", yaml(rows, header)),)


def commands(recipe: Recipe) -> str:
    return "vllm serve --config vllm.yaml"
