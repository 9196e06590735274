"""The one request type: made by a dialect, completed step by step with `replace`, and handed to an engine."""

from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Final

from app.types import Message, SamplingParams

RESOLVABLE: Final = frozenset(["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"])
"""Sampling parameters that have a default which is not neutral, from the configuration or the model's own files."""

HARMLESS: Final = {"harmless": True}
"""Metadata of a field that cannot change the response; the cache key covers every field that is not declared so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a request came from, for the inference log."""

    request_id: str = ""
    """The id that the client sees; unlike the request's own it may come twice."""
    route: str = ""


class Progress:
    """How far an engine has come with a request; written by the engine, read at any moment, even after a hang-up."""

    __slots__ = ("generated",)

    def __init__(self) -> None:
        self.generated = 0
        """Tokens generated so far, with the end token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What is to be generated, from the first that is known of it to what the engine takes.

    The prompt is `messages` (a chat) or `text`, or arrives as `prompt_ids`.  Preparation cleans and fits it, and fills
    in `prompt_ids`, which the engine prefers to the other two.
    """

    id: str = field(metadata=HARMLESS)
    """Unique among live requests; made by the service, never by the client."""
    tenant: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    continue_final_message: bool = False
    """Continue the last message, which is the assistant's, where it breaks off."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    unset: frozenset[str] = frozenset()
    """Names of the sampling parameters that the caller left open; `resolve_params` fills them in."""
    use_recommended: bool = field(default=False, metadata=HARMLESS)
    """Whether what is unset follows the model's own generation config before the service's defaults, as in vLLM."""
    n: int = field(default=1, metadata=HARMLESS)
    """Samples of one prompt.  An engine gets one request for each, told apart by `sampling.sample`."""
    adapter: str | None = None
    model: str | None = field(default=None, metadata=HARMLESS)
    """The name that chose the engine; the engine's own description stands in the cache key."""
    priority: int = field(default=0, metadata=HARMLESS)
    """Lower is served first, as in vLLM."""
    session_id: str | None = field(default=None, metadata=HARMLESS)
    """Whose history has become part of the prompt."""
    cache: bool = field(default=True, metadata=HARMLESS)
    """Whether a stored response may be used and this one be stored."""
    cache_random: bool = field(default=True, metadata=HARMLESS)
    """False: only a response that is the same every time (greedy or with a seed) may come from the cache."""
    stream: bool = field(default=True, metadata=HARMLESS)
    """False: the text after the first token may come in one delta, as with vLLM's FINAL_ONLY."""
    origin: Origin = field(default_factory=Origin, metadata=HARMLESS)
    progress: Progress = field(default_factory=Progress, metadata=HARMLESS, compare=False, repr=False)

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @property
    def prompt_tokens(self) -> int:
        """Return the length of the encoded prompt; 0 before it is encoded."""
        return len(self.prompt_ids or ())

    @property
    def max_tokens(self) -> int | None:
        """Return the caller's own limit; None if it is left open."""
        return None if "max_tokens" in self.unset else self.sampling.max_tokens

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Return the engine's request id of each sample; the first is the request's own."""
        return (self.id, *(f"{self.id}.{index}" for index in range(1, self.n)))

    def samples(self) -> tuple["GenerationRequest", ...]:
        """Return one request for each sample, as an engine takes them."""
        if self.n == 1:
            return (self,)
        return tuple(
            replace(self, id=each, n=1, sampling=replace(self.sampling, sample=index), progress=Progress())
            for index, each in enumerate(self.sample_ids)
        )


@cache
def keyed_fields(kind: type[GenerationRequest]) -> tuple[str, ...]:
    """Return the fields of a class of requests that can change the response: all but those declared harmless."""
    return tuple(each.name for each in fields(kind) if not each.metadata.get("harmless"))


def identity(request: GenerationRequest) -> tuple[Any, ...]:
    """Return the values of everything in a request that can change the response."""
    # mypy takes the class of a frozen dataclass with slots for one of its instances.
    names = keyed_fields(type(request))  # type: ignore[arg-type]
    return tuple(getattr(request, name) for name in names)
