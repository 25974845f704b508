"""What a run costs: peak bytes by phase, seconds, and the machine it was measured on.

On CUDA bytes are the allocator's (`torch.cuda.max_memory_allocated`). On a CPU they are the sizes of all
tensors alive, from the profiler's allocation events: resident memory would be wrong by up to 140 %, since
the C library keeps what it freed.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from lora_planner.facts import CPU, Gpu

CUDA_KIND = "torch.cuda.max_memory_allocated"
CPU_KIND = "tensors alive, by the profiler's allocation events"
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "numpy")


class Peaks:
    """The largest number of bytes alive in each phase of a CUDA run; on a CPU it only passes through."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: dict[str, int] = {}
        self.reserved = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            yield
        finally:
            torch.cuda.synchronize(self.device)
            self.bytes[name] = max(self.bytes.get(name, 0), torch.cuda.max_memory_allocated(self.device))
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))


def cpu_peak(step: Callable[[], None]) -> int:
    """Most tensor bytes alive while `step` runs: those alive before it, plus the running sum of its allocations.

    Source: the allocation events of torch.profiler, summed in time order.
    """
    gc.collect()
    before = live_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes: list[tuple[int, int]] = []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    running = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        running += size
        peak = max(peak, running)
    return before + peak


def live_bytes() -> int:
    """Bytes of all storages that Python still reaches, each counted once."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        try:
            if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
                for tensor in (found, found.grad if found.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
        except (ReferenceError, RuntimeError):  # a dead proxy, or a tensor without storage
            continue
    return sum(storages.values())


def control_s(device: torch.device) -> float:
    """Seconds of a fixed kernel, the median of nine: what changes between two calls is the machine, not the run."""
    a = torch.full((512, 512), 0.5, device=device)
    times = []
    for _ in range(9):
        synchronize(device)
        start = perf_counter()
        for _ in range(4):
            a @ a
        synchronize(device)
        times.append(perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_name(threads: int) -> str:
    """What the planner calls this processor: its model and the threads that one run uses.

    >>> cpu_name(1).startswith("cpu-") and cpu_name(1).endswith("-1t")
    True
    """
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2] if lines else model
    elif sys.platform == "darwin":
        model = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout
    words = "".join(c if c.isalnum() else " " for c in model.lower()).split()
    return "-".join(["cpu", *[w for w in words if w not in ("r", "tm", "cpu", "processor")][:5], f"{threads}t"])


def cpu_device(threads: int) -> Gpu:
    """This processor as a device of the planner, from half a second of matmuls and copies.

    peak: 2 n^3 / seconds of an n x n product, n = 1024, best of five (a peak is what is never exceeded).
    bandwidth: 2 x 64 MiB / seconds of a copy, best of five.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.randn(1024, 1024)
        peak = 2 * 1024**3 / _best(lambda: a @ a)
        source = torch.empty(16 << 20)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / _best(lambda: target.copy_(source))
    finally:
        torch.set_num_threads(before)
    return Gpu(
        name=cpu_name(threads),
        reported_as=(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        hbm_bytes_per_s=float(f"{bandwidth:.4g}"),
        peak_flops_per_s={"fp32": float(f"{peak:.4g}")},
        form=CPU,
        source=f"micro-benchmark, {threads} thread(s), torch {version('torch')}",
        as_of=datetime.now(UTC).date(),
    )


def _best(call: Callable[[], Any], times: int = 5) -> float:
    call()
    found = []
    for _ in range(times):
        start = perf_counter()
        call()
        found.append(perf_counter() - start)
    return min(found)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to tell two machines and two stacks apart. No host name, no path."""
    stamp: dict[str, Any] = {name: _version(name) for name in LIBRARIES}
    stamp |= {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        stamp |= {
            "device": properties.name,
            "driver_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
            "others_bytes": properties.total_memory - torch.cuda.mem_get_info(device)[0],
        }
    else:
        stamp["device"] = cpu_name(torch.get_num_threads())
    return stamp


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.split("\n")[0].strip()


def commit() -> str:
    """The commit of a checkout, "+" where it was changed; the version where this is an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return f"lora-plan {_version('lora-plan')}"
    try:
        asked = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.strip()


def summary(seconds: list[float], skip: int = 2) -> tuple[float, float, float]:
    """(median, 10 % and 90 % point) of the steps after the warm-up."""
    steady = sorted(seconds[skip:] or seconds)
    n = len(steady)
    return statistics.median(steady), steady[n // 10], steady[min(n - 1, n * 9 // 10)]
