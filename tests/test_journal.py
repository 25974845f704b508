"""The journal under faults: kill -9, full disk, flipped bits, rivals. Every fault is a real or an injected one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from lora_planner.errors import BadInput, EnvironmentMissing, Locked, RunFailed
from lora_planner.ledger import DERIVED, around
from lora_planner.record import DIVERGED, INTERRUPTED, RunSpec, line, read_events, read_runs
from runner import journal as journal_file
from runner.journal import JOURNAL, LOCK, Holder, Journal, Lock, ended, finite, planned, process_state, started

ROOT = Path(__file__).parents[1]
WRITER = """
import sys
from pathlib import Path
from runner.journal import Journal, started
with Journal.open(Path(sys.argv[1])) as journal:
    for n in range(int(sys.argv[2]), int(sys.argv[3])):
        journal.append(started(str(n), {"padding": "x" * 3000}))
        print(n, flush=True)
    sys.stdin.read()
"""
needs_proc = pytest.mark.skipif(process_state(os.getpid())[1] is None, reason="the kernel has no /proc")


def writer(directory: Path, first: int = 0, stop: int = 1) -> subprocess.Popen[str]:
    """Another process that appends events first ... stop, tells each, and then waits."""
    command = [sys.executable, "-c", WRITER, str(directory), str(first), str(stop)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def keys(directory: Path) -> list[str]:
    return [event["key"] for event in read_events(directory / JOURNAL)[0]]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """Two events are in it; a full disk is waited for for no time at all."""
    with Journal.open(tmp_path, patience_s=0.0) as opened:
        opened.append(started("a", {}))
        opened.append(started("b", {}))
        yield opened


def fail(patch: pytest.MonkeyPatch, names: tuple[str, ...], at: int, error: Callable[[], BaseException]) -> list[str]:
    """The at-th call of these functions of `os`, counted together, raises. The list tells the calls so far."""
    calls: list[str] = []

    def faulty(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                raise error()
            return real(*args, **kwargs)

        return call

    for name in names:
        patch.setattr(os, name, faulty(name, getattr(os, name)))
    return calls


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- events -----------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Spec, prediction and measurements survive the disk; NaN and infinity become null, nothing else changes."""
    spec = RunSpec("base", "shift", rank=4)
    predicted = {"step_s": around(0.5, 2, "s", DERIVED, "throughput")}
    measured = {"losses": [3.25, float("nan"), float("-inf")], "norms": [("q_proj", 1.5, 2.0)], "trainable": 12}
    with Journal.open(tmp_path / "new" / "directory") as journal:
        journal.append(planned(spec, {"hidden_size": 8}, predicted, "0.1 abc"))
        journal.append(started(spec.key, {"torch": "2"}))
        assert read_runs(journal.path)[0].status == INTERRUPTED
        journal.append(ended(spec.key, DIVERGED, measured, "loss is NaN at step 2"))
    (run,) = read_runs(journal.path)
    assert (run.key, run.spec, run.config, run.planned_with) == (spec.key, spec, {"hidden_size": 8}, "0.1 abc")
    assert run.predicted == predicted
    assert (run.status, run.reason, run.env) == (DIVERGED, "loss is NaN at step 2", {"torch": "2"})
    assert run.measured == {"losses": [3.25, None, None], "norms": [["q_proj", 1.5, 2.0]], "trainable": 12}


def test_only_measurements_are_cleaned() -> None:
    """A NaN in a prediction is a bug, and is not hidden."""
    assert finite({"a": {"b": (float("inf"), True, "NaN", 7)}}) == {"a": {"b": [None, True, "NaN", 7]}}
    nan = around(float("nan"), 2, "s", DERIVED)
    with pytest.raises(ValueError, match="Out of range"):
        line(planned(RunSpec("base", "shift"), {}, {"step_s": nan}))


# --- kill -9 ----------------------------------------------------------------------------------


