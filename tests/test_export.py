"""`lora-plan export`: files that training tools load, and that `check` reads back as the plan they came from."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_planner import render
from lora_planner.batch import recommend_batch
from lora_planner.checked import plan_hash
from lora_planner.cli import Commands, main
from lora_planner.data_file import DataFacts, read_data
from lora_planner.facts import gpu
from lora_planner.handoff import READERS, WRITERS, read, source
from lora_planner.handoff.manifest import resolve
from lora_planner.handoff.plan_file import planned
from lora_planner.handoff.recipe import Recipe
from lora_planner.handoff.vllm import served_rank
from lora_planner.handoff.words import decimal, known_keys, yaml
from lora_planner.method import Method, method
from lora_planner.model_source import load_model
from lora_planner.pages.plan_file import sheet
from lora_planner.plan import Configuration, Job, PriceBook, make_plan
from lora_planner.recommend import recommend

DATA = Path(__file__).parents[1] / "examples/stdlib-docs.jsonl"
#: what the file of each tool is called
NAMES = {"trl": "sft.yaml", "axolotl": "axolotl.yaml", "llamafactory": "llamafactory.yaml", "unsloth": "unsloth.json",
         "peft": "adapter_config.json"}  # fmt: skip
#: a plan of each kind: LoRA; 4 bit; a vision tower on a GPU without bf16; a mixture of experts; full fine-tuning
JOBS = {
    "lora": ("qwen3-8b", "h100-sxm-80gb"),
    "qlora": ("llama-3.1-8b", "rtx4090-24gb"),
    "tower": ("gemma-3-4b", "t4-16gb"),
    "experts": ("qwen3-30b-a3b", "h200-sxm-141gb"),
    "full": ("qwen3-0.6b", "h100-sxm-80gb"),
}
#: which tool can be told the plan; the others refuse it with the next step
WRITTEN = {
    "lora": ("trl", "axolotl", "llamafactory", "unsloth", "peft"),
    "qlora": ("trl", "axolotl", "llamafactory", "unsloth", "peft"),
    "tower": ("trl", "axolotl", "llamafactory", "unsloth", "peft"),
    "experts": ("trl", "axolotl", "llamafactory", "unsloth", "peft"),
    "full": ("trl", "llamafactory", "unsloth"),
}
#: the form of experts' adapters that each tool is asked for: the planned one is none that peft has
EXPERTS = {
    "trl": "fused",
    "axolotl": "fused-over-active",
    "peft": "fused-over-active",
    "llamafactory": "none",
    "unsloth": "none",
}
PAIRS = [(kind, tool) for kind, tools in WRITTEN.items() for tool in tools]
REFUSED = [(kind, tool) for kind, tools in WRITTEN.items() for tool in NAMES if tool not in tools]


@cache
def document(kind: str) -> dict[str, Any]:
    """What `lora-plan recommend --json` prints."""
    name, card = JOBS[kind]
    data = read_data(str(DATA)) if kind == "lora" else DataFacts.from_tokens(20_000_000, 1024)
    job = Job(
        load_model(name),
        data,
        (gpu(card),),
        PriceBook.load(today=date(2026, 11, 27)),
        max_length=None if kind == "lora" else 1024,
    )
    found: dict[str, Any] = json.loads(render.to_json(render.advice_object(recommend(job))))
    assert found["result"]["recommended"], kind
    return found


def run(*words: str) -> Result:
    group = Commands(commands=main.commands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora-plan", *words])
        return CliRunner().invoke(group, list(words))


def written(kind: str, tool: str, folder: Path) -> Path:
    """The tool's main file of an exported plan."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps(document(kind)))
    more = ("--experts", EXPERTS[tool]) if kind == "experts" else ()
    done = run("export", str(plan), "--to", tool, "--out", str(folder / tool), *more)
    assert done.exit_code == 0, done.stderr
    return folder / tool / NAMES[tool]


def back(kind: str, tool: str, folder: Path) -> Recipe:
    return read(source.read(written(kind, tool, folder)))


def keys_of(path: Path) -> dict[str, Any]:
    """A file as the YAML or JSON library of its tool reads it."""
    if path.suffix == ".json":
        return dict(json.loads(path.read_text()))
    library: Any = pytest.importorskip("yaml")
    return dict(library.safe_load(path.read_text()))


# ---------------------------------------------------------------- the round trip


