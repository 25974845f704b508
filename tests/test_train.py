"""The loop: both arms learn, micro-batches do not matter, a resumed run is the unbroken one, an adapter reloads."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lora_planner.arch import from_config
from lora_planner.record import RunSpec
from runner import adapt
from runner.tasks import Sample, Task
from runner.train import (
    Diverged,
    Invalid,
    Progress,
    Supervised,
    check_moved,
    collate,
    learning_rate,
    noise_scale,
    optimizer_for,
    order,
    train,
)  # fmt: skip

torch.set_num_threads(1)
CONFIG = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "vocab_size": 50,
          "tie_word_embeddings": False}  # fmt: skip
MIX = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
       "norm_topk_prob": True}  # fmt: skip
SPEC = RunSpec("b", "t", rank=4, lr=3e-3, steps=12, micro_batch=4, seq_len=16)


def fresh(config: dict[str, Any] = CONFIG) -> Any:
    torch.manual_seed(0)
    values = {k: v for k, v in config.items() if k != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))


def counting(n: int, length: int = 16, start: int = 0) -> list[Sample]:
    """Sequences that count upwards from anywhere: a rule that holds for sequences never seen."""
    rows = [tuple((7 * i + start + j) % 50 for j in range(length)) for i in range(n)]
    return [Sample(f"row {i}", row, (-100, *row[1:])) for i, row in enumerate(rows)]


def ragged(n: int) -> list[Sample]:
    """Samples of different lengths, of which only the second half is trained on."""
    found = []
    for i in range(n):
        tokens = tuple((3 * i + j) % 50 for j in range(5 + 3 * i % 11))
        cut = len(tokens) // 2
        found.append(Sample(f"row {i}", tokens, (-100,) * cut + tokens[cut:]))
    return found


TASK = Task("t", counting(64), counting(16, start=3))


class Quiet:
    """No checkpoints, no progress."""

    def phase(self, name: str) -> Any:
        return nullcontext()

    def stepped(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None: ...


def run(spec: RunSpec, task: Task = TASK, config: dict[str, Any] = CONFIG, module: Any = None) -> tuple[Progress, Any]:
    model = from_config(config)
    if module is None:
        module = adapt.attach(fresh(config), model, spec.plan_method(), spec.seed)
    objective = Supervised(spec, module, task, torch.device("cpu"))
    progress = Progress()
    train(spec, module, objective, optimizer_for(module, spec), Quiet(), progress, model.vocab_size)
    return progress, module


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["full", "lora", "rslora", "dora", "lora-fa"])
def test_every_arm_learns_what_it_was_not_shown(method: str, config: dict[str, Any]) -> None:
    """Held-out loss falls for full fine-tuning and each kind of adapter, on a dense model and on fused experts."""
    if config is MIX and method == "dora":
        pytest.skip("peft has no DoRA for fused expert tensors")
    spec = replace(
        SPEC,
        method=method,
        steps=60,
        lr=3e-3 if method in ("full", "rslora") else 1e-2,
        targets=("all-linear", "unembed"),
    )
    progress, _ = run(spec, config=config)
    first, last = progress.held_out[0][1], progress.held_out[-1][1]
    assert first == pytest.approx(math.log(50), rel=0.05)
    assert last < first - 0.3


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("task", [TASK, Task("t", ragged(40), ragged(4))], ids=["windows", "padded"])
def test_micro_batches_do_not_matter(method: str, task: Task) -> None:
    """8 x 1, 4 x 2 and 2 x 4 give one loss curve: the loss is normalised by the trained tokens of the step."""
    curves = [
        run(replace(SPEC, method=method, micro_batch=n, accumulation=8 // n), task)[0] for n in (8, 4, 2)
    ]  # fmt: skip
    for other in curves[1:]:
        assert other.losses == pytest.approx(curves[0].losses, rel=1e-5)
        assert other.trained_tokens == curves[0].trained_tokens
    assert curves[0].held_out[-1][1] == pytest.approx(curves[2].held_out[-1][1], rel=1e-5)


def test_the_loss_counts_trained_tokens_only() -> None:
    """The mean over labels that are not ignored, computed by hand from the logits."""
    spec = replace(SPEC, steps=1)
    task = Task("t", ragged(40), ragged(4))
    module = adapt.attach(fresh(), from_config(CONFIG), spec.plan_method(), 0)
    objective = Supervised(spec, module, task, torch.device("cpu"))
    [samples] = objective.micro_batches(0)
    nats = [
        -torch.log_softmax(module(torch.tensor([s.tokens])).logits[0, i - 1], -1)[label].item()
        for s in samples for i, label in enumerate(s.labels) if i and label != -100
    ]  # fmt: skip
    loss, trained, padded, _ = objective.backward(0)
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert trained == len(nats)
    assert padded == 4 * max(len(s.tokens) for s in samples)


def test_arms_of_one_seed_see_the_same_order() -> None:
    """Each epoch is a permutation of all samples; a step's samples depend on the seed and on its number only."""
    whole = order(10, 0, 30, seed=3)
    assert [sorted(whole[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert whole[:10] != whole[10:20]
    assert order(10, 13, 9, seed=3) == whole[13:22]
    assert order(10, 0, 30, seed=4) != whole


def test_a_padded_batch_has_a_mask_and_a_full_one_has_none() -> None:
    assert collate(counting(2), 0, torch.device("cpu"))["attention_mask"] is None
    batch = collate(ragged(3), 0, torch.device("cpu"))
    assert batch["attention_mask"].sum(1).tolist() == [len(s.tokens) for s in ragged(3)]


def test_the_schedules() -> None:
    """Constant stays, linear ends at lr / steps, cosine rises over 5 % and ends at a tenth."""
    spec = replace(SPEC, lr=1.0, steps=100)
    assert {learning_rate(spec, i) for i in range(100)} == {1.0}
    linear = [learning_rate(replace(spec, schedule="linear"), i) for i in range(100)]
    assert linear[0] == 1.0 and linear[-1] == pytest.approx(0.01)
    cosine = [learning_rate(replace(spec, schedule="cosine"), i) for i in range(101)]
    assert cosine[4] == 1.0 and cosine[0] == 0.2 and cosine[100] == pytest.approx(0.1)


@pytest.mark.parametrize(("method", "falls_as"), [("lora", -0.5), ("rslora", 0.0)])
def test_the_scale_is_that_of_the_method(method: str, falls_as: float) -> None:
    """A first update is alpha / r times a sum of r random directions, so its size falls as r ** -0.5; rsLoRA's
    alpha / sqrt(r) keeps it."""
    moved = []
    for rank in (1, 16):
        module = run(replace(SPEC, method=method, rank=rank, steps=1, lr=1e-3))[1]
        before, after = fresh().state_dict(), module.merge_and_unload().state_dict()
        moved.append(sum(float((after[k] - v).pow(2).sum()) for k, v in before.items()) ** 0.5)
    assert math.log(moved[1] / moved[0]) / math.log(16) == pytest.approx(falls_as, abs=0.08)


def test_f6_a_rate_that_explodes_is_a_diverged_run() -> None:
    """Loss worse than guessing, NaN or infinite: stopped before the update, the losses so far are kept."""
    with pytest.raises(Diverged, match="step"):
        run(replace(SPEC, method="full", lr=3.0, steps=40))


def test_f6_an_evaluation_without_a_number_is_a_diverged_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN on held-out text after the last step: not a finished run whose loss is missing."""
    monkeypatch.setattr(Supervised, "evaluate", lambda self: math.nan)
    with pytest.raises(Diverged, match="held-out loss nan"):
        run(SPEC)


def test_f6_a_loss_of_zero_is_no_loss() -> None:
    """Nothing to train on is not a perfect model."""
    untrained = [replace(s, labels=(-100,) * 16) for s in counting(16)]
    with pytest.raises(Diverged, match="exactly 0"):
        run(SPEC, Task("t", untrained, counting(4)))


def test_f7_an_adapter_that_does_not_move_is_invalid() -> None:
    """All B zero after a step (here: as if their gradient never arrived) ends the run with its likely causes."""
    spec = replace(SPEC, steps=1)
    module = adapt.attach(fresh(), from_config(CONFIG), spec.plan_method(), 0)
    with pytest.raises(Invalid, match="no adapter moved"):
        check_moved(spec, module, 1.0, Progress())
    with pytest.raises(Invalid, match="no gradient"):
        check_moved(spec, module, 0.0, Progress())


def test_checkpointing_changes_memory_and_nothing_else() -> None:
    """Recomputed activations give the same losses, and the adapters move."""
    module = fresh()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    wrapped = adapt.attach(module, from_config(CONFIG), SPEC.plan_method(), 0)
    assert run(SPEC, module=wrapped)[0].losses == pytest.approx(run(SPEC)[0].losses, rel=1e-6)


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["dense", "experts"])
def test_a_saved_adapter_gives_the_same_logits(config: dict[str, Any], tmp_path: Any) -> None:
    """Saved by peft, loaded on a fresh base: bit for bit the same logits."""
    _, module = run(SPEC, config=config)
    module.save_pretrained(tmp_path)
    module.eval()
    again = PeftModel.from_pretrained(fresh(config), tmp_path).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(module(tokens).logits, again(tokens).logits)
        assert not torch.equal(module(tokens).logits, fresh(config).eval()(tokens).logits)


def test_the_noise_scale_of_identical_samples_is_zero() -> None:
    """One sample repeated has no gradient noise; counting sequences from anywhere have some."""
    module = adapt.attach(fresh(), from_config(CONFIG), replace(SPEC, method="full").plan_method(), 0)
    spec = replace(SPEC, method="full")
    same = Supervised(spec, module, Task("t", counting(1) * 32, counting(4)), torch.device("cpu"))
    assert noise_scale(same, module) == pytest.approx(0.0, abs=1e-3)
    many = Supervised(spec, module, TASK, torch.device("cpu"))
    assert (noise_scale(many, module) or 0) > 0.1
