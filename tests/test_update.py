"""Ranks of updates against torch's own SVD of the formed product; truncation that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import CONFIG, MIX, TASK, fresh
from test_train import SPEC as QUICK

from lora_planner.arch import from_config
from lora_planner.errors import BadInput
from runner import adapt
from runner.train import Supervised
from runner.update import (
    adapter_ranks,
    best_factors,
    effective_rank,
    factors,
    singular_values_of_product,
    truncated,
)  # fmt: skip

torch.set_num_threads(1)
SPEC = replace(QUICK, rank=3)  # not the number of experts, so that the two cannot be taken for each other
TOKENS = torch.arange(20)[None]
VALUES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=16)


def moved(method: str = "lora", config: dict[str, Any] = CONFIG) -> Any:
    """A module whose adapters are far from zero."""
    module = adapt.attach(fresh(config), from_config(config), replace(SPEC, method=method).plan_method(), 0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, _, b in adapt.adapted(module):
            b.copy_(0.05 * torch.randn(b.shape, generator=generator))
    return module


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    found: torch.Tensor = module(TOKENS).logits
    return found


def updates(module: Any) -> list[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """(matrix, weight, update) of each layer that peft has wrapped, by peft's own arithmetic."""
    return [
        (adapt.short(name), layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight,
         layer.get_delta_weight("default").detach().clone())
        for name, layer in module.named_modules() if getattr(layer, "lora_A", None)
    ]  # fmt: skip


