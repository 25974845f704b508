"""Checkpoints under faults, and bitwise resumption."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors import SafetensorError  # noqa: E402
from torch import nn  # noqa: E402

from lora_planner.errors import BadInput, RunFailed  # noqa: E402
from runner import checkpoint  # noqa: E402
from runner.checkpoint import (  # noqa: E402
    SAVING,
    STATE,
    TENSORS,
    load,
    optimizer_tensors,
    restore_optimizer,
    restore_rng,
    rng_tensors,
    save,
)

CALLS = ("mkdir", "open", "write", "fsync", "rename")


class Killed(BaseException):
    """Stands for a kill -9: no handler of the code under test may see it."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors_of(step: int) -> dict[str, Any]:
    return {"lora_A": torch.arange(6, dtype=torch.float32).reshape(2, 3) + step, "count": torch.tensor(step)}


def put(directory: Path, step: int, **words: Any) -> Path:
    return save(directory, step, tensors_of(step), {"losses": [step / 3]}, patience_s=0.0, **words)


def loaded(directory: Path) -> tuple[int, list[str]]:
    """Step and skipped ones of what `load` finds, which must be what `put` wrote."""
    found = load(directory)
    assert found is not None
    step, tensors, state, skipped = found
    assert state == {"losses": [step / 3]}
    assert tensors.keys() == tensors_of(step).keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(step).items())
    return step, skipped


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def fail(patch: pytest.MonkeyPatch, at: int, error: BaseException) -> list[str]:
    """The at-th system call of a save, or its call of safetensors, raises. The list tells the calls so far."""
    calls: list[str] = []

    def faulty(name: str, real: Callable[..., Any], raised: BaseException) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise raised
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        patch.setattr(os, name, faulty(name, getattr(os, name), error))
    text = "Error while serializing: I/O error: No space left on device (os error 28)"  # safetensors 0.8, ext4 full
    raised = SafetensorError(text) if isinstance(error, OSError) else error
    patch.setattr(checkpoint, "save_file", faulty("save_file", checkpoint.save_file, raised))
    return calls


# --- what is kept -----------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Two by default, in names that sort; one where one is asked for; nothing to load before the first."""
    assert load(tmp_path / "runs") is None
    for step in (5, 10, 15):
        put(tmp_path / "runs", step)
    assert names(tmp_path / "runs") == ["step-000010", "step-000015"]
    put(tmp_path / "runs", 2_000_000, keep=1)
    assert names(tmp_path / "runs") == ["step-2000000"]
    assert loaded(tmp_path / "runs") == (2_000_000, [])


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    """Tied, transposed, half, integer, boolean, empty and scalar tensors, NaN included; so does a state with NaN."""
    weight = torch.randn(4, 3)
    sent = {
        "embed": weight,
        "lm_head": weight,
        "transposed": weight.T,
        "row": weight[1],
        "half": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(7.0, dtype=torch.float64, requires_grad=True),
    }
    save(tmp_path, 1, sent, {"loss": float("nan"), "text": "ü"})
    found = load(tmp_path)
    assert found is not None
    _, tensors, state, _ = found
    assert tensors.keys() == sent.keys()
    for name, tensor in sent.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].nan_to_num(9), tensor.detach().nan_to_num(9)), name
    assert state["loss"] != state["loss"] and state["text"] == "ü"


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    """Also where the first one is damaged; the whole one that is older stays."""
    put(tmp_path, 10)
    path = put(tmp_path, 20)
    (path / STATE).write_bytes(b"")
    put(tmp_path, 20)
    assert loaded(tmp_path) == (20, [])
    save(tmp_path, 20, {"w": torch.ones(1)}, {})
    found = load(tmp_path)
    assert found is not None and found[1].keys() == {"w"}
    assert names(tmp_path) == ["step-000010", "step-000020"]


def test_a_damaged_later_step_is_not_kept_in_place_of_a_whole_one(tmp_path: Path) -> None:
    """20 is damaged, the run goes on from 10 and saves 15: 15 and 10 stay, 20 goes."""
    put(tmp_path, 10)
    (put(tmp_path, 20) / STATE).unlink()
    assert loaded(tmp_path)[0] == 10
    put(tmp_path, 15)
    assert names(tmp_path) == ["step-000010", "step-000015"]
    assert loaded(tmp_path) == (15, [])


