"""A queue that serves tenants in turn, by the amount of work that each has had."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """Start-time fair queueing: an item's turn is when its tenant has had as much work as the tenant served least.

    A tenant that was idle starts where the others are, and neither saves up turns nor waits for another's backlog.
    Source: Goyal, Vin and Cheng 1996, "Start-time Fair Queuing", section 2; time as in weighted fair queueing.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, float, Item]] = []
        self._next_start: dict[Hashable, float] = {}
        self._now = 0.0
        self._order = count()
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def tenants(self) -> int:
        """How many tenants' turns are remembered."""
        return len(self._next_start)

    def put(self, tenant: Hashable, work: float, item: Item) -> None:
        """Queue an item that costs `work`, in any unit that is the same for all."""
        start = max(self._now, self._next_start.get(tenant, 0))
        self._next_start[tenant] = start + work
        heapq.heappush(self._heap, (start, next(self._order), work, item))
        self._filled.set()

    async def get(self) -> Item:
        """Wait for an item and take the one whose turn it is."""
        while not self._heap:
            self._filled.clear()
            await self._filled.wait()
        start, _, work, item = heapq.heappop(self._heap)
        # Time goes on by each tenant's share of the work, so that new tenants do not come before all that wait.
        self._now = max(start, self._now + work / max(1, len(self._next_start)))
        if not self._heap:
            # Nobody has a backlog, and the next to come are equal again.
            self._next_start.clear()
        elif len(self._next_start) > 2 * len(self._heap) + 64:
            self._next_start = {each: start for each, start in self._next_start.items() if start > self._now}
        return item
