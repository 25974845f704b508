"""The only writer of a journal: whole lines, on the disk before `append` returns, one process at a time.

The format of a line, and reading, are `lora_planner.record`. Beside `runs.jsonl` lies `runs.lock` while a
process writes: JSON with its pid, host, start and heartbeat. A lock left by a dead process is taken over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from lora_planner.errors import BadInput, EnvironmentMissing, Locked, RunFailed
from lora_planner.ledger import Estimate
from lora_planner.record import Json, RunSpec, line

JOURNAL, LOCK = "runs.jsonl", "runs.lock"
BEAT_S = 5.0  # between heartbeats
STALE_S = 60.0  # a heartbeat of another host that is older than this has stopped
PATIENCE_S = 60.0  # how long a full disk is waited for
PAUSE_S = 1.0  # between two tries on a full disk
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


# --- events: the schema is that of lora_planner.record.merge -----------------------------------


def planned(spec: RunSpec, config: Json, predicted: Mapping[str, Estimate], planned_with: str = "") -> Json:
    """Written before the run starts, so that no prediction can know its measurement."""
    return {
        "event": "planned",
        "key": spec.key,
        "spec": spec.to_json(),
        "config": config,
        "predicted": {name: asdict(estimate) for name, estimate in predicted.items()},
        "planned_with": planned_with,
    }


def registered(document: Json, digest: str) -> Json:
    """What a claim measures and decides by; written before the first run that it asks for."""
    return {"event": "registered", "key": digest, "document": document}


def started(key: str, env: Json) -> Json:
    return {"event": "started", "key": key, "env": env}


def ended(key: str, status: str, measured: Json, reason: str = "") -> Json:
    return {"event": "ended", "key": key, "status": status, "measured": finite(measured), "reason": reason}


def finite(value: Any) -> Any:
    """The same document with None for NaN and infinity, which JSON has no words for.

    >>> finite({"losses": [2.0, float("nan")], "n": 3})
    {'losses': [2.0, None], 'n': 3}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


# --- disks ------------------------------------------------------------------------------------


def patiently(write: Callable[[], T], where: Path, patience_s: float = PATIENCE_S) -> T:
    """What `write` returns. A full disk is waited for, since whoever fills it may clean up; a failed
    `write` must leave things as they were. Any other failure of the disk, or a longer one: RunFailed.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return write()
        except OSError as error:
            if error.errno not in FULL:
                raise RunFailed(f"cannot write: {error.strerror or error}", str(where),
                                "Repair that and start again: what was finished before is kept.") from error  # fmt: skip
            if time.monotonic() >= deadline:
                why = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
                raise RunFailed(f"{why}, {free_mib(where)}, after waiting {patience_s:.0f} s", str(where),
                                "Free some space and start again: what was finished before is kept.") from error  # fmt: skip
        time.sleep(min(PAUSE_S, patience_s))


def free_mib(where: Path) -> str:
    """Free space in words, for messages; a quota may allow less."""
    try:
        return f"{shutil.disk_usage(where if where.is_dir() else where.parent).free / 2**20:.1f} MiB free"
    except OSError:
        return "free space unknown"


def sync_directory(directory: Path) -> None:
    """Names are on the disk only after their directory is."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- the lock ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. `heartbeat` is the only field that changes while it is held.

    started, heartbeat   seconds since 1970, UTC
    ticks                kernel's start time of the process: a reused pid has another; None: not known
    """

    pid: int
    host: str
    started: float
    heartbeat: float
    ticks: int | None = None

    @classmethod
    def this_process(cls) -> Holder:
        now = time.time()
        return cls(os.getpid(), socket.gethostname(), now, now, process_state(os.getpid())[1])

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The holder named in a lock file; None where there is no file.

        One that is not readable was just created, or is damaged: it counts as another host's, alive until
        the file is STALE_S old.
        """
        try:
            written = path.stat().st_mtime
            text = path.read_text("utf-8", errors="replace")
        except FileNotFoundError:
            return None
        try:
            words = json.loads(text)
            ticks = words.get("ticks")
            return cls(int(words["pid"]), str(words["host"]), float(words["started"]), float(words["heartbeat"]),
                       ticks if ticks is None else int(ticks))  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return cls(0, "", written, written)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    def is_same(self, other: Holder | None) -> bool:
        return other is not None and (self.pid, self.host, self.started) == (other.pid, other.host, other.started)

    def is_alive(self) -> bool:
        """On this host the kernel knows, whatever the clock says; elsewhere the heartbeat is all there is."""
        if self.host == socket.gethostname() and self.pid > 0:
            return is_running(self.pid, self.ticks)
        return time.time() - self.heartbeat <= STALE_S

    def refusal(self, where: Path) -> Locked:
        if not self.host:
            return Locked("another run is starting here, or its lock is damaged", str(where),
                          f"Try again; the lock is taken over once it is {STALE_S:.0f} s old.")  # fmt: skip
        age = max(time.time() - self.heartbeat, 0.0)
        return Locked(f"process {self.pid} on {self.host} works here, heartbeat {age:.0f} s ago", str(where),
                      "Wait for it, stop it, or name another directory.", pid=self.pid, host=self.host)  # fmt: skip


