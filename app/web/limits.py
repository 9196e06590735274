"""Decide whether a caller may send one more request now, and tell how many are left.

One `slowapi.Limiter` for each application, called directly: its middlewares limit nothing on included routers and break
streams.  Knows API keys only by their public id; counts requests, not tokens.
"""

import ipaddress
import math
import time
from collections.abc import Callable
from pathlib import Path

from slowapi import Limiter
from starlette.requests import Request
from starlette.types import Scope

from app.config import RateLimitConfig
from app.errors import RateLimited
from app.types import Principal
from app.web.buckets import STORAGE_URI, STRATEGY, BucketLimit, Taken, TokenBucketRateLimiter

RATE_HEADERS = "rate_headers"
"""Key in the request's state; the outermost middleware puts these on the answer, whatever it is."""

_NO_SETTINGS = Path(__file__).with_name("slowapi.env")
_IPV6_SITE_BITS = 64
"""A single client commonly owns a /64 and can use any address in it."""


class RateLimits:
    """The buckets of one application: requests for each key, failed keys for each address."""

    def __init__(
        self,
        config: RateLimitConfig,
        failed_keys_per_minute: int,
        *,
        on_refusal: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        failed_keys_per_minute: attempts with a wrong key, or none, that an address has.
        on_refusal: is called for every request refused for its rate.
        clock: seconds that never go back.
        """
        self._enabled = config.enabled
        self._on_refusal = on_refusal
        self._requests = BucketLimit(
            burst=config.burst_size, per_minute=config.requests_per_minute, namespace="requests"
        )
        self._failures = BucketLimit(
            burst=failed_keys_per_minute, per_minute=failed_keys_per_minute, namespace="failed-keys"
        )
        self.limiter = Limiter(
            key_func=caller_name,
            strategy=STRATEGY,
            storage_uri=STORAGE_URI,
            storage_options={"clock": clock},  # type: ignore[dict-item]  # typed for the library's own storages
            headers_enabled=False,
            config_filename=str(_NO_SETTINGS),
        )

    def take_request(self, request: Request) -> None:
        """Count one request of this caller, and note the headers that tell how many are left.

        Raises: RateLimited: none is left; the attempt itself costs nothing.
        """
        if not self._enabled:
            return
        taken = self._take(self._requests, caller_name(request))
        request.scope["state"][RATE_HEADERS] = _headers(self._requests, taken)
        if not taken.granted:
            self._on_refusal()
            raise RateLimited("Too many requests with this API key; wait and try again.", retry_after=taken.retry_in)

    def take_failure(self, scope: Scope) -> None:
        """Count one attempt without a valid key.

        Raises: RateLimited: this address has had too many.
        """
        taken = self._take(self._failures, client_address(scope))
        if not taken.granted:
            scope["state"][RATE_HEADERS] = _headers(self._failures, taken)
            self._on_refusal()
            raise RateLimited("Too many attempts without a valid API key.", retry_after=taken.retry_in)

    def _take(self, limit: BucketLimit, owner: str) -> Taken:
        strategy = self.limiter.limiter
        if not isinstance(strategy, TokenBucketRateLimiter):
            raise TypeError(f"slowapi chose {type(strategy).__name__}")
        return strategy.take(limit, owner)


def enforce_rate(request: Request) -> None:
    """Count this request against its caller's rate.

    Raises: RateLimited: the caller must wait.
    """
    limits: RateLimits = request.app.state.parts.limits
    limits.take_request(request)


def caller_name(request: Request) -> str:
    """Name the bucket's owner: the key's public id, or the address of a caller without one.  Never empty."""
    principal: Principal | None = request.scope["state"].get("principal")
    return f"key:{principal.key_id}" if principal else f"address:{client_address(request.scope)}"


def client_address(scope: Scope) -> str:
    """Return the peer's IPv4 address or IPv6 /64, or "unknown".  Proxies are the server's affair, not ours."""
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


def _headers(limit: BucketLimit, taken: Taken) -> dict[str, str]:
    """The limit named is the bucket's size, so that `remaining` never exceeds it; `reset` is when it is full again."""
    return {
        "x-ratelimit-limit-requests": str(limit.amount),
        "x-ratelimit-remaining-requests": str(taken.remaining),
        "x-ratelimit-reset-requests": duration(taken.full_in),
    }


def duration(seconds: float) -> str:
    """Write whole seconds, rounded up, the way OpenAI's headers do: 6s, 1m30s, 2h0m5s."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"
