"""What a route asks of the service and what it gets back, in the words of no dialect."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from app.engine.tokenizer.logprob_text import AnswerToken
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
    prompt: str | tuple[int, ...]
    """A text, or tokens of the model."""
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
    """At least one; in a session the last is the user's."""
    go_on: bool = False
    """Continue the last message, which is the assistant's, where it breaks off."""
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
    """The request is valid and admitted; always the first event, and with several prompts once for each."""

    model: str
    prompt: str | None = None
    """The prompt as the model sees it, after the input filter; None for a chat."""
    prompt_tokens: int = 0
    """How many the model sees."""
    index: int = 0
    """The first of the answers that it begins."""
    cached: bool = False
    """Whether nothing at all is generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer, never empty."""

    text: str
    index: int = 0
    """Which of the answers it goes on with."""
    tokens: tuple[AnswerToken, ...] = ()
    """The tokens that end in this piece, where log-probabilities are asked for; one without text may come alone."""
    made: int = 0
    """How many tokens the model has made for this answer since the piece before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How one answer ended."""

    finish_reason: FinishReason
    tokens: int
    """How many were made for it."""
    stopped_by: str | int | None = None
    """The stop string or stop token that ended it; None if it ended otherwise."""


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
    ending: Ending
    tokens: tuple[AnswerToken, ...] = ()

    @property
    def finish_reason(self) -> FinishReason:
        return self.ending.finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """All answers to an ask."""

    completions: tuple[Completion, ...]
    prompts: tuple[str | None, ...]
    """One for each prompt of the request."""
    finished: Finished

    @property
    def text(self) -> str:
        """The first answer's."""
        return self.completions[0].text

    @property
    def prompt(self) -> str | None:
        """The first prompt."""
        return self.prompts[0]


async def collect(events: AsyncGenerator[Event, None]) -> Reply:
    """Read the answers to their end.

    Raises: AppError: whatever ended them in place of Finished.
    """
    deltas: defaultdict[int, list[Delta]] = defaultdict(list)
    prompts: dict[int, str | None] = {}
    async for event in events:
        match event:
            case Started():
                prompts[event.index] = event.prompt
            case Delta():
                deltas[event.index].append(event)
            case Finished():
                completions = tuple(_join(deltas[index], ending) for index, ending in enumerate(event.endings))
                told = tuple(prompt for _, prompt in sorted(prompts.items()))
                return Reply(completions=completions, prompts=told, finished=event)
    raise RuntimeError("an answer ended without its last event")


def _join(deltas: list[Delta], ending: Ending) -> Completion:
    return Completion(
        text="".join(delta.text for delta in deltas),
        ending=ending,
        tokens=tuple(token for delta in deltas for token in delta.tokens),
    )
