"""What `app.server` does around the application, as far as it needs no socket."""

import gc
from types import SimpleNamespace
from typing import Any

import pytest

from app.config import Settings
from app.server import announce_when_ready


async def test_objects_alive_when_the_model_is_ready_are_frozen_for_the_garbage_collector(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full collection would pause every stream; later objects are collected as usual."""
    server: Any = SimpleNamespace(stopping=False)

    async def ready() -> None:
        assert 0 == gc.get_freeze_count()

    gc.unfreeze()
    try:
        assert await announce_when_ready(ready, server, Settings(), 8000)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
    assert "is ready: http://" in capsys.readouterr().out
