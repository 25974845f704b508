"""What publishers call a model or a GPU, turned into the planner's rows; None where it is not known, never a neighbour.

Models: the catalogue of the planner, and shapes.json beside this file for public models that it does not have.
Two families are remote code or gone from transformers' layers as the planner reads them, so they are built here:
Qwen 1 and MPT.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lora_planner.arch import from_config
from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_attention, gated_mlp, layer_norm, plain_mlp, rms, stack
from lora_planner.errors import LoraPlanError
from lora_planner.facts import Gpu, gpus
from lora_planner.model import Attention, Block, Linear, Model
from lora_planner.model_source import catalogue
from lora_planner.units import GIB

SHAPES = Path(__file__).with_name("shapes.json")
#: words of a name that say how it was tuned or stored, not what shape it has
TUNED = ("instruct", "chat", "base", "hf", "it", "sft", "dpo", "preview", "nvfp4", "fp8", "bnb", "4bit", "vision", "text",
         "meta", "inst")  # fmt: skip
SIZE = re.compile(r"(\d+(\.\d+)?[bm])(-?a\d+(\.\d+)?b)?$")


# ---------------------------------------------------------------- models


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """The rows of shapes.json by name."""
    return {row["name"]: row for row in json.loads(SHAPES.read_text())["models"]}


@cache
def _configs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Squeezed name -> (name, config): the catalogue and the rows here, then what is left of their names without
    words of tuning, which never takes the place of a whole name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    named = [(entry.name, (entry.name, entry.hub_id.split("/")[-1]), entry.config) for entry in catalogue()]
    named += [(name, (name, *row["also"]), row["config"]) for name, row in shapes().items()]
    for spell in (_squeezed, lambda known: _squeezed(_plain(known))):
        for name, spellings, config in named:
            for known in spellings:
                found.setdefault(spell(known), (name, config))
    return found


def _squeezed(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c == ".")


def _plain(text: str) -> str:
    """Without organisation, remarks in brackets, and words of tuning."""
    text = re.sub(r"\(.*?\)|\[.*?\]", " ", text.lower()).strip().split("/")[-1]
    text = re.sub(r"[\s_]+", "-", text.strip())
    words = [word for word in text.split("-") if word not in TUNED and not re.fullmatch(r"v?\d{4}|v0\.\d", word)]
    return "-".join(word for word in words if word)


def config_of(text: str) -> tuple[str, dict[str, Any]] | None:
    """The planner's name and config.json facts of a model by any of its usual spellings, or None.

    >>> [config_of(name)[0] for name in ("meta-llama/Llama-3.2-3B", "Llama3 70B", "Llama-2-70B (fused qkv)")]
    ['llama-3.2-3b', 'llama-3-70b', 'llama-2-70b']
    >>> config_of("DeepSeek-V3 671B")[0], config_of("some-model-9b")
    ('deepseek-v3', None)
    """
    known = _configs()
    bare = re.sub(r"\(.*?\)|\[.*?\]", " ", text).split("/")[-1].strip()
    plain = _plain(text)
    shorter = SIZE.sub("", plain).strip("-")  # "DeepSeek-V3 671B": the size repeats what the name says
    for spelling in (bare, plain, shorter):
        if spelling and _squeezed(spelling) in known:
            name, config = known[_squeezed(spelling)]
            if spelling == shorter and spelling != plain and not _same_size(plain, name, config):
                return None
            return name, config
    return None


def _same_size(plain: str, name: str, config: dict[str, Any]) -> bool:
    """Whether the size that was cut off a name is that of the model found for the rest (within a tenth)."""
    stated = SIZE.search(plain)
    if stated is None:
        return True
    unit = {"b": 1e9, "m": 1e6}[stated[1][-1]]
    return 0.85 < build(config, name).total / (float(stated[1][:-1]) * unit) < 1.2


@cache
def model_of(text: str) -> Model | None:
    """The model that a publisher means, or None.

    >>> model_of("Qwen-7B (v1)").total
    7721324544
    """
    found = config_of(text)
    if found is None:
        return None
    try:
        return build(found[1], found[0])
    except LoraPlanError:
        return None


def build(config: dict[str, Any], name: str) -> Model:
    """from_config, and the two families that it does not know."""
    own = {"qwen": _qwen, "mpt": _mpt}.get(str(config.get("model_type")))
    if own is None:
        return from_config(config, name, name)
    return replace(own(Config(config, name)), name=name, source=name)


def _qwen(c: Config) -> Model:
    """Qwen 1: one biased matrix for q, k and v; `intermediate_size` is that of gate and up together.

    Source: modeling_qwen.py on the hub.
    """
    hidden, n = c.size("hidden_size"), c.size("num_attention_heads")
    attention, mixer = fused_attention(
        hidden, n, n, hidden // n, qkv="attn.c_attn", out="attn.c_proj", bias_qkv=True
    )  # fmt: skip
    inner = c.size("intermediate_size") // 2
    mlp = gated_mlp(hidden, inner, names=("w2", "w1", "c_proj"), reads=("in", "attn.c_proj"))
    return stack(
        c, [Block("decoder", 0, attention + mlp, (rms("ln_1", hidden), rms("ln_2", hidden)), mixer)],
        [0] * c.size("num_hidden_layers"), hidden=hidden, vocab=c.size("vocab_size"), final=[rms("ln_f", hidden)],
        tied=False, embed="wte", module_prefix="transformer.h", peft_default=("c_attn",),
    )  # fmt: skip


def _mpt(c: Config) -> Model:
    """MPT: fused q, k, v, ALiBi, layer norms and matrices without biases, the embedding is the head.

    Source: llm-foundry's MPTForCausalLM; transformers 5.23 has the same layers.
    """
    hidden, n = c.size("hidden_size"), c.size("num_attention_heads")
    attention, mixer = fused_attention(hidden, n, n, hidden // n, qkv="attn.Wqkv", out="attn.out_proj")
    mlp = plain_mlp(hidden, 4 * hidden, ("ffn.up_proj", "ffn.down_proj"), bias=False, reads=("in", "attn.out_proj"))
    norms = (layer_norm("norm_1", hidden, bias=False), layer_norm("norm_2", hidden, bias=False))
    return stack(
        c, [Block("decoder", 0, attention + mlp, norms, mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers"), hidden=hidden, vocab=c.size("vocab_size"),
        final=[layer_norm("norm_f", hidden, bias=False)], tied=True, embed="wte", module_prefix="transformer.blocks",
        peft_default=("Wqkv",),
    )  # fmt: skip


@cache
def split(model: Model) -> Model:
    """The same model with q, k and v as matrices of their own, as trainers count adapters that wrap only some of them.

    >>> sorted(row.name for row in split(model_of("Falcon 40B")).linears)[:2]
    ['mlp.dense_4h_to_h', 'mlp.dense_h_to_4h']
    """
    return replace(model, blocks=tuple(_split(block) for block in model.blocks))


def _split(block: Block) -> Block:
    mixer = block.mixer
    if not isinstance(mixer, Attention) or mixer.q != mixer.v or len(mixer.q) != 1:
        return block
    fused = mixer.q[0]
    place = fused.rsplit(".", 1)[0] + "." if "." in fused else ""
    names = tuple(place + name for name in ("q_proj", "k_proj", "v_proj"))
    widths = (
        mixer.heads * mixer.qk_head_dim, mixer.kv_heads * mixer.qk_head_dim, mixer.kv_heads * mixer.v_head_dim,
    )  # fmt: skip
    rows: list[Linear] = []
    for row in block.linears:
        if row.name == fused:
            rows += [replace(row, name=n, d_out=w, parts=1) for n, w in zip(names, widths, strict=True)]
        else:
            reads = tuple(name for r in row.reads for name in (names if r == fused else (r,)))
            rows.append(replace(row, reads=reads))
    q, k, v = names
    return replace(block, linears=tuple(rows), mixer=replace(mixer, q=(q,), k=(k,), v=(v,)))


# ---------------------------------------------------------------- GPUs

#: a pattern of what publishers write -> the planner's name; the first that is found. Where a product has several
#: forms, the one that the publishers of tables rent: SXM.
CARDS = (
    (r"gb\s?300", "gb300-278gb"),
    (r"b300", "b300-270gb"),
    (r"gb\s?200", "gb200-186gb"),
    (r"gb10\b", ""),
    (r"laptop|mobile|max-q|\bmig\b", ""),
    (r"h100.*96 ?gb|h100.*64 ?gb|h20\b|h800", ""),  # variants with another memory
    (r"gh200", "gh200-96gb"),
    (r"b200", "b200-180gb"),
    (r"h200.*nvl", "h200-nvl-141gb"),
    (r"h200", "h200-sxm-141gb"),
    (r"h100.*nvl", "h100-nvl-94gb"),
    (r"h100.*pcie", "h100-pcie-80gb"),
    (r"h100", "h100-sxm-80gb"),
    (r"mi300x", "mi300x-192gb"),
    (r"mi325x", "mi325x-256gb"),
    (r"mi350x", "mi350x-288gb"),
    (r"mi355x", "mi355x-288gb"),
    (r"gaudi ?\(?r?\)? ?2|hl-225", "hl225-96gb"),
    (r"mi\d{3}|gaudi|tpu|\bnpu\b|ascend|910b|xeon", ""),
    (r"a100.*pcie.*40|a100.*40.*pcie", "a100-pcie-40gb"),
    (r"a100.*pcie", "a100-pcie-80gb"),
    (r"a100.*40", "a100-sxm-40gb"),
    (r"a100.*80|a800.*80", "a100-sxm-80gb"),  # an A800 is an A100 with a narrower link
    (r"a100|a800", ""),  # of which size?
    (r"l40s", "l40s-48gb"),
    (r"\bl40\b", "l40-48gb"),
    (r"\bl4\b", "l4-24gb"),
    (r"a10g", "a10g-24gb"),
    (r"a6000.*ada|6000 ada|ada.*6000", "rtx-6000-ada-48gb"),
    (r"pro.*6000.*(blackwell|96)|rtx pro 6000", "rtx-pro-6000-blackwell-96gb"),
    (r"a6000", "rtx-a6000-48gb"),
    (r"a5000.*ada|5000 ada", ""),
    (r"a5000", "rtx-a5000-24gb"),
    (r"a40\b", "a40-48gb"),
    (r"a30\b", "a30-24gb"),
    (r"\ba10\b", "a10-24gb"),
    (r"4090 ?d\b", ""),
    (r"4090", "rtx4090-24gb"),
    (r"4080 ?super|3090 ?ti", ""),
    (r"4080", "rtx4080-16gb"),
    (r"3090", "rtx3090-24gb"),
    (r"5090", "rtx5090-32gb"),
    (r"v100.*32", "v100-sxm-32gb"),
    (r"v100.*16", "v100-sxm-16gb"),
    (r"\bt4\b", "t4-16gb"),
)


@cache
def gpu_of(text: str) -> Gpu | None:
    """The GPU that a publisher means, or None.

    >>> [gpu_of(t).name for t in ("H100 80GB", "A100-SXM4-40GB", "Tesla T4 16GB", "DGX-H100")]
    ['h100-sxm-80gb', 'a100-sxm-40gb', 't4-16gb', 'h100-sxm-80gb']
    >>> gpu_of("H100-96GB HBM2e 500W"), gpu_of("A100"), gpu_of("unstated")
    (None, None, None)
    """
    by_name = {g.name: g for g in gpus()}
    for row in by_name.values():
        if text.strip() in (row.name, *row.also, *row.reported_as):
            return row
    low = text.lower().replace("_", " ")
    name = next((name for pattern, name in CARDS if re.search(pattern, low)), "")
    return by_name.get(name)


@cache
def card_bytes(text: str) -> float | None:
    """Memory of a card: the planner's row, else the number of GB in its name.

    >>> card_bytes("80GB GPU") / GIB
    80.0
    """
    known = gpu_of(text)
    if known is not None:
        return float(known.memory_bytes)
    stated = re.search(r"(\d+) ?gi?b\b", text.lower())
    return float(stated[1]) * GIB if stated else None
