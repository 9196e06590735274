"""Conversations of several replicas over one Redis, and a Redis that goes away."""

import asyncio
import base64
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from app.engine.echo import EchoEngine
from app.errors import SessionTakenOver, SessionUnreadable
from app.stores.redis_sessions import RedisSessionStore
from app.stores.tenant_scripts import key_part
from app.types import Tenant
from tests.services.process import serving
from tests.services.redis_connections import RedisConnections, wait_longer
from tests.services.redis_replicas import (
    ANN,
    LEASE_SECONDS,
    PREFIX,
    Replicas,
    store_of,
    take_one_turn,
    take_turns,
    turn,
)
from tests.services.redis_server import RedisServer
from tests.services.slow_proxy import slow_proxy
from tests.waiting import HANG_SECONDS, until
from tests.web.access import ADMIN_KEY, Running, running

pytestmark = pytest.mark.services

BOB = Tenant.owner("bob")


@pytest.fixture
def store(redis_connections: RedisConnections) -> RedisSessionStore:
    return store_of(redis_connections.new(PREFIX))


async def chat(service: Running, word: str, session_id: str | None = "s", key: str = ADMIN_KEY) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": word}], "session_id": session_id, "max_tokens": 20, "cache": False}
    async with service.client(key) as http:
        return await http.post("/v1/chat", json=body)


async def said(service: Running, session_id: str = "s") -> list[str]:
    """Return what the user said in a session."""
    async with service.client() as http:
        reply = await http.get(f"/v1/sessions/{session_id}")
    assert 200 == reply.status_code, reply.text
    return [message["content"] for message in reply.json()["messages"] if message["role"] == "user"]


async def test_a_conversation_that_alternates_between_replicas_loses_and_doubles_nothing(
    patient_redis: RedisServer, tmp_path: Path
):
    """Each replica knows what was said to the other; turns at the same time are one after the other."""
    given: dict[str, Any] = {"redis": {"url": patient_redis.url}}
    async with running(tmp_path / "a", **given) as one, running(tmp_path / "b", **given) as other:
        for number in range(10):
            assert 200 == (await chat((one, other)[number % 2], f"word{number}")).status_code
        turns = (await chat(one, "word10")).json()["context"]["turns_kept"]
        in_order = await said(other)
        replies = await asyncio.gather(
            *(chat((one, other)[number % 2], f"word{number}", "parallel") for number in range(20))
        )
        parallel = await said(one, "parallel")
        async with other.client() as http:
            listed = (await http.get("/v1/sessions")).json()["sessions"]
            deleted = [(await http.delete("/v1/sessions/s")).status_code for _ in range(2)]

    assert 10 == turns
    assert [f"word{number}" for number in range(11)] == in_order
    assert {200} == {reply.status_code for reply in replies}
    assert sorted(f"word{number}" for number in range(20)) == sorted(parallel)
    assert [("parallel", 20), ("s", 11)] == [(each["session_id"], each["turns"]) for each in listed]
    assert [204, 404] == deleted


async def test_a_stored_response_is_continued_on_another_replica(patient_redis: RedisServer, tmp_path: Path):
    given: dict[str, Any] = {"redis": {"url": patient_redis.url}}
    async with running(tmp_path / "a", **given) as one, running(tmp_path / "b", **given) as other:
        async with one.client() as http:
            first = (await http.post("/v1/responses", json={"input": "first"})).json()
        async with other.client() as http:
            second = await http.post("/v1/responses", json={"input": "second", "previous_response_id": first["id"]})
            shown = await http.get(f"/v1/responses/{first['id']}")
        async with one.client(await one.key()) as http:
            foreign = await http.get(f"/v1/responses/{first['id']}")

    assert 200 == second.status_code
    assert second.json()["usage"]["input_tokens"] > first["usage"]["input_tokens"] + len("second")
    assert first == shown.json()
    assert 404 == foreign.status_code


async def test_replicas_take_turns_in_the_order_in_which_they_came(redis_connections: RedisConnections):
    """A busy replica does not keep a session from the others."""
    stores = [store_of(redis_connections.new(PREFIX)) for _ in range(3)]
    order: list[int] = []

    async def hold_often(number: int) -> None:
        for _ in range(4):
            async with stores[number].turn(ANN, "s"):
                order.append(number)
                await asyncio.sleep(0.02)

    await asyncio.gather(*(hold_often(number) for number in range(3) for _ in range(2)))

    assert all(len(set(order[start : start + 3])) == 3 for start in range(0, 18, 3)), order