@pytest.mark.parametrize(("kind", "tool"), PAIRS)
def test_export_then_check_is_the_plan(kind: str, tool: str, tmp_path: Path) -> None:
    """What is read back has the plan's model, matrices, rank, scale, rate, batch, length and precision."""
    plan, model = document(kind)["result"]["recommended"], load_model(JOBS[kind][0])
    recipe = back(kind, tool, tmp_path)
    made = planned(document(kind), experts=EXPERTS[tool] if kind == "experts" else "")
    ours = made.recipe
    assert recipe.tool == tool
    assert load_model(recipe.model).name == plan["model"]["name"]
    assert not recipe.unknown
    assert recipe.notes == () or tool in ("unsloth", "peft")
    found = resolve(model, recipe)
    assert found.missed == ()
    assert found.saved == ()
    if kind == "full":
        assert recipe.lora is None
    else:
        assert recipe.lora is not None
        assert ours.lora is not None
        assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.scale) == (
            plan["method"]["rank"],
            plan["method"]["alpha"],
            plan["method"]["scaling"],
        )
        assert {(row.name, row.copies, row.rank) for row in found.rows} == {
            (row.name, row.copies, row.rank) for row in resolve(model, ours).rows
        }
    if kind != "full":
        assert found.adapter_params == made.trainable
    if kind in ("lora", "qlora", "tower"):
        assert found.adapter_params == plan["params"]["trainable"]
        assert found.exact
        base = "nf4" if plan["method"]["base_dtype"] == "nf4" else "bfloat16"
        if tool != "peft":  # adapter_config.json says nothing of the base
            assert (found.method.targets, found.method.base_dtype) == (tuple(plan["method"]["targets"]), base)
    if tool == "peft":
        return
    assert recipe.learning_rate == pytest.approx(plan["learning_rate"]["lr"]["value"], rel=0.01)
    assert recipe.batch == plan["batch"]["batch"]
    assert (recipe.micro_batch, recipe.accumulation) == (plan["step"]["micro_batch"], plan["step"]["accumulation"])
    assert recipe.max_length == plan["step"]["longest"]
    assert recipe.checkpointing == (plan["step"]["checkpointing"] == "full")
    assert recipe.epochs == pytest.approx(1.0, rel=0.05)
    assert recipe.optimizer == plan["step"]["optimizer"]
    assert not recipe.packing
    if tool == "trl" or kind != "full":
        assert (recipe.weights, recipe.pure) == (
            ours.weights if ours.half == "bf16" or ours.weights == "nf4" else "float16",
            False,
        )


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_the_same_plan_has_the_same_price(tool: str, tmp_path: Path) -> None:
    """Where the tool's loss is the plan's, memory, time and cost come out equal to the last byte and cent."""
    file = written("lora", tool, tmp_path)
    done = run("check", str(file), "--gpu", "h100-sxm-80gb", "--data", str(DATA), "--offline", "--json")
    assert json.loads(done.stdout)["result"]["plan"] == plan_hash(document("lora")["result"])[:12]
    found, plan = json.loads(done.stdout)["result"], document("lora")["result"]["recommended"]
    assert done.exit_code == 0
    assert found["peak_bytes"] == plan["memory"]["peak_bytes"]
    assert found["p_fit"] == plan["memory"]["p_fit"]
    assert found["priced"]["time"]["run_s"] == plan["time"]["run_s"]
    assert found["priced"]["cost"]["usd"] == plan["cost"]["usd"]
    assert found["learning_rate"]["lr"] == plan["learning_rate"]["lr"]
    assert [f for f in found["findings"] if f["severity"] != "note"] == []


def test_trls_loss_in_pieces_needs_less(tmp_path: Path) -> None:
    """TRL holds no more than the plan; the note names the plan's peak for older versions."""
    file = written("lora", "trl", tmp_path)
    found = json.loads(
        run("check", str(file), "--gpu", "h100-sxm-80gb", "--data", str(DATA), "--offline", "--json").stdout
    )["result"]
    plan = document("lora")["result"]["recommended"]
    assert found["peak_bytes"]["value"] < plan["memory"]["peak_bytes"]["value"]
    assert any(f["code"] == "N-LOSS" for f in found["findings"])


@pytest.mark.parametrize(("kind", "tool"), REFUSED)
def test_what_a_tool_cannot_be_told_is_refused(kind: str, tool: str, tmp_path: Path) -> None:
    """Nothing is written, and the error names a tool that can."""
    (tmp_path / "plan.json").write_text(json.dumps(document(kind)))
    done = run("export", str(tmp_path / "plan.json"), "--to", tool, "--out", str(tmp_path / "x"))
    assert done.exit_code == 3
    assert re.search(r"Use --to (trl|axolotl|peft|llamafactory)", done.stderr)
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- the real libraries


