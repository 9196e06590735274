"""Sends spans to a collector by OTLP over HTTP.

The SDK reads its own variables: OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_...
Spans of the service's own are written whole when they end, which takes a third of the time of those that the SDK begins
and ends; whether they are recorded is decided once, for the request around them.  A request that is not recorded costs
one question to the sampler, and each of its spans a look at a context variable.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from hashlib import sha256
from types import MappingProxyType, SimpleNamespace, TracebackType
from typing import Any

import aiohttp
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app import __version__
from app.errors import AppError
from app.requests import GenerationRequest
from app.telemetry.generation_attributes import ended, requested, stages
from app.telemetry.tracing import TRACE_PARENT, GenerationOutcome, Headers, RequestSpan

CLOSE_SECONDS = 3.0
"""How long a stop waits for the last spans to be sent."""
_SCOPE = InstrumentationScope("llm_service", __version__)
_OK, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_NOTHING = nullcontext()
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_CURRENT: ContextVar[SpanContext | None] = ContextVar("span_of_the_request", default=None)
"""The span of the request that runs, or its caller's where the trace is not recorded; None where there is no trace."""
_FIRST_REFUSAL = 400
"""The first status with which another server does not do what it is asked."""
_FIRST_FAULT = 500
"""The first status that is the service's fault."""


_Sent = aiohttp.TraceRequestEndParams | aiohttp.TraceRequestExceptionParams


