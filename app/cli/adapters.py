"""`python -m app adapters`: LoRA adapters of a running service, loaded, unloaded and listed over its API."""

from typing import Annotated, Any

import typer

from app.cli.running_service import UrlOption, checked, connect
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, print_json, show

cli = typer.Typer(no_args_is_help=True, help="LoRA adapters of a running service.")

SHOWN = "adapter_name state model source rank problem".split()

NameArgument = Annotated[str, typer.Argument(help="The name that requests use.")]


@cli.command("list")
def list_adapters(url: UrlOption = None, config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """List the adapters: loaded, those that come with their model, and those that it could not be loaded with."""
    with connect(config, url) as client:
        adapters: list[dict[str, Any]] = checked(client.get("/v1/adapters")).json()["adapters"]
    rows = adapters if as_json else [{name: adapter[name] for name in SHOWN} for adapter in adapters]
    show(rows, title="adapters", as_json=as_json)


@cli.command()
def load(
    name: NameArgument,
    source: Annotated[str, typer.Argument(help="A folder below adapters.roots.")],
    model: Annotated[str | None, typer.Option(help="The model that it is for; the default one if left out.")] = None,
    url: UrlOption = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Load an adapter of a model of the running service."""
    body = {"adapter_name": name, "source": source} | ({} if model is None else {"model": model})
    with connect(config, url) as client:
        loaded = checked(client.post("/v1/adapters/load", json=body)).json()
    if as_json:
        print_json(loaded)
    else:
        typer.echo(f"{name} is loaded for {loaded['model']} (rank {loaded['rank']}).")


@cli.command()
def unload(
    name: NameArgument, url: UrlOption = None, config: ConfigOption = CONFIG, as_json: JsonOption = False
) -> None:
    """Unload an adapter once its running requests have ended."""
    with connect(config, url) as client:
        unloaded = checked(client.post("/v1/adapters/unload", json={"adapter_name": name})).json()
    if as_json:
        print_json(unloaded)
    else:
        typer.echo(f"{name} is unloaded.")