# --- faults -----------------------------------------------------------------------------------


def test_full_disk_at_every_call_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """The 1st, 2nd, 3rd ... call of a save fails: exit 9, and a whole checkpoint is there, nothing half made."""
    reached: list[str] = []
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        put(directory, 10)
        error = None
        with pytest.MonkeyPatch.context() as patch:
            calls = fail(patch, at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            try:
                put(directory, 20)
            except RunFailed as caught:
                error = caught
        if len(calls) < at:
            break
        is_named = "rename" in calls[: at - 1]  # only its parent's fsync was left to do
        if error is None:
            assert calls[0] == "mkdir" and at == 1  # of a directory that exists: no failure
            continue
        reached.append(calls[at - 1])
        assert error.exit_code == 9 and "MiB free" in str(error) and "\n" not in str(error)
        assert loaded(directory) == (20 if is_named else 10, [])
        assert "step-000010" in names(directory) and SAVING not in names(directory)
        put(directory, 20)
        assert loaded(directory) == (20, [])
    assert set(reached) == {*CALLS, "save_file"}
    # both files and their directory reach the disk before the name does
    assert [call for call in calls if call in ("fsync", "rename")] == ["fsync", "fsync", "fsync", "rename", "fsync"]


def test_kill_at_every_call_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """A killed save cleans nothing up: the last one loads all the same, and the next save clears what is left."""
    put(tmp_path, 10)
    for at in range(1, 100):
        with pytest.MonkeyPatch.context() as patch:
            fail(patch, at, Killed())
            try:
                put(tmp_path, 20)
                break
            except Killed:
                pass
        step, skipped = loaded(tmp_path)
        assert step in (10, 20) and skipped == []
        shutil.copytree(tmp_path, tmp_path.with_name(f"killed-{at}"))
        put(tmp_path.with_name(f"killed-{at}"), 30)
        assert SAVING not in names(tmp_path.with_name(f"killed-{at}"))
        assert loaded(tmp_path.with_name(f"killed-{at}")) == (30, [])
    assert at > 8
    assert names(tmp_path) == ["step-000010", "step-000020.1"]  # the last kill came after the rename


def test_a_full_disk_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is freed after the first try: the checkpoint is written."""
    fail(monkeypatch, 6, OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)))
    save(tmp_path, 20, tensors_of(20), {"losses": [20 / 3]}, patience_s=0.05)
    assert loaded(tmp_path) == (20, [])


@pytest.mark.parametrize("file", [STATE, TENSORS])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path, file: str) -> None:
    """One bit at every offset of either file: the one before is loaded, and the damaged one is named."""
    put(tmp_path, 10)
    path = put(tmp_path, 20) / file
    good = path.read_bytes()
    for offset in range(len(good)):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 1 << offset % 8]) + good[offset + 1 :])
        step, (skipped,) = loaded(tmp_path)
        assert step == 10 and skipped.startswith("step-000020: "), offset
        assert file in skipped and "\n" not in skipped


@pytest.mark.parametrize("file", [STATE, TENSORS])
def test_a_cut_or_missing_file_is_found(tmp_path: Path, file: str) -> None:
    """Every shorter length, one byte more, and no file at all."""
    put(tmp_path, 10)
    path = put(tmp_path, 20) / file
    good = path.read_bytes()
    for bad in itertools.chain((good[:size] for size in range(len(good))), [good + b"0"]):
        path.write_bytes(bad)
        assert loaded(tmp_path)[0] == 10
    path.unlink()
    assert loaded(tmp_path) == (10, [f"step-000020: it has no {file}"])


def test_when_all_are_damaged_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run starts over, and the log names each."""
    for step in (10, 20):
        (put(tmp_path, step) / TENSORS).write_bytes(b"")
    assert load(tmp_path) is None
    assert "step-000010" in caplog.text and "step-000020" in caplog.text


def test_another_steps_files_are_refused(tmp_path: Path) -> None:
    """A directory that was renamed or copied is not what its name says."""
    put(tmp_path, 10)
    shutil.copytree(tmp_path / "step-000010", tmp_path / "step-000099")
    assert loaded(tmp_path) == (10, ["step-000099: it is of step 10"])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle with every checksum right is refused and not executed."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = put(tmp_path, 10)
    (path / TENSORS).write_bytes(pickle.dumps(Bomb()))
    body = json.loads((path / STATE).read_text())
    body.pop("marker")
    body["sha256"] = hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()
    marker = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (path / STATE).write_text(json.dumps({**body, "marker": marker}))
    assert load(tmp_path) is None
    assert names(tmp_path) == ["step-000010"]


# --- resumption -------------------------------------------------------------------------------


def model_and_optimizer(**words: Any) -> tuple[nn.Module, torch.optim.AdamW]:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    groups = [{"params": list(model[3].parameters()), "lr": 0.03}, {"params": list(model[0].parameters())}]
    return model, torch.optim.AdamW(groups, lr=0.01, eps=1e-10, **words)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The data and the dropout are drawn from torch's generator, so its state matters."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("words", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_resumed_run_is_the_unbroken_run_bit_by_bit(tmp_path: Path, words: dict[str, bool]) -> None:
    """Weights, AdamW and generator through the disk into a new model: the next steps give equal bits."""
    torch.manual_seed(1)
    model, optimizer = model_and_optimizer(**words)
    train(model, optimizer, 4)
    save(tmp_path, 4, {**model.state_dict(), **optimizer_tensors(optimizer), **rng_tensors()}, {})
    train(model, optimizer, 5)

    torch.manual_seed(2)
    resumed, its_optimizer = model_and_optimizer(**words)
    train(resumed, its_optimizer, 1)  # what it had before must not matter
    found = load(tmp_path)
    assert found is not None
    tensors = found[1]
    resumed.load_state_dict({name: tensors[name] for name in resumed.state_dict()})
    restore_optimizer(its_optimizer, tensors)
    restore_rng(tensors)
    train(resumed, its_optimizer, 5)

    pairs = zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    mine, its = optimizer_tensors(optimizer), optimizer_tensors(its_optimizer)
    assert mine.keys() == its.keys() and len(mine) == 4 * (4 if words.get("amsgrad") else 3)
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_without_the_optimizers_state_the_run_would_differ(tmp_path: Path) -> None:
    """The control of the test above: the same weights with a new AdamW go elsewhere."""
    torch.manual_seed(1)
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 4)
    other, its_optimizer = model_and_optimizer()
    other.load_state_dict(model.state_dict())
    generator = rng_tensors()
    train(model, optimizer, 1)
    restore_rng(generator)
    train(other, its_optimizer, 1)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_two_optimizers_share_no_memory() -> None:
    """Restoring from a live optimizer copies: steps of one do not move the other."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 2)
    _, its_optimizer = model_and_optimizer()
    restore_optimizer(its_optimizer, optimizer_tensors(optimizer))
    before = {name: tensor.clone() for name, tensor in optimizer_tensors(its_optimizer).items()}
    train(model, optimizer, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer_tensors(its_optimizer).items())


def test_a_checkpoint_before_the_first_step_clears_the_optimizer() -> None:
    """No state in it means no state after it, and rates stay those of the optimizer."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 2)
    restore_optimizer(optimizer, {"0.weight": torch.zeros(1)})
    assert optimizer_tensors(optimizer) == {}
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.01]


def test_an_optimizer_over_other_weights_is_refused() -> None:
    """Another shape, and a parameter that is not there: exit 3 with both sides of it."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, 1)
    state = optimizer_tensors(optimizer)
    for parameters in ([torch.zeros(3, 9)], [torch.zeros(3, 8)]):
        with pytest.raises(BadInput, match=r"optimizer\.\d\.\w+ is \[") as caught:
            restore_optimizer(torch.optim.AdamW(parameters), state)
        assert "\n" not in str(caught.value)