@pytest.mark.parametrize("kind", ["lora", "qlora", "tower", "experts"])
def test_peft_loads_its_file(kind: str, tmp_path: Path) -> None:
    """LoraConfig.from_pretrained reads every key, and the model it wraps has the planned parameters."""
    peft: Any = pytest.importorskip("peft")
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    file = written(kind, "peft", tmp_path)
    config = peft.LoraConfig.from_pretrained(str(file.parent))
    asked = keys_of(file)
    for key in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "modules_to_save",
        "target_parameters",
    ):
        assert getattr(config, key) == asked[key]
    from lora_planner.model_source import catalogue

    said = next(entry.config for entry in catalogue() if entry.name == JOBS[kind][0])
    auto = transformers.AutoModelForImageTextToText if "vision_config" in said else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        real = auto.from_config(transformers.AutoConfig.for_model(**json.loads(json.dumps(said))))
    wrapped = peft.get_peft_model(real, config, autocast_adapter_dtype=False)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == resolve(load_model(JOBS[kind][0]), back(kind, "peft", tmp_path)).adapter_params
    if kind != "experts":
        assert trained == document(kind)["result"]["recommended"]["params"]["trainable"]
    if kind == "tower":
        assert not any("vision" in name for name, p in wrapped.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "qlora", "tower", "full"])
def test_trl_loads_its_file(kind: str, tmp_path: Path) -> None:
    """TRL's own parser takes the YAML: no key is unknown, every value has its type."""
    library: Any = pytest.importorskip("trl")
    mixture: Any = pytest.importorskip("trl.scripts.utils").DatasetMixtureConfig
    file = written(kind, "trl", tmp_path)
    parser = library.TrlParser((library.ScriptArguments, library.SFTConfig, library.ModelConfig, mixture))
    on_cpu = ["--use_cpu", "True", "--bf16", "False", "--fp16", "False"]  # this machine has no GPU
    _, training, model, data = parser.parse_args_and_config(args=["--config", str(file), *on_cpu])
    plan = document(kind)["result"]["recommended"]
    assert training.learning_rate == pytest.approx(plan["learning_rate"]["lr"]["value"], rel=0.01)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == plan["batch"]["batch"]
    assert training.max_length == plan["step"]["longest"]
    if kind == "lora":
        assert training.assistant_only_loss
        assert data.datasets[0].data_files == DATA.name
    config = library.get_peft_config(model)
    if kind == "full":
        assert config is None
        assert model.dtype == "float32"
        return
    assert (config.r, config.lora_alpha, config.lora_dropout, config.modules_to_save) == (
        plan["method"]["rank"],
        plan["method"]["alpha"],
        0.0,
        None,
    )
    assert model.load_in_4bit == (plan["method"]["base_dtype"] == "nf4")


@pytest.mark.parametrize(("kind", "tool"), PAIRS)
def test_every_key_is_documented(kind: str, tool: str, tmp_path: Path) -> None:
    """Each key that we write is in the tool's list of keys."""
    known = {
        "trl": READERS["trl"].known("sft"), "axolotl": known_keys("axolotl"), "peft": known_keys("peft"),
        "llamafactory": known_keys("llamafactory", "hf"), "unsloth": known_keys("unsloth", "hf", "trl-sft"),
    }[tool]  # fmt: skip
    asked = keys_of(written(kind, tool, tmp_path))
    if tool == "unsloth":
        asked = {
            key: value
            for part in ("from_pretrained", "get_peft_model", "sft_config")
            for key, value in (asked[part] or {}).items()
        }
    assert set(asked) <= known


# ---------------------------------------------------------------- mixtures of experts


