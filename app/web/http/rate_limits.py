"""Rate limits at the HTTP edge: admission of generating requests, failed keys of an address, and the headers of both.

Keys are limited by `access.admission`; addresses by one `slowapi.Limiter` for each application, called directly: its
middlewares limit nothing on included routers and break streams.
"""

import ipaddress
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from slowapi import Limiter
from starlette.requests import Request
from starlette.types import Scope

from app.access.admission import AdmissionControl, LimitState
from app.errors import RateLimited
from app.web.http.token_bucket import STORAGE_URI, STRATEGY, BucketLimit, TokenBucketRateLimiter

LIMIT_STATES = "limit_states"
"""Key in the request's state: a function that returns the caller's `LimitState`s for the headers of the response."""

_NO_SETTINGS = Path(__file__).with_name("slowapi.env")
_IPV6_SITE_BITS = 64
"""A single client commonly owns a /64 and can use any address in it."""

LimitStates = Callable[[], Awaitable[Sequence[LimitState]]]


def show_limits(scope: Scope, control: AdmissionControl) -> None:
    """Let the response say what is left of the caller's limits, if nothing else does yet; counts nothing."""
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


class FailedKeyLimiter:
    """Limits the attempts with a wrong key, or none, that an address has."""

    def __init__(
        self,
        failed_keys_per_minute: int,
        *,
        on_refusal: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        on_refusal: is called for every request refused for its rate.
        clock: seconds that never go back.
        """
        self._on_refusal = on_refusal
        self._limit = BucketLimit(
            burst=failed_keys_per_minute, per_minute=failed_keys_per_minute, namespace="failed-keys"
        )
        self.limiter = Limiter(
            key_func=caller_address,
            strategy=STRATEGY,
            storage_uri=STORAGE_URI,
            storage_options={"clock": clock},  # type: ignore[dict-item]  # typed for the library's own storages
            headers_enabled=False,
            config_filename=str(_NO_SETTINGS),
        )

    def take_failure(self, scope: Scope) -> None:
        """Count one attempt without a valid key.

        Raises: RateLimited: this address has had too many.
        """
        strategy = self.limiter.limiter
        if not isinstance(strategy, TokenBucketRateLimiter):
            raise TypeError(f"slowapi chose {type(strategy).__name__}")
        state = strategy.take(self._limit, client_address(scope))
        if state.granted:
            return
        shown = LimitState("requests", self._limit.amount, state.remaining, state.full_in)

        async def states() -> Sequence[LimitState]:
            return (shown,)

        scope["state"][LIMIT_STATES] = states
        self._on_refusal()
        raise RateLimited("Too many attempts without a valid API key.", retry_after=state.retry_in)


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