def test_kill_at_any_moment_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """20 writers, one after the other, each killed at a random moment: each goes on where the last one died."""
    moments, acknowledged = random.Random(7), set[str]()
    for kills in range(1, 21):
        with writer(tmp_path, first=kills * 10**6, stop=(kills + 1) * 10**6) as process:
            assert process.stdout is not None
            acknowledged.add(process.stdout.readline().strip())
            time.sleep(moments.uniform(0, 0.03))
            process.kill()
            acknowledged |= {told.strip() for told in process.stdout if told.endswith("\n")}
        events, skipped = read_events(tmp_path / JOURNAL)
        found = [int(event["key"]) for event in events]
        assert acknowledged <= {str(n) for n in found}
        assert found == sorted(set(found))
        assert len(found) - len(acknowledged) + len(skipped) <= kills  # one in flight for each kill


@pytest.mark.parametrize("cut", [1, 2, 10, 40, 90])
def test_torn_last_line_stays_alone(tmp_path: Path, cut: int) -> None:
    """What a killed writer left of a line spoils neither the line before it nor the next one."""
    whole = line(started("torn", {"torch": "x" * 60}))
    assert len(whole) > 90
    path = tmp_path / JOURNAL
    path.write_text(line(started("a", {})) + whole[:cut])
    for key in ("b", "c"):
        with Journal.open(tmp_path) as journal:
            journal.append(started(key, {}))
    assert keys(tmp_path) == ["a", "b", "c"]
    assert [number for number, _ in read_events(path)[1]] == [2]
    assert path.read_text().count("\n") == 4


# --- full and broken disks --------------------------------------------------------------------


def test_full_disk_at_every_call_leaves_the_journal_as_it_was(journal: Journal) -> None:
    """The 1st, 2nd, 3rd ... write or fsync of an append fails: exit 9, the free space and the fix are named."""
    before, reached = journal.path.read_bytes(), list[str]()
    for at in itertools.count(1):
        error = None
        with pytest.MonkeyPatch.context() as patch:
            calls = fail(patch, ("write", "fsync"), at, full)
            try:
                journal.append(started("c", {}))
            except RunFailed as caught:
                error = caught
        if error is None:
            break
        reached.append(calls[-1])
        assert error.exit_code == 9
        assert "disk is full" in str(error) and "MiB free" in str(error) and "Free some space" in str(error)
        assert journal.path.read_bytes() == before
    assert reached == ["write", "fsync"]
    assert [event["key"] for event in read_events(journal.path)[0]] == ["a", "b", "c"]


def test_half_written_line_is_cut_off_before_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle of a line and is freed while we wait: the event is there once, and whole."""
    monkeypatch.setattr(journal_file, "PAUSE_S", 0.001)
    real, tries = os.write, []
    with Journal.open(tmp_path, patience_s=30.0) as journal:
        journal.append(started("a", {}))

        def short(fd: int, text: bytes) -> int:
            tries.append(journal.path.stat().st_size)
            return real(fd, text[: len(text) // 2] if len(tries) < 4 else text)

        monkeypatch.setattr(os, "write", short)
        journal.append(started("b", {}))
    assert len(tries) == 4 and len(set(tries)) == 1  # cut back to the same length each time
    assert keys(tmp_path) == ["a", "b"]
    assert read_events(tmp_path / JOURNAL)[1] == []


def test_a_full_disk_is_waited_for_no_longer_than_the_patience(journal: Journal) -> None:
    """With patience the append is tried again until it has run out."""
    journal.patience_s = 0.2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_file, "PAUSE_S", 0.05)
        tries = []
        patch.setattr(os, "write", lambda *_: tries.append(time.monotonic()) or 0)
        with pytest.raises(RunFailed, match=r"waiting 0 s"):
            journal.append(started("c", {}))
    assert 3 <= len(tries) <= 6
    assert tries[-1] - tries[0] >= 0.15


def test_broken_disk_is_not_waited_for(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error is no full disk: exit 9 at once."""
    journal.patience_s = 60.0
    fail(monkeypatch, ("fsync",), 1, lambda: OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(RunFailed, match="cannot write: Input/output error"):
        journal.append(started("c", {}))


def test_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, a file where the directory should be, no regular file as journal: exit 3, one line."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / JOURNAL).mkdir(parents=True)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / JOURNAL)
    for name in ("file", "folder", "pipe"):
        with pytest.raises(BadInput) as caught, Journal.open(tmp_path / name):
            pass
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value) and name in str(caught.value)
        assert not (tmp_path / name / LOCK).exists()
    fail(monkeypatch, ("mkdir", "open"), 1, lambda: OSError(errno.EROFS, os.strerror(errno.EROFS)))
    with pytest.raises(BadInput, match="Read-only file system"), Journal.open(tmp_path / "read-only"):
        pass


