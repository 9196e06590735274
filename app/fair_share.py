"""The rule by which tenants share a capacity: places in the model's line, its prompt tokens, requests in memory.

Dynamic thresholds (Choudhury and Hahne 1998): nobody may hold more than is left free.  A tenant without competitors
holds what the setting says, which is half of the capacity; each of N that want all they can get holds about an
(N+1)th, and as much stays free.  So a newcomer finds a place however many another has taken, and nothing that has been
admitted is thrown out again for it.
"""


def fits_share(more: int, *, held: int, total: int, alone: int) -> bool:
    """Return whether a tenant may take so many places.

    Args:
        held: places that the tenant has.
        total: places that all tenants have.
        alone: places that a tenant may have while no other has any; all have at most twice as many.
    """
    return held + more <= min(alone, 2 * alone - total)
