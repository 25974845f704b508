"""Fit what the GPU takes besides tensors, and the interval of the peak:  python -m calibrate.memory

Tensors are counted (memory.py); three constants are not, and come from measured rows:

    allocator     (reserved - allocated) / (allocated - base), median over one T4 archive
    unexplained   measured allocated / counted allocated - 1, the same archive
    peak_ratio    5 % and 95 % of measured / predicted peak over sources that were NOT used above

Writes lora_planner/data/memory_constants.json. Rows: tests/golden/measured_memory.csv.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from lora_planner import memory
from lora_planner.arch import from_config
from lora_planner.method import Method
from lora_planner.units import GIB, MIB

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tests/golden/measured_memory.csv"
OUT = ROOT / "lora_planner/data/memory_constants.json"
FITTED_ON = "fitcheck"


def predicted(row: dict[str, str]) -> memory.MemoryPlan:
    """The plan of a measured row."""
    model = from_config(
        {
            "model_type": row["model_type"], "hidden_size": int(row["hidden"]),
            "num_hidden_layers": int(row["layers"]), "num_attention_heads": int(row["heads"]),
            "num_key_value_heads": int(row["kv_heads"]), "intermediate_size": int(row["inner"]),
            "vocab_size": int(row["vocab"]), "tie_word_embeddings": row["tied"] == "1",
        }
    )  # fmt: skip
    targets = tuple(row["targets"].split())
    method = Method(row["method"], int(row["rank"]), 32.0, targets, "none", row["base_dtype"], row["adapter_dtype"])
    if method.is_full:
        method = Method("full", 0, 0.0, (), "none")
    return memory.memory(
        model,
        method,
        micro_batch=int(row["micro_batch"]),
        seq_len=int(row["seq_len"]),
        checkpointing=row["checkpointing"],
        attention=row["attention"],
        keep_logits=row["keep_logits"] == "1",
        upcast=row["upcast"] == "1",
        autocast=row["autocast"] == "1",
        full_precision=row["full_precision"] or "mixed",
    )


def _row(name: str, value: float, low: float, high: float, basis: str, n: int, source: str) -> dict[str, object]:
    numbers = {"value": value, "low": low, "high": high}
    return {
        "name": name,
        **{k: float(f"{v:.4g}") for k, v in numbers.items()},
        "basis": basis,
        "n": n,
        "source": source,
    }


def _write(rows: list[dict[str, object]]) -> None:
    body = ",\n".join(json.dumps(row) for row in rows)
    OUT.write_text(f'{{"schema": 1, "constants": [\n{body}\n]}}\n')
    memory.constants.cache_clear()


def main() -> None:
    with ROWS.open() as file:
        rows = list(csv.DictReader(file))
    fit = [row for row in rows if row["source"] == FITTED_ON]
    allocator, unexplained = [], []
    for row in fit:
        plan = predicted(row)
        base = plan.phases["load"]["weights"]
        allocated = float(row["allocated_gib"]) * GIB
        allocator.append((float(row["gib"]) * GIB - allocated) / (allocated - base))
        unexplained.append(allocated / plan.allocated - 1)
    n, archive = len(fit), "fitcheck-llm 0.3.1 sdist, one T4, six shapes"
    known = [
        _row("cuda_context_bytes", 0.45 * GIB, 0.14 * GIB, 0.8 * GIB, "assumed", 0,
             "0.14 GiB on a T4 (fitcheck); 0.4 to 0.8 are usual with cuBLAS and cuDNN loaded on newer cards"),
        _row("workspace_bytes", 32 * MIB, 8 * MIB, 96 * MIB, "assumed", 0, "cuBLAS: 8 MiB a stream, 32 on Hopper"),
        _row("allocator_fraction", *np.quantile(allocator, [0.5, 0.05, 0.95]), "fitted", n, archive),
        _row("unexplained", *np.quantile(unexplained, [0.5, 0.05, 0.95]), "fitted", n, archive),
        _row("peak_ratio", 1, 0.9, 1.1, "fitted", 0, ""),
        _row("peak_ratio_hybrid", 1, 0.6, 1.7, "assumed", 0, "no measurement of a state-space model is published"),
    ]  # fmt: skip
    _write(known)

    ratios = defaultdict(list)
    for row in rows:
        plan = predicted(row)
        ledger = plan.phases[plan.peak_phase]
        shown = plan.peak.value - (ledger["CUDA context"] if row["kind"] == "reserved" else 0)
        ratios[row["source"]].append(float(row["gib"]) * GIB / shown)
    for source, values in ratios.items():
        errors = np.abs(np.array(values) - 1)
        note = "used in the fit" if source == FITTED_ON else "left out"
        print(f"{source:14} n {len(values):3}  measured/predicted median {np.median(values):.3f}, "
              f"5-95 % {np.quantile(values, 0.05):.3f} to {np.quantile(values, 0.95):.3f}, "
              f"median error {np.median(errors):.1%}, worst {errors.max():.1%}  ({note})")  # fmt: skip
    unseen = {source: values for source, values in ratios.items() if source != FITTED_ON}
    # every source counts the same, however many rows it has
    pooled = np.concatenate([np.quantile(values, np.linspace(0.01, 0.99, 99)) for values in unseen.values()])
    low, high = np.quantile(pooled, [0.05, 0.95])
    known[4] = _row("peak_ratio", 1, low, high, "fitted", sum(map(len, unseen.values())),
                    f"5 to 95 % of measured / predicted over sources left out of the fit: {', '.join(unseen)}")  # fmt: skip
    _write(known)
    print(f"peak_ratio {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
