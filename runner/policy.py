"""Policy gradient on verifiable rewards: sample a group of answers a prompt, and push towards the better half.

    advantage = reward - mean reward of the prompt's group
    loss = - sum over tokens (p_learner / p_sampler) advantage / sampled tokens

No division by the group's spread, no clipping, no KL term. Sampling at temperature 1 with the weights of the
moment, one update a batch: the ratio is 1 but for rounding, and its gradient is that of log p_learner.
Source: Schulman et al. 2025, "LoRA Without Regret", thinkingmachines.ai/blog/lora, its RL experiments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lora_planner.errors import BadInput
from lora_planner.record import RunSpec
from runner.tasks import IGNORED, Sample, Task


def binary_entropy(p: float) -> float:
    """Bits in one answer that is right with probability p.

        H_b(p) = - p log2 p - (1 - p) log2 (1 - p)

    Source: Shannon 1948, "A Mathematical Theory of Communication", sec. 6.

    >>> binary_entropy(0.5), binary_entropy(1.0)
    (1.0, 0.0)
    """
    return sum(q * math.log2(1 / q) for q in (p, 1 - p) if q > 0)


def reward_bits(success: Sequence[float], group: int) -> float:
    """Most that a step's 0 or 1 rewards can tell the weights: G answers a prompt, each of at most H_b bits.

        sum over prompts G H_b(p)     [bits]

    p is the share of right answers in the prompt's group: one that is all right or all wrong tells nothing.
    Source: derived; the paper's own bound is the coarser one bit an answer.

    >>> reward_bits([0.5, 0.0, 1.0], group=8)
    8.0
    """
    return group * sum(binary_entropy(p) for p in success)


def prompt_of(sample: Sample) -> list[int]:
    """What the policy sees: all before the first label."""
    return [token for token, label in zip(sample.tokens, sample.labels, strict=True) if label == IGNORED]


def answer_of(sample: Sample) -> list[int]:
    return [label for label in sample.labels if label != IGNORED]


def inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability passes `uniform`: a sample at temperature 1 per row.

    One number a token is all the chance there is, so rows may be split into micro-batches at will.

    >>> inverse_cdf(torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.tensor([0.7])).tolist()
    [1]
    """
    cumulative = logits.double().softmax(-1).cpu().cumsum(-1)
    found = torch.searchsorted(cumulative, uniform.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp_(max=logits.shape[-1] - 1).to(logits.device)


def policy_loss(
    learner: torch.Tensor, sampler: torch.Tensor, rewards: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, float]:
    """(the module's loss over `tokens` sampled in the whole step, the largest ratio).

    Log-probabilities [prompts, G, new tokens] in fp32, rewards [prompts, G]; the sampler's are constants.
    """
    advantage = rewards - rewards.mean(1, keepdim=True)
    ratio = (learner - sampler).exp()
    return -(ratio * advantage[..., None]).sum() / tokens, float(ratio.detach().max())


class PolicyGradient:
    """The RL objective of the training loop. A step depends on the weights, the seed and its number alone."""

    def __init__(self, spec: RunSpec, model: Any, task: Task, device: torch.device,
                 autocast: Callable[[], AbstractContextManager[Any]]) -> None:  # fmt: skip
        self.spec, self.model, self.task, self.device, self.autocast = spec, model, task, device, autocast
        if spec.group < 2:
            raise BadInput(f"a group of {spec.group} has zero advantage", "group",
                           "Sample each prompt at least twice; 8 to 32 are usual.")  # fmt: skip
        if task.reward is None:
            raise BadInput(f"the task {task.name} has no reward", "task", "Use arithmetic, or train it supervised.")
        self.reward = task.reward
        if not task.train or not task.held_out:
            raise BadInput(f"the task {task.name} has no prompts", "data", "Give more.")
        if spec.batch > len(task.train):
            raise BadInput(f"{spec.batch} prompts a step, the task has {len(task.train)}", "micro_batch, accumulation",
                           "Take fewer: a prompt comes up once a step.")  # fmt: skip
        both = task.train + task.held_out
        if len({len(prompt_of(s)) for s in both}) > 1:
            raise BadInput(f"prompts of {task.name} differ in length", "data", "Make them equally long.")
        if wrong := {len(answer_of(s)) for s in both} - {spec.new_tokens}:
            raise BadInput(f"answers have {min(wrong)} tokens, new_tokens is {spec.new_tokens}", "new_tokens",
                           "They must agree, or no answer can be right.")  # fmt: skip

    def log_probs(self, tokens: torch.Tensor) -> torch.Tensor:
        """log p of the last `new_tokens` tokens of each row, fp32 whatever the precision of the forward pass."""
        n = self.spec.new_tokens
        with self.autocast():
            logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=n + 1).logits
        chosen: torch.Tensor = logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, -n:, None])[..., 0]
        return chosen

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sample], uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """G answers a prompt: rows of prompt and answer, and log p of each new token as it was sampled.

        `uniform` is [prompts * G, new tokens]. No key-value cache: the answers are a few tokens.
        """
        rows = [prompt_of(s) for s in prompts for _ in range(self.spec.group)]
        tokens = torch.tensor(rows, device=self.device)
        sampled = []
        for t in range(self.spec.new_tokens):
            with self.autocast():
                logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            new = inverse_cdf(logits, uniform[:, t])[:, None]
            sampled.append(logits.log_softmax(-1).gather(-1, new))
            tokens = torch.cat([tokens, new], 1)
        return tokens, torch.cat(sampled, 1)

    def backward(self, step: int) -> tuple[float, int, int, dict[str, float]]:
        """Sample, score, and leave the step's gradients: (loss, sampled tokens, tokens computed, facts)."""
        spec, n = self.spec, self.spec.new_tokens
        generator = torch.Generator().manual_seed((spec.seed << 20) + step)
        drawn = torch.randperm(len(self.task.train), generator=generator)[: spec.batch].tolist()
        uniform = torch.rand(spec.batch * spec.group, n, generator=generator)
        sampled = spec.batch * spec.group * n
        loss, padded, ratio, success = 0.0, 0, 0.0, []
        for start in range(0, spec.batch, spec.micro_batch):
            prompts = [self.task.train[i] for i in drawn[start : start + spec.micro_batch]]
            shape = (len(prompts), spec.group)
            at = start * spec.group
            tokens, sampler = self.sample(prompts, uniform[at : at + len(prompts) * spec.group])
            answers = tokens[:, -n:].tolist()
            scores = [self.reward(prompts[i // spec.group], answer) for i, answer in enumerate(answers)]
            rewards = torch.tensor(scores, device=self.device).reshape(shape)
            part, largest = policy_loss(
                self.log_probs(tokens).reshape(*shape, n), sampler.reshape(*shape, n), rewards, sampled
            )
            part.backward()
            loss += float(part.detach())
            padded += tokens.numel()
            ratio = max(ratio, largest)
            success += rewards.mean(1).tolist()
        facts = {
            "reward": sum(success) / len(success),
            "reward_bits": reward_bits(success, spec.group),
            "constant_groups": sum(p in (0.0, 1.0) for p in success),
            "ratio_max": ratio,
        }
        return loss, sampled, padded, facts

    @torch.no_grad()
    def evaluate(self) -> float:
        """Expected reward on held-out prompts, exactly and without sampling.

        mean over prompts of the product over the answer's tokens of p(token | prompt, answer so far)
        """
        rows = [[*prompt_of(s), *answer_of(s)] for s in self.task.held_out]
        size = self.spec.micro_batch * self.spec.group
        total = 0.0
        for start in range(0, len(rows), size):
            tokens = torch.tensor(rows[start : start + size], device=self.device)
            total += float(self.log_probs(tokens).sum(1).exp().sum())
        return total / len(rows)

    def longest(self) -> list[str]:
        """Ids of one micro-batch: all prompts are equally long."""
        return [s.id for s in self.task.train[: self.spec.micro_batch]]
