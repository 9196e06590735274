"""`python -m app keys`: API keys, created, listed, revoked and rotated on the service's own database."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from app.access.database import Database
from app.access.keys import KeyRecord, KeyStore
from app.access.limits import LimitSettings
from app.cli.limits import limit_values, with_limit_options
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, print_json, show, with_database

cli = typer.Typer(no_args_is_help=True, help="API keys.")

_PAGE = 200
MAX_DAYS = 36_600
"""A hundred years, as over HTTP; Python's calendar ends with the year 9999."""

KeyArgument = Annotated[str, typer.Argument(help="The key's id: what stands between the first two underscores.")]


@cli.command()
@with_limit_options(after="days")
def create(
    role: Annotated[str, typer.Option(help="What the key may do: see `roles list`.")] = "standard",
    owner: Annotated[
        str | None, typer.Option(help="Whose sessions and cached responses it uses; its own if left out.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0.001, max=MAX_DAYS, help="It expires after so many days.")] = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
    **limits: str | None,
) -> None:
    """Create a key and print it, this one time; limits that are not named are its role's."""
    own = LimitSettings(**limit_values(limits))

    async def work(database: Database) -> None:
        expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
        record, key = await KeyStore(database).create(role=role, owner=owner, limits=own, expires=expires)
        _print_secret(record, key, as_json=as_json)

    with_database(config, work)


@cli.command("list")
def list_keys(
    role: Annotated[str | None, typer.Option(help="Only keys of this role.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only keys of this owner.")] = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """List the keys in the order of their creation."""

    async def work(database: Database) -> None:
        store, after, rows = KeyStore(database), None, []
        while page := await store.list(limit=_PAGE, after=after, role=role, owner=owner):
            rows += [_row(record) for record in page]
            after = page[-1].id
        show(rows, title="API keys", as_json=as_json)

    with_database(config, work)


@cli.command()
def revoke(key_id: KeyArgument, config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """End a key for good; a running service refuses it within five seconds."""

    async def work(database: Database) -> None:
        record = await KeyStore(database).revoke(key_id)
        if as_json:
            print_json(_row(record))
        else:
            typer.echo(f"The key {key_id} is revoked; running services refuse it within five seconds.")

    with_database(config, work)


@cli.command()
def rotate(
    key_id: KeyArgument,
    overlap_hours: Annotated[float, typer.Option(min=0, max=720, help="How long the old secret stays good.")] = 1,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Give a key a new secret and print it, this one time."""

    async def work(database: Database) -> None:
        record, key = await KeyStore(database).rotate(key_id, timedelta(hours=overlap_hours))
        _print_secret(record, key, as_json=as_json)

    with_database(config, work)


def _row(record: KeyRecord) -> dict[str, Any]:
    state = "active" if record.valid_at(datetime.now(UTC)) else "revoked" if record.revoked else "expired"
    limits = {name: value for name, value in asdict(record.limits).items() if value is not None}
    return {
        "id": record.id,
        "state": state,
        "ends_in": record.last_four,
        "role": record.role,
        "owner": record.owner,
        "own_limits": limits or None,
        "created": record.created,
        "expires": record.expires,
        "last_used": record.last_used,
    }


def _print_secret(record: KeyRecord, key: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"key": key, **_row(record)})
    else:
        typer.echo(f"{key}\n\nKeep it now: it is not shown again.  Role {record.role}, id {record.id}.")
