"""All stores of a process that are in Redis, over one connection."""

import asyncio

from app.config import Settings
from app.stores.memory_admission import MemoryAdmissionStore
from app.stores.redis_admission import AdmissionStoreWithFallback, RedisAdmissionStore
from app.stores.redis_buckets import RedisAddressBuckets
from app.stores.redis_connection import RedisConnection


class RedisStores:
    """The stores that all replicas share, over one connection."""

    def __init__(self, settings: Settings) -> None:
        """Raises: ConfigError: the URL is none that Redis has."""
        self.connection = RedisConnection(settings.redis)
        self._shared_limits = RedisAdmissionStore(self.connection, lease_seconds=settings.redis.lease_seconds)
        self.admission = AdmissionStoreWithFallback(
            self._shared_limits,
            MemoryAdmissionStore(),
            processes=settings.processes,
            closed=settings.rate_limit.on_outage == "closed",
        )
        self.failed_keys = RedisAddressBuckets(self.connection, "failed-keys")

    async def run(self) -> None:
        """Do what has to be done beside the requests; runs until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.connection.watch())
            group.create_task(self._shared_limits.renew_leases())

    async def close(self) -> None:
        await self.connection.close()