TINY = {
    "qwen3_moe": {"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4,
                  "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False},
    "mixtral": {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2,
                "tie_word_embeddings": False},
}  # fmt: skip


def plan_of(folder: Path, config: dict[str, Any], chosen: Method, card: str = "h100-sxm-80gb") -> Path:
    """A plan file for a model directory and any method, in the form of `recommend --json`."""
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(str(folder))
    job = Job(
        model,
        DataFacts.from_tokens(1_000_000, 256),
        (gpu(card),),
        PriceBook.load(today=date(2026, 11, 27)),
        max_length=256,
    )
    c = Configuration(model, chosen, gpu(card), 4, 256, 8, longest=256)
    found = json.loads(json.dumps(document("experts")))
    plan = make_plan(job, c, recommend_batch(job.data.examples))
    found["result"]["recommended"] = json.loads(render.to_json(render.plan_object(plan)))
    found["result"]["recommended"]["model"]["name"] = str(folder)
    (folder / "plan.json").write_text(json.dumps(found))
    return folder / "plan.json"


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("form", ["fused-over-active", "fused", "none"])
@pytest.mark.parametrize("targets", ["all-linear", "mlp"])
def test_peft_trains_the_exported_experts(family: str, form: str, targets: str, tmp_path: Path) -> None:
    """The real model wrapped with the real file has the parameters that export and check both print, at these ranks."""
    torch: Any = pytest.importorskip("torch")
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    if targets == "mlp" and form == "none":
        return  # nothing is left of it
    plan = plan_of(tmp_path, TINY[family], method("lora", 8, targets=(targets,)))
    done = run("export", str(plan), "--to", "peft", "--out", str(tmp_path / "x"), "--experts", form, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)["result"]["trainable"]
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY[family]))
    wrapped = peft.get_peft_model(
        real, peft.LoraConfig.from_pretrained(str(tmp_path / "x")), autocast_adapter_dtype=False
    )
    assert trained(wrapped) == said
    ranks = {p.shape[0] // 4 for name, p in wrapped.named_parameters() if "experts" in name and "lora_A" in name}
    assert ranks == {"fused-over-active": {4}, "fused": {8}, "none": set()}[form]
    back = json.loads(run("check", str(tmp_path / "x"), "--offline", "--json").stdout)["result"]
    assert back["params"]["adapter"] == said


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize(
    ("form", "planned_as"), [("fused", "per-expert-over-active"), ("none", "per-expert"), ("", "fused"), ("", "none")]
)
def test_trl_trains_the_exported_experts(family: str, form: str, planned_as: str, tmp_path: Path) -> None:
    """TRL's own parser and get_peft_config, on the real model; a plan of `fused` or `none` needs no --experts."""
    torch: Any = pytest.importorskip("torch")
    peft: Any = pytest.importorskip("peft")
    transformers: Any = pytest.importorskip("transformers")
    library: Any = pytest.importorskip("trl")
    plan = plan_of(tmp_path, TINY[family], method("lora", 8, experts=planned_as))
    more = ("--experts", form) if form else ()
    done = run("export", str(plan), "--to", "trl", "--out", str(tmp_path / "x"), "--json", *more)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)["result"]["trainable"]
    if not form:
        assert said == json.loads(plan.read_text())["result"]["recommended"]["params"]["trainable"]
    parser = library.TrlParser((library.ScriptArguments, library.SFTConfig, library.ModelConfig, _mixture()))
    on_cpu = ["--use_cpu", "True", "--bf16", "False"]
    _, _, model, _ = parser.parse_args_and_config(args=["--config", str(tmp_path / "x/sft.yaml"), *on_cpu])
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY[family]))
    assert trained(peft.get_peft_model(real, library.get_peft_config(model), autocast_adapter_dtype=False)) == said


@pytest.mark.parametrize("tool", sorted(NAMES))
def test_a_form_that_a_tool_has_not_is_refused_with_those_it_has(tool: str, tmp_path: Path) -> None:
    """One line: the tool, the form, what it can train with how many parameters, and the command, which works."""
    (tmp_path / "plan.json").write_text(json.dumps(document("experts")))
    words = ["export", str(tmp_path / "plan.json"), "--to", tool, "--out", str(tmp_path / "x")]
    done = run(*words)
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert "--experts per-expert-over-active" in done.stderr
    assert WRITERS[tool].LABEL in done.stderr
    advised = shlex.split(done.stderr[done.stderr.index("lora-plan export") :])
    assert advised[1:5] == words[:4]
    again = run(*words, *advised[5:], "--json")
    assert again.exit_code == 0, again.stderr
    assert f"{json.loads(again.stdout)['result']['trainable']:,} parameters" in done.stderr
    for form in {"fused-over-active", "fused", "none"} - set(WRITERS[tool].EXPERTS):
        assert run(*words, "--experts", form).exit_code == 3


def test_experts_without_a_gate_have_the_planned_form(tmp_path: Path) -> None:
    """Nemotron's experts are one matrix up and one down: the paper's rule is peft's pair at the lower rank, exactly."""
    model = load_model("nemotron-3-nano-30b-a3b")
    for planned_as, ranks in (("per-expert-over-active", {2}), ("per-expert", set())):
        chosen = method("lora", 16, experts=planned_as)
        c = Configuration(model, chosen, gpu("h200-sxm-141gb"), 1, 256, 1, longest=256)
        job = Job(
            model, DataFacts.from_tokens(1_000_000, 256), (gpu("h200-sxm-141gb"),), PriceBook.load(), max_length=256
        )
        found = json.loads(json.dumps(document("experts")))
        plan = make_plan(job, c, recommend_batch(job.data.examples))
        found["result"]["recommended"] = json.loads(render.to_json(render.plan_object(plan)))
        made = planned(found, tool="peft")
        assert made.trainable == plan.priced.trainable
        assert made.recipe.lora is not None
        assert {rank for _, rank in made.recipe.lora.ranks} == ranks


