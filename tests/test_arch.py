"""The weight tables of arch/ against transformers, against published facts, and against bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lora_planner.arch import BY_MODEL_TYPE, from_config
from lora_planner.errors import BadInput, UnknownModelType
from lora_planner.model import GROUPS, PARAMETER, Model

GOLDEN = Path(__file__).parents[1] / "calibrate" / "tables" / "models.csv"
CONFIGS = Path(__file__).parents[1] / "lora_planner" / "data" / "models"
ROWS = list(csv.DictReader(GOLDEN.open()))

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 160}
NEO = {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 160, "max_position_embeddings": 128}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 48, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "n_shared_experts": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MIX = {"num_local_experts": 6, "num_experts_per_tok": 2}
SLIDES = {"sliding_window": 32, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
WIDE = {"head_dim": 24}

#: model_type -> the keys that change shapes, two settings or more; {} is the plain small model
VARIED: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32},
              {"num_key_value_heads": None}],
    "mistral": [{}, {"head_dim": 24, "sliding_window": None}, {"tie_word_embeddings": True}],
    "smollm3": [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
                {"use_sliding_window": True, "sliding_window": 32, "no_rope_layers": [1, 0, 0, 1]}],
    "qwen2": [{}, {"tie_word_embeddings": True, "head_dim": 32}, {"num_key_value_heads": None},
              {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}],
    "qwen3": [{}, {"attention_bias": True, "head_dim": 24}, {"use_sliding_window": True, **SLIDES}],
    "gemma": [{}, {"head_dim": 24, "attention_bias": True}, {"tie_word_embeddings": False}],
    "gemma2": [{}, {"head_dim": 24, "attention_bias": True}, SLIDES],
    "olmo": [{}, {"attention_bias": True, "tie_word_embeddings": True}, {"num_key_value_heads": None}],
    "olmo2": [{}, {"attention_bias": True, "tie_word_embeddings": True}, {"num_key_value_heads": None}],
    "olmo3": [{}, {"attention_bias": True}, SLIDES, {"sliding_window": None}],
    "granite": [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, WIDE],
    "helium": [{"head_dim": 16}, {"head_dim": 16, "attention_bias": True, "mlp_bias": True}],
    "seed_oss": [{}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}, WIDE],
    "ernie4_5": [{}, {"use_bias": True, "tie_word_embeddings": False}, WIDE],
    "hunyuan_v1_dense": [{"head_dim": 16}, {"attention_bias": True, "head_dim": 24}],
    "exaone4": [{}, {"head_dim": 24, **SLIDES}, {"sliding_window": 32, "sliding_window_pattern": 2}],
    "ministral": [{"head_dim": 16}, {"head_dim": 24, **SLIDES}],
    "ministral3": [{}, {"head_dim": 24, "tie_word_embeddings": True}],
    "starcoder2": [{}, {"use_bias": False, "tie_word_embeddings": False}, {"sliding_window": 32}],
    "nemotron": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}],
    "arcee": [{}, {"attention_bias": True, "mlp_bias": True, "head_dim": 24}],
    "apertus": [{}, {"attention_bias": True, "head_dim": 24}, {"hidden_act": "relu"}],
    "cohere": [{}, {"use_qk_norm": True}, {"attention_bias": True, "tie_word_embeddings": False}, WIDE],
    "cohere2": [{}, {"attention_bias": True}, {"sliding_window": 32, "sliding_window_pattern": 2}, SLIDES],
    "glm": [{}, {"attention_bias": False, "head_dim": 24}],
    "glm4": [{}, {"attention_bias": False, "head_dim": 24, "tie_word_embeddings": True}],
    "phi": [{}, {"qk_layernorm": True}, {"tie_word_embeddings": True, "num_key_value_heads": None}],
    "phi3": [{}, {"tie_word_embeddings": True, "num_key_value_heads": None}, {"sliding_window": 32}],
    "stablelm": [{}, {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
                 {"tie_word_embeddings": True, "qk_layernorm": True}],
    "opt": [{"ffn_dim": 96}, {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            {"enable_bias": False, "layer_norm_elementwise_affine": False},
            {"_remove_final_layer_norm": True, "tie_word_embeddings": False}],
    "bloom": [{}, {"n_embed": 32}, {"tie_word_embeddings": False}],
    "falcon": [{}, {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
               {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
               {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80},
               {"n_embed": 32, "tie_word_embeddings": False}],
    "gpt2": [OLD, {**OLD, "n_inner": 80, "tie_word_embeddings": False}],
    "gpt_bigcode": [OLD, {**OLD, "multi_query": False}, {**OLD, "n_inner": 80}],
    "gptj": [{**OLD, "rotary_dim": 8}, {**OLD, "n_inner": 80, "tie_word_embeddings": True}],
    "gpt_neo": [{**NEO, "attention_types": [[["global", "local"], 2]]},
                {**NEO, "attention_types": [[["global"], 3], [["local"], 1]], "intermediate_size": 80}],
    "gpt_neox": [{}, {"attention_bias": False, "use_parallel_residual": False},
                 {"tie_word_embeddings": True}],
    "mixtral": [MIX, {**MIX, "head_dim": 24, "tie_word_embeddings": True}, {**MIX, "sliding_window": 32}],
    "granitemoe": [MIX, {**MIX, "attention_bias": True, "tie_word_embeddings": True}],
    "phimoe": [MIX, {**MIX, "attention_bias": True, "lm_head_bias": True}],
    "qwen2_moe": [MOE, {**MOE, "qkv_bias": False, "mlp_only_layers": [0], "decoder_sparse_step": 2,
                        "shared_expert_intermediate_size": 40, "head_dim": 24},
                  {**MOE, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}],
    "qwen3_moe": [MOE, {**MOE, "attention_bias": True, "mlp_only_layers": [1, 2], "head_dim": 24},
                  {**MOE, "decoder_sparse_step": 3}, {"num_experts": 0}],
    "olmoe": [{"num_experts": 6, "num_experts_per_tok": 2},
              {"num_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "head_dim": 16}],
    "flex_olmo": [{"num_experts": 6, "num_experts_per_tok": 2},
                  {"num_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "head_dim": 24}],
    "minimax_m2": [MIX, {**MIX, "head_dim": 24, "tie_word_embeddings": True}],
    "gpt_oss": [MIX, {**MIX, "attention_bias": False, "head_dim": 24}, {**MIX, **SLIDES}],
    "deepseek_v2": [MLA, {**MLA, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
                    {**MLA, "first_k_dense_replace": 0}],
    "deepseek_v3": [MLA, {**MLA, "q_lora_rank": None, "attention_bias": True, "tie_word_embeddings": True},
                    {**MLA, "first_k_dense_replace": 9}],
    "kimi_k2": [MLA, {**MLA, "first_k_dense_replace": 2}],
    "deepseek_v32": [{**MLA, "index_n_heads": 4, "index_head_dim": 16},
                     {**MLA, "attention_bias": True, "mlp_layer_types": ["sparse", "dense"] * 2}],
    "glm_moe_dsa": [{**MLA, "index_n_heads": 4, "index_head_dim": 16},
                    {**MLA, "index_topk_pattern": "FSFS"}, {**MLA, "index_topk_freq": 2}],
    "glm4_moe_lite": [MLA, {**MLA, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]},
                      {**MLA, "q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 3}],
    "glm4_moe": [MLA, {**MLA, "attention_bias": True, "use_qk_norm": True, "head_dim": 24},
                 {**MLA, "first_k_dense_replace": 0}],
    "dots1": [MLA, {**MLA, "attention_bias": True, "head_dim": 24, "first_k_dense_replace": 0},
              {**MLA, "max_window_layers": 2, "sliding_window": 32}],
    "ernie4_5_moe": [{"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48},
                     {"moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 0, "use_bias": True},
                     {"moe_num_experts": 6, "moe_k": 2, "moe_layer_interval": 2, "head_dim": 24,
                      "moe_layer_start_index": 0, "moe_layer_end_index": 2, "tie_word_embeddings": False}],
    "hunyuan_v1_moe": [{"num_experts": 6, "moe_topk": 2, "head_dim": 16},
                       {"num_experts": 6, "moe_topk": [2, 2, 1, 1], "head_dim": 24, "attention_bias": True}],
}  # fmt: skip
CASES = [
    pytest.param(family, values, id=f"{family}-{i}")
    for family, settings in VARIED.items()
    for i, values in enumerate(settings)
]


def _config(family: str, values: dict[str, Any]) -> dict[str, Any]:
    base = {} if values.keys() & {"n_layer", "num_layers"} else SMALL
    return {**base, **values, "model_type": family}


def _built(config: dict[str, Any]) -> Any:
    """What transformers makes of this config, without memory for its weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family = "deepseek_v3" if config["model_type"] == "kimi_k2" else config["model_type"]
    values = {k: v for k, v in config.items() if k != "model_type"}
    made = transformers.AutoConfig.for_model(family, **values)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


