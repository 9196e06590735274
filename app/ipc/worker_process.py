"""One worker process and the socket to it, for use on the event loop.

Decides the worker's environment; carries messages without looking into them.  `interpreter.py` has the process,
`WorkerLink` is the seam at which tests replace it.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, Self

import msgspec
import zmq

import app
from app.ipc.interpreter import Interpreter
from app.ipc.liveness import Pulse
from app.ipc.messages import FromWorker, ModelSpec, Start, ToWorker, decode_from_worker, encode
from app.ipc.spare_interpreters import SpareInterpreters

INHERITED_VARIABLES = frozenset(
    ["PATH", "HOME", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "VIRTUAL_ENV", "NO_PROXY", "no_proxy", "CXX"]
)
INHERITED_PREFIXES = (
    *("LC_", "HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "OMP_", "GOMP_", "KMP_"),
    *("MKL_", "OPENBLAS_", "LD_", "DYLD_", "SSL_CERT_", "REQUESTS_CA", "XDG_", "HTTP_PROXY", "HTTPS_PROXY"),
    *("http_proxy", "https_proxy", "COVERAGE_"),
)
"""Environment variables that a model may need.  The service's own settings and secrets are not among them."""
TOKEN_VARIABLES = frozenset(["HF_TOKEN", "HF_TOKEN_PATH", "HUGGINGFACE_TOKEN", "HUGGING_FACE_HUB_TOKEN"])


class WorkerLostError(Exception):
    """The worker has exited or is of no use; the message is for the operator."""


class WorkerLink(Protocol):
    """A running worker."""

    @property
    def pid(self) -> int | None:
        """Process id; None where there is no process."""

    def pulse(self) -> Pulse:
        """Return the signs of life that it has given so far."""

    def send(self, message: ToWorker) -> None:
        """Send a message without waiting; one to a dead worker is dropped."""

    async def receive(self) -> list[FromWorker]:
        """Wait for messages and return them in order.

        Raises: WorkerLostError: there will be no more.
        """

    def kill(self) -> None:
        """Kill the process; `receive` then raises."""

    async def stop(self, grace_seconds: float) -> None:
        """Wait for the process to exit, kill it if it does not, and release its socket and folder."""


class WorkerProcess:
    """A worker in a child process."""

    def __init__(self, interpreter: Interpreter, spec: ModelSpec, load_token: str | None = None) -> None:
        """Bind a socket in the interpreter's folder and tell it what to load; use `launch` instead."""
        self._interpreter = interpreter
        self._context = zmq.Context()
        self._inbox: list[FromWorker] = []
        self._messages = 0
        self._received = asyncio.Event()
        self._exit_reason: str | None = None
        self._loop = asyncio.get_running_loop()
        endpoint = f"ipc://{interpreter.folder}/channel"
        try:
            self._socket = self._context.socket(zmq.PAIR)
            # Never block the event loop; admission bounds what can pile up.
            self._socket.setsockopt(zmq.SNDHWM, 0)
            self._socket.bind(endpoint)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)
        self._exit_task = asyncio.create_task(self._watch(), name="worker socket")
        start = Start(endpoint=endpoint, folder=str(interpreter.folder), model=spec, hub_token=load_token)
        interpreter.write(msgspec.json.encode(start) + b"\n")

    @classmethod
    async def launch(
        cls,
        spec: ModelSpec,
        hub_token: str | None,
        interpreters: SpareInterpreters,
        *,
        load_token: str | None = None,
    ) -> Self:
        """Start a worker that loads `spec`.

        Args:
            hub_token: the configured one, which is in the environment.
            load_token: in its place for this start; stands in no environment and on no command line.
        Raises: OSError: no process could be started.
        """
        interpreter = await interpreters.take(worker_environment(os.environ, spec, hub_token))
        try:
            return cls(interpreter, spec, load_token)
        except zmq.ZMQError as error:
            await interpreter.stop(0)
            # The system's limit on such a path is about 100 bytes; TMPDIR decides most of it.
            raise OSError(error.errno, f"no socket in {interpreter.folder}: {error.strerror}") from None
        except BaseException:
            await interpreter.stop(0)
            raise

    @property
    def pid(self) -> int:
        return self._interpreter.pid

    def pulse(self) -> Pulse:
        pulse = self._interpreter.pulse()
        return Pulse(pulse.beats + self._messages, pulse.cpu_seconds, pulse.progress + self._messages)

    def send(self, message: ToWorker) -> None:
        with contextlib.suppress(zmq.Again):  # the peer has exited, which `receive` raises
            self._socket.send(encode(message), zmq.NOBLOCK)
        # zmq's descriptor is edge-triggered, and sending may have consumed an edge.
        self._loop.call_soon(self._read)

    async def receive(self) -> list[FromWorker]:
        while not self._inbox:
            if self._exit_reason is not None:
                raise WorkerLostError(self._exit_reason)
            self._received.clear()
            await self._received.wait()
        messages, self._inbox = self._inbox, []
        return messages

    def kill(self) -> None:
        self._interpreter.kill()

    async def stop(self, grace_seconds: float) -> None:
        try:
            await self._interpreter.stop(grace_seconds)
            await asyncio.wait([self._exit_task])
        finally:
            if not self._socket.closed:
                self._loop.remove_reader(self._descriptor)
                self._context.destroy(linger=0)

    async def _watch(self) -> None:
        code = await self._interpreter.wait()
        self._read()
        self._exit_reason = _exit_message(code)
        self._received.set()

    def _read(self) -> None:
        with contextlib.suppress(zmq.Again):
            while not self._socket.closed:
                self._inbox.append(decode_from_worker(self._socket.recv(zmq.NOBLOCK)))
                self._messages += 1
        if self._inbox:
            self._received.set()


def worker_environment(parent: Mapping[str, str], spec: ModelSpec, hub_token: str | None) -> dict[str, str]:
    """Return the worker's environment: what a model needs, the hub token for a hub model, and less library output."""
    environment = {
        name: value
        for name, value in parent.items()
        if (name in INHERITED_VARIABLES or name.startswith(INHERITED_PREFIXES)) and name not in TOKEN_VARIABLES
    }
    # Threads that spin for long while they wait take the cores from the API process; those that sleep at once are woken
    # too slowly for the hundreds of small operations of a step, which then takes twice as long.
    if "OMP_WAIT_POLICY" not in environment:
        environment = {"GOMP_SPINCOUNT": "8000", "KMP_BLOCKTIME": "0"} | environment
    environment |= {
        "PYTHONPATH": str(Path(next(iter(app.__path__))).parent),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "warning",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # The name that older releases of transformers had for it.
    if "TRANSFORMERS_CACHE" in environment and not environment.keys() & {"HF_HOME", "HF_HUB_CACHE"}:
        environment["HF_HUB_CACHE"] = environment["TRANSFORMERS_CACHE"]
    if spec.source == "local":
        environment |= {"HF_HUB_OFFLINE": "1"}
    elif hub_token is not None:
        environment |= {"HF_TOKEN": hub_token}
    return environment


def _exit_message(code: int) -> str:
    if code >= 0:
        return f"The model's worker ended with exit code {code}."
    name = signal.Signals(-code).name
    hint = {"SIGKILL": " (the system may have run out of memory)", "SIGVTALRM": " (a file took too long to read)"}
    return f"The model's worker was ended by {name}{hint.get(name, '')}."
