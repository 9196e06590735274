"""`python -m app sessions`: the conversations of one key on a running service, over its API.

Nobody sees another key's: an administrator's key has conversations of its own and no way into those of others.
"""

from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.text import Text

from app.cli.running_service import KEY_VARIABLE, UrlOption, checked, connect
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, print_json, printable, show

cli = typer.Typer(no_args_is_help=True, help=f"Sessions of a running service: those of the key in {KEY_VARIABLE}.")

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The session_id of its requests.")]


def _path(session_id: str) -> str:
    return f"/v1/sessions/{quote(session_id, safe='')}"


@cli.command("list")
def list_sessions(url: UrlOption = None, config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """List the sessions, the one that was used last first."""
    with connect(config, url) as client:
        rows: list[dict[str, Any]] = checked(client.get("/v1/sessions")).json()["sessions"]
    show(rows, title="sessions", as_json=as_json)


@cli.command("show")
def show_session(
    session_id: IdArgument, url: UrlOption = None, config: ConfigOption = CONFIG, as_json: JsonOption = False
) -> None:
    """Show the messages of a session."""
    with connect(config, url) as client:
        session = checked(client.get(_path(session_id))).json()
    if as_json:
        print_json(session)
        return
    for message in session["messages"]:
        # As text and not as markup: what models and people write may hold brackets, or steer a terminal.
        content = printable(message["content"] or "", also="\n")
        Console(soft_wrap=True).print(Text(f"{message['role']}: ", "bold"), Text(content), sep="")


@cli.command()
def rename(
    session_id: IdArgument,
    title: Annotated[str, typer.Argument(help="Up to 200 characters.")],
    url: UrlOption = None,
    config: ConfigOption = CONFIG,
) -> None:
    """Give a session a title."""
    with connect(config, url) as client:
        checked(client.patch(_path(session_id), json={"title": title}))
    typer.echo(f"{session_id} has a title.")


@cli.command()
def delete(session_id: IdArgument, url: UrlOption = None, config: ConfigOption = CONFIG) -> None:
    """Forget a session."""
    with connect(config, url) as client:
        checked(client.delete(_path(session_id)))
    typer.echo(f"{session_id} is forgotten.")
