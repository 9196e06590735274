"""The seam behind which tokens are generated: what an engine takes, what it returns, what it promises.

`LocalEngine`, `EchoEngine` and the wrappers around them implement `Engine`; `tests/contract/test_engine.py` holds each
of them to the same promises.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol

from app.embeddings import EmbeddingInfo, EmbeddingRequest, Embeddings, EncodedInputs
from app.errors import InvalidRequest
from app.events import Event
from app.requests import GenerationRequest, TemplateValue
from app.types import EngineState, Message, SamplingParams, StepTimes, Tenant, Tool

_NEUTRAL = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Features that an engine supports; a request that needs others is refused, and the field named."""

    unsupported: tuple[str, ...] = ()
    """Names of sampling parameters that must stay neutral."""
    adapters: bool = False
    priority: bool = False
    """Whether `GenerationRequest.priority` orders the queue; otherwise it is ignored."""

    def check(self, request: GenerationRequest) -> None:
        """Raises: InvalidRequest: the request sets a field that this engine cannot honour; the field is named."""
        for name in self.unsupported:
            if getattr(request.sampling, name) != getattr(_NEUTRAL, name):
                raise InvalidRequest.of_field(name, "is not supported for this model")
        if request.adapter is not None and not self.adapters:
            raise InvalidRequest.of_field("adapter", "is not supported for this model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How a model's chats write calls of tools and reasoning; the names are those of `app/engine/parsing`."""

    tools: str | None = None
    """None: it is not known to call any."""
    reasoning: str | None = None
    """None: it answers at once."""
    special_marks: tuple[tuple[str, int], ...] = ()
    """Special tokens among the marks of both, by name and id; a decoder hides them."""
    added_marks: tuple[tuple[str, int], ...] = ()
    """Those that are single tokens too, but shown."""
    description: str = ""
    """transformers' response template as JSON, of a form that is known from it only."""

    @property
    def is_harmony(self) -> bool:
        """Return whether one format with channels is both."""
        return "harmony" in (self.tools, self.reasoning)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Description of a loaded model; None where an engine has no such figure."""

    model: str
    revision: str | None = None
    engine: str
    """Which implementation serves it: batching, serial, echo."""
    device: str | None = None
    dtype: str | None = None
    context_length: int
    """Tokens of prompt and completion together that fit one request."""
    vocab_size: int | None = None
    parameters: int | None = None
    capabilities: Capabilities = Capabilities()
    recommended: tuple[tuple[str, float], ...] = ()
    """Sampling parameters that the model's own files recommend, by the names of `SamplingParams`."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion by the model's own files, and are part of it."""
    rules: str | None = None
    """Digest of the tokens and sequences that the model's own files suppress or favour; None where there are none."""
    logprob_shift: float | None = None
    """By how much int8 weights changed the log-probability of the likeliest token at load, on average; None where
    nothing is quantized."""
    template_variables: tuple[str, ...] | None = ()
    """Variables of the chat template that a request may set, sorted; None where another service knows them."""
    renders_reasoning: bool = False
    """Whether the chat template shows what the assistant thought in earlier turns."""
    compiled: Literal["attention", "graphs", "layers"] | None = None
    """What is compiled for this machine at load, or recorded as graphs of a GPU; None: torch computes everything."""
    ways: tuple[str, ...] = ()
    """The ways of execution that compute its steps, where several were measured at load."""
    step_times: tuple[StepTimes, ...] = field(default=(), repr=False, compare=False)
    """What steps took in each way.  Another load measures others, and changes no response."""
    chat_format: ChatFormat = ChatFormat()
    embedding: EmbeddingInfo | None = None
    """How it embeds texts; None: not at all."""
    origin: str = ""
    """Digest of where its files come from: keeps two models apart that had the same name one after the other."""

    def check_tokens(self, field: str, token_ids: Sequence[int]) -> None:
        """Raises: InvalidRequest: one of them is no token of the model; the field is named."""
        if self.vocab_size is not None and max(token_ids, default=0) >= self.vocab_size:
            last = self.vocab_size - 1
            raise InvalidRequest.of_field(field, f"names a token that the model does not have; its last is {last}")

    def as_dict(self) -> dict[str, Any]:
        """Return all facts as plain values, with the unsupported parameters by their names."""
        facts: dict[str, Any] = {}
        for each in fields(self):
            if each.name == "capabilities":
                facts["unsupported"] = self.capabilities.unsupported
            elif each.name == "chat_format":
                facts |= {"tool_format": self.chat_format.tools, "reasoning_format": self.chat_format.reasoning}
            elif each.name == "origin":
                continue
            elif each.name == "step_times":
                facts["step_times"] = [asdict(times) for times in self.step_times]
            elif each.name == "embedding":
                facts["embedding"] = None if self.embedding is None else asdict(self.embedding)
            else:
                facts[each.name] = getattr(self, each.name)
        return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamStatus:
    """A snapshot of one of the servers that an engine sends its requests to."""

    number: int
    """Its place in the configuration, from 1."""
    ready: bool
    """Whether it gets requests."""
    running: int
    failures: int
    """Requests so far that it could not be asked, or broke off."""
    error: str | None = None
    """What the last failure was; None since it serves."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far a load has come."""

    stage: str
    bytes_done: int | None = None
    bytes_total: int | None = None
    """Of this stage; None where it is not known."""


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
    slots: int | None = None
    """Requests that run at once; None before it is loaded."""
    device_bytes: int | None = None
    """Memory that the model took on a GPU when it was loaded."""
    device_total_bytes: int | None = None
    progress: LoadProgress | None = None
    """While the model is loaded."""
    upstreams: tuple[UpstreamStatus, ...] = ()


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt as the engine will read it."""

    prompt_tokens: int
    prompt_ids: tuple[int, ...] | None
    """None where another service tokenizes, so that `prompt_tokens` may be an estimate, or where it is too long."""
    is_lower_bound: bool = False
    """Whether the prompt has `prompt_tokens` or more, too many in any case, and was not encoded."""
    is_estimate: bool = False
    """Whether `prompt_tokens` is a guess that is rather too high, since the tokenizer is not known here."""
    is_upper_bound: bool = False
    """Whether the prompt has `prompt_tokens` or fewer, few enough for `GenerationRequest.uncounted_tokens`."""


class TextDecoder(Protocol):
    """Turns the tokens of one completion into text as they come; lives as long as the completion."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; bytes of an unfinished character are withheld."""

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""


class Tokenizer(Protocol):
    """The model's own tokenizer; user text can never become a control token."""

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Sequence[tuple[str, TemplateValue]] = (),
        continue_final_message: bool = False,
        tenant: Tenant | None = None,
    ) -> tuple[int, ...]:
        """Apply the chat template, ending where the assistant begins to speak, or where the last message breaks off.

        Args:
            tools: what the assistant may call.
            template_kwargs: further variables of the template.
            tenant: who may find parts of the conversation encoded already next time; None: nobody.
        Raises: InvalidRequest: the model has no chat template, or the template refuses these messages.
        """

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode a raw prompt with the tokens that the tokenizer puts in front of every text."""

    def decoder(self, prompt_ids: Sequence[int] = ()) -> TextDecoder:
        """Return a decoder for one completion of a prompt (special tokens are not shown).

        Its text is what stands behind the prompt's when both are decoded together.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token in mid-text; of a control token its name, of an unknown id nothing."""

    def token_text(self, token_id: int) -> str:
        """Return the same as text, where a part of a character is U+FFFD."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all these tokens, with the names of control tokens."""

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt holds tokens that ordinary text does not have.

        Those that the tokenizer itself puts in front of every text do not count at the beginning of the prompt.
        """

    def hidden_token(self, name: str) -> int | None:
        """Return the special token of this name, which no completion shows; None where there is none."""


class HostedEngine(Protocol):
    """What every engine has, whatever its model does."""

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""

    async def start(self) -> None:
        """Begin to load the model and return at once; `wait_ready` reports the outcome."""

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.  Raises: EngineFailed: the model cannot be loaded."""

    async def abort(self, request_id: str) -> None:
        """End a request now.  Unknown ids are ignored."""

    async def close(self) -> None:
        """Stop for good: live requests end, and no process or task is left."""


