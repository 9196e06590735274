"""Defines the Prometheus metrics, and bounds the cardinality of their labels whatever clients send.

Callers report what happened through the methods of `Metrics`; figures of other objects are read by a function at a
scrape.  `scripts/metrics_page.py` makes their page from what is defined here.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from http import HTTPStatus
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, Counter, ProcessCollector
from prometheus_client.core import Metric

from app.telemetry.logs import dropped_lines
from app.telemetry.model_figures import TOTALS, ModelFigures, UpstreamFigures, watch_models, watch_upstreams
from app.telemetry.model_metrics import REQUEST_SECONDS, ModelFamilies, ModelMetrics
from app.telemetry.recent_rate import RecentRate
from app.telemetry.registry import Family, Read, Registry

Direction = Literal["input", "output"]
ReadEach = Callable[[], Mapping[str, float]]
"""Returns a figure for each value of a label; must not block."""

METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
STATUSES = frozenset(map(int, HTTPStatus)) | {499}
MAX_ENDPOINTS = 128
"""Pairs of method and route template with series of their own: raw paths passed by mistake cannot fill the memory."""
UNMATCHED = "unmatched"
OTHER = "OTHER"

HTTP, ACCESS, TEXTS, STORES, PROCESS = "HTTP", "Keys and limits", "Texts and sessions", "Stores and batches", "Process"

# vLLM's buckets for whole requests; those below 0.3 s are for requests that need no model.
_HTTP_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, *REQUEST_SECONDS]
_LAG_SECONDS = [0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5]
_PROCESS_FAMILIES = (
    Family("process_cpu_seconds_total", "counter", "Processor time of the API process"),
    Family("process_resident_memory_bytes", "gauge", "Memory of the API process"),
    Family("process_virtual_memory_bytes", "gauge", "Virtual memory of the API process"),
    Family("process_start_time_seconds", "gauge", "When the API process was started, as a Unix time"),
    Family("process_open_fds", "gauge", "Open files and connections of the API process"),
    Family("process_max_fds", "gauge", "How many of them it may have"),
)


def _value(counter: Counter) -> float:
    """Return what a counter without labels has counted."""
    (family,) = counter.collect()
    return float(family.samples[0].value)


class Metrics:
    """The application's Prometheus metrics, in a registry of their own; safe to call from any thread."""

    def __init__(self, models: Collection[str]) -> None:
        """Args: models: names that may become a label; any other is counted as OTHER until it is added."""
        self._models = set(models)
        self._endpoints: set[tuple[str, str]] = set()
        self._registry = Registry()
        self._rate = RecentRate()
        self._add_http(self._registry)
        self._families = ModelFamilies(self._registry, self._rate)
        self._add_access(self._registry)
        self._add_texts(self._registry)
        self._add_process(self._registry)

    @property
    def sections(self) -> Mapping[str, Collection[Family]]:
        """Return all metrics, by the sections of their page."""
        return self._registry.sections

    def _add_http(self, registry: Registry) -> None:
        requests = registry.counter(HTTP, "http_requests_total", "Requests answered", *("method", "endpoint", "status"))
        seconds = registry.histogram(
            HTTP, "http_request_duration_seconds", "Time to the last byte", _HTTP_SECONDS, "method", "endpoint"
        )
        errors = registry.counter(HTTP, "errors_total", "Requests answered with an error, by its code", "error")
        # Looking up the child of a label set costs more than counting on it, and there are few sets.
        self._http, self._http_seconds = cache(requests.labels), cache(seconds.labels)
        self._errors = cache(errors.labels)
        # What no route matches is counted here, and is there from the beginning.
        self._http_seconds(OTHER, UNMATCHED)
        self._connections_open = registry.gauge(HTTP, "connections_open", "Connections that have a place")
        closed = registry.counter(
            HTTP, "connections_closed_total", "Connections closed before their client was done", "reason"
        )
        self._connections_closed = cache(closed.labels)
        # What dashboards of older services plot: figures of all requests together.
        self._requests = registry.counter(HTTP, "api_requests_total", "Requests answered, all together")
        self._request_seconds = Counter("request_seconds", "Time of all requests together", registry=None)
        registry.read(
            HTTP,
            "api_request_duration_seconds",
            "Mean time of a request",
            lambda: _value(self._request_seconds) / max(1.0, _value(self._requests)),
        )

    def _add_access(self, registry: Registry) -> None:
        self._rate_limited = registry.counter(ACCESS, "rate_limited_total", "Requests refused for a rate limit")
        refusals = registry.counter(ACCESS, "limit_refusals_total", "Requests refused, by the limit reached", "limit")
        self._refusals = cache(refusals.labels)
        self._auth_failures = registry.counter(ACCESS, "auth_failures_total", "Requests with a wrong or no API key")
        self._rows_lost = registry.counter(
            ACCESS, "usage_log_dropped_total", "Rows of the inference log lost to a slow database"
        )

    def _add_texts(self, registry: Registry) -> None:
        found = registry.counter(TEXTS, "pii_matches_total", "Personal data found", "kind", "direction")
        self._pii = cache(found.labels)
        self._turns = registry.counter(TEXTS, "session_turns_total", "Turns stored in sessions")
        self._unreadable = registry.counter(TEXTS, "cache_unreadable_total", "Stored answers that could not be read")

    def _add_process(self, registry: Registry) -> None:
        self._lag = registry.histogram(
            PROCESS, "event_loop_lag_seconds", "How late the event loop runs its timers", _LAG_SECONDS
        )
        lost = Family("log_lines_dropped_total", "counter", "Log lines lost to a full queue or a failing sink")
        registry.register(PROCESS, dropped_lines, lost)
        registry.register(PROCESS, ProcessCollector(registry=None), *_PROCESS_FAMILIES)

    def model(self, name: str) -> ModelMetrics:
        """Return what counts for one model; whoever counts often holds it."""
        return self._families.of(name if name in self._models else OTHER)

    def add_model(self, name: str) -> None:
        """Give a model series of its own from now on.  Args: name: not a client's, but that of a load."""
        self._models.add(name)

    def forget_model(self, name: str) -> None:
        """Remove the series of a model that could not be loaded: names of failed loads are without bound."""
        self._models.discard(name)
        self._families.forget(name)

    def watch(
        self,
        *,
        models: Callable[[], Iterable[ModelFigures]],
        sessions: Read,
        model_loaded: Read,
        max_adapters: int = 0,
    ) -> None:
        """Export figures that other objects count; call it once."""
        registry = self._registry
        watch_models(registry, models, max_adapters=max_adapters)
        rate = "Tokens generated per second in the last minute"
        registry.read(TOTALS, "tokens_per_second", rate, self._rate.per_second)
        registry.read(TOTALS, "model_loaded", "1 when the default model can answer", model_loaded)
        registry.read(TEXTS, "sessions", "Chat sessions stored", sessions)

    def watch_upstreams(self, read: Callable[[], Iterable[UpstreamFigures]]) -> None:
        """Export the state of the servers that engines send requests to; call it once."""
        watch_upstreams(self._registry, read)

    def watch_redis(self, *, away: Read) -> None:
        """Export whether Redis, and with it what all processes share, cannot be reached; call it once."""
        text = "1 while each process enforces its share of the rate limits alone, because Redis is away"
        self._registry.read(STORES, "ratelimit_degraded", text, away)
        self._registry.read(STORES, "redis_up", "1 while Redis answers", lambda: 1 - away())

    def watch_batches(self, batches: ReadEach, lines: ReadEach) -> None:
        """Export how many batches and lines there are, by their state; call it once."""
        of_batches = Family("batches", "gauge", "Batches of the database; the same in all replicas", ("status",))
        of_lines = Family("batch_lines", "gauge", "Lines of these batches; the same in all replicas", ("state",))

        def collect() -> Iterable[Metric]:
            for family, read in ((of_batches, batches), (of_lines, lines)):
                yield family.with_figures(((value,), figure) for value, figure in read().items())

        self._registry.read_all(STORES, [of_batches, of_lines], collect)

    def watch_connections(self, open_connections: Read) -> None:
        """Export the number of open connections of a server."""
        self._connections_open.set_function(open_connections)

    def connection_closed(self, reason: str) -> None:
        """Args: reason: one of the server's own words, never what a client sent."""
        self._connections_closed(reason).inc()

    def http_done(
        self, method: str, endpoint: str | None, status: int, seconds: float, error: str | None = None
    ) -> None:
        """Args:
        endpoint: the route's template, None where no route matched; all of these share one series.
        error: the code of the error that was answered, one of the service's own.
        """
        method, endpoint = self._known_endpoint(method, endpoint)
        self._http(method, endpoint, str(status) if status in STATUSES else OTHER).inc()
        self._http_seconds(method, endpoint).observe(seconds)
        self._requests.inc()
        self._request_seconds.inc(seconds)
        if error is not None:
            self._errors(error).inc()

    def pii(self, kind: str, direction: Direction, count: int = 1) -> None:
        """Args: kind: one of the filter's own names, never what was found."""
        self._pii(kind, direction).inc(count)

    def turn_stored(self) -> None:
        self._turns.inc()

    def cache_unreadable(self) -> None:
        self._unreadable.inc()

    def limit_reached(self, limit: str) -> None:
        """Count a refused request.  Args: limit: the one that was reached, in the service's own words."""
        self._refusals(limit).inc()
        if limit != "quota":
            self._rate_limited.inc()

    def auth_failed(self) -> None:
        self._auth_failures.inc()

    def log_rows_dropped(self, count: int) -> None:
        self._rows_lost.inc(count)

    async def watch_event_loop(self, interval_seconds: float = 0.25) -> None:
        """Measure the lag of the running event loop until cancelled; the lifespan runs it in its task group."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + interval_seconds
            await asyncio.sleep(interval_seconds)
            self._lag.observe(max(0.0, loop.time() - due))

    def render(self) -> tuple[bytes, str]:
        """Return the body and the content type of a scrape."""
        return self._registry.render(), CONTENT_TYPE_LATEST

    def _known_endpoint(self, method: str, template: str | None) -> tuple[str, str]:
        if template is None or method not in METHODS:
            return OTHER, UNMATCHED
        pair = method, template
        if pair not in self._endpoints and len(self._endpoints) >= MAX_ENDPOINTS:
            return OTHER, UNMATCHED
        self._endpoints.add(pair)
        return pair
