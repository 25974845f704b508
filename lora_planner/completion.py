"""What a shell is offered behind a half-typed option: names from the tables, files; and `lora-plan completion`."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "lora-plan", "_LORA_PLAN_COMPLETE"


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell's own completion of paths."""
    return [CompletionItem(incomplete, type="file")]


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Catalogue names, the last of several with commas; a path where no name begins so."""
    from lora_planner.model_source import model_rows

    return _last_of([row.name for row in model_rows()], incomplete) or files(ctx, param, incomplete)


def gpus(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Exact names of GPUs, the last of several with commas."""
    from lora_planner.facts import gpus as rows

    return _last_of([row.name for row in rows()], incomplete)


def quantities(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What `explain` explains."""
    from lora_planner.plan import QUANTITIES

    return _last_of(QUANTITIES, incomplete)


def _last_of(names: list[str] | tuple[str, ...], incomplete: str) -> list[CompletionItem]:
    """
    >>> [item.value for item in _last_of(["l40s", "l4", "t4"], "t4,l4")]
    ['t4,l40s', 't4,l4']
    """
    before, comma, word = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(word)]


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """The script that completes commands, options, models, GPUs and files in SHELL.

    \b
    eval "$(lora-plan completion bash)"                    in ~/.bashrc; zsh alike
    lora-plan completion fish > ~/.config/fish/completions/lora-plan.fish
    """
    kind = get_completion_class(shell)
    assert kind
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, PROGRAM, VARIABLE).source())
