"""Models of strangers: whatever they hold, the answer is a plan or one clear line.

B1 to B8 are the rows of the project's list of bad inputs.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_planner import checkpoint, model_source
from lora_planner.arch import BY_MODEL_TYPE, from_config
from lora_planner.checkpoint import DTYPE_BITS, Stored, Tensor, compare, parse_json, read_header
from lora_planner.errors import BadInput, EnvironmentMissing, LoraPlanError, UnknownModelType, UnknownName
from lora_planner.model import Model
from lora_planner.model_source import catalogue, load_model

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128,
}  # fmt: skip
GOLDEN = {
    row["what"]: int(row["value"])
    for row in csv.DictReader((Path(__file__).parent / "golden" / "stored_totals.csv").open(encoding="utf-8"))
}
Rows = dict[str, tuple[str, list[int]]]


def llama_rows(hidden: int = 64, layers: int = 2, kv: int = 32, inner: int = 160, vocab: int = 256) -> Rows:
    """Names and shapes of LLAMA's checkpoint, or of another size of Llama."""
    rows: Rows = {
        "model.embed_tokens.weight": ("BF16", [vocab, hidden]),
        "model.norm.weight": ("BF16", [hidden]),
    }
    for i in range(layers):
        for name, shape in {
            "self_attn.q_proj": [hidden, hidden], "self_attn.k_proj": [kv, hidden],
            "self_attn.v_proj": [kv, hidden], "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [inner, hidden], "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
            "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        }.items():  # fmt: skip
            rows[f"model.layers.{i}.{name}.weight"] = ("BF16", shape)
    return rows | {"lm_head.weight": ("BF16", [vocab, hidden])}


def header_of(rows: Rows) -> dict[str, Any]:
    """The header that the safetensors library would write for these rows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in rows.items():
        first, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    return header


def write_weights(path: Path, header: Any, data: int | None = None) -> None:
    """A safetensors file whose data is a hole."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    if data is None:
        data = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(path, 8 + len(raw) + data)


def write_model(directory: Path, config: dict[str, Any], rows: Rows | None = None) -> str:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if rows is not None:
        write_weights(directory / "model.safetensors", header_of(rows))
    return str(directory)


def refusal(action: Callable[[], object], *, kind: type[LoraPlanError] = BadInput, code: int = 3) -> str:
    """The one line that a refusal consists of."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert caught.value.exit_code == code
    assert text.isprintable(), "one line, nothing that a terminal would obey"
    assert len(text) < 500
    assert caught.value.where, "says where"
    assert caught.value.fix, "says what to do"
    return text


# --- B1: config.json that is no honest JSON ----------------------------------------------------------

LLAMA_TEXT = json.dumps(LLAMA)
LAYERS = "num_hidden_layers: expected"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not JSON"),
        (b"\x89PNG\r\n\x1a\n\x00", "not UTF-8"),
        (b"{'model_type': 'llama'}", "line 1 column 2"),
        (LLAMA_TEXT[:-1].encode(), "not JSON"),
        (b"[1, 2]", "expected an object"),
        (b'"llama"', "expected an object"),
        (b"\xef\xbb\xbf" + LLAMA_TEXT.encode(), "byte order mark"),
        (LLAMA_TEXT.encode("utf-16"), "byte order mark"),
        (LLAMA_TEXT.replace("256", "NaN").encode(), "config.json#/vocab_size"),
        (LLAMA_TEXT.replace("256", "-Infinity").encode(), "config.json#/vocab_size"),
        (LLAMA_TEXT.replace("256", "1e400").encode(), "config.json#/vocab_size"),
        (LLAMA_TEXT.replace("256", "9" * 5000).encode(), "config.json#/vocab_size"),
        (b'{"rope_scaling": {"a/b": [1, {"factor": NaN}]}}', "#/rope_scaling/a~1b/1/factor"),
        (b'{"model_type": "llama", "vocab_size": 256, "vocab_size": 512}', "#/vocab_size"),
        (b'{"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested deeper"),
        (b'{"x": ' + b'{"x": ' * 100 + b"1" + b"}" * 101, "nested deeper"),
        (LLAMA_TEXT.replace(": 2,", ": 2.0,", 1).encode(), f"{LAYERS} a whole number 1..4096"),
        (LLAMA_TEXT.replace(": 2,", ": true,", 1).encode(), f"{LAYERS} a whole number 1..4096"),
        (LLAMA_TEXT.replace(": 2,", ': "2",', 1).encode(), f"{LAYERS} a whole number 1..4096"),
        (LLAMA_TEXT.replace(": 2,", ": 5000,", 1).encode(), f"{LAYERS} 1..4096"),
        (b'{"model_type": "\x1b[2J"}', "not JSON"),
        (b'{"model_type": "\\u001b[2J\\ud800"}', "model_type"),
    ],
)  # fmt: skip
def test_b1_a_config_that_is_no_honest_json_is_refused_with_its_place(tmp_path: Path, raw: bytes, says: str) -> None:
    """Syntax, encoding, numbers, depth and types: one line each, with line and column or a JSON pointer."""
    (tmp_path / "config.json").write_bytes(raw)
    assert says in refusal(lambda: load_model(str(tmp_path)))
    assert says in refusal(lambda: load_model(str(tmp_path / "config.json")))


def test_b1_a_config_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    """The length is looked at before anything is read."""
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1_000_000_000)
    assert "8,388,608 bytes" in refusal(lambda: load_model(str(tmp_path)))


# --- B2: honest JSON, impossible model ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 65}, "hidden_size"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"vocab_size": 2**60}, "vocab_size"),
        ({"intermediate_size": [160]}, "intermediate_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": 7}, "model_type"),
    ],
)
def test_b2_sizes_that_cannot_be_are_refused_with_a_pointer(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Contradictory, zero, negative or mistyped values name their key."""
    text = refusal(lambda: load_model(write_model(tmp_path, {**LLAMA, **change})))
    assert f"config.json#/{says}" in text


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**LLAMA, "model_type": "lama"}, "llama"),
        ({k: v for k, v in LLAMA.items() if k != "model_type"}, "not known"),
        ({"model_type": "some_new_vl", "text_config": LLAMA, "vision_config": {}}, "some_new_vl"),
    ],
)
def test_b2_an_unknown_model_type_is_never_guessed(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    """Not even when a known text_config lies inside: the wrapper may own weights."""
    assert says in refusal(lambda: load_model(write_model(tmp_path, config)), kind=UnknownModelType)


def test_b2_a_missing_tie_flag_means_what_transformers_makes_of_it(tmp_path: Path) -> None:
    """LlamaConfig's default is untied."""
    assert not load_model(write_model(tmp_path, LLAMA)).tied


# --- B3: config and weights disagree -----------------------------------------------------------------


def test_b3_headers_of_another_size_are_believed_and_both_numbers_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of Llama-3.1-8B beside the weights of 70B: planned as the weights are."""
    config = LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    rows = llama_rows(hidden=8192, layers=80, kv=1024, inner=28672, vocab=128256)
    stored = Stored(tuple(Tensor(n, dtype, tuple(shape)) for n, (dtype, shape) in rows.items()), 30)
    monkeypatch.setattr(model_source, "read_weights", lambda path, where: stored)
    model = load_model(write_model(tmp_path, config))
    small, large = GOLDEN["llama-3.1-8b"], GOLDEN["llama-3.1-70b"]
    assert (model.layers, model.hidden_size, model.total, model.stored_params) == (80, 8192, large, large)
    (warning,) = model.warnings
    assert f"{small:,}" in warning
    assert f"{large:,}" in warning


def test_b3_a_difference_that_shapes_do_not_explain_is_warned_of(tmp_path: Path) -> None:
    """The size of the weights follows the files, the rest the config, and the warning says so."""
    rows = llama_rows() | {"model.layers.0.self_attn.sinks": ("BF16", [4])}
    model = load_model(write_model(tmp_path, LLAMA, rows))
    assert model.stored_params == model.total + 4
    (warning,) = model.warnings
    assert f"{model.total:,}" in warning
    assert f"{model.total + 4:,}" in warning


def test_weights_that_agree_are_said_to_agree(tmp_path: Path) -> None:
    """No warning; the count, the bytes and the dtype of the files are notes."""
    model = load_model(write_model(tmp_path, LLAMA, llama_rows()))
    assert model.warnings == []
    assert model.stored_params == model.total
    assert any("BF16" in note for note in model.notes)


# --- B4: safetensors headers that lie ----------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def one(**change: Any) -> dict[str, Any]:
    return {"x": {**ENTRY, **change}}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"{}" * 4, 0, "not JSON"),
        (b'{"x": NaN}', 0, "not finite"),
        (json.dumps(one())[:-1].encode() + b', "x": {}}', 16, "there twice"),
        ({"x": 7}, 0, "dtype"),
        ({"__metadata__": [], **one()}, 16, "__metadata__"),
        (one(dtype="F31"), 16, "F31"),
        (one(dtype=["F32"]), 16, "dtype"),
        (one(shape=[2, 3]), 16, "24 bytes"),
        (one(shape=[2, -2]), 16, "whole numbers"),
        (one(shape=[2.0, 2]), 16, "whole numbers"),
        (one(shape=[2, True]), 16, "whole numbers"),
        (one(shape=[2**63, 2**63, 4]), 16, "bytes, data_offsets give 16"),
        (one(shape=[2**62] * 32), 16, "bytes, data_offsets give 16"),
        (one(shape=[1] * 10_000), 16, "at most 32"),
        (one(data_offsets=[16, 0]), 16, "data_offsets"),
        (one(data_offsets=[0]), 16, "data_offsets"),
        (one(data_offsets=[0, 2**70]), 16, "64 bits"),
        (one(), 15, "16 bytes of data, the file has 15"),
        (one(), 17, "16 bytes of data, the file has 17"),
        (one(data_offsets=[4, 20]), 20, "gap"),
        ({**one(), "y": {**ENTRY, "data_offsets": [8, 24]}}, 24, "overlaps"),
        ({**one(), "y": ENTRY}, 16, "overlaps"),
    ],
)  # fmt: skip
def test_b4_a_header_that_contradicts_itself_is_refused(tmp_path: Path, header: Any, data: int, says: str) -> None:
    """Types, shapes, offsets and the file's length have to agree, in integers without bounds."""
    write_model(tmp_path, LLAMA)
    write_weights(tmp_path / "model.safetensors", header, data)
    assert says in refusal(lambda: load_model(str(tmp_path)))


@pytest.mark.parametrize(
    ("length", "size", "says"),
    [(0, 7, "too short"), (2**64 - 1, 100, "the file has 92"), (93, 100, "the file has 92"),
     (100_000_001, 100_000_100, "100,000,000 are allowed")],
)  # fmt: skip
def test_b4_a_header_length_beyond_the_file_or_the_limit_is_refused(
    tmp_path: Path, length: int, size: int, says: str
) -> None:
    """Before the header is read."""
    write_model(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little"))
    os.truncate(tmp_path / "model.safetensors", size)
    assert says in refusal(lambda: load_model(str(tmp_path)))


def test_b4_too_many_tensors_are_refused_unparsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as bytes, before a parser makes objects of them."""
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 10)
    monkeypatch.setattr(checkpoint, "parse_json", lambda raw, where: pytest.fail("parsed"))
    path = tmp_path / "x.safetensors"
    write_weights(path, header_of({f"t{i}": ("U8", [1]) for i in range(20)}))
    with path.open("rb") as file, pytest.raises(BadInput, match="more than 10 tensors"):
        read_header(file, "x")


# --- B5: pickles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "x.pkl", "consolidated.00.pth"])
def test_b5_pickled_weights_are_never_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for directly: refused. Beside a config.json: counted from that, with a warning."""
    write_model(tmp_path, LLAMA)
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    real_open = os.open
    opened: list[str] = []
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or real_open(path, *a, **k))
    assert "never opened" in refusal(lambda: load_model(str(tmp_path / name)))
    model = load_model(str(tmp_path))
    assert model.total == from_config(LLAMA).total
    assert model.stored_params == 0
    assert "not opened" in model.warnings[0]
    assert not [path for path in opened if path.endswith(name)]


# --- B6: configs that ask for code to be run ---------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.EvilModel"}},
        {"trust_remote_code": True},
        {"_attn_implementation_internal": "evil/kernel"},
    ],
)
def test_b6_keys_that_run_code_are_ignored_and_noted(tmp_path: Path, extra: dict[str, Any]) -> None:
    """The count is that of the config without them, and nothing is imported."""
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('run')", encoding="utf-8")
    before = set(sys.modules)
    model = load_model(write_model(tmp_path, {**LLAMA, **extra}))
    assert model.total == from_config(LLAMA).total
    assert any(next(iter(extra)) in note and "ignored" in note for note in model.notes)
    assert not {name for name in set(sys.modules) - before if not name.startswith("lora_planner")}


