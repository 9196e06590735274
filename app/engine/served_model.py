"""Everything that belongs to one loaded model, as the unit in which models are loaded, leased and unloaded."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from app.embeddings import EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.adapter_source import AdapterFiles
from app.engine.base import EncoderEngine, Engine
from app.engine.cache import CachedEngine
from app.events import Event
from app.ipc.messages import AdapterLoaded
from app.requests import GenerationRequest


class Chain(Protocol):
    """Writes a prompt with the model's templates and runs the model on it."""

    def render(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its prompt as the templates write it, for counting and encoding."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate one sample; closing the generator closes the engine's stream.

        Raises: AppError: as `Engine.stream` does.
        """


@runtime_checkable
class AdapterEngine(Protocol):
    """The part of an engine that takes adapters."""

    async def load_adapter(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        """Load an adapter and return what it is.

        Raises: InvalidRequest: it cannot be used with this model.  EngineNotReady, EngineFailed.
        """

    def unload_adapter(self, digest: str) -> None:
        """Let go of an adapter that was loaded once."""

    def adapters_in_use(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the adapters of running requests, and of waiting ones."""


class EmbeddingChain(Protocol):
    """Runs the model on texts, as LangChain's embeddings do."""

    async def prepare(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode the texts.  Raises: AppError: as `Embedder.prepare_embedding` does."""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of an input that arrived as tokens."""

    async def run(self, request: EmbeddingRequest) -> Embeddings:
        """Embed prepared texts.  Raises: AppError: as `Embedder.embed` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """The sampling parameters that a request leaves open."""

    max_tokens: int
    """Gives way to a long prompt."""
    temperature: float = 0.0
    openai_temperature: float | None = None
    """For OpenAI's dialect; None follows the model's own recommendation, else 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model behind its public name: the engine with its wrappers, the chain over it, and the defaults."""

    name: str
    engine: Engine
    """The outermost one: cache, output filter and the engine itself."""
    chain: Chain
    defaults: SamplingDefaults
    cache: CachedEngine | None = None
    """Its figures are reported; the engine contains it already."""
    embeddings: EmbeddingChain | None = None
    """None: the model does not embed texts."""
    adapters: AdapterEngine | None = None
    """None: the model takes no adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEncoder:
    """A model behind its public name that embeds and does nothing else."""

    name: str
    engine: EncoderEngine
    embeddings: EmbeddingChain


Served = ServedModel | ServedEncoder
