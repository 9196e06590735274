"""Commands of requests that run at the same time, sent to Redis together and in their order."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Word: TypeAlias = "str | bytes | int | float"
Send = Callable[[Sequence[Sequence[Word]]], Awaitable[Sequence[Any]]]
"""Sends commands and returns the reply, or the error, of each."""

MAX_COMMANDS = 256
MAX_BYTES = 1_048_576
"""Of the commands that are sent together, unless one alone has more."""


@dataclass(slots=True)
class _Waiting:
    words: Sequence[Word]
    reply: asyncio.Future[Any]

    @property
    def size(self) -> int:
        return sum(len(word) for word in self.words if isinstance(word, str | bytes))


class CommandQueue:
    """Sends what has come while the commands before were under way: many requests cost one round trip.

    Whoever is cancelled while it waits for a reply has sent its command all the same.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._waiting: deque[_Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None

    def submit(self, words: Sequence[Word]) -> asyncio.Future[Any]:
        """Queue one command.  Returns: what becomes its reply; or the error that it, or all that were sent, got."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(words, loop.create_future())
        self._waiting.append(waiting)
        if self._sending is None:
            self._sending = loop.create_task(self._send_all())
        return waiting.reply

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                await self._send_some()
        finally:
            self._sending = None

    async def _send_some(self) -> None:
        batch = self._next()
        replies: Sequence[Any]
        try:
            replies = await self._send([each.words for each in batch])
        except asyncio.CancelledError:
            for each in batch:
                each.reply.cancel()
            raise
        except Exception as error:  # noqa: BLE001  # whoever waits is told
            replies = [error] * len(batch)
        for each, reply in zip(batch, replies, strict=True):
            if each.reply.done():
                continue
            if isinstance(reply, Exception):
                each.reply.set_exception(reply)
                each.reply.exception()  # where nobody waits any more
            else:
                each.reply.set_result(reply)

    def _next(self) -> list[_Waiting]:
        batch = [self._waiting.popleft()]
        size = batch[0].size
        while self._waiting and len(batch) < MAX_COMMANDS:
            size += self._waiting[0].size
            if size > MAX_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def close(self) -> None:
        """Wait until all commands are sent, and their replies are there."""
        while self._sending is not None:
            await asyncio.wait([self._sending])
