"""The engine that keeps a model in a worker process.

Decides who is let in and what each live request is told.  Knows no torch, no processes (`supervisor.py`), no sockets
(`channel.py`) and no text (`ticket.py`).
"""

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable
from functools import partial
from itertools import count
from pathlib import Path

from app.config import DeadlineConfig, ModelConfig
from app.engine.base import Chunk, EngineInfo, EngineStatus, GenerationRequest, Tokenizer
from app.engine.live_request import LiveRequest
from app.errors import ContextLengthExceeded, EngineBusy, EngineFailed, EngineNotReady, InvalidRequest
from app.ipc.messages import ModelSpec, Ready, Submit, TokenEvent
from app.ipc.supervisor import Launch, Supervisor
from app.ipc.worker_process import WorkerLostError, WorkerProcess
from app.types import EngineState, FinishReason, SamplingParams

log = logging.getLogger(__name__)

LOADING_RETRY_SECONDS = 5.0
BUSY_RETRY_SECONDS = (1.0, 30.0)
"""The least and the most that a refused client is told to wait."""
DEFAULTS = SamplingParams(max_tokens=1)
"""What asks for nothing special."""


class Ends:
    """Measures how fast answers end, to tell a refused client when the line will have moved."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque(maxlen=16)

    def add(self, moment: float) -> None:
        """Take note of an end, at a time in seconds."""
        self._moments.append(moment)

    def seconds_each(self) -> float:
        """Return the mean time from one end to the next, of the last few; 0 before there were two."""
        if len(self._moments) < 2:
            return 0.0
        return (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)


class LocalEngine:
    """One model in one worker process, which is started again whenever it dies."""

    def __init__(
        self,
        config: ModelConfig,
        deadlines: DeadlineConfig,
        *,
        hub_token: str | None = None,
        hang_seconds: float = 120.0,
        backoff_seconds: float = 1.0,
        launch: Launch | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            config: what to load, and how many requests may wait.
            deadlines: how long a request may take.
            hub_token: for gated models of the hub; goes to the worker by environment.
            hang_seconds: a worker that has work and says nothing for so long is killed and started again.
            backoff_seconds: before the first new start; doubles with each failure, up to 30.
            launch: starts a worker; by default a process.
        """
        self._config = config
        self._deadlines = deadlines
        self._worker = Supervisor(
            launch or partial(WorkerProcess.launch, _spec(config), hub_token),
            self,
            hang_seconds=hang_seconds,
            backoff_seconds=backoff_seconds,
        )
        self._info: EngineInfo | None = None
        self._tokenizer: Tokenizer | None = None
        self._slots = 1
        self._numbers = count(1)
        self._tickets: dict[int, LiveRequest] = {}
        self._ends = Ends()

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""
        if self._info is None:
            raise self._not_ready()
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: EngineNotReady: no model has been loaded yet."""
        if self._tokenizer is None:
            raise self._not_ready()
        return self._tokenizer

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""
        running = sum(ticket.started_at is not None for ticket in self._tickets.values())
        return EngineStatus(
            state=self._worker.state,
            running=running,
            waiting=len(self._tickets) - running,
            restarts=self._worker.restarts,
            error=self._worker.error,
            worker_pid=self._worker.worker_pid,
            worker_rss_bytes=_rss_bytes(self._worker.worker_pid),
        )

    async def start(self) -> None:
        """Begin to load the model and return at once; `wait_ready` tells the outcome."""
        self._worker.start()
        # transformers takes a second to import, and the worker several; until then nobody needs it.
        asyncio.get_running_loop().run_in_executor(None, _tokenizer_class)

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.

        Raises: EngineFailed: the model cannot be loaded, or the engine is closed.
        """
        await self._worker.wait_ready()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Generate; an empty chunk at once when admitted, then the text, then exactly one last chunk.

        Closing the generator early cancels the request within one token.

        Raises: EngineNotReady, EngineBusy, InvalidRequest: before the first chunk.
            EngineFailed, DeadlineExceeded: in place of the last chunk.
        """
        ticket = self._admit(request)
        try:
            yield Chunk()
            async with contextlib.aclosing(ticket.chunks()) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            ticket.end(FinishReason.ABORT)

    async def abort(self, request_id: str) -> None:
        """End a request now: its stream closes with FinishReason.ABORT.  Unknown ids are ignored."""
        for ticket in tuple(self._tickets.values()):
            if ticket.request.id == request_id:
                ticket.end(FinishReason.ABORT)

    async def close(self) -> None:
        """Stop for good: live streams end with FinishReason.ABORT, and no process or task is left."""
        await self._worker.close()

    async def on_ready(self, ready: Ready) -> None:
        """Take over what the worker loaded.

        Raises: WorkerLostError: its tokenizer cannot be used here.
        """
        try:
            # A thread: reading a large vocabulary takes up to seconds.
            self._tokenizer = await asyncio.to_thread(lambda: _tokenizer_class()(ready.tokenizer_folder))
        except (OSError, ValueError) as error:
            raise WorkerLostError(f"The model's tokenizer cannot be loaded: {error}") from error
        self._slots = ready.slots
        self._info = EngineInfo(
            model=self._config.public_name,
            revision=ready.revision,
            engine=ready.runner,
            device=ready.device,
            dtype=ready.dtype,
            context_length=ready.context_length,
            vocab_size=ready.vocab_size,
            parameters=ready.parameters,
            unsupported=ready.unsupported,
            recommended=ready.recommended,
            logprob_shift=ready.logprob_shift,
            compiled=ready.compiled,
        )

    def on_event(self, event: TokenEvent) -> None:
        """Pass an event to its request; one that has ended before is gone, and the event with it."""
        ticket = self._tickets.get(event.id)
        if ticket is None:
            return
        try:
            ticket.accept(event)
        except Exception as error:  # noqa: BLE001  # one bad answer must not end the others
            # Without its message, which could hold the text.
            log.error("an answer could not be decoded: %s", type(error).__name__)
            ticket.fail(EngineFailed("The model's answer could not be decoded."))

    def on_lost(self) -> None:
        """Fail every live request: the worker that had them is gone."""
        for ticket in tuple(self._tickets.values()):
            ticket.fail(EngineFailed("The model's worker failed during this request. Try again."))

    def on_close(self) -> None:
        """End every live request with what it has."""
        for ticket in tuple(self._tickets.values()):
            ticket.end(FinishReason.ABORT)

    def _admit(self, request: GenerationRequest) -> LiveRequest:
        if self._worker.state is not EngineState.READY:
            raise self._not_ready()
        self._refuse_misfit(request)
        self._refuse_too_many(request)
        ticket = LiveRequest(next(self._numbers), request, self.tokenizer.decoder(), self._deadlines, self._settled)
        self._tickets[ticket.number] = ticket
        self._worker.submit(Submit(ticket.number, request.prompt_ids, request.params, request.tenant))
        return ticket

    def _refuse_too_many(self, request: GenerationRequest) -> None:
        waiting = [ticket.request for ticket in self._tickets.values() if ticket.started_at is None]
        tokens = sum(len(each.prompt_ids) for each in waiting)
        if len(self._tickets) < self._slots + self._config.max_waiting and (
            not waiting or tokens + len(request.prompt_ids) <= self._config.max_waiting_tokens
        ):
            return
        least, most = BUSY_RETRY_SECONDS
        raise EngineBusy(
            "The model has as many requests as it can take. Try again later.",
            retry_after=min(max(self._ends.seconds_each() * len(waiting), least), most),
        )

    def _refuse_misfit(self, request: GenerationRequest) -> None:
        prompt_tokens, max_tokens = len(request.prompt_ids), request.params.max_tokens
        limit = self.info.context_length
        if prompt_tokens == 0:
            raise InvalidRequest("The prompt is empty.")
        for name in self.info.unsupported:
            if getattr(request.params, name) != getattr(DEFAULTS, name):
                raise InvalidRequest.of_field(name, "is not supported for this model")
        if prompt_tokens + max_tokens > limit:
            raise ContextLengthExceeded(prompt_tokens=prompt_tokens, max_tokens=max_tokens, limit=limit)
        if any(ticket.request.id == request.id for ticket in self._tickets.values()):
            raise ValueError("a live request has this id already")

    def _settled(self, ticket: LiveRequest) -> None:
        """Forget a request at its outcome, and stop the worker on it if it has not ended there."""
        del self._tickets[ticket.number]
        self._worker.cancel(ticket.number)
        if ticket.started_at is not None:
            self._ends.add(asyncio.get_running_loop().time())

    def _not_ready(self) -> EngineNotReady:
        match self._worker.state:
            case EngineState.LOADING | EngineState.READY:
                message = f"The model is still loading ({self._worker.stage})."
                return EngineNotReady(message, retry_after=LOADING_RETRY_SECONDS)
            case EngineState.RESTARTING:
                return EngineNotReady("The model is being started again.", retry_after=LOADING_RETRY_SECONDS)
            case EngineState.FAILED:
                return EngineNotReady("The model could not be loaded.")
            case EngineState.CLOSED:
                return EngineNotReady("The engine is closed.")


def _spec(config: ModelConfig) -> ModelSpec:
    return ModelSpec(
        name=config.name,
        source=config.source,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        compile=config.compile,
        revision=config.revision,
        max_model_len=config.max_model_len,
        threads=config.threads,
        engine="auto" if config.engine == "echo" else config.engine,
        max_batch_size=config.max_batch_size,
        prefix_reuse=config.prefix_reuse,
    )


def _tokenizer_class() -> Callable[[str], Tokenizer]:
    from app.engine.tokenizer.hf_tokenizer import HfTokenizer

    return HfTokenizer


def _rss_bytes(pid: int | None) -> int | None:
    if pid is None:
        return None
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
