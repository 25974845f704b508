"""The empirical neural tangent kernel: which samples a small step on one sample would move, and how far.

    g_i    gradient of sample i's loss for all trained parameters       [nats per trained token / parameter]
    K      K(i, j) = g_i . g_j
    n, P   samples, trained parameters
    H      the centring matrix, 1 on the diagonal minus 1/n everywhere

Two ways to train that have one K up to a factor learn alike for as long as steps are small. Kernels of few samples
in many parameters are all close to a multiple of the identity, and so to one another: compare at one n only.
Source: Schulman et al. 2025, "LoRA Without Regret", thinkingmachines.ai/blog/lora, on where adapters go; Malladi et
al. 2022, arXiv:2210.05643.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lora_planner.errors import BadInput
from runner import adapt
from runner.tasks import Sample
from runner.train import Supervised, order

#: fp32 numbers that may be held at once: 96 samples of 4 million parameters are 1.5 GB
ROOM = 400_000_000
#: a centred kernel this much smaller than the kernel is rounding
NOTHING = 1e-12


def gradients(objective: Supervised, module: Any, samples: Sequence[Sample], room: int = ROOM) -> torch.Tensor:
    """Row i: the gradient of sample i's mean loss over its trained tokens, for all trained parameters.

        [n, P] fp32, parameters in the order of `named_parameters`, one backward pass a sample

    As exact as the run's precision; take fp32 for a measurement. Leaves `.grad` as it was.
    """
    parameters = list(adapt.trained(module).values())
    width = sum(p.numel() for p in parameters)
    if not width:
        raise BadInput("no parameter is trained", "kernel", "Attach adapters, or free the weights.")
    if len(samples) * width > room:
        raise BadInput(f"gradients of {len(samples)} samples for {width:,} parameters are more than {room:,} numbers",
                       "kernel", "Take fewer samples, or a smaller model.")  # fmt: skip
    if empty := [s.id for s in samples if not s.trained]:
        raise BadInput(f"nothing is trained on in {', '.join(empty[:3])}", "kernel", "Leave such samples out.")
    found = torch.empty(len(samples), width, device=parameters[0].device)
    for row, sample in zip(found, samples, strict=True):
        loss = objective.loss([sample], sample.trained)
        start = 0
        # parameters that the sample does not reach, as those of an expert it is not routed to: zero
        for part in torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True):
            row[start : start + part.numel()] = part.flatten()
            start += part.numel()
    return found


def kernel(rows: torch.Tensor) -> torch.Tensor:
    """All products of the gradients, [n, P] -> [n, n].

        K(i, j) = g_i . g_j

    At LoRA's start B is zero, so that A has no gradient and K is that of B's alone.
    Source: Schulman et al. 2025, "LoRA Without Regret"; Jacot et al. 2018, arXiv:1806.07572.

    >>> kernel(torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[5.0, 6.0], [6.0, 9.0]]
    """
    return rows @ rows.T


def placement_kernel(objective: Supervised, module: Any, n: int, room: int = ROOM) -> torch.Tensor:
    """The kernel [n, n] of what `module` trains, over the first n usable training samples of the run.

    Of one seed all placements get the same samples. At most `room` numbers are held: gradients are kept for as
    many samples as fit, and made again for each later block, n / 2 backward passes a block.
    """
    samples = kernel_samples(objective, n)
    width = sum(p.numel() for p in adapt.trained(module).values())
    if width > room:
        raise BadInput(f"one gradient is {width:,} numbers, room is for {room:,}", "kernel", "Take a smaller model.")
    block = room // max(width, 1)
    found = torch.zeros(n, n)
    for start in range(0, n, block):
        stop = min(start + block, n)
        held = gradients(objective, module, samples[start:stop], room)
        found[start:stop, start:stop] = kernel(held)
        for j in range(stop, n):
            [other] = gradients(objective, module, samples[j : j + 1], room)
            found[start:stop, j] = found[j, start:stop] = held @ other
    return found


def kernel_samples(objective: Supervised, n: int) -> list[Sample]:
    """The run's first n training samples that train on something and are not among the held-out ones."""
    task = objective.task
    held_out = {s.tokens for s in task.held_out}
    epoch = (task.train[i] for i in order(len(task.train), 0, len(task.train), objective.spec.seed))
    usable = [s for s in epoch if s.trained and s.tokens not in held_out]
    if n < 2 or len(usable) < n:
        raise BadInput(f"a kernel of {n} samples, of {len(usable)} that are not held out", f"task {task.name}",
                       "Take 2 or more, and no more than there are.")  # fmt: skip
    return usable[:n]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """How alike two kernels are, whatever their scale.

        <K, K'>_F / (|K|_F |K'|_F)      [1: equal up to a factor]

    Source: Cristianini et al. 2001, "On kernel-target alignment".

    >>> round(cosine(torch.tensor([[4.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])), 9)
    0.8
    """
    one, other = one.double(), other.double()
    norms = float(one.norm() * other.norm())
    if not norms:
        raise BadInput("a kernel is zero everywhere", "kernel", "No gradient reached the trained parameters.")
    return float((one * other).sum()) / norms


def centred(one: torch.Tensor) -> torch.Tensor:
    """The kernel of gradients less their mean over the samples.

        H K H,  H = 1 - 1/n

    Source: Cortes et al. 2012, "Algorithms for Learning Kernels Based on Centered Alignment", JMLR 13, sec. 2.1.

    >>> centred(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    one = one.double()
    return one - one.mean(0, keepdim=True) - one.mean(1, keepdim=True) + one.mean()


def alignment(one: torch.Tensor, other: torch.Tensor) -> float:
    """Centred kernel alignment: how alike two kernels tell samples apart; in [0, 1].

        <HKH, HK'H>_F / (|HKH|_F |HK'H|_F)

    What all gradients share is taken out: it says where the loss falls, not which samples go together.
    Source: Cortes et al. 2012, JMLR 13, definition 4; Kornblith et al. 2019, arXiv:1905.00414, eq. 4.

    >>> one, other = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, 0.0, -1.0, 0.0])
    >>> round(alignment(one.outer(one), other.outer(other)), 9)
    0.5
    """
    for given in (one, other):
        if float(centred(given).norm()) <= NOTHING * float(given.double().norm()):
            raise BadInput("a kernel is the same for all pairs of samples", "kernel",
                           "Nothing is left to compare after centring: take other samples.")  # fmt: skip
    return cosine(centred(one), centred(other))
