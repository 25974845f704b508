"""Named errors. Each one says what is wrong, where, and what to do next, on one line.

The exit codes are a promise to scripts and CI: 0 ok, 1 internal bug, 2 usage, 3 input
rejected, 4 infeasible, 5 over budget, 6 environment missing, 7 a prediction or claim failed,
8 undecided, 9 a run failed and was saved, 10 locked by another run, 130 and 143 stopped by a signal
after saving.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraPlanError(Exception):
    """Base of every error a user can cause. Never shown with a traceback."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "", **data: object) -> None:
        self.what, self.where, self.fix, self.data = what, where, fix, data
        super().__init__(what, where, fix)

    @property
    def code(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        fix = f" {self.fix}" if self.fix else ""
        return f"{self.what}{place}.{fix}" if fix else f"{self.what}{place}."


class UsageError(LoraPlanError):
    """The command's words contradict each other."""

    exit_code = 2


class BadInput(LoraPlanError):
    """A file or value that we refuse. Nothing was written."""

    exit_code = 3


class UnknownModelType(BadInput):
    """A `model_type` that no file in `arch/` describes."""


class UnknownName(BadInput):
    """A GPU, model, price or method that is no row of its table."""


class UnsupportedAdapter(BadInput):
    """An adapter that cannot be built: targets that hit nothing, a rank out of range ..."""


class Infeasible(LoraPlanError):
    """Nothing satisfies the constraints; the reasons travel in `data`."""

    exit_code = 4


class OverBudget(Infeasible):
    """Something fits, nothing is affordable."""

    exit_code = 5


class EnvironmentMissing(LoraPlanError):
    """An optional library, a network or a device that this call needs."""

    exit_code = 6


class RunFailed(LoraPlanError):
    """A run could not go on; what was finished before it is on disk."""

    exit_code = 9


class Locked(LoraPlanError):
    """Another process works in the same directory."""

    exit_code = 10


class Stopped(LoraPlanError):
    """A signal ended the work after saving; 130 for SIGINT, 143 for SIGTERM."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names that look most like `name`, for a hint; never used in its place.

    >>> nearest("qwen3_moee", ["qwen3_moe", "llama"], n=1)
    ['qwen3_moe']
    """
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.3)