@pytest.mark.parametrize("tool", ["axolotl", "peft"])
def test_other_adapters_on_the_experts_have_checks_peak(tool: str, tmp_path: Path) -> None:
    """What export says of memory with another form is what check says of the file."""
    words = ("--experts", "fused-over-active", "--json")
    (tmp_path / "plan.json").write_text(json.dumps(document("experts")))
    said = json.loads(run("export", str(tmp_path / "plan.json"), "--to", tool, "--out", str(tmp_path), *words).stdout)[
        "result"
    ]
    more = ("--micro-batch", str(step_of("experts")["micro_batch"]), "--seq-len", "1024") if tool == "peft" else ()
    found = json.loads(
        run("check", str(tmp_path / NAMES[tool]), "--gpu", JOBS["experts"][1], "--offline", "--json", *more).stdout
    )["result"]
    assert found["params"]["trainable"] == said["trainable"]
    if tool == "axolotl":  # adapter_config.json says nothing of recomputing
        assert found["peak_bytes"] == said["peak_bytes"]


def step_of(kind: str) -> dict[str, Any]:
    return dict(document(kind)["result"]["recommended"]["step"])


def test_experts_on_what_has_none(tmp_path: Path) -> None:
    """--experts for a plan without experts, a DoRA plan, and a form that no longer fits: refused, nothing written."""
    (tmp_path / "dense.json").write_text(json.dumps(document("lora")))
    dora = tmp_path / "dora"
    dora.mkdir()
    for text, says, code in (
        (tmp_path / "dense.json", "no experts", 3),
        (plan_of(dora, TINY["mixtral"], method("dora", 8)), "DoRA", 3),
        (plan_of(tmp_path, mixtral(), method("lora", 512), "h200-sxm-141gb"), "does not fit", 4),
    ):
        done = run("export", str(text), "--to", "peft", "--out", str(tmp_path / "x"), "--experts", "fused")
        assert (done.exit_code, says in done.stderr) == (code, True), done.stderr
        assert not (tmp_path / "x").exists()


def mixtral() -> dict[str, Any]:
    from lora_planner.model_source import catalogue

    return dict(next(entry.config for entry in catalogue() if entry.name == "mixtral-8x7b"))


def test_vllm_serves_experts_merged_or_not_at_all(tmp_path: Path) -> None:
    """Adapters of fused experts are refused with the way round; without experts the adapter is served."""
    (tmp_path / "plan.json").write_text(json.dumps(document("experts")))
    words = ["export", str(tmp_path / "plan.json"), "--to", "vllm", "--out", str(tmp_path / "x")]
    for more in ((), ("--experts", "fused-over-active")):
        done = run(*words, *more)
        assert done.exit_code == 3
        assert "Merge" in done.stderr and "--experts none" in done.stderr
    assert run(*words, "--experts", "none").exit_code == 0
    assert keys_of(tmp_path / "x/vllm.yaml")["enable-lora"] is True


# ---------------------------------------------------------------- what is seen to go wrong in hand-on files


@pytest.mark.parametrize(("kind", "tool"), PAIRS)
def test_the_rate_is_there_and_a_number(kind: str, tool: str, tmp_path: Path) -> None:
    """An explicit rate that YAML 1.1 does not read as text; nobody falls back to full fine-tuning's default."""
    asked = keys_of(written(kind, tool, tmp_path))
    if tool == "peft":
        assert "learning_rate" not in asked
        return
    rate = asked["sft_config"]["learning_rate"] if tool == "unsloth" else asked["learning_rate"]
    assert isinstance(rate, float)
    assert 1e-6 < rate < 1e-2


@pytest.mark.parametrize(("kind", "tool"), PAIRS)
def test_no_module_is_trained_in_full_unasked(kind: str, tool: str, tmp_path: Path) -> None:
    """No modules_to_save under any of its names, no dropout that peft refuses on experts, no code of a stranger."""
    text = written(kind, tool, tmp_path).read_text()
    assert not re.search(r"(lora_modules_to_save|additional_target)", text)
    assert '"modules_to_save": null' in text or "modules_to_save" not in text
    assert not re.search(r"dropout\W+0\.0*[1-9]", text)
    assert not re.search(r"trust_remote_code\W+true", text)
    assert tool == "peft" or re.search(r"trust_remote_code\W+false", text)


