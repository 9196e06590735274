"""Which live requests hold a model or an adapter, and the wait until none does any more."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class Leases(Generic[T]):
    """The leases of the objects of one kind; two objects are never the same one, whatever their names."""

    def __init__(self) -> None:
        self._objects: dict[str, T] = {}
        """Request id -> what it holds, of each sample of each live request."""
        self._counts: Counter[int] = Counter()
        """Identity of an object -> its leases."""
        self._released = asyncio.Event()
        """Set, and replaced, each time an object has lost its last lease."""
        self._waits_are_over = False

    @contextmanager
    def lease(self, leased: T, request_ids: tuple[str, ...]) -> Iterator[None]:
        """Let the samples of one request hold an object for as long as the context lasts."""
        self._objects.update(dict.fromkeys(request_ids, leased))
        self._counts[id(leased)] += 1
        try:
            yield
        finally:
            for each in request_ids:
                del self._objects[each]
            self._counts[id(leased)] -= 1
            if not self._counts[id(leased)]:
                del self._counts[id(leased)]
                self._released.set()
                self._released = asyncio.Event()

    def is_leased(self, each: T) -> bool:
        """Return whether a request holds this object now."""
        return id(each) in self._counts

    def request_ids(self, each: T) -> list[str]:
        """Return the requests that hold an object."""
        return [request_id for request_id, leased in self._objects.items() if leased is each]

    async def wait_released(self, seconds: float, each: T | None = None) -> bool:
        """Wait until an object, or all of them for None, has no lease left; return whether that came in time."""

        def leased() -> bool:
            return bool(self._counts) if each is None else self.is_leased(each)

        try:
            async with asyncio.timeout(seconds):
                while leased() and not self._waits_are_over:
                    await self._released.wait()
        except TimeoutError:
            pass
        return not leased()

    def end_waits(self) -> None:
        """Let every wait return now, and each later one at once."""
        self._waits_are_over = True
        self._released.set()
