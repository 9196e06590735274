"""`python -m app models`: models of a running service, loaded, unloaded and listed over its API."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from app.access.bootstrap_key import KEY_FILE
from app.cli.terminal import CONFIG, ConfigOption, JsonOption, existing, fail, print_json, show
from app.config import Settings, load_settings
from app.errors import ConfigError

cli = typer.Typer(no_args_is_help=True, help="Models of a running service.")

KEY_VARIABLE = "LLM_SERVICE_API_KEY"
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGINGFACE_TOKEN")
CONNECT_SECONDS = 5.0
SHOWN = "name state device dtype memory_bytes running waiting requests last_error".split()

UrlOption = Annotated[
    str | None, typer.Option(help="Where the service listens; the configured address if left out.", show_default=False)
]
NameArgument = Annotated[str, typer.Argument(help="The name that requests use.")]


@cli.command("list")
def list_models(url: UrlOption = None, config: ConfigOption = CONFIG, as_json: JsonOption = False) -> None:
    """List the models of the service: loaded, being loaded, and those that a request can have loaded."""
    with _client(config, url) as client:
        models: list[dict[str, Any]] = _checked(client.get("/status")).json()["models"]
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
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="none or a method, see docs/models.md.")] = None,
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
        "device": device,
        "dtype": dtype,
        "quantization": quantization,
        "hf_token": _hub_token() if hub_token else None,
    }
    body = {"model_name": model, "replace": replace, "stream": True}
    body |= {name: value for name, value in given.items() if value is not None}
    with _client(config, url) as client, client.stream("POST", "/v1/models/load", json=body) as response:
        if response.status_code != httpx.codes.OK:
            response.read()
        loaded = _follow(_events(_checked(response)), quiet=as_json)
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
    with _client(config, url) as client:
        unloaded = _checked(client.post("/v1/models/unload", json=body)).json()
    if as_json:
        print_json(unloaded)
    else:
        typer.echo(f"{model} is unloaded.")


@contextmanager
def _client(config: Path, url: str | None) -> Iterator[httpx.Client]:
    """Give a client of the service; whatever goes wrong with the connection ends the command."""
    try:
        settings = load_settings(existing(config))
    except ConfigError as error:
        fail(str(error))
    base = url or _address(settings)
    # A load takes as long as it takes; the stream tells that it goes on.
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    try:
        with httpx.Client(base_url=base, headers={"X-API-Key": _key(settings)}, timeout=timeout) as client:
            yield client
    except httpx.ConnectError:
        fail(f"no service answers at {base}; start it, or name its address by --url", 1)
    except httpx.HTTPError as error:
        fail(f"the connection to {base} broke off ({type(error).__name__})", 1)


def _address(settings: Settings) -> str:
    host = settings.app.host
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host  # noqa: S104
    return f"http://{reached}:{settings.app.port}"


def _key(settings: Settings) -> str:
    """Return the key: of the environment, of the configuration, or the one that the first start made."""
    if given := os.environ.get(KEY_VARIABLE):
        return given
    if settings.security.api_key is not None:
        return settings.security.api_key.get_secret_value()
    file = settings.app.data_dir / KEY_FILE
    if not file.is_file():
        fail(f"there is no API key; set {KEY_VARIABLE}")
    return file.read_text().strip()


def _hub_token() -> str:
    token = next((value for name in TOKEN_VARIABLES if (value := os.environ.get(name))), None)
    return token or fail(f"--hub-token needs {TOKEN_VARIABLES[0]} in the environment")


def _checked(response: httpx.Response) -> httpx.Response:
    """Return a response that is none of an error; any other ends the command with its message."""
    if not response.is_success:
        of_service = response.headers.get("content-type", "").startswith("application/json")
        _refused(response.json() if of_service else {"message": f"the answer was {response.status_code}"})
    return response


def _refused(envelope: Mapping[str, Any]) -> NoReturn:
    fail(str(envelope.get("message", "the service refused")), 1)


def _events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the events of a stream."""
    name = ""
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def _follow(events: Iterator[tuple[str, dict[str, Any]]], *, quiet: bool) -> dict[str, Any]:
    """Show the progress of a load as a bar, and return the model's state at its end."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    name, data = "", dict[str, Any](message="the service ended before the model was loaded")
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task("waiting", total=None)
        for name, data in events:
            if name == "progress":
                done, total = data["bytes_done"], data["bytes_total"]
                bar.update(task, description=data["stage"], completed=done or 0, total=total)
    return data if name == "done" else _refused(data)