def test_trl_says_what_it_would_otherwise_assume(tmp_path: Path) -> None:
    """dtype (TRL's is float32), loss_type, checkpointing, length and packing are explicit; lm_head has no adapter."""
    asked = keys_of(written("lora", "trl", tmp_path))
    assert asked["dtype"] == "bfloat16"
    assert asked["loss_type"] == "nll"
    assert (asked["gradient_checkpointing"], asked["packing"], asked["max_length"]) == (True, False, 922)
    assert asked["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert "lm_head" not in asked["lora_target_modules"]
    assert len(asked["lora_target_modules"]) > 1  # a single name would be taken as a pattern


def test_axolotl_counts_its_batch_and_names_its_experts(tmp_path: Path) -> None:
    """micro x accumulation is the plan's batch; experts go by parameter with their own rank, not through target_linear."""
    asked = keys_of(written("experts", "axolotl", tmp_path))
    plan = document("experts")["result"]["recommended"]
    assert asked["micro_batch_size"] * asked["gradient_accumulation_steps"] == plan["batch"]["batch"]
    assert asked["lora_target_linear"] is False
    assert asked["lora_target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert set(asked["lora_rank_pattern"].values()) == {plan["method"]["rank"] // 8}
    assert asked["quantize_moe_experts"] is False
    assert asked["lora_dropout"] == 0.0


def test_a_tower_keeps_out_of_the_targets(tmp_path: Path) -> None:
    """Names alone would reach the vision tower: peft gets an anchored pattern, LLaMA-Factory its own switch."""
    pattern = keys_of(written("tower", "peft", tmp_path))["target_modules"]
    assert isinstance(pattern, str)
    assert re.fullmatch(pattern, "model.language_model.layers.3.self_attn.q_proj")
    assert not re.fullmatch(pattern, "model.vision_tower.encoder.layers.3.self_attn.q_proj")
    assert keys_of(written("tower", "llamafactory", tmp_path))["freeze_vision_tower"] is True


def test_fp16_where_there_is_no_bf16(tmp_path: Path) -> None:
    asked = keys_of(written("tower", "trl", tmp_path))
    assert asked["fp16"] is True
    assert "bf16" not in asked


def test_unsloth_has_a_script_that_loads_the_file(tmp_path: Path) -> None:
    """The script is Python, reads the JSON beside it, and imports Unsloth first."""
    folder = written("lora", "unsloth", tmp_path).parent
    text = (folder / "train_unsloth.py").read_text()
    compile(text, "train_unsloth.py", "exec")
    assert text.index("from unsloth") < text.index("from trl")
    asked = keys_of(folder / "unsloth.json")
    assert asked["get_peft_model"]["use_gradient_checkpointing"] == "unsloth"
    assert asked["dataset"] == DATA.name


def test_llamafactory_finds_its_data(tmp_path: Path) -> None:
    """dataset is a name in the dataset_info.json beside it, with the columns of the file's schema."""
    folder = written("lora", "llamafactory", tmp_path).parent
    info = keys_of(folder / "dataset_info.json")
    entry = info[keys_of(folder / "llamafactory.yaml")["dataset"]]
    assert entry["file_name"] == DATA.name
    assert entry["formatting"] == "sharegpt"


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 1), (2, 8), (16, 16), (17, 32), (48, 64), (256, 256), (300, 320), (512, 512)]
)
def test_the_server_takes_the_rank(rank: int, served: int) -> None:
    """max_lora_rank is in vLLM's set, holds the adapter, and is no larger than it must be (vllm-project/vllm#22782)."""
    assert served_rank(rank) == served


def test_vllm_is_told_the_rank(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document("qlora")))
    assert run("export", str(tmp_path / "plan.json"), "--to", "vllm", "--out", str(tmp_path)).exit_code == 0
    asked = keys_of(tmp_path / "vllm.yaml")
    assert asked["enable-lora"] is True
    assert asked["max-lora-rank"] == document("qlora")["result"]["recommended"]["method"]["rank"]
    assert asked["max-loras"] == 1


# ---------------------------------------------------------------- plans for RL


def with_job(length: int = 2048, group: int = 16, batch: int = 32) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(document("lora")))
    found["result"]["job"] = {"objective": "rl", "epochs": 1.0, "max_length": length, "problems": 100, "group": group}
    step = found["result"]["recommended"]["step"]
    step["longest"], step["accumulation"] = length, batch // step["micro_batch"]
    return found