class AtMost:
    """Lets so many traces begin in a second, so that what they cost is bounded, whatever comes."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._left, self._at = float(per_second), clock()

    def take(self) -> bool:
        """Return whether one more may begin now."""
        now = self._clock()
        self._left = min(self._per_second, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class OtlpTracer:
    """Makes spans and sends them in the background; lives as long as the application."""

    def __init__(self, endpoint: str, *, wants_texts: bool = False, per_second: int = 20) -> None:
        """Args:
        endpoint: of the collector, without the path of traces.
        per_second: traces that may begin here, where OTEL_TRACES_SAMPLER does not say which.
        """
        named = OTELResourceDetector().detect().attributes
        self._resource = Resource.create({"service.name": "llm-service", "service.version": __version__, **named})
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))
        self._ids = RandomIdGenerator()
        disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        # Without a sampler the provider reads OTEL_TRACES_SAMPLER.
        sampler = ALWAYS_OFF if disabled else None
        self.provider = TracerProvider(sampler, resource=self._resource, shutdown_on_exit=False)
        # What the caller's trace says of its own sampling holds in both cases.
        self._at_most = None if disabled or "OTEL_TRACES_SAMPLER" in os.environ else AtMost(per_second)
        self.provider.add_span_processor(self._processor)
        self.wants_texts = wants_texts
        if "OTEL_PROPAGATORS" not in os.environ:
            # Not the baggage: whatever a client puts into it would go to the servers behind the service.
            propagate.set_global_textmap(TraceContextTextMapPropagator())

    def begin(self, headers: Headers) -> RequestSpan | None:
        parent = _parent(headers)
        trace_id = self._sampled(parent)
        if trace_id is None:
            # The servers behind the service still learn of the caller's trace.
            return None if parent is None else _Request(self, parent, parent)
        return _Request(self, self._own(trace_id, parent.trace_state if parent else None), parent)

    def span(self, name: str, /, attributes: Mapping[str, Any] = MappingProxyType({})) -> AbstractContextManager[None]:
        parent = _current()
        return _NOTHING if parent is None else _Measured(self, name, parent, attributes)

    @contextmanager
    def batch_line(self, batch_id: str) -> Iterator[None]:
        trace_id = self._sampled(None)
        if trace_id is None:
            yield
            return
        own, began = self._own(trace_id), time.time_ns()
        token = _CURRENT.set(own)
        try:
            yield
        finally:
            _CURRENT.reset(token)
            links = [Link(_batch_context(batch_id))]
            attributes = {"llm_service.batch.id": batch_id}
            self.write_as(own, "batch line", None, began, time.time_ns(), attributes, links=links)

    def batch_ended(self, batch_id: str, created: float, attributes: Mapping[str, Any]) -> None:
        if self._sampled(None) is not None:
            described = {"llm_service.batch.id": batch_id, **attributes}
            began = round(1e9 * created)
            self.write_as(_batch_context(batch_id), "batch", None, began, time.time_ns(), described)

    @contextmanager
    def generation(
        self, name: str, samples: Sequence[GenerationRequest], end: Callable[[], GenerationOutcome]
    ) -> Iterator[None]:
        parent = _current()
        if parent is None:
            yield
            return
        began = time.time_ns()
        error: BaseException | None = None
        try:
            yield
        except BaseException as failure:
            error = failure
            raise
        finally:
            attributes = requested(name, samples) | ended(end())
            operation = attributes["gen_ai.operation.name"]
            span = self.write(f"{operation} {name}", parent, began, time.time_ns(), attributes, error)
            self._write_stages(span, samples)

    def write(
        self,
        name: str,
        parent: SpanContext,
        began: int,
        ended: int,
        attributes: Mapping[str, Any] = MappingProxyType({}),
        error: BaseException | None = None,
    ) -> SpanContext:
        """Record a span below another one, and return what its own children refer to.

        Args: began, ended: nanoseconds of the Unix time.
        """
        context = self.child_of(parent)
        # A client that hangs up is no error of the service, and no GeneratorExit one of anybody.
        if isinstance(error, Exception):
            kind = error.code if isinstance(error, AppError) else type(error).__name__
            attributes = {**attributes, "error.type": kind}
        self.write_as(context, name, parent, began, ended, attributes)
        return context

    def write_as(
        self,
        context: SpanContext,
        name: str,
        parent: SpanContext | None,
        began: int,
        ended: int,
        attributes: Mapping[str, Any],
        kind: SpanKind = SpanKind.INTERNAL,
        links: Sequence[Link] = (),
    ) -> None:
        """Record a span under its own ids."""
        self._processor.on_end(
            ReadableSpan(
                name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                links=links,
                kind=kind,
                status=_ERROR if "error.type" in attributes else _OK,
                start_time=began,
                end_time=ended,
                instrumentation_scope=_SCOPE,
            )
        )

    def trace_configs(self) -> list[aiohttp.TraceConfig]:
        return [_client_spans(self)]

    @contextmanager
    def silence(self) -> Iterator[None]:
        token = _CURRENT.set(None)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def close(self) -> None:
        # The SDK tries again and again where the collector is away, and a stop must not wait for that.
        closing = threading.Thread(target=self.provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    def child_of(self, parent: SpanContext) -> SpanContext:
        """Return the ids of a new span below another one."""
        return SpanContext(parent.trace_id, self._ids.generate_span_id(), False, parent.trace_flags, parent.trace_state)

    def _sampled(self, parent: SpanContext | None) -> int | None:
        """Return the id of the trace that a request belongs to; None where it is not recorded."""
        if self._at_most is not None:
            if parent is not None:
                return parent.trace_id if parent.trace_flags.sampled else None
            return self._ids.generate_trace_id() if self._at_most.take() else None
        trace_id = parent.trace_id if parent else self._ids.generate_trace_id()
        above = Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())
        result = self.provider.sampler.should_sample(above, trace_id, "request", SpanKind.SERVER)
        return trace_id if result.decision is Decision.RECORD_AND_SAMPLE else None

    def _own(self, trace_id: int, state: TraceState | None = None) -> SpanContext:
        return SpanContext(trace_id, self._ids.generate_span_id(), False, _SAMPLED, state)

    def _write_stages(self, parent: SpanContext, samples: Sequence[GenerationRequest]) -> None:
        since_boot = time.time_ns() - time.monotonic_ns()
        for sample in samples:
            times = sample.progress.times
            attributes = {"llm_service.sample": sample.sampling.sample} if len(samples) > 1 else {}
            for name, began, over, more in stages(times):
                if began is not None and over is not None:
                    first, last = (since_boot + round(1e9 * moment) for moment in (began, over))
                    self.write(name, parent, first, last, attributes | more)


def _client_spans(tracer: OtlpTracer) -> aiohttp.TraceConfig:
    """Return what makes a span of each request to another server, until its headers come, and sends the trace on."""

    async def begin(session: Any, state: SimpleNamespace, sent: aiohttp.TraceRequestStartParams) -> None:
        above, state.parent = _CURRENT.get(), _current()
        if above is not None:
            state.span, state.began = above if state.parent is None else tracer.child_of(above), time.time_ns()
            propagate.inject(sent.headers, trace.set_span_in_context(NonRecordingSpan(state.span)))

    def write(state: SimpleNamespace, sent: _Sent, more: Mapping[str, Any]) -> None:
        if state.parent is None:
            return
        address = {"server.address": sent.url.host or "", "server.port": sent.url.port or 0}
        attributes = {"http.request.method": sent.method, **address, **more}
        now = time.time_ns()
        tracer.write_as(state.span, sent.method, state.parent, state.began, now, attributes, SpanKind.CLIENT)

    async def end(session: Any, state: SimpleNamespace, sent: aiohttp.TraceRequestEndParams) -> None:
        status = sent.response.status
        failed = {"error.type": str(status)} if status >= _FIRST_REFUSAL else {}
        write(state, sent, {"http.response.status_code": status, **failed})

    async def fail(session: Any, state: SimpleNamespace, sent: aiohttp.TraceRequestExceptionParams) -> None:
        write(state, sent, {"error.type": type(sent.exception).__name__})

    config = aiohttp.TraceConfig()
    config.on_request_start.append(begin)
    config.on_request_end.append(end)
    config.on_request_exception.append(fail)
    return config


class _Request:
    """A request while it runs: what is measured of it, and sent on, belongs to its span."""

    def __init__(self, tracer: OtlpTracer, context: SpanContext, parent: SpanContext | None) -> None:
        """Args: context: its own span, or its caller's where nothing is recorded."""
        self._tracer, self._context, self._parent = tracer, context, parent
        self._began = time.time_ns()
        self._token = _CURRENT.set(context)

    @property
    def trace_id(self) -> str:
        return f"{self._context.trace_id:032x}"

    def end(self, method: str, route: str | None, status: int | None) -> None:
        _CURRENT.reset(self._token)
        if not self._context.trace_flags.sampled:
            return
        attributes: dict[str, Any] = {"http.request.method": method, "url.scheme": "http"}
        if route is not None:
            attributes["http.route"] = route
        if status is not None:
            attributes["http.response.status_code"] = status
            if status >= _FIRST_FAULT:
                attributes["error.type"] = str(status)
        name = method if route is None else f"{method} {route}"
        self._tracer.write_as(
            self._context, name, self._parent, self._began, time.time_ns(), attributes, SpanKind.SERVER
        )


