"""`lora-plan check --gpu NxNAME`: what several GPUs share out, and what that does to memory, batch, time and cost."""

from __future__ import annotations

import csv
import json
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_planner.cli import Commands
from lora_planner.commands.check import check
from lora_planner.errors import BadInput, LoraPlanError
from lora_planner.facts import gpu
from lora_planner.handoff import fleet, read, sharding, source
from lora_planner.handoff.recipe import Recipe
from lora_planner.handoff.review import Report, review, split_of
from lora_planner.handoff.sharding import HOST, TRL_LAUNCHES, WHOLE, Sharding
from lora_planner.handoff.source import Document
from lora_planner.memory import ALONE, GATHERED, Split
from lora_planner.model_source import load_model
from lora_planner.plan import PriceBook
from lora_planner.units import GIB

H100 = "h100-sxm-80gb"
AXOLOTL = {"base_model": "meta-llama/Llama-3.1-8B", "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True,
           "sequence_len": 2048, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-4,
           "gradient_checkpointing": True, "bf16": "auto"}  # fmt: skip
TRL = {"model_name_or_path": "Qwen/Qwen3-8B", "dtype": "bfloat16", "use_peft": True, "lora_target_modules": "all-linear",
       "learning_rate": 6e-4, "per_device_train_batch_size": 2, "max_length": 2048}  # fmt: skip
LLAMAFACTORY = {"model_name_or_path": "Qwen/Qwen3-8B", "finetuning_type": "full", "bf16": True, "cutoff_len": 2048,
                "per_device_train_batch_size": 1, "learning_rate": 2e-5}  # fmt: skip


def document(values: dict[str, Any], launch: dict[str, Any] | None = None, folder: Path | None = None) -> Document:
    return Document(values, "train.yaml", "yaml", launch=launch or {}, folder=folder)


def report(
    values: dict[str, Any], tool: str = "", gpus: int = 1, card: str = H100, launch: Any = None, **more: Any
) -> Report:
    recipe = read(document(values, launch), tool)
    return review(recipe, load_model(recipe.model), gpu(card), PriceBook.load(), gpus=gpus, **more)


def peak(found: Report) -> float:
    assert found.peak is not None
    return found.peak.value


def codes(found: Report) -> set[str]:
    return {finding.code for finding in found.findings}


