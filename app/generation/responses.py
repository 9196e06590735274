"""Stored responses: conversations that a client continues by the id of any response in them.

Unlike a session, a conversation may be continued from each of its responses.  So every stored response holds the turns
up to itself; they are shared in memory.  What is stored is masked, as in sessions, and has their limits; those of one
turn are none for what it is shown as, so this has a limit of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from app.config import ChatHistoryConfig
from app.generation.sessions import Turn, newest_turns
from app.generation.tenant_cache import TenantCache
from app.types import Message, Tenant

TENANT_BYTES = 64 * 1024 * 1024
"""Documents and inputs of one tenant's responses in sum; the least recently used response goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response as it is stored."""

    id: str
    turns: tuple[Turn, ...]
    """The conversation up to this response and with it, oldest first, without system messages."""
    document: bytes
    """The response as its dialect shows it, JSON."""
    input_items: bytes
    """What the client sent for it, as its dialect lists it, JSON."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """Return the messages of all turns."""
        return tuple(message for turn in self.turns for message in turn.messages)


class ResponseStore(Protocol):
    """Keeps responses.  `tests/contract/test_response_store.py` holds every store to the same promises.

    Every method raises StoreUnavailable where the store is on another machine and does not answer.
    """

    async def read(self, tenant: Tenant, response_id: str) -> StoredResponse | None:
        """Return the response, None where this tenant has none of that id (or no longer).

        Raises: SessionUnreadable: what is stored of it is damaged, or cannot be decrypted.
        """

    async def put(self, tenant: Tenant, response: StoredResponse) -> None:
        """Store a response with the newest turns that the limits of a conversation allow."""

    async def delete(self, tenant: Tenant, response_id: str) -> bool:
        """Forget the response; return whether there was one.  Those that continue it stay."""

    def check(self) -> None:
        """Raises: StoreUnavailable: nothing can be stored now, as far as is known; never blocks."""


class MemoryResponseStore:
    """Responses in this process; a restart forgets them."""

    def __init__(
        self,
        config: ChatHistoryConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        tenant_bytes: int = TENANT_BYTES,
    ) -> None:
        """Args:
        clock: seconds, for the time to live; never runs backwards.
        tenant_bytes: documents and inputs of one tenant's responses in sum.
        """
        self._config = config
        self._responses = TenantCache[StoredResponse](
            most=config.max_sessions,
            ttl_seconds=config.ttl_seconds,
            clock=clock,
            most_bytes=tenant_bytes,
            size=lambda response: len(response.document) + len(response.input_items),
        )

    async def read(self, tenant: Tenant, response_id: str) -> StoredResponse | None:
        return self._responses.get(tenant, response_id)

    async def put(self, tenant: Tenant, response: StoredResponse) -> None:
        bounded = replace(response, turns=newest_turns(response.turns, self._config))
        self._responses.put(tenant, response.id, bounded)

    async def delete(self, tenant: Tenant, response_id: str) -> bool:
        return self._responses.delete(tenant, response_id)

    def check(self) -> None:
        """Memory is always there."""
