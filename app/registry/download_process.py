"""The child process that downloads one model: an order comes in as a line, progress and the outcome go out as lines.

So gigabytes pass beside the event loop that serves requests, what a registry describes is read by a process that serves
nobody, and a download ends when its parent does.  Credentials come by environment.
"""

import asyncio
import os
import sys
import threading
from pathlib import Path

import msgspec

from app.errors import AppError, ModelNotFound, ModelRefused, RegistryUnavailable
from app.registry.client import RegistryServer
from app.registry.download import Downloaded, Progress, download

USERNAME, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
"""The variables of MLflow's own client."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to download, and where to."""

    tracking_uri: str
    artifact_uri: str
    folder: str
    """Empty, and private to the parent and this process."""
    max_bytes: int
    timeout_seconds: float
    """For each part of a file."""
    total_seconds: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The download has failed; what it has written is for the parent to remove."""

    kind: str
    """The name of an error's class."""
    message: str


FAILURES: dict[str, type[AppError]] = {
    kind.__name__: kind for kind in (ModelNotFound, ModelRefused, RegistryUnavailable)
}
Outcome = Downloaded | Failed
decode_line = msgspec.json.Decoder[Progress | Downloaded | Failed](Progress | Downloaded | Failed).decode


def main() -> None:
    """Download what the first line of standard input says."""
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()
    _send(asyncio.run(_run(msgspec.json.decode(line, type=Order))))


async def _run(order: Order) -> Outcome:
    server = RegistryServer(
        tracking_uri=order.tracking_uri,
        timeout_seconds=order.timeout_seconds,
        username=os.environ.get(USERNAME),
        password=os.environ.get(PASSWORD),
        token=os.environ.get(TOKEN),
    )
    try:
        async with asyncio.timeout(order.total_seconds):
            return await download(
                server, order.artifact_uri, Path(order.folder), max_bytes=order.max_bytes, report=_send
            )
    except TimeoutError:
        message = f"The download took more than {order.total_seconds:g} s (mlflow.download_seconds)."
        return Failed(RegistryUnavailable.__name__, message)
    except AppError as error:
        return Failed(type(error).__name__, error.message)
    except OSError as error:
        return Failed(RegistryUnavailable.__name__, f"The files cannot be stored ({error.strerror}).")


def _send(message: Progress | Outcome) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def _exit_with_parent() -> None:
    # Not `sys.stdin`: a thread that holds its lock would keep the interpreter from ending in order.
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    main()
