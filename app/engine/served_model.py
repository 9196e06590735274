"""Everything that belongs to one loaded model, as the unit in which models are loaded, leased and unloaded."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from app.engine.base import Engine
from app.engine.cache import CachedEngine
from app.events import Event
from app.requests import GenerationRequest


class Chain(Protocol):
    """Writes a prompt with the model's templates and runs the model on it."""

    def render(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its prompt as the templates write it, for counting and encoding."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate one sample; closing the generator closes the engine's stream.

        Raises: AppError: as `Engine.stream` does.
        """


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
