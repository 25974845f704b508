"""The architecture as a list: imports point left. Parsed, not imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: a module may import from its own row and from rows above it
ORDER = [
    {"units", "errors"},
    {"ledger"},
    {"checked"},
    {"model", "facts", "lengths", "data_rows"},
    {"findings"},
    {"data_file"},
    {"arch"},
    {"checkpoint", "model_source", "method"},
    {"params"},
    {"activations", "flops", "throughput", "capacity", "learning_rate", "batch", "cost"},
    {"memory", "megatron", "room", "rollout", "workload"},
    {"plan"},
    {"recommend"},
    {"budget", "actuals", "compare", "handoff"},
    {"record"},
    {"predict"},
    {"render"},
    {"pages"},
    {"completion"},
    {"options"},
    {"commands"},
    {"cli"},
]
HEAVY = {"torch", "numpy", "scipy", "transformers", "peft", "pandas"}
#: imported inside a function, and named in an error where missing
OPTIONAL = {"tokenizers", "pyarrow", "huggingface_hub"}


def _level(module: str) -> int:
    name = module.split(".")[1] if "." in module else module
    for level, row in enumerate(ORDER):
        if name in row:
            return level
    raise AssertionError(f"{module} is in no row of ORDER: say where it belongs")


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) for every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lora_planner":
                found += [(f"lora_planner.{alias.name}", node in top) for alias in node.names]
            else:
                found.append((node.module, node in top))
    return found


FILES = sorted((ROOT / "lora_planner").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    """No module imports from a row below its own, and none imports cli."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module in ("lora_planner", "lora_planner.__main__"):
        return
    for name, _ in _imports(path):
        if name.startswith("lora_planner.") and name != "lora_planner.__version__":
            assert _level(name) <= _level(module), f"{module} imports {name}, which is to its right"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_planner_stays_light(path: Path) -> None:
    """No torch, numpy or transformers anywhere; optional libraries only inside functions."""
    for name, at_top in _imports(path):
        root = name.split(".")[0]
        assert root not in HEAVY, f"{path.name} imports {name}"
        assert not (root in OPTIONAL and at_top), f"{path.name} imports {name} when it is loaded"
        if root in ("calibrate", "runner"):
            assert path.name == "cli.py" or path.parent.name == "commands"
            assert not at_top
