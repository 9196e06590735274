"""Sends spans to a collector by OTLP over HTTP, with the names of OpenTelemetry's conventions for GenAI.

The SDK reads its own variables: OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_...
Spans of the service's own are written whole when they end, which takes a third of the time of those that the SDK begins
and ends; whether they are recorded is decided by the span of the request around them.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType, SimpleNamespace, TracebackType
from typing import Any

import aiohttp
from opentelemetry import propagate, trace
from opentelemetry.context import Context, attach, create_key, detach, get_value, set_value
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
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
from opentelemetry.util.types import Attributes

from app import __version__
from app.errors import AppError
from app.requests import GenerationRequest, Times
from app.telemetry.tracing import TRACE_PARENT, GenerationOutcome, Headers, RequestSpan

CLOSE_SECONDS = 3.0
"""How long a stop waits for the last spans to be sent."""
_SCOPE = InstrumentationScope("llm_service", __version__)
_OK, _ERROR = Status(StatusCode.UNSET), Status(StatusCode.ERROR)
_NOTHING = nullcontext()
_SILENT = create_key("no spans of requests to other servers")
_FIRST_REFUSAL = 400
"""The first status with which another server does not do what it is asked."""
_FIRST_FAULT = 500
"""The first status that is the service's fault."""


_Sent = aiohttp.TraceRequestEndParams | aiohttp.TraceRequestExceptionParams


class AtMost(Sampler):
    """Begins so many traces a second, so that what a trace costs is bounded, whatever comes."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._left, self._at = float(per_second), clock()

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        now = self._clock()
        self._left = min(self._per_second, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return SamplingResult(Decision.DROP)
        self._left -= 1
        return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes)

    def get_description(self) -> str:
        return f"AtMost({self._per_second} per second)"


class OtlpTracer:
    """Makes spans and sends them in the background; lives as long as the application."""

    def __init__(self, endpoint: str, *, wants_texts: bool = False, per_second: int = 50) -> None:
        """Args:
        endpoint: of the collector, without the path of traces.
        per_second: traces that may begin here, where OTEL_TRACES_SAMPLER does not say which.
        """
        named = OTELResourceDetector().detect().attributes
        self._resource = Resource.create({"service.name": "llm-service", "service.version": __version__, **named})
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))
        self._ids = RandomIdGenerator()
        # None reads OTEL_TRACES_SAMPLER.  What the caller's trace says of its own sampling holds in both cases.
        sampler: Sampler | None = None if "OTEL_TRACES_SAMPLER" in os.environ else ParentBased(AtMost(per_second))
        if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            sampler = ALWAYS_OFF
        self.provider = TracerProvider(sampler, resource=self._resource, shutdown_on_exit=False)
        self.provider.add_span_processor(self._processor)
        self.wants_texts = wants_texts
        if "OTEL_PROPAGATORS" not in os.environ:
            # Not the baggage: whatever a client puts into it would go to the servers behind the service.
            propagate.set_global_textmap(TraceContextTextMapPropagator())

    def begin(self, headers: Headers) -> RequestSpan:
        parent = _parent(headers)
        trace_id = parent.trace_id if parent else self._ids.generate_trace_id()
        above = Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())
        result = self.provider.sampler.should_sample(above, trace_id, "request", SpanKind.SERVER)
        sampled = result.decision is Decision.RECORD_AND_SAMPLE
        state = parent.trace_state if parent else None
        own = SpanContext(trace_id, self._ids.generate_span_id(), False, TraceFlags(int(sampled)), state)
        return _Request(self, own, parent)

    def span(self, name: str, /) -> AbstractContextManager[None]:
        parent = _current()
        return _NOTHING if parent is None else _Measured(self, name, parent)

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
            attributes = _requested(name, samples) | _ended(end())
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
    ) -> None:
        """Record a span under its own ids."""
        self._processor.on_end(
            ReadableSpan(
                name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
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
        token = attach(set_value(_SILENT, True))
        try:
            yield
        finally:
            detach(token)

    def close(self) -> None:
        # The SDK tries again and again where the collector is away, and a stop must not wait for that.
        closing = threading.Thread(target=self.provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    def child_of(self, parent: SpanContext) -> SpanContext:
        """Return the ids of a new span below another one."""
        return SpanContext(parent.trace_id, self._ids.generate_span_id(), False, parent.trace_flags, parent.trace_state)

    def _write_stages(self, parent: SpanContext, samples: Sequence[GenerationRequest]) -> None:
        since_boot = time.time_ns() - time.monotonic_ns()
        for sample in samples:
            times = sample.progress.times
            attributes = {"llm_service.sample": sample.sampling.sample} if len(samples) > 1 else {}
            for name, began, ended, more in _stages(times):
                if began is not None and ended is not None:
                    first, last = (since_boot + round(1e9 * moment) for moment in (began, ended))
                    self.write(name, parent, first, last, attributes | more)


def _client_spans(tracer: OtlpTracer) -> aiohttp.TraceConfig:
    """Return what makes a span of each request to another server, until its headers come, and sends the trace on."""

    async def begin(session: Any, state: SimpleNamespace, sent: aiohttp.TraceRequestStartParams) -> None:
        state.parent = None if get_value(_SILENT) else _current()
        if state.parent is not None:
            state.span, state.began = tracer.child_of(state.parent), time.time_ns()
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
        self._tracer, self._context, self._parent = tracer, context, parent
        self._began = time.time_ns()
        self._token = attach(trace.set_span_in_context(NonRecordingSpan(context)))

    @property
    def trace_id(self) -> str:
        return f"{self._context.trace_id:032x}"

    def end(self, method: str, route: str | None, status: int | None) -> None:
        detach(self._token)
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

    __slots__ = ("_began", "_name", "_parent", "_tracer")

    def __init__(self, tracer: OtlpTracer, name: str, parent: SpanContext) -> None:
        self._tracer, self._name, self._parent = tracer, name, parent
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.time_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracer.write(self._name, self._parent, self._began, time.time_ns(), error=error)


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
    context = trace.get_current_span().get_span_context()
    return context if context is not INVALID_SPAN_CONTEXT and context.trace_flags.sampled else None


def _stages(times: Times) -> Iterator[tuple[str, float | None, float | None, dict[str, float]]]:
    yield "queue", times.accepted, times.began, {}
    yield "prefill", times.began, times.first_token, {}
    yield "decode", times.first_token, times.ended, {}
    if times.filter_seconds:
        # It works on each piece of the text as it comes.
        yield "pii out", times.first_token, times.ended, {"llm_service.pii.seconds": times.filter_seconds}


def _requested(name: str, samples: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Return what the conventions have for a request."""
    request = samples[0]
    params = request.sampling
    return {
        "gen_ai.operation.name": "chat" if request.is_chat else "text_completion",
        "gen_ai.provider.name": "llm_service",
        "gen_ai.request.model": name,
        "gen_ai.response.model": name,
        "gen_ai.response.id": request.id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.stream": request.stream,
        **({"gen_ai.request.choice.count": len(samples)} if len(samples) > 1 else {}),
        **({} if params.seed is None else {"gen_ai.request.seed": params.seed}),
    }


def _ended(outcome: GenerationOutcome) -> dict[str, Any]:
    """Return what the conventions have for the end of a request."""
    texts = {"gen_ai.input.messages": outcome.input, "gen_ai.output.messages": outcome.output}
    return {
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.completion_tokens,
        "gen_ai.response.finish_reasons": [reason.value for reason in outcome.reasons],
        **{name: text for name, text in texts.items() if text is not None},
    }
