"""`python -m app models`: models of a running service, loaded, unloaded and listed over its API."""

import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from app.cli.running_service import UrlOption, checked, connect, refuse
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, fail, print_json, show

cli = typer.Typer(no_args_is_help=True, help="Models of a running service.")

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGINGFACE_TOKEN")
SHOWN = "name state device dtype memory_bytes running waiting requests last_error".split()

NameArgument = Annotated[str, typer.Argument(help="The name that requests use.")]


@cli.command("list")
def list_models(url: UrlOption = None, config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """List the models of the service: loaded, being loaded, and those that a request can have loaded."""
    with connect(config, url) as client:
        models: list[dict[str, Any]] = checked(client.get("/status")).json()["models"]
    rows = models if as_json else [{name: model[name] for name in SHOWN} for model in models]
    show(rows, title="models", as_json=as_json)


@cli.command()
def load(
    model: Annotated[
        str, typer.Argument(help="A configured model, or with --source a hub id, folder or registry URI.")
    ],
    source: Annotated[str | None, typer.Option(help="hub, local or mlflow.")] = None,
    served_name: Annotated[str | None, typer.Option(help="The name that requests use.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag on the hub.")] = None,
    engine: Annotated[str | None, typer.Option(help="auto, batching, serial or echo.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="none or a method, see docs/models.md.")] = None,
    task: Annotated[
        str | None, typer.Option(help="generate, or embed for an encoder; what a folder's files say if left out.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of the model of this name.")] = False,
    hub_token: Annotated[
        bool, typer.Option("--hub-token", help="Send HF_TOKEN of the environment for this load, for a gated model.")
    ] = False,
    url: UrlOption = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Load a model into the running service, and show how far it has come."""
    given = {
        "source": source,
        "served_name": served_name,
        "revision": revision,
        "engine": engine,
        "device": device,
        "dtype": dtype,
        "quantization": quantization,
        "task": task,
        "hf_token": _hub_token() if hub_token else None,
    }
    body = {"model_name": model, "replace": replace, "stream": True}
    body |= {name: value for name, value in given.items() if value is not None}
    with connect(config, url) as client, client.stream("POST", "/v1/models/load", json=body) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
        loaded = _follow(model, _events(checked(response)), quiet=as_json)
    if as_json:
        print_json(loaded)
    else:
        typer.echo(f"{loaded['name']} is loaded on {loaded['device']} ({loaded['dtype']}).")


@cli.command()
def unload(
    model: NameArgument,
    grace_seconds: Annotated[float | None, typer.Option(min=0, help="For running requests.")] = None,
    url: UrlOption = None,
    config: ConfigOption = CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Unload a model once its running requests have ended, or end its load."""
    body = {"model_name": model} | ({} if grace_seconds is None else {"grace_seconds": grace_seconds})
    with connect(config, url) as client:
        unloaded = checked(client.post("/v1/models/unload", json=body)).json()
    if as_json:
        print_json(unloaded)
    else:
        typer.echo(f"{model} is unloaded.")


def _hub_token() -> str:
    token = next((value for name in TOKEN_VARIABLES if (value := os.environ.get(name))), None)
    return token or fail(f"--hub-token needs {TOKEN_VARIABLES[0]} in the environment")


def _events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a stream."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _follow(model: str, events: Iterator[tuple[str, dict[str, Any]]], *, quiet: bool) -> dict[str, Any]:
    """Show the progress of a load as a bar, and return the model's state at its end."""
    # Late: most commands show none.
    from app.engine.base import LoadProgress
    from app.loading_display import load_bar

    name, data = "", dict[str, Any](message="the service ended before the model was loaded")
    with load_bar(model, Console(stderr=True), disable=quiet) as show_progress:
        for name, data in events:
            if name == "progress":
                show_progress(LoadProgress(data["stage"], data["bytes_done"], data["bytes_total"]))
    return data if name == "done" else refuse(data)
