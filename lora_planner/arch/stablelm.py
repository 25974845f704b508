"""StableLM: Llama's MLP with layer norms; the 12B norms every head and runs attention and MLP side by side.

Source: transformers 5.23 StableLmForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import Q_V, gated_mlp, heads, layer_norm, split_attention, stack, whole_head_dim
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2560)
    n, kv = heads(c, 32, 32)
    dim = whole_head_dim(c, "hidden_size", hidden, n)
    parallel = c.flag("use_parallel_residual", False)
    attention, mixer = split_attention(hidden, n, kv, dim, bias_qkv=c.flag("use_qkv_bias", False))
    mlp = gated_mlp(
        hidden, c.size("intermediate_size", 6912), reads=("in",) if parallel else ("in", "self_attn.o_proj")
    )
    norms = [layer_norm("input_layernorm", hidden)]
    if not parallel:
        norms.append(layer_norm("post_attention_layernorm", hidden))
    if c.flag("qk_layernorm", False):
        norms.append(layer_norm("self_attn.q_layernorm", n * dim, bias=False))
        norms.append(layer_norm("self_attn.k_layernorm", kv * dim, bias=False))
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, tuple(norms), mixer)],
        [0] * c.size("num_hidden_layers", 32, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 50304),
        final=[layer_norm("norm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        peft_default=Q_V,
    )
