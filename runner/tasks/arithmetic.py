"""Sums with a verifiable answer, for RL: "3+9=" asks for (3 + 9) mod 10.

Every character is a token of its own, whatever merges the tokenizer knows. A sample holds the prompt and, as
its labels, the right answer: the reward and the held-out score read it, the policy sees the prompt alone.
RL sharpens what a base can already do and teaches nothing that it never does, so `supervised` warms one up.
"""

from __future__ import annotations

import random
from typing import Any

from lora_planner.errors import BadInput
from runner.tasks import IGNORED, Sample, Task

HELD_OUT = 0.2  # of the prompts
WARM_UP = 10_000  # samples, many a prompt where there are few, so that no single answer is learnt by heart


def build(
    tokenizer: Any, seq_len: int, seed: int, *, digits: int = 1, supervised: bool = False, share: float = 0.5
) -> Task:
    """RL's prompts, or, `supervised`, the samples that warm a base for it (see `warm_up`)."""
    if digits not in (1, 2):
        raise BadInput(f"digits is {digits}", "arithmetic", "Use 1 or 2.")
    if not 0 < share <= 1:
        raise BadInput(f"share is {share:g}", "arithmetic", "The share of right answers is above 0 and at most 1.")
    if seq_len < 3 * digits + 2:
        raise BadInput(f"seq_len is {seq_len}", "arithmetic", f"A sum takes {3 * digits + 2} tokens.")
    token = {c: character(tokenizer, c) for c in "0123456789+="}
    pairs = [(a, b) for a in range(10**digits) for b in range(10**digits)]
    random.Random(seed).shuffle(pairs)
    held = round(HELD_OUT * len(pairs))
    held_out = [sample(token, a, b, a + b, digits) for a, b in pairs[:held]]
    facts: dict[str, Any] = {"prompts": len(pairs), "answer_tokens": digits, "chance": 10.0**-digits}
    if supervised:
        return Task("arithmetic", warm_up(token, pairs, digits, share, seed), held_out, {**facts, "share": share})
    train = [sample(token, a, b, a + b, digits) for a, b in pairs[held:]]
    return Task("arithmetic", train, held_out, facts, reward)


def reward(prompt: Sample, sampled: list[int]) -> float:
    """1 for exactly the right tokens, else 0."""
    return float(sampled == [label for label in prompt.labels if label != IGNORED])


def warm_up(token: dict[str, int], pairs: list[tuple[int, int]], digits: int, share: float, seed: int) -> list[Sample]:
    """Sums answered rightly with probability `share`, else with the first operand: two habits, one of them wanted.

    A base that has learnt both holds the skill and shows it part of the time, on held-out prompts too; which
    habit to follow is one choice for all prompts, so RL on some of them can carry over to the rest. Tried and
    lost: uniformly wrong answers (hundreds of steps at chance), and right ones only (RL then does not carry over).
    """
    draw = random.Random(f"warm-up {seed}")
    samples = []
    for i in range(WARM_UP):
        a, b = pairs[i % len(pairs)]
        total = a + b if draw.random() < share else a
        samples.append(sample(token, a, b, total, digits))
    return samples


def sample(token: dict[str, int], a: int, b: int, total: int, digits: int) -> Sample:
    """Fixed width throughout, so that prompts are equally long."""
    prompt = [token[c] for c in f"{a:0{digits}}+{b:0{digits}}="]
    answer = [token[c] for c in f"{total % 10**digits:0{digits}}"]
    return Sample(f"{a:0{digits}}+{b:0{digits}}", (*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


def character(tokenizer: Any, c: str) -> int:
    """The one token of a character: its vocabulary entry, or what encoding it alone gives."""
    found = tokenizer.convert_tokens_to_ids(c)
    if found is not None and found != tokenizer.unk_token_id:
        return int(found)
    tokens = tokenizer.encode(c, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise BadInput(f"the tokenizer has no token for {c!r} alone", "arithmetic", "Use one with bytes or digits.")
    return int(tokens[0])