def run(*words: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora-plan", "check", *words])
        patch.setenv("COLUMNS", "100")
        return CliRunner().invoke(Commands(commands={"check": check}), ["check", *words, "--offline"])


def zero(stage: int) -> dict[str, Any]:
    return {"deepspeed": {"zero_optimization": {"stage": stage, "reduce_bucket_size": 2e8}}}


# ---------------------------------------------------------------- golden: public peaks


TABLE = Path(__file__).parents[1] / "calibrate/tables/measured.csv"
#: publishers of DeepSpeed runs of dense models on several GPUs, whose settings a LLaMA-Factory file can say
PUBLISHED = ("qwen-readme", "ms-swift", "longlora")


def published() -> list[tuple[Any, Report]]:
    """(row, what check says of the same run) for every such row.

    Left out: Qwen3-30B-A3B, which ms-swift ran with transformers 4, whose experts are 128 modules in a loop.
    """
    setting: Any = pytest.importorskip("calibrate.track.setting")
    found = []
    with TABLE.open() as file:
        rows = [setting.read(row) for row in csv.DictReader(file)]
    for s in rows:
        split = s.parallel.weights > 1 or s.parallel.states > 1
        if s.source not in PUBLISHED or s.gpus == 1 or not split or not s.memory or "A3B" in s.model_name:
            continue
        stage = 3 if s.parallel.weights > 1 else 2
        values = {"model_name_or_path": "x", "deepspeed": f"ds_z{stage}_config.json", "cutoff_len": s.seq_len, "flash_attn": "fa2",
                  "per_device_train_batch_size": s.micro_batch, "gradient_accumulation_steps": s.accumulation or 8, "bf16": True,
                  "learning_rate": 1e-4, "finetuning_type": "full" if s.method.is_full else "lora"}  # fmt: skip
        if not s.method.is_full:
            names = ("q_proj", "k_proj", "v_proj", "o_proj") if s.method.targets == ("attention",) else s.method.targets
            values |= {"lora_rank": s.method.rank, "lora_target": ",".join(names)}
        recipe = read(document(values), "llamafactory")
        found.append((s, review(recipe, s.model, s.gpu or gpu("a100-sxm-80gb"), gpus=s.gpus)))
    return found


def test_published_peaks_under_deepspeed_are_inside_the_interval() -> None:
    """ZeRO-2 and ZeRO-3 runs of Qwen's README, ms-swift and LongLoRA, on 2 to 8 GPUs; the error is that of one GPU."""
    found = published()
    assert len(found) >= 12
    for s, r in found:
        assert r.peak is not None
        assert r.peak.low <= s.memory[0].bytes <= r.peak.high, (s.label, s.memory[0].bytes / GIB, r.peak.value / GIB)
    assert median(abs(peak(r) / s.memory[0].bytes - 1) for s, r in found) < 0.09


def test_published_steps_under_deepspeed_are_inside_the_interval() -> None:
    """Where a row says how many micro-batches its step has: Qwen's README, LoRA on 4 GPUs and full fine-tuning on 2."""
    found = [(s, r) for s, r in published() if s.seconds_per_step and s.accumulation]
    assert len(found) >= 9
    for s, r in found:
        assert r.priced is not None
        assert r.priced.step_s is not None
        assert r.priced.step_s.low <= s.seconds_per_step <= r.priced.step_s.high, s.label


# ---------------------------------------------------------------- oracles


def test_trls_launches_are_trls() -> None:
    """The names that `trl sft --accelerate_config` takes say what TRL's own files say."""
    yaml: Any = pytest.importorskip("yaml")
    library: Any = pytest.importorskip("trl")
    files = {path.stem: path for path in (Path(library.__file__).parent / "accelerate_configs").glob("*.yaml")}
    assert set(files) == set(TRL_LAUNCHES)
    for name, path in files.items():
        theirs = yaml.safe_load(path.read_text())
        for key, value in TRL_LAUNCHES[name].items():
            said = {k: theirs[key][k] for k in value} if isinstance(value, dict) else theirs[key]
            assert said == value, name
        ours, full = (read(document(TRL, launch), "trl").sharding for launch in (TRL_LAUNCHES[name], theirs))
        assert replace(ours, bucket=0.0) == replace(full, bucket=0.0)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("word", ["full_shard", "shard_grad_op", "full_shard auto_wrap offload", "hybrid_shard"])
def test_fsdps_words_mean_what_transformers_makes_of_them(word: str, version: int) -> None:
    """`_apply_legacy_fsdp_to_config` turns them into reshard_after_forward and cpu_offload, which we read alike."""
    arguments: Any = pytest.importorskip("transformers").TrainingArguments
    theirs: dict[str, Any] = {"version": version}
    if version == 2 and "hybrid" in word:
        with pytest.raises(ValueError, match="FSDP1"):
            arguments._apply_legacy_fsdp_to_config(word, theirs)
        return
    arguments._apply_legacy_fsdp_to_config(word, theirs)
    ours, again = (read(document(TRL | {"fsdp": fsdp, "fsdp_config": config}), "trl").sharding
                   for fsdp, config in ((word, {"version": version}), (True, theirs)))  # fmt: skip
    assert ours == again
    assert ours.host == (frozenset({"params", "optimizer"}) if theirs.get("cpu_offload") else frozenset())
    assert ours.kept == (theirs["reshard_after_forward"] in (False, "shard_grad_op"))


def test_an_auto_bucket_is_transformers() -> None:
    """ "auto" of reduce_bucket_size is hidden_size squared, by transformers' own code."""
    module: Any = pytest.importorskip("transformers.integrations.deepspeed")
    base: Any = pytest.importorskip("accelerate.utils.deepspeed").HfDeepSpeedConfig
    config = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    # without deepspeed installed, transformers' class has no base: accelerate's stands in for it
    own = {
        name: vars(module.HfTrainerDeepSpeedConfig)[name]
        for name in ("fill_match", "fill_only", "is_auto", "trainer_config_finalize")
    }
    theirs = type("Finalised", (base,), own)(json.loads(json.dumps(config)))
    theirs.mismatches, theirs._dtype = [], None

    class Shell:
        config = type("Config", (), {"hidden_size": 4096})()

    class Arguments:
        def __getattr__(self, name: str) -> Any:
            return 0

        def get_warmup_steps(self, steps: int) -> int:
            return 0

    with suppress(ValueError):  # it also compares what is not "auto" here
        theirs.trainer_config_finalize(Arguments(), Shell(), 1)
    bucket = theirs.config["zero_optimization"]["reduce_bucket_size"]
    ours = sharding._deepspeed(sharding.Node(config, "x")).split(2, 1, 4096)
    assert ours.buckets == 2 * bucket


def test_assumptions_are_those_of_the_track_record() -> None:
    """Buckets and ZeRO-3's kernels are the numbers that calibrate predicts public runs with."""
    peaks: Any = pytest.importorskip("calibrate.memory")
    speed: Any = pytest.importorskip("calibrate.track.speed")
    assumed = read(document({**LLAMAFACTORY, "deepspeed": "ds_z2_config.json"}), "llamafactory").sharding
    assert assumed.split(8, 1, 4096) == Split(1, 8, buckets=peaks.BUCKETS)
    assert fleet.ZERO3_LAUNCHES == speed.ZERO3_LAUNCHES


# ---------------------------------------------------------------- reading


NAMES = [
    ("deepspeed_configs/zero1.json", "ZeRO-1", ()),
    ("deepspeed_configs/zero2_torch_compile.json", "ZeRO-2", ()),
    ("deepspeed_configs/zero3_bf16.json", "ZeRO-3", ()),
    ("deepspeed_configs/zero3_bf16_cpuoffload_all.json", "ZeRO-3", ("optimizer", "params")),
    ("deepspeed_configs/zero3_bf16_cpuoffload_params.json", "ZeRO-3", ("params",)),
    ("examples/deepspeed/ds_z0_config.json", "DeepSpeed", ()),
    ("examples/deepspeed/ds_z2_offload_config.json", "ZeRO-2", ("optimizer",)),
    ("examples/deepspeed/ds_z3_offload_config.json", "ZeRO-3", ("optimizer", "params")),
    ("ds_zero_stage-3.json", "ZeRO-3", ()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "word", "host"), NAMES)
def test_a_file_that_is_not_there_is_known_by_its_name(name: str, word: str, host: tuple[str, ...]) -> None:
    """The files that axolotl and LLaMA-Factory ship; that it is assumed is said."""
    recipe = read(document({**AXOLOTL, "deepspeed": name}), "axolotl")
    assert recipe.sharding.name.startswith(word)
    assert recipe.sharding.host == frozenset(host)
    assert any("assumed" in note for note in recipe.notes)


def test_a_file_beside_the_config_is_read(tmp_path: Path) -> None:
    """Its stage wins over its name; buckets, offloading and the batch are its own."""
    (tmp_path / "zero2.json").write_text(json.dumps({
        "train_batch_size": 64,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 3e8, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}},
    }))  # fmt: skip
    found = read(document({**AXOLOTL, "deepspeed": "zero2.json"}, folder=tmp_path), "axolotl")
    assert found.sharding.name == "ZeRO-3, optimizer in host memory"
    assert (found.sharding.batch, found.sharding.bucket, found.notes) == (64, 3e8, ())
    assert found.sharding.split(8, 1, 4096) == Split(8, HOST, buckets=6e8)


