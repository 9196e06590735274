"""Which databases are understood, and what is said of them."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, insert, inspect, select, text

from app.access import database as database_module
from app.access.database import Database
from app.access.database_url import parse_database_url, without_secrets
from app.access.tables import inference_log
from app.errors import ConfigError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///data/service.db", "sqlite+aiosqlite:///data/service.db"),
        ("postgres://anna:secret@db/llm", "postgresql+asyncpg://anna:***@db/llm"),
        ("postgresql://anna:se%40cret@db:5433/llm", "postgresql+asyncpg://anna:***@db:5433/llm"),
        ("postgresql://secret@db/llm", "postgresql+asyncpg://***@db/llm"),
        ("postgresql://db/llm?password=secret&user=secret", "postgresql+asyncpg://db/llm"),
        ("postgresql://anna:sec/ret?secret#@[::1]/llm", "postgresql+asyncpg://anna:***@[::1]/llm"),
        ("postgresql:///llm?host=/run/secret&ssl=prefer", "postgresql+asyncpg:///llm?ssl=prefer"),
        ("postgresql://db/llm?sslmode=require", "postgresql+asyncpg://db/llm?ssl=require"),
        ("postgresql+psycopg://db/llm", "postgresql+asyncpg://db/llm"),
        ("postgresql:///llm?host=a:5432&host=b:5433", "postgresql+asyncpg:///llm"),
        ("postgresql:///llm?host=a,b&port=5432,5433", "postgresql+asyncpg:///llm"),
        ("postgresql://bücher.example:65535/llm", "postgresql+asyncpg://bücher.example:65535/llm"),
    ],
)
def test_usual_urls_are_understood_and_shown_without_a_password(url: str, shown: str):
    assert shown == Database(url).name


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://anna:can@ary@db/llm",
        "postgresql://anna:can@ary:canary@db/llm",
        "postgresql://anna:c:anary@db:canary/llm",
        "postgresql://anna:pass@canary/canary@db/llm",
        "postgresql://anna:pass@canary/x?canary@db/llm",
        "postgresql://anna/canary@db/llm",
        "postgresql://anna:canary@[::1/llm",
        "postgresql://anna:canary@db/llm?canary=1",
        "postgresql://anna:x@db/llm?sslmode=canary",
        "postgresql://anna:x@db/llm?port=canary",
        "postgresql://anna:x@db/llm?password=can@ary",
        "postgresql://anna:x@db:99999/canary",
        "postgresql://anna:x@db/canary?port=65536",
        "postgresql://anna:x@db/llm?host=a:canary&host=b:5432",
        "postgresql://anna:x@db/llm?host=a&host=canary",
        "postgresql://anna:x@db/llm?host=a:5432&port=canary",
        "postgresql://anna:x@canary..example/llm",
        f"postgresql://anna:x@canary{'x' * 60}/llm",
        "postgresql://anna:x@db/llm?options=-c%20canary",
        "host=db password=canary",
        "postgresql:anna:canary@db/llm",
        "postgresql//anna:canary@db/llm",
        "anna:canary@db/llm",
        "mysql://anna:canary@db/llm",
        "canary",
        "sqlite://anna:canary@/data/service.db",
        "sqlite:///data/service.db?key=canary",
    ],
)
def test_a_url_that_is_not_clear_stops_the_start_and_shows_nothing_of_itself(url: str):
    """However a password was written into it; the refusal names the setting, and has no cause that would be printed."""
    with pytest.raises(ConfigError, match=r"database\.url") as refused:
        Database(url)

    assert "ary" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_what_a_server_says_of_a_secret_is_not_repeated():
    """A server quotes the user's name, which may be a token."""
    url = parse_database_url("postgresql://canary-token@db/llm")

    assert 'no role "***"' == without_secrets(url, 'no role "canary-token"')
    assert "no ***" == without_secrets(parse_database_url("postgresql://db/llm?password=canary"), "no canary")


@pytest.mark.parametrize("url", ["", "data/service.db", "mysql://db/llm", "sqlite://", "sqlite:///:memory:"])
def test_anything_else_stops_the_start_with_the_key(url: str):
    """A database in memory would lose every key with the process."""
    with pytest.raises(ConfigError, match=r"database\.url"):
        Database(url)


async def test_rows_whose_model_was_never_known_become_null(tmp_path: Path):
    """Earlier versions wrote an empty name for them; the indexes and the other rows stay."""
    database = Database(f"sqlite:///{tmp_path / 'service.db'}")
    await database.migrate()
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).with_name("migrations")))
    values = {
        "created": datetime(2026, 11, 1, tzinfo=UTC),
        "request_id": "r",
        "key_id": "k",
        "route": "/",
        "status": 200,
    }
    values |= dict.fromkeys(("prompt_tokens", "completion_tokens", "charged_tokens", "latency_ms"), 0) | {
        "cached": False
    }

    def downgrade_and_write(connection: Connection) -> None:
        config.attributes["connection"] = connection
        command.downgrade(config, "0002")
        connection.execute(insert(inference_log), [values | {"model": name} for name in ("", "m")])

    async with database.begin(database_module.MIGRATION_SECONDS) as connection:
        await connection.run_sync(downgrade_and_write)
    await database.migrate()

    async with database.read() as connection:
        models = (await connection.execute(select(inference_log.c.model).order_by(inference_log.c.id))).scalars().all()
        indexes = await connection.run_sync(lambda each: inspect(each).get_indexes("inference_log"))
    await database.close()
    assert [None, "m"] == models
    assert {"ix_inference_log_created", "ix_inference_log_key_id_created"} == {index["name"] for index in indexes}


async def test_what_a_request_reads_waits_for_no_writer(tmp_path: Path):
    """Neither for another process that writes, nor for a short transaction of this one."""
    database = Database(f"sqlite:///{tmp_path / 'a.db'}", wait_seconds=0.5)
    await database.migrate()

    def name(connection: Connection) -> str:
        return str(connection.scalar(text("SELECT name FROM roles WHERE name = 'admin'")))

    try:
        with closing(sqlite3.connect(tmp_path / "a.db", isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            waiting = asyncio.create_task(database.run_in_transaction(name))
            assert "admin" == await database.read_in_transaction(name)
            assert not waiting.done()
            writer.execute("ROLLBACK")
        assert "admin" == await waiting
    finally:
        await database.close()


@pytest.mark.parametrize("between", [0.0, 0.05])
async def test_a_transaction_that_is_cancelled_twice_leaves_nothing_behind(tmp_path: Path, between: float):
    """As a time limit and the end of the service may; the loop could otherwise not be closed."""
    database = Database(f"sqlite:///{tmp_path / 'service.db'}")
    await database.migrate()
    before = asyncio.all_tasks()

    async def transaction() -> None:
        async with database.begin() as connection:
            await connection.execute(text("SELECT 1"))

    with closing(sqlite3.connect(tmp_path / "service.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        tasks = [asyncio.create_task(transaction()) for _ in range(3)]
        for pause in (0.1, between):
            await asyncio.sleep(pause)
            for task in tasks:
                task.cancel()
        await asyncio.wait(tasks)
    await transaction()
    await database.close()

    assert all(task.cancelled() for task in tasks)
    assert before == asyncio.all_tasks()
