"""One loop for full fine-tuning and LoRA, supervised and RL: what an objective's gradients do to the weights.

AdamW on fp32 weights in both arms; no weight decay, no clipping, no dropout, no warm-up. The loss is the mean
over the trained tokens of the whole optimizer step, whatever its micro-batches. For one seed every arm sees the
same samples in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter, process_time
from typing import Any, Protocol

import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_planner.errors import BadInput
from lora_planner.record import RunSpec
from runner import adapt
from runner.tasks import IGNORED, Sample, Task

BETAS = (0.9, 0.999)
#: a loss above that of guessing, by this factor, is a run that has diverged
WORSE_THAN_GUESSING = 1.1
COSINE_WARMUP = 0.05  # of the steps; for pre-training only


class Diverged(Exception):
    """Loss or gradient left the range of numbers that mean something; nothing was updated with it."""


class Invalid(Exception):
    """The run trains nothing: its numbers would mean something else than they say."""


class Objective(Protocol):
    """Where gradients come from."""

    def backward(self, step: int) -> tuple[float, int, int, dict[str, float]]:
        """Leaves the step's gradients in `.grad`: (loss, trained tokens, padded tokens, facts of the step)."""

    def evaluate(self) -> float:
        """Held-out nats per trained token, or held-out reward."""

    def longest(self) -> list[str]:
        """Ids of the samples of the longest micro-batch."""


@dataclass(slots=True)
class Progress:
    """All that a run has produced so far; a checkpoint holds it as JSON."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    step_cpu_s: list[float] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    step_facts: list[dict[str, float]] = field(default_factory=list)
    trained_tokens: int = 0
    padded_tokens: int = 0
    notes: list[str] = field(default_factory=list)


class Hooks(Protocol):
    """What surrounds the loop: progress, phases for the memory meter, checkpoints."""

    def phase(self, name: str) -> AbstractContextManager[None]: ...
    def stepped(self, progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        """After each step; may save, may raise to stop."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 for the matrices where asked; weights, gradients and states stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def optimizer_for(module: Any, spec: RunSpec) -> torch.optim.AdamW:
    parameters = list(adapt.trained(module).values())
    narrow = {str(p.dtype) for p in parameters if p.dtype != torch.float32}
    if narrow:
        raise BadInput(f"weights to train are in {', '.join(sorted(narrow))}", "runner", "Master weights are fp32.")
    return torch.optim.AdamW(parameters, lr=spec.lr, betas=BETAS, eps=spec.adam_eps, weight_decay=0.0)


def learning_rate(spec: RunSpec, step: int) -> float:
    """The rate of a step, counted from 0.

        constant   lr
        linear     lr (1 - step / steps)
        cosine     linear warm-up over the first 5 %, then lr (0.1 + 0.9 (1 + cos(pi t)) / 2): for pre-training

    >>> learning_rate(RunSpec("b", "t", lr=1.0, steps=4, schedule="linear"), 1)
    0.75
    """
    if spec.schedule == "constant":
        return spec.lr
    if spec.schedule == "linear":
        return spec.lr * (1 - step / spec.steps)
    if spec.schedule == "cosine":
        warmup = max(1, round(COSINE_WARMUP * spec.steps))
        if step < warmup:
            return spec.lr * (step + 1) / warmup
        t = (step - warmup) / max(1, spec.steps - warmup)
        return spec.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * t)))
    raise BadInput(f"schedule {spec.schedule!r} is not known", "run spec", "Use constant, linear or cosine.")


def order(n: int, start: int, count: int, seed: int) -> list[int]:
    """Indices of samples start ... start + count of an endless stream: each epoch a new permutation of all n.

    Depends on nothing but its arguments, so that arms share it and a resumed run needs no state.

    >>> sorted(order(4, 4, 4, seed=7))
    [0, 1, 2, 3]
    """
    found: list[int] = []
    while len(found) < count:
        epoch, offset = divmod(start + len(found), n)
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        found += torch.randperm(n, generator=generator)[offset : offset + count - len(found)].tolist()
    return found