SAME = [
    ({"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"fsdp_version": 2}}, "axolotl"),
    ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, "axolotl"),
    ({"fsdp": "full_shard auto_wrap"}, "trl"),
    ({"fsdp": True, "fsdp_config": {"reshard_after_forward": "true"}}, "trl"),
    ({"fsdp": True, "fsdp_config": '{"fsdp_reshard_after_forward": true}'}, "llamafactory"),
    ({"fsdp": "full_shard"}, "llamafactory"),
]


@pytest.mark.parametrize(("words", "tool"), SAME)
def test_one_sharding_in_many_words(words: dict[str, Any], tool: str) -> None:
    base = {"axolotl": AXOLOTL, "trl": TRL, "llamafactory": LLAMAFACTORY}[tool]
    found = read(document({**base, **words}), tool).sharding
    assert (found.engine, found.version, found.name) == ("fsdp", 2, "FSDP2 FULL_SHARD")
    assert split_of(Recipe("x", sharding=found, gpus=8), load_model("qwen3-8b")) == Split(8, 8)


COMMANDS = [
    ("accelerate launch --config_file acc.yaml --num_processes 4 sft.py --model_name_or_path m", "ZeRO-3", 4),
    ("accelerate launch --config_file acc.yaml sft.py --model_name_or_path m", "ZeRO-3", 8),
    ("accelerate launch --use_deepspeed --zero_stage 2 --num_processes=2 sft.py --model_name_or_path m", "ZeRO-2", 2),
    ("accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 sft.py --model_name_or_path m", "FSDP2 FULL_SHARD", 2),
    ("trl sft --model_name_or_path m --accelerate_config zero1 --num_processes 4", "ZeRO-1", 4),
    ("trl sft --model_name_or_path m --accelerate_config fsdp2", "FSDP2 FULL_SHARD", 8),
    ("torchrun --nnodes 2 --nproc_per_node=8 sft.py --model_name_or_path m", "", 16),
    ("deepspeed --num_gpus 4 sft.py --model_name_or_path m --deepspeed ds.json", "ZeRO-1", 4),
    ("python sft.py --model_name_or_path m", "", 0),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "processes"), COMMANDS)
