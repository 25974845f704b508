"""`lora-plan check`: what a training config trains, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_planner.arch import from_config
from lora_planner.cli import Commands
from lora_planner.commands.check import check
from lora_planner.errors import LoraPlanError
from lora_planner.facts import gpu
from lora_planner.handoff import READERS, read, source
from lora_planner.handoff.findings import CHECKS, SEVERITIES
from lora_planner.handoff.manifest import modules, resolve
from lora_planner.handoff.recipe import Lora, Recipe
from lora_planner.handoff.review import Report, review
from lora_planner.handoff.source import Document
from lora_planner.handoff.words import known_keys
from lora_planner.model_source import catalogue, load_model
from lora_planner.plan import PriceBook

GOLDEN = Path(__file__).parent / "golden" / "handoff"
H100 = "h100-sxm-80gb"


def run(*words: str) -> Result:
    """The command in its group, where its errors end."""
    group = Commands(commands={"check": check})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora-plan", "check", *words])
        patch.setenv("COLUMNS", "100")
        return CliRunner().invoke(group, ["check", *words, "--offline"])


def report(document: Document, tool: str = "", model: str = "", card: str = "", **more: Any) -> Report:
    recipe = read(document, tool)
    return review(recipe, load_model(model or recipe.model), gpu(card) if card else None, PriceBook.load(), **more)


def codes(found: Report) -> set[str]:
    return {finding.code for finding in found.findings}


def trl(**values: Any) -> Document:
    return Document({"model_name_or_path": "Qwen/Qwen3-8B", "dtype": "bfloat16", "use_peft": True, "lora_target_modules": "all-linear",
                     "learning_rate": 6e-4, **values}, "sft.yaml", "yaml")  # fmt: skip


# ---------------------------------------------------------------- golden files


#: file, exit code on an H100, findings beyond notes, (parameters of the adapter, in full) as published or as peft counts
FILES = [
    # 83.9M LoRA and 1.05B embedding parameters: the field report on axolotl's stock recipe
    ("axolotl-lora.yml", 0, {"W-EMBEDDINGS"}, (83_886_080, 1_050_673_152)),
    ("axolotl-typo.yml", 7, {"E-KEY"}, (41_943_040, 0)),
    ("trl-sft.yaml", 7, {"E-LR-FULL"}, (43_646_976, 0)),
    ("trl-grpo.yaml", 7, {"E-LR-FULL", "E-GROUP-ONE"}, (21_823_488, 0)),
    ("trl-sft.sh", 7, {"E-TARGET-NONE", "W-PACKING-ATTENTION"}, (0, 0)),
    ("llamafactory-full.yaml", 4, {"E-NOFIT", "E-LR-LORA", "W-BF16-FULL", "W-REMOTE-CODE"}, (0, 0)),
    ("llamafactory-lora.yaml", 4, {"E-NOFIT", "W-LR-LOW", "W-EXPERTS-FROZEN", "W-EXPERTS-16-BIT", "W-PACKING-ATTENTION"},
     (13_369_344 // 2, 0)),
    # 996,507,648: peft 0.21.2's all-linear on Qwen3-30B-A3B, experts at twice the rank and the router
    ("adapter_config.json", 4, {"E-NOFIT", "E-EXPERTS-DROPOUT", "W-RANK-BREAK-EVEN"}, (996_507_648, 0)),
    ("unsloth.json", 0, {"W-ALPHA", "W-ATTENTION-ONLY", "W-RANK-SERVED", "W-BATCH-LARGE", "W-FEW-STEPS"}, (511_180_800, 0)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "code", "wrong", "params"), FILES, ids=[row[0] for row in FILES])
def test_users_files(name: str, code: int, wrong: set[str], params: tuple[int, int]) -> None:
    """Each file's faults are named, nothing else is, and the parameters are those that others count."""
    done = run(str(GOLDEN / name), "--gpu", H100, "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == document["exit_code"] == code
    result = document["result"]
    assert {f["code"] for f in result["findings"] if f["severity"] != "note"} == wrong
    assert (result["params"]["adapter"], result["params"]["saved"]) == params
    assert all(f["evidence"] and f["fix"] and f["severity"] == SEVERITIES[f["code"][0]] for f in result["findings"])


def test_the_terminal_says_the_same() -> None:
    """Every finding's code, evidence and fix is printed, with the manifest and the cost of the run."""
    done = run(str(GOLDEN / "axolotl-lora.yml"), "--gpu", H100, "--tokens", "10M")
    for word in (
        "axolotl",
        "1,134,559,232 trained",
        "in full:",
        "embed_tokens 525,336,576",
        "W-EMBEDDINGS",
        "fix",
        "yes, P",
        "$",
    ):
        assert word in done.stdout
    assert done.exit_code == 0


def test_without_a_gpu_only_what_needs_none() -> None:
    """No GPU: no memory, no cost, the rest as before."""
    found = json.loads(run(str(GOLDEN / "trl-sft.yaml"), "--json").stdout)["result"]
    assert found["p_fit"] is None
    assert found["params"]["trainable"] == 43_646_976
    assert [f["code"] for f in found["findings"]] == ["E-LR-FULL"]


# ---------------------------------------------------------------- oracles


SMALL = {"num_hidden_layers": 3}
PEFT = [
    ("llama-3.1-8b", {"target_modules": "all-linear"}),
    ("llama-3.1-8b", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama-3.1-8b", {"target_modules": r".*layers\.(0|2)\.mlp\..*proj"}),
    ("llama-3.1-8b", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("llama-3.1-8b", {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 4}, "exclude_modules": ["layers.0.mlp.up_proj"]}),
    ("llama-3.1-8b", {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    ("llama-3.1-8b", {"target_modules": ["self_attn.q_proj", "model.layers.0.mlp.down_proj"], "use_dora": True}),
    ("llama-3.1-8b", {}),
    ("gpt2", {"target_modules": ["c_proj"]}),
    ("opt-1.3b", {"target_modules": "all-linear"}),
    ("qwen3-30b-a3b", {"target_modules": "all-linear"}),
    ("qwen3-30b-a3b", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    ("qwen3-30b-a3b", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
                       "rank_pattern": {r".*\.mlp\.experts\.down_proj": 2}}),
    ("gpt-oss-20b", {"target_modules": "all-linear"}),
    ("gemma-3-4b", {"target_modules": ["q_proj", "v_proj"]}),
    ("gemma-3-4b", {"target_modules": r"model\.language_model\.layers\.\d+\.(self_attn\.q_proj|mlp\.up_proj)"}),
]  # fmt: skip


def small_config(name: str) -> dict[str, Any]:
    """A catalogue config with three layers, of which the tests build the real model."""
    config = json.loads(json.dumps(next(entry.config for entry in catalogue() if entry.name == name)))
    text = config.get("text_config", config)
    for key in ("num_hidden_layers", "n_layer"):
        if key in text:
            text[key] = 3
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:3]
    return dict(config)


@pytest.mark.parametrize(("name", "words"), PEFT, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PEFT)])
def test_the_manifest_is_what_peft_builds(name: str, words: dict[str, Any]) -> None:
    """Trainable parameters of a real model wrapped by peft, for names, patterns, layers, ranks, experts, whole modules."""
    torch: Any = pytest.importorskip("torch")
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    config = small_config(name)
    ours = from_config(config)
    with torch.device("meta"):
        kind = transformers.AutoConfig.for_model(**config)
        auto = (
            transformers.AutoModelForImageTextToText if "vision_config" in config else transformers.AutoModelForCausalLM
        )
        real = auto.from_config(kind)
    assert {module.path for module in modules(ours)} <= {path for path, _ in real.named_modules()}
    wrapped = peft.get_peft_model(real, peft.LoraConfig(r=8, lora_alpha=8, **words), autocast_adapter_dtype=False)
    recipe = read(
        Document({"peft_type": "LORA", "r": 8, "lora_alpha": 8, **words}, "adapter_config.json", "json"), "peft"
    )
    found = resolve(ours, recipe)
    assert found.adapter_params + found.saved_params == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_trl_defaults_are_trls() -> None:
    """What a file does not say is what the installed TRL would do."""
    trl_library: Any = pytest.importorskip("trl")
    sft, grpo, model = (
        {f.name: f.default for f in fields(c)}
        for c in (trl_library.SFTConfig, trl_library.GRPOConfig, trl_library.ModelConfig)
    )
    bare = read(Document({"model_name_or_path": "m", "use_peft": True}, "x", "yaml"), "trl")
    assert (bare.learning_rate, bare.micro_batch, bare.epochs, bare.max_length, bare.checkpointing) == (
        sft["learning_rate"], sft["per_device_train_batch_size"], sft["num_train_epochs"], sft["max_length"],
        sft["gradient_checkpointing"],
    )  # fmt: skip
    assert bare.lora is not None
    assert (bare.lora.rank, bare.lora.alpha, bare.lora.dropout, bare.weights) == (
        model["lora_r"], model["lora_alpha"], model["lora_dropout"], model["dtype"],
    )  # fmt: skip
    rl = read(Document({"model_name_or_path": "m", "num_generations": None, "reward_funcs": []}, "x", "yaml"), "trl")
    assert (rl.objective, rl.learning_rate, rl.group) == ("rl", grpo["learning_rate"], grpo["num_generations"])


def test_trl_takes_a_single_target_as_a_pattern() -> None:
    """The fault that E-TARGET-NONE names: TRL unwraps the list, peft then looks for a whole path of that name."""
    trl_library: Any = pytest.importorskip("trl")
    assert trl_library.ModelConfig(lora_target_modules=["q_proj"]).lora_target_modules == "q_proj"
    assert "E-TARGET-NONE" in codes(report(trl(lora_target_modules=["q_proj"])))
    assert "E-TARGET-NONE" not in codes(report(trl(lora_target_modules=["q_proj", "v_proj"])))


def test_the_lists_of_keys_are_the_libraries() -> None:
    """keys/*.txt hold every field of the installed classes, so that none of them is called unknown."""
    peft: Any = pytest.importorskip("peft")
    trl_library: Any = pytest.importorskip("trl")
    for cls, known in (
        (peft.LoraConfig, known_keys("peft")),
        (trl_library.SFTConfig, READERS["trl"].known("sft")),
        (trl_library.GRPOConfig, READERS["trl"].known("rl")),
        (trl_library.ModelConfig, READERS["trl"].known("sft")),
        (trl_library.ScriptArguments, READERS["trl"].known("sft")),
    ):
        assert {f.name for f in fields(cls) if f.init} <= known, cls.__name__


# ---------------------------------------------------------------- relations


FIXED = [(row[0], code) for row in FILES for code in sorted(row[2]) if row[0] != "trl-sft.sh"]
#: what no value of a key answers
ADVICE_ONLY = {"E-KEY", "W-FEW-STEPS"}


@pytest.mark.parametrize(("name", "code"), FIXED, ids=[f"{name}-{code}" for name, code in FIXED])
def test_a_fix_fixes(name: str, code: str) -> None:
    """The smallest change, put into the file, makes its finding go away and the file loads still."""
    yaml: Any = pytest.importorskip("yaml")
    document = source.read(GOLDEN / name)
    before = report(document, card=H100)
    finding = next(f for f in before.findings if f.code == code)
    if not finding.change:
        assert code in ADVICE_ONLY or finding.fix.startswith(("no single change", "LLaMA-Factory", "count with"))
        return
    tool = read(document).tool
    values = dict(READERS[tool].flattened(document)) if tool == "unsloth" else dict(document.values)
    values |= {key: yaml.safe_load(value) for key, value in finding.change}
    after = report(Document(values, name, document.origin, document.objective), tool, card=H100)
    assert code not in codes(after)
    assert tool == after.recipe.tool


def test_the_gate_follows_its_threshold() -> None:
    """A length that fits by chance passes a threshold below its P(fit), and fails one above it with exit code 4."""
    file = GOLDEN / "axolotl-typo.yml"
    recipe, model = read(source.read(file)), load_model("llama-3.1-8b")
    for length in range(1024, 65536, 1024):
        p = review(replace(recipe, max_length=length), model, gpu(H100), PriceBook.load()).p_fit or 0.0
        if p < 0.9:
            break
    assert 0.02 < p < 0.9
    words = (str(file), "--gpu", H100, "--seq-len", str(length), "--min-pfit")
    assert run(*words, f"{p - 0.01:.4f}").exit_code == 7  # it has a typo, too
    assert run(*words, f"{p + 0.01:.4f}").exit_code == 4


@settings(deadline=None)
@given(st.floats(1e-7, 1.0), st.sampled_from([8, 16, 64]))
def test_one_verdict_on_a_rate(lr: float, rank: int) -> None:
    """At most one finding about a rate, none inside the advised band, an error only far from it."""
    found = report(trl(learning_rate=lr, lora_r=rank))
    about = [f for f in found.findings if "-LR-" in f.code]
    assert found.advice is not None
    band = found.advice.lr
    assert len(about) == (0 if band.low <= lr <= band.high else 1)
    if about and about[0].severity == "error":
        assert lr < band.value / 5 or lr > 5 * band.value


def test_whole_modules_cost_memory() -> None:
    """modules_to_save adds a copy, its gradient and two states: 4 widths of every parameter."""
    plain, more = report(trl(), card=H100), report(trl(lora_modules_to_save=["lm_head"]), card=H100)
    assert plain.peak is not None
    assert more.peak is not None
    head = 151_936 * 4096
    assert more.manifest.saved_params == head
    assert more.peak.value - plain.peak.value == pytest.approx(head * (2 + 2 + 4))


def test_quantised_experts_are_counted_so() -> None:
    """axolotl's quantize_moe_experts takes most of a 4-bit mixture's bytes away, and the warning with them."""
    words = {"base_model": "qwen3-30b-a3b", "adapter": "qlora", "lora_r": 8, "lora_alpha": 16, "learning_rate": 3e-4,
             "lora_target_parameters": ["mlp.experts.down_proj"], "lora_target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    left, done = (
        report(Document(words | {"quantize_moe_experts": on}, "a.yml", "yaml"), card=H100) for on in (False, True)
    )
    assert "W-EXPERTS-16-BIT" in codes(left)
    assert "W-EXPERTS-16-BIT" not in codes(done)
    assert left.peak is not None
    assert done.peak is not None
    assert done.peak.value < left.peak.value - 30 * 1024**3


def test_a_subset_of_layers_counts_its_own_states() -> None:
    """Adapters in two of 36 layers have two thirty-sixths of the parameters, and a smaller peak than all."""
    everything = report(trl(lora_target_modules=["q_proj", "v_proj"]), card=H100)
    some = report(trl(lora_target_modules=r"model\.layers\.[01]\.self_attn\.(q|v)_proj"), card=H100)
    assert some.manifest.adapter_params * 18 == everything.manifest.adapter_params
    assert not some.manifest.exact
    assert some.peak is not None
    assert everything.peak is not None
    assert some.peak.value < everything.peak.value


def test_all_checks_have_been_seen_to_speak() -> None:
    """Every check finds something in some config, so that none of them is dead."""
    llama = {"base_model_name_or_path": "meta-llama/Llama-3.1-8B", "peft_type": "LORA"}
    seen = [report(source.read(GOLDEN / row[0]), card=H100) for row in FILES]
    seen += [
        report(trl(lora_target_modules=["q_proj", "lm_head"], max_length=100_000, lora_target_parameters=[])),
        report(Document(llama | {"target_modules": ["q_proj"], "r": 5000}, "a.json", "json")),
        report(source.script(TRAINER, "train.py")),
        report(trl(fsdp="full_shard", load_in_4bit=True), card=H100, gpus=8),
    ]
    spoken = {finding.code for one in seen for finding in one.findings}
    for code in ("E-HEAD-ADAPTER", "E-LENGTH", "E-RANK-WIDE", "E-CHECKPOINT-GRAD"):
        assert code in spoken
    silent = [one.__name__ for one in CHECKS if not any(_speaks(one.__name__, code) for code in spoken)]
    assert not silent


def _speaks(check_name: str, code: str) -> bool:
    words = {
        "fit": ("NOFIT",), "rates": ("LR-",), "scale": ("ALPHA",), "targets": ("TARGET",), "mixture": ("EXPERT",),
        "whole_modules": ("EMBEDDINGS", "SAVED"), "head": ("HEAD",), "attention_only": ("ATTENTION-ONLY",), "rank": ("RANK",),
        "batch": ("BATCH-LARGE",), "group": ("GROUP",), "precision": ("BF16", "FP32"), "recomputing": ("CHECKPOINT",),
        "sharding": ("4BIT-WHOLE",), "packing": ("PACKING",), "length": ("LENGTH",), "keys": ("KEY",), "trust": ("REMOTE",),
    }  # fmt: skip
    return any(word in code for word in words[check_name])


# ---------------------------------------------------------------- scripts and commands


TRAINER = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
RATE = 2e-5
model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.05))
args = TrainingArguments("out", learning_rate=RATE, per_device_train_batch_size=batch_size(), gradient_checkpointing=True,
                         gradient_checkpointing_kwargs={"use_reentrant": True})
