"""The model a run starts from: the user's own, or a small one that is pre-trained here on real local text.

A base of our own is made by the same loop as everything else (full training from random weights on the task
"code") and cached under a hash of everything that made it. Weights are read from safetensors only; no code of a
model is ever run (`trust_remote_code=False`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_planner.checkpoint import read_json
from lora_planner.errors import BadInput, EnvironmentMissing, UnknownName, nearest
from lora_planner.record import RunSpec, canonical

CHUNK = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DROPOUT = re.compile(r"(dropout|pdrop|dropout_prob|drop_rate)$")
#: raised when a change of this package's code changes what pre-training makes
RECIPE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """Architecture and pre-training of a small base. `experts` > 0: a mixture, `intermediate` wide each.

    `parent`: a recipe whose finished base this one goes on from, on `task`, with its own learning rate and steps.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    steps: int
    batch: int
    seq_len: int = 128
    vocab: int = 2048
    lr: float = 2e-3
    experts: int = 0
    top_k: int = 0
    seed: int = 0
    parent: str = ""
    task: str = "code"
    task_args: tuple[tuple[str, Any], ...] = ()


# fmt: off
RECIPES = {
    # some 10 seconds, knows letters and indentation: for tests of the machinery, not of learning
    "tiny":      Recipe("qwen3", 64, 2, 4, 2, 192, steps=60, batch=8, seq_len=64, vocab=512),
    "tiny-moe":  Recipe("qwen3_moe", 64, 2, 4, 2, 64, steps=60, batch=8, seq_len=64, vocab=512, experts=4, top_k=2),
    # minutes on two cores
    "qwen3-1m":  Recipe("qwen3", 128, 4, 4, 2, 384, steps=1000, batch=16),
    "llama-1m":  Recipe("llama", 128, 4, 4, 4, 384, steps=1000, batch=16),
    # the same at half and at twice the width: what moves with width
    "qwen3-w64":  Recipe("qwen3", 64, 4, 4, 2, 192, steps=1000, batch=16),
    "qwen3-w256": Recipe("qwen3", 256, 4, 4, 2, 768, steps=1000, batch=16),
    # the first, which then learned sums with a habit of its own: what RL can sharpen
    "qwen3-1m-sums": Recipe("qwen3", 128, 4, 4, 2, 384, steps=400, batch=32, seq_len=16, lr=1e-3, parent="qwen3-1m",
                            task="arithmetic", task_args=(("share", 0.25), ("supervised", True))),
    "moe-2m":    Recipe("qwen3_moe", 128, 4, 4, 2, 192, steps=1000, batch=16, experts=8, top_k=2),
    "qwen3-3m":  Recipe("qwen3", 192, 6, 6, 2, 576, steps=2000, batch=16),
    # minutes on one data-centre GPU
    "qwen3-30m": Recipe("qwen3", 512, 10, 8, 4, 1536, steps=6000, batch=128, seq_len=256, vocab=4096, lr=1e-3),
    "qwen3-30m-w256": Recipe("qwen3", 256, 10, 4, 2, 768, steps=6000, batch=128, seq_len=256, vocab=4096, lr=1e-3),
    "qwen3-30m-w768": Recipe("qwen3", 768, 10, 12, 6, 2304, steps=6000, batch=128, seq_len=256, vocab=4096, lr=1e-3),
    "qwen3-30m-sums": Recipe("qwen3", 512, 10, 8, 4, 1536, steps=400, batch=64, seq_len=16, vocab=4096, lr=3e-4,
                             parent="qwen3-30m", task="arithmetic", task_args=(("share", 0.25), ("supervised", True))),
}
# fmt: on


@dataclass(frozen=True, slots=True)
class Base:
    """A directory with config.json and, unless only random weights are wanted, safetensors and a tokenizer."""

    key: str
    path: Path

    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json", f"{self.path.name}/config.json")

    def story(self) -> dict[str, Any]:
        """How a base of our own was made, and its losses; empty for a user's."""
        file = self.path / "base.json"
        story: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return story

    def summary(self) -> dict[str, Any]:
        """What a record says of it: how well it knows its own text, and what counting pairs there reaches."""
        story = self.story()
        return {name: story[name] for name in ("name", "tokens", "nats", "bigram_nats", "weights") if name in story}