def test_a_launcher_says_how_many_and_how(text: str, name: str, processes: int, tmp_path: Path) -> None:
    """accelerate's file and words, TRL's names, torchrun, DeepSpeed's launcher; the words win over the file."""
    pytest.importorskip("yaml")
    (tmp_path / "acc.yaml").write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {deepspeed_config_file: z3.json}\n"
    )
    (tmp_path / "z3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    (tmp_path / "run.sh").write_text(text + "\n")
    recipe = read(source.read(tmp_path / "run.sh"), "trl")
    assert (recipe.sharding.name, recipe.sharding.processes) == (name, processes)
    assert not recipe.unknown


def test_an_accelerate_file_as_the_second_file(tmp_path: Path) -> None:
    """What the config does not say of the GPUs, the file of `accelerate launch` does; --gpu decides how many there are."""
    pytest.importorskip("yaml")
    (tmp_path / "sft.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in TRL.items()))
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_version: 2}\n")
    one = json.loads(run(str(tmp_path / "sft.yaml"), str(tmp_path / "fsdp.yaml"), "--gpu", H100, "--json").stdout)[
        "result"
    ]
    assert [f["code"] for f in one["findings"] if f["severity"] == "warning"] == ["W-GPUS"]
    done = run(str(tmp_path / "sft.yaml"), str(tmp_path / "fsdp.yaml"), "--gpu", f"8x{H100}", "--json")
    eight = json.loads(done.stdout)["result"]
    assert (eight["gpus"], eight["recipe"]["sharding"]["name"], eight["batch"]) == (8, "FSDP2 FULL_SHARD", 16)
    assert eight["peak_bytes"]["value"] < one["peak_bytes"]["value"]
    assert "W-GPUS" not in {f["code"] for f in eight["findings"]}
    none = json.loads(run(str(tmp_path / "sft.yaml"), str(tmp_path / "fsdp.yaml"), "--json").stdout)["result"]
    assert (none["gpus"], none["batch"], none["p_fit"]) == (8, 16, None)  # as many as the launch starts


def test_scripts_say_how_they_store_four_bits() -> None:
    """BitsAndBytesConfig's storage, a literal or torch's name of it."""
    text = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)\nSFTConfig(fsdp="full_shard")\nLoraConfig(r=8)'
    assert read(source.script(text, "a.py"), "trl").sharding.floats
    assert not read(
        source.script(text.replace(", bnb_4bit_quant_storage=torch.bfloat16", ""), "a.py"), "trl"
    ).sharding.floats


# ---------------------------------------------------------------- relations


@pytest.mark.parametrize(("base", "tool"), [(AXOLOTL, "axolotl"), (LLAMAFACTORY, "llamafactory"), (TRL, "trl")])
def test_more_gpus_need_less_of_each(base: dict[str, Any], tool: str) -> None:
    """ZeRO-3 on 8 at most as much as on 2, on 2 as on one; and ZeRO-2 needs at least as much as ZeRO-3."""
    for stage in (1, 2, 3):
        one, two, eight = (peak(report(base | zero(stage), tool, n)) for n in (1, 2, 8))
        assert eight <= two <= one, stage
    assert (
        peak(report(base | zero(3), tool, 8))
        < peak(report(base | zero(2), tool, 8))
        <= peak(report(base | zero(1), tool, 8))
    )


def terms(found: Report, phase: str = "optimizer") -> dict[str, float]:
    assert found.priced is not None
    assert found.priced.memory is not None
    return {t.name: t.value for t in found.priced.memory.phases[phase].terms}


def test_each_stage_shares_out_what_it_says() -> None:
    """ZeRO-1 states alone, ZeRO-2 gradients too, ZeRO-3 weights too: to the byte; DDP nothing."""
    ddp = terms(report(AXOLOTL, "axolotl", 8))
    assert ddp == terms(report(AXOLOTL, "axolotl", 1))
    for stage, shared in ((1, {"optimizer states"}), (2, {"optimizer states", "gradients"}),
                          (3, {"optimizer states", "gradients", "weights", "adapters"})):  # fmt: skip
        now = terms(report(AXOLOTL | zero(stage), "axolotl", 8))
        for name in ("weights", "adapters", "gradients", "optimizer states"):
            assert now[name] == pytest.approx(ddp[name] / (8 if name in shared else 1)), (stage, name)