# --- B7: names that are no names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "../../etc/nowhere", "a/b/../../c", "../x", "a/..", "a/.b", "a/b--c", "a/b/c", "C:\\x",
        "a\\b", "org/na\0me", "https://huggingface.co/org/name", "hf://org/name", "x" * 5000,
        "o/" + "x" * 5000, "--offline", "-rf", "org/-name", "org/naｍe", "meta-llаma/Llama-3.1-8B",
        "llama\u200b", "a\x1b[31m", "$(touch x)", "a;b/c", "org/\ud800", "a/\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("offline", [True, False])
def test_b7_what_is_no_name_is_refused_before_any_network(
    text: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traversal, URLs, control and look-alike characters, options, five kilobytes."""
    monkeypatch.setattr(model_source, "_hub", lambda: pytest.fail("asked the hub"))
    refusal(lambda: load_model(text, offline))


def test_b7_a_look_alike_is_named() -> None:
    """A Cyrillic letter in a Latin name cannot be seen, so it is said."""
    assert "CYRILLIC SMALL LETTER A" in refusal(lambda: load_model("llаma-3.1-8b"))


# --- B8: links, pipes, devices -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_b8_a_link_out_of_the_model_directory_is_refused(tmp_path: Path, name: str) -> None:
    """Even when what it leads to would be a valid file."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for directory in (inside, outside):
        write_model(directory, LLAMA, llama_rows() if name == "model.safetensors" else None)
    (outside / name).touch()
    (inside / name).unlink(missing_ok=True)
    (inside / name).symlink_to(outside / name)
    assert "leads out" in refusal(lambda: load_model(str(inside)))


def test_b8_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/<commit>/x -> ../../blobs/<hash> stays in the folder of its repository."""
    root = tmp_path / "models--org--name"
    write_model(tmp_path / "plain", LLAMA, llama_rows())
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "plain" / name).rename(root / "blobs" / name[:5])
        (snapshot / name).symlink_to(f"../../blobs/{name[:5]}")
    assert load_model(str(snapshot)).stored_params == from_config(LLAMA).total


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_b8_a_pipe_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    """Opening a FIFO would block for ever."""
    write_model(tmp_path, LLAMA)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "not a regular file" in refusal(lambda: load_model(str(tmp_path)))
    refusal(lambda: load_model(str(tmp_path / name)))


def test_b8_devices_directories_and_loops_are_refused(tmp_path: Path) -> None:
    """A device, a directory called config.json, a link to itself."""
    assert "not a regular file" in refusal(lambda: load_model("/dev/zero"))
    (tmp_path / "config.json").mkdir()
    assert "not a regular file" in refusal(lambda: load_model(str(tmp_path)))
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").symlink_to("config.json")
    refusal(lambda: load_model(str(tmp_path)))
    refusal(lambda: load_model(str(tmp_path / "config.json")))


@pytest.mark.parametrize("shard", ["../../etc/passwd", "/etc/passwd", "a/../b.safetensors", "x.bin", "", 7, None])
def test_b8_an_index_cannot_lead_elsewhere(tmp_path: Path, shard: Any) -> None:
    """A shard is a plain name ending in .safetensors."""
    write_model(tmp_path, LLAMA)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard}}), encoding="utf-8")
    assert "#/weight_map/x" in refusal(lambda: load_model(str(tmp_path)))


# --- what is not an attack ---------------------------------------------------------------------------


def test_a_directory_without_config_says_what_to_do(tmp_path: Path) -> None:
    """Weights alone do not tell the architecture."""
    write_weights(tmp_path / "model.safetensors", header_of(llama_rows()))
    assert "no config.json" in refusal(lambda: load_model(str(tmp_path)))


def test_missing_shards_are_said(tmp_path: Path) -> None:
    """A half-finished download is counted from its config, with a warning."""
    write_model(tmp_path, LLAMA)
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    model = load_model(str(tmp_path))
    assert model.stored_params == 0
    assert "not there" in model.warnings[0]


def test_a_quantised_checkpoint_is_counted_as_the_unquantised_model(tmp_path: Path) -> None:
    """4-bit weights lie two to a byte: the header cannot be compared, and a note says so."""
    rows = {n: ("U8", [prod(s) // 2, 1]) if "proj" in n else (d, s) for n, (d, s) in llama_rows().items()}
    config = {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    model = load_model(write_model(tmp_path, config, rows))
    assert model.total == from_config(LLAMA).total
    assert model.warnings == []
    assert any("bitsandbytes 4 bit" in note for note in model.notes)


def test_scales_of_an_fp8_checkpoint_are_no_parameters(tmp_path: Path) -> None:
    """weight_scale_inv lies beside each quantised matrix; its elements are not counted."""
    rows: Rows = {}
    for name, (dtype, shape) in llama_rows().items():
        rows[name] = ("F8_E4M3" if "proj" in name else dtype, shape)
        if "proj" in name:
            rows[f"{name}_scale_inv"] = ("F32", [1, 1])
    config = {**LLAMA, "quantization_config": {"quant_method": "fp8"}}
    model = load_model(write_model(tmp_path, config, rows))
    assert model.stored_params == model.total
    assert model.warnings == []


# --- the real thing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_counted_as_transformers_counts(
    tmp_path: Path, max_shard_size: str, tied: bool
) -> None:
    """One file or many, tied or not: the headers' total is sum(p.numel()), and nothing is warned of."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_size == "100KB")
    ours = load_model(str(tmp_path))
    assert ours.stored_params == ours.total == sum(p.numel() for p in model.parameters())
    assert ours.warnings == []


def published(config: dict[str, Any]) -> tuple[Model, list[Tensor]]:
    """The planner's model of a config, and the tensors transformers would build from it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if config["model_type"] not in BY_MODEL_TYPE:
        pytest.skip("family not described")
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(kind(**config))
    return from_config(config), [Tensor(n, "BF16", tuple(t.shape)) for n, t in built.state_dict().items()]


def test_a_tied_head_stored_twice_is_counted_once() -> None:
    """Qwen3-0.6B: the hub's file holds 751.6M, the model has 596.0M."""
    model, tensors = published(
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
         "tie_word_embeddings": True}
    )  # fmt: skip
    stored = Stored(tuple(tensors), 1)
    assert stored.params == GOLDEN["qwen3-0.6b stored"]
    checked = compare(model, stored)
    assert checked.stored_params == GOLDEN["qwen3-0.6b unique"]
    assert checked.warnings == []


