"""A process that executes specs one after another:  python -m runner.worker

Reads one JSON line a run on stdin, {"spec": ..., "place": ...}; writes JSON lines on stdout: progress, and
{"ended": ...}. The line "stop" asks the run to save and end. When stdin closes, the parent is gone: the worker
saves and leaves, so that no orphan holds the device.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print must not reach the parent as an answer
    stopping = threading.Event()
    asked: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            if line.strip() == "stop":
                stopping.set()
            else:
                asked.put(line)
        stopping.set()
        asked.put(None)

    threading.Thread(target=listen, daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        try:
            answers.write(json.dumps(message) + "\n")
            answers.flush()
        except BrokenPipeError:
            stopping.set()

    import torch

    from lora_planner.record import FAILED, RunSpec
    from runner.execute import Outcome, Place, execute
    from runner.measure import environment

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    while (line := asked.get()) is not None:
        job = json.loads(line)
        spec = RunSpec.from_json(job["spec"])
        tell({"started": environment(torch.device(spec.device))})
        save_to = Path(job["save_to"]) if job.get("save_to") else None
        try:
            outcome = execute(spec, Place.from_json(job["place"]), tell, stopping.is_set, save_to)
        except Exception as error:  # a bug in one run must not take the others with it
            outcome = Outcome(FAILED, {}, f"{type(error).__name__}: {str(error).strip()[:300]}")
        tell({"ended": asdict(outcome)})


if __name__ == "__main__":
    main()
