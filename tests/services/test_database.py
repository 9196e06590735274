"""The schema and the connection, on both databases."""

import asyncio
import os
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Connection, delete, event, func, select, text

from app.access import tables
from app.access.background import BackgroundGroup
from app.access.database import WAIT_SECONDS, Database, head_revision
from app.access.keys import KeyRecord, KeyStore
from app.access.ledger import Month, balance
from app.access.limits import NOTHING_SAID
from app.access.roles import Role, RoleStore
from app.access.tables import metadata, roles
from app.access.usage_log import UsageLog
from app.config import UsageLogConfig
from app.errors import ConfigError, Conflict, RoleNotFound, StoreUnavailable
from app.types import InferenceRecord, Rights
from tests.services.postgres import Postgres

ROOT = Path(__file__).parents[2]


async def test_of_four_processes_that_start_at_once_one_migrates(url: str):
    """The others wait and find it done; nothing is made twice."""
    environment = os.environ | {"DATABASE_URL": url, "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "app", "db", "upgrade")
    running = [await asyncio.create_subprocess_exec(*command, env=environment, stdout=-1, stderr=-2) for _ in range(4)]
    said = [(await process.communicate())[0].decode() for process in running]

    assert [0] * 4 == [process.returncode for process in running], said
    database = Database(url)
    async with database.begin() as connection:
        assert 3 == await connection.scalar(select(func.count()).select_from(roles))
        assert [head_revision()] == list((await connection.execute(text("SELECT * FROM alembic_version"))).scalars())
    await database.close()


async def test_a_start_waits_for_another_one_that_migrates_for_long(tmp_path: Path):
    """Longer than a request waits for the file: on a busy machine a migration takes seconds."""
    path = tmp_path / "service.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    database = Database(f"sqlite:///{path}", wait_seconds=0.1)

    migration = asyncio.create_task(database.migrate())
    await asyncio.sleep(1.5 * WAIT_SECONDS)
    assert not migration.done()
    other.execute("COMMIT")
    other.close()
    await migration

    assert head_revision() == await database.revision()
    await database.close()


async def test_the_migrations_make_the_tables_that_the_program_knows(database: Database):
    """Alembic finds no difference between the two."""

    def differences(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async with database.begin() as connection:
        assert [] == await connection.run_sync(differences)


async def test_a_database_newer_than_the_program_is_refused(database: Database):
    """It may hold what this program would not understand."""
    async with database.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(ConfigError, match="newer"):
        await database.migrate()


@pytest.mark.services
async def test_a_database_that_says_nothing_stops_the_start_with_a_line(postgres: Postgres, postgres_url: str):
    """It accepts connections, as one behind a proxy or on a machine that swaps; the driver's error has no text."""
    database = Database(postgres_url, wait_seconds=0.3)
    with postgres.stalled(), pytest.raises(ConfigError, match=r"cannot be used: it does not answer in time"):
        await database.migrate()
    await database.close()


async def test_a_transaction_that_fails_leaves_nothing(database: Database):
    """And the database's error is one of ours, which says nothing of the statement."""

    async def fail_halfway() -> None:
        async with database.begin() as connection:
            await connection.execute(delete(roles).where(roles.c.name == "free"))
            await connection.execute(text("SELECT nonsense"))

    with pytest.raises(StoreUnavailable) as refused:
        await fail_halfway()

    assert "nonsense" not in refused.value.message
    async with database.begin() as connection:
        assert 3 == await connection.scalar(select(func.count()).select_from(roles))


async def test_a_first_key_is_adopted_once_and_stays_revoked(database: Database):
    """Each start brings it again."""
    store = KeyStore(database)
    record, key = await store.create(role="admin")
    await store.revoke(record.id)

    again, _ = await store.create(role="standard", key=key)

    assert again.revoked is not None
    assert "admin" == again.role


async def test_a_database_of_the_first_revision_loses_nothing_that_was_used(url: str):
    """Counters and log of a configured key move to its one id, everybody else's stay; stored responses go."""
    database = Database(url)
    async with database.begin(60) as connection:
        await connection.run_sync(_upgrade_to_first)
        await connection.run_sync(_fill)
    before = await database.revision()
    await database.migrate()

    async with database.read() as connection:
        counters = (await connection.execute(text("SELECT key_id, month, used, reserved FROM usage_counters"))).all()
        log = (await connection.execute(text("SELECT key_id, charged_tokens FROM inference_log"))).all()
        responses = await connection.scalar(text("SELECT count(*) FROM completion_cache"))
        rights = (await connection.execute(text("SELECT name, control_tokens FROM roles"))).all()
        reservations = (await connection.execute(text("SELECT id, key_id FROM reservations"))).all()
    renewed = await balance(database, Month("admin", "2026-11"))
    await database.close()

    assert "0001" == before
    assert {
        ("rowRow12", "2026-11", 7, 0),
        ("admin", "2026-11", 111, 5),
        ("admin", "2026-10", 20, 0),
        ("oldForm1", "2026-11", 0, 3),
    } == {tuple(row) for row in counters}
    assert {("rowRow12", 7), ("admin", 1), ("admin", 10), ("admin", 100)} == {tuple(row) for row in log}
    assert 0 == responses
    assert {("admin", True), ("standard", True), ("free", False), ("team", False)} == {
        (name, bool(allowed)) for name, allowed in rights
    }
    assert [("r1", "oldForm1")] == [tuple(row) for row in reservations]
    assert (111, 5) == (renewed.used, renewed.reserved)


def _upgrade_to_first(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "app" / "access" / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "0001")


def _fill(connection: Connection) -> None:
    """Write what a service has whose configured key had two forms, `oldForm1` and `oldForm2`, and then none of ours."""
    digest, moment = b"d" * 32, datetime(2026, 11, 30)  # noqa: DTZ001  # as it is stored
    statements: list[tuple[str, list[dict[str, object]]]] = [
        (
            "INSERT INTO api_keys (id, digest, last_four, role, created)"
            " VALUES (:id, :digest, 'abcd', 'free', :moment)",
            [{"id": "rowRow12", "digest": digest, "moment": moment}],
        ),
        (
            "INSERT INTO roles (name, load_models, manage_keys, system_messages, raw_logprobs)"
            " VALUES (:name, :no, :no, :no, :no)",
            [{"name": "team", "no": False}],
        ),
        (
            "INSERT INTO usage_counters VALUES (:key, :month, :used, :reserved)",
            [
                {"key": "rowRow12", "month": "2026-11", "used": 7, "reserved": 0},
                {"key": "admin", "month": "2026-11", "used": 1, "reserved": 5},
                {"key": "oldForm1", "month": "2026-11", "used": 10, "reserved": 3},
                {"key": "oldForm2", "month": "2026-11", "used": 100, "reserved": 0},
                {"key": "oldForm2", "month": "2026-10", "used": 20, "reserved": 0},
            ],
        ),
        (
            "INSERT INTO reservations VALUES (:id, :key, '2026-11', 3, :moment)",
            [{"id": "r1", "key": "oldForm1", "moment": moment}],
        ),
        (
            "INSERT INTO inference_log (created, request_id, key_id, route, model, prompt_tokens, completion_tokens,"
            " charged_tokens, cached, status, latency_ms)"
            " VALUES (:moment, 'r', :key, '/v1/chat', 'm', 1, 1, :charged, :no, 200, 1.0)",
            [
                {"moment": moment, "key": key, "charged": charged, "no": False}
                for key, charged in (("rowRow12", 7), ("admin", 1), ("oldForm1", 10), ("oldForm2", 100))
            ],
        ),
        (
            "INSERT INTO completion_cache VALUES (:key, :answer, :moment)",
            [{"key": digest, "answer": b"old", "moment": moment}],
        ),
    ]
    for statement, rows in statements:
        connection.execute(text(statement), rows)


async def test_a_name_of_another_server_holds_up_no_row_of_the_log(database: Database, background: BackgroundGroup):
    """However long it is, and with a character that Postgres does not store."""

    async def mask(text: str, *, cut: bool = False) -> str:
        return text

    lost = list[int]()
    log = UsageLog(database, UsageLogConfig(flush_seconds=0.01), mask=mask, on_drop=lost.append)
    log.start(background)
    common: dict[str, Any] = {"created": datetime.now(UTC), "key_id": "key", "route": "/v1/completions", "model": "m"}
    common |= {"prompt_tokens": 1, "completion_tokens": 1, "charged_tokens": 2, "counted": False, "cached": False}
    common |= {"adapter": None, "finish_reason": None, "status": 200, "first_token_ms": None, "latency_ms": 1.0}
    for request_id, revision in (("a", "long" * 100), ("b", "null\x00"), ("c", "plain")):
        log.write(InferenceRecord(request_id=request_id, revision=revision, **common))
    await log.close()
    async with database.read() as connection:
        columns = (tables.inference_log.c.request_id, tables.inference_log.c.revision)
        rows = (await connection.execute(select(*columns))).all()
    assert [("a", "long" * 64), ("b", "null"), ("c", "plain")] == sorted(tuple(row) for row in rows)
    assert (None, []) == (database.breaker.fault, lost)


async def test_the_last_use_of_many_keys_is_written_in_a_few_statements(database: Database):
    """One for each key would take longer than a transaction may, again and again."""
    keys, now = KeyStore(database), datetime.now(UTC)
    used = [(await keys.create(role="free"))[0].id for _ in range(2)]
    statements = list[str]()

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    others = {f"key{number}": now for number in range(2498)}
    await keys.used(others | dict.fromkeys(used, now))
    assert 3 == sum("last_used" in each for each in statements)
    assert [now, now] == [(await keys.read(key_id)).last_used for key_id in used]


async def test_no_key_is_left_with_a_role_that_is_deleted_at_the_same_moment(database: Database):
    keys, store = KeyStore(database), RoleStore(database)
    role = Role(name="guests", limits=NOTHING_SAID, rights=Rights())
    for _ in range(20):
        await store.put(role)
        created, deleted = await asyncio.gather(
            keys.create(role=role.name), store.delete(role.name), return_exceptions=True
        )
        match created, deleted:
            case (KeyRecord() as key, str()), Conflict():
                assert await keys.find(key.id) is not None
                await keys.change(key.id, {"role": "free"})
            case RoleNotFound(), None:
                pass
            case _:
                pytest.fail(f"{created!r}, {deleted!r}")
