"""Claims that need no training: sizes, work, Adam's invariance, the first update; and the list of traps."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_planner.record import DIVERGED, FAILS, FINISHED, HOLDS, UNDECIDED, RunRecord, RunSpec, Verdict
from runner.claims import adam_invariance, claim, counts, first_update, flops, toy
from runner.claims.traps import TRAPS

CLAIMS = {"C01": counts, "C02": flops, "C03": adam_invariance, "C04": first_update}
GOLDEN = Path(__file__).parents[1] / "calibrate" / "tables" / "adapter_counts_shared_outer.csv"


@cache
def judged(name: str) -> Verdict:
    return CLAIMS[name].verdict([], "cpu")


@cache
def real(rank: int) -> tuple[float, float]:
    """Counted once for all tests."""
    return COUNT(rank)


COUNT = flops.model


@pytest.fixture(autouse=True)
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "model", real)


# ---------------------------------------------------------------- what a claim is


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_states_itself(name: str) -> None:
    """Sentence, source, published numbers, metric and rule are there, its traps are known, and it asks for no run."""
    module = CLAIMS[name]
    assert claim(name) == (name, module)
    for word in (module.SENTENCE, module.SOURCE, module.PUBLISHED, module.UNIT, module.METRIC, module.RULE):
        assert word
        assert word.isascii()
    for status in (HOLDS, FAILS, UNDECIDED):
        assert status in module.RULE.lower()
    assert set(module.TRAPS) <= set(TRAPS)
    assert module.specs(None, []) == []


def test_traps_are_twenty_lines() -> None:
    """Numbered 1 to 20, one line of plain signs each, no two alike."""
    assert list(TRAPS) == list(range(1, 21))
    assert len(set(TRAPS.values())) == 20
    assert all(line.isascii() and line.isprintable() and line for line in TRAPS.values())


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_holds(name: str) -> None:
    """With its control seen, an effect in its unit, and a picture that can be drawn."""
    found = judged(name)
    assert (found.claim, found.status) == (name, HOLDS), found.sentence
    assert found.control
    assert (found.sentence + found.control).isascii()
    assert found.n > 0
    assert found.effect is not None
    assert found.effect.unit == CLAIMS[name].UNIT
    assert found.effect.low <= found.effect.value <= found.effect.high
    if found.plot:
        for series in found.plot.series:
            assert len(series.x) == len(series.y) > 1
            heights = [*series.y, *series.low, *series.high]
            assert all(math.isfinite(v) and (v > 0 or not found.plot.y_log) for v in heights), series.name


# ---------------------------------------------------------------- C01


def test_the_hosted_trainers_integers_are_the_golden_ones() -> None:
    """What the claim carries is what the golden table says, component by component."""
    with GOLDEN.open() as file:
        rows = {(r["config"], r["component"]): int(r["per_rank"]) for r in csv.DictReader(file)}
    for name, numbers in counts.TINKER.items():
        assert numbers == tuple(rows[name, part] for part in ("attn", "mlp", "unembed"))


def test_the_paper_counts_2_753_792_at_rank_1() -> None:
    """By hand: per layer q and o 8192 each, k and v 5120 each, three MLP matrices 18432 each, and the unembedding."""
    by_hand = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) + 4096 + 128256
    assert judged("C01").effect.value == by_hand  # type: ignore[union-attr]
    assert judged("C01").n == 5 + 18


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (lambda count: lambda model, method: 1.03 * count(model, method), FAILS),
        (lambda count: lambda model, method: count(model, replace(method, targets=method.targets[:1])), FAILS),
        (lambda count: lambda model, method: count(model, replace(method, targets=(method.targets[0], "unembed"))),
         UNDECIDED),
    ],
    ids=["3 % more", "unembedding never adapted", "unembedding always adapted"],
)  # fmt: skip
def test_wrong_sizes_do_not_hold(
    fault: Callable[[Any], Any], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A count that is off fails; one that is the same with and without the unembedding tells nothing."""
    monkeypatch.setattr(counts, "trainable_params", fault(counts.trainable_params))
    assert counts.verdict([], "cpu").status == status


