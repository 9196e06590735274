"""The rule by which tenants share a capacity: places in the model's line, its prompt tokens, requests in memory.

Dynamic thresholds (Choudhury and Hahne 1998): nobody may hold more than is left free.  A tenant without competitors
holds what the setting says, which is half of the capacity; each of N that want all they can get holds about an
(N+1)th, and as much stays free.  So a newcomer finds a place however many another has taken, and nothing that has been
admitted is thrown out again for it.
"""

from collections import Counter

from app.types import Tenant


def fits_share(more: int, *, held: int, total: int, most: int) -> bool:
    """Return whether a tenant may take so many places.

    Args:
        held: places that the tenant has.
        total: places that all tenants have.
        most: places that a tenant may have while no other has any; all have at most twice as many.
    """
    return held + more <= min(most, 2 * most - total)


class FairPlaces:
    """Places in this process that owners share by this rule; an owner without any may always take some."""

    def __init__(self, most: int) -> None:
        """Args: most: places that an owner may have while no other has any."""
        self._most = most
        self._held: Counter[Tenant] = Counter()
        self._total = 0

    def held(self, owner: Tenant) -> int:
        """Return how many places an owner has."""
        return self._held[owner]

    def take(self, owner: Tenant, places: int) -> bool:
        """Take places, or none; return whether they were taken."""
        held = self._held[owner]
        if held and not fits_share(places, held=held, total=self._total, most=self._most):
            return False
        self._held[owner] += places
        self._total += places
        return True

    def release(self, owner: Tenant, places: int) -> None:
        """Give places back."""
        self._total -= places
        self._held[owner] -= places
        if not self._held[owner]:
            del self._held[owner]
