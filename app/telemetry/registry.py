"""Creates the metrics of one application, and knows of each what the page of metrics says."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Read = Callable[[], float]
"""Returns a figure at each scrape; must not block."""
Figures = Iterable[tuple[Sequence[str], float]]
"""The values of a metric's labels, and the figure that belongs to them."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with all its series."""

    name: str
    """As a query names it: a counter's ends with _total, a histogram's has _bucket, _sum or _count behind it."""
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def with_figures(self, figures: Figures) -> Metric:
        """Return what a scrape shows of a counter or a gauge."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = kind(self.name.removesuffix("_total"), self.text, labels=self.labels)
        for values, figure in figures:
            metric.add_metric(values, figure)
        return metric


class _AtScrape(Collector):
    """Metrics whose figures are read at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        yield from self._collect()


class Registry:
    """The metrics of one application, in the sections of their page; safe to call from any thread."""

    def __init__(self) -> None:
        self._inner = CollectorRegistry()
        self.sections: dict[str, list[Family]] = {}

    def counter(self, section: str, name: str, text: str, *labels: str) -> Counter:
        self._add(section, Family(name, "counter", text, labels))
        return Counter(name, text, labels, registry=self._inner)

    def gauge(self, section: str, name: str, text: str) -> Gauge:
        self._add(section, Family(name, "gauge", text))
        return Gauge(name, text, registry=self._inner)

    def histogram(self, section: str, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        self._add(section, Family(name, "histogram", text, labels, tuple(buckets)))
        return Histogram(name, text, labels, registry=self._inner, buckets=buckets)

    def read(self, section: str, name: str, text: str, read: Read) -> None:
        """Export a gauge whose figure is read at each scrape."""
        self.gauge(section, name, text).set_function(read)

    def read_all(self, section: str, families: Iterable[Family], collect: Callable[[], Iterable[Metric]]) -> None:
        """Export metrics that one function reads together at each scrape."""
        self._add(section, *families)
        self._inner.register(_AtScrape(collect))

    def register(self, section: str, collector: Collector, *families: Family) -> None:
        """Export what a collector of the library has.  Args: families: as the page describes it."""
        self._add(section, *families)
        self._inner.register(collector)

    def render(self) -> bytes:
        """Return the body of a scrape."""
        return generate_latest(self._inner)

    def _add(self, section: str, *families: Family) -> None:
        self.sections.setdefault(section, []).extend(families)
