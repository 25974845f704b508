"""The kernel of a model that can be worked out by hand, of adapters from the full gradients, and how kernels compare."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import CONFIG, MIX, SPEC, TASK, counting, fresh, ragged

from lora_planner.arch import from_config
from lora_planner.errors import BadInput
from lora_planner.record import RunSpec
from runner import adapt
from runner.kernel import alignment, centred, cosine, gradients, kernel, kernel_samples, placement_kernel
from runner.tasks import Sample, Task
from runner.train import Supervised, order

torch.set_num_threads(1)
CPU = torch.device("cpu")


class Linear(torch.nn.Module):
    """Logits W x of the token before, with fixed features x and W = 0."""

    def __init__(self, features: torch.Tensor, words: int) -> None:
        super().__init__()
        self.features = features
        self.w = torch.nn.Parameter(torch.zeros(words, features.shape[1]))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.features[input_ids] @ self.w.T)


def built(spec: RunSpec, task: Task = TASK, config: dict[str, Any] = CONFIG) -> tuple[Supervised, Any]:
    module = adapt.attach(fresh(config), from_config(config), spec.plan_method(), spec.seed)
    return Supervised(spec, module, task, CPU), module


def test_the_kernel_of_a_linear_model_is_the_closed_form() -> None:
    """At W = 0 the gradient is (1/V - y) x', so that K(i, j) = (x_i . x_j) ([y_i = y_j] - 1/V)."""
    features = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 1.0], [9.0, 9.0, 9.0]])
    words = len(features)
    pairs = [(0, 1), (1, 1), (2, 3), (3, 1), (0, 4)]
    samples = [Sample(str(p), p, (-100, p[1])) for p in pairs]
    module = Linear(features, words)
    objective = Supervised(replace(SPEC, method="full"), module, Task("t", samples, samples), CPU)
    x = features[[p[0] for p in pairs]]
    y = torch.tensor([p[1] for p in pairs])
    expected = (x @ x.T) * ((y[:, None] == y[None, :]).float() - 1 / words)
    assert torch.allclose(kernel(gradients(objective, module, samples)), expected, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, MIX], ids=["dense", "experts"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_of_samples_add_up_to_that_of_the_batch(method: str, config: dict[str, Any]) -> None:
    """Weighted by trained tokens their mean is the training loop's gradient, padding and all; `.grad` stays."""
    objective, module = built(replace(SPEC, method=method), Task("t", ragged(40), ragged(4)), config)
    [samples] = objective.micro_batches(0)
    objective.backward(0)
    batch = torch.cat([p.grad.flatten() for p in adapt.trained(module).values() if p.grad is not None])
    weights = torch.tensor([float(s.trained) for s in samples])
    rows = gradients(objective, module, samples)
    assert rows.shape == (4, adapt.check_counts(module, from_config(config), objective.spec.plan_method()))
    assert torch.allclose(weights @ rows / weights.sum(), batch, atol=1e-6 * float(batch.abs().max()) + 1e-7)
    after = torch.cat([p.grad.flatten() for p in adapt.trained(module).values() if p.grad is not None])
    assert torch.equal(after, batch)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_the_kernel_of_fresh_adapters_is_that_of_full_gradients_through_a(method: str) -> None:
    """B = 0: A has no gradient and that of B is scale G A', so K(i, j) = scale^2 sum over matrices of
    <G_i A', G_j A'>, with G from full fine-tuning of the same base."""
    objective, module = built(replace(SPEC, method=method))
    samples = TASK.train[:5]
    rows = gradients(objective, module, samples)
    sides = [("lora_B" in name, p.numel()) for name, p in adapt.trained(module).items()]
    parts = rows.split([n for _, n in sides], dim=1)
    of_b = torch.cat([part for (is_b, _), part in zip(sides, parts, strict=True) if is_b], dim=1)
    assert torch.allclose(kernel(rows), kernel(of_b), rtol=1e-6)
    assert rows.any() and not any(part.any() for (is_b, _), part in zip(sides, parts, strict=True) if not is_b)

    full, whole = built(replace(SPEC, method="full"))
    weights = {adapt.short(name).removesuffix(".weight"): p for name, p in adapt.trained(whole).items()}
    columns = gradients(full, whole, samples).split([p.numel() for p in weights.values()], dim=1)
    by_name = dict(zip(weights, columns, strict=True))
    scale = SPEC.alpha / (SPEC.rank if method == "lora" else SPEC.rank**0.5)
    expected = torch.zeros(5, 5)
    for name, a, _ in adapt.adapted(module):
        through = by_name[name].view(5, *weights[name].shape) @ a.detach().T
        expected += scale**2 * kernel(through.flatten(1))
    assert torch.allclose(kernel(rows), expected, rtol=1e-4)


def test_a_kernel_in_blocks_is_the_kernel_at_once() -> None:
    """Where only 3 of 8 gradients may be held, each pair is still computed; where not one fits it is refused."""
    objective, module = built(SPEC)
    width = sum(p.numel() for p in adapt.trained(module).values())
    whole = placement_kernel(objective, module, 8)
    assert torch.allclose(whole, kernel(gradients(objective, module, kernel_samples(objective, 8))), rtol=1e-6)
    assert torch.allclose(placement_kernel(objective, module, 8, room=3 * width), whole, rtol=1e-5)
    with pytest.raises(BadInput, match="one gradient"):
        placement_kernel(objective, module, 8, room=width - 1)
    with pytest.raises(BadInput, match="more than"):
        gradients(objective, module, TASK.train[:3], room=3 * width - 1)


def test_samples_are_the_runs_own_and_not_held_out() -> None:
    """The first of the run's order, less those that are held out or train nothing; too few are refused."""
    held = counting(16, start=3)
    silent = Sample("silent", tuple(range(16)), (-100,) * 16)
    task = Task("t", [*counting(10), *held, silent], held)
    objective, _ = built(replace(SPEC, seed=5), task)
    by_order = [task.train[i].id for i in order(27, 0, 27, seed=5) if i < 10]
    found = kernel_samples(objective, 7)
    assert [s.id for s in found] == by_order[:7]
    assert all(s in task.train[:10] for s in found)
    with pytest.raises(BadInput, match="of 10 that are not held out"):
        kernel_samples(objective, 11)


def test_a_sample_without_labels_has_no_gradient() -> None:
    """Its mean loss would be 0 / 0."""
    objective, module = built(SPEC)
    with pytest.raises(BadInput, match="row 1"):
        gradients(objective, module, [counting(1)[0], replace(counting(2)[1], labels=(-100,) * 16)])


def test_a_frozen_module_has_no_kernel() -> None:
    objective, module = built(SPEC)
    module.requires_grad_(False)
    with pytest.raises(BadInput, match="no parameter is trained"):
        placement_kernel(objective, module, 4)


def test_checkpointing_changes_no_gradient() -> None:
    """Recomputed activations give the same kernel."""
    module = fresh()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    wrapped = adapt.attach(module, from_config(CONFIG), SPEC.plan_method(), 0)
    again = placement_kernel(Supervised(SPEC, wrapped, TASK, CPU), wrapped, 4)
    assert torch.allclose(again, placement_kernel(*built(SPEC), 4), rtol=1e-6)


def some_rows(seed: int, n: int, width: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6), st.integers(3, 9), st.integers(1, 12), st.integers(1, 12), st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_alignment_sees_neither_scale_nor_basis_nor_offset(seed: int, n: int, p: int, q: int, scale: float) -> None:
    """Of two PSD kernels it is in [0, 1] and symmetric; scaling, rotating or shifting all gradients, or renaming
    the samples of both, changes nothing, and a kernel is aligned with its like by 1."""
    one, other = some_rows(seed, n, p), some_rows(seed + 1, n, q)
    value = alignment(kernel(one), kernel(other))
    assert -1e-12 <= value <= 1 + 1e-12
    assert alignment(kernel(other), kernel(one)) == pytest.approx(value, abs=1e-9)
    rotation, _ = torch.linalg.qr(some_rows(seed + 2, p, p))
    moved = scale * (one @ rotation) + some_rows(seed + 3, 1, p)
    assert alignment(kernel(moved), kernel(other)) == pytest.approx(value, abs=1e-6)
    assert alignment(kernel(one), kernel(moved)) == pytest.approx(1.0, abs=1e-6)
    names = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert alignment(kernel(one[names]), kernel(other[names])) == pytest.approx(value, abs=1e-9)


def test_alignment_is_the_similarity_of_centred_features() -> None:
    """|Y'X|^2 / (|X'X| |Y'Y|) of column-centred features: Kornblith et al. 2019, eq. 4, in its other form."""
    x, y = some_rows(0, 12, 4), some_rows(1, 12, 6) + some_rows(0, 12, 4) @ some_rows(2, 4, 6)
    cx, cy = x - x.mean(0), y - y.mean(0)
    by_features = (cy.T @ cx).norm() ** 2 / ((cx.T @ cx).norm() * (cy.T @ cy).norm())
    assert alignment(kernel(x), kernel(y)) == pytest.approx(float(by_features), rel=1e-9)
    assert 0.2 < float(by_features) < 0.95


def test_centring_is_the_product_with_h() -> None:
    """H K H with H = 1 - 1/n, multiplied out."""
    k = kernel(some_rows(3, 6, 4))
    h = torch.eye(6, dtype=torch.float64) - 1 / 6
    assert torch.allclose(centred(k), h @ k @ h)


def test_a_common_gradient_fools_the_cosine_and_not_the_alignment() -> None:
    """Two unrelated sets of gradients that share one large direction each are alike only before centring."""
    one, other = some_rows(0, 40, 3), some_rows(1, 40, 3)
    assert cosine(kernel(one + 100), kernel(other + 100)) > 0.999
    assert alignment(kernel(one + 100), kernel(other + 100)) < 0.2


def test_kernels_without_differences_are_refused() -> None:
    """All gradients equal: 0 / 0 after centring; none at all: 0 / 0 before."""
    k = kernel(some_rows(0, 5, 3))
    same = kernel(torch.full((5, 3), 0.1, dtype=torch.float64))
    with pytest.raises(BadInput, match="same for all pairs"):
        alignment(k, same)
    with pytest.raises(BadInput, match="zero everywhere"):
        cosine(torch.zeros(5, 5), k)
