"""Connections of a test to a Redis, as several replicas have them."""

from itertools import count

from pydantic import SecretStr

from app.config import RedisConfig
from app.stores.redis_connection import RedisConnection

PATIENCE_SECONDS = 5.0
"""Longer than a service may wait: a busy machine is no outage."""
_numbers = count()


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
