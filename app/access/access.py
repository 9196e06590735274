"""Access control as one object with a beginning and an end: keys, roles, quotas and logs over one database."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from app.access.authenticator import Authenticator
from app.access.background import BackgroundGroup, periodic
from app.access.batch_lines import BatchLines
from app.access.batches import BatchStore
from app.access.database import Database
from app.access.files import FileStore
from app.access.key_verifier import KeyVerifier
from app.access.keys import KeyStore
from app.access.limits import configured
from app.access.quotas import Quotas
from app.access.reports import Reports
from app.access.response_cache import ResponseCache
from app.access.roles import ADMIN, RoleStore
from app.access.usage_log import Mask, UsageLog
from app.config import Settings
from app.errors import StoreUnavailable

USED_SECONDS = 30.0
"""How far `last_used` may be behind."""
RETENTION_SECONDS = 3600.0


class AccessControl:
    """Keys, roles, quotas, the inference log, files and batches, and the persistent response cache."""

    def __init__(
        self,
        settings: Settings,
        *,
        configured_key: str | None,
        bootstrap_key: str | None,
        mask: Mask,
        on_drop: Callable[[int], None],
    ) -> None:
        """Args:
        configured_key: let in without a row in the database.
        bootstrap_key: let in as an admin's with a row of its own, which is created when missing.
        mask: takes personal data out of a text that is to be logged.
        on_drop: is called with the number of rows of the log that were lost.
        """
        self.database = Database(settings.where_database)
        self.keys = KeyStore(self.database, on_change=lambda key_id: self.authenticator.forget(key_id))
        self.roles = RoleStore(self.database, on_change=lambda: self.authenticator.forget())
        defaults = configured(settings.rate_limit, settings.quota)
        self.verifier = KeyVerifier(self.keys, self.roles, defaults, configured_key=configured_key)
        self._background = BackgroundGroup()
        self.authenticator = Authenticator(self.verifier, breaker=self.database.breaker, background=self._background)
        self.quotas = Quotas(self.database, settings.quota)
        self.reports = Reports(self.database)
        self.response_cache = ResponseCache(self.database, settings.cache.ttl_seconds)
        self.files = FileStore(
            self.database,
            max_file_bytes=settings.batches.max_file_bytes,
            max_stored_bytes=settings.batches.max_stored_bytes,
        )
        self.batches = BatchStore(self.database)
        self.batch_lines = BatchLines(self.database)
        self._retention = timedelta(days=settings.batches.retention_days)
        self.log = UsageLog(self.database, settings.usage_log, mask=mask, on_drop=on_drop)
        self._bootstrap_key = bootstrap_key
        self._opened = False

    async def open(self) -> None:
        """Make the database ready; the second time does nothing.

        Raises: ConfigError: it cannot be used.
        """
        if self._opened:
            return
        try:
            await self.database.migrate()
            if self._bootstrap_key:
                await self.keys.create(role=ADMIN, key=self._bootstrap_key)
        except BaseException:
            # A thread of the driver that reports to a loop which is over writes a traceback behind the reason.
            await self.database.close()
            raise
        self._opened = True

    async def start(self) -> None:
        """Open, and start what runs beside the requests.

        Raises: ConfigError: the database cannot be used.
        """
        await self.open()
        await self._background.start()
        for part in (self.quotas, self.log, self.response_cache):
            part.start(self._background)
        self._background.spawn(self.database.breaker.watch())
        self._background.spawn(periodic(USED_SECONDS, self.note_used))
        self._background.spawn(periodic(RETENTION_SECONDS, self.log.delete_old))
        self._background.spawn(periodic(RETENTION_SECONDS, self.response_cache.delete_expired))
        self._background.spawn(periodic(RETENTION_SECONDS, self.delete_old_batches))

    async def close(self) -> None:
        """Write what is queued, end what runs beside the requests, and close the database."""
        await asyncio.gather(self.quotas.close(), self.log.close(), self.response_cache.close())
        with suppress(StoreUnavailable):
            await self.note_used()
        await self._background.close()
        await self.database.close()

    async def delete_old_batches(self) -> None:
        """Delete files whose time is over, and batches that ended long ago.

        Raises: StoreUnavailable: the database does not answer.
        """
        await self.files.delete_expired()
        await self.batches.delete_old(datetime.now(UTC) - self._retention)

    async def note_used(self) -> None:
        """Write down when keys were last used.

        Raises: StoreUnavailable: the database does not answer; it is written the next time.
        """
        moments = dict(self.authenticator.used)
        if not moments:
            return
        await self.keys.used(moments)
        for key_id, moment in moments.items():
            if self.authenticator.used.get(key_id) == moment:
                del self.authenticator.used[key_id]
