"""Adapters of a running service: real files, a real worker, the embedded model."""

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import ROOT, Service, Start
from tests.unit.worker.lora_adapters import save_adapter
from tests.waiting import START_SECONDS, wait_for

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def adapted(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A service with the adapters `one` and `two`."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        save_adapter(AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny-chat"), root / name, seed=seed, r=4)
    service = start(ADAPTERS__ROOTS=f'["{root}"]', ADAPTERS__GRACE_SECONDS="0")
    for name in ("one", "two"):
        assert load(service, name).status_code == 200
    return service


def load(service: Service, name: str) -> httpx.Response:
    return service.client.post("/v1/adapters/load", json={"adapter_name": name, "source": name})


def complete(service: Service, model: str, **fields: Any) -> str:
    body = {"prompt": PROMPT, "model": model, "max_tokens": 16, "temperature": 0, "cache": False, **fields}
    reply = service.client.post("/v1/generate", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["generated_text"])


def test_requests_at_the_same_time_each_get_their_adapters_text(adapted: Service) -> None:
    """What one gets alone, it gets beside the others."""
    models = ["tiny-chat", "one", "two"]
    expected = [complete(adapted, model) for model in models]
    assert len(set(expected)) == 3

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda model: complete(adapted, model), models * 3))

    assert expected * 3 == found


def test_a_worker_that_died_has_its_adapters_again(adapted: Service) -> None:
    before = [complete(adapted, model) for model in ("one", "two")]
    adapted.worker().kill()
    wait_for(lambda: adapted.engine()["restarts"] > 0 and adapted.engine()["state"] == "ready", START_SECONDS)

    assert before == [complete(adapted, model) for model in ("one", "two")]


def test_an_unload_in_mid_stream_ends_the_stream_with_a_final_event(adapted: Service) -> None:
    """And the name is free for the next load."""
    before = complete(adapted, "one")
    body = {"prompt": PROMPT, "model": "one", "max_tokens": 1500, "temperature": 1, "stream": True}
    with adapted.client.stream("POST", "/v1/generate", json={**body, "ignore_eos": True}) as stream:
        lines = stream.iter_lines()
        assert any(line == "event: delta" for line in lines)
        assert adapted.client.post("/v1/adapters/unload", json={"adapter_name": "one"}).status_code == 200
        rest = list(lines)

    assert any(line in ("event: done", "event: error") for line in rest)
    assert adapted.client.post("/v1/generate", json={"prompt": PROMPT, "model": "one"}).status_code == 404
    assert load(adapted, "one").status_code == 200
    assert before == complete(adapted, "one")


def test_an_adapter_whose_files_changed_is_another_one(adapted: Service, tmp_path: Path) -> None:
    """Its cached responses, and what it left in the KV cache, are not used for it."""
    cached = {"cache": True}
    first = [complete(adapted, "two", **cached), complete(adapted, "two", **cached)]
    listed = {card["id"]: card for card in adapted.get("/v1/models").json()["data"]}
    assert (listed["two"]["parent"], listed["two"]["root"]) == ("tiny-chat", "two")
    adapted.client.post("/v1/adapters/unload", json={"adapter_name": "two"})
    assert adapted.client.post("/v1/adapters/load", json={"adapter_name": "two", "source": "one"}).status_code == 200

    assert first[0] == first[1] != complete(adapted, "two", **cached)
    assert complete(adapted, "two", **cached) == complete(adapted, "one")
