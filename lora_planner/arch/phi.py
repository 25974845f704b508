"""Phi-1, 1.5, 2: attention and MLP side by side on one norm, biases everywhere, the head included.

Source: transformers 5.23 PhiForCausalLM.
"""

from __future__ import annotations

from lora_planner.arch.config import Config
from lora_planner.arch.parts import head_dim, heads, layer_norm, plain_mlp, split_attention, stack
from lora_planner.model import Block, Model


def build(c: Config) -> Model:
    hidden = c.size("hidden_size", 2048)
    n, kv = heads(c, 32)
    dim = head_dim(c, hidden, n)
    attention, mixer = split_attention(hidden, n, kv, dim, out="dense", bias_qkv=True, bias_out=True)
    mlp = plain_mlp(hidden, c.size("intermediate_size", 8192), ("mlp.fc1", "mlp.fc2"), reads=("in",))
    norms = [layer_norm("input_layernorm", hidden)]
    if c.flag("qk_layernorm", False):
        norms.append(layer_norm("self_attn.q_layernorm", n * dim, params=hidden // n))
        norms.append(layer_norm("self_attn.k_layernorm", kv * dim, params=hidden // n))
    return stack(
        c,
        [Block("decoder", 0, attention + mlp, tuple(norms), mixer, activation_gated=False)],
        [0] * c.size("num_hidden_layers", 24, high=4096),
        hidden=hidden,
        vocab=c.size("vocab_size", 51200),
        final=[layer_norm("final_layernorm", hidden)],
        tied=c.flag("tie_word_embeddings", False),
        head_bias=True,
        peft_default=("q_proj", "v_proj", "fc1", "fc2"),
    )
