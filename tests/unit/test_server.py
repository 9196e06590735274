"""What the process does around the application, as far as it needs no socket."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from app.config import Settings
from app.server import _greet


async def test_what_is_there_when_the_model_is_ready_is_not_searched_for_garbage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full collection would hold every stream up; what is made from then on is collected as ever."""
    server: Any = SimpleNamespace(stopping=False)

    async def ready() -> None:
        assert 0 == gc.get_freeze_count()

    gc.unfreeze()
    try:
        assert await _greet(ready, server, Settings(), 8000)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
    assert "is ready: http://" in capsys.readouterr().out