def test_one_wrong_integer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says which, with both numbers."""
    monkeypatch.setitem(counts.TINKER, "llama-3.1-8b", (851_968, 1_769_473, 132_352))
    found = counts.verdict([], "cpu")
    assert found.status == FAILS
    assert "llama-3.1-8b has (851968, 1769472, 132352) for (851968, 1769473, 132352)" in found.sentence


# ---------------------------------------------------------------- C02


def test_the_break_even_rank_is_two_ninths_of_the_width() -> None:
    """12 d^2 matrix elements and 18 d adapter elements a rank and layer: r* = 12 d^2 / 54 d."""
    assert judged("C02").effect.value == pytest.approx(2 * 128 / 9)  # type: ignore[union-attr]
    assert "wall clock was not measured" in judged("C02").sentence


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_one_matrix_costs_what_the_paper_says(rank: int) -> None:
    """2 N^2 + 6 N r multiply-adds a token; N r fewer with A frozen; 3 N^2 in full fine-tuning."""
    n = 128
    assert flops.matrix(rank) == 2 * n**2 + 6 * n * rank
    assert flops.matrix(rank, train_a=False) == 2 * n**2 + 5 * n * rank
    assert flops.matrix(0) == 3 * n**2


def test_wrong_work_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that forgets B fails, and the ranks are named; a wrong break-even fails; a blind counter tells nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(flops.flops, "adapter_flops", lambda pair: (2 * pair.a_active, 0))
        found = flops.verdict([], "cpu")
        assert found.status == FAILS
        assert "model at rank 28" in found.sentence
    with monkeypatch.context() as patch:
        patch.setattr(flops, "BREAK_EVEN", 32)
        assert flops.verdict([], "cpu").status == FAILS
    with monkeypatch.context() as patch:
        patch.setattr(flops, "RANKS", (1, 14))  # never passes 1
        found = flops.verdict([], "cpu")
        assert (found.status, found.effect) == (FAILS, None)
        assert "does not pass 1 from there to rank 14" in found.sentence
    with monkeypatch.context() as patch:
        matrix = flops.matrix
        patch.setattr(flops, "matrix", lambda rank, train_a=True: matrix(rank))
        assert flops.verdict([], "cpu").status == UNDECIDED


SPEC = RunSpec("base", "shift", rank=4)
FULL = replace(SPEC, method="full", rank=0)


def run(spec: RunSpec, seconds: float | None, status: str = FINISHED, **measured: Any) -> RunRecord:
    return RunRecord(spec.key, spec, {}, {}, status, measured={"step_median_s": seconds, **measured})


def test_wall_clock_is_reported_and_decides_nothing() -> None:
    """Median step by rank over that of full fine-tuning on the same batch; arms that have no such pair are left out."""
    runs = [
        run(FULL, 2.0), run(replace(FULL, seed=1), 4.0), run(SPEC, 2.4), run(replace(SPEC, rank=64), 6.0),
        run(replace(SPEC, seq_len=64), 1.0),  # no full run of this length
        run(replace(SPEC, targets=("attention",)), 0.3),
        run(replace(SPEC, seed=1), 30.0, drift=0.2),
        run(replace(SPEC, seed=2), 30.0, DIVERGED),
        run(replace(SPEC, seed=3), None),
        run(replace(SPEC, method="dora"), 30.0),
    ]  # fmt: skip
    assert flops.wall_clock(runs) == pytest.approx({4: 0.8, 64: 2.0})
    shorter = [run(replace(FULL, seq_len=64), 1.0), run(replace(SPEC, seq_len=64), 1.0)]
    assert flops.wall_clock([*runs[:4], *shorter]) == pytest.approx({4: 0.9, 64: 2.0})
    found = flops.verdict(runs, "cpu")
    assert found.status == HOLDS
    assert "wall clock 0.80 at rank 4, 2.00 at rank 64" in found.sentence
    assert found.plot is not None
    assert found.plot.series[-1].y == pytest.approx((0.8, 2.0))


# ---------------------------------------------------------------- the toy of C03 and C04


def test_the_toy_trains_as_torch_does() -> None:
    """The same losses from autograd and torch's Adam, over 30 steps with rates and eps of their own in A and B."""
    torch = pytest.importorskip("torch")
    batch = toy.toy()
    x, right, base, readout = (torch.from_numpy(v) for v in (batch.x, batch.right, batch.base, batch.readout))
    a0 = 0.7 * np.random.default_rng(3).uniform(-1, 1, (4, toy.WIDTH)) / toy.WIDTH**0.5
    a = torch.nn.Parameter(torch.from_numpy(a0))
    b = torch.nn.Parameter(torch.zeros(toy.WIDTH, 4, dtype=torch.float64))
    groups = [{"params": [a], "lr": 1e-3, "eps": 1e-6}, {"params": [b], "lr": 2e-3, "eps": 1e-7}]
    optimizer = torch.optim.Adam(groups)
    theirs = []
    for _ in range(30):
        logits = base + (32 / 4) * x @ a.T @ b.T @ readout.T
        loss = torch.nn.functional.cross_entropy(logits, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        theirs.append(loss.item())
    ours = toy.losses(4, 29, 1e-3, 2e-3, seed=3, init=0.7, eps_a=1e-6, eps_b=1e-7)
    assert ours[0] - ours[-1] > 1
    assert ours == pytest.approx(theirs, abs=1e-11)


def test_the_toy_reads_real_text() -> None:
    """128 places of the Zen of Python, each with the letter that follows."""
    text, batch = toy.text(), toy.toy()
    assert text.startswith("the zen of python, by tim peters\n\nbeautiful is better than ugly.")
    assert batch.right.shape == (128, 27 + 1)
    assert batch.right.sum(axis=1).tolist() == [1.0] * 128
    assert batch.right[0].argmax() == toy.LETTERS.index(text[10])
    assert batch.right[-1].argmax() == len(toy.LETTERS), "the last sign is no letter"


# ---------------------------------------------------------------- C03


def test_scaling_one_thing_alone_is_no_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten factor on alpha, on the init or on the rate of B fails."""
    losses = adam_invariance.losses

    def broken(name: str) -> Callable[..., Any]:
        def call(rank: int, steps: int, rate_a: float, rate_b: float, **words: Any) -> Any:
            if "init" in words:
                rate_b = adam_invariance.RATE if name == "rate of B" else rate_b
                words |= {"init": 1.0} if name == "init" else {"alpha": 32.0} if name == "alpha" else {}
            return losses(rank, steps, rate_a, rate_b, **words)

        return call

    monkeypatch.setattr(adam_invariance, "STEPS", 20)
    for name in ("alpha", "init", "rate of B"):
        monkeypatch.setattr(adam_invariance, "losses", broken(name))
        assert adam_invariance.verdict([], "cpu").status == FAILS, name
    monkeypatch.setattr(adam_invariance, "losses", broken("nothing"))
    assert adam_invariance.verdict([], "cpu").status == HOLDS


def test_one_step_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A has no gradient yet, so that its rate does not matter: undecided, not confirmed."""
    monkeypatch.setattr(adam_invariance, "STEPS", 1)
    found = adam_invariance.verdict([], "cpu")
    assert found.status == UNDECIDED
    assert found.control == "with LR A not scaled every pair differs by 0 nats or more"


# ---------------------------------------------------------------- C04


def drawn(mean: Callable[[float], float], std: Callable[[float], float], seeds: int) -> Any:
    """Changes with known moments at every rank."""
    noise = np.random.default_rng(0).standard_normal((len(first_update.RANKS), seeds))
    noise = (noise - noise.mean(axis=1, keepdims=True)) / noise.std(axis=1, ddof=1, keepdims=True)
    return np.array([-mean(r) + std(r) * row for r, row in zip(first_update.RANKS, noise, strict=True)])


def test_statistics_of_known_numbers() -> None:
    """Means equal by construction differ by nothing, with the textbook's standard error; the slope is the given one."""
    found = drawn(lambda r: 1.0, lambda r: 0.2 * r**-0.4, seeds=100)
    gap, error = first_update.differences(found)
    assert gap == pytest.approx([0.0] * 6, abs=1e-12)
    assert error[0] == pytest.approx(math.hypot(0.2, 0.2 * 64**-0.4) / 10)
    slope, slope_error = first_update.slope(found)
    assert slope == pytest.approx(-0.4)
    # steps of ln 2 around their middle: sum of squares 28 ln(2)^2
    assert slope_error == pytest.approx(1 / math.sqrt(28 * math.log(2) ** 2 * 198))


@pytest.mark.parametrize(
    ("mean", "std", "other", "status"),
    [
        (lambda r: 1.0, lambda r: 0.2 * r**-0.5, lambda r: r**0.5, HOLDS),
        (lambda r: r**0.05, lambda r: 0.2 * r**-0.5, lambda r: r**0.5, FAILS),
        (lambda r: 1.0, lambda r: 0.2 * r**-0.3, lambda r: r**0.5, FAILS),
        (lambda r: 1.0, lambda r: 2.0 * r**-0.5, lambda r: r**0.5, UNDECIDED),
        (lambda r: 1.0, lambda r: 0.2 * r**-0.5, lambda r: 1.0, UNDECIDED),
    ],
    ids=["as claimed", "mean grows", "scatter falls too slowly", "too noisy to tell", "control not seen"],
)
def test_the_rule_on_planted_changes(
    mean: Any, std: Any, other: Any, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every status of the rule, from changes whose moments are known."""
    planted = iter([drawn(mean, std, 200), drawn(other, lambda r: 0.1, 200)])
    monkeypatch.setattr(first_update, "changes", lambda scaling: next(planted))
    assert first_update.verdict([], "cpu").status == status


def test_the_wrong_scaling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real first steps with alpha / sqrt(r) in place of alpha / r."""
    monkeypatch.setattr(first_update, "SEEDS", 20)
    monkeypatch.setattr(first_update.lora, "scaling", first_update.rslora.scaling)
    assert first_update.verdict([], "cpu").status == FAILS
