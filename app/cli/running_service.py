"""The connection of commands to the running service: its address, the key, and what its refusals look like."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer

from app.access.bootstrap_key import KEY_FILE
from app.cli.terminal import existing, fail
from app.config import Settings, load_settings
from app.errors import ConfigError

KEY_VARIABLE = "LLM_SERVICE_API_KEY"
CONNECT_SECONDS = 5.0

UrlOption = Annotated[
    str | None, typer.Option(help="Where the service listens; the configured address if left out.", show_default=False)
]


@contextmanager
def connect(config: Path, url: str | None) -> Iterator[httpx.Client]:
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


def checked(response: httpx.Response) -> httpx.Response:
    """Return a response that is none of an error; any other ends the command with its message."""
    if not response.is_success:
        of_service = response.headers.get("content-type", "").startswith("application/json")
        refuse(response.json() if of_service else {"message": f"the answer was {response.status_code}"})
    return response


def refuse(envelope: Mapping[str, Any]) -> NoReturn:
    fail(str(envelope.get("message", "the service refused")), 1)