def process_state(pid: int) -> tuple[str, int | None]:
    """State letter and start time in clock ticks since boot, fields 3 and 22 of /proc/PID/stat; ("", None)
    where there is no such file. The name in field 2 may hold spaces and brackets.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", None


def is_running(pid: int, ticks: int | None) -> bool:
    """Whether the process of this pid and start time is alive. A zombie is dead: it writes nothing any more."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    state, now = process_state(pid)
    return state not in ("Z", "X") and (ticks is None or now is None or ticks == now)


class Lock:
    """`runs.lock`, held from `take` to `release`; a daemon thread renews the heartbeat."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.me = Holder.this_process()
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._beats, name="heartbeat", daemon=True)

    def take(self) -> None:
        with one_at_a_time(self.path.parent):
            while not self._created():
                found = Holder.read(self.path)
                if found is None:
                    continue  # released this moment
                if found.is_alive():
                    raise found.refusal(self.path)
                self._set_aside(found)
        self._beat.start()

    def check(self) -> None:
        """Locked, if another process took the lock over: this one was suspended, or its lock was deleted."""
        found = Holder.read(self.path)
        if not self.me.is_same(found):
            raise found.refusal(self.path) if found else Locked(
                "the lock was deleted while this run held it", str(self.path), "Start again.")  # fmt: skip

    def release(self) -> None:
        self._released.set()
        self._beat.join()
        with suppress(OSError):
            if self.me.is_same(Holder.read(self.path)):
                self.path.unlink()

    def _created(self) -> bool:
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(fd, self.me.to_bytes())
        except OSError:
            self.path.unlink(missing_ok=True)  # an empty lock would keep everyone out for STALE_S
            raise
        finally:
            os.close(fd)
        return True

    def _set_aside(self, judged: Holder) -> None:
        """Removes a stale lock. Where the file system has no kernel locks another process may have replaced
        it since it was judged: such a lock is put back.
        """
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if not judged.is_same(Holder.read(aside)):
                with suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beats(self) -> None:
        fresh = self.path.with_name(self.path.name + ".new")  # a fixed name: a killed writer leaves one at most
        while not self._released.wait(BEAT_S):
            with suppress(OSError):  # a full disk is no reason to die: on this host the pid is what counts
                if not self.me.is_same(Holder.read(self.path)):
                    return  # `check` tells
                fresh.write_bytes(Holder(**{**asdict(self.me), "heartbeat": time.time()}).to_bytes())
                os.replace(fresh, self.path)


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """A kernel lock while a lock file is judged and replaced, which takes more than one system call."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS without locks: Lock._set_aside looks twice
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- the journal ------------------------------------------------------------------------------


class Journal:
    """An open journal. `with Journal.open(directory) as journal: journal.append(planned(...))`"""

    def __init__(self, path: Path, lock: Lock, patience_s: float) -> None:
        self.path, self.patience_s, self._lock = path, patience_s, lock
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise BadInput("the journal is not a regular file", str(path), "Move it away.")
        if is_new:
            sync_directory(path.parent)

    @classmethod
    @contextmanager
    def open(cls, directory: Path, patience_s: float = PATIENCE_S) -> Iterator[Journal]:
        """The journal of this directory, which is made where it is missing. Locked, if another process has it."""
        lock = Lock(directory / LOCK)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock.take()
        except OSError as error:
            raise _unwritable(directory, error) from error
        try:
            try:
                journal = cls(directory / JOURNAL, lock, patience_s)
            except OSError as error:
                raise _unwritable(directory / JOURNAL, error) from error
            try:
                yield journal
            finally:
                journal.close()
        finally:
            lock.release()

    def append(self, event: Mapping[str, Any]) -> None:
        """Writes one event. When this returns it is on the disk; when it raises, the journal is as before."""
        text = line(event).encode("ascii")
        patiently(lambda: self._write(text), self.path, self.patience_s)

    def reserve(self, size: int) -> None:
        """EnvironmentMissing where the disk has not `size` bytes free. Quotas are not looked at."""
        free = shutil.disk_usage(self.path.parent).free
        if free < size:
            raise EnvironmentMissing(f"{size / 2**20:.1f} MiB are needed and {free / 2**20:.1f} MiB are free",
                                     str(self.path.parent), "Free some space or name another directory.")  # fmt: skip

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, text: bytes) -> None:
        """One write of the whole line, then fsync; cut back to the last good length if either fails.

        A last line without its newline is what a killed writer left: it gets one first, and stays alone.
        """
        self._lock.check()
        good = os.fstat(self._fd).st_size
        torn = good > 0 and os.pread(self._fd, 1, good - 1) != b"\n"
        whole = b"\n" + text if torn else text
        try:
            if os.write(self._fd, whole) != len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a short write: the disk filled up in it
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, good)
            raise


def _unwritable(where: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot write here: {error.strerror or error}", str(where), "Name a directory you may write to.")
