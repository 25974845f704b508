"""Runs the commands of journeys.md and README.md and puts what they print behind them: python examples/journeys.py

A journey is a bash block that begins with lora-plan (or a set-up line before it) and the text block that follows. They run
one after the other in a directory that holds copies of examples/ and reports/runs/. tests/test_journeys.py runs the same
and compares.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "examples" / "journeys.md",)
#: a command and what it prints; the language of a block that is not run is "sh"
BLOCK = re.compile(r"```bash\n(?P<command>.*?)```\n\n```text\n(?P<output>.*?)```", re.DOTALL)
COLUMNS = "96"


def prepare(folder: Path) -> dict[str, str]:
    """Copies what the commands read; the environment that they run in: no width, calibration or colour of this machine."""
    for name in ("examples", "reports/runs"):
        shutil.copytree(ROOT / name, folder / name)
    program = folder / "bin" / "lora-plan"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_planner "$@"\n')
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": COLUMNS,
            "NO_COLOR": "1", "LORA_PLAN_HOME": str(folder / "home")}  # fmt: skip


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What a shell shows of the command; an exit code other than 0 is said in a line of its own."""
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    lines = [line.rstrip() for line in done.stdout.rstrip().splitlines()]
    said = f"exit code {done.returncode}"
    return "\n".join([*lines, *([f"({said})"] if done.returncode and said not in lines[-1] else [])]) + "\n"


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        environment = prepare(folder)
        for page in PAGES:

            def fresh(block: re.Match[str]) -> str:
                print(block["command"].strip())
                return f"```bash\n{block['command']}```\n\n```text\n{run(block['command'], folder, environment)}```"

            page.write_text(BLOCK.sub(fresh, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
