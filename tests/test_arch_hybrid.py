"""Hybrid and vision-language families against transformers' own modules on the meta device."""

from __future__ import annotations

import copy
import re
from collections import Counter
from typing import Any

import pytest

from lora_planner.arch import from_config
from lora_planner.errors import BadInput
from lora_planner.model import Linear, Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
DELTA = {"head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
         "linear_value_head_dim": 12}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "shared_expert_intermediate_size": 20}  # fmt: skip
SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
QWEN_VIT = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64,
            "num_position_embeddings": 16}  # fmt: skip
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
       "image_size": 28, "patch_size": 14}  # fmt: skip
LLAMA4 = {**TEXT, "head_dim": 24, "num_local_experts": 3, "intermediate_size_mlp": 80}

#: (model_type, config)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_next", {**TEXT, **DELTA, **MOE}),
    ("qwen3_next", {**TEXT, **DELTA, **MOE, "mlp_only_layers": [0], "decoder_sparse_step": 2,
        "attention_bias": True, "full_attention_interval": 2, "tie_word_embeddings": True}),
    ("qwen3_5_text", {**TEXT, **DELTA}),
    ("qwen3_5_text", {**TEXT, **DELTA, "tie_word_embeddings": True, "linear_conv_kernel_dim": 3,
        "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]}),
    ("qwen3_5_moe_text", {**TEXT, **DELTA, **MOE, "attention_bias": True}),
    ("qwen3_5", {"text_config": {**TEXT, **DELTA}, "vision_config": QWEN_VIT, "tie_word_embeddings": True}),
    ("qwen3_5", {"text_config": {**TEXT, **DELTA, "tie_word_embeddings": True, "model_type": "qwen3_5"},
        "vision_config": {**QWEN_VIT, "patch_size": 8, "temporal_patch_size": 1}}),
    ("qwen3_5_moe", {"text_config": {**TEXT, **DELTA, **MOE}, "vision_config": {**QWEN_VIT,
        "spatial_merge_size": 1}}),
    ("nemotron_h", {**TEXT, "num_hidden_layers": 5, "hybrid_override_pattern": "ME*-M", "head_dim": 24,
        "mamba_num_heads": 4, "mamba_head_dim": 20, "n_groups": 2, "n_routed_experts": 4,
        "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 48}),
    ("nemotron_h", {**TEXT, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 20, "n_groups": 4, "n_routed_experts": 4, "moe_intermediate_size": 40,
        "moe_latent_size": 24, "mlp_bias": True, "use_bias": True, "use_conv_bias": False,
        "moe_shared_expert_intermediate_size": 48, "tie_word_embeddings": True}),
    ("granitemoehybrid", {**TEXT, **SSM, "num_local_experts": 3, "tie_word_embeddings": True, "layer_types":
        ["mamba", "attention", "mamba", "mamba"]}),
    ("granitemoehybrid", {**TEXT, **SSM, "mamba_d_head": "auto", "num_local_experts": 0, "attention_bias":
        True, "mamba_conv_bias": False, "mamba_proj_bias": True, "shared_intermediate_size": 72,
        "layer_types": ["attention"] * 4}),
    ("granitemoehybrid", {**TEXT, **SSM, "num_local_experts": 2}),
    ("bamba", {**TEXT, **SSM, "attn_layer_indices": [1, 3]}),
    ("bamba", {**TEXT, **SSM, "mlp_bias": True, "attention_bias": True, "mamba_proj_bias": True,
        "tie_word_embeddings": True, "attn_layer_indices": [0]}),
    ("mamba2", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "num_heads": 8, "head_dim": 16,
        "n_groups": 2, "state_size": 8}),
    ("mamba2", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "num_heads": 4, "head_dim": 16,
        "expand": 1, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "n_groups": 1}),
    ("llama4_text", LLAMA4),
    ("llama4_text", {**LLAMA4, "interleave_moe_layer_step": 2, "attention_bias": True,
        "tie_word_embeddings": True, "use_qk_norm": False}),
    ("llama4_text", {**LLAMA4, "moe_layers": [2], "no_rope_layers": [1, 0, 1, 1]}),
    ("llama4", {"text_config": LLAMA4, "vision_config": { **VIT, "vision_output_dim": 40,
        "projector_input_dim": 40, "projector_output_dim": 40}}),
    ("llama4", {"text_config": {**LLAMA4, "tie_word_embeddings": True, "interleave_moe_layer_step": 2},
        "vision_config": {**VIT, "vision_output_dim": 48, "projector_input_dim": 40, "projector_output_dim":
        48, "patch_size": 7}}),
    ("gemma3_text", {**TEXT, "head_dim": 24}),
    ("gemma3_text", {**TEXT, "attention_bias": True, "tie_word_embeddings": False, "sliding_window_pattern":
        2}),
    ("gemma3", {"text_config": {**TEXT, "head_dim": 24}, "vision_config": {**VIT, "vision_use_head":
        False}}),
    ("gemma3", {"text_config": TEXT, "vision_config": VIT, "tie_word_embeddings": False}),
    ("qwen2_vl", {**TEXT, "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads":
        4}}),
    ("qwen2_vl", {"text_config": {**TEXT, "tie_word_embeddings": True, "use_sliding_window": True,
        "max_window_layers": 2}, "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64,
        "num_heads": 4, "mlp_ratio": 2, "in_channels": 1, "spatial_merge_size": 3}}),
    ("qwen2_5_vl", {**TEXT, "tie_word_embeddings": True, "vision_config": {**QWEN_VIT}}),
    ("qwen2_5_vl", {"text_config": TEXT, "vision_config": {**QWEN_VIT, "out_hidden_size": 64, "patch_size":
        7}}),
    ("qwen3_vl", {"text_config": {**TEXT, "head_dim": 24, "tie_word_embeddings": True}, "vision_config":
        QWEN_VIT}),
    ("qwen3_vl", {"text_config": {**TEXT, "attention_bias": True}, "tie_word_embeddings": True,
        "vision_config": {**QWEN_VIT, "deepstack_visual_indexes": [0]}}),
    ("qwen3_vl_moe", {"text_config": {**TEXT, **MOE}, "vision_config": QWEN_VIT}),
    ("qwen3_vl_moe", {"text_config": {**TEXT, **MOE, "head_dim": 24, "mlp_only_layers": [1]},
        "vision_config": {**QWEN_VIT, "deepstack_visual_indexes": []}}),
    ("falcon_h1", {**TEXT, **SSM, "mamba_d_ssm": 128}),
    ("falcon_h1", {**TEXT, **SSM, "mamba_d_head": "auto", "mamba_d_ssm": None, "mamba_rms_norm": True,
        "projectors_bias": True, "mlp_bias": True, "attention_bias": True, "head_dim": 24,
        "tie_word_embeddings": True}),
    ("lfm2", {**TEXT, "full_attn_idxs": [1]}),
    ("lfm2", {**TEXT, "block_ff_dim": 100, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.3,
        "conv_bias": True, "tie_embedding": False, "layer_types": ["conv", "full_attention", "conv",
        "conv"]}),
    ("lfm2", {**TEXT, "block_auto_adjust_ff_dim": False, "conv_L_cache": 4}),
    ("lfm2_moe", {**TEXT, **MOE, "layer_types": ["conv", "full_attention", "conv", "conv"]}),
    ("lfm2_moe", {**TEXT, **MOE, "layer_types": ["full_attention"] * 4, "num_dense_layers": 1,
        "use_expert_bias": False, "tie_word_embeddings": False}),
    ("llava", {"text_config": TEXT, "vision_config": VIT}),
    ("llava", {"text_config": {**TEXT, "model_type": "qwen2", "tie_word_embeddings": True},
        "vision_feature_layer": [-2, 0], "multimodal_projector_bias": False, "vision_config": {**VIT,
        "model_type": "siglip_vision_model"}}),
    ("llava", {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": {**VIT, "model_type":
        "pixtral"}}),
    ("llava_next", {"text_config": {**TEXT, "tie_word_embeddings": True}, "vision_config": VIT}),
    ("mistral3", {"text_config": {**TEXT, "head_dim": 24}, "vision_config": VIT}),
    ("mistral3", {"text_config": TEXT, "vision_config": VIT, "tie_word_embeddings": False,
        "spatial_merge_size": 3, "multimodal_projector_bias": True}),
    ("paligemma", {"text_config": TEXT, "vision_config": {**VIT, "vision_use_head": False},
        "projection_dim": 64}),
    ("paligemma", {"text_config": {**TEXT, "model_type": "gemma2"}, "vision_config": VIT, "projection_dim":
        56, "tie_word_embeddings": False}),
    ("internvl", {"text_config": TEXT, "vision_config": {**VIT, "image_size": [28, 42], "patch_size": [14,
        14]}}),
    ("internvl", {"text_config": {**TEXT, "model_type": "qwen3"}, "tie_word_embeddings": False,
        "downsample_ratio": 0.25, "vision_config": { **VIT, "attention_bias": True, "use_qk_norm": True,
        "use_mask_token": True, "use_mean_pooling": False, "norm_type": "rms_norm",
        "use_absolute_position_embeddings": False}}),
    ("mllama", {"text_config": {**TEXT, "pad_token_id": 0, "cross_attention_layers": [1, 3]},
        "vision_config": { **VIT, "num_global_layers": 1, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "attention_heads": 4}}),
    ("mllama", {"text_config": {**TEXT, "pad_token_id": 0, "cross_attention_layers": [],
        "tie_word_embeddings": True}, "vision_config": { **VIT, "num_global_layers": 2, "vision_output_dim":
        96, "max_num_tiles": 2, "attention_heads": 4, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "intermediate_layers_indices": [0, 1]}}),
    ("glm4v", {"text_config": TEXT, "vision_config": {**VIT, "depth": 2, "out_hidden_size": 64}}),
    ("glm4v", {"text_config": {**TEXT, "tie_word_embeddings": True}, "vision_config": { **VIT, "depth": 2,
        "out_hidden_size": 48, "attention_bias": True, "spatial_merge_size": 1}}),
    ("glm4v_moe", {"text_config": {**TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16}, "vision_config": {**VIT, "depth": 2, "out_hidden_size": 64}}),
    ("glm4v_moe", {"text_config": {**TEXT, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 24,
        "moe_intermediate_size": 16, "n_shared_experts": 2, "first_k_dense_replace": 3, "attention_bias":
        False}, "vision_config": {**VIT, "depth": 2, "out_hidden_size": 64}}),
    ("gemma3n_text", {**TEXT, "num_kv_shared_layers": 1, "pad_token_id": 0, "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "intermediate_size": [96, 96, 80, 80], "vocab_size_per_layer_input": 64, "laurel_rank": 4}),
    ("gemma3n_text", {**TEXT, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "attention_bias": True,
        "head_dim": 24, "tie_word_embeddings": False}),
]  # fmt: skip


def build(model_type: str, values: dict[str, Any]) -> Any:
    """The model that transformers makes of a config, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(model_type, **copy.deepcopy(values))
    auto = AutoModelForCausalLM if "vision_config" not in values else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto.from_config(config)


def matrices(module: Any) -> list[tuple[str, int, int, bool]]:
    """Name, d_in, d_out, bias of every nn.Linear except the unembedding."""
    return [
        (name, m.in_features, m.out_features, m.bias is not None)
        for name, m in module.named_modules()
        if isinstance(m, torch.nn.Linear) and name.rsplit(".", 1)[-1] != "lm_head"
    ]


def fits(row: Linear, name: str, d_in: int, d_out: int, bias: bool) -> bool:
    """`name` without the layer's number ends with the row's name; shapes and bias are the row's."""
    plain = re.sub(r"\.\d+\.", ".", name)
    return f".{plain}".endswith(f".{row.name}") and (row.d_in, row.d_out, row.bias) == (d_in, d_out, bias)


def check(ours: Model, theirs: Any) -> None:
    """Totals, every layer by itself, and every nn.Linear by name and shape."""
    assert ours.total == sum(p.numel() for p in theirs.parameters())
    stored = {n: t.numel() for n, t in theirs.state_dict().items()}
    parameters = {n for n, _ in theirs.named_parameters(remove_duplicate=False)}
    assert ours.buffers == sum(size for n, size in stored.items() if n not in parameters)

    layers = theirs.get_submodule(ours.module_prefix)
    assert len(layers) == ours.layers
    for layer, i in zip(layers, ours.order, strict=True):
        block = ours.blocks[i]
        rows = sum(r.params for r in block.linears) + sum(w.params for w in block.weights)
        assert rows == sum(p.numel() for p in layer.parameters()), block.kind
        expected = Counter((r.name, r.d_in, r.d_out, r.bias) for r in block.linears if r.kind == "linear")
        assert Counter(matrices(layer)) == expected
        shapes = {n.removesuffix(".weight"): p.numel() for n, p in layer.named_parameters()}
        for row in block.linears:
            if row.kind == "parameter":
                assert shapes[row.name] == row.d_in * row.d_out * row.count
        known = {r.name for r in block.linears}
        for row in block.linears:
            assert set(row.reads) <= known | {"in", "image", "earlier layer"}, row.name

    assert not {row.name for row in ours.tower} & {row.name for row in ours.linears}
    inside = {id(m) for layer in layers for m in layer.modules()}
    outside = [x for x in matrices(theirs) if id(theirs.get_submodule(x[0])) not in inside]
    hits: Counter[Linear] = Counter()
    for matrix in outside:
        found = [row for row in (*ours.tower, *ours.extra_linears) if fits(row, *matrix)]
        assert len(found) == 1, matrix
        hits[found[0]] += 1
    assert hits == Counter({row: row.count for row in (*ours.tower, *ours.extra_linears)})


@pytest.mark.parametrize(("model_type", "values"), CASES, ids=[f"{t}-{i}" for i, (t, _) in enumerate(CASES)])
def test_counts_what_transformers_builds(model_type: str, values: dict[str, Any]) -> None:
    """Total, each layer, each nn.Linear's name and shape, and the buffers equal the real modules."""
    check(from_config({"model_type": model_type, **values}), build(model_type, values))


#: families whose wrapper or class default alone is a whole model
DEFAULTS = [
    "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe", "nemotron_h",
    "granitemoehybrid", "bamba", "mamba2", "gemma3n_text", "llama4_text", "llama4", "gemma3_text", "gemma3",
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "lfm2", "llava", "llava_next", "mistral3",
    "paligemma", "internvl", "mllama", "glm4v", "glm4v_moe",
]  # fmt: skip


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_missing_key_means_the_class_default(model_type: str) -> None:
    """An empty config counts like the default config of transformers."""
    from transformers.models.auto import modeling_auto

    with_images = model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    theirs = build(model_type, {"vision_config": None} if with_images else {})
    assert from_config({"model_type": model_type}).total == sum(p.numel() for p in theirs.parameters())


def test_nemotron_ignores_the_wish_to_tie() -> None:
    """transformers keeps a separate unembedding in nemotron_h whatever the config says."""
    assert not from_config({"model_type": "nemotron_h", "tie_word_embeddings": True}).tied


def test_llama4_computes_every_expert() -> None:
    """A Llama-4 token uses top_k experts and pays for all of them."""
    model = from_config({"model_type": "llama4_text", **LLAMA4})
    rows = [r for b in model.blocks for r in b.linears if r.group == "experts"]
    assert rows
    assert all((r.count, r.used, r.computed) == (3, 1, 3) for r in rows)


@pytest.mark.parametrize("model_type", sorted({t for t, _ in CASES}))
def test_knows_what_peft_does_with_the_model_type(model_type: str) -> None:
    """Default targets, rewriting of expert names and refused modules are peft's own."""
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    from peft.utils import transformers_weight_conversion as conversion
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    values = next(v for t, v in CASES if t == model_type)
    ours = from_config({"model_type": model_type, **values})
    assert ours.peft_default == tuple(TARGETS.get(model_type, ()))
    scheme = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type, "")
    assert ours.peft_experts == (scheme if scheme in conversion._MOE_TARGET_MODULE_MAPPING else "")
    theirs = torch.nn.Module()
    theirs.config = transformers.PreTrainedConfig()
    theirs.config.model_type = model_type
    for name in ("out_proj", "conv1d", "in_proj"):
        try:
            _check_lora_target_modules_mamba(LoraConfig(), theirs, name)
        except ValueError:
            assert name in ours.peft_refuses
        else:
            assert name not in ours.peft_refuses


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"model_type": "qwen3_next", "linear_num_key_heads": 3}, "linear_num_key_heads"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "hybrid_override_pattern"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"]}, "layer_types"),
        ({"model_type": "granitemoehybrid", "mamba_d_head": 3}, "mamba_n_heads"),
        ({"model_type": "gemma3", "text_config": {"hidden_size": -1}}, "/text_config/hidden_size"),
        ({"model_type": "gemma3", "vision_config": {"model_type": "vit"}}, "/vision_config/model_type"),
        ({"model_type": "llama4", "text_config": {"num_experts_per_tok": 17}}, "num_experts_per_tok"),
        ({"model_type": "qwen3_vl", "vision_config": {"depth": "27"}}, "/vision_config/depth"),
    ],
)
def test_refuses_what_cannot_be_built(values: dict[str, Any], place: str) -> None:
    """A contradiction is a BadInput that names the place in the file."""
    with pytest.raises(BadInput, match=place):
        from_config(values)
