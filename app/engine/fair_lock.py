"""A lock that is fair between tenants: none waits for all that another one wants."""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator

from app.errors import EngineBusy
from app.types import Tenant


class FairLock:
    """A mutex; of the tenants that wait, the one that had it longest ago gets it next."""

    def __init__(self, max_waiting: int, message: str) -> None:
        """Args:
        max_waiting: different keys that a tenant may wait for.
        message: for a caller that is one too many.
        """
        self._max_waiting = max_waiting
        self._message = message
        self._locked = False
        self._waiting: OrderedDict[Tenant, deque[tuple[bytes, asyncio.Future[None]]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def hold(self, tenant: Tenant, key: bytes) -> AsyncGenerator[None, None]:
        """Wait for the lock and have it during the block.

        Args: key: what it is for; callers that wait with the same key count once.
        Raises: EngineBusy: the tenant waits with too many keys already.
        """
        if self._locked:
            await self._wait(tenant, key)
        self._locked = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: Tenant, key: bytes) -> None:
        queue = self._waiting.get(tenant, deque())
        keys = {each for each, _ in queue}
        if key not in keys and len(keys) >= self._max_waiting:
            raise EngineBusy(self._message)
        waiter = (key, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, queue).append(waiter)
        try:
            await waiter[1]
        except asyncio.CancelledError:
            if waiter[1].cancelled():
                with contextlib.suppress(ValueError):
                    queue.remove(waiter)
                if not queue and self._waiting.get(tenant) is queue:
                    del self._waiting[tenant]
            else:
                # The lock had come at the same moment.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give the lock to the next waiter, or free it."""
        while self._waiting:
            tenant, queue = self._waiting.popitem(last=False)
            future = next((each for _, each in queue if not each.done()), None)
            if future is None:
                continue
            while queue.popleft()[1] is not future:
                pass
            if queue:
                self._waiting[tenant] = queue
            future.set_result(None)
            return
        self._locked = False
