"""Finds the owner of an API key, quickly and also while the database is away.

A verified key is cached for a few seconds by the digest of all of it, and while the key is in use it is verified again
in the background.  So a revocation holds everywhere within `FRESH_SECONDS` as long as the database answers, and an
outage shorter than `STALE_SECONDS` neither locks out a caller whose key is cached nor delays a key that is in use.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from cachetools import LRUCache

from app.access.background import BackgroundGroup
from app.access.circuit_breaker import CircuitBreaker
from app.access.key_verifier import KeyClaim, KeyVerifier, VerifiedKey
from app.errors import StoreUnavailable
from app.types import Principal

RENEW_SECONDS = 1.5
"""From this age on a cached result is verified again in the background; an outage is then noticed in time."""
RENEW_DELAY_SECONDS = 0.2
"""How long that waits: until the request has gone on, whose way it would be in."""
FRESH_SECONDS = 4.0
"""From this age on a request waits for the database: a second less than a revocation may take."""
STALE_SECONDS = 60.0
"""How long the last verification is good while the database is down."""
KNOWN_WAIT_SECONDS = 0.5
"""How long a key with a cached result waits for the database."""
MAX_REMEMBERED = 10_000

log = logging.getLogger(__name__)

_Verification = asyncio.Future[VerifiedKey | None]


class Authenticator:
    """Maps keys to their owners; lives as long as the application."""

    def __init__(
        self,
        verifier: KeyVerifier,
        *,
        breaker: CircuitBreaker,
        background: BackgroundGroup,
        clock: Callable[[], float] = time.monotonic,
        max_remembered: int = MAX_REMEMBERED,
    ) -> None:
        """Args:
        breaker: says whether waiting for the database is worth it.
        background: runs the verifications.
        clock: seconds that never go back.
        """
        self.used: dict[str, datetime] = {}
        """When each key was last used, until somebody takes it to the database."""
        self._verifier = verifier
        self._breaker = breaker
        self._background = background
        self._clock = clock
        self._remembered: LRUCache[bytes, tuple[VerifiedKey, float]] = LRUCache(max_remembered)
        """Digest -> (key, when its verification began)."""
        self._pending: dict[bytes, _Verification] = {}

    @property
    def remembered(self) -> int:
        """How many keys are remembered."""
        return len(self._remembered)

    @property
    def pending(self) -> int:
        """How many keys are being verified."""
        return len(self._pending)

    async def authenticate(self, presented: bytes) -> Principal | None:
        """Return the owner of a key, or None if no such key is valid.

        Raises: StoreUnavailable: the database is down, and the key was not seen lately.
        """
        claim = self._verifier.claim(presented)
        key = None if claim is None else await self._verified(claim)
        now = datetime.now(UTC)
        if claim is None or key is None or key.expires <= now:
            return None
        self.used[claim.key_id] = now
        return key.principal

    async def _verified(self, claim: KeyClaim) -> VerifiedKey | None:
        key, since = self._remembered.get(claim.digest, (None, 0.0))
        age = self._clock() - since
        if key is None or age > STALE_SECONDS:
            try:
                return await asyncio.shield(self._verify(claim))
            except StoreUnavailable:
                if vouched := self._verifier.vouch(claim):
                    return vouched
                raise
        if age <= RENEW_SECONDS or self._breaker.degraded:
            return key
        if age <= FRESH_SECONDS:
            self._verify(claim, delay=RENEW_DELAY_SECONDS)
            return key
        verification = self._verify(claim)
        await asyncio.wait([verification], timeout=KNOWN_WAIT_SECONDS)
        if not verification.done():
            self._breaker.slow()
            return key
        return key if isinstance(verification.exception(), StoreUnavailable) else verification.result()

    def _verify(self, claim: KeyClaim, *, delay: float = 0.0) -> _Verification:
        """Ask the database, once for all requests of a key that are there at the time.

        Args: delay: seconds until then.
        """
        verification = self._pending.get(claim.digest)
        if verification is None:
            verification = asyncio.get_running_loop().create_future()
            self._background.spawn(self._run(claim, verification, delay))
            self._pending[claim.digest] = verification
        return verification

    async def _run(self, claim: KeyClaim, verification: _Verification, delay: float) -> None:
        began = self._clock()
        try:
            if delay:
                await asyncio.sleep(delay)
                began = self._clock()
            key = await self._verifier.verify(claim)
        except asyncio.CancelledError:
            verification.cancel()
            raise
        except Exception as error:
            verification.set_exception(error)
            verification.exception()  # behind a request nobody waits for it
            if not isinstance(error, StoreUnavailable):
                log.exception("an API key could not be verified")
            key = None
        else:
            verification.set_result(key)
        # Forgotten meanwhile: what was found may be from before the change.
        if self._pending.get(claim.digest) is verification:
            del self._pending[claim.digest]
            if key is not None:
                self._remembered[claim.digest] = key, began
            elif not verification.exception():
                self._remembered.pop(claim.digest, None)

    def forget(self, key_id: str | None = None) -> None:
        """Verify a key, or each, again at its next use: something about it, or about a role, has changed."""
        for digest, (key, _) in list(self._remembered.items()):
            if key_id in (None, key.principal.key_id):
                del self._remembered[digest]
        self._pending.clear()
