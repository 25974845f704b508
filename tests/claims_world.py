"""A planted world in place of training: runs whose losses follow a law that the tests know.

    loss(step) = start - fall ln(1 + step) + behind(arm, step) + curvature ln(rate / best)^2 + noise

`noise` has a part that all arms of a seed share and a smaller one of each arm's own; the arm's own also moves its best
rate, as does its rank, but not before the short step. A rate above `ceiling` times the best one diverges. The default law is the paper's; a contrary world is a
`replace` of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from lora_planner.arch import from_config
from lora_planner.model import Model
from lora_planner.params import trainable_params
from lora_planner.record import DIVERGED, FINISHED, Json, RunRecord, RunSpec
from runner.base import RECIPES, hf_config
from runner.claims import lab, memorised_bits

STAMP = "-0123456789ab"
ALPHABET = 2000


@dataclass(frozen=True)
class Law:
    """What is planted. Rates are relative to the middle of full fine-tuning's grid, times of runs to their length."""

    # best rates
    ratio: float = 10.0
    rank_power: float = 0.0  # of the best rate, from rank 4 up
    rank_one: float = 0.7
    alpha_power: float = -0.6  # of alpha / 32
    short_full: float = 1.4  # best rate at the short step over that at the last one
    short_lora: float = 2.1
    full_curvature: float = 0.12
    lora_curvature: float = 0.04
    short_curvature: float = 1.0  # curvature up to the short step over that at the last one
    ceiling: float = 9.0
    # losses
    start: float = 3.5
    fall: float = 0.2
    by_share: bool = False  # the fall counts the share of the run instead of its steps
    leaves: float = 0.1  # share of the run after which rank 1 leaves
    leaves_second: float = 0.75  # the same of the second highest rank
    slower: float = 0.08
    lora_behind: float = 0.0
    early: float = 0.0  # nats by which lower ranks differ in the first steps
    doubling: tuple[float, float] = (0.03, 0.03)  # nats a doubling of the batch, to rank 16 and above
    attention: float = 0.05
    everywhere: float = -0.006
    halves: tuple[float, float] = (0.03, 0.02)  # of attention, of the MLP: nats above the whole
    experts: float = 0.0
    no_experts: float = 0.05
    tiny: float = 0.3  # share of the supervised gain that the smallest adapters reach
    # rewards
    reward: float = 0.3
    gain: float = 0.4
    ratio_rewards: float = 8.0
    rank_one_rewards: float = 0.0
    lora_rewards: float = 1.0  # share of the gain that LoRA reaches in rewards, from rank 1 up
    tiny_rewards: float = 0.9
    # memory, norms, updates, kernels
    bits: float = 2.2
    bits_rate: float = memorised_bits.RATES[1]  # which holds most; half or twice the rate a seventh less
    bits_random: float = 1.0
    grown: float = 0.03
    bits_noise: float = 0.02
    norm: float = 2.0
    norm_power: float = 0.5
    norm_noise: float = 0.03
    directions: float = 2.0
    directions_facts: float = 13.0
    directions_noise: float = 0.02
    unlike: tuple[float, ...] = (1.0, 0.5, 0.2, 2.0, 0.7)  # how far kernels of PLACES are from full's
    # noise
    seed_noise: float = 0.02
    noise: float = 0.0005
    rate_noise: float = 0.02
    curvature_noise: float = 0.0


PAPER = Law()
PLACES = (("attention",), ("mlp",), ("all-linear",), ("k_proj", "q_proj"), ("gate_proj", "up_proj"))


@cache
def model(base: str) -> Model:
    recipe = RECIPES[base]
    return from_config(hf_config(recipe, recipe.vocab))


@cache
def parameters(design: RunSpec) -> int:
    return trainable_params(model(design.base), design.plan_method())


@cache
def gauss(*words: Any) -> float:
    """A standard normal number that depends on nothing but the words."""
    return random.Random("|".join(map(str, words))).gauss(0, 1)