def hf_config(recipe: Recipe, vocab: int) -> dict[str, Any]:
    """The config.json of a recipe. The unembedding is a matrix of its own, as in models of 8B and more."""
    config: dict[str, Any] = {
        "model_type": recipe.model_type,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM",
                           "qwen3_moe": "Qwen3MoeForCausalLM"}[recipe.model_type]],
        "hidden_size": recipe.hidden, "num_hidden_layers": recipe.layers, "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads, "head_dim": recipe.hidden // recipe.heads,
        "intermediate_size": recipe.intermediate, "vocab_size": vocab, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    }  # fmt: skip
    if recipe.experts:
        config |= {"num_experts": recipe.experts, "num_experts_per_tok": recipe.top_k,
                   "moe_intermediate_size": recipe.intermediate, "norm_topk_prob": True}  # fmt: skip
    return config


def own_key(name: str, recipe: Recipe, digest: str, device: str, parent: str = "") -> str:
    """Name and hash of everything that makes the weights: recipe, parent, text, libraries, kind of device."""
    made_by = {
        "recipe": asdict(recipe), "parent": parent, "text": digest, "recipe_version": RECIPE_VERSION,
        "device": device,
        "libraries": {p: version(p) for p in ("torch", "transformers", "tokenizers")},
    }  # fmt: skip
    return f"{name}-{hashlib.sha256(canonical(made_by).encode()).hexdigest()[:12]}"


def ensure(name: str, home: Path, device: str, train: Callable[[RunSpec, Base, Path, Path], dict[str, Any]]) -> Base:
    """A base of our own, from the cache or made now.

    `train(spec, start, work, out)` runs the spec from a directory with config and tokenizer, keeps checkpoints in
    `work`, writes the trained model to `out` and returns what it measured; interrupted, it goes on next time.
    """
    from runner import corpus
    from runner.tokenizer import save, train_tokenizer

    if name not in RECIPES:
        close = nearest(name, RECIPES, 1)
        raise UnknownName(f"no base is called {name!r}", "--base",
                          f"Known: {', '.join(RECIPES)}." + (f" Nearest: {close[0]}." if close else ""))  # fmt: skip
    recipe = RECIPES[name]
    digest = corpus.digest([*corpus.code_documents(), *corpus.prose_documents()])
    parent = ensure(recipe.parent, home, device, train) if recipe.parent else None
    key = own_key(name, recipe, digest, device, parent.key if parent else "")
    done, work = home / "bases" / key, home / "bases" / f"{key}.work"
    if (done / "base.json").is_file():
        return Base(key, done)
    start = work / "start"
    if parent:
        start = parent.path
    elif not (start / "config.json").is_file():
        start.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(recipe.vocab)
        save(tokenizer, start)
        config = hf_config(recipe, tokenizer.get_vocab_size())
        (start / "config.json").write_text(json.dumps(config, indent=1))
    spec = RunSpec(
        base=key, task=recipe.task, task_args=recipe.task_args, init="pretrained" if parent else "random",
        method="full", rank=0, alpha=0.0, lr=recipe.lr, schedule="cosine", steps=recipe.steps, micro_batch=recipe.batch, seq_len=recipe.seq_len, seed=recipe.seed, device=device,
        precision="bf16" if device == "cuda" else "fp32", adam_eps=1e-8,
    )  # fmt: skip
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    measured = train(spec, Base(key, start), work / "checkpoints", out)
    for file in start.iterdir():
        if file.name in TOKENIZER_FILES:
            shutil.copy(file, out / file.name)
    story = {"name": name, "recipe": asdict(recipe), "text": digest, "held_out": measured["held_out"],
             "nats": measured["held_out"][-1][1], "tokens": measured["trained_tokens"],
             "weights": weights_digest(out), "losses": measured["losses"]}  # fmt: skip
    if "bigram_nats" in measured["task"]:
        story["bigram_nats"] = measured["task"]["bigram_nats"]
    (out / "base.json").write_text(json.dumps(story, indent=1))
    os.rename(out, done)
    shutil.rmtree(work, ignore_errors=True)
    return Base(key, done)


