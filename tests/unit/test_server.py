"""What `app.server` does around the application, as far as it needs no socket."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from app.config import Settings
from app.config.sections import AppConfig, SecurityConfig
from app.server import announce_when_ready, how_to_use, page_code


@pytest.fixture(autouse=True)
def usual_collection() -> Iterator[None]:
    """Give the other tests of this process Python's own thresholds back."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)


async def test_objects_alive_when_the_model_is_ready_are_frozen_for_the_garbage_collector(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A full collection would pause every stream; later objects are collected as usual."""
    server: Any = SimpleNamespace(stopping=False, listening=asyncio.Event())
    server.listening.set()

    alive: list[list[int]] = []
    frozen: list[int] = []

    async def ready() -> None:
        alive.extend([] for _ in range(10_000))
        frozen.append(gc.get_freeze_count())

    assert await announce_when_ready(ready, server, Settings(), 8000)
    assert gc.get_freeze_count() >= frozen[0] + len(alive)
    assert "is ready: http://" in capsys.readouterr().out


async def test_what_a_burst_of_requests_has_begins_no_round_of_garbage_collection() -> None:
    """Its objects are freed without one, and 32 requests have some 10,000 at once."""
    server: Any = SimpleNamespace(stopping=False, listening=asyncio.Event())
    server.listening.set()

    async def ready() -> None:
        return

    assert await announce_when_ready(ready, server, Settings(), 8000, quiet=True)
    gc.collect()
    before = [generation["collections"] for generation in gc.get_stats()]
    alive: list[list[int]] = [[] for _ in range(10_000)]

    assert before == [generation["collections"] for generation in gc.get_stats()]
    assert len(alive) == 10_000


async def test_how_to_use_it_is_printed_only_once_connections_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """A curl that is copied at once must not be refused, however soon the model is ready."""
    server: Any = SimpleNamespace(stopping=False, listening=asyncio.Event())

    async def ready() -> None:
        return

    announcing = asyncio.create_task(announce_when_ready(ready, server, Settings(), 8000))
    await asyncio.sleep(0.05)
    before = capsys.readouterr().out
    server.listening.set()
    assert await announcing
    assert ("", True) == (before, "is ready" in capsys.readouterr().out)


def test_a_terminal_gets_a_link_that_works_once_and_a_log_does_not(tmp_path: Path) -> None:
    """Only for the key that the service made; not for one that the operator chose, nor where there is no page."""
    (tmp_path / "api_key").write_text("llm_secret-of-mine\n")
    app = AppConfig(data_dir=tmp_path)
    generated = Settings(app=app, security=SecurityConfig())
    chosen = Settings(app=app, security=SecurityConfig(api_key=SecretStr("chosen-by-me")))
    without = Settings(app=app, security=SecurityConfig(page=False))

    code = page_code(generated)
    assert code is not None
    assert f"http://127.0.0.1:8000/#key={code}\n" in how_to_use(generated, 8000, code=code)
    assert [None, None] == [page_code(chosen), page_code(without)]
    assert "browser" in how_to_use(generated, 8000)
    assert "browser" not in how_to_use(without, 8000)
    for shown in (how_to_use(generated, 8000, code=code), how_to_use(chosen, 8000)):
        assert "secret-of-mine" not in shown
        assert "chosen-by-me" not in shown
