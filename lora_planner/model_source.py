"""What a user types after `--model`, turned into a `Model`.

In this order: an existing path (a directory or a config.json), a name of the catalogue
(data/models/*.json) or its hub id, any other hub id. Nothing is downloaded unless `offline` is False,
and then config.json and the header of a single safetensors file only.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lora_planner.arch import from_config
from lora_planner.checkpoint import (
    PICKLED,
    SINGLE,
    Stored,
    Tensor,
    compare,
    layer_of,
    read_json,
    read_weights,
    root_of,
    shown,
    tensors_of,
)
from lora_planner.errors import BadInput, EnvironmentMissing, LoraPlanError, UnknownName, nearest
from lora_planner.model import Model

CATALOGUE = Path(__file__).parent / "data" / "models"
MAX_TEXT = 4096  # the longest path of Linux
GIVE = "Give a name of the catalogue, a hub id or a path."
#: as the hub allows it: ASCII, no part starts or ends with "." or "-", no "..", "--" or ".git"
HUB_ID = re.compile(r"(?=.{3,96}$)(?!.*(\.\.|--|\.git$))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
#: keys of a config.json that would run code or pick code to run, in transformers
EXECUTABLE = ("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines")


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the catalogue."""

    name: str
    hub_id: str
    source: str
    as_of: str
    config: dict[str, Any]