class Embedder(Protocol):
    """Turns texts into vectors with one loaded model."""

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of an input that arrived as tokens."""

    async def prepare_embedding(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode the texts of a request.

        Raises: InvalidRequest: one cannot be encoded; EngineNotReady; DeadlineExceeded.
        """

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return the vectors of prepared texts; cancelling this ends the request within a pass.

        Raises: EngineNotReady, EngineBusy, InvalidRequest: it is not taken.  EngineFailed, DeadlineExceeded,
            ShuttingDown: it was, and has no result.
        """


class EncoderEngine(HostedEngine, Embedder, Protocol):
    """An engine whose model embeds and does nothing else."""


class Engine(Protocol):
    """Generates completions of one loaded model."""

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""

    async def start(self) -> None:
        """Begin to load the model and return at once; `wait_ready` reports the outcome."""

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.

        Raises: EngineFailed: the model cannot be loaded, and trying again would not help.
        """

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Encode the prompt of a request, or estimate its length where another service has the tokenizer.

        Raises: InvalidRequest: the prompt cannot be encoded; EngineNotReady.
        """

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool = False) -> str:
        """Return the text of a prompt that arrived as tokens.  Args: control_tokens: whether their names are in it."""

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token on its own; of a control token its name, and a part of a character as U+FFFD."""

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt that arrived as tokens holds control tokens; True where that cannot be known.

        Raises: EngineNotReady.
        """

    def hidden_token(self, name: str) -> int | None:
        """Return the special token of this name, which no completion shows; None where there is none.

        Raises: EngineNotReady.
        """

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        """Return the last tokens of a prompt as text, control tokens by their names; empty where that is not known.

        Raises: EngineNotReady.
        """

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate: Started at once when admitted, deltas, then exactly one Finished.

        Closing the generator early cancels the request within one token and frees all that it holds.

        Raises: EngineNotReady, EngineBusy, InvalidRequest: in place of Started.
            EngineFailed, DeadlineExceeded: in place of Finished.
        """

    async def abort(self, request_id: str) -> None:
        """End a request now: its stream finishes with FinishReason.ABORT.  Unknown ids are ignored."""

    async def close(self) -> None:
        """Stop for good: live streams finish with FinishReason.ABORT, and no process or task is left."""
