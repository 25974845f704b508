"""`lora-plan export`: files that training tools load, and that `check` reads back as the plan they came from."""

from __future__ import annotations

import json
import re
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
from lora_planner.cli import Commands
from lora_planner.commands.check import check
from lora_planner.commands.export import export
from lora_planner.data_file import DataFacts, read_data
from lora_planner.facts import gpu
from lora_planner.handoff import READERS, WRITERS, read, source
from lora_planner.handoff.manifest import resolve
from lora_planner.handoff.plan_file import planned
from lora_planner.handoff.recipe import Recipe
from lora_planner.handoff.vllm import served_rank
from lora_planner.handoff.words import decimal, known_keys, yaml
from lora_planner.model_source import load_model
from lora_planner.plan import Job, PriceBook
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
    "experts": ("axolotl", "peft"),
    "full": ("trl", "llamafactory", "unsloth"),
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
    group = Commands(commands={"check": check, "export": export})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora-plan", *words])
        return CliRunner().invoke(group, list(words))


def written(kind: str, tool: str, folder: Path) -> Path:
    """The tool's main file of an exported plan."""
    plan = folder / "plan.json"
    plan.write_text(json.dumps(document(kind)))
    done = run("export", str(plan), "--to", tool, "--out", str(folder / tool))
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
    ours = planned(document(kind)).recipe
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
    done = run("export", str(tmp_path / "plan.json"), "--to", "peft", "--out", str(tmp_path / "x"), "--json")
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    assert [Path(name).name for name in found["result"]["files"]] == ["adapter_config.json"]
    assert [w["code"] for w in found["warnings"]] == ["W-EXPERTS-FORM"]


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
