"""The worker's one thread: it owns the model and the socket, and never does two things at once.

Decides when messages are read: between two steps while there is work, and in a blocking poll while there is none.  A
`Runner` generates the tokens.
"""

import dataclasses
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

import torch
import zmq
from msgspec import structs

from app.ipc.messages import (
    Cancel,
    Embed,
    Embedded,
    Exchange,
    FromWorker,
    LoadAdapter,
    ModelSpec,
    Ready,
    Shutdown,
    Start,
    Step,
    Submit,
    TokenEvent,
    UnloadAdapter,
    decode_to_worker,
    encode,
)
from app.types import SamplingParams
from app.worker.adapters import AdapterLoader
from app.worker.embedding.causal import CausalEncoder
from app.worker.embedding.embedding_runner import EmbeddingRunner
from app.worker.embedding.encoder import load_encoder
from app.worker.execution import private_api
from app.worker.execution.base import ExecutorUnavailableError, UnsupportedModelError
from app.worker.execution.executor_selection import pack_quantized_linears, select_executor
from app.worker.execution.lora import LoraAdapter
from app.worker.execution.serial.serial_runner import SerialRunner
from app.worker.execution.torch.int8_linear import has_integer_linears
from app.worker.execution.torch.torch_executor import create_torch_runner
from app.worker.heartbeat import PROGRESS
from app.worker.loaded_model import LoadedModel
from app.worker.loading.adapter_files import AdapterTarget
from app.worker.loading.kv_memory import SHARE, kv_cache_bytes, trial_step_bytes
from app.worker.loading.load_failure import is_explained, load_failure
from app.worker.loading.load_log import LoadLog
from app.worker.loading.load_progress import ProgressReporter
from app.worker.loading.loader import load
from app.worker.loading.model_files import LoadError
from app.worker.ready import DescribedRunner, encoder_ready, model_ready
from app.worker.sampling.device_sampler import DeviceSampler
from app.worker.scheduling.batching_runner import BatchingRunner
from app.worker.scheduling.step_time import GpuStepTime
from app.worker.scheduling.trial_step import compute_largest_step

log = logging.getLogger(__name__)


class Runner(DescribedRunner, Protocol):
    """Generates tokens for several requests on one model; more than its slots wait in it."""

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""

    @property
    def preemptions(self) -> int:
        """How often a request has lost its row of the KV cache so far, to go on later."""

    def submit(self, request: Submit) -> None:
        """Take a request; one that cannot run gets an error event in the next step."""

    def add_adapter(self, adapter: LoraAdapter) -> None:
        """Let requests use an adapter."""

    def remove_adapter(self, digest: str) -> None:
        """End what still uses an adapter, and let go of its weights."""

    def cancel(self, request_id: int) -> None:
        """End a request within a token, with an event; unknown ids are ignored."""

    def step(self, exchange: Exchange) -> None:
        """Generate for a while, calling `exchange` after each step; an ordinary failure ends only its own request."""

    def save_ahead(self) -> bool:
        """Do a millisecond of work that later requests would wait for, while none is live; False if there is none."""


LOOK_MILLISECONDS = 5
"""How often a worker without requests looks whether an adapter has been read."""