@dataclass(frozen=True)
class Planet:
    """A law on one size of model."""

    law: Law
    size: lab.Size

    def windows(self) -> int:
        return self.size.steps * self.size.micro_batch

    def earlier(self, step: int) -> float:
        """How far before the end a step lies, in the log of the steps: 0 at the last one, 1 at the short one."""
        return math.log(self.size.steps / max(step, 1)) / math.log(self.size.steps / self.size.short)

    def log_best(self, spec: RunSpec, step: int) -> float:
        law, size = self.law, self.size
        hidden = RECIPES[spec.base].hidden / RECIPES[size.base].hidden
        earlier = self.earlier(step)
        if smallest(spec):
            return math.log(1.6e-2) + law.rate_noise * gauss("rate", arm_of(spec), spec.seed)
        found = math.log(size.full_rates[2] / hidden) + math.log(spec.micro_batch / size.micro_batch) / 2
        if spec.method == "full":
            found += math.log(law.short_full) * earlier
            own = 0.0
        else:
            found += (
                math.log(law.ratio) + math.log(law.short_lora) * earlier + law.alpha_power * math.log(spec.alpha / 32)
            )
            own = math.log(law.rank_one) if spec.rank == 1 else law.rank_power * math.log(max(spec.rank, 4) / 4)
        own += law.rate_noise * gauss("rate", arm_of(spec), spec.seed)
        return found + own * min(1.0, max(0.0, 1 - earlier))

    def behind(self, spec: RunSpec, step: int) -> float:
        """Nats above full fine-tuning at this arm's best rate."""
        law, size = self.law, self.size
        if spec.method == "full":
            return 0.0
        if spec.base == size.moe:
            return law.experts + (law.no_experts if spec.experts == "none" else 0.0)
        if spec.method == "lora-fa" or spec.init == "random" or spec.task_args:
            return 0.3
        if spec.targets in PLACES:
            attention, mlp = law.halves
            return (law.attention, 0.0, law.everywhere, law.attention + attention, mlp)[PLACES.index(spec.targets)]
        second = math.log(size.ranks[-2])
        leaves = law.leaves * (law.leaves_second / law.leaves) ** (math.log(spec.rank) / second)
        seen = step * spec.micro_batch / self.windows()
        found = law.slower * max(0.0, math.log(seen / leaves)) if seen and spec.rank != size.ranks[-1] else 0.0
        found += law.early if spec.rank != size.ranks[-1] and step else 0.0
        doublings = math.log2(spec.micro_batch / size.micro_batch)
        return found + law.lora_behind + doublings * law.doubling[spec.rank > 16]

    def loss(self, spec: RunSpec, step: int) -> float:
        law = self.law
        if not step:
            return law.start
        noise = law.seed_noise * gauss("seed", spec.seed) + law.noise * gauss("arm", arm_of(spec), spec.seed, step)
        seen = self.size.steps * step / spec.steps if law.by_share else step
        whole = law.fall * math.log(1 + seen)
        behind = (1 - law.tiny) * whole if smallest(spec) else self.behind(spec, step)
        off = math.log(spec.lr) - self.log_best(spec, step)
        curvature = law.full_curvature if spec.method == "full" else law.lora_curvature
        curvature *= math.exp(law.curvature_noise * gauss("curvature", arm_of(spec), spec.seed))
        curvature *= math.pow(law.short_curvature, min(1.0, self.earlier(step)))
        return law.start - whole + behind + curvature * off**2 + noise

    def reward(self, spec: RunSpec, step: int) -> float:
        law = self.law
        if not step:
            return law.reward
        noise = law.seed_noise * gauss("seed", spec.seed) + law.noise * gauss("arm", arm_of(spec), spec.seed, step)
        reached = law.gain * math.sqrt(step / spec.steps)
        if smallest(spec):
            reached *= law.tiny_rewards
        elif spec.method != "full":
            reached *= law.lora_rewards
        off = math.log(spec.lr) - self.log_best_reward(spec)
        less = law.rank_one_rewards if spec.rank == 1 else 0.0
        return law.reward + reached - less - 0.08 * off**2 + noise

    def log_best_reward(self, spec: RunSpec) -> float:
        best = 1.6e-2 if smallest(spec) else 5e-4 * (self.law.ratio_rewards if spec.method != "full" else 1.0)
        return math.log(best) + self.law.rate_noise * gauss("rate", arm_of(spec), spec.seed)

    def facts(self, spec: RunSpec, step: int) -> float:
        """Nats per token when so many bits a parameter are held; the best rate holds all of them."""
        law, tokens = self.law, dict(spec.task_args)["n"] * dict(spec.task_args)["value_tokens"]
        held = law.bits if spec.init == "pretrained" else law.bits_random
        held *= 1 - 0.3 * math.log(spec.lr / law.bits_rate) ** 2
        held *= 1 + law.bits_noise * gauss("bits", arm_of(spec), spec.seed)
        if step < spec.steps:
            held /= 1 + law.grown
        bits = held * parameters(spec) if step else 0.0
        nats: float = math.log(2) * (math.log2(ALPHABET) - bits / tokens)
        return nats

    def measured(self, spec: RunSpec) -> tuple[str, Json]:
        """Status and record of a design, its base by its name."""
        law = self.law
        found: Json = {"trainable": parameters(spec), "task": {}}
        if spec.objective == "kernel":
            return FINISHED, found | {"kernel": self.kernel(spec)}
        value: Callable[[RunSpec, int], float]
        if spec.objective == "rl":
            value = self.reward
            found["step_facts"] = [{"reward_bits": 3.0}] * spec.steps
        elif spec.task == "facts":
            value = self.facts
            n, tokens = dict(spec.task_args)["n"], dict(spec.task_args)["value_tokens"]
            found["task"] = {"trained_tokens": n * tokens, "alphabet": ALPHABET}
        else:
            value = self.loss
        steps = [0, *spec.eval_at, spec.steps]
        status = FINISHED
        if spec.task != "facts":
            best = self.log_best_reward(spec) if spec.objective == "rl" else self.log_best(spec, spec.steps)
            if math.log(spec.lr) > best + math.log(law.ceiling):
                status, steps = DIVERGED, [0]
        found["held_out"] = [[step, value(spec, step)] for step in steps]
        found |= {"losses": [3.0] * 4, "trained_tokens": spec.steps * spec.batch * spec.seq_len, "wall_s": 8.0}
        if status == FINISHED and spec.objective == "sft" and spec.method != "full":
            found |= self.adapters(spec)
        return status, found

    def adapters(self, spec: RunSpec) -> Json:
        law = self.law
        off = 0.0 if spec.task == "facts" else math.log(spec.lr) - self.log_best(spec, spec.steps)
        grown = law.norm * math.exp(law.norm_power * off + law.norm_noise * gauss("norm", arm_of(spec), spec.seed))
        rank = law.directions_facts if spec.task == "facts" else law.directions
        rank *= math.exp(law.directions_noise * gauss("directions", arm_of(spec), spec.seed))
        names = [f"matrix {i}" for i in range(29)]
        return {
            "norms": [[name, 1.0, grown * (0.7 + 0.02 * i)] for i, name in enumerate(names)],
            "update": [[name, rank * (0.9 + 0.2 * i / 28), 1.0, 1.0] for i, name in enumerate(names)],
            "rank_one_nats": 3.0,
        }

    def kernel(self, spec: RunSpec) -> list[list[float]]:
        """That of full fine-tuning plus something of the placement's own."""
        whole = np.random.default_rng(spec.seed).standard_normal((12, 20))
        if spec.method != "full":
            place = PLACES.index(spec.targets)
            own = np.random.default_rng([spec.seed, place + 1]).standard_normal((12, 20))
            whole = whole + self.law.unlike[place] * own
        product: list[list[float]] = (whole @ whole.T).tolist()
        return product


