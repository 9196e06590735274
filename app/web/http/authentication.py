"""Decide who is let in, before anything of a request but its headers is read.

Pure ASGI.  Decides by the path that the router will use, never by the URL: that is built from the client's Host header.
"""

from collections.abc import Collection
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import Unauthorized
from app.telemetry import Metrics
from app.types import Principal
from app.web.http.rate_limits import FailedKeyLimiter

MAX_KEY_BYTES = 512


class Keys(Protocol):
    """Maps keys to their owners; `access.authenticator.Authenticator` is one."""

    async def authenticate(self, presented: bytes) -> Principal | None:
        """Return the owner of a key, or None if no such key is valid."""


class Authentication:
    """Lets a request through if its path is public or its key valid, and puts the key's owner in the request's state.

    A valid key always passes: the limit on failures is per address, and must not lock out the neighbours behind it.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        failed_keys: FailedKeyLimiter,
        metrics: Metrics,
        public: Collection[str],
        optional: Collection[str] = (),
    ) -> None:
        """Args:
        public: exact paths that need no key; every other one does, whether it exists or not.
        optional: exact paths that tell more to whom sends a key; a wrong one is refused there too.
        """
        self.app = app
        self.keys = keys
        self.failed_keys = failed_keys
        self.metrics = metrics
        self.public = frozenset(public)
        self.optional = frozenset(optional)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._passes_unknown(scope):
            await self._identify(scope)
        await self.app(scope, receive, send)

    def _passes_unknown(self, scope: Scope) -> bool:
        path = scope["path"]
        return path in self.public or (path in self.optional and not has_credentials(scope["headers"]))

    async def _identify(self, scope: Scope) -> None:
        key = presented_key(scope["headers"])
        principal = await self.keys.authenticate(key) if key is not None else None
        if principal is None:
            self.metrics.auth_failed()
            await self.failed_keys.take_failure(scope)
            raise Unauthorized(
                "Invalid API key, or none: send one as `X-API-Key: <key>` or `Authorization: Bearer <key>`."
            )
        scope["state"]["principal"] = principal


def has_credentials(headers: Collection[tuple[bytes, bytes]]) -> bool:
    """Return whether a client has sent anything by which it wants to be known."""
    return any(name in (b"x-api-key", b"authorization") for name, _ in headers)


def presented_key(headers: Collection[tuple[bytes, bytes]]) -> bytes | None:
    """Return the one key in these headers; None if there is none, or if it is not clear which one is meant."""
    keys = [value for name, value in headers if name == b"x-api-key"]
    authorizations = [value for name, value in headers if name == b"authorization"]
    if len(keys) > 1 or len(authorizations) > 1:
        return None
    for value in authorizations:
        scheme, _, token = value.partition(b" ")
        if scheme.lower() == b"bearer":
            keys.append(token.strip())
    if not keys or len(set(keys)) > 1 or not 0 < len(keys[0]) <= MAX_KEY_BYTES:
        return None
    return keys[0]
