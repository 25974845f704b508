"""peft's comparison of its methods on one L40S: peak memory and training time of each.

Columns are those of the benchmark's result files. A row becomes the row of measured runs that it would be there, so that
one reader and one predictor serve both. Image generation has no language model in it: no prediction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from calibrate import memory as peaks
from calibrate.track import Row, speed
from calibrate.track.case import Case
from calibrate.track.measured import memory_cases
from calibrate.track.setting import Measured, Setting, number, read

NAME = "peft methods on an L40S"
COLUMNS = ("suite", "exp", "seed", "lr", "r", "alpha", "targets", "trainable", "total", "mem_max", "mem_avg", "mem99",
           "train_s", "total_s", "file", "tokens", "gpu", "torch")  # fmt: skip
#: of the benchmark's default configuration
MICRO_BATCH, STEPS, LONGEST = 4, 5000, 768
SOURCE = "huggingface/peft method_comparison"


def as_measured(row: Row) -> dict[str, str]:
    """The same run in the columns of measured runs.

    >>> as_measured({"exp": "lora/llama-3.2-3B-rank32", "targets": "q_proj|v_proj", "r": "32"})["method"]
    'lora:rank32'
    """
    method, _, rest = (row.get("exp") or "").partition("/")
    model, _, how = re.sub(r"^(llama-[\d.]+-\d+b)-?", r"\1/", rest, flags=re.IGNORECASE).partition("/")
    tokens = number(row.get("tokens"))
    mean = f"mean ~{tokens / STEPS / MICRO_BATCH:.0f} tok/sample" if tokens else "mean unknown"
    seconds = number(row.get("train_s"))
    return {
        "source": f"{SOURCE}/{row.get('suite') or ''}",
        "model": model,
        "method": f"{method}:{how or 'default'}" if method != "full-finetuning" else "full",
        "rank": row.get("r") or "",
        "targets": (row.get("targets") or "").replace("|", "+"),
        "precision": "bfloat16; adapter fp32",
        "gpu": row.get("gpu") or "",
        "n_gpus": "1",
        "seq_len": f"<= {LONGEST} (padded batch, {mean})",
        "micro_batch": str(MICRO_BATCH),
        "grad_ckpt": "False",
        "attention impl": "default(sdpa)",
        "peak_mem_GiB": "",
        "tokens_per_s": f"{tokens / seconds:.1f}" if tokens and seconds and seconds > 0 else "",
        "time_min": f"{seconds / 60:.4f}" if seconds and seconds > 0 else "",
        "extra": f"mem=max RESERVED minus init; trainable={row.get('trainable') or ''}; alpha={row.get('alpha') or ''}; "
        f"steps={STEPS}; torch {row.get('torch') or ''}",
    }


def setting(row: Row) -> Setting:
    """The run of a row."""
    found = read(as_measured(row))
    peak = number(row.get("mem_max"))
    memory = (Measured("reserved minus init", peak),) if peak and peak > 0 else ()
    if (row.get("suite") or "") != "MetaMathQA" and not found.reason:
        found = replace(
            found, reason=f"the suite {(row.get('suite') or '')[:40]!r} trains no language model known here"
        )
    return replace(found, source="peft-l40s", memory=memory, accumulation=1)


def cases(rows: Sequence[Row]) -> list[Case]:
    """Peak memory of every row, and its training time."""
    found: list[Case] = []
    for row in rows:
        found += memory_cases(setting(row))
        found += speed.peft_cases(row)
    return found


def held_out(rows: Sequence[Row]) -> list[Case]:
    """The same by constants that were fitted on the measured runs of others than peft."""
    known = peaks.held_out(peaks.settings())["peft"]
    found = [case for row in rows for case in memory_cases(setting(row), known)]
    return found + speed.peft_held_out(rows)
