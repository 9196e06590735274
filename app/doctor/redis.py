"""Examines Redis: whether it answers and can be written, and whether processes that need it have it."""

from collections.abc import Iterator

from app.access.faults import Fault
from app.config import Settings
from app.doctor.findings import Finding, ok, problem, warning
from app.doctor.network import is_local
from app.errors import ConfigError
from app.stores.redis_connection import RedisConnection
from app.stores.redis_url import parse_redis_url

SUBJECT = "redis"
_ADVICE = {
    Fault.REFUSED: "set REDIS__PASSWORD, or the user in redis.url",
    Fault.NO_MEMORY: "raise its maxmemory",
    Fault.READ_ONLY: "name the server that is written to, or its Sentinels",
}


async def examine_redis(settings: Settings) -> list[Finding]:
    """Return what there is to say of the configured Redis; nothing where none is needed."""
    if settings.redis.url is None:
        return list(_without(settings))
    try:
        connection = RedisConnection(settings.redis)
    except ConfigError as error:
        return [problem(SUBJECT, str(error), "docs/scaling.md shows every form")]
    try:
        await connection.open()
    finally:
        await connection.close()
    return [*_state(connection), *_transport(settings), *_database(settings)]


def _without(settings: Settings) -> Iterator[Finding]:
    if settings.processes > 1 and not settings.rate_limit.per_process:
        text = f"{settings.processes} processes (app.workers times redis.replicas) share nothing"
        yield problem(SUBJECT, text, "set redis.url; docs/scaling.md says what else there is")


def _state(connection: RedisConnection) -> Iterator[Finding]:
    if connection.fault is None:
        yield ok(SUBJECT, f"{connection.where} answers and can be written")
    else:
        advice = _ADVICE.get(connection.fault, "see that it runs and can be reached")
        yield problem(SUBJECT, f"{connection.where} {connection.fault}", advice)


def _transport(settings: Settings) -> Iterator[Finding]:
    url = parse_redis_url(settings.redis.url.get_secret_value() if settings.redis.url else "")
    if not url.tls and not url.path and not all(is_local(host) for host, _ in url.hosts):
        yield warning(SUBJECT, "the connection is not encrypted", "begin redis.url with rediss://")


def _database(settings: Settings) -> Iterator[Finding]:
    if settings.redis.replicas > 1 and settings.where_database.startswith("sqlite"):
        text = "redis.replicas is more than 1, and the database is a file of this machine"
        yield warning(SUBJECT, text, "set DATABASE_URL: replicas share keys and quotas only there")
