"""Chats of a model that thinks, through the application as `create_app` builds it."""

from pathlib import Path
from typing import Any

import pytest

from app.engine.base import EngineInfo
from tests.unit.engine.parsing.conversations import chat_format
from tests.unit.engine.parsing.test_parsed_engine import FormatEngine
from tests.web.access import running

TEXTS = ("<think>\n", "Hm, kumquat.", "\n</think>\n\n", "Hello", " Ann", ".")
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def engine() -> FormatEngine:
    return FormatEngine(chat_format("hermes", "think"), *TEXTS)


@pytest.mark.parametrize("pii", ["mask", "off"])
@pytest.mark.parametrize("path", ["/v1/chat", "/v1/chat/completions"])
async def test_the_answer_of_a_chat_is_without_the_thoughts(tmp_path: Path, path: str, pii: str):
    """Whole and streamed, on both dialects' chat routes."""
    async with running(tmp_path, engine=engine(), pii={"output": pii}) as service, service.client() as http:
        for stream in (False, True):
            reply = await http.post(path, json={**CHAT, "stream": stream})

            assert 200 == reply.status_code, reply.text
            assert "think>" not in reply.text
            if not stream:
                assert "Hello Ann." == _content(reply.json())


async def test_a_plain_prompt_gets_what_the_model_writes(tmp_path: Path):
    """Only chats have a format."""
    async with running(tmp_path, engine=engine()) as service, service.client() as http:
        reply = await http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 20})

    assert "".join(TEXTS) == reply.json()["choices"][0]["text"]


async def test_the_format_is_part_of_the_models_description(tmp_path: Path):
    """/status shows what was found at load."""
    async with running(tmp_path, engine=engine()) as service, service.client() as http:
        model = (await http.get("/status")).json()["model"]

    assert ("hermes", "think") == (model["tool_format"], model["reasoning_format"])
    assert "chat_format" not in model
    assert EngineInfo(model="m", engine="echo", context_length=1).as_dict().keys() >= {"tool_format"}


def _content(reply: dict[str, Any]) -> str:
    message = reply["choices"][0]["message"] if "choices" in reply else reply["message"]
    content: str = message["content"]
    return content