def _by_row(params: dict[str, int], rows: list[str]) -> dict[str, int]:
    """Every parameter of a layer goes to the row whose name is the longest beginning of its own."""
    sums = dict.fromkeys(rows, 0)
    for name, count in params.items():
        owner = [row for row in rows if name in (row, row + "_bias") or name.startswith(row + ".")]
        assert owner, f"no row for {name}"
        sums[max(owner, key=len)] += count
    return sums


def assert_equals_transformers(model: Model, built: Any) -> None:
    """Total, buffers, every matrix of every layer, and every row's name and size."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    params = {name: p.numel() for name, p in built.named_parameters()}
    assert model.total == sum(params.values())
    persistent = sum(t.numel() for name, t in built.state_dict(keep_vars=True).items() if name not in params)
    tied_copy = model.head.d_in * model.head.d_out if model.tied else 0
    assert model.buffers == persistent - tied_copy
    modules = dict(built.named_modules())
    for i, which in enumerate(model.order):
        block, prefix = model.blocks[which], f"{model.module_prefix}.{i}."
        theirs = set()
        for name, module in modules.items():
            if name.startswith(prefix) and isinstance(module, Linear | Conv1D):
                shape = module.weight.shape
                size = (shape[1], shape[0]) if isinstance(module, Linear) else (shape[0], shape[1])
                kind = "linear" if isinstance(module, Linear) else "conv1d"
                theirs.add((name.removeprefix(prefix), *size, kind, module.bias is not None))
        ours = {(r.name, r.d_in, r.d_out, r.kind, r.bias) for r in block.linears if r.kind != PARAMETER}
        assert ours == theirs
        assert {row.name: row.params for row in (*block.linears, *block.weights)} == _by_row(
            {name.removeprefix(prefix): n for name, n in params.items() if name.startswith(prefix)},
            [row.name for row in (*block.linears, *block.weights)],
        )


@pytest.mark.parametrize(("family", "values"), CASES)
def test_counts_and_names_what_transformers_builds(family: str, values: dict[str, Any]) -> None:
    """Total, matrices, names and sizes equal transformers' for settings that change shapes."""
    config = _config(family, values)
    assert_equals_transformers(from_config(config), _built(config))


