"""The command line: `python -m app serve`.  Knows no routes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app import __version__
from app.config import load_settings
from app.errors import ConfigError

CONFIG = Path("config.yml")
"""Read where there is one; a file that was asked for has to be there."""

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@cli.callback()
def about() -> None:
    """An OpenAI-style backend for your own Hugging Face models."""


@cli.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@cli.command()
def serve(
    config: Annotated[Path, typer.Option(help="The configuration file.")] = CONFIG,
    host: Annotated[str | None, typer.Option(help="Address to listen on; wins over the configuration.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; wins over the configuration.")] = None,
) -> None:
    """Serve the configured model over HTTP until Ctrl-C."""
    # Late, because the command line must answer --help without importing the whole service.
    from app import server

    if config != CONFIG and not config.exists():
        typer.echo(f"llm-service: there is no file {config}", err=True)
        raise typer.Exit(2)
    listen: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    try:
        settings = load_settings(config, app=listen)
        code = server.run(settings)
    except ConfigError as error:
        typer.echo(f"llm-service: {error}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def main() -> None:
    """Run the command line; the entry point of the installed script."""
    cli()