Trainer(model=model, args=args).train()
"""
UNSLOTH = """
from unsloth import FastLanguageModel
max_seq_length = 1024
model, tokenizer = FastLanguageModel.from_pretrained(model_name="meta-llama/Llama-3.1-8B", max_seq_length=max_seq_length)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, lora_dropout=0)
trainer = SFTTrainer(model=model, args=SFTConfig(max_steps=200, learning_rate=2e-4, per_device_train_batch_size=2))
"""


def test_a_script_is_read_and_never_run(tmp_path: Path) -> None:
    """Literals and constants of a Python script, without executing a line of it; what is no literal is said."""
    (tmp_path / "train.py").write_text(TRAINER + f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    recipe = read(source.read(tmp_path / "train.py"))
    assert not (tmp_path / "ran").exists()
    assert (recipe.learning_rate, recipe.weights, recipe.reentrant, recipe.wired) == (2e-5, "bfloat16", True, False)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (8, 16, ("q_proj", "v_proj"))
    assert any("per_device_train_batch_size" in note for note in recipe.notes)


def test_an_unsloth_script_is_recognised() -> None:
    recipe = read(source.script(UNSLOTH, "train.py"))
    assert (recipe.tool, recipe.weights, recipe.max_length, recipe.max_steps) == ("unsloth", "nf4", 1024, 200)
    assert recipe.lora is not None
    assert len(recipe.lora.targets) == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trl sft --model_name_or_path m --learning_rate=1e-4 --use_peft --packing", ("sft", 1e-4, True)),
        (
            "CUDA_VISIBLE_DEVICES=0 python grpo.py --model-name-or-path m \\\n  --learning-rate 2e-6",
            ("rl", 2e-6, False),
        ),
        ("--model_name_or_path m\n--use_peft true\n--learning_rate 3e-4\n", ("sft", 3e-4, True)),
        (
            "accelerate launch --num_processes 8 sft.py --model_name_or_path m --use_peft # --learning_rate 9",
            ("sft", 2e-5, True),
        ),
    ],
)
def test_a_command_line_is_read(text: str, expected: tuple[str, float, bool], tmp_path: Path) -> None:
    """Arguments of the program, not of its launcher; continued lines, comments, both spellings of a key."""
    (tmp_path / "run.sh").write_text(text)
    recipe = read(source.read(tmp_path / "run.sh"))
    assert (recipe.objective, recipe.learning_rate, recipe.lora is not None) == expected


def test_a_command_with_a_config_reads_both(tmp_path: Path) -> None:
    """The YAML file that the command names, and the command's own words over it."""
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text("model_name_or_path: m\nuse_peft: true\nlearning_rate: 1e-3\nlora_r: 4\n")
    (tmp_path / "run.sh").write_text("trl sft --config c.yaml --learning_rate 5e-4\n")
    recipe = read(source.read(tmp_path / "run.sh"))
    assert recipe.lora is not None
    assert (recipe.learning_rate, recipe.lora.rank) == (5e-4, 4)


