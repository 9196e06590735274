"""What a route asks of the service and what it gets back, in the words of no dialect."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from app.generation.answer_tokens import AnswerToken
from app.types import FinishReason, Message, Principal, SamplingSettings, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(SamplingSettings):
    """How the caller wants the answers; None takes the service's default."""

    max_tokens: int | None = None
    temperature: float | None = None
    n: int = 1
    """So many answers, each drawn on its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an ask came from, for the inference log."""

    request_id: str = ""
    """The id that the client sees; unlike the ask's own it may come twice."""
    route: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionAsk:
    """Go on with a plain text."""

    id: str
    """The request id, also the engine's; unique among live requests.  Further answers get ids made from it."""
    caller: Principal
    prompt: str
    sampling: Sampling = Sampling()
    model: str | None = None
    cache: bool = True
    origin: Origin = Origin()


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
    origin: Origin = Origin()


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
    """A piece of an answer, never empty."""

    text: str
    index: int = 0
    """Which of the answers it goes on with."""
    tokens: tuple[AnswerToken, ...] = ()
    """The tokens that end in this piece, where log-probabilities are asked for; one without text may come alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one answer ended."""

    finish_reason: FinishReason
    tokens: int
    """How many were made for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All answers are complete; always the last event, exactly once."""

    model: str
    endings: tuple[Ending, ...]
    """Of each answer, at least one."""
    usage: Usage
    """Of all answers together; they share one prompt."""
    cached: bool
    """Whether nothing at all was generated."""
    session_id: str | None = None
    context: Context | None = None

    @property
    def finish_reason(self) -> FinishReason:
        """How the first answer ended."""
        return self.endings[0].finish_reason


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole answer."""

    text: str
    finish_reason: FinishReason
    tokens: tuple[AnswerToken, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """All answers to an ask."""

    completions: tuple[Completion, ...]
    prompt: str | None
    finished: Finished

    @property
    def text(self) -> str:
        """The first answer's."""
        return self.completions[0].text


async def collect(events: AsyncGenerator[Event, None]) -> Reply:
    """Read the answers to their end.

    Raises: AppError: whatever ended them in place of Finished.
    """
    deltas: defaultdict[int, list[Delta]] = defaultdict(list)
    prompt: str | None = None
    async for event in events:
        match event:
            case Started():
                prompt = event.prompt
            case Delta():
                deltas[event.index].append(event)
            case Finished():
                completions = tuple(_join(deltas[index], ending) for index, ending in enumerate(event.endings))
                return Reply(completions=completions, prompt=prompt, finished=event)
    raise RuntimeError("an answer ended without its last event")


def _join(deltas: list[Delta], ending: Ending) -> Completion:
    return Completion(
        text="".join(delta.text for delta in deltas),
        finish_reason=ending.finish_reason,
        tokens=tuple(token for delta in deltas for token in delta.tokens),
    )
