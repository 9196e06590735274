"""The connection to a real Redis that is killed, suspended, slow, emptied, full and locked."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pydantic import SecretStr, ValidationError

from app.access.background import BackgroundGroup
from app.access.faults import Fault
from app.config import RedisConfig
from app.errors import StoreUnavailable
from app.stores.redis_connection import RedisConnection, Script
from tests.services.redis_connections import PATIENCE_SECONDS
from tests.services.redis_server import RedisServer
from tests.services.slow_proxy import slow_proxy
from tests.waiting import HANG_SECONDS, until

LONGEST_SECONDS = 0.25
"""The longest time for a reply that can be configured."""

pytestmark = pytest.mark.services

COUNT = Script("return redis.call('INCR', KEYS[1])")


@asynccontextmanager
async def connected(
    url: str, *, seconds: float = PATIENCE_SECONDS, **settings: object
) -> AsyncIterator[RedisConnection]:
    """A connection whose breaker looks after itself, as in a running service.

    Args: seconds: how long a reply is waited for.
    """
    background = BackgroundGroup()
    await background.start()
    config = RedisConfig.model_validate({"url": url, "probe_seconds": 0.05, **settings})
    connection = RedisConnection(config.model_copy(update={"timeout_seconds": seconds}))
    background.spawn(connection.watch())
    try:
        yield connection
    finally:
        await background.close()
        await connection.close()


async def count(connection: RedisConnection) -> int:
    """Count up; the number says how often that was done on this server."""
    done: int = await connection.evaluate(COUNT, [connection.key("count", "k")])
    return done


async def timed(connection: RedisConnection) -> tuple[bool, float]:
    """Return whether Redis answered, and after how many seconds the caller knew."""
    began = time.monotonic()
    try:
        await count(connection)
    except StoreUnavailable:
        return False, time.monotonic() - began
    return True, time.monotonic() - began


async def test_a_script_is_sent_once_and_again_to_a_server_that_does_not_know_it(redis: RedisServer):
    async with connected(redis.url) as connection:
        redis.command("CONFIG", "RESETSTAT")

        assert [1, 2, 3] == [await count(connection) for _ in range(3)]
        assert b"cmdstat_eval:calls=1," in redis.command("INFO", "commandstats")
        redis.flush()
        assert 1 == await count(connection)


@pytest.mark.parametrize("how", ["killed", "suspended"])
async def test_nobody_waits_for_a_server_that_is_away_and_it_is_back_without_a_restart(redis: RedisServer, how: str):
    """Once it was noticed."""
    async with connected(redis.url, seconds=1) as connection:
        await count(connection)
        redis.kill() if how == "killed" else redis.suspend()
        try:
            first = await asyncio.gather(*(timed(connection) for _ in range(40)))
            later = [await timed(connection) for _ in range(40)]
            fault = connection.fault
        finally:
            redis.restart() if how == "killed" else redis.resume()
        await until(lambda: connection.fault is None)
        back = await timed(connection)

    assert {False} == {answered for answered, _ in (*first, *later)}
    assert sorted(seconds for _, seconds in later)[20] < 1  # as long as each waits that tries
    assert Fault.UNREACHABLE is fault
    assert back[0]


async def test_no_caller_waits_for_half_a_second(redis: RedisServer):
    """Of many that come at once to a server that says nothing, with the longest time for a reply that can be set."""

    async def slowest() -> float:
        async with connected(redis.url, seconds=LONGEST_SECONDS) as connection:
            await timed(connection)
            with redis.stalled():
                return max([seconds for _, seconds in await asyncio.gather(*(timed(connection) for _ in range(40)))])

    with pytest.raises(ValidationError):
        RedisConfig(url=SecretStr(redis.url), timeout_seconds=LONGEST_SECONDS + 0.01)
    # What else the machine does shows in some measurements, a fault in each.
    assert min([await slowest() for _ in range(4)]) < 0.5


async def test_a_server_that_was_restarted_is_reached_by_the_next_request(redis: RedisServer):
    """Connections that died meanwhile are no outage."""
    async with connected(redis.url) as connection:
        assert 1 == await count(connection)
        redis.restart()
        await asyncio.sleep(0.05)  # the event loop hears of it

        assert 1 == await count(connection)
        assert connection.fault is None


async def test_a_slow_server_is_used_and_one_that_is_too_slow_is_away(redis: RedisServer):
    async with slow_proxy(redis.port) as proxy, connected(f"redis://127.0.0.1:{proxy.port}", seconds=1) as connection:
        proxy.seconds = 0.02
        assert (await timed(connection))[0]
        proxy.seconds = HANG_SECONDS
        assert not (await timed(connection))[0]
        assert not (await timed(connection))[0]
        proxy.seconds = 0
        await until(lambda: connection.fault is None)
        assert (await timed(connection))[0]


async def test_a_busy_process_does_not_take_its_own_delay_for_an_outage(redis: RedisServer):
    """An answer that has come while the event loop did something else is read."""
    async with connected(redis.url, seconds=0.25) as connection:
        await count(connection)
        waiting = asyncio.create_task(timed(connection))
        for _ in range(3):
            await asyncio.sleep(0)
        time.sleep(0.3)  # noqa: ASYNC251  # what this is about

        assert (await waiting)[0]
        assert connection.fault is None


async def test_many_callers_share_one_connection_and_keep_their_order(redis: RedisServer):
    async with connected(redis.url) as connection:
        await count(connection)
        numbers = await asyncio.gather(*(count(connection) for _ in range(600)))
        info = redis.command("INFO", "clients")

    assert list(range(2, 602)) == numbers
    assert int(info.split(b"connected_clients:")[1].split(b"\r\n")[0]) == 2


async def test_a_command_is_sent_even_if_its_caller_is_cancelled(redis: RedisServer):
    async with connected(redis.url) as connection:
        cancelled = asyncio.create_task(count(connection))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled])

        assert 2 == await count(connection)


async def test_what_is_wrong_is_told_apart(redis: RedisServer):
    """A server that answers and refuses everything is named for its reason, without its password."""
    async with connected(redis.url) as connection:
        redis.command("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(StoreUnavailable, match="Redis has no memory left"):
            await connection.execute("SET", "k", "v")
        redis.command("CONFIG", "SET", "maxmemory", "0")
        await until(lambda: connection.fault is None)
    redis.command("CONFIG", "SET", "requirepass", "secret")
    try:
        async with connected(redis.url.replace("127", "canary:canary-password@127")) as connection:
            await connection.open()
            fault = connection.fault
            with pytest.raises(StoreUnavailable) as refused:
                await count(connection)
        async with connected(redis.url, password="secret") as connection:
            assert (await timed(connection))[0]
    finally:
        redis.restart()

    assert Fault.REFUSED is fault
    assert "canary" not in f"{refused.value} {connection.where}"


async def test_a_command_that_is_refused_is_no_outage(redis: RedisServer):
    """A key of another kind stands there; all the rest works."""
    redis.command("SADD", "llm-service:count:{k}", "somebody's")
    async with connected(redis.url) as connection:
        with pytest.raises(StoreUnavailable, match="refuses a command"):
            await count(connection)
        assert connection.fault is None
