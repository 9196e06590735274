"""What the `openai` package makes of an answer that is not one: what it tries again, when, and what it raises."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest

from app.errors import AppError, EngineBusy, EngineFailed, RateLimited
from app.web.http.sse import EventStream
from tests.web.harness import CHAT, KEY, ScriptedService, Web, make_web


class QuotaUsedUp(AppError):
    """Stands for a quota's error: the code is all that matters."""

    status, code = 429, "quota_exceeded"


@asynccontextmanager
async def sdk(web: Web) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        web.listening() as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=2, timeout=10) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("refusal", "kind", "code", "attempts"),
    [
        (RateLimited("Slow down.", retry_after=0.5), openai.RateLimitError, "rate_limit_exceeded", 3),
        (EngineBusy("Full.", retry_after=0.5), openai.InternalServerError, "service_unavailable", 3),
        (QuotaUsedUp("Used up.", retry_after=3600), openai.RateLimitError, "insufficient_quota", 1),
    ],
)
async def test_what_may_succeed_later_is_tried_again_and_a_used_up_quota_is_not(refusal, kind, code, attempts):
    """The package reads Retry-After, and x-should-retry."""
    web = await make_web(ScriptedService(refusal=refusal))
    async with sdk(web) as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(model="scripted", **CHAT)

    assert code == raised.value.code
    assert attempts == len(web.service.requests)


async def test_a_retry_that_succeeds_is_all_that_the_program_sees():
    class BusyOnce(ScriptedService):
        async def generate(self, request, principal):
            if self.requests:
                self.refusal = None
            async for event in super().generate(request, principal):
                yield event

    web = await make_web(BusyOnce(refusal=EngineBusy("Full.", retry_after=0.5)))
    async with sdk(web) as client:
        answer = await client.chat.completions.create(model="scripted", **CHAT)

    assert ("Hello", 2) == (answer.choices[0].message.content, len(web.service.requests))


async def test_an_error_inside_a_stream_is_raised_with_its_message():
    """After the deltas that came before it, and once: a stream that has begun is never retried."""
    web = await make_web(ScriptedService(steps=["Hel", EngineFailed('The "engine" died.')]))
    contents = []

    async def read(client: openai.AsyncOpenAI) -> None:
        async with await client.chat.completions.create(model="scripted", **CHAT, stream=True) as stream:
            async for chunk in stream:
                contents.append(chunk.choices[0].delta.content)

    async with sdk(web) as client:
        with pytest.raises(openai.APIError, match='The "engine" died') as raised:
            await read(client)

    assert ["", "Hel"] == contents
    assert "service_unavailable" == raised.value.code
    assert 1 == len(web.service.requests)


async def test_comments_keep_a_slow_stream_alive_without_the_program_noticing(monkeypatch):
    """Comments between the frames keep the connection, and are no chunks."""
    monkeypatch.setitem(EventStream.__init__.__kwdefaults__, "ping_seconds", 0.05)
    web = await make_web(ScriptedService(steps=["a", 0.3, "b"]))
    async with sdk(web) as client:
        stream = await client.chat.completions.create(model="scripted", **CHAT, stream=True)
        contents = [chunk.choices[0].delta.content async for chunk in stream]
    async with web.client() as http:
        raw = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})

    assert ["", "a", "b", None] == contents
    assert raw.text.count(": keep-alive\n\n") >= 3