def test_a_lock_that_could_not_be_written_keeps_nobody_out(tmp_path: Path) -> None:
    """The disk is full when the lock is made: no empty lock is left."""
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, ("write",), 1, full)
        with pytest.raises(BadInput, match="No space left"), Journal.open(tmp_path):
            pass
    with Journal.open(tmp_path):
        pass


def test_space_is_reserved_before_a_sweep(journal: Journal) -> None:
    """What does not fit is refused before anything runs; what fits is not."""
    journal.reserve(1)
    with pytest.raises(EnvironmentMissing, match="MiB are needed") as caught:
        journal.reserve(2**60)
    assert caught.value.exit_code == 6


# --- damaged lines ----------------------------------------------------------------------------


def test_a_flipped_bit_is_never_read(tmp_path: Path) -> None:
    """One bit at every offset of a journal: an event is read as it was written or is reported, never altered."""
    path = tmp_path / JOURNAL
    good = "".join(line(started(key, {"torch": "2.9", "lr": 1e-10})) for key in "abc").encode()
    path.write_bytes(good)
    events, _ = read_events(path)
    for offset in range(len(good)):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 1 << offset % 8]) + good[offset + 1 :])
        read, skipped = read_events(path)
        assert all(event in events for event in read)
        assert read == events or skipped, offset
        is_newline = good[offset] == ord("\n")
        assert len(read) >= (1 if is_newline else 2), offset


def test_a_file_cut_anywhere_keeps_the_lines_before_it(tmp_path: Path) -> None:
    """Cut at every offset: whole lines are read, the last one is reported."""
    path = tmp_path / JOURNAL
    good = "".join(line(started(key, {})) for key in "abc").encode()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        whole = good[:size].count(b"\n")
        read, skipped = read_events(path)
        assert [event["key"] for event in read] == list("abc")[:whole]
        assert len(skipped) == (0 if good[:size].endswith(b"\n") or not size else 1)


# --- rivals -----------------------------------------------------------------------------------


def test_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Two processes at once: the second gets exit 10 with pid and host; after a kill -9 it takes over."""
    with writer(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        with pytest.raises(Locked) as caught, Journal.open(tmp_path):
            pass
        assert caught.value.exit_code == 10
        assert f"process {process.pid} on {socket.gethostname()}" in str(caught.value)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    with Journal.open(tmp_path) as journal:
        journal.append(started("next", {}))
    assert keys(tmp_path) == ["0", "next"]
    assert not list(tmp_path.glob(f"{LOCK}*"))


@needs_proc
def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    """A killed process whose parent never asks about it, as in a container without an init, has let go."""
    with writer(tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with Journal.open(tmp_path) as journal:
            journal.append(started("next", {}))


def test_one_process_opens_it_once(tmp_path: Path) -> None:
    """The holder's own second attempt is refused too, and does not take the lock away."""
    with Journal.open(tmp_path) as journal:
        with pytest.raises(Locked), Journal.open(tmp_path):
            pass
        journal.append(started("a", {}))
    with Journal.open(tmp_path):
        pass


@needs_proc
def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    """This pid is alive; with another start time it is another process's lock, with its own it is held."""
    holder = Holder.this_process()
    assert holder.ticks is not None
    write_lock(tmp_path, holder)
    with pytest.raises(Locked), Journal.open(tmp_path):
        pass
    write_lock(tmp_path, Holder(holder.pid, holder.host, holder.started, time.time(), holder.ticks - 1))
    with Journal.open(tmp_path):
        pass