@cache
def catalogue() -> tuple[Entry, ...]:
    """Every model that can be planned by name, sorted by name."""
    return tuple(_entry(path) for path in sorted(CATALOGUE.glob("*.json")))


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A line of `lora-plan models`."""

    name: str
    model_type: str
    params: int
    active: int
    hub_id: str
    as_of: str


def model_rows() -> list[ModelRow]:
    """The catalogue, counted."""
    found = []
    for entry in catalogue():
        model = from_config(entry.config, entry.source, entry.name)
        found.append(ModelRow(entry.name, model.model_type, model.total, model.active, entry.hub_id, entry.as_of))
    return found


def _entry(path: Path) -> Entry:
    row = read_json(path, path.name)
    return Entry(path.stem, row["hub_id"], row["source"], str(row["as_of"]), row["config"])


def load_model(text: str, offline: bool = True) -> Model:
    """The model that `text` names; raises a `LoraPlanError` where there is none.

    >>> load_model("../../etc/no-such-place")
    Traceback (most recent call last):
    lora_planner.errors.BadInput: '../../etc/no-such-place' is no path that exists, no name ...
    """
    _refuse_text(text)
    mode = _mode(text)
    if mode is not None:
        return _from_directory(Path(text), text) if stat.S_ISDIR(mode) else _from_file(Path(text), text)
    wanted = text.lower()
    named = CATALOGUE / f"{wanted}.json"  # one file instead of all, for whoever types the exact name
    for entry in (_entry(named),) if "/" not in wanted and named.is_file() else catalogue():
        if wanted in (entry.name.lower(), entry.hub_id.lower()):
            source = f"catalogue: {entry.source}, as of {entry.as_of}"
            return replace(_build(entry.config, f"{entry.name}.json", entry.name), source=source)
    if HUB_ID.fullmatch(text):
        return _from_hub(text, offline)
    raise _unknown(text)


def _refuse_text(text: str) -> None:
    """Refuse what can be neither a path nor a name, before it reaches the file system."""
    if not text.strip():
        raise BadInput("the model's name is empty", "--model", GIVE)
    if len(text) > MAX_TEXT:
        raise BadInput(f"a model name of {len(text):,} characters", "--model", GIVE)
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text):
        raise BadInput(f"{shown(text)!r} has invisible characters", "--model", "Type the name anew.")
    if text.startswith("-"):
        raise BadInput(f"{shown(text)!r} looks like an option", "--model", "Write a path as ./-name.")
    if "://" in text:
        raise BadInput(f"{shown(text)!r} is a URL", "--model", "Give the part org/name, or download it.")


def _mode(text: str) -> int | None:
    """What kind of file is there; None where there is nothing."""
    try:
        return os.stat(text).st_mode
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise BadInput(f"cannot be read: {error.strerror}", shown(text), "Check the path.") from None
        return None


def _unknown(text: str) -> BadInput:
    names = [entry.name for entry in catalogue()]
    close = nearest(text[:100].lower(), names)
    hint = f"Nearest in the catalogue: {', '.join(close)}. " if close else ""
    odd = next((c for c in text if not c.isascii()), None)
    if odd is not None:
        hint = f"{odd!r} is {unicodedata.name(odd, 'no ASCII')} (U+{ord(odd):04X}). " + hint
    kind: type[BadInput] = BadInput
    what = f"{shown(text)!r} is no path that exists, no name of the catalogue and no hub id"
    if odd is None and re.fullmatch(r"\w[\w.-]*", text):
        kind = UnknownName
        what = f"{shown(text)!r} is neither a path that exists nor a name of the catalogue"
    return kind(what, "--model", hint + "`lora-plan models` lists the names.", nearest=close)


def _build(config: dict[str, Any], where: str, name: str) -> Model:
    """`from_config`, and notes on what the config says that the planner leaves alone."""
    model = from_config(config, where, name)
    notes = [f"{key} is ignored: no code of a model is ever run" for key in EXECUTABLE if config.get(key)]
    if method := quantisation(config):
        notes.append(f"stored quantised ({method}); counted as the unquantised model")
    return replace(model, notes=(*model.notes, *notes))


def quantisation(config: dict[str, Any]) -> str:
    """How the weights are stored, where not as floats of 16 or 32 bits: "fp8", "gptq" ...; else "".

    >>> quantisation({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})
    'bitsandbytes 4 bit'
    """
    given = config.get("quantization_config")
    if not isinstance(given, dict):
        return ""
    bits = next((n for n in (4, 8) if given.get(f"load_in_{n}bit") is True or given.get("bits") == n), None)
    method = shown(str(given.get("quant_method", "bitsandbytes" if bits else "unknown method")), 30)
    return f"{method} {bits} bit" if bits else method


def _from_file(path: Path, where: str) -> Model:
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        raise BadInput("pickled weights can run code: never opened", shown(where), "Give a config.json.")
    if suffix == ".safetensors":
        raise BadInput("weights without their config.json", shown(where), "Give the directory that has both.")
    name = root_of(path.parent).name if path.name == "config.json" else path.name
    model = _build(read_json(path, shown(where, 200)), shown(where, 200), shown(name))
    return replace(model, source=shown(path.name))  # not where: reports show no path of a home directory


def _from_directory(path: Path, typed: str, name: str = "") -> Model:
    where = shown(typed.rstrip("/"), 200)
    config_path, root = path / "config.json", root_of(path)
    if not os.path.lexists(config_path):
        raise BadInput(
            "no config.json",
            where,
            "Download the model's own config.json into it; of an adapter's directory, give the base model.",
        )
    config = read_json(config_path, f"{where}/config.json", root)
    name = name or shown(root.name)
    model = replace(_build(config, f"{where}/config.json", name), source=f"{name}/config.json")
    stored = read_weights(path, where)
    if stored.missing:
        model.warnings.append(
            f"{len(stored.missing)} shards of the index are not there ({stored.missing[0]} ...): "
            "counted from config.json, not checked against the weights"
        )
    elif not stored.files and stored.pickled:
        model.warnings.append(
            f"{len(stored.pickled)} files of pickled weights ({stored.pickled[0]}) were not opened, they can "
            "run code: counted from config.json"
        )
    return _checked(model, config, stored)


def _checked(model: Model, config: dict[str, Any], stored: Stored) -> Model:
    """The model compared with its weight files; where they show that the config is wrong about its
    sizes, and explain every parameter, the model that the files are of."""
    quantised = bool(quantisation(config))
    compared = compare(model, stored, quantised)
    if compared.stored_params in (0, model.total):
        return compared
    sizes = sizes_of(stored.tensors, config)
    changed = {key: n for key, n in sizes.items() if _text(config).get(key) not in (None, n)}
    try:
        rebuilt = compare(_rebuilt(model, config, changed), stored, quantised)
    except LoraPlanError:
        return compared
    if not changed or rebuilt.stored_params != rebuilt.total:
        return compared
    differs = ", ".join(f"{key} {_text(config)[key]} -> {n}" for key, n in changed.items())
    rebuilt.warnings.append(
        f"config.json describes {model.total:,} parameters, the safetensors files hold {rebuilt.total:,}: "
        f"planned as the files are ({differs})"
    )
    return rebuilt


def _text(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _rebuilt(model: Model, config: dict[str, Any], changed: dict[str, int]) -> Model:
    text = {**_text(config), **changed}
    whole = {**config, "text_config": text} if _text(config) is not config else text
    rebuilt = _build(whole, model.source, model.name)
    return replace(rebuilt, warnings=list(model.warnings))


def sizes_of(tensors: tuple[Tensor, ...], config: dict[str, Any]) -> dict[str, int]:
    """Sizes that the shapes of a Llama-like checkpoint prove, under their names in config.json.

    Heads follow from rows of q and k only together with the config's head_dim.
    """
    text = _text(config)
    heads, hidden, dim = (text.get(key) for key in ("num_attention_heads", "hidden_size", "head_dim"))
    if dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        dim = hidden // heads
    rows: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for t in tensors:
        layer = layer_of(t.name)
        if layer is not None:
            sizes["num_hidden_layers"] = max(layer + 1, sizes.get("num_hidden_layers", 0))
        if len(t.shape) == 2 and layer == 0:
            rows[".".join(t.name.rsplit(".", 2)[-2:])] = t.shape[0]
        if len(t.shape) == 2 and layer is None and t.name.endswith("embed_tokens.weight"):
            sizes["vocab_size"], sizes["hidden_size"] = t.shape
    if "gate_proj.weight" in rows:
        sizes["intermediate_size"] = rows["gate_proj.weight"]
    for key, name in (("num_attention_heads", "q_proj.weight"), ("num_key_value_heads", "k_proj.weight")):
        if isinstance(dim, int) and dim > 0 and rows.get(name, 1) % dim == 0:
            sizes[key] = rows[name] // dim
    return sizes


# --- the hub -----------------------------------------------------------------------------------------


def _from_hub(hub_id: str, offline: bool) -> Model:
    """From the hub's cache on this machine; else, where the network is allowed, from the hub."""
    hub = _hub()
    cached = hub.try_to_load_from_cache(hub_id, "config.json") if hub else None
    if isinstance(cached, str):
        return _from_directory(Path(cached).parent, hub_id, hub_id)
    close = nearest(hub_id.split("/")[1].lower(), [entry.name for entry in catalogue()])
    hint = f"Nearest in the catalogue: {', '.join(close)}. " if close else ""
    by_path = "or give the path of its config.json."
    if offline:
        raise UnknownName(
            f"{hub_id!r} is no path that exists, not in the catalogue and not in the hub's cache here",
            "--model",
            f"{hint}Allow the network, {by_path}",
            nearest=close,
        )
    if hub is None:
        raise EnvironmentMissing(
            f"{hub_id!r} has to be looked up on the hub, and huggingface_hub is not installed",
            "--model",
            f"{hint}Run `pip install 'lora-plan[hub]'`, {by_path}",
        )
    try:
        path = Path(hub.hf_hub_download(hub_id, "config.json"))
        api = hub.HfApi()
        single = api.file_exists(hub_id, SINGLE)  # of shards there can be hundreds
        rows = api.parse_safetensors_file_metadata(hub_id, SINGLE).tensors if single else {}
    except Exception as error:  # each HTTP library has its own, and their messages may quote a token
        cause = type(error).__name__
        if cause in ("RepositoryNotFoundError", "RemoteEntryNotFoundError"):
            what = f"the hub shows no config.json of {hub_id!r}"
            fix = f"{hint}Check the name, log in if it is gated, {by_path}"
            raise UnknownName(what, "--model", fix, nearest=close) from None
        what = f"{hub_id!r} could not be read from the hub: {cause}"
        raise EnvironmentMissing(what, "--model", f"{hint}Check the network, {by_path}") from None
    config = read_json(path, f"{hub_id}/config.json", root_of(path.parent))
    model = replace(_build(config, f"{hub_id}/config.json", hub_id), source=f"hub: {hub_id}")
    header = {n: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [*t.data_offsets]} for n, t in rows.items()}
    tensors, _ = tensors_of(header, f"{hub_id}/{SINGLE}")
    return _checked(model, config, Stored(tuple(tensors), files=1))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        return None
    return huggingface_hub