class _Measured:
    """A block that becomes a span when it ends."""

    __slots__ = ("_attributes", "_began", "_name", "_parent", "_tracer")

    def __init__(self, tracer: OtlpTracer, name: str, parent: SpanContext, attributes: Mapping[str, Any]) -> None:
        self._tracer, self._name, self._parent, self._attributes = tracer, name, parent, attributes
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracer.write(self._name, self._parent, self._began, time.time_ns(), self._attributes, error)


def _parent(headers: Headers) -> SpanContext | None:
    """Return the span of the caller that a request belongs to."""
    given = [value for name, value in headers if name == b"traceparent"]
    found = TRACE_PARENT.fullmatch(given[0]) if len(given) == 1 else None
    if found is None:
        return None
    states = [value.decode("ascii", "replace") for name, value in headers if name == b"tracestate"]
    context = SpanContext(
        int(found[1], 16),
        int(found[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(found[3], 16) & TraceFlags.SAMPLED),
        trace_state=TraceState.from_header(states) if states else None,
    )
    return context if context.is_valid else None


def _current() -> SpanContext | None:
    """Return the span of the request that runs; None where it is not recorded."""
    context = _CURRENT.get()
    return context if context is not None and context.trace_flags.sampled else None


def _batch_context(batch_id: str) -> SpanContext:
    """Return the span of a batch: made of its id, so that every process that answers its lines refers to the same."""
    digest = sha256(batch_id.encode()).digest()
    return SpanContext(int.from_bytes(digest[:16]), int.from_bytes(digest[16:24]), False, _SAMPLED)