def logits_with(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Logits of the base whose weights are moved by the changed updates, without any adapter."""
    pairs = updates(module)
    base = module.unload()
    with torch.no_grad():
        for _, weight, update in pairs:
            weight.add_(change(update))
    return logits(base)


def svd_truncated(update: torch.Tensor, rank: int) -> torch.Tensor:
    """A matrix, or each of a stack, of this rank, from its full SVD."""
    u, s, vt = torch.linalg.svd(update.double(), full_matrices=False)
    s[..., rank:] = 0
    return ((u * s[..., None, :]) @ vt).float()


@given(VALUES, st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_effective_rank_is_between_one_and_the_number_of_values(values: list[float], scale: float) -> None:
    """Also unchanged by scale, order and zeros beside them."""
    rank = effective_rank(values)
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert effective_rank([0.0, *(scale * v for v in reversed(values))]) == pytest.approx(rank, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "rank"),
    [([5.0], 1.0), ([2.0] * 7, 7.0), ([1.0, 1.0, 0.0], 2.0),
     ([3.0, 1.0], 4 / 3**0.75),  # exp(H) = (4/3)^(3/4) 4^(1/4)
     ([2.0, 1.0, 1.0], 2**1.5)],  # H = 1.5 bits
)  # fmt: skip
def test_effective_rank_in_closed_form(values: list[float], rank: float) -> None:
    """Equal values count in full, others by the exponential of their entropy."""
    assert effective_rank(values) == pytest.approx(rank, rel=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 12), st.integers(1, 12), st.floats(-4, 4))
@settings(max_examples=60, deadline=None)
def test_singular_values_are_those_of_the_formed_product(
    seed: int, rank: int, d_in: int, d_out: int, scale: float
) -> None:
    """torch's svdvals of scale B A, whose other values are zero; also where a side is narrower than the rank."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=generator)
    b = torch.randn(d_out, rank, generator=generator)
    found = singular_values_of_product(a, b, scale)
    formed = torch.linalg.svdvals(scale * b.double() @ a.double())
    assert len(found) == min(rank, d_in, d_out)
    assert torch.allclose(found, formed[: len(found)], atol=1e-9)
    assert torch.all(formed[len(found) :] < 1e-9)


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
def test_best_factors_leave_out_the_smallest_directions(rank: int) -> None:
    """What is lost is the norm of the values left out (Eckart and Young), what is kept has that rank."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 9, generator=generator), torch.randn(7, 5, generator=generator)
    new_a, new_b = best_factors(a, b, rank)
    assert (new_a.shape, new_b.shape) == (a.shape, b.shape)
    values = torch.linalg.svdvals(b @ a)
    lost = torch.linalg.matrix_norm(new_b @ new_a - b @ a)
    assert float(lost) == pytest.approx(float(values[rank:5].norm()), rel=1e-4, abs=1e-4)
    assert int(torch.linalg.matrix_rank(new_b @ new_a, rtol=1e-4)) == rank


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["lora", "rslora", "lora-fa"])
def test_ranks_and_norms_are_those_of_peft_updates(method: str, config: dict[str, Any]) -> None:
    """Against the SVD of the update that peft forms itself, for fused experts of each expert's own."""
    module = moved(method, config)
    expected = {}
    for name, _, update in updates(module):
        for e, matrix in enumerate(update if update.dim() == 3 else [update]):
            values = torch.linalg.svdvals(matrix.double())[: SPEC.rank]
            row = (effective_rank(values), float(values.max()), float(matrix.double().norm()))
            expected[f"{name}[{e}]" if update.dim() == 3 else name] = pytest.approx(row, rel=1e-4)
    found = adapter_ranks(module)
    assert {row[0]: row[1:] for row in found} == expected
    assert all(1 < row[1] <= SPEC.rank for row in found)
    assert {row[0].split("[")[0] for row in found} == {name for name, _, _ in adapt.adapted(module)}


def test_an_untrained_adapter_has_rank_zero_and_full_fine_tuning_has_no_rows() -> None:
    """B = 0 moves nothing in any direction."""
    fresh_adapters = adapt.attach(fresh(), from_config(CONFIG), SPEC.plan_method(), 0)
    assert {row[1:] for row in adapter_ranks(fresh_adapters)} == {(0.0, 0.0, 0.0)}
    assert adapter_ranks(fresh()) == []


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["dense", "experts"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_truncated_logits_are_those_of_the_truncated_product(rank: int, config: dict[str, Any]) -> None:
    """As if each update of peft had been cut by a full SVD and added to the base; and the cut is felt."""
    module = moved(config=config)
    whole = logits(module)
    with truncated(module, rank):
        found = logits(module)
    assert torch.allclose(found, logits_with(module, lambda update: svd_truncated(update, rank)), atol=2e-5)
    assert float((found - whole).abs().max()) > 1e-3


def test_rank_zero_is_the_base() -> None:
    module = moved()
    with truncated(module, 0):
        assert torch.equal(logits(module), logits(fresh().eval()))


@pytest.mark.parametrize("rank", [SPEC.rank, SPEC.rank + 3])
def test_truncation_at_full_rank_changes_nothing(rank: int) -> None:
    """Other factors, the same product."""
    module = moved("rslora", MIX)
    before = logits(module)
    with truncated(module, rank):
        assert torch.allclose(logits(module), before, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["dense", "experts"])
def test_afterwards_the_weights_are_what_they_were(config: dict[str, Any]) -> None:
    """Bit for bit, frozen and trained, after a normal end, an error inside, and a matrix that has no SVD."""
    module = moved("lora-fa", config)
    before = {name: p.clone() for name, p in module.named_parameters()}

    def unchanged() -> bool:
        return all(torch.equal(p, before[name]) for name, p in module.named_parameters())

    with truncated(module, 1):
        assert not unchanged()
    assert unchanged()
    with pytest.raises(ZeroDivisionError), truncated(module, 1):
        raise ZeroDivisionError
    assert unchanged()
    _, _, last = adapt.adapted(module)[-1]
    with torch.no_grad():
        last[0, 0] = torch.nan
    before = {name: p.clone().nan_to_num() for name, p in module.named_parameters()}
    with pytest.raises(RuntimeError), truncated(module, 1):
        pass
    assert all(torch.equal(p.nan_to_num(), before[name]) for name, p in module.named_parameters())


def test_a_truncated_module_can_be_evaluated_and_trained_on_afterwards() -> None:
    """The held-out loss inside differs, after it is the same number; a step's gradients arrive."""
    module = moved()
    objective = Supervised(SPEC, module, TASK, torch.device("cpu"))
    before = objective.evaluate()
    with truncated(module, 1):
        assert objective.evaluate() != before
    assert objective.evaluate() == before
    objective.backward(0)
    assert all(p.grad is not None and p.grad.any() for p in adapt.trained(module).values())


def test_a_negative_rank_is_refused() -> None:
    with pytest.raises(BadInput, match="rank -1"), truncated(moved(), -1):
        pass


def test_factors_are_views_of_the_adapter() -> None:
    """One row a matrix, and one for each of four experts of a fused tensor; copying into a row moves the adapter."""
    module = moved(config=MIX)
    rows = factors(module)
    fused = [row for row in rows if "[" in row.name]
    tensors = [a for name, a, _ in adapt.adapted(module) if "experts" in name]
    assert len(fused) == 4 * len(tensors) > 0
    fused[0].a.fill_(7.0)
    assert int((tensors[0] == 7.0).sum()) == fused[0].a.numel() == tensors[0].numel() // 4
