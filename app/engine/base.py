"""The seam behind which tokens are made: what an engine is given, what it gives back, what it promises.

Knows no HTTP, no LangChain and no torch.  `LocalEngine`, `EchoEngine` and `CachedEngine` implement it, and
`tests/contract/test_engine.py` holds every one of them to the same promises.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from app.types import EngineState, FinishReason, Message, SamplingParams, TokenLogprob, Usage


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What is known of a loaded model."""

    model: str
    revision: str | None
    engine: str
    """Which implementation serves it: batching, serial, echo."""
    device: str
    dtype: str
    context_length: int
    """Tokens of prompt and completion together that fit one request."""
    vocab_size: int
    parameters: int
    unsupported: tuple[str, ...] = ()
    """Fields of `SamplingParams` that this engine cannot honour; a request that sets one is refused."""
    recommended: tuple[tuple[str, float], ...] = ()
    """Sampling settings that the model's own files recommend, by the names of `SamplingParams`."""
    logprob_shift: float | None = None
    """By how much weights in int8 changed the log-probability of the likeliest token at load, on average; None where
    nothing is quantized."""
    compiled: Literal["attention", "layers"] | None = None
    """What was compiled for this machine at load; None leaves all to torch's own operators."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot for /status and /readyz."""

    state: EngineState
    running: int
    waiting: int
    restarts: int
    error: str | None = None
    worker_pid: int | None = None
    worker_rss_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, already encoded: an engine gets tokens, never text."""

    id: str
    """Unique among live requests; made by the service, never by the client."""
    tenant: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    cache: bool = True
    """Whether a stored answer may be given and this one be stored."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    The first is empty and says that the request was admitted.  The last carries `finish_reason` and `usage`, and
    only the last.
    """

    text: str = ""
    tokens: int = 0
    """Tokens made since the chunk before; over a whole stream they add up to `usage.completion_tokens`."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of the tokens whose text ended since the chunk before, where asked for: only those that are part of the answer's
    text, in order."""
    token_ends: tuple[int, ...] = ()
    """For each of `logprobs` how many characters of `text` its token ends after."""
    stopped_by: str | int | None = None
    """In the last chunk: the stop string or the one of `stop_token_ids` that ended the answer."""
    cached: bool = False
    """Nothing was generated for this piece: it comes from another request's answer."""


class TextDecoder(Protocol):
    """Turns the tokens of one completion into text as they come; lives as long as the completion."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; bytes of an unfinished character are kept back."""

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""


class Tokenizer(Protocol):
    """The model's own tokenizer; user text can never become a control token."""

    def encode_chat(self, messages: Sequence[Message], *, go_on: bool = False) -> tuple[int, ...]:
        """Apply the chat template, ending where the assistant begins to speak, or with `go_on` where the last message
        breaks off.

        Raises: InvalidRequest: the model has no chat template, or the template refuses these messages.
        """

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode a raw prompt with the tokens that the tokenizer puts in front of every text."""

    def decoder(self) -> TextDecoder:
        """Make a decoder for one completion (special tokens are not shown)."""

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token says on its own, in mid-text; a control token says its name, an unknown id nothing."""

    def token_text(self, token_id: int) -> str:
        """Return the same as text, where a part of a character is U+FFFD."""


class Engine(Protocol):
    """Makes completions.  One per loaded model; lives as long as the application."""

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: EngineNotReady: no model has been loaded yet."""

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""

    async def start(self) -> None:
        """Begin to load the model and return at once; `wait_ready` tells the outcome."""

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.

        Raises: EngineFailed: the model cannot be loaded, and trying again would not help.
        """

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Generate; an empty chunk at once when admitted, then the text, then exactly one last chunk.

        Closing the generator early cancels the request within one token.

        Raises: EngineNotReady, EngineBusy: before the first chunk.
            EngineFailed, DeadlineExceeded: in place of the last chunk.
        """

    async def abort(self, request_id: str) -> None:
        """End a request now: its stream closes with FinishReason.ABORT.  Unknown ids are ignored."""

    async def close(self) -> None:
        """Stop for good: live streams end with FinishReason.ABORT, and no process or task is left."""
