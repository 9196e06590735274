"""`python -m app db`: the database's schema and its copies."""

from pathlib import Path
from typing import Annotated

import typer

from app.access.database import Database, head_revision
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, fail, print_json, with_database

cli = typer.Typer(no_args_is_help=True, help="The database: its schema, its state, copies of it.")


@cli.command()
def upgrade(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """Bring the schema up to date, as the service does when it starts."""

    async def work(database: Database) -> None:
        await database.migrate()
        _print_revision(database, await database.revision(), as_json=as_json)

    with_database(config, work, ready=False)


@cli.command()
def current(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """Say which revision the database is at and which this program needs."""

    async def work(database: Database) -> None:
        _print_revision(database, await database.revision() if database.exists() else None, as_json=as_json)

    with_database(config, work, ready=False)


@cli.command()
def check(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """Fail unless the schema is this program's and the database whole."""

    async def work(database: Database) -> None:
        problems = await database.problems()
        if problems:
            fail(f"the database {database.name} is damaged: {'; '.join(problems)}", 1)
        _print_revision(database, await database.revision(), as_json=as_json)

    with_database(config, work)


@cli.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where the copy is written; must not exist.")],
    config: ConfigOption = CONFIG,
) -> None:
    """Write a consistent copy of the SQLite database, while a service runs on it or not."""

    async def work(database: Database) -> None:
        if not database.sqlite:
            fail(f"the database is {database.where}: use pg_dump")
        if not database.exists():
            fail(f"there is no database {database.name}", 1)
        try:
            await database.copy_to(file)
        except OSError as error:
            fail(f"{file} cannot be written: {error.strerror}", 1)
        typer.echo(f"{file}: {file.stat().st_size / 1e6:.1f} MB")

    with_database(config, work, ready=False)


def _print_revision(database: Database, revision: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json({"database": database.name, "revision": revision, "newest": head_revision()})
    else:
        typer.echo(f"{database.name}: revision {revision or 'none'}, newest {head_revision()}")
