"""Policy gradient: against REINFORCE by hand, against the exact gradient, and on a task that it must learn."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from lora_planner.errors import BadInput  # noqa: E402
from lora_planner.record import RunSpec  # noqa: E402
from runner.policy import PolicyGradient, binary_entropy, inverse_cdf, policy_loss, reward_bits  # noqa: E402
from runner.tasks import IGNORED, Sample, Task, arithmetic  # noqa: E402

torch.set_num_threads(1)

CPU = torch.device("cpu")
SPEC = RunSpec("b", "arithmetic", objective="rl", micro_batch=4, group=8, new_tokens=1)


class Characters:
    """The twelve characters of a sum and nothing else."""

    unk_token_id = None

    def convert_tokens_to_ids(self, c: str) -> int:
        return "0123456789+=".index(c)


class Words:
    """Ids of single characters are only found by encoding; "=" is two tokens."""

    unk_token_id = 0

    def convert_tokens_to_ids(self, c: str) -> int:
        return 0

    def encode(self, c: str, add_special_tokens: bool) -> list[int]:
        return [100, 101] if c == "=" else [100 + ord(c)]


def tiny() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    return Qwen3ForCausalLM(config)


def policy(model: Any, spec: RunSpec = SPEC, task: Task | None = None) -> PolicyGradient:
    return PolicyGradient(spec, model, task or arithmetic.build(Characters(), 8, 0), CPU, nullcontext)


def gradient(model: Any) -> Any:
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def recorded(task: Task) -> tuple[Task, list[tuple[Sample, list[int], float]]]:
    """The task, and a list that fills with every (prompt, answer, reward) it is asked about."""
    seen: list[tuple[Sample, list[int], float]] = []

    def ask(prompt: Sample, sampled: list[int]) -> float:
        seen.append((prompt, list(sampled), task.reward(prompt, sampled)))
        return seen[-1][2]

    return replace(task, reward=ask), seen


@cache
def warmed() -> Any:
    """A base that answers about a third of the sums rightly: 150 steps of the supervised task."""
    model, samples = tiny(), arithmetic.build(Characters(), 8, 0, supervised=True, share=0.5).train
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for step in range(150):
        batch = [samples[i] for i in range(64 * step, 64 * step + 64)]
        tokens, labels = torch.tensor([s.tokens for s in batch]), torch.tensor([s.labels for s in batch])
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def rl(model: Any, steps: range, optimizer: Any = None) -> tuple[PolicyGradient, list[tuple[Any, ...]], Any]:
    objective = policy(model, replace(SPEC, micro_batch=16))
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    out = []
    for step in steps:
        out.append(objective.backward(step))
        optimizer.step()
        optimizer.zero_grad()
    return objective, out, optimizer


# --- formulas -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "bits"), [(0.5, 1.0), (0.11, 0.499916), (0.25, 0.811278), (0.0, 0.0), (1.0, 0.0)])
def test_binary_entropy(p: float, bits: float) -> None:
    """Values of the textbook: Cover and Thomas, Elements of Information Theory, ch. 2 and 7 (H(0.11) is 1/2)."""
    assert binary_entropy(p) == pytest.approx(bits, abs=1e-6)
    assert binary_entropy(1 - p) == pytest.approx(bits, abs=1e-6)


def test_reward_bits_count_every_answer() -> None:
    """Two prompts of 16 answers, one of them always right: 16 H_b(1/4) bits."""
    assert reward_bits([0.25, 1.0], 16) == pytest.approx(16 * 0.811278, abs=1e-4)


def test_samples_follow_the_probabilities() -> None:
    """An even comb of 1,000 numbers yields each token in proportion to its probability, and never an impossible one."""
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0]).log().expand(1000, 5)
    found = inverse_cdf(logits, (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(found, minlength=5).tolist() == [200, 0, 500, 300, 0]


def test_ratio_weighs_each_token_and_sampler_is_constant() -> None:
    """p_learner twice p_sampler counts double; loss by hand: rewards 1, 0 -> advantages 1/2, -1/2, no division by sd."""
    learner = torch.tensor([[[0.4], [0.1]]]).log().requires_grad_()
    sampler = torch.tensor([[[0.2], [0.1]]]).log().requires_grad_()
    loss, largest = policy_loss(learner, sampler.detach(), torch.tensor([[1.0, 0.0]]), 2)
    assert loss.item() == pytest.approx(-(2 * 0.5 - 1 * 0.5) / 2)
    assert largest == pytest.approx(2)
    loss.backward()
    assert learner.grad.flatten().tolist() == pytest.approx([-0.5, 0.25])  # - ratio advantage / 2


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 2])
def test_gradient_is_reinforce_with_baseline(digits: int) -> None:
    """The step's gradient is that of - sum of advantage log p / tokens, sample by sample, with autograd."""
    model = tiny()
    even = replace(arithmetic.build(Characters(), 8, 0, digits=digits), reward=lambda prompt, a: float(a[0] % 2 == 0))
    task, seen = recorded(even)
    spec = replace(SPEC, micro_batch=2, accumulation=2, group=4, new_tokens=digits)
    _, trained, padded, _ = policy(model, spec, task).backward(3)
    found = gradient(model)
    assert len(seen) == 16
    assert (trained, padded) == (16 * digits, 16 * (3 * digits + 2))
    loss = torch.zeros(())
    scores = [r for *_, r in seen]
    assert set(scores) == {0.0, 1.0}
    for i, (prompt, answer, _) in enumerate(seen):
        group = scores[i // 4 * 4 : i // 4 * 4 + 4]
        tokens = [t for t, label in zip(prompt.tokens, prompt.labels, strict=True) if label == IGNORED]
        for token in answer:
            p = model(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)[token]
            loss = loss - (scores[i] - sum(group) / 4) * p.log() / (16 * digits)
            tokens.append(token)
    loss.backward()
    torch.testing.assert_close(found, gradient(model), rtol=1e-4, atol=1e-6)


def test_gradient_points_along_expected_reward() -> None:
    """With many answers of one prompt it is (1 - 1/G) times the exact gradient of its success probability."""
    model, task = tiny(), arithmetic.build(Characters(), 8, 0)
    one = replace(task, train=task.train[:1])
    policy(model, replace(SPEC, micro_batch=1, group=4_000), one).backward(0)
    found = gradient(model)
    tokens = torch.tensor([one.train[0].tokens])
    success = model(input_ids=tokens).logits[0, -2].softmax(-1)[tokens[0, -1]]
    (-success).backward()
    exact = gradient(model)
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.98
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_rewards_teach_nothing(constant: float) -> None:
    """Groups that are all right or all wrong leave a gradient of zero and carry no bits."""
    model = tiny()
    task = replace(arithmetic.build(Characters(), 8, 0), reward=lambda prompt, sampled: constant)
    *_, facts = policy(model, SPEC, task).backward(0)
    assert not gradient(model).any()
    assert facts == {"reward": constant, "reward_bits": 0.0, "constant_groups": 4, "ratio_max": pytest.approx(1)}


def test_micro_batches_change_nothing() -> None:
    """Four prompts at once or one by one: the same answers, the same gradient."""
    model = tiny()
    found = []
    for micro, accumulation in ((4, 1), (1, 4)):
        task, seen = recorded(arithmetic.build(Characters(), 8, 0))
        policy(model, replace(SPEC, micro_batch=micro, accumulation=accumulation), task).backward(5)
        found.append((gradient(model), seen))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-7)


