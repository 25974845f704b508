"""Memory of full training in Megatron-Core: tensors of one GPU under tensor, pipeline, context and expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from lora_planner.activations import BF16, FP32
from lora_planner.ledger import DERIVED, EXACT, Ledger, Term
from lora_planner.model import Attention, Block, Model


@dataclass(frozen=True, slots=True)
class Layout:
    """Megatron's: GPUs that share the matrices of a layer, the layers, the sequence, the experts; `data` copies of the
    rest; `waiting`: micro-batches of a step, of which a stage holds as many as stages come after it, and its own."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    waiting: int = 1


def megatron(model: Model, *, micro_batch: int, seq_len: int, layout: Layout, recompute: bool = False) -> Ledger:
    """Tensors of full training on one GPU of the fullest stage, with the distributed optimizer.

        parameters of the stage   2 B, and 4 B of fp32 gradients that stay
        states                    12 B over data * context copies (experts: over their own copies)
        a layer and a token       bf16, all over tensor (sequence parallel):
                                  norms' inputs 2 H each, inputs of matrices, q, k, v, what the activation reads
        logits                    (2 + 4) T V on the last stage

    Source: Megatron-Core with Transformer Engine's fused norms and attention, no bias, no dropout.

    >>> from lora_planner.arch import from_config
    >>> small = from_config({"model_type": "llama", "num_hidden_layers": 4})
    >>> whole, half = (megatron(small, micro_batch=1, seq_len=4096, layout=Layout(n)).total for n in (1, 2))
    >>> whole / half
    2.0
    """
    stages = min(layout.pipeline, model.layers)
    tokens = micro_batch * -(-seq_len // layout.context)
    each = (_stage(model, tokens, layout, stages, i, recompute) for i in range(stages))
    return max(each, key=lambda ledger: ledger.total)


def _stage(model: Model, tokens: int, w: Layout, stages: int, index: int, recompute: bool) -> Ledger:
    """The stage that has the `index`-th share of the layers."""
    first, last = (model.layers * (index + i) // stages for i in (0, 1))
    blocks = [model.blocks[kind] for kind in model.order[first:last]]
    rows = [row for block in blocks for row in block.linears]
    experts = sum(row.params for row in rows if row.group == "experts") / w.expert
    rest = sum(row.params for row in rows if row.group != "experts")
    rest += model.embed.params if index == 0 else 0
    rest += model.head.params if index == stages - 1 and not (model.tied and stages == 1) else 0
    other = rest / w.tensor
    copies = w.data * w.context
    own = max(1.0, copies * w.tensor / w.expert)  # GPUs that hold the same experts
    held = min(stages - index, w.waiting)
    kept = sum(_megatron_layer(block) for block in blocks) / w.tensor
    terms = [
        Term("weights", BF16 * (other + experts), EXACT, "megatron.megatron"),
        Term("gradients", FP32 * (other + experts), DERIVED, "megatron.megatron"),
        Term("optimizer states", 3 * FP32 * (other / copies + experts / own), DERIVED, "megatron.megatron"),
    ]
    if recompute:
        store = BF16 * model.hidden_size * len(blocks) / w.tensor
        terms.append(Term("checkpoints", store * tokens * held, DERIVED, "memory.checkpoint_store"))
        terms.append(Term("one layer", kept * tokens / max(1, len(blocks)), DERIVED, "megatron.megatron"))
    else:
        terms.append(Term("layers", kept * tokens * held, DERIVED, "megatron.megatron"))
    if index == stages - 1:
        logits = (BF16 + FP32) * tokens * model.vocab_size / w.tensor
        terms.append(Term("logits", logits, DERIVED, "megatron.megatron"))
    return Ledger("memory", "B", terms, f"one GPU, stage {index + 1} of {stages}")


def _megatron_layer(block: Block) -> float:
    """Bytes of a token that one layer keeps."""
    total = sum(float(BF16 * weight.width) for weight in block.weights if weight.width)
    read: dict[tuple[tuple[str, ...], int, int], float] = {}
    names = {row.name for row in block.linears if row.group in ("mlp_dense", "shared", "experts")}
    for row in block.linears:
        times = row.used if row.group == "experts" else 1
        read[row.reads, row.d_in, times] = float(BF16 * row.d_in * times)
        if row.name in names and not set(row.reads) & names:
            total += BF16 * row.d_out * times  # gate and up
        elif row.group == "experts":
            total += BF16 * row.d_out * times  # weighted by the router
    if isinstance(block.mixer, Attention):
        m = block.mixer
        total += BF16 * (m.heads * m.qk_head_dim + m.kv_heads * (m.qk_head_dim + m.v_head_dim)) + FP32 * m.heads
    return total + sum(read.values())