def test_an_rl_plan_becomes_grpo(tmp_path: Path) -> None:
    """Groups, lengths and the rate go to GRPOConfig, and its own parser takes them."""
    (tmp_path / "plan.json").write_text(json.dumps(with_job()))
    assert run("export", str(tmp_path / "plan.json"), "--to", "trl", "--out", str(tmp_path)).exit_code == 0
    recipe = read(source.read(tmp_path / "grpo.yaml"))
    assert (recipe.objective, recipe.group, recipe.max_length, recipe.batch) == ("rl", 16, 2048, 32)
    library: Any = pytest.importorskip("trl")
    scripts: Any = pytest.importorskip("trl.scripts.grpo")
    parser = library.TrlParser((scripts.GRPOScriptArguments, library.GRPOConfig, library.ModelConfig, _mixture()))
    args = ["--config", str(tmp_path / "grpo.yaml"), "--use_cpu", "True", "--bf16", "False"]
    _, training, _, _ = parser.parse_args_and_config(args=args)
    assert training.num_generations == 16


@pytest.mark.parametrize(("experts", "tool"), [("fused", "trl"), ("none", "llamafactory")])
def test_a_plan_with_what_the_tool_can_be_told_needs_no_choice(experts: str, tool: str, tmp_path: Path) -> None:
    """`recommend --experts` plans a mixture in a form of the trainer, which export then writes as it is."""
    plan = run(
        "recommend",
        "--model",
        "qwen3-30b-a3b",
        "--tokens",
        "1M",
        "--gpu",
        "h200-sxm-141gb",
        "--experts",
        experts,
        "--json",
    ).stdout
    assert json.loads(plan)["result"]["recommended"]["method"]["experts"] == experts
    (tmp_path / "plan.json").write_text(plan)
    assert run("export", str(tmp_path / "plan.json"), "--to", tool, "--out", str(tmp_path)).exit_code == 0


def test_a_plan_whose_engine_samples_says_so_to_grpo(tmp_path: Path) -> None:
    """TRL's default lets the trainer generate; the plan's time is that of vLLM beside it, asleep while it trains."""
    words = [
        "recommend",
        "--model",
        "qwen3-0.6b",
        "--rl",
        "--problems",
        "100",
        "--sample-tokens",
        "500",
        "--gpu",
        "h100-sxm-80gb",
    ]
    library: Any = pytest.importorskip("yaml")
    plan = json.loads(run(*words, "--json").stdout)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert run("export", str(tmp_path / "plan.json"), "--to", "trl", "--out", str(tmp_path)).exit_code == 0
    rows = library.safe_load((tmp_path / "grpo.yaml").read_text())
    sampled, step = plan["result"]["recommended"]["rollout"], plan["result"]["recommended"]["step"]
    assert (rows["use_vllm"], rows["vllm_mode"], rows["vllm_enable_sleep_mode"]) == (True, "colocate", True)
    assert rows["vllm_gpu_memory_utilization"] == pytest.approx(sampled["engine_share"], abs=0.005)
    assert rows["max_completion_length"] == sampled["longest_answer"] == 2000
    assert read(source.read(tmp_path / "grpo.yaml")).max_length == step["longest"]
    hf = json.loads(run(*words, "--engine", "hf", "--json").stdout)
    (tmp_path / "plan.json").write_text(json.dumps(hf))
    assert run("export", str(tmp_path / "plan.json"), "--to", "trl", "--out", str(tmp_path), "--force").exit_code == 0
    assert library.safe_load((tmp_path / "grpo.yaml").read_text())["use_vllm"] is False


def _mixture() -> Any:
    return pytest.importorskip("trl.scripts.utils").DatasetMixtureConfig


@pytest.mark.parametrize("bad", [{"group": 3}, {"length": 600}])
def test_an_rl_plan_that_grpo_would_refuse(bad: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(with_job(**bad)))
    assert run("export", str(tmp_path / "plan.json"), "--to", "trl", "--out", str(tmp_path)).exit_code == 3


# ---------------------------------------------------------------- bad plans, and files that are there


def broken(*path: str, value: Any) -> str:
    found = json.loads(json.dumps(document("lora")))
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(found)


BAD: list[tuple[Any, str]] = [
    (lambda: "", "plan.json"),
    (lambda: "{}", "not a plan"),
    (lambda: "[]", "plan.json"),
    (lambda: json.dumps({"schema_version": 99, "result": {}}), "not a plan"),
    (lambda: json.dumps({"schema_version": 1, "result": {"model": "x"}}), "without a recommended"),
    (lambda: broken("result", "recommended", value=None), "nothing fits"),
    (lambda: broken("result", "recommended", "method", value="lora"), "method"),
    (lambda: broken("result", "recommended", "method", "rank", value=-1), "rank"),
    (lambda: broken("result", "recommended", "method", "targets", value=["no_such"]), "no matrix"),
    (lambda: broken("result", "recommended", "model", "name", value="no/such-model-here"), "--model"),
    (lambda: broken("result", "recommended", "params", "total", value=7), "the plan's model 7"),
    (lambda: broken("result", "recommended", "params", "trainable", value=7), "targets"),
    (lambda: broken("result", "recommended", "learning_rate", "lr", "value", value=1e9), "lr/value"),
    (lambda: broken("result", "recommended", "gpu", "name", value="h100"), "h100"),
    (lambda: broken("result", "recommended", "step", value={}), "step"),
]


