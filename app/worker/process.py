"""The worker's one thread: it owns the model and the socket, and never does two things at once.

Decides when messages are read: between two tokens while there is work, and in a blocking poll while there is none.
Knows no way of making tokens; that is a `Runner`.
"""

import gc
import logging
import os
import signal
import time
from typing import NoReturn, Protocol

import torch
import zmq

from app.ipc.messages import (
    Cancel,
    Compiled,
    Exchange,
    FromWorker,
    LoadFailed,
    Loading,
    ModelSpec,
    Ready,
    Shutdown,
    Start,
    Step,
    Submit,
    TokenEvent,
    decode_to_worker,
    encode,
)
from app.types import SamplingParams
from app.worker.execution.executor_selection import accelerate
from app.worker.execution.kv_cache import UnsupportedModelError
from app.worker.execution.model_runner import make_row_model
from app.worker.execution.native.native_build import CompileError
from app.worker.execution.native.packed_linear import NativeLinear
from app.worker.execution.serial.serial_runner import SerialRunner
from app.worker.execution.torch.quantization import in_integers
from app.worker.execution.torch.weight_packing import pack_linears
from app.worker.loading.kv_memory import bytes_for_rows
from app.worker.loading.loader import LoadedModel, LoadError, load, load_reason
from app.worker.scheduling.batching_runner import BatchingRunner

log = logging.getLogger(__name__)

SILENCE_SECONDS = 1.0
"""A worker that works says so at least this often."""


class Runner(Protocol):
    """A way of making tokens for several requests on one model."""

    @property
    def name(self) -> str:
        """The word for it in `EngineInfo.engine`."""

    @property
    def slots(self) -> int:
        """Requests that run at once; more wait in the runner."""

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Fields of `SamplingParams` that it cannot honour."""

    @property
    def compiled(self) -> Compiled | None:
        """What was compiled for this machine."""

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""

    def submit(self, request: Submit) -> None:
        """Take a request; one that cannot run gets an error event in the next step."""

    def cancel(self, request_id: int) -> None:
        """End a request within a token, with an event; unknown ids are ignored."""

    def step(self, exchange: Exchange) -> None:
        """Work for a while, calling `exchange` after each token; an ordinary failure ends only its own request."""


class Worker:
    """The loop between the socket and a runner."""

    def __init__(self, socket: "zmq.Socket[bytes]", runner: Runner) -> None:
        self._socket = socket
        self._runner = runner
        self._leaving = False
        self._told_at = time.monotonic()
        self._known: set[int] = set()

    def run(self) -> None:
        """Serve until Shutdown; a fatal error of the runner is raised."""
        while not self._leaving:
            if not self._runner.busy:
                self._socket.poll()
            self._take_in()
            if self._runner.busy:
                self._runner.step(self._exchange)

    def _exchange(self, events: list[TokenEvent]) -> None:
        # A long prompt brings no event for many steps; silence would be taken for a hang.
        if events or time.monotonic() - self._told_at > SILENCE_SECONDS:
            self._socket.send(encode(Step(events)))
            self._told_at = time.monotonic()
            self._known.difference_update(event.id for event in events if event.finish or event.error)
        self._take_in()

    def _take_in(self) -> None:
        while self._socket.poll(0):
            match decode_to_worker(self._socket.recv()):
                case Submit() as request:
                    self._known.add(request.id)
                    self._runner.submit(request)
                case Cancel(id=number):
                    self._runner.cancel(number)
                case Shutdown():
                    self._leaving = True
                    for number in tuple(self._known):
                        self._runner.cancel(number)


def serve(start: Start) -> None:
    """Load the model, tell the parent, and work until Shutdown.

    A model that cannot be loaded is reported, and the process then waits for its parent to end it.
    """
    logging.basicConfig(level=logging.WARNING, format="worker %(levelname)s %(name)s: %(message)s")
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(start.endpoint)

    def tell(message: FromWorker) -> None:
        socket.send(encode(message))

    tokenizer_folder = f"{start.folder}/tokenizer"
    torch.set_num_threads(start.model.threads or usable_cores())
    try:
        loaded = load(start.model, tokenizer_folder, on_stage=lambda stage: tell(Loading(stage)))
        runner = make_runner(loaded, start.model)
        tell(Loading("first token"))
        _try_out(runner)
    except Exception as error:
        if not isinstance(error, LoadError):
            log.exception("the model could not be loaded")
        tell(LoadFailed(load_reason(error)))
        _wait_for_the_end()
    # What is left now stays: looking through it for garbage would hold a step up for a fifth of a second.
    gc.collect()
    gc.freeze()
    tell(_ready(tokenizer_folder, loaded, runner))
    Worker(socket, runner).run()
    context.destroy(linger=1000)


def make_runner(loaded: LoadedModel, spec: ModelSpec) -> Runner:
    """Choose how the model is served.

    Raises: LoadError: something was asked for that this model or device cannot have.
    """
    if spec.compile == "layers" and spec.engine == "serial":
        raise LoadError("model.compile: layers needs batching, and model.engine asks for the serial runner")
    if spec.engine == "serial":
        return _one_at_a_time(loaded)
    try:
        rows = make_row_model(
            loaded.pipeline.model,
            length=loaded.context_length,
            rows=spec.max_batch_size,
            free_bytes=bytes_for_rows(loaded.device),
        )
    except UnsupportedModelError as error:
        if spec.engine == "batching" or spec.compile == "layers":
            raise LoadError(f"it cannot be batched: {error}") from None
        log.warning("the model is served one request at a time: %s", error)
        return _one_at_a_time(loaded)
    try:
        accelerate(rows, spec.compile)
    except CompileError as error:
        raise LoadError(f"its layers cannot be compiled: {error}") from error
    return BatchingRunner(loaded, rows, reuse=spec.prefix_reuse)


def _one_at_a_time(loaded: LoadedModel) -> SerialRunner:
    model = loaded.pipeline.model
    if loaded.logprob_shift is not None and not in_integers(model):
        # Its weights are rounded and still lie there as floats.
        pack_linears(model, [NativeLinear])
    return SerialRunner(loaded)


def usable_cores() -> int:
    """Return how many cores this process may use, or where the system does not tell, how many there are."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _wait_for_the_end() -> NoReturn:
    # Leaving now could overtake the message that says why.
    while True:
        signal.pause()


def _try_out(runner: Runner) -> None:
    """Make one token, so that a model that loads but cannot run is never called ready.

    Raises: LoadError: it cannot.
    """
    events: list[TokenEvent] = []
    runner.submit(Submit(id=0, prompt_ids=(0,), params=SamplingParams(max_tokens=1)))
    while runner.busy:
        runner.step(events.extend)
    for event in events:
        if event.error:
            raise LoadError(f"it was loaded, but its first token failed: {event.error}")


def _ready(tokenizer_folder: str, loaded: LoadedModel, runner: Runner) -> Ready:
    return Ready(
        tokenizer_folder=tokenizer_folder,
        runner=runner.name,
        slots=runner.slots,
        revision=loaded.revision,
        device=loaded.device,
        dtype=loaded.dtype,
        context_length=loaded.context_length,
        vocab_size=loaded.vocab_size,
        parameters=loaded.parameters,
        unsupported=runner.unsupported,
        recommended=loaded.recommended,
        logprob_shift=loaded.logprob_shift,
        compiled=runner.compiled,
    )