# --- learning -----------------------------------------------------------------------------------


def test_expected_reward_is_exact() -> None:
    """The held-out score is the mean product of the answer's token probabilities: here by one forward a token."""
    model, task = tiny(), arithmetic.build(Characters(), 8, 0, digits=2)
    task = replace(task, held_out=task.held_out[:5])
    total = 0.0
    with torch.no_grad():
        for s in task.held_out:
            p = model(input_ids=torch.tensor([s.tokens])).logits[0].softmax(-1)
            total += float(p[5, s.tokens[6]] * p[6, s.tokens[7]])
    score = policy(model, replace(SPEC, micro_batch=1, group=2, new_tokens=2), task).evaluate()
    assert score == pytest.approx(total / 5, rel=1e-5)


def test_expected_reward_rises() -> None:
    """From a base right on 15 to 45 % of held-out sums, 60 steps win at least 15 points on sums never rewarded."""
    model = copy.deepcopy(warmed())
    before = policy(model).evaluate()
    objective, out, _ = rl(model, range(60))
    assert 0.15 < before < 0.45
    assert objective.evaluate() > before + 0.15
    assert out[-1][3]["reward"] > out[0][3]["reward"] + 0.2
    assert all(0.99 < facts["ratio_max"] < 1.01 for *_, facts in out)


