"""The application as `create_app` builds it, with the echo engine: what is wired to what."""

import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from app.config import load_settings
from app.errors import ConfigError
from app.main import create_app
from app.web.admin.health import Status

KEY = "application-key"
CANARY = "jane.doe@example.com"
Client = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """Start the application with some sections of its settings changed."""

    @asynccontextmanager
    async def client(**sections: dict[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
        given: dict[str, dict[str, Any]] = {
            "app": {"data_dir": tmp_path},
            "model": {"engine": "echo", "temperature": 0},
            "security": {"api_key": KEY},
            "rate_limit": {"enabled": False},
        }
        given |= {name: given.get(name, {}) | section for name, section in sections.items()}
        app = create_app(load_settings(tmp_path / "none.yml", None, **given))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", headers={"X-API-Key": KEY}) as http,
        ):
            yield http

    return client


def said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


async def test_what_the_model_says_is_filtered_whole_and_streamed_and_in_the_cache(client: Client) -> None:
    """With the input filter off the model sees an address and repeats it; nobody else does."""
    async with client(pii={"input": "off"}) as http:
        whole = (await http.post("/v1/chat", json=said(CANARY))).json()
        replayed = (await http.post("/v1/chat", json=said(CANARY))).json()
        streamed = (await http.post("/v1/generate", json={"prompt": f"mail {CANARY} now", "stream": True})).text
        metrics = (await http.get("/metrics")).text

    assert "[EMAIL]" == whole["message"]["content"] == replayed["message"]["content"]
    assert replayed["cached"]
    assert "jane" not in streamed
    contents = [json.loads(line[6:]).get("content", "") for line in streamed.splitlines() if line.startswith("data: ")]
    assert "mail [EMAIL] now" == "".join(contents)
    assert 'pii_matches_total{direction="output",kind="email"} 2.0' in metrics


async def test_log_probabilities_say_no_more_than_the_filtered_text(client: Client) -> None:
    """Whole, streamed, replayed and in a batch: those of the words before the address, and nothing behind."""
    body = {"prompt": f"mail {CANARY} now", "logprobs": 2, "n": 2}
    async with client(pii={"input": "off"}) as http:
        whole = await http.post("/v1/generate", json=body)
        replayed = await http.post("/v1/generate", json=body)
        streamed = await http.post("/v1/generate", json=body | {"stream": True})
        batch = await http.post("/v1/generate/batch", json={"prompts": [body["prompt"]], "logprobs": 2})
        chatted = await http.post("/v1/chat", json=said(f"mail {CANARY} now") | {"logprobs": 2})

    assert replayed.json()["cached"]
    completions = [*whole.json()["completions"], *replayed.json()["completions"], *chatted.json()["completions"]]
    completions += batch.json()["results"][0]["completions"]
    assert 6 == len(completions)
    for completion in completions:
        assert "mail [EMAIL] now" == completion["text"]
        assert "mail " == "".join(token["text"] for token in completion["tokens"])
        assert [1] * 5 == [len(token["top"]) for token in completion["tokens"]]
    deltas = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: ")][:-1]
    text = "".join(token["text"] for delta in deltas if delta["index"] == 1 for token in delta["tokens"])
    assert "mail " == text


async def test_several_answers_and_a_batch_go_through_the_one_service(client: Client) -> None:
    """Usage counts the prompt once; each prompt of a batch has its own answer, filtered and from the cache."""
    async with client(model={"engine": "echo", "temperature": 0, "max_model_len": 64}) as http:
        several = (await http.post("/v1/generate", json={"prompt": "hello", "n": 3, "max_tokens": 4})).json()
        prompts = ["hello", f"to {CANARY}", "x" * 100, "hello"]
        results = (await http.post("/v1/generate/batch", json={"prompts": prompts, "max_tokens": 9})).json()["results"]
        unknown = await http.post("/v1/generate", json={"prompt": "a", "logit_bias": {"9999999": 1}})
        reply = await http.get("/status")

    status = TypeAdapter(Status).validate_json(reply.content, strict=True, extra="forbid")
    assert [("hell", "length")] * 3 == [(each["text"], each["finish_reason"]) for each in several["completions"]]
    usage = {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert usage | {"prompt_tokens_details": {"cached_tokens": 0}} == several["usage"]
    assert ["hello", "to [EMAIL", None, "hello"] == [result.get("generated_text") for result in results]
    assert "context_length_exceeded" == results[2]["error"]["error"]
    assert 1 == [result.get("cached") for result in results].count(True)
    assert (400, "logit_bias") == (unknown.status_code, unknown.json()["details"]["errors"][0]["field"])
    assert status["engine"]
    assert (0, "ok") == (status["engine"]["running"], status["database"])


async def test_the_policy_to_block_refuses_with_400_and_names_the_kind(client: Client) -> None:
    """Nothing of the text is in the answer."""
    async with client(pii={"input": "block"}) as http:
        refused = await http.post("/v1/chat", json=said(f"mail {CANARY}"))

    assert (400, "pii_blocked", {"kinds": ["email"]}) == (
        refused.status_code,
        refused.json()["error"],
        refused.json()["details"],
    )
    assert "jane" not in refused.text


async def test_switched_off_filters_let_everything_through(client: Client) -> None:
    """`pii.enabled: false` is the operator's word."""
    async with client(pii={"enabled": False}) as http:
        assert CANARY == (await http.post("/v1/chat", json=said(CANARY))).json()["message"]["content"]


async def test_the_system_prompt_of_the_prompts_folder_stands_in_front_of_every_chat(
    client: Client, tmp_path: Path
) -> None:
    """Its tokens are counted into the prompt; {model_name} is filled in."""
    (tmp_path / "base_system.txt").write_text("I am {model_name}.")

    async with client(app={"data_dir": tmp_path, "prompts_dir": tmp_path}) as http:
        usage = (await http.post("/v1/chat", json=said("hi"))).json()["usage"]

    # The echo engine's tokens are characters, and one more for each message and for the answer's beginning.
    assert len("I am echo.") + len("hi") + 3 == usage["prompt_tokens"]


async def test_plain_prompts_stand_in_the_template_of_the_prompts_folder(client: Client, tmp_path: Path) -> None:
    """A folder without such a template, as folders were before there was one, leaves prompts as they are."""
    replies = []
    for template in (None, "Say {prompt} to {model_name}."):
        (tmp_path / "base_system.txt").write_text("I am {model_name}.")
        if template:
            (tmp_path / "completion.txt").write_text(template)
        async with client(app={"data_dir": tmp_path, "prompts_dir": tmp_path}) as http:
            replies.append((await http.post("/v1/generate", json={"prompt": "{prompt}"})).json())

    assert ["{prompt}", "Say {prompt} to echo."] == [reply["generated_text"] for reply in replies]
    assert ["{prompt}"] * 2 == [reply["prompt"] for reply in replies]


async def test_status_and_metrics_report_what_was_done(client: Client) -> None:
    """Tokens, times, cache, sessions and the engine, after one answer and its replay.

    Latencies are of deltas: one for each token of a stream, and two of a whole response, which is read at its end.
    """
    async with client() as http:
        for _ in range(2):
            await http.post("/v1/chat", json=said("hello") | {"session_id": "s"})
            await http.post("/v1/generate", json={"prompt": "hello", "stream": True})
        status = (await http.get("/status")).json()
        metrics = (await http.get("/metrics")).text

    assert ("ready", "cpu", 1) == (status["state"], status["model"]["device"], status["sessions"])
    assert {"hits": 1, "misses": 3} == {name: status["cache"][name] for name in ("hits", "misses")}
    assert status["uptime_seconds"] >= 0
    assert 0 == status["engine"]["waiting"]
    for line in (
        'tokens_generated_total{model="echo"} 15.0',
        'time_to_first_token_seconds_count{model="echo"} 3.0',
        'inter_token_latency_seconds_count{model="echo"} 6.0',
        'cache_hits_total{model="echo"} 1.0',
        'vllm:generation_tokens_total{engine="0",model_name="echo"} 15.0',
        'vllm:request_decode_time_seconds_count{engine="0",model_name="echo"} 3.0',
        'vllm:num_requests_waiting{engine="0",model_name="echo"} 0.0',
        "session_turns_total 2.0",
        "requests_waiting 0.0",
        "sessions 1.0",
        "model_loaded 1.0",
        'http_requests_total{endpoint="/v1/chat",method="POST",status="200"} 2.0',
    ):
        assert line in metrics


async def test_switched_off_parts_are_off(client: Client) -> None:
    """No cache, no session memory."""
    async with client(cache={"enabled": False}, chat_history={"enabled": False}) as http:
        answers = [(await http.post("/v1/generate", json={"prompt": "x"})).json()["cached"] for _ in range(2)]
        refused = await http.post("/v1/chat", json=said("hi") | {"session_id": "s"})

    assert [False, False] == answers
    assert 400 == refused.status_code


@pytest.mark.parametrize("name", ["models/tiny-caht", "tiny-caht", "elsewhere/../tiny-chat"])
def test_a_misspelt_folder_of_a_model_is_answered_with_the_one_that_comes_with_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where the service is started in a folder that has no models of its own, and where the root is left out."""
    monkeypatch.chdir(tmp_path)
    given = {"app": {"data_dir": tmp_path}, "security": {"api_key": KEY}, "model": {"name": name, "source": "local"}}

    with pytest.raises(ConfigError, match=rf"there is no folder {re.escape(name)}; is it models/tiny-chat\?"):
        create_app(load_settings(tmp_path / "none.yml", None, **given))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"pii": {"phone_regions": ["US", "XX"]}}, "pii.phone_regions: unknown phone region 'XX'"),
        ({"model": {"name": "/nowhere"}}, "model.name: there is no folder /nowhere"),
        ({"app": {"prompts_dir": "/nowhere"}}, "/nowhere/base_system.txt"),
        ({"embeddings": {"model": "/nowhere"}}, "embeddings.model: there is no folder /nowhere"),
        (
            {"embeddings": {"model": "models/tiny-chat"}},
            "embeddings.model: tiny-chat is the name of the chat model, too",
        ),
    ],
)
def test_files_and_names_that_do_not_exist_end_the_start(
    tmp_path: Path, section: dict[str, dict[str, Any]], message: str
) -> None:
    """Before anything runs, with the key and the reason."""
    given = {"app": {"data_dir": tmp_path}, "security": {"api_key": KEY}} | section

    with pytest.raises(ConfigError) as refused:
        create_app(load_settings(tmp_path / "none.yml", None, **given))

    assert message in str(refused.value)


async def test_a_start_that_is_refused_leaves_no_thread_of_the_database(tmp_path: Path):
    """One that outlived the loop wrote a traceback between the reason and the end."""
    (tmp_path / "service.db").write_text("This is no database, but as long as one. " * 1000)
    given: dict[str, Any] = {
        "app": {"data_dir": tmp_path},
        "model": {"engine": "echo"},
        "security": {"api_key": "x" * 20},
    }
    app = create_app(load_settings(tmp_path / "none.yml", None, **given))
    before = set(threading.enumerate())

    with pytest.raises(ConfigError, match="not a database"):
        await app.state.container.access.open()

    assert before >= set(threading.enumerate())
