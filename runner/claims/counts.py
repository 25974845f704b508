"""Adapter sizes: the paper's table and the hosted trainer's counts per rank follow from the shapes of the matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_planner.ledger import exact
from lora_planner.method import method
from lora_planner.method.targets import adapter_table
from lora_planner.model_source import load_model
from lora_planner.params import trainable_params
from lora_planner.record import FAILS, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict

SENTENCE = (
    "LoRA trains r (d_in + d_out) parameters a matrix; the published sizes follow, with the unembedding adapted too"
)
SOURCE = "LoRA Without Regret (2025), table of sizes, Llama-3.1-8B; tinker-cookbook hyperparam_utils (August 2026)"
PUBLISHED = (
    "0.49B (MLP, rank 256), 0.25B (attention, 256), 0.70B (all, 256), 0.24B (MLP, 128), 3M (all, 1); "
    "per rank the integers of TINKER. A counter by others takes attention matrices as square: 2.82M at rank 1"
)
UNIT = "parameters per rank"
METRIC = "trainable parameters as the planner counts them"
RULE = (
    "holds where every number of the paper is met within its printed rounding and every integer exactly; fails "
    "where one is not; undecided where one of the four numbers in billions is met without the unembedding too, which then tells nothing"
)
TRAPS = (8, 12)

#: targets, rank, parameters as printed, and one unit of the last printed digit
PAPER = (
    ("mlp", 256, 0.49e9, 1e7),
    ("attention", 256, 0.25e9, 1e7),
    ("all-linear", 256, 0.70e9, 1e7),
    ("mlp", 128, 0.24e9, 1e7),
    ("all-linear", 1, 3e6, 1e6),
)
#: parameters per rank of attention, MLP and unembedding; experts share their outer factor
TINKER = {
    "llama-3.1-8b": (851_968, 1_769_472, 132_352),
    "llama-3.1-70b": (4_096_000, 8_847_360, 136_448),
    "qwen3-30b-a3b": (835_584, 14_450_688, 153_984),
    "gpt-oss-20b": (497_664, 6_842_880, 203_968),
    "deepseek-v3": (2_440_000, 94_307_328, 136_448),
    "nemotron-3-nano-30b-a3b": (584_832, 11_346_176, 133_760),
}
GROUPS = (("attn", "ssm"), ("mlp_dense", "shared", "latent", "experts"), ("lm_head",))


def specs(size: Any, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return []


def paper_count(targets: str, rank: int, unembed: bool = True) -> int:
    """Parameters of these targets on Llama-3.1-8B.

    >>> paper_count("all-linear", 1)
    2753792
    """
    chosen = (targets, "unembed") if unembed else (targets,)
    return trainable_params(load_model("llama-3.1-8b"), method("lora", rank, targets=chosen))


def per_rank(name: str) -> tuple[int, ...]:
    """Parameters at rank 1 of attention, MLP and unembedding, adapted as the hosted trainer does."""
    adapters = adapter_table(load_model(name), method("lora", 1, targets=("tinker", "unembed"))).adapters
    return tuple(sum(a.a_params + a.b_params for a in adapters if a.linear.group in group) for group in GROUPS)


def missed(unembed: bool = True) -> list[str]:
    """The paper's numbers that do not come out."""
    counts = [(row, paper_count(row[0], row[1], unembed)) for row in PAPER]
    return [f"{targets} r{rank} has {count:,} for {printed:,.0f}"
            for (targets, rank, printed, unit), count in counts if abs(count - printed) > unit / 2]  # fmt: skip


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    wrong = missed() + [f"{name} has {per_rank(name)} for {want}" for name, want in TINKER.items()
                        if per_rank(name) != want]  # fmt: skip
    without, telling = len(missed(unembed=False)), len(PAPER) - 1  # "3M" is met either way
    status = UNDECIDED if without < telling else FAILS if wrong else HOLDS
    n = len(PAPER) + sum(map(len, TINKER.values()))
    sentence = f"{len(PAPER)} numbers of the paper and {n - len(PAPER)} counts per rank were counted again"
    sentence += f"; not met: {'; '.join(wrong)}" if wrong else ": all are met"
    control = f"without the unembedding {without} of the {telling} numbers in billions are missed"
    return Verdict("C01", status, sentence, exact(paper_count("all-linear", 1), UNIT), n, control=control)
