"""What `app.server` does around the application, as far as it needs no socket."""

import asyncio
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
    server: Any = SimpleNamespace(stopping=False, listening=asyncio.Event())
    server.listening.set()

    async def ready() -> None:
        assert 0 == gc.get_freeze_count()

    gc.unfreeze()
    try:
        assert await announce_when_ready(ready, server, Settings(), 8000)
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
    assert "is ready: http://" in capsys.readouterr().out


async def test_how_to_use_it_is_printed_only_once_connections_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """A curl that is copied at once must not be refused, however soon the model is ready."""
    server: Any = SimpleNamespace(stopping=False, listening=asyncio.Event())

    async def ready() -> None:
        return

    announcing = asyncio.create_task(announce_when_ready(ready, server, Settings(), 8000))
    await asyncio.sleep(0.05)
    before = capsys.readouterr().out
    server.listening.set()
    try:
        assert await announcing
    finally:
        gc.unfreeze()
    assert ("", True) == (before, "is ready" in capsys.readouterr().out)