def test_a_whole_copy_each_has_the_peak_of_one_gpu() -> None:
    """DDP: memory of one GPU, a batch of N, less time, N GPUs to pay for, which is more than one's hours."""
    one, eight = (report(AXOLOTL, "axolotl", n, data=tokens()) for n in (1, 8))
    assert peak(one) == peak(eight)
    assert (one.recipe.batch, eight.recipe.batch) == (4, 32)
    assert one.priced is not None and eight.priced is not None
    assert one.priced.run_s is not None and eight.priced.run_s is not None
    assert one.priced.run_s.value / 8 < eight.priced.run_s.value < one.priced.run_s.value
    assert one.priced.cost is not None and eight.priced.cost is not None
    assert one.priced.cost.usd.value < eight.priced.cost.usd.value < 1.3 * one.priced.cost.usd.value
    assert one.steps == pytest.approx(8 * (eight.steps or 0))


def tokens() -> Any:
    from lora_planner.data_file import DataFacts

    return DataFacts.from_tokens(50e6, 2048)


def test_steps_of_a_run_do_not_shrink_with_gpus() -> None:
    """max_steps is a number of steps whatever the world size: eight GPUs see eight times the tokens."""
    one, eight = (report(AXOLOTL | {"max_steps": 100}, "axolotl", n) for n in (1, 8))
    assert one.priced is not None and eight.priced is not None
    assert eight.steps == one.steps == 100
    assert one.priced.run_tokens is not None
    assert eight.priced.run_tokens == 8 * one.priced.run_tokens


def test_host_memory_takes_what_it_is_given() -> None:
    """Optimizer states, gradients, weights: gone from the GPU, and what is gathered stays."""

    def offloaded(*names: str) -> Report:
        z = {"stage": 3, **{f"offload_{name}": {"device": "cpu"} for name in names}}
        return report(LLAMAFACTORY | {"deepspeed": {"zero_optimization": z}}, "llamafactory", 2)

    none, states, both = terms(offloaded()), terms(offloaded("optimizer")), terms(offloaded("optimizer", "param"))
    assert none["optimizer states"] > 1e9
    assert states["optimizer states"] < 1e3 and states["gradients"] < 1e3
    assert states["weights"] == none["weights"] > 1e9 > both["weights"]
    assert peak(offloaded("optimizer", "param")) < peak(offloaded("optimizer")) < peak(offloaded())
    assert terms(offloaded("optimizer", "param"), "forward")["gathered weights"] > 1e9


def test_deepspeed_keeps_masters_and_fsdp_makes_them() -> None:
    """16-bit weights of full fine-tuning: 16 bytes a parameter in either, so W-BF16-FULL is said of neither."""
    pure = {k: v for k, v in TRL.items() if k not in ("use_peft", "lora_target_modules")} | {"learning_rate": 2e-5}
    assert "W-BF16-FULL" in codes(report(pure, "trl"))
    n = load_model("qwen3-8b").total
    for words in (zero(3), {"fsdp": "full_shard"}):
        found = report(pure | words, "trl", 8)
        assert "W-BF16-FULL" not in codes(found)
        resting = terms(found)
        total = sum(resting[name] for name in ("weights", "gradients", "optimizer states"))
        assert total == pytest.approx(16 * n / 8, rel=0.001)
    assert "W-BF16-FULL" in codes(
        report(LLAMAFACTORY | {"pure_bf16": True, "bf16": False, "fsdp": "full_shard"}, "llamafactory", 8)
    )