@pytest.mark.parametrize("family", [f for f in VARIED if f not in ("kimi_k2", "gpt_neo")])
def test_slides_where_transformers_slides(family: str) -> None:
    """Each layer's window is the one that transformers' own config gives it."""
    transformers = pytest.importorskip("transformers")
    for values in VARIED[family]:
        config = _config(family, values)
        theirs = transformers.AutoConfig.for_model(**config)
        window = getattr(theirs, "sliding_window", None) or None
        typed = getattr(theirs, "layer_types", None) or []
        if not typed:  # without layer types the window holds everywhere
            typed = ["sliding_attention"] * theirs.num_hidden_layers
        expected = [window if kind == "sliding_attention" else None for kind in typed]
        model = from_config(config)
        mixers = [model.blocks[i].mixer for i in model.order]
        assert [getattr(mixer, "window", None) for mixer in mixers] == expected


def test_every_reading_of_a_matrix_names_one_of_its_block() -> None:
    """`reads`, `q`, `k` and `v` name matrices of the same block, or the layer's input."""
    for family, settings in VARIED.items():
        for block in from_config(_config(family, settings[-1])).blocks:
            names = {"in", *(row.name for row in block.linears)}
            for row in block.linears:
                assert set(row.reads) <= names - {row.name}, (family, row)
            assert block.mixer is not None
            assert {*block.mixer.q, *block.mixer.k, *block.mixer.v} <= names  # type: ignore[union-attr]