def test_a_resumed_run_equals_an_unbroken_one() -> None:
    """Steps 0 to 5 at once, and 0 to 2 then 3 to 5 by a new objective, end in the same bits; another seed does not."""
    whole, halves = copy.deepcopy(warmed()), copy.deepcopy(warmed())
    _, unbroken, _ = rl(whole, range(6))
    _, first, optimizer = rl(halves, range(3))
    _, second, _ = rl(halves, range(3, 6), optimizer)
    assert unbroken == first + second
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    assert policy(whole).backward(0)[3] != policy(whole, replace(SPEC, seed=1)).backward(0)[3]


# --- the task and refusals ----------------------------------------------------------------------


def test_sums_are_right_and_disjoint() -> None:
    """Every prompt is on one side only, its answer is the sum in fixed width, and only that is rewarded."""
    task = arithmetic.build(Characters(), 8, 1, digits=2)
    ids = [s.id for s in task.train + task.held_out]
    assert len(set(ids)) == len(ids) == 10_000
    assert len(task.held_out) == 2_000
    one = next(s for s in task.train + task.held_out if s.id == "57+48")
    assert one.tokens == (5, 7, 10, 4, 8, 11, 0, 5)  # 105 mod 100
    assert one.labels == (*[IGNORED] * 6, 0, 5)
    assert [task.reward(one, a) for a in ([0, 5], [5, 0], [0], [0, 5, 0])] == [1.0, 0.0, 0.0, 0.0]


def test_share_of_the_warm_up() -> None:
    """About `share` of the warm-up's answers are right, plus the tenth where the first operand is the sum."""
    samples = arithmetic.build(Characters(), 8, 0, supervised=True, share=0.3).train
    right = sum(s.labels[-1] == (s.tokens[0] + s.tokens[2]) % 10 for s in samples) / len(samples)
    assert right == pytest.approx(0.3 + 0.7 * 0.1, abs=0.02)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (replace(SPEC, group=1), "a group of 1 has zero advantage"),
        (replace(SPEC, new_tokens=2), "answers have 1 tokens, new_tokens is 2"),
        (replace(SPEC, micro_batch=81), "81 prompts a step, the task has 80"),
    ],
)
def test_refusals(spec: RunSpec, what: str) -> None:
    """A spec from which nothing could be learnt is refused before the first step."""
    with pytest.raises(BadInput, match=what):
        policy(tiny(), spec)


def test_a_task_without_reward_is_refused() -> None:
    """The warm-up is no RL task."""
    with pytest.raises(BadInput, match="has no reward"):
        policy(tiny(), SPEC, arithmetic.build(Characters(), 8, 0, supervised=True))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [({"digits": 3}, "digits is 3"), ({"share": 0.0}, "share is 0"), ({"digits": 2, "seq_len": 7}, "seq_len is 7")],
)
def test_bad_arguments(arguments: dict[str, Any], what: str) -> None:
    """Arguments without a meaning are named."""
    seq_len = arguments.pop("seq_len", 8)
    with pytest.raises(BadInput, match=what):
        arithmetic.build(Characters(), seq_len, 0, **arguments)


def test_characters_of_any_tokenizer() -> None:
    """A character is its vocabulary entry or its encoding alone; one that takes two tokens is refused by name."""
    assert arithmetic.character(Words(), "7") == 100 + ord("7")
    with pytest.raises(BadInput, match="no token for '=' alone"):
        arithmetic.character(Words(), "=")
