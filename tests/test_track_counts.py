"""Tables of counted quantities: read in both spellings of their columns, exact where exact is claimed, never a crash."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import peers
from calibrate import track
from calibrate.track import flops, lora_counts, models, read, saved, shared_outer, totals, tracker
from calibrate.track.case import Case
from calibrate.track.counted import cut, named
from calibrate.track.setting import read as setting_of
from lora_planner.arch import from_config
from lora_planner.ledger import EXACT, Estimate
from lora_planner.model_source import load_model

GOLDEN = Path(__file__).parents[1] / "calibrate" / "tables"
#: golden table -> the module that reads it
TABLES: dict[str, ModuleType] = {
    "models": models, "lora_counts": lora_counts, "adapter_counts_shared_outer": shared_outer, "flops_small": flops,
    "flops_models": flops, "saved_activations": saved, "memory_tracker": tracker,
}  # fmt: skip
KINDS = (models, totals, lora_counts, shared_outer, flops, saved, tracker)
#: a row of each first publication, in its own columns
FIRST: dict[str, tuple[ModuleType, str, str]] = {
    "models": (
        models,
        "name,model_class,total,buffers_persist,tied,embed,lm_head,norm,attn,ssm,mlp_dense,shared,experts,latent,router,"
        "vision,other,nonembed,n_experts,top_k,active,active_noinput,active_nonembed,gemm_active,lora[default]r1,"
        "lora[all-linear]r16,lora[all-linear/noconvert]r16,lora[experts-fused]r16",
        "deepseek-v2-lite,DeepseekV2ForCausalLM,15706484224,0,0,209715200,209715200,126464,371589120,0,67239936,449839104,"
        "14394851328,0,3407872,0,0,15287053824,64,6,2661150208,2451435008,2241719808,2451308544,ERR,358994944,13799424,"
        "221511680",
    ),
    "published_totals": (
        totals,
        "name,measured,published,published_minus_measured,match,explanation",
        "nemotron-3-nano-30b-a3b,31577937344,31577940288,2944,0,a buffer",
    ),
    "lora_counts": (
        lora_counts,
        "name,target_set,rank,trainable,n_wrapped,dtypes,peft_target_parameters,peft_rank_pattern,adapted,error",
        "bloom-7b1,default,16,7864320,30,float32,[],{},,",
    ),
    "shared_outer": (
        shared_outer,
        "hub,config,component,tinker_table,conv_per_expert,fused_per_expert,shared_outer_naive,with_rules,exact_with_rules",
        "Qwen/Qwen3.5-4B,qwen3.5-4b,attn,897024,898560,898560,898560,897024,1",
    ),
    "flops_2048": (
        flops,
        "model,mode,r,seq,batch,trainable,fwd,bwd,total,error,bwd_corrected,total_corrected",
        "gpt2,all,16,2048,1,2359296,670269702144,827254112256,1497523814400,,827254112256,1497523814400",
    ),
    "flops_small": (
        flops,
        "model,attn,experts,seq,batch,mode,r,grad_ckpt,input_require_grads,trainable,fwd,bwd,error",
        "llama,eager,,128,1,full,0,1,0,19665408,4093640704,10468982784,",
    ),
    "saved_activations": (
        saved,
        "model,mode,r,adapter_dtype,attn,seq,batch,layers,hidden,saved_bytes,per_layer_bytes,head_bytes,error",
        "llama-3.2-1b,full,,,eager,2048,1,16,2048,17728036876,1040203776,1084776460,",
    ),
    "memory_tracker": (
        tracker,
        "device,model,layers,mode,r,adapter_dtype,autocast,grad_ckpt,attn,seq,batch,optim,loss,trainable,peak_bytes,"
        "peak_fwd_bwd_bytes",
        "fake-cpu,llama-3.2-1b,8,lora,16,fp32,0,1,sdpa,2048,1,AdamW(foreach),labels,5636096,4806783688,4806783688",
    ),
}
BROKEN = ("", "ERR", "nan", "-3", "0", "1e400", "2.5", "1" * 400, "no-such-thing", "\x00", "a,b")


def golden(name: str) -> list[dict[str, str]]:
    with (GOLDEN / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def first(name: str) -> tuple[ModuleType, dict[str, str]]:
    module, header, row = FIRST[name]
    return module, dict(zip(header.split(","), row.split(","), strict=True))


def recognised(header: Iterable[str]) -> ModuleType:
    """As calibrate.track.kind_of does, among these kinds alone."""
    fitting = [kind for kind in KINDS if set(kind.COLUMNS) <= set(header)]
    return max(fitting, key=lambda kind: len(kind.COLUMNS))


# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("name", TABLES)
def test_what_claims_to_be_exact_is_exact(name: str) -> None:
    """Each counted quantity of the tables equals what a library counted; closed forms of bytes stay within a percent."""
    found = TABLES[name].cases(golden(name))
    predicted = [case for case in found if case.predicted is not None]
    assert len(predicted) > 0.8 * len(found)
    for case in predicted:
        assert case.predicted is not None
        if case.predicted.basis == EXACT:
            assert case.predicted.value == case.measured, case.label
        else:
            assert case.predicted.value == pytest.approx(case.measured, rel=0.01), case.label


@pytest.mark.parametrize("name", TABLES)
def test_rows_without_a_number_say_why(name: str) -> None:
    """What peft or the counter refused has a reason; nothing else is left without a prediction."""
    for case in TABLES[name].cases(golden(name)):
        assert (case.predicted is None) == bool(case.reason)
        assert math.isnan(case.measured) == (case.predicted is None)


@pytest.mark.parametrize("name", FIRST)
def test_the_columns_of_the_first_publication_are_read(name: str) -> None:
    """Recognised by its header, and every quantity of the row predicted as it was counted."""
    module, row = first(name)
    assert recognised(row) is module
    found = [case for case in module.cases([row]) if case.measured > 0]
    assert found
    for case in found:
        assert case.predicted is not None, case
        assert case.predicted.value == pytest.approx(case.measured, rel=1e-4), case.label
        assert case.covered


@pytest.mark.parametrize("name", TABLES)
def test_the_copies_here_are_recognised(name: str) -> None:
    assert recognised(golden(name)[0]) is TABLES[name]


def test_a_small_model_and_a_real_one_of_the_same_name_are_told_apart() -> None:
    """gpt2 is both: what trains says which."""
    _, row = first("flops_2048")
    assert flops.which(row).layers == 12
    assert flops.which({**row, "trainable": "589824", "r": "8"}).layers == 4


def test_the_published_total_of_a_tied_model_may_hold_its_head_twice() -> None:
    """Published totals: of Qwen3-0.6B the upper end of what the config says, and with modules that predict further
    tokens of Qwen3.5 and GLM-4.5 what the config says."""
    assert totals.stored("qwen3-0.6b").high == 751_632_384
    assert totals.stored("qwen3.5-35b-a3b").value == 35_951_822_704
    assert totals.stored("glm-4.5-air").value == 110_468_824_832


def test_published_totals_lie_where_the_config_puts_them() -> None:
    """39 of 40; the other's file has a module that its config does not name."""
    found = totals.cases(read(track.TABLES / "published_totals.csv"))
    assert [case.model for case in found if not case.covered] == ["qwen3-next-80b-a3b"]
    assert sum(case.error == 0 for case in found) >= 36


