"""Turns at something that serves one caller at a time, shared between tenants."""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator

from app.errors import EngineBusy
from app.types import Tenant


class TenantTurns:
    """One caller has the turn; of those that wait, the tenant that had its last turn longest ago is next."""

    def __init__(self, most: int, message: str) -> None:
        """Args:
        most: different things that a tenant may wait for.
        message: for a caller that is one too many.
        """
        self._most = most
        self._message = message
        self._taken = False
        self._waiting: OrderedDict[Tenant, deque[tuple[bytes, asyncio.Future[None]]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: Tenant, thing: bytes) -> AsyncGenerator[None, None]:
        """Wait for the turn and have it during the block.

        Args: thing: what it is for; callers that wait for the same thing count once.
        Raises: EngineBusy: the tenant waits for too many things already.
        """
        if self._taken:
            await self._wait(tenant, thing)
        self._taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, tenant: Tenant, thing: bytes) -> None:
        queue = self._waiting.get(tenant, deque())
        things = {each for each, _ in queue}
        if thing not in things and len(things) >= self._most:
            raise EngineBusy(self._message)
        place = (thing, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, queue).append(place)
        try:
            await place[1]
        except asyncio.CancelledError:
            if place[1].cancelled():
                with contextlib.suppress(ValueError):
                    queue.remove(place)
                if not queue and self._waiting.get(tenant) is queue:
                    del self._waiting[tenant]
            else:
                # The turn had come at the same moment.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
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
        self._taken = False
