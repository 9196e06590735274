"""Nothing that clients send reaches the vendors of libraries."""

import os
from typing import Any

import pytest
from langsmith import utils

from app.telemetry import disable_foreign_tracing

read_variable: Any = utils.get_env_var
"""langsmith's reader of the environment; its cache is not in its type."""
TRACING = ["LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"]


@pytest.mark.parametrize("name", TRACING)
def test_langsmith_is_switched_off_whichever_variable_asks_for_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its own check says so, even if it has looked at the environment before."""
    for each in [*TRACING, "HF_HUB_DISABLE_TELEMETRY"]:
        monkeypatch.setenv(each, "")
    monkeypatch.setenv(name, "true")
    read_variable.cache_clear()
    enabled_before = name == "LANGCHAIN_TRACING" or utils.tracing_is_enabled()

    disable_foreign_tracing(allow_langsmith=False)
    off = utils.tracing_is_enabled()
    read_variable.cache_clear()

    assert enabled_before
    assert not off
    assert {"false"} == {os.environ[each] for each in TRACING}
    assert "1" == os.environ["HF_HUB_DISABLE_TELEMETRY"]


def test_langsmith_is_left_alone_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's own variables stay; the hub's usage figures are off all the same."""
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")

    disable_foreign_tracing(allow_langsmith=True)

    assert ("true", "1") == (os.environ["LANGSMITH_TRACING"], os.environ["HF_HUB_DISABLE_TELEMETRY"])
