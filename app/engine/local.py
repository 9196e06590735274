"""The engine whose model lives in a worker process of its own.

Brings together what has a file of its own: `supervisor.py` runs the process and `worker_process.py` its socket,
`tokenizer/` encodes prompts, `generation_queue.py` admits requests, `live_request.py` turns their tokens into text.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Protocol

from app.config import DeadlineConfig, ModelConfig
from app.embeddings import EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.adapter_source import AdapterFiles
from app.engine.base import Capabilities, EngineInfo, EngineStatus, PreparedPrompt, Tokenizer
from app.engine.embedding_queue import EmbeddingQueue
from app.engine.generation_queue import GenerationQueue
from app.engine.grammar_checker import GrammarChecker
from app.engine.model_source import FetchModel, WorkerLauncher, model_spec, no_registry, show_fetch
from app.engine.parsing.detection import detect_format
from app.engine.tokenizer.detokenize import detokenize
from app.engine.tokenizer.prepare import ModelTokenizer, PromptEncoder
from app.engine.worker_adapters import WorkerAdapters
from app.engine.worker_status import engine_info, engine_status, first_line, not_ready
from app.events import Event, Started
from app.ipc.messages import AdapterFailed, AdapterLoaded, Embedded, Ready, TokenEvent
from app.ipc.spare_interpreters import SpareInterpreters
from app.ipc.supervisor import Launch, Supervisor
from app.ipc.worker_process import WorkerLostError
from app.requests import GenerationRequest
from app.types import EngineState, FinishReason

log = logging.getLogger(__name__)

PROMPT_END_TOKENS = 64
"""Last tokens of a prompt that decide how a completion begins: a turn's header, and what the template puts behind."""


class StepMetrics(Protocol):
    """Counts the steps of one model."""

    def step(self, seconds: float, /) -> None:
        """Count a step that took so long."""

    def preempted(self, count: int, /) -> None:
        """Count requests that lost their row of the KV cache, to go on later."""


@dataclass(frozen=True, slots=True)
class _ReadyModel:
    """What the API process has of the model that the worker loaded."""

    ready: Ready
    info: EngineInfo
    tokenizer: ModelTokenizer
    encoder: PromptEncoder
    grammar_checker: GrammarChecker

    async def close(self) -> None:
        """End the threads and processes that look at prompts; decoding goes on."""
        await self.grammar_checker.close()
        self.encoder.close()
        self.tokenizer.close()


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
        self._loaded: _ReadyModel | None = None
        numbers = count(1)
        self._adapters = WorkerAdapters(self._worker, numbers)
        self._requests = GenerationQueue(
            self._worker,
            self._adapters,
            numbers,
            deadlines,
            max_waiting=config.max_waiting,
            max_waiting_tokens=config.max_waiting_tokens,
        )
        self._embeddings = EmbeddingQueue(self._worker, numbers, deadlines, config.max_waiting_tokens)

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""
        return self._model.info

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises: EngineNotReady: no model has been loaded yet."""
        return self._model.tokenizer

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""
        return engine_status(
            self._worker,
            running=self._requests.running + self._embeddings.running,
            waiting=self._requests.waiting + self._embeddings.waiting,
            ready=self._loaded.ready if self._loaded else None,
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
        if self._worker.state is not EngineState.READY:
            raise not_ready(self._worker)
        await self._model.grammar_checker.check_request(request, self.info)
        live = self._requests.admit(request, self.info, self.tokenizer, self._model.ready.slots)
        try:
            yield Started(prompt_tokens=request.prompt_tokens)
            async with contextlib.aclosing(live.events()) as events:
                async for event in events:
                    yield event
        finally:
            live.end(FinishReason.ABORT)

    async def prepare_embedding(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode the texts of a request as raw prompts."""
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
        return self._requests.adapters_in_use()

    def unload_adapter(self, digest: str) -> None:
        """Let go of an adapter that was loaded once."""
        self._adapters.unload(digest)

    async def abort(self, request_id: str) -> None:
        """End a request now: its stream closes with FinishReason.ABORT.  Unknown ids are ignored."""
        self._embeddings.abort(request_id)
        self._requests.abort(request_id)

    async def close(self) -> None:
        """Stop for good: live streams end with FinishReason.ABORT, and no process or task is left."""
        await self._worker.close()
        await self._launcher.close()
        if self._started:
            self._started = False
            await self._interpreters.close()
        if self._loaded is not None:
            await self._loaded.close()

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
        if self._loaded is not None:
            await self._loaded.close()
        self._launcher.on_ready(ready)
        seconds = self._deadlines.waiting_seconds
        self._loaded = _ReadyModel(
            ready=ready,
            info=_engine_info(self._config, ready, tokenizer, origin=self._launcher.origin),
            tokenizer=tokenizer,
            encoder=PromptEncoder(tokenizer, vocab_size=ready.vocab_size, seconds=seconds),
            grammar_checker=GrammarChecker(ready.tokenizer_folder, ready.vocab_size, waiting_seconds=seconds),
        )
        for times in ready.step_times:
            log.info("%s: %s", self._config.public_name, times)
        self._adapters.on_ready()
        await self._interpreters.prepare()

    def on_event(self, event: TokenEvent) -> None:
        """Route an event to its request."""
        self._requests.on_event(event)
        self._embeddings.on_event(event)

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
        self._requests.on_unresponsive()

    def on_lost(self) -> None:
        """Fail every live request: the worker that ran them is gone."""
        self._embeddings.on_lost()
        self._adapters.on_lost()
        self._requests.on_lost()

    def on_close(self) -> None:
        """Finish every live request with the text that it has."""
        self._embeddings.on_close()
        self._adapters.on_lost()
        self._requests.on_close()

    @property
    def _model(self) -> _ReadyModel:
        """Raises: EngineNotReady: no model has been loaded yet."""
        if self._loaded is None:
            raise not_ready(self._worker)
        return self._loaded

    @property
    def _encoder(self) -> PromptEncoder:
        """Raises: EngineNotReady: no model has been loaded yet, or the engine is closed and its threads have ended."""
        if self._worker.state is EngineState.CLOSED:
            raise not_ready(self._worker)
        return self._model.encoder


def _engine_info(config: ModelConfig, ready: Ready, tokenizer: ModelTokenizer, *, origin: str) -> EngineInfo:
    """Return the facts about a model that generates.  Args: origin: digest of where its files come from."""
    return replace(
        engine_info(config.public_name, ready),
        capabilities=Capabilities(unsupported=ready.unsupported, adapters=True, priority=ready.runner == "batching"),
        recommended=ready.recommended,
        stop_strings=ready.stop_strings,
        rules=ready.rules,
        template_variables=tokenizer.template_variables,
        renders_reasoning=tokenizer.renders_reasoning,
        logprob_shift=ready.logprob_shift,
        compiled=ready.compiled,
        ways=tuple(dict.fromkeys(each.way for each in ready.step_times)),
        step_times=ready.step_times,
        chat_format=detect_format(tokenizer.traits, config),
        origin=origin,
    )


def _tokenizer_class() -> Callable[..., ModelTokenizer]:
    from app.engine.tokenizer.hf_tokenizer import HfTokenizer

    return HfTokenizer
