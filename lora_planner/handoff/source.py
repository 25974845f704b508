"""A user's file as a flat document: YAML (safe loader), JSON, a shell command, a Python script's literal arguments.

Nothing is executed: a script is parsed, never run, and what in it is no literal is reported as unread.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_planner.checked import Node
from lora_planner.checkpoint import open_regular, parse_json
from lora_planner.errors import BadInput, EnvironmentMissing
from lora_planner.handoff.sharding import ACCELERATE, TRL_LAUNCHES, inlined

MAX_BYTES = 1024**2
#: a document with more anchors used than this is a bomb, not a config
MAX_ALIASES = 20
MAX_DEPTH = 40
#: sections of a Python script or an Unsloth JSON file, by the call whose arguments they are
LOAD, ADAPT, TRAIN = "from_pretrained", "get_peft_model", "sft_config"
CALLS = {
    "from_pretrained": LOAD, "get_peft_model": ADAPT, "LoraConfig": ADAPT, "SFTConfig": TRAIN, "GRPOConfig": TRAIN,
    "TrainingArguments": TRAIN, "UnslothTrainingArguments": TRAIN, "DPOConfig": TRAIN, "BitsAndBytesConfig": LOAD,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """Keys and values. `objective`: what the command or script says is trained, "" where it does not.

    `origin`: yaml, json, arguments or script. `notes`: what was seen and not read. `folder`: where the file lies, and
    what it names may be read. `launch`: what starts the processes, in the words of an accelerate file. `plan`: the first
    digits of the plan that it was exported from.
    """

    values: Mapping[str, Any]
    where: str
    origin: str
    objective: str = ""
    notes: tuple[str, ...] = field(default=())
    calls: frozenset[str] = frozenset()
    folder: Path | None = None
    launch: Mapping[str, Any] = field(default_factory=dict)
    plan: str = ""

    @property
    def root(self) -> Node:
        return Node(self.values, self.where, lenient=True)


def read(path: Path) -> Document:
    """The document in a file; the suffix says how it is written."""
    return replace(_read(path), folder=path.parent)


def launch(path: Path) -> dict[str, Any]:
    """An accelerate file: `accelerate launch --config_file FILE`."""
    found = dict(_read(path).values)
    if not ACCELERATE & set(found):
        raise BadInput(
            "no accelerate config: it has no distributed_type",
            path.name,
            "Give the file of accelerate launch --config_file.",
        )
    return inlined(found, path.parent)


def _read(path: Path) -> Document:
    where = path.name
    with open_regular(path, where) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise BadInput(f"longer than {MAX_BYTES:,} bytes", where, "Is it a training config?")
    if path.suffix.lower() == ".json":
        return Document(parse_json(raw, where), where, "json")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadInput("not UTF-8 text", where, "Give a YAML, JSON, shell or Python file.") from None
    if path.suffix.lower() == ".py":
        return script(text, where)
    if path.suffix.lower() in (".sh", ".bash", ".txt", ".args", ".slurm", ".sbatch"):
        return command(text, path)
    exported = re.match(r"# lora-plan \S+, plan ([0-9a-f]{12}),", text)
    return Document(load_yaml(text, where), where, "yaml", plan=exported[1] if exported else "")


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping: safe tags only, no key twice, few aliases, not deep."""
    try:
        yaml: Any = import_module("yaml")
    except ImportError:
        raise EnvironmentMissing("PyYAML is not installed", where, "pip install 'lora-plan[check]'") from None
    safe = yaml.SafeLoader
    seen = {"aliases": 0, "depth": 0}

    def compose_node(self: Any, parent: Any, index: Any) -> Any:
        seen["aliases"] += self.check_event(yaml.events.AliasEvent)
        seen["depth"] += 1
        if seen["aliases"] > MAX_ALIASES or seen["depth"] > MAX_DEPTH:
            raise BadInput("too many aliases or levels for a training config", where, "Write it out.")
        node = safe.compose_node(self, parent, index)
        seen["depth"] -= 1
        return node

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise BadInput(
                f"{', '.join(twice)} twice", f"{where}, mapping at line {node.start_mark.line + 1}", "Keep one of them."
            )
        return safe.construct_mapping(self, node, deep)

    loader = type("Loader", (safe,), {"compose_node": compose_node, "construct_mapping": construct_mapping})
    try:
        found = yaml.load(text, loader)  # a SafeLoader with more refusals
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        what = str(getattr(error, "problem", None) or "not YAML")
        raise BadInput(what, place, "Correct the YAML; tags that build Python objects are refused.") from None
    except (RecursionError, ValueError) as error:
        raise BadInput(f"not YAML: {error}"[:200], where, "Correct the YAML.") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise BadInput("no keys and values at the top level", where, "Give a training config.")
    return found


# ---------------------------------------------------------------- a command line


