"""The board and the alerts, by the real Prometheus that scrapes the real service."""

import json
import math
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from scripts.metrics_page import complete
from tests.services import prometheus_server
from tests.services.process import ROOT, serving
from tests.web.access import ADMIN_KEY

BOARD = ROOT / "deploy" / "grafana" / "dashboards" / "llm-service.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
_FUNCTIONS = {"label_replace", "histogram_quantile", "up"}


def needed(name: str) -> str:
    """Return the path of a program of Prometheus; its absence is a skip, or with REQUIRE_SERVICES a failure."""
    if (found := prometheus_server.program(name)) is not None:
        return found
    reason = f"there is no {name} on this machine (Debian: apt-get install prometheus)"
    if os.environ.get("REQUIRE_SERVICES"):
        pytest.fail(reason)
    pytest.skip(reason)


def expressions() -> dict[str, list[str]]:
    """Return the queries of each panel, with Grafana's variables filled in."""
    panels = [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]
    return {panel["title"]: [_filled(target["expr"]) for target in panel["targets"]] for panel in panels}


def _filled(expression: str) -> str:
    return expression.replace("$__rate_interval", "5s").replace("$model", ".*")


def unfilled(server: prometheus_server.PrometheusServer) -> list[str]:
    """Return the queries that show nothing now."""
    return [
        f"{title}: {query}"
        for title, queries in expressions().items()
        for query in queries
        if not any(math.isfinite(float(series["value"][1])) for series in server.query(query))
    ]


def send(http: httpx.Client, number: int) -> None:
    """Send some of everything: streams, sessions, personal data, repeated requests, mistakes."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": f"My mail is {number}@example.com."}]}
    http.post("/v1/chat", json=chat | {"max_tokens": 8, "session_id": f"s{number}"})
    for stream in (False, True, False):
        http.post("/v1/generate", json={"prompt": f"The number {number} is", "max_tokens": 8, "stream": stream})
    http.post("/v1/chat/completions", json={"model": "absent", **chat})
    http.get("/readyz", headers={"X-API-Key": "wrong-key-of-nobody"})
    http.get("/v1/models", headers={"X-API-Key": "wrong-key-of-nobody"})


@pytest.mark.services
async def test_every_panel_of_the_board_shows_something(tmp_path: Path) -> None:
    """Each query of each panel returns a figure after a few seconds of traffic."""
    prometheus = needed("prometheus")
    async with serving(
        None,
        tmp_path,
        MODEL__ENGINE="auto",
        MODEL__NAME=str(ROOT / "models" / "tiny-chat"),
        MODEL__THREADS="1",
        MODEL__COMPILE="none",
        MODEL__SPARE_WORKER="false",
        SECURITY__FAILED_KEYS_PER_MINUTE="1",
    ) as service:
        target = service.address.removeprefix("http://")
        with (
            prometheus_server.running(prometheus, target) as server,
            httpx.Client(base_url=service.address, headers={"X-API-Key": ADMIN_KEY}, timeout=30) as http,
        ):
            deadline, number = time.monotonic() + 60, 0
            while (missing := unfilled(server)) and time.monotonic() < deadline:
                for _ in range(3):
                    send(http, number := number + 1)

    assert [] == missing


@pytest.mark.services
def test_each_alert_fires_on_what_it_is_for_and_on_nothing_else() -> None:
    """promtool's own unit tests, deploy/prometheus/alerts_test.yml, which have a case for each."""
    done = subprocess.run(
        [needed("promtool"), "test", "rules", "alerts_test.yml"], cwd=RULES.parent, capture_output=True, text=True
    )
    tested = [rule["alertname"] for case in _cases() for rule in case["alert_rule_test"] if rule.get("exp_alerts")]

    assert 0 == done.returncode, done.stdout + done.stderr
    assert set(alerts()) == set(tested)


@pytest.mark.services
def test_the_configuration_of_prometheus_is_valid() -> None:
    done = subprocess.run(
        [needed("promtool"), "check", "config", "prometheus.yml"], cwd=RULES.parent, capture_output=True, text=True
    )

    assert 0 == done.returncode, done.stdout + done.stderr


def test_board_and_alerts_name_only_metrics_that_exist() -> None:
    """A metric that is renamed in the code cannot be forgotten here."""
    queries = [query for panel in expressions().values() for query in panel] + list(alerts().values())
    words = {word for query in queries for word in re.findall(r"(?:vllm:)?\b[a-z_]+\b", _bare(query))}
    named = {word.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for word in words}
    exported = {family.name for families in complete().sections.values() for family in families}

    assert {"http_requests_total", "kv_rows", "vllm:num_requests_waiting"} <= named & exported
    assert not {name for name in named - exported - _FUNCTIONS if "_" in name}


def test_what_vllms_boards_plot_of_an_engine_is_exported() -> None:
    """By its name: all of the board beside its Prometheus example, and what its newer ones add to that."""
    board = "e2e_request_latency_seconds prompt_tokens_total generation_tokens_total inter_token_latency_seconds "
    board += "num_requests_running num_requests_waiting time_to_first_token_seconds kv_cache_usage_perc "
    board += "request_prompt_tokens request_generation_tokens request_success_total request_queue_time_seconds "
    board += "request_prefill_time_seconds request_decode_time_seconds request_max_num_generation_tokens "
    newer = "engine_sleep_state num_requests_waiting_by_reason num_preemptions_total prompt_tokens_cached_total "
    newer += "prefix_cache_hits_total prefix_cache_queries_total"
    exported = {family.name for families in complete().sections.values() for family in families}

    assert set() == {f"vllm:{name}" for name in (board + newer).split()} - exported


def test_each_alert_is_explained() -> None:
    """docs/operations.md says what each of them means and what to do."""
    text = (ROOT / "docs" / "operations.md").read_text()

    assert [] == [name for name in alerts() if f"`{name}`" not in text]


def alerts() -> dict[str, str]:
    """Return the expression of each alert by its name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def _cases() -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load(RULES.with_name("alerts_test.yml").read_text())["tests"]


def _bare(query: str) -> str:
    """Return a query without its texts and label lists."""
    return re.sub(r'\{[^}]*\}|"[^"]*"|\b(?:by|on) \([^)]*\)', " ", query)
