"""Rate limits at the HTTP edge: admission of generating requests, failed keys of an address, and the headers of both.

Keys are limited by `access.admission`; addresses by one `slowapi.Limiter` for each application, called directly: its
middlewares limit nothing on included routers and break streams.
"""

import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from slowapi import Limiter
from starlette.requests import Request
from starlette.types import Scope

from app.access.admission import AdmissionControl, LimitState
from app.access.token_bucket import Bucket, BucketState
from app.errors import RateLimited, StoreUnavailable
from app.web.http.token_bucket import STORAGE_URI, STRATEGY, BucketLimit, TokenBucketRateLimiter

LIMIT_STATES = "limit_states"
"""Key in the request's state: a function that returns the caller's `LimitState`s for the headers of the response."""

_NO_SETTINGS = Path(__file__).with_name("slowapi.env")
_IPV6_SITE_BITS = 64
"""A single client commonly owns a /64 and can use any address in it."""

LimitStates = Callable[[], Awaitable[Sequence[LimitState]]]


def show_limits(scope: Scope, control: AdmissionControl) -> None:
    """Let the response say what is left of the caller's limits, if nothing else does yet; counts nothing.

    A caller that is not known, on a path that needs no key, has none.
    """
    if "principal" not in scope["state"]:
        return
    scope["state"].setdefault(LIMIT_STATES, partial(control.limits, scope["state"]["principal"]))


RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
)
"""Names of the headers below."""


async def rate_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return the x-ratelimit headers of a response that begins now, as ASGI writes them."""
    states: LimitStates | None = scope["state"].get(LIMIT_STATES)
    return [
        (b"x-ratelimit-%b-%b" % (name, state.kind.encode()), value.encode())
        for state in (await states() if states else ())
        for name, value in (
            (b"limit", str(state.limit)),
            (b"remaining", str(state.remaining)),
            (b"reset", duration(state.reset_seconds)),
        )
    ]


class AddressBuckets(Protocol):
    """Buckets of addresses that several processes share."""

    async def take(self, address: str, bucket: Bucket) -> BucketState:
        """Take one token if there is one.  Raises: StoreUnavailable: they cannot be reached."""


class FailedKeyLimiter:
    """Limits the attempts with a wrong key, or none, that an address has.

    Where several processes share the limit, each grants its part of it while the others cannot be reached.
    """

    def __init__(
        self,
        failed_keys_per_minute: int,
        *,
        on_refusal: Callable[[str], None],
        shared: AddressBuckets | None = None,
        processes: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        on_refusal: is called for every request refused for its rate, with the limit's name.
        shared: counts for all processes; None: each counts for itself.
        processes: that share the limit.
        clock: seconds that never go back.
        """
        self._on_refusal = on_refusal
        self._shared = shared
        self._whole = Bucket(failed_keys_per_minute, failed_keys_per_minute / 60)
        part = self._whole.share(processes if shared else 1)
        self._limit = BucketLimit(burst=part.capacity, per_minute=part.per_second * 60, namespace="failed-keys")
        self.limiter = Limiter(
            key_func=caller_address,
            strategy=STRATEGY,
            storage_uri=STORAGE_URI,
            storage_options={"clock": clock},  # type: ignore[dict-item]  # typed for the library's own storages
            headers_enabled=False,
            config_filename=str(_NO_SETTINGS),
        )

    async def take_failure(self, scope: Scope) -> None:
        """Count one attempt without a valid key.

        Raises: RateLimited: this address has had too many.
        """
        state = await self._take(client_address(scope))
        if state.granted:
            return
        shown = LimitState("requests", self._whole.capacity, state.remaining, state.full_in)

        async def states() -> Sequence[LimitState]:
            return (shown,)

        scope["state"][LIMIT_STATES] = states
        self._on_refusal("failed_keys")
        raise RateLimited("Too many attempts without a valid API key.", retry_after=state.retry_in)

    async def _take(self, address: str) -> BucketState:
        if self._shared is not None:
            with suppress(StoreUnavailable):
                return await self._shared.take(address, self._whole)
        strategy = self.limiter.limiter
        if not isinstance(strategy, TokenBucketRateLimiter):
            raise TypeError(f"slowapi chose {type(strategy).__name__}")
        return strategy.take(self._limit, address)


def caller_address(request: Request) -> str:
    """Return `client_address` in the signature that slowapi expects of a key function."""
    return client_address(request.scope)


def client_address(scope: Scope) -> str:
    """Return the peer's IPv4 address or IPv6 /64, or "unknown".  The server has resolved proxies already."""
    host = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), _IPV6_SITE_BITS), strict=False))


def duration(seconds: float) -> str:
    """Write whole seconds, rounded up, the way OpenAI's headers do: 6s, 1m30s, 2h0m5s."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"
