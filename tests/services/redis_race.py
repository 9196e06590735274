"""One of several processes that take from the same limit at the same time: `python -m tests.services.redis_race URL N`.

Waits for a line on standard input, sends N requests at once and prints how many were admitted.
"""

import asyncio
import sys
from typing import Any

from app.access.admission_store import Rates
from app.access.token_bucket import Bucket
from app.config import RedisConfig
from app.stores.redis_admission import RedisAdmissionStore
from app.stores.redis_connection import RedisConnection

LIMIT = 300
RATES = Rates(requests=Bucket(LIMIT, 1e-6), tokens=Bucket(10**9, 1), parallel_requests=10_000)


def patient(url: str, **settings: Any) -> RedisConfig:
    """Return a configuration that waits longer than one may: the machine of the tests may be busy."""
    return RedisConfig.model_validate({"url": url, **settings}).model_copy(update={"timeout_seconds": 20.0})


def say(what: object) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


async def race(url: str, count: int) -> int:
    connection = RedisConnection(patient(url))
    store = RedisAdmissionStore(connection, lease_seconds=20)
    await store.peek("k", RATES)
    say("ready")
    await asyncio.to_thread(sys.stdin.readline)
    decisions = await asyncio.gather(*(store.admit("k", RATES) for _ in range(count)))
    await connection.close()
    return sum(decision.refused is None for decision in decisions)


if __name__ == "__main__":
    say(asyncio.run(race(sys.argv[1], int(sys.argv[2]))))
