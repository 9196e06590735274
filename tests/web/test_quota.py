"""Quotas, token rates and parallel requests through the whole application: what is refused, and what things cost."""

import asyncio
import math
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.access import usage_log
from app.access.database import WAIT_SECONDS
from app.engine.base import PreparedPrompt
from app.engine.echo import EchoEngine
from app.events import Delta
from app.requests import GenerationRequest
from app.types import EngineState
from tests.waiting import HANG_SECONDS, until
from tests.web.access import ADMIN_KEY, Running, running
from tests.web.harness import frames

BODY = {"prompt": "hello", "max_tokens": 5, "cache": False}
"""Ten tokens: the echo engine's are characters."""


class PreparingEngine(EchoEngine):
    """Counts the prompts that are prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared = 0

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        self.prepared += 1
        return await super().prepare(request)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Running]:
    async with running(tmp_path) as service:
        yield service


async def used(service: Running, key: str) -> tuple[int, int]:
    report = await service.usage(key)
    return report["used"], report["reserved"]


async def counted(service: Running, key: str, tokens: int) -> None:
    """Wait until the log has been written."""
    async with asyncio.timeout(HANG_SECONDS):
        while await used(service, key) != (tokens, 0):  # noqa: ASYNC110  # another task's work has no event
            await asyncio.sleep(0.01)


async def test_a_request_beyond_the_months_quota_is_refused_with_the_figures(service: Running):
    """429 quota_exceeded, told apart from a rate limit, with the time until the new month."""
    key = await service.key(limits={"monthly_tokens": 19})

    first, second = await service.generate(key), await service.generate(key)
    fits = await service.generate(key, max_tokens=4)

    assert [200, 429, 200] == [first.status_code, second.status_code, fits.status_code]
    error = second.json()
    assert "quota_exceeded" == error["error"]
    assert {"limit": 19, "used": 10, "reserved": 0, "requested": 10} == {
        name: error["details"][name] for name in ("limit", "used", "reserved", "requested")
    }
    assert error["details"]["resets"].endswith("-01T00:00:00Z")
    assert 0 < int(second.headers["retry-after"]) <= 31 * 86_400
    assert (19, 0) == await used(service, key)


async def test_what_was_reserved_and_not_used_is_given_back(service: Running):
    """An answer that ends early costs its own tokens only, with several answers for each."""
    key = await service.key(limits={"monthly_tokens": 1000})
    await service.generate(key, max_tokens=100, n=3)

    assert (5 + 3 * 5, 0) == await used(service, key)


async def test_a_stream_costs_what_it_sent(service: Running):
    key = await service.key(limits={"monthly_tokens": 1000})
    async with service.client(key) as http:
        reply = await http.post("/v1/chat", json={"messages": [{"role": "user", "content": "hi"}], "stream": True})
    total = int(frames(reply.text)[-1][1].split('"total_tokens":')[1].split(",")[0])

    assert (total, 0) == await used(service, key)


async def test_an_answer_from_the_cache_costs_nothing_by_default(service: Running):
    key = await service.key(limits={"monthly_tokens": 1000})
    replies = [await service.generate(key, cache=True) for _ in range(3)]

    assert [False, True, True] == [reply.json()["cached"] for reply in replies]
    assert (10, 0) == await used(service, key)


async def test_an_answer_from_the_cache_costs_what_is_configured(tmp_path: Path):
    """As a share of the prompt's tokens and of its own."""
    async with running(tmp_path, quota={"cached_prompt": 1, "cached_completion": 0.5}) as service:
        key = await service.key(limits={"monthly_tokens": 1000})
        for _ in range(2):
            await service.generate(key, cache=True)

        assert (10 + 8, 0) == await used(service, key)