class Worker:
    """The loop between the socket and what the model does: it generates, embeds, or both in turn."""

    def __init__(
        self,
        socket: "zmq.Socket[bytes]",
        runner: Runner | None = None,
        embedder: EmbeddingRunner | None = None,
        adapters: AdapterLoader | None = None,
    ) -> None:
        """Args: runner, embedder, adapters: None where the model does not do that."""
        self._socket = socket
        self._adapters = adapters
        self._runner = runner
        self._embedder = embedder
        self._stopping = False
        self._live: set[int] = set()
        self._step_began = 0.0
        self._step_seconds: list[float] = []
        """Of the steps that no message has reported."""
        self._preemptions = 0
        """Those that a message has reported."""

    def run(self) -> None:
        """Serve until Shutdown; a fatal error of the runner is raised."""
        while not self._stopping:
            if not self._is_busy(self._runner) and not self._is_busy(self._embedder):
                self._idle()
            self._receive()
            if self._runner is not None and self._runner.busy:
                self._step_began = time.perf_counter()
                self._runner.step(self._exchange)
            else:
                self._embed()

    def _idle(self) -> None:
        """Wait for a message, or do a piece of what later requests would wait for."""
        if self._runner is not None and self._runner.save_ahead():
            return
        # What a thread reads wakes up nobody.
        reads = self._adapters is not None and self._adapters.busy
        self._socket.poll(LOOK_MILLISECONDS if reads else None)

    @staticmethod
    def _is_busy(work: Runner | EmbeddingRunner | None) -> bool:
        return work is not None and work.busy

    def _exchange(self, events: list[TokenEvent]) -> None:
        # A long prompt produces no event for many steps, which all are progress.
        PROGRESS.tick()
        self._step_seconds.append(time.perf_counter() - self._step_began)
        self._send(events)
        # Here and not between the runner's steps, of which one may be a whole completion.
        self._embed()
        self._receive()
        self._step_began = time.perf_counter()

    def _embed(self) -> None:
        """Compute one pass over texts, if there are any."""
        if self._embedder is not None and self._embedder.busy:
            self._embedder.step(self._report)

    def _report(self, embedded: list[Embedded], events: list[TokenEvent]) -> None:
        PROGRESS.tick()
        for message in embedded:
            self._socket.send(encode(message))
        self._send(events)

    def _send(self, events: list[TokenEvent]) -> None:
        if events:
            self._socket.send(encode(Step(events, *self._steps())))
            self._live.difference_update(event.id for event in events if event.finish or event.error)

    def _steps(self) -> tuple[tuple[float, ...], int]:
        """Return how long each step since the last message took, and how many requests lost their row in them."""
        seconds, self._step_seconds = tuple(self._step_seconds), []
        before = self._preemptions
        self._preemptions = 0 if self._runner is None else self._runner.preemptions
        return seconds, self._preemptions - before

    def _receive(self) -> None:
        if self._adapters is not None and self._adapters.busy:
            self._take_adapters(self._adapters)
        while self._socket.poll(0):
            match decode_to_worker(self._socket.recv()):
                case Submit() as request if self._adapters is not None and self._adapters.hold_back(request):
                    self._live.add(request.id)
                case Submit() as request:
                    self._submit(self._runner, request)
                case Embed() as request:
                    self._submit(self._embedder, request)
                case Cancel(id=request_id):
                    self._cancel(request_id)
                case LoadAdapter() as message if self._adapters is not None:
                    self._adapters.begin(message)
                case UnloadAdapter() as message if self._adapters is not None:
                    self._adapters.unload(message)
                case Shutdown():
                    self._stopping = True
                    for request_id in tuple(self._live):
                        self._cancel(request_id)

    def _take_adapters(self, adapters: AdapterLoader) -> None:
        """Report the adapters that have been read, and let the requests run that waited for them."""
        for answer in adapters.finished():
            self._socket.send(encode(answer))
            PROGRESS.tick()
        for request in adapters.released():
            self._submit(self._runner, request)

    def _submit(self, work: Any, request: Submit | Embed) -> None:
        self._live.add(request.id)
        if work is None:
            self._send([TokenEvent(request.id, error="The model does not do this.", invalid=True)])
        else:
            work.submit(request)

    def _cancel(self, request_id: int) -> None:
        if self._adapters is not None and self._adapters.give_up(request_id):
            self._send([TokenEvent(request_id, finish="abort")])
            return
        for work in (self._runner, self._embedder):
            if work is not None:
                work.cancel(request_id)


def serve(start: Start) -> None:
    """Load the model, report that to the parent, and generate until Shutdown.

    A model that cannot be loaded is reported, and the process then waits for its parent to end it.
    """
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(start.endpoint)

    # Threads of a download report their progress; only one at a time may use the socket.
    sending = threading.Lock()

    def send(message: FromWorker) -> None:
        with sending:
            socket.send(encode(message))

    torch.set_num_threads(start.model.threads or usable_cores())
    try:
        ready, runner, embedder, adapters = _load(start, send)
    except Exception as error:
        if not is_explained(error):
            log.exception("the model could not be loaded")
        send(load_failure(error))
        _wait_to_be_killed()
    # The objects of the load live as long as the process; a full garbage collection over them would delay a step by a
    # fifth of a second.
    gc.collect()
    gc.freeze()
    send(ready)
    Worker(socket, runner, embedder, adapters).run()
    context.destroy(linger=1000)


def _load(
    start: Start, send: Callable[[FromWorker], None]
) -> tuple[Ready, Runner | None, EmbeddingRunner | None, AdapterLoader | None]:
    """Load the model and let it show that it works, sending each stage and what is logged."""
    spec, folder = start.model, _tokenizer_folder(start)
    with LoadLog() as lines:
        progress = ProgressReporter(send)

        def begin(stage: str) -> None:
            lines.flush_to(send)
            progress.begin(stage)

        try:
            if spec.task == "embed":
                encoder = load_encoder(spec, folder, on_stage=begin, hub_token=start.hub_token, on_bytes=progress.show)
                _watch_progress(encoder.model)
                return encoder_ready(folder, encoder), None, EmbeddingRunner(encoder, spec.max_batch_tokens), None
            loaded = load(spec, folder, on_stage=begin, hub_token=start.hub_token, on_bytes=progress.show)
            attention = private_api.attention_implementation(loaded.pipeline.model)
            begin("layers")
            runner = make_runner(loaded, spec)
            begin("first token")
            _verify_first_token(runner)
            target = AdapterTarget(loaded.linears, loaded.pipeline.model.dtype, loaded.device)
            ready, adapters = model_ready(folder, loaded, runner), AdapterLoader(target, runner)
            if spec.embeddings == "none":
                return ready, runner, None, adapters
            causal = CausalEncoder(loaded, spec.embeddings, attention=attention if runner.name == "batching" else None)
            embedder = EmbeddingRunner(causal, spec.max_batch_tokens)
            return structs.replace(ready, embedding=causal.info), runner, embedder, adapters
        finally:
            lines.flush_to(send)


