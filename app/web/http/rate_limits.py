"""Decide whether a caller may send one more request now, and tell how many are left.

One `slowapi.Limiter` for each application, called directly: its middlewares limit nothing on included routers and break
streams.  Knows API keys only by their public id.  Tokens a minute are taken by `generation.accounts`, once it knows
how many.
"""

import ipaddress
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slowapi import Limiter
from starlette.requests import Request
from starlette.types import Scope

from app.errors import RateLimited
from app.types import Limits, Principal
from app.web.http.token_bucket import STORAGE_URI, STRATEGY, BucketLimit, Taken, TokenBucketRateLimiter

RATE_HEADERS = "rate_headers"
"""Key in the request's state; the outermost middleware puts what this returns on the answer, whatever it is."""

_TAKEN = "request_of"
"""Key in the request's state: whose place the request has."""
_NO_SETTINGS = Path(__file__).with_name("slowapi.env")
_IPV6_SITE_BITS = 64
"""A single client commonly owns a /64 and can use any address in it."""


@lru_cache(maxsize=1024)
def _bucket(namespace: str, burst: int, per_minute: int) -> BucketLimit:
    return BucketLimit(burst=burst, per_minute=per_minute, namespace=namespace)


def _requests(limits: Limits) -> BucketLimit | None:
    rate = limits.requests_per_minute
    return _bucket("requests", limits.burst or rate, rate) if rate else None


def _tokens(limits: Limits) -> BucketLimit | None:
    rate = limits.tokens_per_minute
    return _bucket("tokens", rate, rate) if rate else None


class RateLimits:
    """The buckets of one application: requests and tokens for each key, failed keys for each address."""

    def __init__(
        self,
        failed_keys_per_minute: int,
        *,
        enabled: bool,
        on_refusal: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        failed_keys_per_minute: attempts with a wrong key, or none, that an address has.
        enabled: False limits failed keys only.
        on_refusal: is called for every request refused for its rate.
        clock: seconds that never go back.
        """
        self.enabled = enabled
        self._on_refusal = on_refusal
        self._failures = _bucket("failed-keys", failed_keys_per_minute, failed_keys_per_minute)
        self._running: Counter[str] = Counter()
        self.limiter = Limiter(
            key_func=caller_name,
            strategy=STRATEGY,
            storage_uri=STORAGE_URI,
            storage_options={"clock": clock},  # type: ignore[dict-item]  # typed for the library's own storages
            headers_enabled=False,
            config_filename=str(_NO_SETTINGS),
        )

    def take_request(self, scope: Scope) -> None:
        """Look at all limits of this caller, then count one request, and note the headers that tell what is left.

        Raises: RateLimited: one of them is reached; the attempt itself costs nothing.
        """
        if not self.enabled:
            return
        caller: Principal = scope["state"]["principal"]
        limits = caller.limits
        tokens, requests = _tokens(limits), _requests(limits)
        scope["state"][RATE_HEADERS] = lambda: self._headers(caller, None)
        if limits.parallel_requests and self._running[caller.key_id] >= limits.parallel_requests:
            raise self._refusal(f"This API key has {limits.parallel_requests} requests running, as many as it may.", 1)
        if tokens and not (left := self._take(tokens, caller.key_id, 0)).remaining:
            raise self._refusal("Too many tokens with this API key; wait and try again.", _until(left, tokens, 1))
        if requests:
            taken = self._take(requests, caller.key_id)
            scope["state"][RATE_HEADERS] = lambda: self._headers(caller, taken)
            if not taken.granted:
                raise self._refusal("Too many requests with this API key; wait and try again.", taken.retry_in)
        self._running[caller.key_id] += 1
        scope["state"][_TAKEN] = caller.key_id

    def give_back_request(self, scope: Scope) -> None:
        """Undo what a request has cost that was refused later on."""
        caller: Principal = scope["state"]["principal"]
        if self.enabled and (requests := _requests(caller.limits)):
            back = self._take(requests, caller.key_id, -1)
            scope["state"][RATE_HEADERS] = lambda: self._headers(caller, back)

    def end_request(self, scope: Scope) -> None:
        """Free the place of a request that has been answered, if it ever had one."""
        key_id = scope["state"].pop(_TAKEN, None)
        if key_id is not None:
            self._running[key_id] -= 1
            if not self._running[key_id]:
                del self._running[key_id]

    async def reserve(self, caller: Principal, tokens: int) -> "HeldTokens | None":
        """Take tokens out of this minute's; part of `generation.accounts.Budget`.

        Raises: RateLimited: so many are not there; the attempt itself costs nothing.
        """
        bucket = _tokens(caller.limits) if self.enabled else None
        if bucket is None:
            return None
        if tokens > bucket.amount:
            raise RateLimited(
                f"The request could take {tokens} tokens, and this API key has {bucket.amount} a minute. "
                "Lower max_tokens, or shorten the prompt.",
                details={"limit": bucket.amount, "requested": tokens},
            )
        taken = self._take(bucket, caller.key_id, tokens)
        if not taken.granted:
            raise self._refusal("Too many tokens with this API key; wait and try again.", taken.retry_in)
        return HeldTokens(self, bucket, caller.key_id, tokens)

    def take_failure(self, scope: Scope) -> None:
        """Count one attempt without a valid key.

        Raises: RateLimited: this address has had too many.
        """
        taken = self._take(self._failures, client_address(scope))
        if not taken.granted:
            scope["state"][RATE_HEADERS] = lambda: _headers("requests", self._failures, taken)
            raise self._refusal("Too many attempts without a valid API key.", taken.retry_in)

    def _refusal(self, message: str, retry_after: float) -> RateLimited:
        self._on_refusal()
        return RateLimited(message, retry_after=retry_after)

    def _headers(self, caller: Principal, taken: Taken | None) -> dict[str, str]:
        requests, tokens = _requests(caller.limits), _tokens(caller.limits)
        told = _headers("requests", requests, taken or self._take(requests, caller.key_id, 0)) if requests else {}
        return told | (_headers("tokens", tokens, self._take(tokens, caller.key_id, 0)) if tokens else {})

    def _take(self, limit: BucketLimit, owner: str, cost: int = 1) -> Taken:
        strategy = self.limiter.limiter
        if not isinstance(strategy, TokenBucketRateLimiter):
            raise TypeError(f"slowapi chose {type(strategy).__name__}")
        return strategy.take(limit, owner, cost=cost)


@dataclass(frozen=True, slots=True)
class HeldTokens:
    """Tokens taken out of a bucket before it is known how many are needed."""

    limits: RateLimits
    bucket: BucketLimit
    owner: str
    tokens: int

    async def settle(self, tokens: int) -> None:
        """Put back what was not used."""
        if tokens < self.tokens:
            self.limits._take(self.bucket, self.owner, tokens - self.tokens)


def _until(left: Taken, bucket: BucketLimit, tokens: int) -> float:
    return max(0.0, left.full_in - (bucket.amount - tokens) / bucket.per_second)


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


def _headers(kind: str, limit: BucketLimit, taken: Taken) -> dict[str, str]:
    """The limit named is the bucket's size, so that `remaining` never exceeds it; `reset` is when it is full again."""
    return {
        f"x-ratelimit-limit-{kind}": str(limit.amount),
        f"x-ratelimit-remaining-{kind}": str(min(taken.remaining, limit.amount)),
        f"x-ratelimit-reset-{kind}": duration(max(0.0, taken.full_in)),
    }


def duration(seconds: float) -> str:
    """Write whole seconds, rounded up, the way OpenAI's headers do: 6s, 1m30s, 2h0m5s."""
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"