async def test_a_cancelled_answer_costs_what_was_generated_until_then(tmp_path: Path):
    """The client goes in the middle; nothing stays reserved."""
    async with running(tmp_path, engine=EchoEngine(token_delay_seconds=0.02)) as service:
        key = await service.key(limits={"monthly_tokens": 1000})
        caller = await service.access.authenticator.authenticate(key.encode())
        assert caller is not None
        request = GenerationRequest(
            id="r", tenant=caller.tenant, text="one word " * 20, unset=frozenset(["max_tokens"]), cache=False
        )
        async with aclosing(service.container.service.generate(request, caller)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    break

        found, reserved = await used(service, key)
        assert 0 == reserved
        assert 181 <= found < 300


@pytest.mark.parametrize(("n", "persistent"), [(1, False), (3, False), (1, True)])
@pytest.mark.parametrize("share", [0, 0.5])
async def test_a_shared_answer_is_paid_once_by_those_who_received_it(
    tmp_path: Path, n: int, persistent: bool, share: float
):
    """One key begins it and hangs up, the other joins and receives all: every token is charged, and no token twice."""
    prompt = "one word " * 10
    async with running(
        tmp_path,
        engine=EchoEngine(token_delay_seconds=0.01),
        cache={"persistent": persistent},
        quota={"cached_completion": share},
    ) as service:
        starts, joins = [await service.key(owner="both", limits={"monthly_tokens": 10_000}) for _ in range(2)]
        caller = await service.access.authenticator.authenticate(starts.encode())
        assert caller is not None
        unset = frozenset(["max_tokens", "temperature"])
        request = GenerationRequest(id="r", tenant=caller.tenant, text=prompt, unset=unset, n=n)
        fields = {"prompt": prompt, "max_tokens": None, "cache": True, "stream": True, "n": n}
        async with aclosing(service.container.service.generate(request, caller)) as events:
            joining = asyncio.create_task(service.generate(joins, **fields))
            deltas = 0
            async for event in events:
                deltas += isinstance(event, Delta)
                if deltas == 4 * n:
                    break
        assert "done" == frames((await joining).text)[-1][0]

        (first, _), (second, _) = await used(service, starts), await used(service, joins)
        own = second - math.ceil(share * (first - len(prompt)))
        assert len(prompt) + n * len(prompt) == first + own
        assert len(prompt) < first < len(prompt) + n * len(prompt) * 3 // 4


async def test_a_failed_answer_frees_its_reservation(tmp_path: Path):
    """An engine that takes nothing: 503, and the month is as it was."""
    engine = EchoEngine(max_running=0)
    async with running(tmp_path, engine=engine) as service:
        assert EngineState.READY is engine.status().state
        key = await service.key(limits={"monthly_tokens": 1000})

        assert 503 == (await service.generate(key)).status_code
        assert (0, 0) == await used(service, key)


async def test_many_at_once_never_overdraw_and_all_reservations_end(service: Running):
    """Fifty at once on a budget for ten."""
    key = await service.key(limits={"monthly_tokens": 100})
    replies = await asyncio.gather(*(service.generate(key) for _ in range(50)))

    assert {200, 429} == {reply.status_code for reply in replies}
    assert (100, 0) == await used(service, key)
    assert 10 == sum(reply.status_code == 200 for reply in replies)


async def test_keys_without_a_quota_are_counted_too(service: Running):
    """Behind the request's back, at the latest with the next flush of the log."""
    await service.generate(ADMIN_KEY)
    await counted(service, ADMIN_KEY, 10)


@pytest.mark.parametrize("path", ["/v1/generate/batch", "/v1/completions"])
async def test_a_prompt_of_a_batch_is_one_request_however_often_it_waits_for_a_place(tmp_path: Path, path: str):
    """Attempts that a full engine refuses are in no report."""
    engine = EchoEngine(token_delay_seconds=0.001, max_running=3)
    async with running(tmp_path, engine=engine) as service:
        key = await service.key()
        prompts = [f"prompt {number:02}" for number in range(20)]
        async with service.client(key) as http:
            reply = await http.post(path, json={"prompt" + "s" * path.endswith("batch"): prompts, "max_tokens": 5})
        await counted(service, key, 20 * (9 + 5))
        (day,) = (await service.usage(key))["by_day"]

    assert 200 == reply.status_code
    assert (20, 20 * 9, 20 * 5) == (day["requests"], day["prompt_tokens"], day["completion_tokens"])


async def test_the_report_lists_days_and_models_and_the_table_the_same(service: Running):
    key = await service.key(owner="anna")
    for _ in range(2):
        await service.generate(key)
    await counted(service, key, 20)

    report = await service.usage(key)
    async with service.client() as admin:
        key_id = key.split("_")[1]
        foreign = (await admin.get("/v1/usage", params={"key": key_id})).json()
        table = await admin.get("/v1/usage", params={"key": key_id, "format": "csv"})
        unknown = await admin.get("/v1/usage", params={"key": "nobody"})
        wrong = await admin.get("/v1/usage", params={"month": "2026-13"})

    figures = {"requests": 2, "prompt_tokens": 10, "completion_tokens": 10, "charged_tokens": 20}
    assert [figures | {"model": "echo"}] == report["by_model"]
    assert [figures | {"day": report["by_day"][0]["day"]}] == report["by_day"]
    assert report == foreign
    head, row, end = table.text.split("\r\n")
    assert "day,model,requests,prompt_tokens,completion_tokens,charged_tokens" == head
    assert (f"{report['by_day'][0]['day']},echo,2,10,10,20", "") == (row, end)
    assert (404, 400) == (unknown.status_code, wrong.status_code)


async def lock(path: Path) -> sqlite3.Connection:
    """Take SQLite's lock as another process does; whoever has it now needs the event loop to end."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    await asyncio.to_thread(connection.execute, "BEGIN EXCLUSIVE")
    return connection


def remaining(reply: httpx.Response) -> tuple[str, str]:
    return reply.headers["x-ratelimit-remaining-requests"], reply.headers["x-ratelimit-remaining-tokens"]


async def test_tokens_a_minute_are_limited_and_a_refused_request_costs_one(service: Running):
    """But none of the tokens; what an answer did not use comes back."""
    limits = {"tokens_per_minute": 25, "requests_per_minute": 1, "burst": 10}
    key = await service.key(limits=limits)
    first = await service.generate(key, prompt="hi", max_tokens=20)
    refused = await service.generate(key, max_tokens=20)
    too_large = await service.generate(key, max_tokens=30)
    fits = await service.generate(key, max_tokens=5)

    assert [200, 429, 429, 200] == [reply.status_code for reply in (first, refused, too_large, fits)]
    assert ("9", "21") == remaining(first)
    assert ("8", "21") == remaining(refused)
    assert "rate_limit_exceeded" == refused.json()["error"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "retry-after" not in too_large.headers
    assert ("6", "11") == remaining(fits)


async def test_a_month_that_is_used_up_refuses_before_the_body_is_read(service: Running):
    """Even a malformed one, which costs a request as any other; other routes stay open."""
    key = await service.key(limits={"monthly_tokens": 10, "requests_per_minute": 1, "burst": 9})
    await service.generate(key)

    refused = await service.generate(key, max_tokens="malformed")

    assert (429, "quota_exceeded") == (refused.status_code, refused.json()["error"])
    assert {"limit": 10, "used": 10, "reserved": 0} == {
        name: refused.json()["details"][name] for name in ("limit", "used", "reserved")
    }
    assert "7" == refused.headers["x-ratelimit-remaining-requests"]
    assert (10, 0) == await used(service, key)


async def test_other_routes_take_no_parallel_place_and_no_request(tmp_path: Path):
    """While a key's only place is taken its owner still sees sessions, models and usage."""
    async with running(tmp_path, engine=EchoEngine(token_delay_seconds=0.05)) as service:
        limits = {"parallel_requests": 1, "requests_per_minute": 1, "burst": 2}
        key = await service.key(role="admin", limits=limits)
        running_one = asyncio.create_task(service.generate(key, prompt="a long prompt " * 5, max_tokens=50))
        async with service.client(key) as http:
            await until(lambda: service.container.host.default.engine.status().running == 1)
            paths = ("/v1/sessions", "/v1/models", "/v1/models/echo", "/v1/usage", "/v1/keys", "/v1/roles", "/status")
            others = [(await http.get(path)).status_code for path in paths]
            second = await http.post("/v1/generate", json=BODY)
            wrong_method = await http.get("/v1/generate")
        first = await running_one

    assert [200] * len(paths) == others
    assert (200, 429, 405) == (first.status_code, second.status_code, wrong_method.status_code)
    assert "0" == second.headers["x-ratelimit-remaining-requests"]


async def test_a_request_refused_for_its_quota_costs_a_request_and_no_tokens(service: Running):
    key = await service.key(limits={"monthly_tokens": 5, "tokens_per_minute": 50, "requests_per_minute": 1, "burst": 9})

    refused = await service.generate(key)

    assert (429, ("8", "50")) == (refused.status_code, remaining(refused))


@pytest.mark.parametrize("switch", [{"enabled": False}, {"enabled": False, "parallel_requests": 5}])
async def test_a_keys_own_limits_stay_where_the_defaults_are_switched_off(tmp_path: Path, switch: dict[str, Any]):
    """And its role's; a key that sets none has none."""
    async with running(tmp_path, engine=EchoEngine(token_delay_seconds=0.02), rate_limit=switch) as service:
        async with service.client() as admin:
            role = {"limits": {"requests_per_minute": 2}}
            assert 200 == (await admin.put("/v1/roles/slow", json=role)).status_code
        parallel, rate = await service.key(limits={"parallel_requests": 1}), await service.key(role="slow")
        free = await service.key(role="admin")
        replies = {
            key: await asyncio.gather(*(service.generate(key) for _ in range(8))) for key in (parallel, rate, free)
        }

    assert [200] + [429] * 7 == sorted(reply.status_code for reply in replies[parallel])
    assert [200] * 2 + [429] * 6 == sorted(reply.status_code for reply in replies[rate])
    assert [200] * 8 == [reply.status_code for reply in replies[free]]
    assert "x-ratelimit-limit-requests" not in replies[free][0].headers


async def test_a_month_with_too_little_left_refuses_before_the_prompt_is_prepared(tmp_path: Path):
    """Neither filter nor tokenizer see a request that names more tokens than are left, nor one that must take more."""
    engine = PreparingEngine()
    async with running(tmp_path, engine=engine) as service:
        key = await service.key(limits={"monthly_tokens": 20})
        await service.generate(key)
        before = engine.prepared
        refused = [await service.generate(key, max_tokens=tokens) for tokens in (10, 500, None)]
        refused.append(await service.generate(key, max_tokens=4, n=3))
        fits = await service.generate(key, prompt="hi", max_tokens=8)

    assert 1 == before
    assert [429] * 4 == [reply.status_code for reply in refused]
    assert {"quota_exceeded"} == {reply.json()["error"] for reply in refused}
    assert (200, 2) == (fits.status_code, engine.prepared)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"prompt": "far too long " * 50}),
        ("/v1/generate/batch", {"prompts": ["far too long " * 4] * 64}),
        ("/v1/completions", {"prompt": ["far too long " * 4] * 64}),
    ],
    ids=["one", "batch", "several"],
)
async def test_a_key_that_keeps_sending_while_it_is_refused_is_slowed_down(
    tmp_path: Path, path: str, body: dict[str, Any]
):
    """Few of its prompts are prepared, and another key's requests are served meanwhile."""
    engine = PreparingEngine()
    async with running(tmp_path, engine=engine) as service:
        key, other = await service.key(limits={"monthly_tokens": 5}), await service.key()
        attempts = 0

        async def keep_sending() -> None:
            nonlocal attempts
            async with service.client(key) as http:
                while True:
                    reply = await http.post(path, json={**body, "max_tokens": 1})
                    assert "quota" in reply.text
                    attempts += 1

        clients = [asyncio.create_task(keep_sending()) for _ in range(16)]
        await until(lambda: attempts >= 16)
        await asyncio.sleep(0.2)
        before, prepared, began = attempts, engine.prepared, time.monotonic()
        await asyncio.sleep(1)
        others = [(await service.generate(other)).status_code for _ in range(10)]
        seconds = time.monotonic() - began
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)

    assert [200] * 10 == others
    assert attempts - before < 20 * seconds
    assert engine.prepared - prepared - 10 < 200 * seconds  # as many as 10 requests of several prompts