def test_gathered_weights_that_are_kept_are_whole() -> None:
    """SHARD_GRAD_OP holds the weights and its share of them: more than FULL_SHARD by what that gathers less."""
    full, kept = (
        report(AXOLOTL | {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": again}}, "axolotl", 8)
        for again in (True, False)
    )
    more = peak(kept) - peak(full)
    assert more == pytest.approx(2 * load_model("llama-3.1-8b").total - terms(full, "forward")["gathered weights"])


def test_gradients_are_whole_while_they_accumulate() -> None:
    """Under FSDP the Trainer calls no_sync: whole gradients on each GPU, unless sync_each_batch or one pass a step."""
    words = {"fsdp": True, "fsdp_config": {}}
    several, synced, once = (
        report(LLAMAFACTORY | words | more, "llamafactory", 8)
        for more in (
            {"gradient_accumulation_steps": 4},
            {"gradient_accumulation_steps": 4, "fsdp_config": {"sync_each_batch": True}},
            {},
        )
    )
    assert terms(several)["gradients"] == pytest.approx(8 * terms(synced)["gradients"])
    assert terms(once)["gradients"] == terms(synced)["gradients"]


def test_integers_are_not_split() -> None:
    """4-bit weights stored as integers are on every GPU; as floats they are split; both are cheaper than no sharding."""
    four = TRL | {"load_in_4bit": True, "fsdp": "full_shard"}
    integers, floats = report(four, "trl", 8), report(four | {"bnb_4bit_quant_storage": "bfloat16"}, "trl", 8)
    assert "W-4BIT-WHOLE" in codes(integers)
    assert "W-4BIT-WHOLE" not in codes(floats)
    model = load_model("qwen3-8b")
    quantised = sum(row.params for row in model.linears) * 4.127 / 8
    assert peak(integers) - peak(floats) == pytest.approx(quantised * (7 / 8 - GATHERED / 36), rel=0.02)
    large = report(four | {"model_name_or_path": "llama-3.1-70b"}, "trl", 4, "a100-sxm-40gb")
    assert ("bnb_4bit_quant_storage", "bfloat16") in next(f for f in large.findings if f.code == "E-NOFIT").change
    one = peak(report(four, "trl", 1))
    assert peak(floats) < one
    assert peak(integers) == pytest.approx(one, rel=0.03)
    eight = report(TRL | {"load_in_8bit": True, "fsdp": "full_shard"}, "trl", 8)
    assert peak(eight) > 2 * model.total  # counted as 16 bits, an upper end


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 64), st.sampled_from([1, 2, 3]), st.integers(1, 8))
def test_shares_are_sane(n: int, stage: int, accumulation: int) -> None:
    """No part is split over more GPUs than there are, and over all of them where it is split at all."""
    found = sharding.zero(stage, "x").split(n, accumulation, 64)
    assert (found.weights, found.states) == (n if stage == 3 else 1, n)
    assert WHOLE.split(n, accumulation, 64) == ALONE
    grouped = Sharding("fsdp", "x", True, True, True, group=8).split(n, 1, 64)
    assert grouped.weights == min(n, 8)


# ---------------------------------------------------------------- findings


def test_a_batch_that_grows_with_the_gpus() -> None:
    """Right on one GPU, large on 32; the fix is the batch of 32 again; where one sample each is too many, fewer GPUs."""
    assert "W-BATCH-LARGE" not in codes(report(AXOLOTL, "axolotl", 8))
    found = report(AXOLOTL, "axolotl", 32)
    finding = next(f for f in found.findings if f.code == "W-BATCH-LARGE")
    assert "batch 128 = 2 x 2 on 32 GPUs" in finding.evidence
    fixed = AXOLOTL | {key: int(value) for key, value in finding.change}
    again = report(fixed, "axolotl", 32)
    assert again.recipe.batch == 32
    assert "W-BATCH-LARGE" not in codes(again)
    crowd = next(f for f in report(AXOLOTL, "axolotl", 256).findings if f.code == "W-BATCH-LARGE")
    assert crowd.change == ()
    assert "fewer GPUs" in crowd.fix


@pytest.mark.parametrize(
    ("gpus", "wrong", "says"), [(4, False, ""), (8, True, "train_batch_size: auto"), (16, True, "at most 8 GPUs")]
)
def test_more_gpus_than_deepspeeds_batch(gpus: int, wrong: bool, says: str, tmp_path: Path) -> None:
    """DeepSpeed wants micro x passes x GPUs to be its train_batch_size."""
    words = {"deepspeed": {"train_batch_size": 16, "zero_optimization": {"stage": 2}}}
    found = report(AXOLOTL | words, "axolotl", gpus)
    assert ("E-WORLD-BATCH" in codes(found)) == wrong
    assert not wrong or says in next(f for f in found.findings if f.code == "E-WORLD-BATCH").fix


def test_a_group_needs_the_batch_of_all_gpus() -> None:
    """GRPO: 2 sequences on each of 4 GPUs hold one group of 8."""
    rl = {k: v for k, v in TRL.items() if k != "max_length"} | {
        "num_generations": 8,
        "reward_funcs": ["accuracy_reward"],
        "learning_rate": 1e-4,
    }
    assert "E-GROUP-BATCH" in codes(report(rl, "trl", 1))
    assert "E-GROUP-BATCH" in codes(report(rl, "trl", 3))
    assert "E-GROUP-BATCH" not in codes(report(rl, "trl", 4))