def test_parallel_residual_layers_read_only_the_input() -> None:
    """Where attention and MLP run side by side the MLP does not wait for attention's output."""
    parallel = {"phi": "mlp.fc1", "cohere": "mlp.up_proj", "gptj": "mlp.fc_in", "falcon": "mlp.dense_h_to_4h"}
    for family, name in parallel.items():
        rows = from_config(_config(family, VARIED[family][0])).blocks[0].linears
        assert next(row for row in rows if row.name == name).reads == ("in",)
    rows = from_config(_config("llama", {})).blocks[0].linears
    up = next(row for row in rows if row.name == "mlp.up_proj")
    assert up.reads == ("in", "self_attn.o_proj")


def test_expert_rewriting_is_peft_s() -> None:
    """The scheme by which peft maps old expert names is the one in peft's own table."""
    peft = pytest.importorskip("peft.utils.transformers_weight_conversion")
    patterns, known = peft._MODEL_TO_CONVERSION_PATTERN, peft._MOE_TARGET_MODULE_MAPPING
    for family, settings in VARIED.items():
        model = from_config(_config(family, settings[0]))
        pattern = patterns.get("deepseek_v3" if family == "kimi_k2" else family, "")
        assert model.peft_experts == (pattern if pattern in known else ""), family


def test_default_targets_are_peft_s() -> None:
    """What peft adapts unasked is what its mapping says, and nothing where its rewriting empties the list."""
    constants = pytest.importorskip("peft.utils.constants")
    mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for family, settings in VARIED.items():
        model = from_config(_config(family, settings[0]))
        expected = () if model.peft_experts else tuple(mapping.get(family, ()))
        assert model.peft_default == expected, family


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_real_models_equal_the_facts(row: dict[str, str]) -> None:
    """Total, every group, active and multiplied parameters of real models, exactly."""
    entry = json.loads((CONFIGS / f"{row['name']}.json").read_text())
    model = from_config(entry["config"], name=row["name"])
    counted = {**model.groups, "total": model.total, "active": model.active}
    counted |= {"gemm_active": model.matmul_active, "buffers": model.buffers}
    assert counted == {key: int(row[key]) for key in (*GROUPS, "total", "active", "gemm_active", "buffers")}


def test_every_shipped_model_says_where_it_comes_from() -> None:
    """Each file of data/models has the hub's name, a source, a date and a known model_type."""
    for path in CONFIGS.glob("*.json"):
        entry = json.loads(path.read_text())
        assert "/" in entry["hub_id"], path
        assert entry["source"], path
        assert entry["as_of"], path
        assert entry["config"]["model_type"] in BY_MODEL_TYPE, path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 16}, "num_key_value_heads"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 16}, "hidden_size"),
        ({"model_type": "gpt_neox", "hidden_size": 100, "num_attention_heads": 16}, "hidden_size"),
        ({"model_type": "qwen3", "num_hidden_layers": 4, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gpt_oss", "num_hidden_layers": 1, "layer_types": [["x"]]}, "layer_types"),
        ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": -3}, "num_hidden_layers"),
        ({"model_type": "dots1"}, "n_routed_experts"),
        ({"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 5}, "hidden_size"),
        ({"model_type": "gpt_neo", "num_layers": 4, "attention_types": [["global", 4]]}, "attention_types"),
        ({"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": [9]}, "moe_topk"),
        ({"model_type": "glm_moe_dsa", "indexer_types": ["full"]}, "indexer_types"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gemma", "head_dim": "256"}, "head_dim"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers"),
    ],
)
def test_contradictions_are_refused_by_name(config: dict[str, Any], said: str) -> None:
    """A value that no model can have raises BadInput, which names the key."""
    with pytest.raises(BadInput) as caught:
        from_config(config)
    assert said in str(caught.value)


def test_an_unknown_family_names_its_neighbours_and_is_not_guessed() -> None:
    """An unknown model_type is an error with the nearest names, never one of them."""
    with pytest.raises(UnknownModelType, match="qwen3_moe"):
        from_config({"model_type": "qwen3_moee"})