def test_an_mtp_layer_and_correction_biases_are_not_loaded() -> None:
    """GLM-4.5-Air: layer 46 is an MTP module with its own embedding and head, 46 biases are buffers."""
    config = {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
        "use_qk_norm": False, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "vocab_size": 151552,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model, tensors = published(config)
    last = [t for t in tensors if t.name.startswith("model.layers.45.")]
    at, h, vocab = "model.layers.46.", 4096, 151552
    tensors += [Tensor(t.name.replace("layers.45", "layers.46"), t.dtype, t.shape) for t in last]
    tensors += [Tensor(f"{at}{n}.weight", "BF16", (h,)) for n in ("enorm", "hnorm", "shared_head.norm")]
    tensors += [Tensor(f"{at}{n}.weight", "BF16", (vocab, h)) for n in ("embed_tokens", "shared_head.head")]
    tensors += [Tensor(f"{at}eh_proj.weight", "BF16", (h, 2 * h))]
    stored = Stored(tuple(tensors), 47)
    assert stored.params == GOLDEN["glm-4.5-air stored"]
    checked = compare(model, stored)
    assert checked.stored_params == GOLDEN["glm-4.5-air unique"]
    assert checked.warnings == []


# --- names -------------------------------------------------------------------------------------------


def test_every_entry_of_the_catalogue_is_a_model_with_a_source() -> None:
    """By name and by hub id, in any case; nothing undated."""
    assert len({entry.name for entry in catalogue()}) == len(catalogue())
    for entry in catalogue():
        assert entry.source
        assert re.fullmatch(r"20\d\d-\d\d(-\d\d)?", entry.as_of)
        assert model_source.HUB_ID.fullmatch(entry.hub_id)
        model = load_model(entry.name)
        assert model.total == load_model(entry.hub_id.upper()).total > 0
        assert model.name == entry.name


def test_a_name_that_is_not_in_the_catalogue_gets_a_hint() -> None:
    """The nearest names are shown, none is taken."""
    text = refusal(lambda: load_model("llama-3.1-8"), kind=UnknownName)
    assert "llama-3.1-8b" in text


def fake_hub(tmp_path: Path, *, cached: bool = False, fault: Exception | None = None) -> Any:
    """What we use of huggingface_hub, with one repository in it."""

    def download(repo: str, name: str) -> str:
        assert (repo, name) == ("org/name", "config.json")
        if fault:
            raise fault
        return str(tmp_path / "config.json")

    rows = {
        name: SimpleNamespace(dtype=e["dtype"], shape=e["shape"], data_offsets=tuple(e["data_offsets"]))
        for name, e in header_of(llama_rows()).items()
        if name != "__metadata__"
    }
    api = SimpleNamespace(
        file_exists=lambda repo, name: True,
        parse_safetensors_file_metadata=lambda repo, name: SimpleNamespace(tensors=rows),
    )
    path = str(tmp_path / "config.json") if cached else None
    return SimpleNamespace(try_to_load_from_cache=lambda repo, name: path, hf_hub_download=download, HfApi=lambda: api)


def test_a_hub_id_is_read_from_the_cache_then_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline only what is cached; online config.json and one header."""
    write_model(tmp_path, LLAMA, llama_rows())
    monkeypatch.setattr(model_source, "_hub", lambda: fake_hub(tmp_path, cached=True))
    assert load_model("org/name").stored_params == from_config(LLAMA).total
    monkeypatch.setattr(model_source, "_hub", lambda: fake_hub(tmp_path))
    assert load_model("org/name", offline=False).stored_params == from_config(LLAMA).total
    assert "not in the catalogue" in refusal(lambda: load_model("org/name"), kind=UnknownName)


def test_a_hub_that_does_not_answer_is_a_missing_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 6, without the message of the HTTP library, which may quote a token."""
    hub = fake_hub(tmp_path, fault=ConnectionError("Bearer hf_secret"))
    monkeypatch.setattr(model_source, "_hub", lambda: hub)
    text = refusal(lambda: load_model("org/name", offline=False), kind=EnvironmentMissing, code=6)
    assert "hf_secret" not in text
    monkeypatch.setattr(model_source, "_hub", lambda: None)
    assert "pip install" in refusal(lambda: load_model("org/name", offline=False), kind=EnvironmentMissing, code=6)


# --- fuzz --------------------------------------------------------------------------------------------

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@QUIET
@given(raw=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_config_give_a_model_or_a_line(tmp_path: Path, raw: bytes) -> None:
    """Never anything but a LoraPlanError."""
    (tmp_path / "config.json").write_bytes(raw)
    refusal(lambda: load_model(str(tmp_path)))


@QUIET
@given(family=st.sampled_from(sorted(BY_MODEL_TYPE)), data=st.data())
def test_any_value_under_any_key_gives_a_model_or_a_line(family: str, data: st.DataObject) -> None:
    """Every family survives a config whose keys are right and whose values are not."""
    base = next((e.config for e in catalogue() if e.config["model_type"] == family), LLAMA)
    keys = data.draw(st.lists(st.sampled_from(sorted(base)), max_size=3))
    values = {key: data.draw(JSON | st.integers(-2, 70)) for key in keys if key != "model_type"}
    with suppress(LoraPlanError):
        assert from_config({**base, "model_type": family, **values}).total > 0


@QUIET
@given(raw=st.binary(max_size=200), honest=st.booleans(), more=st.binary(max_size=20))
def test_any_bytes_as_safetensors_give_a_model_or_a_line(tmp_path: Path, raw: bytes, honest: bool, more: bytes) -> None:
    """Never anything but a LoraPlanError, with an honest length before the header and without."""
    write_model(tmp_path, LLAMA)
    prefix = len(raw).to_bytes(8, "little") if honest else b""
    (tmp_path / "model.safetensors").write_bytes(prefix + raw + more)
    refusal(lambda: load_model(str(tmp_path)))


@QUIET
@given(entry=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON), data=st.data())
def test_any_entry_in_a_header_gives_tensors_or_a_line(entry: dict[str, Any], data: st.DataObject) -> None:
    """A valid entry with some parts replaced by anything."""
    raw = json.dumps({"x": {**ENTRY, **entry}}).encode()
    with suppress(LoraPlanError):
        tensors, end = checkpoint.tensors_of(parse_json(raw, "x"), "x")
        assert end == sum(t.bits for t in tensors) // 8


@QUIET
@given(st.text(max_size=60))
def test_any_text_as_name_is_refused_on_one_line(text: str) -> None:
    """Whatever is typed after --model; what exists here as a path is left out."""
    if not os.path.exists(text.replace("\0", "")):
        refusal(lambda: load_model(text))


@QUIET
@given(st.from_regex(model_source.HUB_ID, fullmatch=True, alphabet="aZ0_.-/git"))
def test_what_we_take_for_a_hub_id_the_hub_does_too(text: str) -> None:
    """Our pattern is inside huggingface_hub's own check."""
    utils = pytest.importorskip("huggingface_hub.utils")
    utils.validate_repo_id(text)