@pytest.mark.parametrize(("text", "says"), BAD, ids=[f"{i}-{says}" for i, (_, says) in enumerate(BAD)])
def test_bad_plans(text: Any, says: str, tmp_path: Path) -> None:
    """One line that says what is wrong; nothing is written."""
    (tmp_path / "plan.json").write_text(text())
    done = run("export", str(tmp_path / "plan.json"), "--to", "trl", "--out", str(tmp_path / "x"), "--offline")
    assert done.exit_code == 3, (done.stdout, done.stderr, done.exception)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_file_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    """A file that differs stays, and no other file is written beside it; --force replaces it; the same one is no error."""
    (tmp_path / "plan.json").write_text(json.dumps(document("lora")))
    words = ["export", str(tmp_path / "plan.json"), "--to", "llamafactory", "--out", str(tmp_path / "x")]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "dataset_info.json").write_text("mine")
    assert run(*words).exit_code == 3
    assert (tmp_path / "x" / "dataset_info.json").read_text() == "mine"
    assert not (tmp_path / "x" / "llamafactory.yaml").exists()
    assert run(*words, "--force").exit_code == 0
    assert run(*words).exit_code == 0
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["dataset_info.json", "llamafactory.yaml"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document("lora")))
    (tmp_path / "file").write_text("")
    done = run("export", str(tmp_path / "plan.json"), "--to", "trl", "--out", str(tmp_path / "file" / "x"))
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1


def test_json_lists_the_files(tmp_path: Path) -> None:
    """Programs get the files, the command and the warnings in the envelope of all commands."""
    (tmp_path / "plan.json").write_text(json.dumps(document("experts")))
    done = run(
        "export",
        str(tmp_path / "plan.json"),
        "--to",
        "peft",
        "--out",
        str(tmp_path / "x"),
        "--json",
        "--experts",
        "fused-over-active",
    )
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    assert [Path(name).name for name in found["result"]["files"]] == ["adapter_config.json"]
    assert found["warnings"] == []
    assert found["result"]["plan"] == plan_hash(document("experts")["result"])
    assert (found["result"]["experts"], found["result"]["trainable"]) == ("fused-over-active", 92_012_544)
    assert found["result"]["peak_bytes"]["value"] > 0


def test_one_hash_names_a_plan(tmp_path: Path) -> None:
    """Export, its files and the budget's sheet say the digits that the documented one-liner makes of the file."""
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(document("lora"), indent=3))
    line = re.search(r"python3 -c '(.*?)' <", plan_hash.__doc__ or "", re.DOTALL)
    assert line
    code = " ".join(line[1].split())
    with plan.open() as file:
        digits = subprocess.run(
            [sys.executable, "-c", code], stdin=file, capture_output=True, text=True, check=True
        ).stdout.strip()
    done = run("export", str(plan), "--to", "axolotl", "--out", str(tmp_path / "x"), "--json")
    assert json.loads(done.stdout)["result"]["plan"] == digits == sheet(document("lora"), "plan.json").sha256
    assert f"plan {digits[:12]}," in (tmp_path / "x/axolotl.yaml").read_text()


def test_every_writer_has_a_command() -> None:
    recipe = planned(document("lora")).recipe
    assert all(WRITERS[tool].commands(recipe) for tool in WRITERS)


# ---------------------------------------------------------------- writing YAML


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(1e-12, 1e12)
    | st.text(st.characters(exclude_categories=("Cs",)))
)


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), PLAIN | st.lists(PLAIN, max_size=3), max_size=3),
    st.text(max_size=20),
)
def test_what_is_written_is_read_back(rows: dict[str, Any], comment: str) -> None:
    """Any text in any value survives PyYAML, and a comment never becomes a key."""
    library: Any = pytest.importorskip("yaml")
    assert (library.safe_load(yaml(rows, (comment,))) or {}) == rows


@settings(deadline=None)
@given(st.floats(1e-12, 1e3))
def test_a_decimal_is_exact(value: float) -> None:
    assert float(decimal(value)) == value
    assert "e" not in decimal(value)
