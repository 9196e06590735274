"""The schema and the connection, on both databases."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, delete, func, select, text

from app.access.database import Database, head_revision
from app.access.keys import KeyStore
from app.access.tables import metadata, roles
from app.errors import ConfigError, StoreUnavailable

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
