"""Connections of a test to a Redis, as several replicas have them."""

from itertools import count
from typing import Any

from app.config import RedisConfig
from app.stores.redis_connection import RedisConnection

_numbers = count()


class RedisConnections:
    """Makes connections, and closes them at the end of the test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._open: list[RedisConnection] = []

    def new(self, prefix: str | None = None, **settings: Any) -> RedisConnection:
        """Return a new one.  Args: prefix: of the keys; None is one that nobody else has."""
        given: dict[str, Any] = {"url": self._url, "timeout_seconds": 0.25} | settings
        connection = RedisConnection(RedisConfig(**given, key_prefix=prefix or f"test{next(_numbers)}"))
        self._open.append(connection)
        return connection

    async def close(self) -> None:
        while self._open:
            await self._open.pop().close()
