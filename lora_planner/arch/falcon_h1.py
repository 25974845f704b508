"""Falcon-H1: attention and Mamba-2 side by side in every layer, then a SwiGLU.

Source: transformers 5.23 FalconH1ForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch import mamba
from lora_planner.arch.config import Config
from lora_planner.arch.parts import gated_mlp, head_dim, heads, rms, split_attention, stack
from lora_planner.model import Block, Model

NOTE = "Attention and scan run side by side; activations and FLOPs of the scan itself are not counted."


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 4096)
    n, kv = heads(c, 32, 8)
    bias = c.flag("attention_bias", False)
    attention, mixer = split_attention(hidden, n, kv, head_dim(c, hidden, n), bias_qkv=bias, bias_out=bias)
    inner = c.optional_size("mamba_d_ssm", 1024) or c.size("mamba_expand", 2) * hidden
    shape = mamba.shape_of(
        c, hidden, inner, bias_out=c.flag("projectors_bias", False), norm=c.flag("mamba_rms_norm", False)
    )
    scan, weights, _ = mamba.mixer(hidden, shape, "mamba.")
    mlp = gated_mlp(
        hidden, c.size("intermediate_size", 14336), prefix="feed_forward.", bias=c.flag("mlp_bias", False),
        reads=("in", "self_attn.o_proj", "mamba.out_proj"),
    )  # fmt: skip
    norms = (rms("input_layernorm", hidden), rms("pre_ff_layernorm", hidden))
    return stack(
        c,
        [Block("hybrid", 0, scan + attention + mlp, norms + weights, mixer)],
        [0] * c.size("num_hidden_layers", 32, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 128000),
        final=[rms("final_layernorm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_refuses=mamba.REFUSED,
        notes=(NOTE,),
    )
