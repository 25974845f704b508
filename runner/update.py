"""What fine-tuning changed: how many directions an adapter's update has, and what is lost by keeping fewer.

    A [r, d_in], B [d_out, r]      an adapter; its update is  scale B A
    scale                          alpha / r, or alpha / sqrt(r) for rsLoRA: peft's `scaling`

Of DoRA the update is more than scale B A, whose numbers and truncation these are; its magnitudes stay. One rank an
expert where experts are fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lora_planner.errors import BadInput
from runner import adapt


class Factors(NamedTuple):
    """One adapted matrix. `a` and `b` are views: what is copied into them is in the adapter."""

    name: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float


def effective_rank(singular_values: Sequence[float] | torch.Tensor) -> float:
    """How many directions count: the exponential of the entropy of how the singular values share their sum.

        p_i = s_i / sum s,   exp(- sum p_i ln p_i)      [directions, from 1 to r; 0 where all s are 0]

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.

    >>> round(effective_rank([1, 1, 1]), 9), effective_rank([2, 0, 0]), effective_rank([0, 0])
    (3.0, 1.0, 0.0)
    """
    values = torch.as_tensor(singular_values, dtype=torch.float64)
    if not bool(values.any()):
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def _core(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Q_B, C, Q_A) with B A = Q_B C Q_A', columns of both Q orthonormal, C no larger than r x r; in fp64."""
    left, of_b = torch.linalg.qr(b.detach().double())
    right, of_a = torch.linalg.qr(a.detach().double().T)
    return left, of_b @ of_a.T, right


def singular_values_of_product(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Singular values of an update, largest first, without forming it: those of the core of its two QRs.

        B = Q_B R_B,  A' = Q_A R_A,   s(scale B A) = |scale| s(R_B R_A')        [r values, or a smaller side's number]

    Source: Q_B and Q_A have orthonormal columns, which change no singular value; Golub and Van Loan, "Matrix
    Computations", 4th ed., sec. 2.4.

    >>> singular_values_of_product(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0], [0.0]]), scale=0.5).tolist()
    [3.0]
    """
    values: torch.Tensor = torch.linalg.svdvals(_core(a, b)[1])
    return abs(scale) * values


def best_factors(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) in the shapes given whose product is the nearest to B A of all of this rank, in any unitary norm.

        B A = U S V',   B <- U_k S_k^(1/2),  A <- S_k^(1/2) V_k',  zeros in the r - k other places

    Source: Eckart and Young 1936; Mirsky 1960.
    """
    left, core, right = _core(a, b)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    k = min(rank, len(s))
    root = s[:k].sqrt()
    new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
    new_a[:k] = (root[:, None] * (vt[:k] @ right.T)).to(a)
    new_b[:, :k] = ((left @ u[:, :k]) * root).to(b)
    return new_a, new_b


def factors(module: Any) -> list[Factors]:
    """Every adapted matrix, named as in `adapt.adapted`; experts of a fused tensor one by one, as name[expert].

    peft keeps E experts in A [E r, d_in], expert by expert, and B [d_out, r E], where experts alternate.
    """
    layers = {adapt.short(name): layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    found = []
    for name, a, b in adapt.adapted(module):
        [scale] = layers[name].scaling.values()
        experts = getattr(layers[name], "num_experts", 1)
        if experts == 1:
            found.append(Factors(name, a.detach(), b.detach(), scale))
            continue
        of_a = a.detach().view(experts, -1, a.shape[1])
        of_b = b.detach().view(b.shape[0], -1, experts)
        found += [Factors(f"{name}[{e}]", of_a[e], of_b[:, :, e], scale) for e in range(experts)]
    return found


def adapter_ranks(module: Any) -> list[tuple[str, float, float, float]]:
    """(matrix, effective rank, spectral norm, Frobenius norm) of every update; none in full fine-tuning."""
    found = []
    for name, a, b, scale in factors(module):
        values = singular_values_of_product(a, b, scale)
        found.append((name, effective_rank(values), float(values.max()), float(values.norm())))
    return found


@contextmanager
def truncated(module: Any, rank: int) -> Iterator[None]:
    """Inside, every update is its best approximation of this rank; afterwards the weights are what they were.

    Bit for bit, and also when an error passes. Rank 0 is the base model, but for DoRA's magnitudes.
    """
    if rank < 0:
        raise BadInput(f"rank {rank}", "truncation", "Give 0 or more.")
    matrices = factors(module)
    kept = [(m.a.clone(), m.b.clone()) for m in matrices]
    try:
        for m in matrices:
            a, b = best_factors(m.a, m.b, rank)
            m.a.copy_(a)
            m.b.copy_(b)
        yield
    finally:
        for m, (a, b) in zip(matrices, kept, strict=True):
            m.a.copy_(a)
            m.b.copy_(b)
