"""The engine whose model lives in a worker process of its own.

Decides which requests are admitted, and routes what the worker generates to them.  `supervisor.py` runs the process,
`worker_process.py` its socket, `live_request.py` turns tokens into text.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Protocol

from app.config import DeadlineConfig, ModelConfig
from app.embeddings import EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.adapter_source import AdapterFiles
from app.engine.base import Capabilities, EngineInfo, EngineStatus, PreparedPrompt, Tokenizer
from app.engine.embedding_queue import EmbeddingQueue
from app.engine.grammar_checker import GrammarChecker
from app.engine.live_request import LiveRequest
from app.engine.model_source import FetchModel, WorkerLauncher, model_spec, no_registry, show_fetch
from app.engine.parsing.detection import detect_format
from app.engine.stop_strings import with_stop_tokens
from app.engine.tokenizer.detokenize import detokenize
from app.engine.tokenizer.prepare import ModelTokenizer, PromptEncoder
from app.engine.worker_adapters import WorkerAdapters
from app.engine.worker_status import engine_info, engine_status, first_line, not_ready
from app.errors import ContextLengthExceeded, EngineBusy, EngineFailed, InvalidRequest
from app.events import Event, Started
from app.fair_share import fits_share
from app.ipc.messages import AdapterFailed, AdapterLoaded, Embedded, Ready, Submit, TokenEvent
from app.ipc.spare_interpreters import SpareInterpreters
from app.ipc.supervisor import Launch, Supervisor
from app.ipc.worker_process import WorkerLostError
from app.requests import GenerationRequest
from app.types import BACKGROUND_PRIORITY, EngineState, FinishReason

log = logging.getLogger(__name__)

BUSY_RETRY_SECONDS = (1.0, 30.0)
"""Bounds of the Retry-After of a refused request."""
BACKGROUND_PATIENCE = 12
"""As many times the deadlines of others those of the background are: it waits for all of them, again and again."""
PROMPT_END_TOKENS = 64
"""Last tokens of a prompt that decide how a completion begins: a turn's header, and what the template puts behind."""


class CompletionRate:
    """Measures how fast requests finish, so that a refused client learns when to try again."""

    def __init__(self) -> None:
        self._moments: deque[float] = deque(maxlen=16)

    def add(self, moment: float) -> None:
        """Record the end of a request, at a time in seconds."""
        self._moments.append(moment)

    def seconds_each(self) -> float:
        """Return the mean seconds from one end to the next, over the last few; 0 before there were two."""
        if len(self._moments) < 2:
            return 0.0
        return (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)


class StepMetrics(Protocol):
    """Counts the steps of one model."""

    def step(self, seconds: float, /) -> None:
        """Count a step that took so long."""

    def preempted(self, count: int, /) -> None:
        """Count requests that lost their row of the KV cache, to go on later."""


