"""Count the async generators of ours that a token crosses on its way from the engine to the socket.

In this process and with the echo engine, cache and PII filter as configured by default; a local model adds one, the
text of its live request.  Generators that only serve as context managers carry no token and are not counted.
"""

import asyncio
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import httpx

from app.config import load_settings
from app.main import create_app

KEY = "bench-key-0123456789"


def crossed_generators() -> list[str]:
    """Return the qualified names of the generators, the last started first."""
    return asyncio.run(_crossed_generators())


async def _crossed_generators() -> list[str]:
    found: list[str] = []
    before = sys.get_asyncgen_hooks()

    def first_iteration(generator: Any) -> None:
        code = generator.ag_code
        by_contextlib = sys._getframe(1).f_code.co_filename.endswith("contextlib.py")
        if f"{Path('app').resolve()}/" in code.co_filename and not by_contextlib:
            found.append(code.co_qualname)
        if before.firstiter is not None:
            before.firstiter(generator)

    with tempfile.TemporaryDirectory() as folder:
        app = create_app(
            load_settings(
                "absent.yml",
                None,
                app={"data_dir": folder},
                model={"engine": "echo", "temperature": 0},
                security={"api_key": KEY},
            )
        )
        async with app.router.lifespan_context(app):
            sys.set_asyncgen_hooks(firstiter=first_iteration, finalizer=before.finalizer)
            try:
                await _stream(app)
            finally:
                sys.set_asyncgen_hooks(*before)
    return found[::-1]


async def _stream(app: Any) -> None:
    body: MutableMapping[str, Any] = {"prompt": "hello", "stream": True}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://bench", headers={"X-API-Key": KEY}) as client:
        (await client.post("/v1/generate", json=body)).raise_for_status()