async def test_a_refusal_in_a_stream_that_has_begun_costs_as_one_before_it(tmp_path: Path):
    """The first prompt has a place in the month and the others have none: few of them are prepared."""
    engine, seconds = PreparingEngine(), list[float]()
    body = {"prompt": ["a", *["far too long " * 5] * 15], "max_tokens": 1, "stream": True}
    async with running(tmp_path, engine=engine) as service:
        key = await service.key(limits={"monthly_tokens": 50})
        async with service.client(key) as http:
            assert 200 == (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code
            for _ in range(12):
                began = time.monotonic()
                reply = await http.post("/v1/completions", json=body)
                assert "quota" in reply.text
                seconds.append(time.monotonic() - began)

    assert sum(seconds) > 1.5  # eight are free, and one every 0.64 s


async def test_parallel_requests_are_limited_and_free_their_places(tmp_path: Path):
    """However they end; the streams of one key do not keep another's out."""
    async with running(tmp_path, engine=EchoEngine(token_delay_seconds=0.02)) as service:
        key = await service.key(limits={"parallel_requests": 2})
        other = await service.key(limits={"parallel_requests": 2})
        replies = await asyncio.gather(*(service.generate(key) for _ in range(4)), service.generate(other))
        again = await service.generate(key, stream=True)
        third = await service.generate(key)

    assert [200, 200, 429, 429, 200] == sorted_first_four([reply.status_code for reply in replies])
    assert [200, 200] == [again.status_code, third.status_code]
    assert "10" not in [reply.headers.get("retry-after") for reply in replies]


def sorted_first_four(codes: list[int]) -> list[int]:
    return [*sorted(codes[:4]), *codes[4:]]


async def test_every_answer_tells_what_is_left_streams_too(service: Running):
    """Requests and tokens, on answers and on errors."""
    async with service.client() as http:
        replies = [
            await http.post("/v1/generate", json=BODY),
            await http.post("/v1/generate", json=BODY | {"stream": True}),
            await http.post("/v1/generate", json={}),
            await http.get("/v1/keys"),
            await http.get("/v1/keys/nobody"),
        ]

    names = [
        f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
    ]
    for reply in replies:
        assert all(name in reply.headers for name in names), reply.status_code


async def test_what_is_logged_has_no_text_unless_asked_for_and_then_only_masked(tmp_path: Path):
    """Also where the filters are off; a row tells who asked what way, and how it ended."""
    address = "jane.doe@example.com"
    rows: dict[bool, Any] = {}
    for keep in (False, True):
        folder = tmp_path / str(keep)
        pii = {"input": "off", "output": "off"}
        async with running(folder, logging={"store_text": keep}, pii=pii) as service:
            await service.generate(ADMIN_KEY, prompt=f"mail {address}", max_tokens=50)
            await service.generate(ADMIN_KEY, prompt="x", max_tokens=9000)
        with sqlite3.connect(folder / "service.db") as database:
            database.row_factory = sqlite3.Row
            rows[keep] = [dict(row) for row in database.execute("SELECT * FROM inference_log ORDER BY id")]
        database.close()

    assert (None, None) == (rows[False][0]["prompt"], rows[False][0]["answer"])
    assert ("mail [EMAIL]", "mail [EMAIL]") == (rows[True][0]["prompt"], rows[True][0]["answer"])
    row = rows[False][0]
    assert ("admin", "/v1/generate", "echo", "stop", 200, 0) == (
        row["key_id"],
        row["route"],
        row["model"],
        row["finish_reason"],
        row["status"],
        row["cached"],
    )
    assert (25, 25) == (row["prompt_tokens"], row["completion_tokens"])
    assert 0 < row["first_token_ms"] < row["latency_ms"]
    assert [200, 400] == [row["status"] for row in rows[False]]


async def test_at_the_end_nothing_is_left_unwritten(tmp_path: Path):
    """A flush interval longer than the service's life: the shutdown writes what waits."""
    async with running(tmp_path, usage_log={"flush_seconds": 3600}) as service:
        await asyncio.gather(*(service.generate(ADMIN_KEY) for _ in range(20)))
        assert 20 == service.access.log.waiting
    with sqlite3.connect(tmp_path / "service.db") as database:
        (rows,) = database.execute("SELECT count(*) FROM inference_log").fetchone()
    database.close()

    assert 20 == rows


async def test_a_stalled_database_slows_no_request_down_and_lost_rows_are_counted(tmp_path: Path):
    """Another process holds SQLite's lock; keys without a quota never notice, and the event loop goes on."""
    async with running(
        tmp_path, patience=WAIT_SECONDS, usage_log={"flush_seconds": 0.01, "max_waiting": 10}
    ) as service:
        await service.generate(ADMIN_KEY)
        blocker = await lock(tmp_path / "service.db")
        loop = asyncio.get_running_loop()
        took = []
        for _ in range(40):
            began = loop.time()
            assert 200 == (await service.generate(ADMIN_KEY)).status_code
            took.append(loop.time() - began)
            await asyncio.sleep(0.01)
        blocker.execute("ROLLBACK")
        blocker.close()
        metrics = service.container.metrics.render()[0].decode()

    assert sorted(took)[20] < 1  # who waits for it waits for two
    dropped = float(metrics.split("\nusage_log_dropped_total ")[1].split("\n")[0])
    assert dropped >= 1


async def test_old_rows_are_deleted_in_bounded_batches(service: Running, monkeypatch: pytest.MonkeyPatch):
    """Only what is past the configured days, however many transactions that takes."""
    monkeypatch.setattr(usage_log, "RETENTION_BATCH", 2)
    key = await service.key()
    for _ in range(5):
        await service.generate(key)
    await counted(service, key, 50)
    now = datetime.now(UTC)

    early = await service.access.log.delete_old(now + timedelta(days=89))
    late = await service.access.log.delete_old(now + timedelta(days=91))

    assert (0, 5) == (early, late)
    assert [] == (await service.usage(key))["by_day"]


@pytest.mark.parametrize(("policy", "status"), [("closed", 503), ("open", 200)])
async def test_without_a_database_quotas_refuse_or_let_pass_as_configured(tmp_path: Path, policy: str, status: int):
    """Keys seen lately are still known; closed is 503 with a time to come back, open answers."""
    async with running(tmp_path, patience=WAIT_SECONDS, quota={"on_outage": policy}) as service:
        key = await service.key(limits={"monthly_tokens": 1000})
        assert 200 == (await service.generate(key)).status_code
        blocker = await lock(tmp_path / "service.db")
        loop = asyncio.get_running_loop()
        first = await service.generate(key)
        took, later = [], []
        for _ in range(5):
            began = loop.time()
            later.append(await service.generate(key))
            took.append(loop.time() - began)
        blocker.execute("ROLLBACK")
        blocker.close()
        await until(lambda: not service.access.database.breaker.open)
        recovered = await service.generate(key)

    assert [status] * 6 == [each.status_code for each in (first, *later)]
    if status == 503:
        assert "service_unavailable" == later[0].json()["error"]
        assert "retry-after" in later[0].headers
    assert min(took) < 1  # each that waits for it waits for two
    assert 200 == recovered.status_code


async def test_a_limit_of_zero_is_no_limit(tmp_path: Path):
    """0 in the configuration: nothing is counted and no header speaks of it."""
    async with running(
        tmp_path, rate_limit={"requests_per_minute": 0, "burst_size": 0, "tokens_per_minute": 0}
    ) as all_in:
        replies = [await all_in.generate(ADMIN_KEY) for _ in range(30)]

    assert {200} == {reply.status_code for reply in replies}
    assert not [name for name in replies[-1].headers if name.startswith("x-ratelimit")]