async def test_a_turn_longer_than_its_lease_keeps_the_session(redis_connections: RedisConnections):
    one, other = (store_of(redis_connections.new(PREFIX)) for _ in range(2))
    async with one.turn(ANN, "s"):
        waiting = asyncio.create_task(_append_in_turn(other, "second"))
        await asyncio.sleep(2.5 * LEASE_SECONDS)
        await one.append(ANN, "s", turn("first"))
    await waiting
    session = await other.read(ANN, "s")

    assert session is not None
    assert (turn("first"), turn("second")) == session.turns


async def _append_in_turn(store: RedisSessionStore, word: str) -> None:
    async with store.turn(ANN, "s"):
        await store.append(ANN, "s", turn(word))


# --- Replicas that die ---


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    processes = Replicas()
    yield processes
    processes.kill()


@pytest.mark.parametrize("times", [3, pytest.param(25, marks=pytest.mark.soak)])
async def test_a_replica_killed_in_a_turn_leaves_neither_half_a_turn_nor_a_lock(
    times: int, redis: RedisServer, store: RedisSessionStore, replicas: Replicas
):
    """What it had confirmed is there once, and the next turn begins when its lease is over."""
    confirmed = -1
    draw = random.Random(7)
    for _ in range(times):
        process, pipe = replicas.start(take_turns, redis.url, confirmed + 1)
        confirmed = await asyncio.to_thread(pipe.recv)
        await asyncio.sleep(draw.random() * 0.03)
        process.kill()
        process.join()
        with suppress(EOFError):
            while True:
                confirmed = pipe.recv()
        async with asyncio.timeout(HANG_SECONDS), store.turn(ANN, "s"):
            session = await store.read(ANN, "s")
        assert session is not None
        words = [each.messages[0].content for each in session.turns]
        last = len(words) // 2 - 1
        assert [f"{number}{part}" for number in range(last + 1) for part in "ab"] == words
        assert last in (confirmed, confirmed + 1)
        confirmed = last


