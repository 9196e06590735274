"""What a route asks of the service and what it gets back, in the words of no dialect."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from app.types import FinishReason, Message, Principal, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the caller wants the answer; None takes the service's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAsk:
    """Go on with a plain text."""

    id: str
    """The request id, also the engine's; unique among live requests."""
    caller: Principal
    prompt: str
    sampling: Sampling = Sampling()
    model: str | None = None
    cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAsk:
    """Answer the last message of a conversation."""

    id: str
    caller: Principal
    messages: tuple[Message, ...]
    """At least one; the last is the user's."""
    session_id: str | None = None
    sampling: Sampling = Sampling()
    model: str | None = None
    cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """How a conversation was fitted into the context window."""

    limit: int
    """Tokens that prompt and answer share."""
    prompt_tokens: int
    turns_kept: int
    """Earlier turns of the conversation that the model saw."""
    turns_dropped: int
    """Earlier turns left out because they did not fit; the oldest go first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request is valid and admitted; always the first event."""

    model: str
    prompt: str | None = None
    """The prompt as the model sees it, after the input filter; None for a chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of the answer, never empty."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The answer is complete; always the last event, exactly once."""

    model: str
    finish_reason: FinishReason
    usage: Usage
    cached: bool
    session_id: str | None = None
    context: Context | None = None


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer."""

    text: str
    prompt: str | None
    finished: Finished


async def collect(events: AsyncGenerator[Event, None]) -> Reply:
    """Read an answer to its end.

    Raises: AppError: whatever ended the answer in place of Finished.
    """
    parts: list[str] = []
    prompt: str | None = None
    async for event in events:
        match event:
            case Started():
                prompt = event.prompt
            case Delta():
                parts.append(event.text)
            case Finished():
                return Reply(text="".join(parts), prompt=prompt, finished=event)
    raise RuntimeError("an answer ended without its last event")
