"""The seam behind which spans are made: what is measured of a request, and nothing of it where tracing is off.

`otlp.py` sends the spans to a collector; it alone imports OpenTelemetry's SDK, which is an extra.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from app.requests import GenerationRequest
from app.types import FinishReason

if TYPE_CHECKING:
    import httpx
    from opentelemetry.trace import TracerProvider


@dataclass(slots=True)
class GenerationOutcome:
    """What the span of a generation says of its end; filled in while it runs."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasons: Sequence[FinishReason] = ()
    """How each sample ended."""
    input: str | None = None
    output: str | None = None
    """The texts as JSON, of GenAI's conventions; None where they are not wanted."""


class Tracer(Protocol):
    """Measures parts of the request that runs, as spans of one trace."""

    @property
    def provider(self) -> "TracerProvider | None":
        """What the web framework makes the span of the whole request with; None: it makes none."""

    @property
    def wants_texts(self) -> bool:
        """Whether spans may hold prompts and completions."""

    def span(self, name: str, /) -> AbstractContextManager[None]:
        """Measure a block of the request that runs."""

    def generation(
        self, name: str, samples: Sequence[GenerationRequest], end: Callable[[], GenerationOutcome]
    ) -> AbstractContextManager[None]:
        """Measure a generation while the context lasts, and its stages by the times that the engine noted.

        Args:
            name: of the model or adapter, as the client knows it.
            samples: the requests that the engine gets.
            end: is called once it has ended.
        """

    def trace_id(self) -> str | None:
        """Return the trace of the request that runs, as its header has it."""

    def instrument(self, client: "httpx.AsyncClient") -> None:
        """Let a client's requests be spans, and tell its server of the trace."""

    def silence(self) -> AbstractContextManager[None]:
        """Make no spans of such requests in the block."""

    def close(self) -> None:
        """Send what is left, waiting a moment at most."""


_NOTHING = nullcontext()


class NoTracer:
    """Measures nothing."""

    provider = None
    wants_texts = False

    def span(self, name: str, /) -> AbstractContextManager[None]:
        return _NOTHING

    def generation(
        self, name: str, samples: Sequence[GenerationRequest], end: Callable[[], GenerationOutcome]
    ) -> AbstractContextManager[None]:
        return _NOTHING

    def trace_id(self) -> str | None:
        return None

    def instrument(self, client: "httpx.AsyncClient") -> None:
        return

    def silence(self) -> AbstractContextManager[None]:
        return _NOTHING

    def close(self) -> None:
        return


NO_TRACER: Tracer = NoTracer()
