"""Fits a prompt into the model's context window: how many tokens may follow, and which earlier turns must go.

Counts with the model's own tokenizer, whole turns at a time.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from msgspec import structs

from app.engine.base import PreparedPrompt
from app.errors import ContextLengthExceeded, InvalidRequest
from app.events import ContextUsage
from app.generation.sessions import Turn
from app.requests import GenerationRequest
from app.types import Message, Role

TYPICAL_BYTES_PER_TOKEN = 4
"""UTF-8 bytes per token of ordinary text; used only to guess whether the history fits."""

Prepare = Callable[[GenerationRequest], Awaitable[PreparedPrompt]]
"""Renders and encodes a prompt."""


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How the context window is shared between prompt and completion."""

    limit: int
    """The context window, in tokens of prompt and completion together."""
    requested: int | None
    """max_tokens of the request; all of it must fit, or the request is refused."""
    default: int
    """max_tokens of a request that leaves it open; it gives way to the prompt."""

    @property
    def reserved(self) -> int:
        """Return the tokens that earlier turns may not take: by default at most a quarter of the window."""
        return min(self.default, self.limit // 4) if self.requested is None else self.requested

    def most_prompt_tokens(self, requested: int = 0) -> int:
        """Return the length that a prompt is truncated to, at least one token; its beginning is cut off.

        Args: requested: the caller's own limit; 0 is none.
        """
        most = self.limit - self.reserved
        return max(1, min(requested, most) if requested else most)

    def uncounted_tokens(self, request: GenerationRequest) -> int:
        """Return the tokens up to which a prompt need not be counted before it is sent; 0 where it must be.

        With so many or fewer it fits, whatever its exact length.
        """
        if request.counts_prompt or request.truncate_prompt is not None or request.n > 1:
            return 0
        return max(0, self.limit - (self.default if self.requested is None else self.requested))

    def least_tokens(self, samples: int) -> int:
        """Return the fewest tokens that a request of so many samples can take; 0 where it never fits."""
        if self.requested is not None:
            return 1 + self.requested * samples if self.requested < self.limit else 0
        # The more the prompt takes, the less is left for each of the samples.
        return min(1 + samples * min(self.default, self.limit - 1), self.limit - 1 + samples)

    def max_tokens(self, prompt_tokens: int, *, is_lower_bound: bool = False) -> int:
        """Return the limit of the completion behind this prompt.

        Args: is_lower_bound: whether the prompt has so many tokens or more.
        Raises: ContextLengthExceeded: the requested tokens do not fit, or no token would.
        """
        free = self.limit - prompt_tokens
        least = 1 if self.requested is None else self.requested
        if free < least:
            raise ContextLengthExceeded(
                prompt_tokens=prompt_tokens, max_tokens=least, limit=self.limit, counted=not is_lower_bound
            )
        return min(self.default, free) if self.requested is None else self.requested


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A request whose prompt fits."""

    request: GenerationRequest
    """The request, with its prompt encoded where the engine takes tokens."""
    prompt_tokens: int
    """Its length, or more than that where `is_upper_bound`."""
    max_tokens: int
    new: tuple[Message, ...] = ()
    """The messages of a chat that its session has not stored yet."""
    context: ContextUsage | None = None
    is_upper_bound: bool = False
    """Whether the prompt has `prompt_tokens` or fewer; the engine says how many."""


async def fit_text(request: GenerationRequest, prepare: Prepare, budget: TokenBudget) -> FittedPrompt:
    """Encode a plain prompt, truncate it if the request wants that, and return it with the tokens that may follow.

    Raises: ContextLengthExceeded; InvalidRequest: the prompt encodes to nothing, or to more than the request allows.
    """
    prepared = await prepare(request)
    if not prepared.prompt_tokens:
        raise InvalidRequest.of_field("prompt", "holds no token for this model")
    ids, prompt_tokens = prepared.prompt_ids, prepared.prompt_tokens
    if request.most_prompt_tokens is not None and prompt_tokens > request.most_prompt_tokens:
        most = request.most_prompt_tokens
        raise InvalidRequest.of_field("prompt", f"has {prompt_tokens} tokens, and this route takes at most {most}")
    if request.truncate_prompt is not None and not prepared.is_lower_bound:
        most = budget.most_prompt_tokens(request.truncate_prompt)
        if ids is None and prompt_tokens > most:
            raise InvalidRequest.of_field("truncate_prompt_tokens", "needs the model's tokenizer, which is elsewhere")
        if ids is not None:
            ids = await _cut(request, ids, prepare, most)
            prompt_tokens = len(ids)
    return FittedPrompt(
        request=structs.replace(request, prompt_ids=ids, counted_tokens=prompt_tokens),
        prompt_tokens=prompt_tokens,
        max_tokens=budget.max_tokens(prompt_tokens, is_lower_bound=prepared.is_lower_bound),
    )


async def _cut(request: GenerationRequest, ids: tuple[int, ...], prepare: Prepare, most: int) -> tuple[int, ...]:
    """Return the last tokens of a prompt, and in front of them those that stand in front of every text."""
    if len(ids) <= most:
        return ids
    head = 0
    if request.text is not None:
        empty = (await prepare(structs.replace(request, text="", prompt_ids=None))).prompt_ids or ()
        while head < min(len(empty), most - 1) and empty[head] == ids[head]:
            head += 1
    return (*ids[:head], *ids[len(ids) - most + head :])


def trimmable(
    request: GenerationRequest, history: Sequence[Turn], new: Sequence[Message]
) -> tuple[Sequence[Turn], Sequence[Message]]:
    """Return the turns that may be dropped, and the messages that may not: all new ones unless the caller allows it."""
    turns = [] if request.truncate_prompt is None else _turns(new)
    if not turns:
        return history, new
    return [*history, *turns[:-1]], turns[-1].messages


def _turns(messages: Sequence[Message]) -> list[Turn]:
    """Split a conversation in front of each user message and the system messages that introduce it."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role is Role.USER or not turns:
            introduction = _take_trailing_system(turns[-1]) if turns else []
            turns.append(introduction)
        turns[-1].append(message)
    return [Turn(tuple(turn)) for turn in turns if turn]


def _take_trailing_system(turn: list[Message]) -> list[Message]:
    """Take the system messages at the end of a turn out of it."""
    end = len(turn)
    while end and turn[end - 1].role is Role.SYSTEM:
        end -= 1
    taken = turn[end:]
    del turn[end:]
    return taken


async def fit_chat(
    request: GenerationRequest,
    history: Sequence[Turn],
    new: Sequence[Message],
    prepare: Prepare,
    budget: TokenBudget,
) -> FittedPrompt:
    """Put as many of the newest earlier turns as fit in front of the new messages.

    Each length is encoded once; the ids of the one that is chosen are handed on.

    Args: request: its messages are the caller's own system messages, or none.
    Raises: ContextLengthExceeded: the new messages alone are too long.
        InvalidRequest: they are longer than the caller lets the prompt be.
    """
    prepared: dict[int, PreparedPrompt] = {}
    uncounted = budget.uncounted_tokens(request)

    def with_history(turns: int) -> GenerationRequest:
        earlier = [message for turn in history[len(history) - turns :] for message in turn.messages]
        # Only the whole history may be left uncounted: how much of it fits is decided by exact lengths.
        most = uncounted if turns == len(history) else 0
        return structs.replace(request, messages=(*request.messages, *earlier, *new), uncounted_tokens=most)

    async def measure(turns: int) -> int:
        if turns not in prepared:
            prepared[turns] = await prepare(with_history(turns))
        return prepared[turns].prompt_tokens

    most = budget.most_prompt_tokens(request.truncate_prompt or 0)
    turns = await _most_turns_that_fit(history, measure, most)
    prompt_tokens = await measure(turns)
    if request.truncate_prompt and request.truncate_prompt < prompt_tokens <= budget.limit:
        reason = f"is less than the {prompt_tokens} tokens of the last turn, which is never cut"
        raise InvalidRequest.of_field("truncate_prompt_tokens", reason)
    counted = 0 if prepared[turns].is_upper_bound else prompt_tokens
    return FittedPrompt(
        request=structs.replace(with_history(turns), prompt_ids=prepared[turns].prompt_ids, counted_tokens=counted),
        prompt_tokens=prompt_tokens,
        max_tokens=budget.max_tokens(prompt_tokens, is_lower_bound=prepared[turns].is_lower_bound),
        new=tuple(new),
        context=ContextUsage(
            limit=budget.limit,
            prompt_tokens=prompt_tokens,
            turns_kept=turns,
            turns_dropped=len(history) - turns,
            is_estimate=prepared[turns].is_estimate,
        ),
        is_upper_bound=prepared[turns].is_upper_bound,
    )


async def _most_turns_that_fit(history: Sequence[Turn], measure: Callable[[int], Awaitable[int]], tokens: int) -> int:
    """Return how many of the newest turns fit into `tokens` with the rest of the prompt; 0 if none does.

    Tries all at once where they are likely to fit, otherwise from the newest outwards in growing steps, so that a
    history many times as long as the window is never encoded whole.
    """
    if sum(turn.text_bytes for turn in history) <= TYPICAL_BYTES_PER_TOKEN * tokens:
        if await measure(len(history)) <= tokens:
            return len(history)
        too_many = len(history)
    else:
        too_many = len(history) + 1
    fitting, step = 0, 1
    while too_many - fitting > 1:
        turns = min(fitting + step, (fitting + too_many) // 2)
        if await measure(turns) <= tokens:
            fitting, step = turns, 2 * step
        else:
            too_many = turns
    return fitting