@cache
def arm_of(spec: RunSpec) -> str:
    """What the runs of an arm share, as a word."""
    return replace(spec, lr=0.0, seed=0).key


@cache
def made(design: RunSpec) -> tuple[str, RunSpec]:
    """Key and spec of a design's run: its base gets the hash of what made it."""
    spec = replace(design, base=design.base + STAMP)
    return spec.key, spec


def smallest(spec: RunSpec) -> bool:
    """Whether this is one of the adapters below rank 1 everywhere."""
    return spec.rank == 1 and spec.targets in (("k_proj",), ("attention",))


def record(design: RunSpec, planet: Planet) -> RunRecord:
    """The run of a design."""
    status, measured = planet.measured(design)
    key, spec = made(design)
    return RunRecord(key, spec, {"hidden_size": RECIPES[design.base].hidden}, {}, status, measured=measured)


def world(wanted: Callable[[Sequence[RunRecord]], Iterable[RunSpec]], size: str = "cpu", law: Law = PAPER,
          ) -> list[RunRecord]:  # fmt: skip
    """Every run that is asked for, round by round; asking has to end within the rounds of `lab.complete`."""
    planet = Planet(law, lab.SIZES[size])
    runs: dict[RunSpec, RunRecord] = {}
    for _ in range(lab.ROUNDS):
        new = [spec for spec in dict.fromkeys(wanted(list(runs.values()))) if spec not in runs]
        if not new:
            return list(runs.values())
        runs |= {spec: record(spec, planet) for spec in new}
    raise AssertionError(f"more is asked for after {lab.ROUNDS} rounds: {new[0]}")
