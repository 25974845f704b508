"""Training configs of other tools: read for `check`, written for `export`.

A tool is a file here with FIELDS (our words in its keys), SIGNS (keys that only it has), EXPERTS (the forms of experts'
adapters that it can be told), `read(document)` and `write(recipe, header)`. Its documented keys lie in keys/NAME.txt.
How GPUs share a model is in sharding.py, several GPUs' time and cost in fleet.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from lora_planner.errors import BadInput, UsageError
from lora_planner.handoff import axolotl, llamafactory, peft, trl, unsloth, vllm
from lora_planner.handoff.recipe import Recipe
from lora_planner.handoff.source import Document

READERS: dict[str, ModuleType] = {
    "trl": trl, "axolotl": axolotl, "llamafactory": llamafactory, "unsloth": unsloth, "peft": peft,
}  # fmt: skip
WRITERS: dict[str, ModuleType] = {**READERS, "vllm": vllm}


def tool_of(document: Document) -> str:
    """The tool whose own keys the document has most of.

    >>> tool_of(Document({"base_model": "m", "adapter": "lora"}, "x.yml", "yaml"))
    'axolotl'
    """
    if document.origin == "script":
        return (
            "unsloth" if any("FastLanguageModel" in call or "FastModel" in call for call in document.calls) else "trl"
        )
    found = sorted(((len(tool.SIGNS & set(document.values)), name) for name, tool in READERS.items()), reverse=True)
    if found[0][0] > found[1][0]:
        return found[0][1]
    if "model_name_or_path" in document.values and (document.objective or found[0][0] == 0):
        return "trl"
    raise UsageError("the keys do not tell which tool this is for", document.where, f"Use --tool {'|'.join(READERS)}.")


def read(document: Document, tool: str = "") -> Recipe:
    """What the document says will be trained."""
    name = tool or tool_of(document)
    if document.origin == "script" and name not in ("trl", "unsloth"):
        raise BadInput("a Python script is read for TRL and Unsloth only", document.where, "Give the YAML file.")
    recipe: Recipe = READERS[name].read(document)
    return replace(recipe, plan=document.plan)
