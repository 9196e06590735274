"""Write docs/metrics.md from the metrics that the code defines: `python -m scripts.metrics_page > docs/metrics.md`."""

from collections.abc import Iterable

from app.telemetry import Metrics
from app.telemetry.registry import Family

HEADER = """\
# Metrics

What `GET /metrics` shows, in the format of Prometheus. Made from the code by `python -m scripts.metrics_page`, and not
to be edited. Board and alerts over these figures stand in [operations.md](operations.md#prometheus-and-grafana).

No label holds a key, a caller, a raw path or a text: `endpoint` is a route's template or `unmatched`, `method` one of
HTTP's, `model` the name of a model that is loaded or configured (`OTHER` for any other), and the rest are words of the
service itself. What starts with `vllm:` has the names, labels and buckets of vLLM, so that its dashboards show this
service, too; `engine` is always `0`. Each process counts for itself: with `app.workers` above 1 a scrape shows one of
them, so scrape replicas with one worker each.
"""


def complete() -> Metrics:
    """Return metrics as an application has them that uses everything."""
    metrics = Metrics([])
    metrics.watch(models=lambda: (), sessions=float, model_loaded=float)
    metrics.watch_upstreams(lambda: ())
    metrics.watch_redis(away=float)
    metrics.watch_batches(dict, dict)
    return metrics


def page(metrics: Metrics) -> str:
    """Return the whole page."""
    parts = [HEADER]
    for section, families in metrics.sections.items():
        parts.append(f"## {section}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n{_rows(families)}")
    return "\n".join(parts)


def _rows(families: Iterable[Family]) -> str:
    lines = []
    for each in families:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        buckets = f"; {len(each.buckets)} buckets up to {each.buckets[-1]:g}" if each.buckets else ""
        lines.append(f"| `{each.name}` | {each.kind} | {labels} | {each.text}{buckets} |\n")
    return "".join(lines)


if __name__ == "__main__":
    print(page(complete()), end="")