def weights_digest(path: Path) -> str:
    """First 16 hex digits of the sha256 of all weights. The key of a base says what made it, this what came out: on
    another processor the last bits differ, and runs of the two are not of one study."""
    found = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def sibling(source: Base, home: Path, factor: float) -> Base | None:
    """The same architecture at another width, with random weights and the same tokenizer: for timing and memory.

    None where the width does not divide, and for a user's own model, whose numbers are wanted for itself.
    """
    if not source.story():
        return None
    config = dict(source.config())
    for name in (
        "hidden_size",
        "intermediate_size",
        "moe_intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        if name in config:
            wider = config[name] * factor
            if wider != int(wider):
                return None
            config[name] = int(wider)
    key = f"width-{hashlib.sha256(canonical(config).encode()).hexdigest()[:12]}"
    path = home / "bases" / key
    path.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source.path / file, path / file)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return Base(key, path)


def of_user(name: str, home: Path, offline: bool = False) -> Base:
    """The user's model: a directory, or a hub id whose safetensors, config and tokenizer are fetched."""
    path = Path(name)
    if not path.is_dir():
        path = _from_hub(name, home, offline)
    if not (path / "config.json").is_file():
        raise BadInput("no config.json", path.name, "Give the directory of a model.")
    config = read_json(path / "config.json", f"{path.name}/config.json")
    hidden = sorted(key for key in config if key.startswith("_attn_implementation"))
    if hidden:
        raise BadInput(f"the config sets {', '.join(hidden)}", f"{path.name}/config.json",
                       "A config may not choose the code that runs: remove it.")  # fmt: skip
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        have = f"only {', '.join(others[:3])}" if others else "no weights"
        raise BadInput(f"{have}, no safetensors", path.name, "Convert it: pickled weights are never loaded.")
    return Base(fingerprint(path, weights), path)


def fingerprint(path: Path, weights: list[Path]) -> str:
    """Identity of a user's model: its config, and of each weight file the size, first and last MiB.

    The first MiB holds the header or its beginning; hashing all of 140 GB would take longer than a run.
    """
    found = hashlib.sha256((path / "config.json").read_bytes())
    for file in weights:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            found.update(stream.read(CHUNK))
            stream.seek(max(0, size - CHUNK))
            found.update(stream.read(CHUNK))
    return f"user-{found.hexdigest()[:16]}"


def _from_hub(name: str, home: Path, offline: bool) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise BadInput(f"{name!r} is no directory and no hub id", "--model", "Use a directory, or owner/name.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise EnvironmentMissing(
            "huggingface_hub is not installed", "--model", "pip install 'lora-plan[hub]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                name, cache_dir=home / "hub", local_files_only=offline,
                allow_patterns=["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt"],
            )
        )  # fmt: skip
    except Exception as error:  # the hub's own error types change between versions
        raise EnvironmentMissing(f"cannot fetch {name}: {type(error).__name__}", "--model",
                                 "Log in with `hf auth login` if it is gated, or give a local directory.") from None  # fmt: skip


def tokenizer(base: Base) -> Any:
    """The base's tokenizer, or None where the directory has none (random weights of a bare config)."""
    from transformers import AutoTokenizer

    if not any((base.path / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    return AutoTokenizer.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)


def load(base: Base, spec: RunSpec, device: torch.device) -> tuple[Any, list[str]]:
    """The module of a run before adapters, and notes on what was changed in its config.

    Full fine-tuning holds fp32 weights; a frozen base is bf16 where the run is. Every dropout is set to 0.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.path, trust_remote_code=False, local_files_only=True)
    notes = []
    for name, value in list(config.to_dict().items()):
        if DROPOUT.search(name) and isinstance(value, float) and value:
            setattr(config, name, 0.0)
            notes.append(f"{name} {value:g} set to 0")
    narrow = spec.precision == "bf16" and spec.method != "full"
    dtype = torch.bfloat16 if narrow else torch.float32
    if spec.init == "random":
        torch.manual_seed(spec.seed)
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=spec.attention)
    else:
        module = AutoModelForCausalLM.from_pretrained(
            base.path, config=config, dtype=dtype, attn_implementation=spec.attention,
            trust_remote_code=False, use_safetensors=True, local_files_only=True,
        )  # fmt: skip
    module = module.to(device)
    if spec.checkpointing == "full":
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    return module, notes
