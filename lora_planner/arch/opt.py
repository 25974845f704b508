"""OPT: learned positions (two more than the context), biases, a post-norm 350m with narrow embeddings.

Source: transformers 5.23 OPTForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import Q_V, layer_norm, plain_mlp, split_attention, stack, whole_head_dim
from lora_planner.model import Block, Linear, Model, Weight


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 768)
    n = c.size("num_attention_heads", 12, high=4096)
    dim = whole_head_dim(c, "hidden_size", hidden, n)
    bias = c.flag("enable_bias", True)
    affine = c.flag("layer_norm_elementwise_affine", True)
    width = c.size("word_embed_proj_dim", hidden)

    def norm(name: str) -> Weight:
        return layer_norm(name, hidden) if affine else Weight(name, 0, "norm", hidden, "layer")

    attention, mixer = split_attention(hidden, n, n, dim, out="out_proj", bias_qkv=bias, bias_out=bias)
    mlp = plain_mlp(hidden, c.size("ffn_dim", 3072), ("fc1", "fc2"), bias=bias, reads=("in", "self_attn.out_proj"))
    norms = (norm("self_attn_layer_norm"), norm("final_layer_norm"))
    positions = c.size("max_position_embeddings", 2048) + 2  # the first two are for padding
    final = [Weight("embed_positions", positions * hidden, "embed")]
    if c.flag("do_layer_norm_before", True) and not c.flag("_remove_final_layer_norm", False):
        final.append(norm("final_layer_norm"))
    ends: tuple[Linear, ...] = ()
    if width != hidden:
        ends = (
            Linear("model.decoder.project_out", hidden, width, group="other"),
            Linear("model.decoder.project_in", width, hidden, group="other"),
        )
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, norms, mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 12, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 50272),
        final=final,
        tied=c.flag("tie_word_embeddings", True),
        embed_width=width,
        extra_linears=ends,
        module_prefix="model.decoder.layers",
        peft_default=Q_V,
    )
