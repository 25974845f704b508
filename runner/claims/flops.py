"""Work of a training step: what torch counts on a real model with real adapters, against the closed forms."""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from calibrate.verdict import DRIFT
from lora_planner import flops
from lora_planner.arch import from_config
from lora_planner.ledger import exact
from lora_planner.method import Method, method
from lora_planner.method.targets import adapter_table
from lora_planner.record import FAILS, FINISHED, HOLDS, UNDECIDED, Plot, RunRecord, RunSpec, Series, Verdict

SENTENCE = (
    "a matrix costs LoRA 2 N^2 + 6 N r multiply-adds a token, full fine-tuning 3 N^2: a little over 2/3 at a small "
    "rank, and more than full beyond r* = P / (3 S)"
)
SOURCE = "LoRA Without Regret (2025), on compute efficiency"
PUBLISHED = (
    "2 N^2 + 6 N r against 3 N^2, slightly over 2/3; break-even at N / 6, which is 28 for 4 layers of width 128 with "
    "an MLP of 4 x 128. No wall clock was published; 6 N r are skinny products, so it is expected to be above 2/3"
)
UNIT = "rank"
METRIC = "FLOP of matrix products, forward and backward, counted by torch's FlopCounterMode"
MARGIN = 1
BREAK_EVEN = 28
RULE = (
    "holds where every count equals its closed form to the last FLOP (one matrix, all layers, whole model) and the "
    f"LoRA / full ratio of the layers passes 1 at rank {BREAK_EVEN} +- {MARGIN}; fails where not; undecided where "
    "the counter does not see the one product fewer of a frozen A. Wall clock is reported, with no bar"
)
TRAPS = (1, 8)

RANKS = (1, 14, 28, 29, 43)
N = 128
SHAPE = (2, 24)  # batch, length
CONFIG = {
    "hidden_size": N, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 4 * N, "word_embed_proj_dim": N,
    "vocab_size": 256, "max_position_embeddings": 64,
}  # fmt: skip


def specs(size: Any, runs: Sequence[RunRecord]) -> list[RunSpec]:
    return []


def counted(module: Any, **inputs: Any) -> dict[str, float]:
    """FLOP by operator of one forward and backward pass, per token."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(**inputs)[0].float().sum().backward()
    tokens = SHAPE[0] * SHAPE[1]
    return {str(op): count / tokens for op, count in counter.get_flop_counts()["Global"].items()}


def matrix(rank: int, train_a: bool = True) -> float:
    """Multiply-adds a token of one N x N matrix in the middle of a model; rank 0 is full fine-tuning."""
    import torch
    from peft import LoraConfig, get_peft_model

    module: Any = torch.nn.Sequential(torch.nn.Linear(N, N, bias=False))
    if rank:
        module = get_peft_model(module, LoraConfig(r=rank, target_modules=["0"]))
        for name, weight in module.named_parameters():
            weight.requires_grad_(weight.requires_grad and (train_a or "lora_A" not in name))
    x = torch.ones(1, *SHAPE, N, requires_grad=True)  # [0] of the output is all of it
    return sum(counted(module, input=x).values()) / 2


def model(rank: int) -> tuple[float, float]:
    """FLOP a token of the whole model, and of the layers' matrices alone where their input trains too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from runner.adapt import attach

    config = AutoConfig.for_model("opt", **CONFIG)
    bare = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        whole = attach(bare, from_config({"model_type": "opt", **CONFIG}), arm(rank), seed=0)
    everything = counted(whole, input_ids=torch.ones(SHAPE, dtype=torch.long), use_cache=False)
    x = torch.randn(*SHAPE, N, requires_grad=True)
    layers = counted(bare.get_decoder(), inputs_embeds=x, use_cache=False)
    return sum(everything.values()), sum(count for op, count in layers.items() if "bmm" not in op)


def arm(rank: int) -> Method:
    return method("lora", rank) if rank else method("full")


def expected(rank: int) -> tuple[float, float]:
    """The planner's closed forms of what `model` counts.

    whole model: `flops.train`;  layers: 3 P, or 2 P + 3 r S, times 2    [FLOP/token]
    """
    ours = from_config({"model_type": "opt", **CONFIG})
    matrices = sum(flops.matrix(row) for row in ours.linears)
    adapters = sum(sum(flops.adapter_flops(pair)) for pair in adapter_table(ours, arm(rank)).adapters)
    layers = 2 * matrices + 3 * adapters if rank else 3 * matrices
    return flops.train(ours, arm(rank), SHAPE[1], "eager", batch=SHAPE[0]).total, layers


