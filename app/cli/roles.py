"""`python -m app roles`: what keys may do and how much."""

from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from app.access.database import Database
from app.access.limits import NOTHING_SAID
from app.access.roles import Role, RoleStore
from app.cli.limits import limit_values, with_limit_options
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, show, with_database
from app.errors import RoleNotFound
from app.types import Rights

cli = typer.Typer(no_args_is_help=True, help="Roles: what keys may do and how much.")


@cli.command("list")
def list_roles(config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """List the roles; a dash is a limit that the configuration decides."""

    async def work(database: Database) -> None:
        show([_row(role) for role in await RoleStore(database).list()], title="Roles", as_json=as_json)

    with_database(config, work)


@cli.command("set")
@with_limit_options(after="name")
def set_role(
    name: Annotated[str, typer.Argument(help="The role; created if there is none of this name.")],
    models: Annotated[
        str | None, typer.Option(help="Models that it may use, with commas between; all, or none.")
    ] = None,
    load_models: Annotated[bool | None, typer.Option(help="May load and unload models.")] = None,
    manage_keys: Annotated[bool | None, typer.Option(help="May manage keys and roles.")] = None,
    system_messages: Annotated[bool | None, typer.Option(help="May send system messages.")] = None,
    raw_logprobs: Annotated[bool | None, typer.Option(help="May ask for log-probabilities.")] = None,
    control_tokens: Annotated[
        bool | None, typer.Option(help="May send control tokens by their ids, if it may send system messages.")
    ] = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
    **limits: str | None,
) -> None:
    """Change what is named of a role, and leave the rest; it holds for running services within five seconds."""
    values = limit_values(limits)
    flags = {
        "load_models": load_models,
        "manage_keys": manage_keys,
        "system_messages": system_messages,
        "raw_logprobs": raw_logprobs,
        "control_tokens": control_tokens,
    }
    rights: dict[str, Any] = {right: flag for right, flag in flags.items() if flag is not None}
    if models is not None:
        listed = tuple(part.strip() for part in models.split(",") if part.strip())
        rights["models"] = {"all": None, "none": ()}.get(models, listed)

    async def work(database: Database) -> None:
        store = RoleStore(database)
        try:
            before = await store.read(name)
        except RoleNotFound:
            before = Role(name=name, limits=NOTHING_SAID, rights=Rights())
        role = replace(before, limits=replace(before.limits, **values), rights=replace(before.rights, **rights))
        await store.put(role)
        show([_row(role)], title="Role", as_json=as_json)

    with_database(config, work)


def _row(role: Role) -> dict[str, Any]:
    models = "all" if role.rights.models is None else role.rights.models or "none"
    return {"name": role.name, **asdict(role.limits), **asdict(role.rights), "models": models}
