"""GPT-2 and SantaCoder/StarCoder (gpt_bigcode): learned positions, fused q, k, v.

GPT-2 stores its matrices as Conv1D, transposed; gpt_bigcode as Linear, with one key head.

Source: transformers 5.23 GPT2LMHeadModel, GPTBigCodeForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import fused_attention, layer_norm, plain_mlp, stack, whole_head_dim
from lora_planner.model import CONV1D, LINEAR, Block, Model, Weight


def build(c: Config) -> Model:
    bigcode = c.text("model_type", "gpt2") == "gpt_bigcode"
    kind = LINEAR if bigcode else CONV1D
    hidden = c.size("hidden_size", 768, "n_embd")
    n = c.size("num_attention_heads", 12, "n_head", high=4096)
    dim = whole_head_dim(c, "n_embd", hidden, n)
    if c.flag("add_cross_attention", False):
        raise c.reject("add_cross_attention", "false: the planner counts decoders only")
    kv = 1 if bigcode and c.flag("multi_query", True) else n
    attention, mixer = fused_attention(
        hidden, n, kv, dim,
        qkv="attn.c_attn", out="attn.c_proj", bias_qkv=True, bias_out=True, kind=kind,
        # GPT-2's dropout in the scores has no fused kernel
        math_only=c.number("attn_pdrop", 0.1) > 0,
    )  # fmt: skip
    mlp = plain_mlp(
        hidden,
        c.size("n_inner", 4 * hidden),
        ("mlp.c_fc", "mlp.c_proj"),
        kind=kind,
        reads=("in", "attn.c_proj"),
    )
    norms = (layer_norm("ln_1", hidden), layer_norm("ln_2", hidden))
    positions = c.size("max_position_embeddings", 1024, "n_positions")
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 12, "n_layer", high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 50257),
        final=[Weight("wpe", positions * hidden, "embed"), layer_norm("ln_f", hidden)],
        tied=c.flag("tie_word_embeddings", True),
        embed="wte",
        module_prefix="transformer.h",
        peft_default=("c_attn",),
    )
