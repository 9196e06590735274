"""The seam behind which spans are made: what is measured of a request, and nothing of it where tracing is off.

`otlp.py` sends the spans to a collector; it alone imports OpenTelemetry's SDK, which is an extra.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from app.requests import GenerationRequest
from app.types import FinishReason

if TYPE_CHECKING:
    import aiohttp


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


TRACE_PARENT = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
"""The header of the trace that a request belongs to: trace, span, flags.  Source: W3C Trace Context, level 1."""
Headers = Collection[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""


_NO_ATTRIBUTES: Mapping[str, Any] = MappingProxyType({})


class RequestSpan(Protocol):
    """The span of a request while it runs; `end` has to be called in the task that began it."""

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to, as a header has it."""

    def end(self, method: str, route: str | None, status: int | None) -> None:
        """Args:
        route: the path's template; None where no route matched.
        status: None where no response began.
        """


class Tracer(Protocol):
    """Measures parts of the request that runs, as spans of one trace."""

    @property
    def wants_texts(self) -> bool:
        """Whether spans may hold prompts and completions."""

    def begin(self, headers: Headers) -> "RequestSpan | None":
        """Begin the span of a request, which continues the trace that its headers name; None where there is none."""

    def span(self, name: str, /, attributes: Mapping[str, Any] = _NO_ATTRIBUTES) -> AbstractContextManager[None]:
        """Measure a block of the request that runs."""

    def batch_line(self, batch_id: str) -> AbstractContextManager[None]:
        """Begin a trace of its own for a line of a batch, which refers to the span of the batch."""

    def batch_ended(self, batch_id: str, created: float, attributes: Mapping[str, Any]) -> None:
        """Make the span of a batch.  Args: created: seconds of the Unix time."""

    def generation(
        self, name: str, samples: Sequence[GenerationRequest], end: Callable[[], GenerationOutcome]
    ) -> AbstractContextManager[None]:
        """Measure a generation while the context lasts, and its stages by the times that the engine noted.

        Args:
            name: of the model or adapter, as the client knows it.
            samples: the requests that the engine gets.
            end: is called once it has ended.
        """

    def trace_configs(self) -> "list[aiohttp.TraceConfig]":
        """Return what a client session is made with whose requests are spans, and tell its server of the trace."""

    def silence(self) -> AbstractContextManager[None]:
        """Make no spans of such requests in the block."""

    def close(self) -> None:
        """Send what is left, waiting a moment at most."""


_NOTHING = nullcontext()


class NoTracer:
    """Measures nothing."""

    wants_texts = False

    def begin(self, headers: Headers) -> RequestSpan | None:
        return None

    def span(self, name: str, /, attributes: Mapping[str, Any] = _NO_ATTRIBUTES) -> AbstractContextManager[None]:
        return _NOTHING

    def batch_line(self, batch_id: str) -> AbstractContextManager[None]:
        return _NOTHING

    def batch_ended(self, batch_id: str, created: float, attributes: Mapping[str, Any]) -> None:
        return

    def generation(
        self, name: str, samples: Sequence[GenerationRequest], end: Callable[[], GenerationOutcome]
    ) -> AbstractContextManager[None]:
        return _NOTHING

    def trace_configs(self) -> "list[aiohttp.TraceConfig]":
        return []

    def silence(self) -> AbstractContextManager[None]:
        return _NOTHING

    def close(self) -> None:
        return


NO_TRACER: Tracer = NoTracer()
