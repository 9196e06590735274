"""Two instances with the embedded model over one Redis and Postgres, behind a load balancer, while one is killed."""

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, RateLimitError

from tests.ports import NO_TLS
from tests.services.process import ROOT, ServiceProcess, serving
from tests.services.redis_server import RedisServer
from tests.services.round_robin import round_robin
from tests.waiting import START_SECONDS
from tests.web.access import ADMIN_KEY

SETTINGS = {
    "MODEL__ENGINE": "auto",
    "MODEL__NAME": str(ROOT / "models" / "tiny-chat"),
    "MODEL__SPARE_WORKER": "false",
    "MODEL__TEMPERATURE": "0",
    "MODEL__THREADS": "1",
    "RATE_LIMIT__ENABLED": "true",
    "RATE_LIMIT__BURST_SIZE": "20",
    "REDIS__REPLICAS": "2",
}
QUESTION = "What is the capital of France?"


@pytest.mark.soak
@pytest.mark.services
@pytest.mark.timeout(400)
async def test_clients_notice_nothing_but_a_retry_when_one_of_two_instances_is_killed(
    redis: RedisServer, postgres_url: str, tmp_path: Path
):
    """OpenAI's quick start, a conversation, a rate limit and a quota hold over both, and over the one that is left."""
    async with AsyncExitStack() as stack:
        instances: list[ServiceProcess] = []
        for name in "ab":
            folder = tmp_path / name
            folder.mkdir()
            # One after the other: the first makes the tables.
            service = serving(postgres_url, folder, prepare=None, REDIS__URL=redis.url, **SETTINGS)
            instances.append(await stack.enter_async_context(service))
        ports = [int(each.address.rpartition(":")[2]) for each in instances]
        address = await stack.enter_async_context(round_robin(ports))

        replies = await _quick_start(address, ADMIN_KEY, 4)
        await _chat(address, "My name is Tovin.")
        limited = await _new_key(address, {"requests_per_minute": 20})
        frugal = await _new_key(address, {"monthly_tokens": 1000})
        began = time.monotonic()
        before = await _admitted(address, limited, 12)
        used_before = await _tokens(address, frugal, 3)

        instances[0].kill()

        replies += await _quick_start(address, ADMIN_KEY, 4)
        remembered = await _chat(address, "What is my name?")
        after = await _admitted(address, limited, 30)
        refilled = (time.monotonic() - began) * 20 / 60
        used = used_before + await _tokens(address, frugal, 30)
        async with _client(address, frugal) as http:
            report = (await http.get("/v1/usage")).json()

    assert ["The capital of France is Paris."] * 8 == replies
    assert "Your name is Tovin." == remembered
    assert 12 == before
    assert 8 <= after <= 8 + refilled + 1
    assert used == report["used"] <= 1000
    assert report["used"] + 68 * 2 > 1000  # the next one would not have fitted


async def _quick_start(address: str, key: str, times: int) -> list[str | None]:
    """The README's question by OpenAI's client, each time over a new connection."""
    replies = []
    for _ in range(times):
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key=key) as client:
            completion = await client.chat.completions.create(
                model="tiny-chat", messages=[{"role": "user", "content": QUESTION}], temperature=0
            )
            replies.append(completion.choices[0].message.content)
    return replies


async def _chat(address: str, text: str) -> str:
    async with _client(address, ADMIN_KEY) as http:
        body = {"session_id": "s", "messages": [{"role": "user", "content": text}]}
        reply = await http.post("/v1/chat", json=body)
    assert 200 == reply.status_code, reply.text
    content: str = reply.json()["message"]["content"]
    return content


async def _new_key(address: str, limits: dict[str, int]) -> str:
    async with _client(address, ADMIN_KEY) as http:
        created = await http.post("/v1/keys", json={"limits": limits})
    assert 201 == created.status_code, created.text
    key: str = created.json()["key"]
    return key


async def _admitted(address: str, key: str, times: int) -> int:
    """Return how many of so many requests at once got an answer; the others must have been refused with 429."""

    async def status() -> int:
        async with _client(address, key) as http:
            body = {"prompt": "Once", "max_tokens": 1}
            return (await http.post("/v1/generate", json=body)).status_code

    statuses = await asyncio.gather(*(status() for _ in range(times)))
    assert set(statuses) <= {200, 429}
    return statuses.count(200)


async def _tokens(address: str, key: str, times: int) -> int:
    """Ask until the quota is used up, at most so often; return the tokens that the answers cost."""
    tokens = 0
    for number in range(times):
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
            try:
                completion = await client.chat.completions.create(
                    model="tiny-chat",
                    messages=[{"role": "user", "content": f"{number} + 1"}],
                    max_tokens=64,
                )
            except RateLimitError as refusal:
                if refusal.code != "insufficient_quota":
                    raise
                break
        assert completion.usage is not None
        tokens += completion.usage.total_tokens
    return tokens


def _client(address: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=address, headers={"X-API-Key": key}, timeout=START_SECONDS, verify=NO_TLS)