def crossing(ratios: dict[int, float]) -> float | None:
    """The rank at which the ratio passes 1, on the straight line between its neighbours; None where it does not.

    >>> crossing({1: 0.5, 20: 0.75, 30: 1.25})
    25.0
    """
    points = sorted(ratios.items())
    for (left, below), (right, above) in pairwise(points):
        if below < 1 <= above:
            return left + (right - left) * (1 - below) / (above - below)
    return None


def wall_clock(runs: Sequence[RunRecord]) -> dict[int, float]:
    """Median step of LoRA over that of full fine-tuning, by rank: median over the shapes that have both.

    Runs compare that share base, task, batch, length, precision and device, and whose control kernel did not drift.
    """
    steps: dict[tuple[Any, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        s, seconds = run.spec, run.measured.get("step_median_s")
        calm = run.status == FINISHED and abs(run.measured.get("drift") or 0.0) <= DRIFT
        if not (seconds and calm) or s.method not in ("full", "lora"):
            continue
        if s.method == "full" or "all-linear" in s.targets:
            shape = (s.base, s.task, s.task_args, s.objective, s.micro_batch, s.accumulation, s.seq_len, s.group,
                     s.new_tokens, s.precision, s.checkpointing, s.attention, s.device, run.env.get("device"))  # fmt: skip
            steps[shape][0 if s.method == "full" else s.rank].append(float(seconds))
    found: dict[int, list[float]] = defaultdict(list)
    for by_rank in steps.values():
        for rank, some in by_rank.items():
            if rank and 0 in by_rank:
                found[rank].append(statistics.median(some) / statistics.median(by_rank[0]))
    return {rank: statistics.median(found[rank]) for rank in sorted(found)}


def verdict(runs: Sequence[RunRecord], size: str) -> Verdict:
    real, closed = ({rank: f(rank) for rank in (0, *RANKS)} for f in (model, expected))
    wrong = [f"model at rank {rank}: {real[rank]} for {closed[rank]}" for rank in real if real[rank] != closed[rank]]
    for rank in (0, *RANKS):
        count, want = matrix(rank), 2 * N * N + 6 * N * rank if rank else 3 * N * N
        if count != want:
            wrong.append(f"matrix at rank {rank}: {count} for {want}")
    ratios = {rank: real[rank][1] / real[0][1] for rank in RANKS}
    even = crossing(ratios)
    seen = matrix(8) - matrix(8, train_a=False)
    close = even is not None and abs(even - BREAK_EVEN) <= MARGIN
    status = UNDECIDED if seen != N * 8 else FAILS if wrong or not close else HOLDS
    passes = f"passes 1 at rank {even:.2f}" if even else f"does not pass 1 from there to rank {RANKS[-1]}"
    counts = (
        f"counts that differ: {'; '.join(wrong)}" if wrong else f"all {3 * len(real)} counts equal their closed forms"
    )
    sentence = f"LoRA / full is {ratios[RANKS[0]]:.3f} at rank {RANKS[0]} and {passes}; {counts}"
    wall = wall_clock(runs)
    sentence += "; wall clock " + (
        ", ".join(f"{ratio:.2f} at rank {rank}" for rank, ratio in wall.items()) or "was not measured"
    )
    control = f"with A frozen the counter finds {seen:g} multiply-adds fewer, N r are {N * 8}"
    effect = None if even is None else exact(even, UNIT)
    x = tuple(float(rank) for rank in RANKS)
    series = [Series("closed form", x, tuple(closed[rank][1] / closed[0][1] for rank in RANKS)),
              Series("counted", x, tuple(ratios.values()), style="points")]  # fmt: skip
    if wall:
        series.append(Series("wall clock", tuple(map(float, wall)), tuple(wall.values()), style="points"))
    plot = Plot("Cost of a LoRA step", "rank", "LoRA / full", tuple(series))
    return Verdict("C02", status, sentence, effect, 3 * len(real), control=control, plot=plot)
