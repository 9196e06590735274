"""POST /tokenize and /detokenize: vLLM's shapes, whose tokens they show, and what they cost."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.engine.base import PreparedPrompt
from app.requests import GenerationRequest
from app.types import Role
from tests.web.access import Running, running
from tests.web.harness import MODEL, RecordingEngine, make_web

CONTROL = 0x110000
USER, ASSISTANT = (CONTROL + list(Role).index(role) for role in (Role.USER, Role.ASSISTANT))
HI: list[dict[str, str]] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path, rate_limit={"requests_per_minute": 1, "burst_size": 1}) as service:
        yield service


async def post(service: Running, path: str, **body: Any) -> dict[str, Any]:
    async with service.client() as http:
        reply = await http.post(path, json=body)
    assert 200 == reply.status_code, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


async def test_a_text_becomes_tokens_and_a_text_again(service: Running):
    """However often: no request of the rate limit is taken, which is one here."""
    for _ in range(3):
        answer = await post(service, "/tokenize", prompt="h\u00e9", return_token_strs=True)
        assert {"count": 2, "max_model_len": 8192, "tokens": [104, 233], "token_strs": ["h", "\u00e9"]} == answer
        assert {"prompt": "h\u00e9"} == await post(service, "/detokenize", tokens=answer["tokens"])
    assert await post(service, "/tokenize", prompt="") == {
        "count": 0,
        "max_model_len": 8192,
        "tokens": [],
        "token_strs": None,
    }


async def test_a_chat_is_encoded_without_what_the_client_did_not_send(service: Running):
    """Neither the service's own system message nor the history of a session."""
    answer = await post(service, "/tokenize", messages=HI)
    assert [USER, 104, 105, ASSISTANT] == answer["tokens"]
    said = [*HI, {"role": "assistant", "content": "yo"}]
    answer = await post(service, "/tokenize", messages=said, continue_final_message=True, add_generation_prompt=False)
    assert [USER, 104, 105, ASSISTANT, 121, 111] == answer["tokens"]


async def test_tools_and_variables_of_the_template_are_part_of_a_chat():
    """As they are where it is answered; others are refused as they are there."""
    prepared: list[GenerationRequest] = []

    class ToolEngine(RecordingEngine):
        async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
            prepared.append(request)
            return await super().prepare(request)

    tool = {"type": "function", "function": {"name": "add"}}
    web = await make_web(engines={MODEL: ToolEngine(template_variables=("enable_thinking",))})
    async with web.client() as client:
        body = {"messages": HI, "tools": [tool], "chat_template_kwargs": {"enable_thinking": False}}
        assert 200 == (await client.post("/tokenize", json=body)).status_code
        refused = await client.post("/tokenize", json=body | {"chat_template_kwargs": {"speed": 1}})

    assert ["add"] == [each.name for each in prepared[0].tools]
    assert (("enable_thinking", False),) == prepared[0].template_kwargs
    assert (400, "chat_template_kwargs.speed") == (refused.status_code, refused.json()["error"]["param"])


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "x", "tools": []}, "messages"),
        ("/tokenize", {"prompt": "x", "messages": HI}, None),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HI, "continue_final_message": True}, "continue_final_message"),
        (
            "/tokenize",
            {"messages": HI, "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ("/detokenize", {"tokens": [CONTROL + 99]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_cannot_be_encoded_is_refused_by_name(
    service: Running, path: str, body: dict[str, Any], field: str | None
):
    """In OpenAI's envelope."""
    async with service.client() as http:
        reply = await http.post(path, json=body)
    assert (400, field) == (reply.status_code, reply.json()["error"]["param"])


async def test_only_a_known_caller_may_and_only_with_its_models(service: Running):
    """As for every other use of a model."""
    key = await service.key(role="free")
    async with service.client("nobody's") as stranger, service.client() as admin, service.client(key) as user:
        assert 401 == (await stranger.post("/tokenize", json={"prompt": "x"})).status_code
        assert 404 == (await user.post("/tokenize", json={"prompt": "x", "model": "none"})).status_code
        await admin.put("/v1/roles/free", json={"rights": {"models": ["another"]}})
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [104]})):
            assert 403 == (await user.post(path, json=body)).status_code


async def test_a_text_beyond_the_window_is_refused_as_too_long():
    """It is not encoded only to be counted."""

    class LongEngine(RecordingEngine):
        async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
            return PreparedPrompt(10_000, None, is_lower_bound=True)

    web = await make_web(engines={MODEL: LongEngine()})
    async with web.client() as client:
        reply = await client.post("/tokenize", json={"prompt": "word " * 1000})

    assert (400, "context_length_exceeded") == (reply.status_code, reply.json()["error"]["code"])
    assert "at least 10000" in reply.json()["error"]["message"]
