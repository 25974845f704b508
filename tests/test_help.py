"""What a user meets before any number: help of one screen with an example that is real, and a shell that completes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lora_planner.cli import main
from lora_planner.completion import SHELLS
from lora_planner.facts import gpus
from lora_planner.model_source import model_rows

SCREEN = 40  # lines, at 100 columns
COMMANDS = sorted(main.commands)


def help_of(name: str) -> str:
    done = CliRunner().invoke(main, [name, "--help"], terminal_width=100)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(name: str) -> None:
    """Each command's help is one screen; whoever has arguments to give finds a line to copy."""
    shown = help_of(name)
    assert len(shown.splitlines()) <= SCREEN
    if name not in ("models", "gpus"):
        assert f"lora-plan {name}" in shown.split("Options:")[0].split("\n", 1)[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_name_options_that_exist(name: str) -> None:
    """An example of the help has no option that its command lacks."""
    known = {o for p in main.commands[name].params for o in (*p.opts, *p.secondary_opts)}
    lines = help_of(name).split("Options:")[0].replace("\\\n", " ").splitlines()
    used = {
        word
        for line in lines
        if line.strip().startswith(f"lora-plan {name}")
        for word in line.split(" | ")[0].split()
        if word.startswith("--")
    }
    assert used <= known


def test_one_name_is_one_thing() -> None:
    """An option that several commands have takes the same kind of value in each: a flag nowhere else takes a file."""
    kinds: dict[str, set[bool]] = {}
    for command in main.commands.values():
        for p in command.params:
            if isinstance(p, click.Option):
                kinds.setdefault(p.opts[0], set()).add(p.is_flag)
    assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_takes_a_file_or_a_name_completes_it(name: str) -> None:
    """Options and arguments whose metavar says FILE, DIR, PATH or a plan, and those of models and GPUs."""
    for p in main.commands[name].params:
        if re.search("FILE|DIR|PATH|PLAN|CONFIG|RUN|svg", p.metavar or "") or p.name in ("model", "gpu"):
            assert p._custom_shell_complete is not None, p.name


def completed(*words: str) -> list[str]:
    """What bash is told, as click's script asks for it."""
    done = subprocess.run(
        [sys.executable, "-c", "from lora_planner.cli import main; main(prog_name='lora-plan')"], capture_output=True, text=True,
        timeout=60, env={**os.environ, "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1),
                         "_LORA_PLAN_COMPLETE": "bash_complete"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_names_are_completed() -> None:
    """Models and GPUs come from the tables, behind a comma too; a path is left to the shell."""
    assert completed("lora-plan", "ex") == ["plain,explain", "plain,export"]
    assert completed("lora-plan", "explain", "learn") == ["plain,learning-rate"]
    wanted = [f"plain,t4-16gb,{g.name}" for g in gpus() if g.name.startswith("h100")]
    assert wanted
    assert completed("lora-plan", "recommend", "--gpu", "t4-16gb,h100") == wanted
    assert completed("lora-plan", "recommend", "--model", "qwen3") == [
        f"plain,{m.name}" for m in model_rows() if m.name.startswith("qwen3")
    ]
    assert completed("lora-plan", "recommend", "--model", "./my") == ["file,./my"]
    assert completed("lora-plan", "recommend", "--data", "chats") == ["file,chats"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_its_shell_reads(shell: str, tmp_path: Path) -> None:
    """Where the shell is installed it parses the script; every script asks the program that it completes."""
    script = CliRunner().invoke(main, ["completion", shell]).output
    assert "_LORA_PLAN_COMPLETE" in script
    assert "lora-plan" in script
    if program := shutil.which(shell):
        file = tmp_path / "script"
        file.write_text(script)
        assert subprocess.run([program, "-n", str(file)], timeout=30).returncode == 0


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes(tmp_path: Path) -> None:
    """A real bash that has read the script completes a half-typed GPU."""
    program = tmp_path / "lora-plan"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from lora_planner.cli import main; main(prog_name=\'lora-plan\')" "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "script").write_text(CliRunner().invoke(main, ["completion", "bash"]).output)
    words = (f"source {tmp_path}/script; COMP_WORDS=(lora-plan recommend --gpu h100-n); COMP_CWORD=3; "
             f"_lora_plan_completion {program}; printf '%s\\n' \"${{COMPREPLY[@]}}\"")  # fmt: skip
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["h100-nvl-94gb"], done.stderr
