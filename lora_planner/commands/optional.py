"""Modules that need more than the base install: each is here, or the error says what to install."""

from __future__ import annotations

from typing import Any

from lora_planner.errors import EnvironmentMissing

TRAIN = "pip install 'lora-plan[train]'"


def runner() -> Any:
    """The module that runs things."""
    try:
        import runner.verify
    except ImportError as error:
        if error.name and error.name.split(".")[0] == "runner":
            raise
        raise EnvironmentMissing(f"{error.name} is not installed", "runner", TRAIN) from None
    return runner.verify


def track() -> tuple[Any, Any]:
    """Modules that read tables of measurements and count errors."""
    try:
        from calibrate import track
        from calibrate.track import board
    except ImportError as error:
        raise EnvironmentMissing(f"{error.name} is not installed", "score", TRAIN) from None
    return track, board


def own_runs() -> Any:
    """The module that fits curves of our own runs."""
    try:
        from calibrate import own_runs
    except ImportError as error:
        raise EnvironmentMissing(f"{error.name} is not installed", "report", TRAIN) from None
    return own_runs
