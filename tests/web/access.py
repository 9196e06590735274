"""The whole application with its database, as `create_app` builds it, and clients that hold a key each."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import httpx
from fastapi import FastAPI

from app.access.access import AccessControl
from app.access.database import Database
from app.config import Settings, load_settings
from app.engine.base import Engine
from app.main import create_app
from app.web.http.dependencies import Container
from tests.waiting import HANG_SECONDS
from tests.web.harness import started

ADMIN_KEY = "access-tests-key-0123456789"


@dataclass
class Running:
    """A started application."""

    app: FastAPI

    @property
    def container(self) -> Container:
        container: Container = self.app.state.container
        return container

    @property
    def access(self) -> AccessControl:
        return self.container.access

    def client(self, key: str = ADMIN_KEY) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": key})

    async def generate(self, key: str, **fields: Any) -> httpx.Response:
        """Send one prompt."""
        async with self.client(key) as http:
            return await http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 5, "cache": False} | fields)

    async def key(self, **fields: Any) -> str:
        """Create a key."""
        async with self.client() as http:
            created = await http.post("/v1/keys", json=fields)
        assert 201 == created.status_code, created.text
        key: str = created.json()["key"]
        return key

    async def usage(self, key: str = ADMIN_KEY, **params: str) -> dict[str, Any]:
        """Return the usage report that a key gets of itself."""
        async with self.client(key) as http:
            reply = await http.get("/v1/usage", params=params)
        assert 200 == reply.status_code, reply.text
        report: dict[str, Any] = reply.json()
        return report


_migrated = b""


async def provide_database(settings: Settings) -> None:
    """Copy the file that a first start makes, where there is none: making its tables is most of a start."""
    global _migrated
    file = settings.app.data_dir / "service.db"
    if settings.where_database != f"sqlite:///{file}" or not file.parent.is_dir() or file.exists():
        return
    if not _migrated:
        with TemporaryDirectory() as folder:
            database = Database(f"sqlite:///{folder}/service.db")
            await database.migrate()
            await database.close()
            _migrated = (Path(folder) / "service.db").read_bytes()
    file.touch(mode=0o600)
    file.write_bytes(_migrated)


@asynccontextmanager
async def running(
    folder: Path, *, engine: Engine | None = None, patience: float = HANG_SECONDS, **sections: Any
) -> AsyncIterator[Running]:
    """Run the application with the echo engine until the block ends.

    Args: patience: seconds that a request waits for the database; a busy machine is no outage.
    """
    given: dict[str, Any] = {
        "app": {"data_dir": folder},
        "model": {"engine": "echo", "temperature": 0},
        "security": {"api_key": ADMIN_KEY},
        "rate_limit": {"requests_per_minute": 100_000, "burst_size": 100_000, "tokens_per_minute": 10**9},
        "usage_log": {"flush_seconds": 0.01},
    }
    given |= {
        name: given.get(name, {}) | section if isinstance(section, dict) else section
        for name, section in sections.items()
    }
    settings = load_settings(folder / "none.yml", None, **given)
    await provide_database(settings)
    with (
        patch("app.access.access.Database", partial(Database, wait_seconds=patience)),
        patch("app.access.database.WAIT_SECONDS", patience),
        patch("app.access.quotas.WAIT_SECONDS", patience),
        patch("app.access.response_cache.WAIT_SECONDS", patience),
    ):
        app = create_app(settings, engines={"echo": engine} if engine else None)
        async with started(app):
            yield Running(app)