def _tokenizer_folder(start: Start) -> str:
    return f"{start.folder}/tokenizer"


def make_runner(loaded: LoadedModel, spec: ModelSpec) -> Runner:
    """Choose how the model is served.

    Raises: LoadError: the settings require what this model or device does not support.
    """
    if spec.compile == "layers" and spec.engine == "serial":
        raise LoadError("model.compile: layers needs batching, and model.engine asks for the serial runner")
    if spec.compile == "layers" and spec.embeddings != "none":
        raise LoadError("model.compile: layers leaves no hidden states to read, and model.embeddings needs them")
    if spec.engine == "serial":
        return _serial_runner(loaded, spec)
    step_tokens = min(loaded.context_length, GpuStepTime.MAX_PREFILL_TOKENS)
    free = kv_cache_bytes(loaded.device, step_bytes=trial_step_bytes(loaded.pipeline.model, step_tokens))
    # Further forms of the weights are made after the KV cache, which leaves them their memory.
    further = (loaded.weight_copies - 1) * sum(weight.nbytes for weight in loaded.pipeline.model.parameters())
    free = max(0, free - int(SHARE[loaded.device] * further))
    try:
        model_runner = create_torch_runner(
            loaded.pipeline.model, length=loaded.context_length, slots=spec.max_batch_size, free_bytes=free
        )
    except UnsupportedModelError as error:
        if spec.engine == "batching" or spec.compile == "layers":
            raise LoadError(f"it cannot be batched: {error}") from None
        log.warning("the model is served one request at a time: %s", error)
        return _serial_runner(loaded, spec)
    slots, sampler = model_runner.cache.slots, list[DeviceSampler]()
    try:
        select_executor(
            model_runner,
            spec.compile,
            keep_layers=spec.embeddings != "none",
            copies=loaded.weight_copies,
            largest_step=lambda runner: sampler.append(compute_largest_step(runner, step_tokens)),
        )
    except ExecutorUnavailableError as error:
        raise LoadError(f"its layers cannot be compiled: {error}") from error
    if model_runner.cache.length < loaded.context_length:
        log.warning(
            "config.json: a request of %d tokens does not fit into memory; %d is the most here (model.max_model_len)",
            loaded.context_length,
            model_runner.cache.length,
        )
        loaded = dataclasses.replace(loaded, context_length=model_runner.cache.length)
    if spec.embeddings != "none":
        # A step is short, but a pass over long texts is not.
        _watch_progress(loaded.pipeline.model)
    # What fewer slots have left is for steps.
    left = max(0, free - model_runner.cache.total_bytes) if model_runner.cache.slots == slots else 0
    return BatchingRunner(
        loaded,
        model_runner,
        prefix_reuse=spec.prefix_reuse,
        prefix_cache_bytes=min(spec.prefix_cache_bytes, left),
        speculation=spec.speculation == "ngram",
        device_sampler=next(iter(sampler), None),
    )


def _serial_runner(loaded: LoadedModel, spec: ModelSpec) -> SerialRunner:
    if spec.speculation != "none":
        log.warning("model.speculation is without effect: the model is served one request at a time")
    model = loaded.pipeline.model
    if loaded.logprob_shift is not None and not has_integer_linears(model):
        # Its weights are rounded to int8 and still stored as floats.
        pack_quantized_linears(model)
    _watch_progress(model)
    return SerialRunner(loaded)


def _watch_progress(model: Any) -> None:
    """Let each of the model's parts show that it goes on: a whole prompt is one step here, and may take minutes."""
    for module in model.modules():
        module.register_forward_pre_hook(_report_progress)


def _report_progress(*_: object) -> None:
    PROGRESS.tick()


def usable_cores() -> int:
    """Return how many cores this process may use, or all of the machine's where the system has no affinities."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _wait_to_be_killed() -> NoReturn:
    # Leaving now could overtake the message that says why.
    while True:
        signal.pause()


def _verify_first_token(runner: Runner) -> None:
    """Generate one token, so that a model that loads but cannot run is never reported ready.

    Raises: LoadError: it cannot run.
    """
    events: list[TokenEvent] = []
    runner.submit(Submit(id=0, prompt_ids=(0,), params=SamplingParams(max_tokens=1)))
    while runner.busy:
        runner.step(events.extend)
    for event in events:
        if event.error:
            raise LoadError(f"it was loaded, but its first token failed: {event.error}")