# ---------------------------------------------------------------- relations


def test_the_first_layers_are_a_shallower_model() -> None:
    """Cutting equals asking for fewer layers in the config, also where kinds of layer alternate."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "decoder_sparse_step": 2, "num_experts": 4,
              "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
              "moe_intermediate_size": 32, "vocab_size": 128, "num_experts_per_tok": 2}  # fmt: skip
    whole = from_config(config)
    for layers in (1, 3, 6):
        assert cut(whole, layers).groups == from_config({**config, "num_hidden_layers": layers}).groups


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("value", BROKEN)
def test_a_malformed_cell_is_a_reason_and_never_a_crash(name: str, value: str) -> None:
    """Each column in turn is broken, cut off or gone."""
    module, row = first(name)
    count = len(module.cases([row]))
    for column in row:
        for broken in ({**row, column: value}, {**row, column: None}, {k: v for k, v in row.items() if k != column}):
            found = module.cases([broken])
            assert len(found) <= count + 1  # a cell that was empty is one more quantity
            for case in found:
                assert isinstance(case, Case)
                assert bool(case.reason) == (case.predicted is None)
                assert case.predicted is None or math.isfinite(case.predicted.value)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("text", ["nobody/heard-of-it-9b", "../../etc", "", "llama-3.1-9b", "模型"])
def test_an_unknown_model_is_a_reason(name: str, text: str) -> None:
    """Never a neighbour, and never a path."""
    module, row = first(name)
    named_by = {key: text for key in ("name", "model", "hub", "config") if key in row}
    for case in module.cases([{**row, **named_by}]):
        assert case.predicted is None
        assert not math.isfinite(case.measured) or "known" in case.reason or "names no model" in case.reason


def test_names_of_the_hub_and_of_the_catalogue_mean_the_same() -> None:
    assert named("Qwen/Qwen3-8B").total == named("qwen3-8b").total == load_model("qwen3-8b").total


# ---------------------------------------------------------------- peers


def test_a_row_that_no_peer_can_express_says_why() -> None:
    """Tensor parallelism, an unknown model: a reason, without the peers being installed."""
    row = {"source": "x", "model": "Llama-3.1-8B", "method": "LoRA tp2", "rank": "16", "targets": "all-linear",
           "gpu": "H100 80GB", "n_gpus": "2", "seq_len": "2048", "micro_batch": "1", "grad_ckpt": "True"}  # fmt: skip
    line = peers.Line(Case("peak memory", "x", "", "", "", "", "row", "GiB", 20.0))
    line.ask("fitcheck", lambda: peers.fitcheck_memory(setting_of(row), "process"))
    line.ask("ftune", lambda: peers.ftune_rate(setting_of({**row, "model": "nobody/heard-of-it"})))
    assert "tensor" in line.why["fitcheck"]
    assert "nobody/heard-of-it" in line.why["ftune"]


def test_fused_matrices_play_the_parts_of_those_they_hold() -> None:
    """What peers are told: Llama's names, whatever the family calls them."""
    for name in ("llama-3.1-8b", "phi-3.5-mini", "qwen3-8b"):
        model = load_model(name)
        assert peers.roles(model, model.linears) == set(peers.ROLES)


def test_peers_are_compared_on_the_rows_that_all_predict() -> None:
    """Bounds count for nobody, and a planner is not favoured by rows that another refuses."""

    def line(measured: float, at_least: bool = False, **said: float) -> peers.Line:
        case = Case("peak memory", "x", "", "", "", "", "row", "GiB", measured, Estimate(1, 1, 1, "GiB", EXACT),
                    at_least=at_least)  # fmt: skip
        return peers.Line(case, said)

    found = [line(10, a=11, b=5), line(10, a=30), line(10, True, a=99, b=99)]
    rows = [text.split(" | ") for text in peers.summary(found, ("a", "b"))[2:]]
    assert [[cell.strip("| ") for cell in row[:4]] for row in rows] == [
        ["a", "all can", "1", "10.0%"], ["b", "all can", "1", "50.0%"],
        ["a", "each can", "2", "105.0%"], ["b", "each can", "1", "50.0%"],
    ]  # fmt: skip
