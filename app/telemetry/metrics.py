"""Defines the Prometheus metrics, and bounds the cardinality of their labels whatever clients send.

Callers report what happened through the methods of `Metrics`; gauges of other objects are read by a function at a
scrape.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from http import HTTPStatus
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.telemetry.logs import dropped_lines
from app.telemetry.recent_rate import RecentRate

Direction = Literal["input", "output"]
Read = Callable[[], float]
"""Returns a figure at each scrape; must not block."""
ReadEach = Callable[[], Mapping[str, float]]
"""Returns a figure for each value of a label; must not block."""

METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
STATUSES = frozenset(map(int, HTTPStatus)) | {499}
MAX_ENDPOINTS = 128
"""Pairs of method and route template with series of their own: raw paths passed by mistake cannot fill the memory."""
UNMATCHED = "unmatched"
OTHER = "OTHER"

# vLLM's buckets for tokens and for whole requests; those below 0.3 s are for requests that need no model.
_TOKEN_SECONDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
_TOKEN_SECONDS += [20, 40, 80, 160, 640, 2560]
_REQUEST_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60]
_REQUEST_SECONDS += [120, 240, 480, 960, 1920, 7680]
_LAG_SECONDS = [0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5]


class _CounterFunction(Collector):
    """A counter whose value is read at each scrape, as `Gauge.set_function` does for gauges."""

    def __init__(self, name: str, text: str, read: Read) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class _GaugeFunction(Collector):
    """A gauge with one label, whose series are read at each scrape."""

    def __init__(self, name: str, text: str, label: str, read: ReadEach) -> None:
        self._name, self._text, self._label, self._read = name, text, label, read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauge = GaugeMetricFamily(self._name, self._text, labels=[self._label])
        for value, figure in self._read().items():
            gauge.add_metric([value], figure)
        yield gauge


Upstream = tuple[str, int, bool, int, int]
"""The model, the number of one of its servers, whether that gets requests, how many it has, and how many it failed."""


class _Upstreams(Collector):
    """The servers that engines send requests to, read at each scrape."""

    def __init__(self, read: Callable[[], Iterable[Upstream]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        labels = ["model", "upstream"]
        ready = GaugeMetricFamily("upstream_ready", "1 when a model's server gets requests", labels=labels)
        running = GaugeMetricFamily("upstream_requests_running", "Requests at a model's server now", labels=labels)
        failures = CounterMetricFamily("upstream_failures", "Requests that a model's server failed", labels=labels)
        for model, number, is_ready, requests, failed in self._read():
            ready.add_metric([model, str(number)], float(is_ready))
            running.add_metric([model, str(number)], requests)
            failures.add_metric([model, str(number)], failed)
        yield from (ready, running, failures)


def _value(counter: Counter) -> float:
    """Return what a counter without labels has counted."""
    (family,) = counter.collect()
    return float(family.samples[0].value)


class Metrics:
    """The application's Prometheus metrics, in a registry of their own; safe to call from any thread."""

    def __init__(self, models: Collection[str]) -> None:
        """Args: models: names that may become a label, looked up at each call; any other is counted as OTHER."""
        self._models = models
        self._endpoints: set[tuple[str, str]] = set()
        self._registry = registry = CollectorRegistry()
        registry.register(dropped_lines)

        # Looking up the child of a label set costs more than counting on it, and there are few sets.
        def counter(name: str, text: str, *labels: str) -> Callable[..., Counter]:
            return cache(Counter(name, text, labels, registry=registry).labels)

        def histogram(name: str, text: str, buckets: list[float], *labels: str) -> Callable[..., Histogram]:
            return cache(Histogram(name, text, labels, registry=registry, buckets=buckets).labels)

        def total(name: str, text: str) -> Counter:
            return Counter(name, text, registry=registry)

        self._http = counter("http_requests_total", "Requests answered", "method", "endpoint", "status")
        self._http_seconds = histogram(
            "http_request_duration_seconds", "Time to the last byte", _REQUEST_SECONDS, "method", "endpoint"
        )
        self._errors = counter("errors_total", "Requests answered with an error, by its code", "error")
        self._watch_totals()
        self._generated = counter("tokens_generated_total", "Tokens generated", "model")
        self._prompts = counter("prompt_tokens_total", "Tokens of prompts read", "model")
        self._cached = counter("prompt_tokens_cached_total", "Those of them that were in the KV cache already", "model")
        self._texts = counter("texts_embedded_total", "Texts embedded", "model")
        self._first = histogram("time_to_first_token_seconds", "Wait for the first token", _TOKEN_SECONDS, "model")
        self._gap = histogram("inter_token_latency_seconds", "Time between tokens", _TOKEN_SECONDS, "model")
        self._hits = total("cache_hits_total", "Answers from the response cache")
        self._misses = total("cache_misses_total", "Answers that the cache did not have")
        self._unreadable = total("cache_unreadable_total", "Stored answers that could not be read")
        self._pii = counter("pii_matches_total", "Personal data found", "kind", "direction")
        self._rate_limited = total("rate_limited_total", "Requests refused with 429")
        self._auth_failures = total("auth_failures_total", "Requests with a wrong or no API key")
        self._connections_open = Gauge("connections_open", "Connections that have a place", registry=registry)
        self._connections_closed = counter(
            "connections_closed_total", "Connections closed before their client was done", "reason"
        )
        self._rows_lost = total("usage_log_dropped_total", "Rows of the inference log lost to a slow database")
        self._lag = Histogram(
            "event_loop_lag_seconds",
            "How late the event loop runs its timers",
            registry=registry,
            buckets=_LAG_SECONDS,
        )

    def _watch_totals(self) -> None:
        """Export what dashboards of older services plot: figures of all requests together."""
        self._requests = Counter("api_requests_total", "Requests answered, all together", registry=self._registry)
        self._request_seconds = Counter("request_seconds", "Time of all requests together", registry=None)
        self._rate = RecentRate()
        mean = Gauge("api_request_duration_seconds", "Mean time of a request", registry=self._registry)
        mean.set_function(lambda: _value(self._request_seconds) / max(1.0, _value(self._requests)))
        rate = Gauge("tokens_per_second", "Tokens generated per second in the last minute", registry=self._registry)
        rate.set_function(self._rate.per_second)

    def watch(
        self,
        *,
        requests_running: Read,
        requests_waiting: Read,
        sessions: Read,
        model_loaded: Read,
        engine_restarts: Read,
        gpu_memory_bytes: Read = lambda: 0,
    ) -> None:
        """Export figures that other objects count; call it once."""
        for name, text, read in (
            ("requests_running", "Requests in the model now", requests_running),
            ("requests_waiting", "Requests waiting for the model", requests_waiting),
            ("sessions", "Chat sessions stored", sessions),
            ("model_loaded", "1 when the model can answer", model_loaded),
            ("gpu_memory_usage_bytes", "Memory that models took on a GPU when they were loaded", gpu_memory_bytes),
        ):
            Gauge(name, text, registry=self._registry).set_function(read)
        self._registry.register(
            _CounterFunction("engine_restarts", "Times a model's worker was replaced", engine_restarts)
        )

    def watch_upstreams(self, read: Callable[[], Iterable[Upstream]]) -> None:
        """Export the state of the servers that engines send requests to; call it once."""
        self._registry.register(_Upstreams(read))

    def watch_redis(self, *, away: Read) -> None:
        """Export whether Redis, and with it what all processes share, cannot be reached; call it once."""
        text = "1 while each process enforces its share of the rate limits alone, because Redis is away"
        Gauge("ratelimit_degraded", text, registry=self._registry).set_function(away)
        Gauge("redis_up", "1 while Redis answers", registry=self._registry).set_function(lambda: 1 - away())

    def watch_batches(self, batches: ReadEach, lines: ReadEach) -> None:
        """Export how many batches and lines there are, by their state; call it once."""
        for name, text, label, read in (
            ("batches", "Batches that the database holds, by status; the same in all replicas", "status", batches),
            ("batch_lines", "Lines of these batches, by state; the same in all replicas", "state", lines),
        ):
            self._registry.register(_GaugeFunction(name, text, label, read))

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

    def first_token(self, model: str, seconds: float) -> None:
        self._first(self._known_model(model)).observe(seconds)

    def token_gap(self, model: str, seconds: float) -> None:
        self._gap(self._known_model(model)).observe(seconds)

    def generated(self, model: str, prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0) -> None:
        """Args: cached_tokens: those of the prompt that did not have to be computed."""
        self._prompts(self._known_model(model)).inc(prompt_tokens)
        self._cached(self._known_model(model)).inc(cached_tokens)
        self._generated(self._known_model(model)).inc(completion_tokens)
        self._rate.add(completion_tokens)

    def embedded(self, model: str, tokens: int, texts: int) -> None:
        """Args: tokens: of all texts."""
        self._prompts(self._known_model(model)).inc(tokens)
        self._texts(self._known_model(model)).inc(texts)

    def pii(self, kind: str, direction: Direction, count: int = 1) -> None:
        """Args: kind: one of the filter's own names, never what was found."""
        self._pii(kind, direction).inc(count)

    def cache_hit(self) -> None:
        self._hits.inc()

    def cache_miss(self) -> None:
        self._misses.inc()

    def cache_unreadable(self) -> None:
        self._unreadable.inc()

    def rate_limited(self) -> None:
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
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _known_model(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _known_endpoint(self, method: str, template: str | None) -> tuple[str, str]:
        if template is None or method not in METHODS:
            return OTHER, UNMATCHED
        pair = method, template
        if pair not in self._endpoints and len(self._endpoints) >= MAX_ENDPOINTS:
            return OTHER, UNMATCHED
        self._endpoints.add(pair)
        return pair
