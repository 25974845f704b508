"""Tests see no developer's own measurements."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lora_planner import facts


@pytest.fixture(scope="session", autouse=True)
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty LORA_PLAN_HOME, for this process and for those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(facts.HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
        facts.forget()
        yield
    facts.forget()
