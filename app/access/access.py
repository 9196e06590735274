"""Everything about who may ask, as one object with a beginning and an end: what `create_app` builds and closes."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

from app.access.authenticator import KeyRing
from app.access.database import Database
from app.access.keys import KeyStore
from app.access.limits import configured
from app.access.periodic import every
from app.access.quotas import Quotas
from app.access.reports import Reports
from app.access.response_cache import StoredAnswers
from app.access.roles import ADMIN, RoleStore
from app.access.usage_log import UsageLog
from app.config import Settings

USED_SECONDS = 30.0
"""How far `last_used` may be behind."""
RETENTION_SECONDS = 3600.0


class Access:
    """Keys, roles, quotas and the log over one database."""

    def __init__(
        self,
        settings: Settings,
        *,
        configured_key: str | None,
        first_key: str | None,
        mask: Callable[[str], Awaitable[str]],
        on_drop: Callable[[int], None],
    ) -> None:
        """Args:
        configured_key: let in without a row in the database.
        first_key: let in as an admin's with a row of its own, which is made when missing.
        mask: takes personal data out of a text that is to be logged.
        on_drop: is told how many rows of the log were lost.
        """
        self.database = Database(settings.where_database)
        self.keys = KeyStore(self.database)
        self.roles = RoleStore(self.database)
        defaults = configured(settings.rate_limit, settings.quota)
        self.ring = KeyRing(self.keys, self.roles, defaults, configured_key=configured_key)
        self.quotas = Quotas(self.database, settings.quota)
        self.reports = Reports(self.database)
        self.answers = StoredAnswers(self.database, settings.cache.ttl_seconds)
        self.log = UsageLog(self.database, settings.usage_log, mask=mask, on_drop=on_drop)
        self._first_key = first_key
        self._opened = False
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Make the database ready; the second time does nothing.

        Raises: ConfigError: it cannot be used.
        """
        if self._opened:
            return
        await self.database.migrate()
        if self._first_key:
            await self.keys.create(role=ADMIN, key=self._first_key)
        self._opened = True

    async def start(self) -> None:
        """Open, and begin what runs beside the requests."""
        await self.open()
        await self.quotas.start()
        await self.log.start()
        self._tasks = [
            asyncio.create_task(every(USED_SECONDS, self._note_used)),
            asyncio.create_task(every(RETENTION_SECONDS, self.log.delete_old)),
            asyncio.create_task(every(RETENTION_SECONDS, self.answers.delete_expired)),
        ]

    async def close(self) -> None:
        """Write what is left and let go of the database."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ring.close()
        await self.quotas.close()
        await self.log.close()
        await self.answers.close()
        await self.database.close()

    async def _note_used(self) -> None:
        moments: dict[str, datetime] = dict(self.ring.used)
        self.ring.used.clear()
        await self.keys.used(moments)