def test_what_fits_whole_is_said_to() -> None:
    """An 8B LoRA fits whole on each H100: ZeRO-3 only costs time. Full fine-tuning of 32B does not: nothing is said."""
    assert "N-SHARD-WIDE" in codes(report(AXOLOTL | zero(3), "axolotl", 8))
    assert "N-SHARD-WIDE" not in codes(report(AXOLOTL | zero(2), "axolotl", 8))
    assert "N-SHARD-WIDE" not in codes(
        report(LLAMAFACTORY | zero(3) | {"model_name_or_path": "llama-3.1-70b"}, "llamafactory", 8)
    )


def test_what_fits_on_no_gpu_alone_is_told_how_many() -> None:
    """Full fine-tuning of 8B on one H100: no change of the step fits, a number of GPUs does, and check agrees."""
    alone = next(f for f in report(LLAMAFACTORY, "llamafactory").findings if f.code == "E-NOFIT")
    assert "GPUs with FSDP or ZeRO-3" in alone.fix
    n = int(alone.fix.split()[0])
    assert "E-NOFIT" not in codes(report(LLAMAFACTORY | {"fsdp": True}, "llamafactory", n))


def test_what_no_formula_counts_is_refused_with_a_gpu_only() -> None:
    """Tensor parallelism: one line, and everything that needs no memory still answers without --gpu."""
    words = AXOLOTL | {"tensor_parallel_size": 2}
    with pytest.raises(BadInput, match="dp_replicate_size"):
        report(AXOLOTL | {"fsdp_config": {}, "dp_replicate_size": 2}, "axolotl", 4)
    with pytest.raises(BadInput, match="tensor_parallel_size"):
        report(words, "axolotl", 2)
    mesh = {"distributed_type": "FSDP", "parallelism_config": {"parallelism_config_tp_size": 2}}
    with pytest.raises(BadInput, match="parallelism_config"):
        report(TRL | {"fsdp": "full_shard"}, "trl", 4, launch=mesh)
    recipe = read(document(words), "axolotl")
    assert review(recipe, load_model(recipe.model)).manifest.adapter_params == 41_943_040


def test_the_terminal_says_how_many_and_what_is_shared(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(
        "".join(f"{k}: {json.dumps(v)}\n" for k, v in (AXOLOTL | {"deepspeed": "zero3.json"}).items())
    )
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}')
    done = run(str(tmp_path / "a.yaml"), "--gpu", f"8x{H100}", "--tokens", "10M")
    assert done.exit_code == 0
    for words in (
        "8, ZeRO-3: each has its share of weights, gradients, optimizer states",
        "batch 32 = 2 x 2 on 8 GPUs",
        "on each",
    ):
        assert words in " ".join(done.stdout.split())


# ---------------------------------------------------------------- bad inputs


GPUS = [("0x" + H100, 3), ("-1x" + H100, 3), ("99999999999x" + H100, 3), ("20000x" + H100, 3), ("8xh100", 3), ("8x", 3), ("x" + H100, 3),
        ("1.5x" + H100, 3), ("8 x " + H100, 0), ("8X" + H100, 0)]  # fmt: skip


@pytest.mark.parametrize(("text", "code"), GPUS)
def test_a_number_of_gpus(text: str, code: int) -> None:
    """From 1 to MAX_GPUS, and an exact name; anything else is one line."""
    done = run(str(Path(__file__).parent / "golden/handoff/axolotl-lora.yml"), "--gpu", text)
    assert done.exit_code == code, (done.stdout, done.stderr)
    assert code == 0 or done.stderr.count("\n") == 1
    assert fleet.parse(f"{fleet.MAX_GPUS}x{H100}")[0] == fleet.MAX_GPUS


