"""Fits a request into the model's context window: how many tokens may come, and which earlier turns must go.

Decides by the model's own tokenizer, whole turns at a time.  Knows no session store and no wire format.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.base import Tokenizer
from app.errors import ContextLengthExceeded, InvalidRequest
from app.generation.filters import THREAD_CHARS
from app.generation.memory import Turn
from app.types import Message, Role


@dataclass(frozen=True, slots=True)
class Room:
    """How long the answer may become, and what room must be kept free for it."""

    limit: int
    """The context window: tokens of prompt and answer together."""
    asked: int | None
    """max_tokens of the request; it is kept free whole, or the request is refused."""
    default: int
    """max_tokens when the request names none; it gives way to the prompt."""

    @property
    def reserve(self) -> int:
        """Tokens that earlier turns may not take: an unasked answer gets at most a quarter of the window."""
        return self.asked or min(self.default, self.limit // 4)

    def max_tokens(self, prompt_tokens: int) -> int:
        """Return the answer's limit behind this prompt.

        Raises: ContextLengthExceeded: what was asked for does not fit, or no token would.
        """
        free = self.limit - prompt_tokens
        if free < (self.asked or 1):
            raise ContextLengthExceeded(prompt_tokens=prompt_tokens, max_tokens=self.asked or 1, limit=self.limit)
        return self.asked or min(self.default, free)


@dataclass(frozen=True, slots=True)
class Window:
    """A conversation that fits."""

    conversation: tuple[Message, ...]
    prompt_tokens: int
    turns_kept: int
    turns_dropped: int
    max_tokens: int


async def fit_text(tokenizer: Tokenizer, prompt: str, room: Room) -> tuple[int, int]:
    """Return the tokens of a raw prompt and how many more may follow.

    Raises: ContextLengthExceeded; InvalidRequest: the prompt encodes to nothing.
    """
    if len(prompt) > THREAD_CHARS:
        prompt_ids = await asyncio.to_thread(tokenizer.encode_text, prompt)
    else:
        prompt_ids = tokenizer.encode_text(prompt)
    if not prompt_ids:
        raise InvalidRequest("The prompt holds no token for this model.")
    return len(prompt_ids), room.max_tokens(len(prompt_ids))


async def fit_chat(
    tokenizer: Tokenizer, system: str, history: Sequence[Turn], new: Sequence[Message], room: Room
) -> Window:
    """Keep as many of the newest earlier turns as fit in front of the new messages.

    Raises: ContextLengthExceeded: the new messages alone are too long.
    """

    async def measure(dropped: int) -> tuple[tuple[Message, ...], int]:
        earlier = [message for turn in history[dropped:] for message in turn.messages]
        conversation = (*earlier, *new)
        messages = (Message(Role.SYSTEM, system), *conversation)
        if sum(len(message.content) for message in messages) > THREAD_CHARS:
            return conversation, len(await asyncio.to_thread(tokenizer.encode_chat, messages))
        return conversation, len(tokenizer.encode_chat(messages))

    dropped = 0
    conversation, prompt_tokens = await measure(0)
    if history and prompt_tokens + room.reserve > room.limit:
        # The count falls with every dropped turn, so halving finds the fewest that must go.
        low, high = 1, len(history)
        while low < high:
            middle = (low + high) // 2
            _, prompt_tokens = await measure(middle)
            low, high = (low, middle) if prompt_tokens + room.reserve <= room.limit else (middle + 1, high)
        dropped = low
        conversation, prompt_tokens = await measure(dropped)
    return Window(
        conversation=conversation,
        prompt_tokens=prompt_tokens,
        turns_kept=len(history) - dropped,
        turns_dropped=dropped,
        max_tokens=room.max_tokens(prompt_tokens),
    )
