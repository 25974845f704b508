"""What the files of a stranger's model say, read without trusting them.

JSON and the headers of safetensors files, every size bounded before anything is allocated. Tensor
data is never read, pickles are never opened, nothing is imported from a model.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, prod
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from lora_planner.errors import BadInput
from lora_planner.model import Model

MAX_JSON_BYTES = 8 * 1024**2
MAX_DEPTH = 64  # a real config.json has at most 5 levels, a header has 3
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_TENSORS = 1_000_000
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
DOWNLOAD = "Download the file again from its source."

# Source: github.com/huggingface/safetensors, enum Dtype, version 0.8.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def shown(text: str, limit: int = 80) -> str:
    r"""Text of a stranger, safe in a terminal and on one line.

    >>> shown("a\x1b[31mb\n")
    'a\\x1b[31mb\\x0a'
    """
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return clean if len(text) <= limit else clean[: limit - 3] + "..."


# --- files -------------------------------------------------------------------------------------------


def root_of(directory: Path) -> Path:
    """Where the links of a model directory may lead: itself, or the cache folder of its repository
    (the hub's cache links snapshots/<commit>/x to blobs/<hash>)."""
    real = directory.resolve()
    for parent in real.parents:
        if parent.name.startswith("models--") and real.relative_to(parent).parts[0] == "snapshots":
            return parent
    return real


def open_regular(path: Path, where: str, root: Path | None = None) -> BinaryIO:
    """Open a regular file, and nothing else: a FIFO would block, a device may act on being opened.

    With `root`, a link that leads out of it is refused.
    """
    try:
        target = path.resolve(strict=True)
        if root is not None and not target.is_relative_to(root):
            raise BadInput("a link leads out of the model's directory", where, "Copy the file there instead.")
        if not stat.S_ISREG(os.stat(target).st_mode):
            raise _irregular(where)
        # Both flags close the gap between the look above and the opening.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        file = os.fdopen(os.open(target, flags | getattr(os, "O_BINARY", 0)), "rb")
    except (OSError, RuntimeError) as error:  # RuntimeError: how Python 3.11 reports a loop of links
        cause = error.strerror if isinstance(error, OSError) else "a loop of links"
        raise BadInput(f"cannot be read: {cause}", where, "Check the path and its permissions.") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _irregular(where)
    return file


def _irregular(where: str) -> BadInput:
    return BadInput("not a regular file", where, "Directories, pipes and devices are not read as files.")


def read_json(path: Path, where: str, root: Path | None = None, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes."""
    with open_regular(path, where, root) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_long(limit, where)
        raw = file.read(limit + 1)  # a file of /proc says it has 0 bytes
    if len(raw) > limit:
        raise _too_long(limit, where)
    return parse_json(raw, where)


def read_argument(text: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object that a word of the command line names: a file's, or stdin's where it is `-`."""
    if text != "-":
        return read_json(Path(text), Path(text).name, limit=limit)
    raw = sys.stdin.buffer.read(limit + 1)
    if len(raw) > limit:
        raise _too_long(limit, "stdin")
    return parse_json(raw, "stdin")


def _too_long(limit: int, where: str) -> BadInput:
    return BadInput(f"longer than {limit:,} bytes", where, "Is it the right file?")


# --- JSON --------------------------------------------------------------------------------------------

_TWICE = object()


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        found.update({key: _TWICE for key, n in Counter(key for key, _ in items).items() if n > 1})
    return found


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Strict JSON: an object, UTF-8, no key twice, every number finite and within 64 bits.

    What Python's parser lets pass is marked while parsing and refused afterwards, where the place
    is known.

    >>> parse_json(b'{"a": [1, NaN]}', "x")
    Traceback (most recent call last):
    lora_planner.errors.BadInput: a number that is not finite or needs more than 64 bits (x#/a/1). ...
    """
    if raw.startswith((BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)):
        raise BadInput("starts with a byte order mark", where, "Save it as UTF-8 without one.")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_pairs,
            parse_int=lambda digits: int(digits) if len(digits) < 25 else inf,
        )
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8 text", f"{where}, byte {error.start}", "Is it the right file?") from None
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno} column {error.colno}"
        raise BadInput(f"not JSON: {error.msg}", place, "Correct it, or download it again.") from None
    except RecursionError:
        raise _too_deep(where) from None
    if not isinstance(value, dict):
        raise BadInput(f"expected an object, got a {type(value).__name__}", f"{where}#", "Is it the right file?")
    _refuse_marked(value, where)
    return value


def _too_deep(where: str) -> BadInput:
    return BadInput(f"nested deeper than {MAX_DEPTH} levels", where, "Is it the right file?")


def _refuse_marked(value: dict[str, Any], where: str) -> None:
    # A loop, not recursion; a place is a chain (parent, key), spelled out only for an error.
    todo: list[tuple[Any, Any, int]] = [(value, None, 1)]
    while todo:
        node, place, depth = todo.pop()
        items: Iterable[tuple[Any, Any]] = node.items() if isinstance(node, dict) else enumerate(node)
        if depth > MAX_DEPTH:
            raise _too_deep(where)
        for key, child in items:
            if isinstance(child, dict | list):
                todo.append((child, (place, key), depth + 1))
            elif child is _TWICE:
                raise BadInput("a key that is there twice", f"{where}#{_pointer((place, key))}", "Keep one.")
            elif isinstance(child, int | float) and not (isfinite(child) and abs(child) < 2**64):
                raise BadInput(
                    "a number that is not finite or needs more than 64 bits",
                    f"{where}#{_pointer((place, key))}",
                    "Correct the value; the planner does not guess.",
                )


def _pointer(place: Any) -> str:
    keys: list[str] = []
    while place:
        place, key = place
        keys.append("/" + shown(str(key)).replace("~", "~0").replace("/", "~1"))
    return "".join(reversed(keys))


# --- safetensors -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def bits(self) -> int:
        return self.size * DTYPE_BITS[self.dtype]


def read_header(file: BinaryIO, where: str) -> list[Tensor]:
    """The tensors that a safetensors file declares, checked against each other and the file's length.

        file = length of header (8 bytes, little-endian) | header (JSON) | data without gaps or overlaps

    Source: github.com/huggingface/safetensors, "Format".
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 10:
        raise BadInput("too short for a safetensors file", where, DOWNLOAD)
    if length > size - 8:
        raise BadInput(f"the header says {length:,} bytes, the file has {size - 8:,}", where, DOWNLOAD)
    if length > MAX_HEADER_BYTES:
        raise BadInput(f"a header of {length:,} bytes, {MAX_HEADER_BYTES:,} are allowed", where, DOWNLOAD)
    raw = file.read(length)
    # Counting bytes is cheap; parsing a million small objects is not.
    for sign, most in ((b"{", MAX_TENSORS + 2), (b"[", 2 * MAX_TENSORS), (b",", 12 * MAX_TENSORS)):
        if raw.count(sign) > most:
            raise BadInput(f"more than {MAX_TENSORS:,} tensors", where, DOWNLOAD)
    tensors, end = tensors_of(parse_json(raw, where), where)
    if end != size - 8 - length:
        what = f"the header describes {end:,} bytes of data, the file has {size - 8 - length:,}"
        raise BadInput(what, where, DOWNLOAD)
    return tensors


def tensors_of(header: dict[str, Any], where: str) -> tuple[list[Tensor], int]:
    """The tensors of a header and the length of their data, which lie without gaps or overlaps."""
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise BadInput("__metadata__: expected an object", f"{where}#/__metadata__", DOWNLOAD)
    rows = [(*_span(name, entry, where), name) for name, entry in header.items()]
    end = 0
    for first, last, _, name in sorted(rows, key=itemgetter(0, 1)):
        if first != end:
            fault = "overlaps another tensor" if first < end else "leaves a gap"
            raise BadInput(f"the data of a tensor {fault}", f"{where}#/{shown(name)}/data_offsets", DOWNLOAD)
        end = last
    return [tensor for _, _, tensor, _ in rows], end


def _span(name: str, entry: Any, where: str) -> tuple[int, int, Tensor]:
    """First and last byte + 1 of a tensor's data, and the tensor, after checking its entry."""

    def fault(what: str) -> BadInput:
        return BadInput(what, f"{where}#/{shown(name)}", DOWNLOAD)

    row = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fault(f"dtype {shown(str(dtype), 30)!r} is not known")
    if not _whole(shape) or len(shape) > 32:
        raise fault("shape: expected a list of at most 32 whole numbers")
    if not _whole(offsets) or len(offsets) != 2:
        raise fault("data_offsets: expected two whole numbers")
    first, last = offsets
    tensor = Tensor(name, dtype, tuple(shape))
    if tensor.bits != 8 * (last - first):  # Python integers: a product cannot overflow
        needed = shown(f"{-(-tensor.bits // 8):,}", 30)
        raise fault(f"shape and dtype need {needed} bytes, data_offsets give {last - first:,}")
    return first, last, tensor


def _whole(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


@dataclass(frozen=True, slots=True)
class Stored:
    """What the weight files of a directory hold; `missing` names shards the index lists in vain."""

    tensors: tuple[Tensor, ...] = ()
    files: int = 0
    missing: tuple[str, ...] = ()
    pickled: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        return sum(tensor.size for tensor in self.tensors)


def read_weights(directory: Path, where: str) -> Stored:
    """Headers of the safetensors files in `directory`, chosen as transformers does: one file, else
    those of the index; else all. Adapters and Mistral's second copy (consolidated*) are left out."""
    root = root_of(directory)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", where, "Check its permissions.") from None
    missing: tuple[str, ...] = ()
    if SINGLE in names:
        chosen = [SINGLE]
    elif INDEX in names:
        place = f"{where}/{INDEX}"  # 15 MB for a model of 70,000 experts
        listed = _shards(read_json(directory / INDEX, place, root, MAX_HEADER_BYTES), place)
        missing = tuple(name for name in listed if name not in names)
        chosen = [] if missing else listed
    else:
        others = ("adapter_", "consolidated")
        chosen = [n for n in names if n.endswith(".safetensors") and not n.startswith(others)]
    tensors: list[Tensor] = []
    for name in chosen:
        place = f"{where}/{shown(name)}"
        with open_regular(directory / name, place, root) as file:
            tensors += read_header(file, place)
        if len(tensors) > MAX_TENSORS:
            raise BadInput(f"more than {MAX_TENSORS:,} tensors", where, "Is it one model?")
    pickled = tuple(shown(n) for n in names if Path(n).suffix.lower() in PICKLED)
    return Stored(tuple(tensors), len(chosen), missing, pickled)


def _shards(index: dict[str, Any], where: str) -> list[str]:
    """The file names in an index: plain names, so that none can lead elsewhere."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput("weight_map: expected an object", f"{where}#/weight_map", DOWNLOAD)
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII):
            raise BadInput(
                f"expected the name of a .safetensors file, got {shown(str(name), 40)!r}",
                f"{where}#/weight_map/{shown(tensor)}",
                "Shards lie beside their index.",
            )
    return sorted(set(weight_map.values()))


# --- files against config ----------------------------------------------------------------------------

#: names of an unembedding in checkpoints
HEADS = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
TIED_COPY, BUFFERS, MTP, SCALES = (
    "second copy of the tied head",
    "buffers",
    "MTP modules",
    "quantisation scales",
)
#: tensors that transformers keeps, or once kept, as buffers
_BUFFER = re.compile(
    r"(^|\.)(e_score_correction_bias|expert_bias|rotary_emb\.inv_freq|rope_freqs|masked_bias|num_batches_tracked)$"
)
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # a causal mask [1, 1, n, n] when it has 4 dimensions
_MTP = re.compile(r"(^|\.)(mtp|nextn)")
_SCALE = re.compile(
    r"(_scale|_scale_inv|_scale_2|[._]scales|[._]zeros|\.qzeros|\.g_idx|\.SCB|\.(nested_)?(absmax|quant_map)|_zero_point)$"
)
_TOWER = re.compile(r"(^|[._])(vision|visual|vit|audio|image|speech|encoder)")
_LAYER = re.compile(r"(^|\.)(?:layers|h|blocks)\.(\d+)\.")
#: dtypes in which several weights share an element
PACKED = frozenset({"U8", "I32", "U32", "F4"})


def layer_of(name: str) -> int | None:
    """The number of the text layer that a tensor belongs to.

    >>> layer_of("model.layers.12.mlp.up_proj.weight"), layer_of("visual.blocks.3.norm.weight")
    (12, None)
    """
    found = _LAYER.search(name)
    return int(found[2][:9]) if found and not _TOWER.search(name) else None


def set_aside(tensors: Sequence[Tensor], model: Model, quantised: bool) -> list[str]:
    """For each tensor why it is not among the parameters transformers would load; "" where it is.

    A layer beyond the config's last one is an MTP module only when it has the projection that makes it
    one (eh_proj); else the config is wrong about the number of layers.
    Source: the tensor names of DeepSeek-V3, GLM-4.5, Qwen3-Next and GPT-2 checkpoints.
    """
    extra = {layer_of(t.name) for t in tensors if t.name.endswith(".eh_proj.weight")} - {None}
    reasons = []
    for t in tensors:
        layer = layer_of(t.name)
        if _MTP.search(t.name) or (layer is not None and layer >= model.layers and layer in extra):
            reasons.append(MTP)
        elif _BUFFER.search(t.name) or (_MASK.search(t.name) and len(t.shape) == 4):
            reasons.append(BUFFERS)
        else:
            reasons.append(SCALES if quantised and _SCALE.search(t.name) else "")
    if model.tied:
        vocab = (model.vocab_size, model.hidden_size)
        alike = [i for i, t in enumerate(tensors) if t.shape == vocab and not reasons[i]]
        heads = [i for i in alike if tensors[i].name.endswith(HEADS)]
        if len(alike) > len(heads):
            for i in heads:
                reasons[i] = TIED_COPY
    return reasons


def compare(model: Model, stored: Stored, quantised: bool = False) -> Model:
    """`model` with what its weight files say: `stored_params`, notes, and a warning with both numbers
    where they disagree. The files are right about the size of the weights."""
    if not stored.tensors:
        return model
    reasons = set_aside(stored.tensors, model, quantised)
    loaded = [t for t, reason in zip(stored.tensors, reasons, strict=True) if not reason]
    dtypes = dict.fromkeys(t.dtype for t in loaded)
    size = sum(t.bits for t in stored.tensors) // 8
    held = "/".join(dtypes)
    notes = [f"safetensors: {stored.params:,} elements, {size:,} bytes, {held}, files: {stored.files}"]
    for reason in (TIED_COPY, BUFFERS, MTP, SCALES):
        aside = sum(t.size for t, why in zip(stored.tensors, reasons, strict=True) if why == reason)
        if aside:
            notes.append(f"in the files, not loaded as parameters: {reason}, {aside:,}")
    warnings = list(model.warnings)
    twice = len(stored.tensors) - len({t.name for t in stored.tensors})
    if twice:
        warnings.append(f"{twice:,} tensors are in more than one file; every copy was counted")
    params = sum(t.size for t in loaded)
    if dtypes.keys() & PACKED:
        notes.append("the files pack several weights into one element: parameters are counted from config.json")
        params = 0
    elif params != model.total:
        warnings.append(
            f"config.json describes {model.total:,} parameters, the safetensors files hold {params:,}: "
            "the size of the weights follows the files, everything else follows config.json; correct it first"
        )
    return replace(model, stored_params=params, notes=(*model.notes, *notes), warnings=warnings)
