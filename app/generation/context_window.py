"""Fits a request into the model's context window: how many tokens may come, and which earlier turns must go.

Decides by the model's own tokenizer, whole turns at a time.  Knows no session store and no wire format.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from app.engine.base import Tokenizer
from app.errors import ContextLengthExceeded, InvalidRequest
from app.generation.sessions import Turn
from app.types import Message, Role

LIKELY_BYTES_PER_TOKEN = 4
"""Of ordinary text and vocabularies."""


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


async def fit_text(
    tokenizer: Tokenizer, prompt: str, room: Room, prompt_ids: tuple[int, ...] | None = None
) -> tuple[int, int]:
    """Return how many tokens a raw prompt has and how many more may follow.

    Args: prompt_ids: its tokens, where they are not to be made of the text.
    Raises: ContextLengthExceeded; InvalidRequest: the prompt encodes to nothing.
    """
    if prompt_ids is None:
        prompt_ids = await asyncio.to_thread(tokenizer.encode_text, prompt)
    if not prompt_ids:
        raise InvalidRequest.of_field("prompt", "holds no token for this model")
    return len(prompt_ids), room.max_tokens(len(prompt_ids))


async def fit_chat(
    tokenizer: Tokenizer,
    system: str,
    history: Sequence[Turn],
    new: Sequence[Message],
    room: Room,
    *,
    go_on: bool = False,
) -> Window:
    """Keep as many of the newest earlier turns as fit in front of the new messages.

    Args: go_on: the last message is to be continued.
    Raises: ContextLengthExceeded: the new messages alone are too long.
    """

    def conversation(kept: int) -> tuple[Message, ...]:
        earlier = [message for turn in history[len(history) - kept :] for message in turn.messages]
        return (*earlier, *new)

    async def measure(kept: int) -> int:
        messages = (Message(Role.SYSTEM, system), *conversation(kept))
        return len(await asyncio.to_thread(tokenizer.encode_chat, messages, go_on=go_on))

    kept = await _most_that_fit(history, measure, room.limit - room.reserve)
    prompt_tokens = await measure(kept)
    return Window(
        conversation=conversation(kept),
        prompt_tokens=prompt_tokens,
        turns_kept=kept,
        turns_dropped=len(history) - kept,
        max_tokens=room.max_tokens(prompt_tokens),
    )


async def _most_that_fit(history: Sequence[Turn], measure: Callable[[int], Awaitable[int]], tokens: int) -> int:
    """Return how many of the newest turns leave the prompt within `tokens`; 0 if none does.

    All at once where they are likely to fit.  Else from the newest outwards in growing steps, so that a history many
    times as long as the window is never encoded whole.
    """
    if sum(turn.text_bytes for turn in history) <= LIKELY_BYTES_PER_TOKEN * tokens:
        if await measure(len(history)) <= tokens:
            return len(history)
        too_many = len(history)
    else:
        too_many = len(history) + 1
    fitting, step = 0, 1
    while too_many - fitting > 1:
        kept = min(fitting + step, (fitting + too_many) // 2)
        if await measure(kept) <= tokens:
            fitting, step = kept, 2 * step
        else:
            too_many = kept
    return fitting
