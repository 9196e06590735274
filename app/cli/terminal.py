"""Shared by the commands: the database that they work on, and output for people and for programs."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.access.database import Database, head_revision
from app.config import load_settings
from app.errors import AppError, ConfigError, StoreUnavailable

CONFIG = Path("config.yml")
"""Read where there is one; a file that was asked for has to be there."""

ConfigOption = Annotated[Path, typer.Option(help="The configuration file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs, not a table for people.")]

_PLAIN_WIDTH = 200
"""Width of a table that goes to a file or a pipe, where there is no terminal to fit."""


def existing(config: Path) -> Path:
    """Return the file if it is there, or need not be."""
    if config != CONFIG and not config.exists():
        fail(f"there is no file {config}")
    return config


def fail(message: str, code: int = 2) -> NoReturn:
    """End the command with a message."""
    typer.echo(f"llm-service: {message}", err=True)
    raise typer.Exit(code)


def with_database(config: Path, work: Callable[[Database], Awaitable[None]], *, ready: bool = True) -> None:
    """Do something with the configured database, a service running on it or not.

    Args: ready: its schema must be this program's.
    """

    async def run() -> None:
        database = Database(load_settings(existing(config)).where_database, wait_seconds=10)
        try:
            if ready:
                await _require_schema(database)
            await work(database)
        except StoreUnavailable as error:
            fail(f"the database {database.name} does not answer: {database.reason_of(error)}", 1)
        finally:
            await database.close()

    try:
        asyncio.run(run())
    except ConfigError as error:
        fail(str(error))
    except AppError as error:
        fail(error.message, 1)


async def _require_schema(database: Database) -> None:
    if database.sqlite and not database.exists():
        fail(f"there is no database {database.name} yet; run: python -m app db upgrade, or start the service")
    revision = await database.revision()
    if revision is not None and revision > head_revision():
        fail(f"the database {database.name} is newer than this program; install the version that made it")
    if revision != head_revision():
        fail(
            f"the database {database.name} is at revision {revision or 'none'} and this program needs "
            f"{head_revision()}; run: python -m app db upgrade"
        )


def show(rows: Sequence[Mapping[str, Any]], *, title: str, as_json: bool) -> None:
    """Print rows of the same columns."""
    if as_json:
        print_json(list(rows))
        return
    if not rows:
        typer.echo(f"{title}: none")
        return
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        # As text and not as markup: a title that somebody wrote may hold brackets.
        table.add_row(*(Text(printable(_shown(value), also="\n")) for value in row.values()))
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(width=width).print(table)


def printable(text: str, *, also: str = "") -> str:
    """Return a text with question marks in the place of signs that a terminal obeys.  Args: also: signs that stay."""
    return "".join(sign if sign.isprintable() or sign in also else "?" for sign in text)


def print_json(value: Any) -> None:
    """Print a value for programs."""
    typer.echo(json.dumps(value, default=_plain, indent=2))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    return asdict(value)


def _shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
        case tuple() | list():
            return ", ".join(map(str, value))
    return str(value)