def command(text: str, path: Path) -> Document:
    """The training command in a shell script or a file of arguments: its `--key value` words.

    A `--config FILE` beside it is read too, and the launcher's `--config_file`; the command's own words win.
    """
    where = path.name
    values: dict[str, Any] = {}
    notes: list[str] = []
    objective = ""
    launched: dict[str, Any] = {}
    for words in _commands(text, where):
        start = max((i for i, word in enumerate(words) if _is_program(word)), default=-1)
        values = dict(_arguments(words[start + 1 :]))
        own = [word for word in words[start + 1 :] if word.endswith((".yaml", ".yml"))]
        if not values and not own:
            continue
        objective = _objective(words)
        launched = _launched(dict(_arguments(words[: max(0, start)])), values, path, notes)
        files = [values.pop("config", None), *own]
        inner = next((f for f in files if isinstance(f, str) and not f.startswith("$")), None)
        if inner:
            beside = path.parent / inner
            if not beside.is_file():
                raise BadInput(f"the command reads {inner}, which is not there", where, "Give that file instead.")
            document = read(beside)
            values = {**document.values, **values}
        break
    if not values:
        raise BadInput("no command with --key value words", where, "Give the line that starts the training.")
    variables = sorted(key for key, value in values.items() if isinstance(value, str) and "$" in value)
    for key in variables:
        notes.append(f"{key} is a shell variable: not read")
        del values[key]
    return Document(values, where, "arguments", objective, tuple(notes), launch=launched)


#: words of `trl` that it hands on to accelerate
HANDED_ON = ("accelerate_config", "config_file", "num_processes", "num_machines")


def _launched(words: dict[str, Any], values: dict[str, Any], path: Path, notes: list[str]) -> dict[str, Any]:
    """What starts the processes: the launcher's words over its file; `values` loses the words that are the launcher's."""
    words |= {key: values.pop(key) for key in HANDED_ON if key in values}
    named = str(words.pop("accelerate_config", "") or words.pop("config_file", ""))
    found: dict[str, Any] = {}
    if named in TRL_LAUNCHES:
        found = dict(TRL_LAUNCHES[named])
        words.setdefault("num_processes", found["num_processes"])
    elif named and "$" in named:
        notes.append(f"{named} is a shell variable: not read")
    elif named:
        beside = path.parent / named
        if not beside.resolve().is_relative_to(path.parent.resolve()) or not beside.is_file():
            raise BadInput(
                f"the launcher reads {named}, which is not inside the folder of the script", path.name, "Copy it there."
            )
        found = launch(beside)
    return found | {key: value for key, value in words.items() if not (isinstance(value, str) and "$" in value)}


def _commands(text: str, where: str) -> Iterator[list[str]]:
    joined = re.sub(r"\\\r?\n", " ", text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if lines and all(line.lstrip().startswith("-") for line in lines):  # a file of arguments only
        lines = [" ".join(lines)]
    for line in lines:
        if "--" in line or re.search(r"\.ya?ml\b", line):
            try:
                yield shlex.split(line, comments=True)
            except ValueError as error:
                raise BadInput(f"not a shell command: {error}", where, "Check its quotes.") from None


def _arguments(rest: list[str]) -> Iterator[tuple[str, Any]]:
    """`--key value` words of the program; a launcher's stand before the script or the verb."""
    i = 0
    while i < len(rest):
        word = rest[i]
        i += 1
        if not word.startswith("--"):
            continue
        key, equals, value = word[2:].partition("=")
        found = [value] if equals else []
        while not equals and i < len(rest) and not rest[i].startswith("--"):
            found.append(rest[i])
            i += 1
        yield key.replace("-", "_"), True if not found else found[0] if len(found) == 1 else found


def _is_program(word: str) -> bool:
    return word.endswith(".py") or word in ("sft", "grpo", "dpo", "kto", "rloo", "reward", "train")


def _objective(words: list[str]) -> str:
    stems = {Path(word).stem for word in words if _is_program(word)}
    for name, objective in (("sft", "sft"), ("grpo", "rl"), ("rloo", "rl"), ("dpo", "dpo"), ("kto", "kto")):
        if any(stem == name or stem.startswith(f"{name}_") for stem in stems):
            return objective
    return ""


# ---------------------------------------------------------------- a Python script


def script(text: str, where: str) -> Document:
    """Literal keyword arguments of the calls that configure a run, by section; the script is not run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"not Python: {error}"[:200], where, "Correct it, or give a YAML file.") from None
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    sections: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    calls: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        calls.add(f"{owner}.{name}" if owner else name)
        if name in ("SFTTrainer", "GRPOTrainer", "DPOTrainer"):
            model = [k.value for k in node.keywords if k.arg == "model"] + list(node.args[:1])
            if model and isinstance(model[0], ast.Constant) and isinstance(model[0].value, str):
                sections.setdefault(LOAD, {}).setdefault("model_name", model[0].value)
        if name not in CALLS or "Tokenizer" in owner or "Processor" in owner:
            continue
        section = sections.setdefault(CALLS[name], {})
        if name == "from_pretrained" and node.args and isinstance(node.args[0], ast.Constant):
            section["model_name"] = node.args[0].value
        for keyword in node.keywords:
            if keyword.arg is None:
                continue
            value = keyword.value
            try:
                section[keyword.arg] = constants[value.id] if isinstance(value, ast.Name) else ast.literal_eval(value)
            except (KeyError, ValueError, TypeError, RecursionError):
                if isinstance(value, ast.Attribute) and keyword.arg in (
                    "dtype",
                    "torch_dtype",
                    "bnb_4bit_quant_storage",
                ):
                    section[keyword.arg] = value.attr  # torch.bfloat16
                elif not isinstance(value, ast.Name) or keyword.arg not in ("model", "processing_class"):
                    notes.append(f"{keyword.arg} of {name} is no literal: not read")
    if not sections:
        raise BadInput(
            "no SFTConfig, GRPOConfig, LoraConfig or from_pretrained in it", where, "Give the script that trains."
        )
    objective = "rl" if calls & {"GRPOConfig", "GRPOTrainer"} else "dpo" if "DPOConfig" in calls else "sft"
    return Document(sections, where, "script", objective, tuple(dict.fromkeys(notes)), frozenset(calls))