async def test_a_replica_that_stood_still_cannot_store_what_is_too_late(
    redis: RedisServer, store: RedisSessionStore, replicas: Replicas
):
    """Its lease ended and another has taken the session since: one of the two turns is stored, and it is told."""
    process, pipe = replicas.start(take_one_turn, redis.url)
    await asyncio.to_thread(pipe.recv)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    async with asyncio.timeout(HANG_SECONDS):
        await _append_in_turn(store, "in time")
    os.kill(process.pid, signal.SIGCONT)
    pipe.send("go on")
    became = await asyncio.to_thread(pipe.recv)
    session = await store.read(ANN, "s")

    assert "taken over" == became
    assert session is not None
    assert (turn("in time"),) == session.turns


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_a_conversation_outlives_services_that_are_killed_in_its_turns(redis: RedisServer, tmp_path: Path):
    """Five times: whatever was answered is there once, and the other service continues it when the lease is over."""
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    url = f"sqlite:///{tmp_path / 'service.db'}"
    answered: list[str] = []
    unknown: set[str] = set()
    async with serving(url, folders[1], REDIS__URL=redis.url) as survivor, survivor.client() as http:
        for number in range(5):
            async with serving(url, folders[0], REDIS__URL=redis.url) as victim, victim.client() as doomed:

                async def talk(client: httpx.AsyncClient, word: str) -> None:
                    body = {"messages": [{"role": "user", "content": word}], "session_id": "s", "max_tokens": 30}
                    try:
                        reply = await client.post("/v1/chat", json=body)
                    except httpx.TransportError:
                        unknown.add(word)
                        return
                    assert 200 == reply.status_code, reply.text
                    answered.append(word)

                talking = [asyncio.create_task(talk(doomed, f"{number}-{word}")) for word in range(20)]
                await asyncio.sleep(random.random() * 0.2)
                victim.kill()
                await asyncio.gather(*talking)
                await talk(http, f"{number}-after")
        shown = (await http.get("/v1/sessions/s")).json()["messages"]

    words = [message["content"] for message in shown if message["role"] == "user"]
    assert len(words) == len(set(words))
    assert set(answered[-20:]) <= set(words) <= set(answered) | unknown
    assert [message["role"] for message in shown] == ["user", "assistant"] * (len(shown) // 2)


# --- A Redis that goes away ---


@pytest.mark.parametrize(("seconds", "status"), [(0.05, 200), (HANG_SECONDS, 503)])
async def test_a_slow_redis_is_waited_for_within_bounds(
    seconds: float, status: int, redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A reply that comes too late is none, and the request is refused long before it."""
    wait_longer(monkeypatch, 1)
    async with slow_proxy(redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        async with running(tmp_path, redis={"url": url}) as service:
            proxy.seconds = seconds
            reply = await chat(service, "one")
            proxy.seconds = 0

    assert status == reply.status_code


async def test_without_redis_a_session_is_refused_and_everything_else_goes_on(redis: RedisServer, tmp_path: Path):
    """And afterwards without a restart; an empty Redis has no session, so the next turn begins a new one."""
    async with running(tmp_path, redis={"url": redis.url, "probe_seconds": 0.1}) as service:
        assert 200 == (await chat(service, "one")).status_code
        redis.kill()
        refused, without = await chat(service, "two"), await chat(service, "two", None)
        async with service.client() as http:
            responses = [await http.post("/v1/responses", json={"input": "x", "store": keep}) for keep in (True, False)]
            others = [
                await http.get("/v1/sessions"),
                await http.get("/v1/sessions/s"),
                await http.delete("/v1/sessions/s"),
            ]
        redis.start()
        async with asyncio.timeout(HANG_SECONDS):
            while (reply := await chat(service, "three")).status_code != 200:  # noqa: ASYNC110  # Redis' start
                await asyncio.sleep(0.05)
        words = await said(service)

    assert (503, 200) == (refused.status_code, without.status_code)
    assert [503, 200] == [each.status_code for each in responses]
    assert "2" == refused.headers["retry-after"]
    assert "Redis" in refused.json()["message"]
    assert [503] * 3 == [each.status_code for each in others]
    assert (200, ["three"]) == (reply.status_code, words)


async def test_a_stalled_redis_keeps_nobody_waiting_and_stores_nothing_too_late(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The turn that was told 503 is not stored when Redis goes on, so that sending it again does not double it."""
    wait_longer(monkeypatch, 1)
    engine = EchoEngine(token_delay_seconds=0.1)
    async with running(tmp_path, engine=engine, redis={"url": redis.url, "probe_seconds": 0.1}) as service:
        assert 200 == (await chat(service, "first")).status_code
        generating = asyncio.create_task(chat(service, "second word"))
        await until(lambda: engine.status().running == 1)
        with redis.stalled():
            cut = await generating
            replies = [await chat(service, "third"), await chat(service, "x", None)]
            await asyncio.sleep(1.2)
        async with asyncio.timeout(HANG_SECONDS):
            while (reply := await chat(service, "second word")).status_code != 200:  # noqa: ASYNC110  # no event
                await asyncio.sleep(0.05)
        words = await said(service)

    assert 503 == cut.status_code
    assert [503, 200] == [each.status_code for each in replies]
    assert 200 == reply.status_code
    assert ["first", "second word"] == words


async def test_a_turn_during_which_redis_was_emptied_is_refused(redis: RedisServer, store: RedisSessionStore):
    """What was said before is gone, so an answer that knew it begins no conversation."""
    await store.append(ANN, "s", turn("before"))
    async with store.turn(ANN, "s"):
        redis.flush()
        with pytest.raises(SessionTakenOver):
            await store.append(ANN, "s", turn("during"))

    assert await store.read(ANN, "s") is None


# --- What stands in Redis ---


@contextmanager
def direct(redis: RedisServer) -> Iterator[Redis]:
    """A client beside the stores."""
    with Redis(port=redis.port) as client:
        yield client


def everything(redis: RedisServer) -> tuple[bytes, bytes]:
    """Return the names of all keys, and all that is stored under them."""
    readers: dict[object, Callable[[Redis, bytes], Any]] = {
        b"string": lambda client, key: client.get(key),
        b"list": lambda client, key: client.lrange(key, 0, -1),
        b"hash": lambda client, key: client.hgetall(key),
        b"zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
    }
    with direct(redis) as client:
        names = sorted(client.scan_iter())
        return b"\n".join(names), repr([readers[client.type(name)](client, name) for name in names]).encode()


KEYS = [bytes([number]) * 32 for number in range(2)]


@pytest.mark.parametrize("key", [None, base64.b64encode(KEYS[0]).decode()], ids=["plain", "encrypted"])
async def test_no_secret_stands_in_a_name_and_with_a_key_no_text_at_all(
    key: str | None, patient_redis: RedisServer, tmp_path: Path
):
    """Texts, ids of sessions, owners and API keys, in sessions, stored responses and the cache."""
    redis_settings = {"url": patient_redis.url} | ({"encryption_key": key} if key else {})
    async with running(tmp_path, redis=redis_settings) as service:
        caller = await service.key(owner="canary-owner")
        replies = [await chat(service, "canary-text", "canary-session", caller)]
        async with service.client(caller) as http:
            body = {"input": "canary-input", "instructions": "canary-instructions", "metadata": {"k": "canary-label"}}
            replies.append(await http.post("/v1/responses", json=body))
            cached = {"prompt": "canary-prompt", "temperature": 0}
            replies += [await http.post("/v1/generate", json=cached)]
        await until(lambda: b":cache:" in everything(patient_redis)[0])
        names, values = everything(patient_redis)

    assert [200] * 3 == [reply.status_code for reply in replies]
    assert b"canary" not in names
    secret = caller.encode().rpartition(b"_")[2]
    assert secret not in names + values
    assert (b"canary" in values) is (key is None)
    if key is None:
        assert all(word in values for word in (b"canary-text", b"canary-session", b"canary-input"))


async def test_what_is_moved_to_another_tenant_or_written_by_a_stranger_is_no_conversation(
    redis: RedisServer, redis_connections: RedisConnections
):
    """With a key nobody can put words into a session, neither plain nor from another session."""
    store = store_of(redis_connections.new(PREFIX), KEYS[0])
    plain = store_of(redis_connections.new(PREFIX))
    await store.append(ANN, "s", turn("hers"))
    await store.append(BOB, "s", turn("his"))
    await plain.append(ANN, "plain", turn("of a stranger"))
    with direct(redis) as client:
        (of_ann,) = [
            key
            for key in client.scan_iter("*:turns:*")
            if key_part(str(ANN)).encode() in key and key_part("s").encode() in key
        ]
        (of_bob,) = [key for key in client.scan_iter("*:turns:*") if key_part(str(BOB)).encode() in key]
        client.copy(of_ann, of_bob, replace=True)

    for tenant, session_id in ((BOB, "s"), (ANN, "plain")):
        with pytest.raises(SessionUnreadable):
            await store.read(tenant, session_id)
    assert ["s"] == [each.session_id for each in await store.list(ANN)]


GARBAGE = [b"", b"\x80\x04\x95garbage.", b"\x00\x81\xa8messages\x90", b"\x00" + b"x" * 1000]
"""Nothing, a pickle, a turn without messages, and no msgpack."""


async def test_a_session_that_cannot_be_read_says_so_and_can_be_deleted(patient_redis: RedisServer, tmp_path: Path):
    """It is no empty conversation: the client learns that something is lost."""
    async with running(tmp_path, redis={"url": patient_redis.url}) as service, service.client() as http:
        for garbage in GARBAGE:
            await chat(service, "one")
            with direct(patient_redis) as client:
                (key,) = client.scan_iter("*:turns:*")
                client.execute_command("LSET", key, 0, garbage)
            refused, shown = await chat(service, "two"), await http.get("/v1/sessions/s")
            deleted = await http.delete("/v1/sessions/s")
            again = await chat(service, "three")

            for reply in (refused, shown):
                assert (409, "session_unreadable") == (reply.status_code, reply.json()["error"])
            assert (204, 200, 0) == (deleted.status_code, again.status_code, again.json()["context"]["turns_kept"])


async def test_keys_are_rotated_without_losing_a_conversation(redis_connections: RedisConnections):
    """The new key stands first; once nothing old is left, the old one may go."""
    connection = redis_connections.new(PREFIX)
    old, both, new = store_of(connection, KEYS[0]), store_of(connection, *reversed(KEYS)), store_of(connection, KEYS[1])
    await old.append(ANN, "s", turn("old"))
    await both.append(ANN, "s", turn("new"))
    await both.append(ANN, "later", turn("new"))
    session, later = await both.read(ANN, "s"), await new.read(ANN, "later")

    assert session is not None
    assert later is not None
    assert ((turn("old"), turn("new")), (turn("new"),)) == (session.turns, later.turns)
    for store in (old, new):
        with pytest.raises(SessionUnreadable):
            await store.read(ANN, "s")
