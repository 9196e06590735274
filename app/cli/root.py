"""Defines `python -m app serve` and registers the other command groups."""

import sys
from typing import Annotated, Any

import typer

from app import __version__
from app.cli import adapters, db, keys, models, roles, sessions, usage
from app.cli.bench import bench
from app.cli.doctor import doctor
from app.cli.terminal import CONFIG, ConfigOption, existing
from app.config import load_settings
from app.errors import ConfigError
from app.garbage import imports_uncollected

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
cli.add_typer(keys.cli, name="keys")
cli.add_typer(roles.cli, name="roles")
cli.add_typer(models.cli, name="models")
cli.add_typer(adapters.cli, name="adapters")
cli.add_typer(sessions.cli, name="sessions")
cli.add_typer(db.cli, name="db")
cli.command("usage")(usage.usage)
cli.command("doctor")(doctor)
cli.command("bench")(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@cli.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """An OpenAI-style backend for your own Hugging Face models."""


@cli.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@cli.command()
def serve(
    config: ConfigOption = CONFIG,
    host: Annotated[str | None, typer.Option(help="Address to listen on; overrides the configuration.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; overrides the configuration.")] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR; overrides the configuration.")
    ] = None,
) -> None:
    """Serve the configured model over HTTP until Ctrl-C."""
    listen: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    logging = {} if log_level is None else {"level": log_level.upper()}
    try:
        settings = load_settings(existing(config), app=listen, logging=logging)
        # Imported late: neither --help nor a mistake in the configuration waits for the whole service.
        with imports_uncollected():
            from app import server

        code = server.run(settings)
    except ConfigError as error:
        typer.echo(f"llm-service: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; the entry point of the installed script."""
    cli()


def serve_only() -> None:
    """Run `serve` with the arguments of the script of that name."""
    cli(["serve", *sys.argv[1:]])