@pytest.mark.parametrize(("age_s", "is_stale"), [(0, False), (50, False), (70, True), (10**6, True)])
def test_a_lock_of_another_host_lives_by_its_heartbeat(tmp_path: Path, age_s: float, is_stale: bool) -> None:
    """Over there no pid can be asked for: 60 seconds decide."""
    write_lock(tmp_path, Holder(os.getpid(), "elsewhere", time.time() - 10**7, time.time() - age_s))
    with nullcontext() if is_stale else pytest.raises(Locked, match="elsewhere"), Journal.open(tmp_path):
        pass


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe", b'{"pid":1e999,"host":"","started":0}'])
def test_a_damaged_lock_is_believed_for_a_minute(tmp_path: Path, text: bytes) -> None:
    """It may have been created this moment; an old one is taken over."""
    (tmp_path / LOCK).write_bytes(text)
    with pytest.raises(Locked, match="damaged"), Journal.open(tmp_path):
        pass
    os.utime(tmp_path / LOCK, (time.time() - 70, time.time() - 70))
    with Journal.open(tmp_path):
        pass


@pytest.mark.parametrize("has_kernel_locks", [True, False])
def test_one_of_many_takes_a_stale_lock_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_kernel_locks: bool
) -> None:
    """Eight at the same moment, 25 times: one gets it. On NFS without locks no two can go on to write."""
    if not has_kernel_locks:
        monkeypatch.setattr(journal_file, "one_at_a_time", lambda directory: nullcontext())
    monkeypatch.setattr(Lock, "release", lambda lock: lock._released.set())  # the file is checked below

    def race(lock: Lock) -> None:
        ready.wait()
        try:
            lock.take()
            taken.append(lock)
        except Locked:
            pass

    for _ in range(25):
        write_lock(tmp_path, Holder(1, "elsewhere", 0.0, 0.0))
        ready, taken = threading.Barrier(8), list[Lock]()
        threads = [threading.Thread(target=race, args=(Lock(tmp_path / LOCK),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holding = [lock for lock in taken if lock.me.is_same(Holder.read(tmp_path / LOCK))]
        assert len(holding) == 1
        assert not has_kernel_locks or taken == holding
        for lock in taken:
            lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_lock_replaced_since_it_was_judged_is_put_back(tmp_path: Path) -> None:
    """NFS without locks: a rival took the stale lock over a moment before us. It keeps it, and we are refused."""
    stale, rival = Holder(1, "elsewhere", 0.0, 0.0), Holder.this_process()
    write_lock(tmp_path, rival)
    lock = Lock(tmp_path / LOCK)
    lock._set_aside(stale)
    assert Holder.read(tmp_path / LOCK) == rival
    with pytest.raises(Locked):
        lock.take()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_heartbeat_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a journal is open its lock grows younger and nothing else in it changes."""
    monkeypatch.setattr(journal_file, "BEAT_S", 0.01)
    with Journal.open(tmp_path):
        first, deadline = Holder.read(tmp_path / LOCK), time.monotonic() + 10
        while (now := Holder.read(tmp_path / LOCK)) == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert first is not None and now is not None
        assert first.is_same(now) and now.ticks == first.ticks
        assert now.heartbeat > first.heartbeat


def test_a_writer_that_lost_its_lock_writes_nothing(tmp_path: Path) -> None:
    """Suspended, overtaken, woken up: the next append is refused, and the new holder's lock is left alone."""
    with Journal.open(tmp_path) as journal:
        journal.append(started("a", {}))
        rival = Holder(1, "elsewhere", 0.0, time.time())
        write_lock(tmp_path, rival)
        with pytest.raises(Locked, match="elsewhere"):
            journal.append(started("b", {}))
    assert Holder.read(tmp_path / LOCK) == rival
    (tmp_path / LOCK).unlink()
    with Journal.open(tmp_path) as journal:
        (tmp_path / LOCK).unlink()
        with pytest.raises(Locked, match="deleted"):
            journal.append(started("b", {}))
    assert keys(tmp_path) == ["a"]


def write_lock(directory: Path, holder: Holder) -> None:
    (directory / LOCK).write_bytes(holder.to_bytes())
