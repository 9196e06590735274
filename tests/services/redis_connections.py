"""Connections of a test to a Redis, as several replicas have them."""

from itertools import count

import pytest
from pydantic import SecretStr

from app.config import RedisConfig
from app.stores import redis_stores, redis_turns
from app.stores.redis_connection import RedisConnection

PATIENCE_SECONDS = 5.0
"""Longer than a service may wait: a busy machine is no outage."""
_numbers = count()


def wait_longer(monkeypatch: pytest.MonkeyPatch, seconds: float = PATIENCE_SECONDS) -> None:
    """Let the services of this test wait so long for a reply of Redis, which is more than a configuration may say."""

    def connection(config: RedisConfig) -> RedisConnection:
        return RedisConnection(config.model_copy(update={"timeout_seconds": seconds}))

    monkeypatch.setattr(redis_stores, "RedisConnection", connection)
    monkeypatch.setattr(redis_turns, "LATE_SECONDS", seconds)


class RedisConnections:
    """Makes connections, and closes them at the end of the test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open: list[RedisConnection] = []

    def new(self, prefix: str | None = None, *, timeout_seconds: float = PATIENCE_SECONDS) -> RedisConnection:
        """Return a new one.  Args: prefix: of the keys; None is one that nobody else has."""
        config = RedisConfig(url=SecretStr(self._url), key_prefix=prefix or f"test{next(_numbers)}")
        connection = RedisConnection(config.model_copy(update={"timeout_seconds": timeout_seconds}))
        self._open.append(connection)
        return connection

    async def close(self) -> None:
        while self._open:
            await self._open.pop().close()