class LocalEngine:
    """One model in one worker process, which is started again whenever it dies."""

    def __init__(
        self,
        config: ModelConfig,
        deadlines: DeadlineConfig,
        *,
        hub_token: str | None = None,
        load_token: str | None = None,
        fetch: FetchModel = no_registry,
        interpreters: SpareInterpreters | None = None,
        hang_seconds: float = 30.0,
        stall_seconds: float = 120.0,
        backoff_seconds: float = 1.0,
        launch: Launch | None = None,
        metrics: StepMetrics | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args:
            config: what to load, and how many requests may wait.
            deadlines: how long a request may take.
            hub_token: for gated models of the hub; goes to the worker by environment.
            load_token: in its place for the first load alone; goes by a pipe.
            fetch: brings the files of a model whose source is a registry.
            interpreters: where the worker's process comes from; by default each is started when it is needed.
            hang_seconds: a worker without a sign of life for so long is killed and started again.
            stall_seconds: the same for one that lives, has work and makes no progress.
            backoff_seconds: before the second new start in a row; doubles with each failure, up to 30.
            launch: starts a worker; by default a process.
            metrics: counts what the model does; None counts nothing.
        """
        self._config = config
        self._deadlines = deadlines
        self._metrics = metrics
        self._interpreters = interpreters or SpareInterpreters(enabled=False)
        self._started = False
        self._launcher = WorkerLauncher(
            model_spec(config),
            self._interpreters,
            uri=config.name if config.source == "mlflow" else None,
            hub_token=hub_token,
            load_token=load_token,
            fetch=fetch,
        )
        self._worker = Supervisor(
            launch or self._launcher,
            self,
            hang_seconds=hang_seconds,
            stall_seconds=stall_seconds,
            backoff_seconds=backoff_seconds,
        )
        self._launcher.report = show_fetch(self._worker)
        self._ready: Ready | None = None
        self._info: EngineInfo | None = None
        self._tokenizer: ModelTokenizer | None = None
        self._encoder: PromptEncoder | None = None
        self._grammar_checker: GrammarChecker | None = None
        self._slots = 1
        self._numbers = count(1)
        self._live: dict[int, LiveRequest] = {}
        self._completion_rate = CompletionRate()
        self._adapters = WorkerAdapters(self._worker, self._numbers)
        self._embeddings = EmbeddingQueue(self._worker, self._numbers, deadlines, config.max_waiting_tokens)

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""
        if self._info is None:
            raise not_ready(self._worker)
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: EngineNotReady: no model has been loaded yet."""
        if self._tokenizer is None:
            raise not_ready(self._worker)
        return self._tokenizer

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""
        running = sum(live.started_at is not None for live in self._live.values())
        return engine_status(
            self._worker,
            running=running + self._embeddings.running,
            waiting=len(self._live) - running + self._embeddings.waiting,
            ready=self._ready,
        )

    async def start(self) -> None:
        """Begin to load the model and return at once; `wait_ready` reports the outcome."""
        if not self._started:
            self._started = True
            await self._interpreters.open()
        self._worker.start()
        # transformers takes a second to import, and is needed only once the worker has loaded, which takes several.
        asyncio.get_running_loop().run_in_executor(None, _tokenizer_class)

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.

        Raises: EngineFailed: the model cannot be loaded, or the engine is closed.
        """
        await self._worker.wait_ready()

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Encode the prompt with the model's own tokenizer."""
        if self._encoder is None:
            raise not_ready(self._worker)
        return await self._encoder.encode(request)

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool = False) -> str:
        """Return the text of a prompt that arrived as tokens.  Args: control_tokens: whether their names are in it."""
        tokenizer = self.tokenizer
        decode = tokenizer.decode if control_tokens else partial(detokenize, tokenizer)
        return await asyncio.to_thread(decode, token_ids)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token on its own; of a control token its name, and a part of a character as U+FFFD."""
        read = self.tokenizer.token_text
        return await asyncio.to_thread(lambda: [read(token_id) for token_id in token_ids])

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt that arrived as tokens holds control tokens of the model's tokenizer."""
        return self.tokenizer.has_control_tokens(prompt_ids)

    def hidden_token(self, name: str) -> int | None:
        """Return the special token of this name, which no completion shows; None where there is none."""
        return self.tokenizer.hidden_token(name)

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        """Return the last tokens of a prompt as text, control tokens by their names."""
        return "".join(map(self.tokenizer.token_text, prompt_ids[-PROMPT_END_TOKENS:]))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate: Started at once when admitted, deltas, then exactly one Finished.

        Closing the generator early cancels the request within one token.

        Raises: EngineNotReady, EngineBusy, InvalidRequest: in place of Started.
            EngineFailed, DeadlineExceeded: in place of Finished.
        """
        if self._grammar_checker is not None and self._worker.state is EngineState.READY:
            await self._grammar_checker.check_request(request, self.info)
        live = self._admit(request)
        try:
            yield Started(prompt_tokens=request.prompt_tokens)
            async with contextlib.aclosing(live.events()) as events:
                async for event in events:
                    yield event
        finally:
            live.end(FinishReason.ABORT)

    async def prepare_embedding(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode the texts of a request as raw prompts."""
        if self._encoder is None:
            raise not_ready(self._worker)
        return await self._encoder.encode_inputs(request, self.info)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return the vectors of prepared texts; cancelling this ends the request within a pass."""
        return await self._embeddings.run(request, self.info)

    async def load_adapter(self, files: AdapterFiles, max_rank: int) -> AdapterLoaded:
        """Load an adapter and return what it is.

        Raises: InvalidRequest: it cannot be used with this model.  EngineNotReady, EngineFailed.
        """
        return await self._adapters.load(files, max_rank)

    def adapters_in_use(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the adapters of running requests, and of waiting ones."""
        named = [(live.request.adapter, live.started_at is not None) for live in self._live.values()]
        running = {name for name, runs in named if name is not None and runs}
        waiting = {name for name, runs in named if name is not None and not runs}
        return tuple(sorted(running)), tuple(sorted(waiting))

    def unload_adapter(self, digest: str) -> None:
        """Let go of an adapter that was loaded once."""
        self._adapters.unload(digest)

    async def abort(self, request_id: str) -> None:
        """End a request now: its stream closes with FinishReason.ABORT.  Unknown ids are ignored."""
        self._embeddings.abort(request_id)
        for live in tuple(self._live.values()):
            if live.request.id == request_id:
                live.end(FinishReason.ABORT)

    async def close(self) -> None:
        """Stop for good: live streams end with FinishReason.ABORT, and no process or task is left."""
        await self._worker.close()
        await self._launcher.close()
        if self._started:
            self._started = False
            await self._interpreters.close()
        await self._close_tokenizer()
        # A prompt would wait for threads that have ended.
        self._encoder = None

    async def on_ready(self, ready: Ready) -> None:
        """Take over the model that the worker loaded.

        Raises: WorkerLostError: its tokenizer cannot be used here.
        """
        try:
            # A thread: reading a large vocabulary takes up to seconds.
            tokenizer = await asyncio.to_thread(
                lambda: _tokenizer_class()(ready.tokenizer_folder, context_length=ready.context_length)
            )
        except Exception as error:
            raise WorkerLostError(f"The model's tokenizer cannot be loaded: {first_line(error)}.") from error
        await self._close_tokenizer()
        self._tokenizer = tokenizer
        self._grammar_checker = GrammarChecker(
            ready.tokenizer_folder, ready.vocab_size, waiting_seconds=self._deadlines.waiting_seconds
        )
        self._encoder = PromptEncoder(tokenizer, vocab_size=ready.vocab_size, seconds=self._deadlines.waiting_seconds)
        self._launcher.on_ready(ready)
        self._ready = ready
        self._slots = ready.slots
        self._info = replace(
            engine_info(self._config.public_name, ready),
            capabilities=Capabilities(
                unsupported=ready.unsupported, adapters=True, priority=ready.runner == "batching"
            ),
            recommended=ready.recommended,
            stop_strings=ready.stop_strings,
            rules=ready.rules,
            template_variables=tokenizer.template_variables,
            renders_reasoning=tokenizer.renders_reasoning,
            logprob_shift=ready.logprob_shift,
            compiled=ready.compiled,
            ways=tuple(dict.fromkeys(each.way for each in ready.step_times)),
            step_times=ready.step_times,
            chat_format=detect_format(tokenizer.traits, self._config),
            origin=self._launcher.origin,
        )
        for times in ready.step_times:
            log.info("%s: %s", self._config.public_name, times)
        self._adapters.on_ready()
        await self._interpreters.prepare()

    def on_event(self, event: TokenEvent) -> None:
        """Route an event to its request; an event of a request that has ended is dropped."""
        live = self._live.get(event.id)
        if live is None:
            self._embeddings.on_event(event)
            return
        try:
            live.accept(event)
        except Exception as error:  # noqa: BLE001  # one bad completion must not end the others
            # Without its message, which could hold the text.
            log.error("a completion could not be decoded: %s", type(error).__name__)
            live.fail(EngineFailed("The model's answer could not be decoded."))

    def on_steps(self, seconds: Sequence[float], preempted: int) -> None:
        """Count the steps of the model."""
        if self._metrics is None:
            return
        for each in seconds:
            self._metrics.step(each)
        if preempted:
            self._metrics.preempted(preempted)

    def on_embedded(self, embedded: Embedded) -> None:
        """Route vectors to their request."""
        self._embeddings.on_embedded(embedded)

    def on_adapter(self, answer: AdapterLoaded | AdapterFailed) -> None:
        """Take the worker's answer to a load."""
        self._adapters.on_answer(answer)

    def on_unresponsive(self) -> None:
        """Fail every live request now; the worker is told to drop them, which it reads if it comes back."""
        self._embeddings.on_unresponsive()
        for live in tuple(self._live.values()):
            live.fail(EngineFailed("The model's worker does not respond. Try again later."))

    def on_lost(self) -> None:
        """Fail every live request: the worker that ran them is gone."""
        self._embeddings.on_lost()
        self._adapters.on_lost()
        for live in tuple(self._live.values()):
            live.fail(EngineFailed("The model's worker failed during this request. Try again."))

    def on_close(self) -> None:
        """Finish every live request with the text that it has."""
        self._embeddings.on_close()
        self._adapters.on_lost()
        for live in tuple(self._live.values()):
            live.end(FinishReason.ABORT)

    def _admit(self, request: GenerationRequest) -> LiveRequest:
        if self._worker.state is not EngineState.READY:
            raise not_ready(self._worker)
        self._refuse_misfit(request)
        self._refuse_too_many(request)
        background = request.priority >= BACKGROUND_PRIORITY
        deadlines = self._deadlines.times(BACKGROUND_PATIENCE) if background else self._deadlines
        live = LiveRequest(
            next(self._numbers), request, self.tokenizer, deadlines, self._forget, self.info.stop_strings
        )
        self._live[live.number] = live
        message = Submit(
            id=live.number,
            prompt_ids=request.prompt_ids or (),
            params=with_stop_tokens(request.sampling, live.hidden_stops),
            tenant=_share_of(request),
            adapter=request.adapter_digest,
            priority=request.priority,
        )
        try:
            self._worker.submit(message)
        except UnicodeEncodeError:
            live.end(FinishReason.ABORT)
            raise InvalidRequest("A stop string or the grammar is not valid Unicode text.") from None
        return live

    def _refuse_too_many(self, request: GenerationRequest) -> None:
        """Refuse a request whose tenant has its share of the line, in requests or in tokens of waiting prompts.

        A tenant that has no request here may always have one, and one prompt in the line.  The samples of a request
        have one prompt together, which counts with the first.

        Raises: EngineBusy: it has; other tenants may still find a place.
        """
        everyone = [live.request for live in self._live.values()]
        waiting = [live.request for live in self._live.values() if live.started_at is None]
        own = [each for each in everyone if each.tenant == request.tenant]
        own_waiting = [each for each in waiting if each.tenant == request.tenant]
        places = self._slots + self._config.max_waiting
        tokens, most_tokens = _tokens([request]), self._config.max_waiting_tokens
        if (not own or fits_share(1, held=len(own), total=len(everyone), most=places)) and (
            not own_waiting
            or not tokens
            or fits_share(tokens, held=_tokens(own_waiting), total=_tokens(waiting), most=most_tokens)
        ):
            return
        least, most = BUSY_RETRY_SECONDS
        raise EngineBusy(
            "The model has as many requests as it can take. Try again later.",
            retry_after=min(max(self._completion_rate.seconds_each() * len(waiting), least), most),
        )

    def _refuse_misfit(self, request: GenerationRequest) -> None:
        prompt_tokens, max_tokens = request.prompt_tokens, request.sampling.max_tokens
        limit = self.info.context_length
        if prompt_tokens == 0:
            raise InvalidRequest("The prompt is empty.")
        self.info.capabilities.check(request)
        self._adapters.check(request.adapter_digest)
        if prompt_tokens + max_tokens > limit:
            raise ContextLengthExceeded(prompt_tokens=prompt_tokens, max_tokens=max_tokens, limit=limit)
        if any(live.request.id == request.id for live in self._live.values()):
            raise ValueError("a live request has this id already")

    async def _close_tokenizer(self) -> None:
        if self._grammar_checker is not None:
            await self._grammar_checker.close()
        if self._encoder is not None:
            self._encoder.close()
        if self._tokenizer is not None:
            self._tokenizer.close()

    def _forget(self, live: LiveRequest) -> None:
        """Forget a request at its outcome, and stop the worker on it if it has not ended there."""
        del self._live[live.number]
        self._worker.cancel(live.number)
        if live.started_at is not None:
            self._completion_rate.add(asyncio.get_running_loop().time())


def _share_of(request: GenerationRequest) -> str:
    """Return as whose a request takes its turn: what a tenant's batches compute counts not against its live requests.

    No tenant's text begins so.
    """
    return f"batch {request.tenant}" if request.priority >= BACKGROUND_PRIORITY else str(request.tenant)


def _tokens(requests: Sequence[GenerationRequest]) -> int:
    return sum(each.prompt_tokens for each in requests if each.sampling.sample == 0)


def _tokenizer_class() -> Callable[..., ModelTokenizer]:
    from app.engine.tokenizer.hf_tokenizer import HfTokenizer

    return HfTokenizer