BAD = [
    ({"deepspeed": "mine.json"}, "tells no stage"),
    ({"deepspeed": "../../etc/passwd"}, "tells no stage"),
    ({"deepspeed": "/dev/zero"}, "tells no stage"),
    ({"deepspeed": "broken3.json"}, "broken3.json"),
    ({"deepspeed": "stage.json"}, "stage"),
    ({"deepspeed": "param.json"}, "stage 3 only"),
    ({"deepspeed": "pipe-zero3.json"}, "not a regular file"),
    ({"deepspeed": "long-zero3.json"}, "longer than"),
    ({"deepspeed": "zero3\0.json"}, "deepspeed_config"),
    ({"deepspeed": ["zero3.json"]}, "deepspeed"),
    ({"deepspeed": {"zero_optimization": 3}}, "zero_optimization"),
    ({"deepspeed": {"zero_optimization": {"stage": "three"}}}, "stage"),
    ({"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}}, "reduce_bucket_size"),
    ({"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e300}}}, "reduce_bucket_size"),
    ({"deepspeed": "zero3.json", "fsdp": ["full_shard"]}, "Keep one"),
    ({"fsdp": ["fully_shard"]}, "not known"),
    ({"fsdp_config": {"fsdp_sharding_strategy": "SOME"}}, "not known"),
    ({"fsdp_config": {"fsdp_version": 3}, "fsdp": True}, "version"),
    ({"fsdp_config": [1], "fsdp": True}, "fsdp_config"),
    ({"fsdp_config": {"fsdp_offload_params": "perhaps"}}, "offload_params"),
    ({"dp_replicate_size": "two"}, "dp_replicate_size"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), BAD, ids=[f"{i}-{says[:20]}" for i, (_, says) in enumerate(BAD)])
def test_bad_sharding(words: dict[str, Any], says: str, tmp_path: Path) -> None:
    """An error of ours that names the key or the file; never a guess, never a hang."""
    (tmp_path / "broken3.json").write_text('{"zero_optimization": {"stage": 3, "stage": 2}}')
    (tmp_path / "stage.json").write_text('{"zero_optimization": {"stage": 7}}')
    (tmp_path / "param.json").write_text('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}')
    (tmp_path / "long-zero3.json").write_bytes(b" " * (sharding.MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe-zero3.json")
    if "\0" in str(words.get("deepspeed", "")):
        assert read(
            document({**AXOLOTL, **words}, folder=tmp_path), "axolotl"
        ).sharding.weights  # known by its name, never opened
        return
    with pytest.raises(BadInput) as caught:
        read(document({**AXOLOTL, **words}, folder=tmp_path), "axolotl")
    assert says in str(caught.value)


def test_nothing_outside_the_folder_is_opened(tmp_path: Path) -> None:
    """A link or a path that leads out is not followed: the name tells the stage, though the file says another."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/zero2.json").write_text('{"zero_optimization": {"stage": 3}}')
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "link-zero2.json").symlink_to(tmp_path / "secret/zero2.json")
    for named in ("link-zero2.json", "../secret/zero2.json", str(tmp_path / "secret/zero2.json")):
        found = read(document({**AXOLOTL, "deepspeed": named}, folder=folder), "axolotl")
        assert found.sharding.name == "ZeRO-2"
        assert any("assumed" in note for note in found.notes)


def test_a_second_file_that_is_no_accelerate_config(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    config = str(Path(__file__).parent / "golden/handoff/trl-sft.yaml")
    (tmp_path / "other.yaml").write_text("learning_rate: 1e-4\n")
    for second, says in ((tmp_path / "other.yaml", "no accelerate config"), (tmp_path / "none.yaml", "no such file")):
        done = run(config, str(second))
        assert done.exit_code == 3
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "zero3.json", "auto", "cpu", "full_shard", "FULL_SHARD", "true", "{", "8"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["stage", "zero_optimization", "offload_param", "device", "fsdp_version", "zero_stage", "fsdp_offload_params"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = ["deepspeed", "fsdp", "fsdp_config", "fsdp_version", "dp_shard_size", "tensor_parallel_size"]
LAUNCH = ["distributed_type", "num_processes", "deepspeed_config", "fsdp_config", "use_fsdp", "use_deepspeed", "nproc_per_node", "nnodes",
          "zero_stage", "parallelism_config"]  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    st.dictionaries(st.sampled_from(LAUNCH), VALUES, max_size=4),
    st.sampled_from([("axolotl", AXOLOTL), ("trl", TRL), ("llamafactory", LLAMAFACTORY)]),
)
def test_any_words_are_read_or_refused(
    words: dict[str, Any], launch: dict[str, Any], base: tuple[str, dict[str, Any]]
) -> None:
    """Whatever stands there, a sharding whose split is a split, or an error of ours."""
    with suppress(LoraPlanError):
        found = read(document({**base[1], **words}, launch), base[0]).sharding
        split = found.split(8, 2, 4096)
        assert split.weights >= 1 and split.states >= 1 and 0 <= split.buckets < 1e12