@pytest.mark.parametrize(
    ("text", "reading"),
    [("learning_rate: 2e-4", 2e-4), ("learning_rate: '2.0e-4'", 2e-4), ("learning_rate: 0.0002", 2e-4)],
)
def test_a_rate_that_yaml_reads_as_text(text: str, reading: float) -> None:
    """`2e-4` is text for PyYAML and a number for TRL: it is judged as the number."""
    pytest.importorskip("yaml")
    values = source.load_yaml(f"model_name_or_path: m\n{text}\n", "x.yaml")
    assert read(Document(values, "x.yaml", "yaml"), "trl").learning_rate == reading


# ---------------------------------------------------------------- bad inputs


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
BASE = "base_model: qwen3-8b\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlearning_rate: 1e-4\n"
BAD = [
    ("a.yaml", "", 3, "no keys and values"),
    ("a.yaml", "- a\n- b\n", 3, "no keys and values"),
    ("a.yaml", "x: [1, 2\n", 3, "line"),
    ("a.yaml", "x: !!python/object/apply:os.system [echo]\n", 3, "constructor"),
    ("a.yaml", BOMB, 3, "aliases"),
    ("a.yaml", "x: " + "[" * 60 + "]" * 60 + "\n", 3, "levels"),
    ("a.yaml", BASE + "lora_r: 16\n", 3, "twice"),
    ("a.yaml", BASE.replace("lora_r: 8", "lora_r: eight"), 3, "lora_r"),
    ("a.yaml", BASE.replace("lora_r: 8", "lora_r: 0"), 3, "lora_r"),
    ("a.yaml", BASE.replace("lora_r: 8", "lora_r: 8.5"), 3, "whole number"),
    ("a.yaml", BASE.replace("lora_r: 8", "lora_r: true"), 3, "lora_r"),
    ("a.yaml", BASE.replace("lora_alpha: 16", "lora_alpha: 0"), 3, "lora_alpha"),
    ("a.yaml", BASE.replace("1e-4", ".nan"), 3, "learning_rate"),
    ("a.yaml", BASE.replace("1e-4", "2"), 7, "E-LR-RANGE"),
    ("a.yaml", BASE.replace("1e-4", "0"), 7, "E-LR-RANGE"),
    ("a.yaml", BASE + "micro_batch_size: -1\n", 3, "micro_batch_size"),
    ("a.yaml", BASE + "lora_target_modules: {a: 1}\n", 3, "lora_target_modules"),
    ("a.yaml", BASE + "lora_target_modules: '(a+)+b'\n", 3, "repetition"),
    ("a.yaml", BASE + "lora_target_modules: '[a'\n", 3, "regular expression"),
    ("a.yaml", BASE.replace("adapter: lora", "adapter: llama-adapter"), 3, "not planned"),
    ("a.yaml", BASE.replace("qwen3-8b", "../../etc/passwd"), 3, "base_model"),
    ("a.yaml", BASE.replace("base_model: qwen3-8b\n", "sequence_len: 5\n"), 2, "--model"),
    ("a.yaml", "foo: 1\n", 2, "--tool"),
    ("a.json", '{"peft_type": "LORA", "r": 8, "r": 9}', 3, "twice"),
    ("a.json", '{"peft_type": "VERA"}', 3, "not planned"),
    ("a.json", "[1]", 3, "a.json"),
    ("a.sh", "echo hello\n", 3, "no command"),
    ("a.sh", "trl sft --model 'x\n", 3, "quot"),
    ("a.py", "def (:\n", 3, "not Python"),
    ("a.py", "print(1)\n", 3, "SFTConfig"),
    ("a.bin", "\xff\xfe", 3, "a.bin"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "code", "says"), BAD, ids=[f"{i}-{row[3][:20]}" for i, row in enumerate(BAD)])
