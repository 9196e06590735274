"""Values that each tenant keeps for a time: so many, and no longer than so many seconds after the last change."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from cachetools import Cache, TTLCache

from app.types import Tenant

T = TypeVar("T")


class TenantCache(Generic[T]):
    """Maps (tenant, name) to a value; what one tenant stores never evicts a value of another."""

    def __init__(
        self,
        *,
        most: int,
        ttl_seconds: float,
        clock: Callable[[], float],
        most_bytes: int = 1,
        size: Callable[[T], int] = lambda _: 0,
    ) -> None:
        """Args:
        most: values of one tenant; the least recently used goes first.
        ttl_seconds: how long a value lives after it was put.
        clock: seconds; never runs backwards.
        most_bytes: values of one tenant in sum; one alone always fits.
        size: returns how many bytes of them a value is.
        """
        self._capacity = most * most_bytes
        # The larger share counts, of the number or of the bytes; so neither of them exceeds its limit.
        self._share: Callable[[T], int] = lambda value: min(self._capacity, max(most_bytes, size(value) * most))
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._tenants: OrderedDict[Tenant, TTLCache[str, T]] = OrderedDict()
        """The tenant with the oldest last change first."""

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """Return the tenants that have values, the one with the oldest last change first."""
        return tuple(self._tenants)

    def __len__(self) -> int:
        self._drop_idle()
        return sum(len(values) for values in self._tenants.values())

    def get(self, tenant: Tenant, name: str) -> T | None:
        """Return a value, None where this tenant has none of that name (or no longer)."""
        self._drop_idle()
        values = self._tenants.get(tenant)
        return None if values is None else values.get(name)

    def put(self, tenant: Tenant, name: str, value: T) -> None:
        """Store a value, and begin its time to live anew."""
        self._drop_idle()
        values = self._tenants.get(tenant)
        if values is None:
            values = self._tenants[tenant] = TTLCache(self._capacity, self._ttl_seconds, self._clock, self._share)
        values[name] = value
        self._tenants.move_to_end(tenant)

    def delete(self, tenant: Tenant, name: str) -> bool:
        """Forget a value; return whether there was one."""
        self._drop_idle()
        values = self._tenants.get(tenant)
        if values is None:
            return False
        found = values.pop(name, None) is not None
        if not values:
            del self._tenants[tenant]
        return found

    def items(self, tenant: Tenant) -> Iterator[tuple[str, T]]:
        """Yield a tenant's values, the last changed first; to be listed is not to be used."""
        self._drop_idle()
        values = self._tenants.get(tenant)
        if values is not None:
            # Past TTLCache's own __getitem__, which would make it the most recently used.
            yield from reversed([(name, Cache.__getitem__(values, name)) for name in values])

    def _drop_idle(self) -> None:
        """Forget tenants whose values have all expired; as the oldest come first, it looks no further than needed."""
        while self._tenants:
            tenant, values = next(iter(self._tenants.items()))
            if len(values):  # counts what has not expired
                return
            del self._tenants[tenant]
