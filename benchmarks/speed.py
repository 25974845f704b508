"""Speed of the planner, side by side in one run with what it is compared to.

    python benchmarks/speed.py            writes reports/speed.md

1. `lora-plan recommend` as a whole process, against `python -c "import torch"` where torch is there.
2. One full plan: parameters, FLOPs, memory by phase, time and cost of one configuration.
3. A sweep of 10,000 plans: method x rank x targets x micro-batch x GPU.

Each is repeated and the median printed with its spread: nothing here can fail a test.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lora_planner.facts import gpu
from lora_planner.method import method
from lora_planner.model_source import load_model
from lora_planner.plan import Configuration, PriceBook, price

ROOT = Path(__file__).parents[1]
RECOMMEND = [
    sys.executable, "-m", "lora_planner", "recommend", "--model", "qwen3-8b", "--gpu", "h100-sxm-80gb",
    "--data", str(ROOT / "examples/stdlib-docs.jsonl"),
]  # fmt: skip


def seconds(command: list[str], repeats: int) -> list[float]:
    """Wall time of whole processes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times


def spread(times: list[float], unit: float = 1.0) -> str:
    ordered = sorted(t / unit for t in times)
    return f"{statistics.median(ordered):.3g} [{ordered[0]:.3g}, {ordered[-1]:.3g}]"


def sweep(size: int = 10_000) -> tuple[int, float, float]:
    """(plans, seconds of the first pass, seconds of a second one with warm tables)."""
    model = load_model("qwen3-8b")
    gpus = [gpu(n) for n in ("h100-sxm-80gb", "a100-sxm-80gb", "l40s-48gb", "rtx4090-24gb", "h200-sxm-141gb")]
    methods = [
        method(name, rank, targets=(targets,))
        for name in ("lora", "qlora", "rslora", "dora", "lora-fa")
        for rank in (1, 4, 8, 16, 32, 64, 128, 256)
        for targets in ("all-linear", "mlp", "attention")
    ]
    cells = itertools.product(methods, (1, 2, 4, 8, 16, 32), gpus, ("none", "full"), (1024, 2048))
    todo = [
        Configuration(model, m, gpu=g, micro_batch=b, seq_len=s, checkpointing=c)
        for m, b, g, c, s in itertools.islice(cells, size)
    ]
    book, passes = PriceBook.load(), []
    for _ in range(2):
        start = time.perf_counter()
        for configuration in todo:
            price(configuration, book)
        passes.append(time.perf_counter() - start)
    return len(todo), passes[0], passes[1]


def main() -> None:
    rows = [("`lora-plan recommend`, whole process", "s", spread(seconds(RECOMMEND, 7)))]
    try:
        rows.append(("`python -c 'import torch'`", "s", spread(seconds([sys.executable, "-c", "import torch"], 3))))
    except subprocess.CalledProcessError:
        rows.append(("`python -c 'import torch'`", "s", "torch is not installed here"))
    plans, cold, warm = sweep()
    rows.append((f"sweep of {plans:,} plans, first pass", "s", f"{cold:.3g}"))
    rows.append(("the same, second pass", "s", f"{warm:.3g}"))
    rows.append(("one full plan (second pass)", "µs", f"{warm / plans * 1e6:.3g}"))
    lines = [
        "# Speed",
        "",
        f"{platform.machine()}, Python {platform.python_version()}; one run of "
        "`python benchmarks/speed.py`; median [fastest, slowest].",
        "",
        "| what | unit | measured |",
        "|---|---|---|",
    ]
    lines += [f"| {what} | {unit} | {value} |" for what, unit, value in rows]
    text = "\n".join(lines) + "\n"
    (ROOT / "reports/speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