def collate(samples: Sequence[Sample], pad: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """Right-padded tokens and labels; no mask where nothing is padded, which fused attention is faster with."""
    length = max(len(s.tokens) for s in samples)
    fill = [length - len(s.tokens) for s in samples]
    tokens = torch.tensor([[*s.tokens, *[pad] * n] for s, n in zip(samples, fill, strict=True)])
    labels = torch.tensor([[*s.labels, *[IGNORED] * n] for s, n in zip(samples, fill, strict=True)])
    mask = None
    if any(fill):
        mask = torch.tensor([[1] * (length - n) + [0] * n for n in fill]).to(device)
    return {"input_ids": tokens.to(device), "labels": labels.to(device), "attention_mask": mask}


class Supervised:
    """Cross entropy of the labels, summed over all micro-batches of a step and divided by their trained tokens."""

    def __init__(self, spec: RunSpec, module: Any, task: Task, device: torch.device, pad: int = 0) -> None:
        self.spec, self.module, self.task, self.device, self.pad = spec, module, task, device, pad
        if not task.train or not task.held_out:
            raise BadInput(f"the task {task.name} has no samples", "data", "Give more rows, or longer ones.")

    def micro_batches(self, step: int) -> list[list[Sample]]:
        batch, n = self.spec.batch, self.spec.micro_batch
        chosen = [self.task.train[i] for i in order(len(self.task.train), step * batch, batch, self.spec.seed)]
        return [chosen[i : i + n] for i in range(0, batch, n)]

    def loss(self, samples: Sequence[Sample], trained: int) -> torch.Tensor:
        """Sum of nats over the labels of one micro-batch / trained tokens of the step."""
        batch = collate(samples, self.pad, self.device)
        labels = batch.pop("labels")
        with autocast(self.device, self.spec.precision):
            logits = self.module(**batch, use_cache=False).logits
        loss: torch.Tensor = ForCausalLMLoss(
            logits, labels, logits.shape[-1], num_items_in_batch=torch.tensor(trained, device=self.device)
        )
        return loss

    def backward(self, step: int) -> tuple[float, int, int, dict[str, float]]:
        micro = self.micro_batches(step)
        trained = sum(s.trained for samples in micro for s in samples)
        padded = sum(len(samples) * max(len(s.tokens) for s in samples) for samples in micro)
        total = 0.0
        for samples in micro:
            loss = self.loss(samples, max(trained, 1))
            loss.backward()
            total += float(loss.detach())
        return total, trained, padded, {}

    @torch.no_grad()
    def evaluate(self) -> float:
        held_out = sorted(self.task.held_out, key=lambda s: len(s.tokens))  # least padding
        n = self.spec.micro_batch
        nats = trained = 0.0
        for start in range(0, len(held_out), n):
            samples = held_out[start : start + n]
            nats += float(self.loss(samples, 1))
            trained += sum(s.trained for s in samples)
        return nats / max(trained, 1.0)

    def longest_batch(self) -> list[Sample]:
        return sorted(self.task.train, key=lambda s: len(s.tokens), reverse=True)[: self.spec.micro_batch]

    def longest(self) -> list[str]:
        return [s.id for s in self.longest_batch()]

    def rehearse(self) -> None:
        """Forward and backward of the longest micro-batch, whose gradients are dropped: memory fails now or never."""
        samples = self.longest_batch()
        self.loss(samples, sum(s.trained for s in samples)).backward()
        self.module.zero_grad(set_to_none=True)


def train(spec: RunSpec, module: Any, objective: Objective, optimizer: torch.optim.Optimizer, hooks: Hooks,
          progress: Progress, vocab_size: int) -> None:  # fmt: skip
    """Run the steps that `progress` lacks. Raises Diverged before an update with a loss that means nothing."""
    guessing = math.log(vocab_size)
    while progress.step < spec.steps:
        step = progress.step
        if step == 0 and not progress.held_out:
            evaluate(spec, module, objective, hooks, progress)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step)
        wall, cpu = perf_counter(), process_time()
        with hooks.phase("gradients"):
            loss, trained, padded, facts = objective.backward(step)
        gradients = [p.grad for p in adapt.trained(module).values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        check(spec, step, loss, norm, guessing, progress)
        with hooks.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step_s.append(perf_counter() - wall)
        progress.step_cpu_s.append(process_time() - cpu)
        progress.losses.append(loss)
        progress.grad_norms.append(norm)
        if facts:
            progress.step_facts.append(facts)
        progress.trained_tokens += trained
        progress.padded_tokens += padded
        progress.step += 1
        if step == 0:
            check_moved(spec, module, norm, progress)
        regular = spec.eval_every and progress.step % spec.eval_every == 0
        if regular or progress.step == spec.steps or progress.step in spec.eval_at:
            evaluate(spec, module, objective, hooks, progress)
        hooks.stepped(progress, optimizer)


def evaluate(spec: RunSpec, module: Any, objective: Objective, hooks: Hooks, progress: Progress) -> None:
    with hooks.phase("evaluate"):
        module.eval()
        nats = objective.evaluate()
        module.train()
    if not math.isfinite(nats):
        raise Diverged(f"after step {progress.step}: held-out loss {nats:g}")
    progress.held_out.append([progress.step, nats])


def check(spec: RunSpec, step: int, loss: float, norm: float, guessing: float, progress: Progress) -> None:
    """A loss that is NaN, infinite, exactly zero or worse than guessing ends the run before it is used."""
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise Diverged(f"step {step}: loss {loss:g}, gradient norm {norm:g}")
    if spec.objective != "sft":
        return
    if loss == 0.0:
        raise Diverged(f"step {step}: the loss is exactly 0, no label was trained on")
    first = progress.losses[0] if progress.losses else loss
    if loss > WORSE_THAN_GUESSING * max(guessing, first):
        raise Diverged(f"step {step}: loss {loss:.2f} is worse than guessing, {guessing:.2f}")


def check_moved(spec: RunSpec, module: Any, norm: float, progress: Progress) -> None:
    """After the first step every adapter must have moved: a B that is zero learns nothing, silently."""
    if spec.objective != "sft":
        return  # the first groups may all have been right, or all wrong
    if norm == 0.0:
        raise Invalid("no gradient reached a trained weight; is the input frozen under reentrant checkpointing?")
    if spec.method == "full":
        return
    still = adapt.unmoved(module)
    if still and len(still) == len(adapt.adapted(module)):
        raise Invalid("no adapter moved in the first step: all B are zero; checkpointing with a frozen input, "
                      "or targets outside the forward pass?")  # fmt: skip
    if still:
        progress.notes.append(f"adapters not moved by step 1: {', '.join(still[:5])}, {len(still)} in all")


def padded_lengths(spec: RunSpec, samples: Sequence[Sample]) -> tuple[float, float]:
    """Tokens to which the micro-batches of this run are padded: the mean in its order, and the longest of all."""
    every = [len(samples[i].tokens) for i in order(len(samples), 0, spec.steps * spec.batch, spec.seed)]
    n = spec.micro_batch
    found = [max(every[i : i + n]) for i in range(0, len(every), n)]
    return sum(found) / len(found), max(len(s.tokens) for s in samples)


def noise_scale(objective: Supervised, module: Any, batches: int = 4) -> float | None:
    """Simple gradient noise scale, in samples: the batch at which noise and signal in the gradient are equal.

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),   tr S = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
        noise scale = tr S / |G|^2     [samples]

    b is one micro-batch, B all of them. None where the estimate of |G|^2 is not positive: too few samples.
    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.
    """
    spec = objective.spec
    b, total = spec.micro_batch, spec.micro_batch * batches
    if len(objective.task.train) < total:
        return None
    parameters = list(adapt.trained(module).values())
    mean = [torch.zeros_like(p) for p in parameters]
    small = 0.0
    for i in range(batches):
        chosen = order(len(objective.task.train), (spec.steps * spec.batch) + i * b, b, spec.seed)
        samples = [objective.task.train[j] for j in chosen]
        objective.loss(samples, sum(s.trained for s in samples)).backward()
        for m, p in zip(mean, parameters, strict=True):
            if p.grad is not None:
                small += float(p.grad.pow(2).sum()) / batches
                m.add_(p.grad, alpha=1 / batches)
        module.zero_grad(set_to_none=True)
    large = float(sum(m.pow(2).sum() for m in mean))
    signal = (total * large - b * small) / (total - b)
    noise = (small - large) / (1 / b - 1 / total)
    return noise / signal if signal > 0 else None
