"""Gauges of each model, read at every scrape: its queue, its KV cache slots, its worker, its upstream servers."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.core import Metric

from app.telemetry.model_metrics import ENGINE, MODELS, VLLM
from app.telemetry.registry import Family, Registry

TOTALS, UPSTREAMS = "All models together", "Other servers behind the service"
_LABELS = ("model_name", "engine")

_READY = Family("model_ready", "gauge", "1 while the model can answer", ("model",))
_ROWS = Family("kv_rows", "gauge", "Rows of the KV cache: requests that run at once", ("model",))
_ROWS_USED = Family("kv_rows_used", "gauge", "Those of them that a request has", ("model",))
_RESTARTS = Family("engine_restarts_total", "counter", "Times the model's worker was replaced", ("model",))
_WORKER = Family("worker_memory_bytes", "gauge", "Memory of the model's worker process", ("model",))
_RUNNING = Family("vllm:num_requests_running", "gauge", "Requests in the model now", _LABELS)
_WAITING = Family("vllm:num_requests_waiting", "gauge", "Requests waiting for the model", _LABELS)
_WAITING_FOR = Family(
    "vllm:num_requests_waiting_by_reason",
    "gauge",
    "The same by what they wait for, which here is always capacity: a place in the batch",
    (*_LABELS, "reason"),
)
_AWAKE = Family(
    "vllm:engine_sleep_state", "gauge", "1 for the state awake while the model can answer", (*_LABELS, "sleep_state")
)
_USAGE = Family("vllm:kv_cache_usage_perc", "gauge", "Share of the KV cache's rows in use, 0 to 1", _LABELS)
_LORA = Family(
    "vllm:lora_requests_info",
    "gauge",
    "Time of the scrape; its labels name the adapters of the requests in the model and in its queue",
    ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
)
_ALL_RUNNING = Family("requests_running", "gauge", "Requests in the models now")
_ALL_WAITING = Family("requests_waiting", "gauge", "Requests waiting for the models")
_GPU = Family("gpu_memory_usage_bytes", "gauge", "Memory that models took on a GPU when they were loaded")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """Where a model stands now."""

    model: str
    ready: bool
    running: int
    waiting: int
    restarts: int
    rows: int | None = None
    """Requests that its KV cache has room for at once; None where another server has it."""
    worker_bytes: int | None = None
    device_bytes: int = 0
    adapters_running: tuple[str, ...] = ()
    adapters_waiting: tuple[str, ...] = ()

    @property
    def rows_used(self) -> int:
        return min(self.running, self.rows or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamFigures:
    """Where a server stands that an engine sends requests to."""

    model: str
    number: int
    """Its place in the configuration, from 1."""
    ready: bool
    running: int
    failures: int


def watch_models(registry: Registry, read: Callable[[], Iterable[ModelFigures]], *, max_adapters: int) -> None:
    """Export the figures of all models.  Args: max_adapters: of all models, in memory at once."""

    def totals() -> Iterator[Metric]:
        figures = list(read())
        yield _ALL_RUNNING.with_figures([((), sum(each.running for each in figures))])
        yield _ALL_WAITING.with_figures([((), sum(each.waiting for each in figures))])
        yield _GPU.with_figures([((), sum(each.device_bytes for each in figures))])

    def each() -> Iterator[Metric]:
        figures = list(read())
        cached = [one for one in figures if one.rows is not None]
        yield _READY.with_figures(((one.model,), one.ready) for one in figures)
        yield _ROWS.with_figures(((one.model,), one.rows or 0) for one in cached)
        yield _ROWS_USED.with_figures(((one.model,), one.rows_used) for one in cached)
        yield _RESTARTS.with_figures(((one.model,), one.restarts) for one in figures)
        yield _WORKER.with_figures(((one.model,), one.worker_bytes) for one in figures if one.worker_bytes is not None)

    def vllm() -> Iterator[Metric]:
        figures = list(read())
        yield _RUNNING.with_figures(((one.model, ENGINE), one.running) for one in figures)
        yield _WAITING.with_figures(((one.model, ENGINE), one.waiting) for one in figures)
        yield _WAITING_FOR.with_figures(((one.model, ENGINE, "capacity"), one.waiting) for one in figures)
        yield _AWAKE.with_figures(((one.model, ENGINE, "awake"), one.ready) for one in figures)
        yield _USAGE.with_figures(((one.model, ENGINE), one.rows_used / one.rows) for one in figures if one.rows)
        running = sorted({name for one in figures for name in one.adapters_running})
        waiting = sorted({name for one in figures for name in one.adapters_waiting})
        yield _LORA.with_figures([((str(max_adapters), ",".join(waiting), ",".join(running)), time.time())])

    registry.read_all(TOTALS, [_ALL_RUNNING, _ALL_WAITING, _GPU], totals)
    registry.read_all(MODELS, [_READY, _ROWS, _ROWS_USED, _RESTARTS, _WORKER], each)
    registry.read_all(VLLM, [_RUNNING, _WAITING, _WAITING_FOR, _AWAKE, _USAGE, _LORA], vllm)


def watch_upstreams(registry: Registry, read: Callable[[], Iterable[UpstreamFigures]]) -> None:
    """Export the figures of the servers behind the service."""
    labels = ("model", "upstream")
    ready = Family("upstream_ready", "gauge", "1 when a model's server gets requests", labels)
    running = Family("upstream_requests_running", "gauge", "Requests at a model's server now", labels)
    failures = Family("upstream_failures_total", "counter", "Requests that a model's server failed", labels)

    def collect() -> Iterator[Metric]:
        figures = [((one.model, str(one.number)), one) for one in read()]
        yield ready.with_figures((values, one.ready) for values, one in figures)
        yield running.with_figures((values, one.running) for values, one in figures)
        yield failures.with_figures((values, one.failures) for values, one in figures)

    registry.read_all(UPSTREAMS, [ready, running, failures], collect)
