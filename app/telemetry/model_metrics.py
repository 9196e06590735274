"""The metrics of each model, under the service's names and under vLLM's, whose dashboards so show this service too.

Whoever counts holds a `ModelMetrics`, in which every series has been looked up once: counting a token costs no lookup.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

from prometheus_client import Counter, Histogram
from prometheus_client.core import Metric

from app.requests import Times
from app.telemetry.recent_rate import RecentRate
from app.telemetry.registry import Family, Registry

ENGINE = "0"
"""vLLM numbers the engines of one model; here each has one."""
MODELS, VLLM = "Models", "Models, under vLLM's names"
_LABELS = ("model_name", "engine")
_F = TypeVar("_F", Counter, Histogram)

# Source: vLLM's v1/metrics/buckets.py.  The times between tokens have finer ones, too, for what takes milliseconds.
_FIRST_SECONDS = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
_FIRST_SECONDS += [20, 40, 80, 160, 640, 2560]
_TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5]
_TOKEN_SECONDS += [5, 7.5, 10, 20, 40, 80]
REQUEST_SECONDS = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
_TOKENS = [mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5)]
_SAMPLES = [1, 2, 5, 10, 20]
_FILTER_SECONDS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5]


class ModelFamilies:
    """The metrics that have a model as their label."""

    def __init__(self, registry: Registry, rate: RecentRate) -> None:
        """Args: rate: of the tokens that all models generate."""
        self.rate = rate
        self._families: list[tuple[Counter | Histogram, str]] = []
        """Each with the label that a model is."""
        self._models: dict[str, ModelMetrics] = {}

        def counter(name: str, text: str) -> Counter:
            return self._own("model", registry.counter(MODELS, name, text, "model"))

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return self._own("model", registry.histogram(MODELS, name, text, buckets, "model", *labels))

        self.generated = counter("tokens_generated_total", "Tokens generated")
        self.prompts = counter("prompt_tokens_total", "Tokens of prompts read")
        self.cached = counter("prompt_tokens_cached_total", "Those of them that were in the KV cache already")
        self.texts = counter("texts_embedded_total", "Texts embedded")
        self.hits = counter("cache_hits_total", "Answers from the response cache")
        self.misses = counter("cache_misses_total", "Answers that the response cache did not have")
        self.first = histogram("time_to_first_token_seconds", "Wait for the first token", _FIRST_SECONDS)
        self.gap = histogram("inter_token_latency_seconds", "Time between tokens", _TOKEN_SECONDS)
        self.steps = histogram("model_step_seconds", "Time of a step of the model for all its requests", _TOKEN_SECONDS)
        filtered = "Time that the filter took for a request"
        self.filters = histogram("pii_filter_seconds", filtered, _FILTER_SECONDS, "direction")
        self._add_vllm(registry)

    def of(self, model: str) -> "ModelMetrics":
        """Return what counts for one model, always the same."""
        if (known := self._models.get(model)) is None:
            known = self._models[model] = ModelMetrics(self, model)
        return known

    def forget(self, model: str) -> None:
        """Remove the series of a model; what still counts for it is in no scrape."""
        if self._models.pop(model, None) is not None:
            for family, label in self._families:
                family.remove_by_labels({label: model})

    def _own(self, label: str, family: _F) -> _F:
        self._families.append((family, label))
        return family

    def _add_vllm(self, registry: Registry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return self._own(_LABELS[0], registry.counter(VLLM, f"vllm:{name}", text, *_LABELS, *labels))

        def histogram(name: str, text: str, buckets: Sequence[float] = REQUEST_SECONDS) -> Histogram:
            return self._own(_LABELS[0], registry.histogram(VLLM, f"vllm:{name}", text, buckets, *_LABELS))

        self.ended = counter("request_success_total", "Requests that ended, by how", "finished_reason")
        self.rejected = counter("admission_rejections_total", "Requests refused at a full queue", "reason")
        self.preempted = counter("num_preemptions_total", "Requests that lost their row of the KV cache for a while")
        self.total = histogram("e2e_request_latency_seconds", "Time of a request that was generated")
        self.queue = histogram("request_queue_time_seconds", "From when the engine takes a request until it begins")
        self.prefill = histogram("request_prefill_time_seconds", "From there until the first token")
        self.decode = histogram("request_decode_time_seconds", "From the first token until the last")
        self.inference = histogram("request_inference_time_seconds", "Prefill and decode together")
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time of a request's tokens after the first", _TOKEN_SECONDS
        )
        self.prompt_lengths = histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self.completion_lengths = histogram("request_generation_tokens", "Tokens generated for a request", _TOKENS)
        self.longest = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest sample of a request", _TOKENS
        )
        self.limits = histogram("request_params_max_tokens", "Tokens that a request allows", _TOKENS)
        self.samples = histogram("request_params_n", "Samples that a request asks for", _SAMPLES)
        copies = (
            ("prompt_tokens_total", self.prompts),
            ("generation_tokens_total", self.generated),
            ("prompt_tokens_cached_total", self.cached),
            ("prefix_cache_queries_total", self.prompts),
            ("prefix_cache_hits_total", self.cached),
            ("time_to_first_token_seconds", self.first),
            ("inter_token_latency_seconds", self.gap),
        )
        own = {family.name: family for family in registry.sections[MODELS]}
        renamed = [(name, source, own[_sample_name(source)]) for name, source in copies]
        registry.read_all(
            VLLM,
            [Family(f"vllm:{name}", of.kind, f"As `{of.name}`", _LABELS, of.buckets) for name, _, of in renamed],
            lambda: (_renamed(source, f"vllm:{name}", of.name) for name, source, of in renamed),
        )


class ModelMetrics:
    """What is counted of one model."""

    def __init__(self, families: ModelFamilies, model: str) -> None:
        """Args: model: the label, one of a bounded set."""
        vllm = (model, ENGINE)
        self.first_token: Callable[[float], None] = families.first.labels(model).observe
        self.token_gap: Callable[[float], None] = families.gap.labels(model).observe
        self.step: Callable[[float], None] = families.steps.labels(model).observe
        self.preempted: Callable[[float], None] = families.preempted.labels(*vllm).inc
        self.cache_hit: Callable[[], None] = families.hits.labels(model).inc
        self.cache_miss: Callable[[], None] = families.misses.labels(model).inc
        self.input_filtered: Callable[[float], None] = families.filters.labels(model, "input").observe
        self._output_filtered = families.filters.labels(model, "output").observe
        self._rate = families.rate
        self._prompts, self._cached = families.prompts.labels(model), families.cached.labels(model)
        self._generated, self._texts = families.generated.labels(model), families.texts.labels(model)
        self._queue, self._prefill = families.queue.labels(*vllm), families.prefill.labels(*vllm)
        self._decode, self._inference = families.decode.labels(*vllm), families.inference.labels(*vllm)
        self._total, self._per_token = families.total.labels(*vllm), families.per_token.labels(*vllm)
        self._prompt_lengths = families.prompt_lengths.labels(*vllm)
        self._completion_lengths = families.completion_lengths.labels(*vllm)
        self._longest = families.longest.labels(*vllm)
        self._limits, self._samples = families.limits.labels(*vllm), families.samples.labels(*vllm)
        self._ended = cache(lambda reason: families.ended.labels(*vllm, reason))
        self._rejected = cache(lambda reason: families.rejected.labels(*vllm, reason))

    def generated(self, prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0) -> None:
        """Args: cached_tokens: those of the prompt that did not have to be computed."""
        self._prompts.inc(prompt_tokens)
        self._cached.inc(cached_tokens)
        self._generated.inc(completion_tokens)
        self._rate.add(completion_tokens)

    def embedded(self, tokens: int, texts: int) -> None:
        """Args: tokens: of all texts."""
        self._prompts.inc(tokens)
        self._texts.inc(texts)

    def requested(self, prompt_tokens: int, *, max_tokens: int, samples: int) -> None:
        """Count what a request asks for."""
        self._prompt_lengths.observe(prompt_tokens)
        self._limits.observe(max_tokens)
        self._samples.observe(samples)

    def request_done(self, seconds: float, longest: int) -> None:
        """Count a request of which the model generated at least a part.  Args: longest: tokens of a sample."""
        self._total.observe(seconds)
        self._longest.observe(longest)

    def sample_done(self, reason: str, tokens: int, times: Times) -> None:
        """Count a sample that the model generated.  Args: reason: one of the service's own words for how it ended."""
        self._ended(reason).inc()
        self._completion_lengths.observe(tokens)
        if times.filter_seconds:
            self._output_filtered(times.filter_seconds)
        if times.accepted is None or times.began is None:
            return
        self._queue.observe(times.began - times.accepted)
        if times.first_token is None or times.ended is None:
            return
        decode = times.ended - times.first_token
        self._prefill.observe(times.first_token - times.began)
        self._decode.observe(decode)
        self._inference.observe(times.ended - times.began)
        if tokens > 1:
            self._per_token.observe(decode / (tokens - 1))

    def rejected(self, reason: str) -> None:
        """Args: reason: one of the service's own words."""
        self._rejected(reason).inc()


def _sample_name(source: Counter | Histogram) -> str:
    (metric,) = source.collect()
    return f"{metric.name}_total" if metric.type == "counter" else metric.name


def _renamed(source: Counter | Histogram, name: str, own: str) -> Metric:
    """Return what a scrape shows of a metric, under another name and with vLLM's labels."""
    (metric,) = source.collect()
    renamed = Metric(name.removesuffix("_total"), f"As {own}", metric.type)
    for sample in metric.samples:
        if sample.name.endswith("_created"):
            continue
        labels = {"model_name": sample.labels["model"], "engine": ENGINE}
        labels |= {key: value for key, value in sample.labels.items() if key != "model"}
        renamed.add_sample(name + sample.name.removeprefix(own), labels, sample.value)
    return renamed