def test_bad_configs(name: str, text: str, code: int, says: str, tmp_path: Path) -> None:
    """One line with the cause and the place; the documented exit code; never a traceback."""
    pytest.importorskip("yaml")
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    done = run(str(tmp_path / name))
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    assert says in " ".join((done.stdout + done.stderr).split())
    if code in (2, 3):
        assert done.stderr.startswith("lora-plan: ")
        assert done.stderr.count("\n") == 1


def test_an_adapters_directory(tmp_path: Path) -> None:
    """The directory that peft saves is taken for the config in it."""
    (tmp_path / "adapter_config.json").write_text((GOLDEN / "adapter_config.json").read_text())
    assert run(str(tmp_path)).exit_code == 7


def test_no_such_file_and_no_such_gpu(tmp_path: Path) -> None:
    assert run(str(tmp_path / "none.yaml")).exit_code == 3
    assert run(str(tmp_path)).exit_code == 3
    assert run(str(GOLDEN / "trl-sft.yaml"), "--gpu", "h100").exit_code == 3


def test_what_a_file_says_is_inert(tmp_path: Path) -> None:
    """Control characters of a config never reach the terminal."""
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(BASE + '"\\e[31mred": 1\nlora_target_modules: ["\\e]0;x\\a", q_proj, v_proj]\n')
    done = run(str(tmp_path / "a.yaml"))
    assert "W-TARGET-MISSED" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "lora", "true", "1e400", "all-linear", "{", "-"])
    | st.lists(st.sampled_from(["q_proj", "", "*"]), max_size=2)
    | st.just({"a": 1})
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(sorted(READERS)))
def test_any_document_is_read_or_refused(data: st.DataObject, tool: str) -> None:
    """Whatever the values, a recipe or an error of ours: nothing else is ever raised."""
    keys = sorted(
        {*READERS[tool].FIELDS.values(), "peft_type", "adapter", "rl", "stage", "finetuning_type", "exclude_modules"}
    )
    values = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=8))
    with suppress(LoraPlanError):
        assert isinstance(read(Document(values, "x", "yaml"), tool), Recipe)


def test_scale_of_the_two_conventions() -> None:
    """Alpha 16 at rank 64 is a quarter; rsLoRA divides by the root."""
    assert Lora(64, 16).scale == 0.25
    assert Lora(64, 16, rslora=True).scale == 2.0
