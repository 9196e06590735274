"""The engine of a model that embeds and does nothing else, in a worker process of its own."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from app.config import DeadlineConfig, EmbeddingsConfig
from app.embeddings import EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.base import Capabilities, EngineInfo, EngineStatus
from app.engine.embedding_queue import EmbeddingQueue
from app.engine.model_source import WorkerLauncher
from app.engine.tokenizer.encoder_tokenizer import EncoderTokenizer
from app.engine.tokenizer.prepare import EncodingThreads
from app.engine.worker_status import engine_info, engine_status, first_line, not_ready
from app.ipc.messages import AdapterFailed, AdapterLoaded, Embedded, ModelSpec, Ready, TokenEvent
from app.ipc.spare_interpreters import SpareInterpreters
from app.ipc.supervisor import Launch, Supervisor
from app.ipc.worker_process import WorkerLostError


class LocalEncoder:
    """One encoder in one worker process, which is started again whenever it dies; an `EncoderEngine`."""

    def __init__(
        self,
        config: EmbeddingsConfig,
        deadlines: DeadlineConfig,
        *,
        name: str | None = None,
        hub_token: str | None = None,
        load_token: str | None = None,
        interpreters: SpareInterpreters | None = None,
        hang_seconds: float = 30.0,
        stall_seconds: float = 120.0,
        backoff_seconds: float = 1.0,
        launch: Launch | None = None,
    ) -> None:
        """Prepare; `start` begins.

        Args: name: that clients see; None is the model's own.  The others are those of `LocalEngine`.
        """
        self._name = name or config.public_name
        self._interpreters = interpreters or SpareInterpreters(enabled=False)
        self._started = False
        self._launcher = WorkerLauncher(_spec(config), self._interpreters, hub_token=hub_token, load_token=load_token)
        self._worker = Supervisor(
            launch or self._launcher,
            self,
            hang_seconds=hang_seconds,
            stall_seconds=stall_seconds,
            backoff_seconds=backoff_seconds,
        )
        self._ready: Ready | None = None
        self._info: EngineInfo | None = None
        self._tokenizer: EncoderTokenizer | None = None
        self._threads = EncodingThreads(deadlines.waiting_seconds)
        self._queue = EmbeddingQueue(self._worker, count(1), deadlines, config.max_waiting_tokens)

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no model has been loaded yet."""
        if self._info is None:
            raise not_ready(self._worker)
        return self._info

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""
        return engine_status(self._worker, running=self._queue.running, waiting=self._queue.waiting, ready=self._ready)

    async def start(self) -> None:
        """Begin to load the model and return at once; `wait_ready` reports the outcome."""
        if not self._started:
            self._started = True
            await self._interpreters.open()
        self._worker.start()

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.

        Raises: EngineFailed: the model cannot be loaded, or the engine is closed.
        """
        await self._worker.wait_ready()

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of an input that arrived as tokens."""
        return await asyncio.to_thread(self._ready_tokenizer().decode, token_ids)

    async def prepare_embedding(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode the texts of a request, each behind its prompt."""
        tokenizer, embedding = self._ready_tokenizer(), self.info.embedding
        if embedding is None:
            raise not_ready(self._worker)
        prompt, most = embedding.prompt(request.prompt_name, request.input_type), request.most_tokens(embedding)
        encode = partial(tokenizer.encode, request.inputs, prompt=prompt, truncate=most)
        encoded = await self._threads.in_thread(request.tenant, encode)
        return EncodedInputs(
            token_ids=encoded.token_ids, prompt_tokens=0 if embedding.pools_prompt else encoded.prompt_tokens
        )

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Return the vectors of prepared texts; cancelling this ends the request within a pass."""
        return await self._queue.run(request, self.info)

    async def abort(self, request_id: str) -> None:
        """End a request now.  Unknown ids are ignored."""
        self._queue.abort(request_id)

    async def close(self) -> None:
        """Stop for good: live requests end, and no process or task is left."""
        await self._worker.close()
        await self._launcher.close()
        if self._started:
            self._started = False
            await self._interpreters.close()
        self._threads.close()

    async def on_ready(self, ready: Ready) -> None:
        """Take over the model that the worker loaded.

        Raises: WorkerLostError: its tokenizer cannot be used here.
        """
        try:
            # A thread: reading a large vocabulary takes up to seconds.
            self._tokenizer = await asyncio.to_thread(EncoderTokenizer, ready.tokenizer_folder)
        except Exception as error:
            raise WorkerLostError(f"The model's tokenizer cannot be loaded: {first_line(error)}.") from error
        self._launcher.on_ready(ready)
        self._ready = ready
        self._info = replace(
            engine_info(self._name, ready),
            capabilities=Capabilities(priority=True),
        )
        await self._interpreters.prepare()

    def on_event(self, event: TokenEvent) -> None:
        """Note that a request has begun or ended."""
        self._queue.on_event(event)

    def on_steps(self, seconds: Sequence[float], preempted: int) -> None:
        """Ignore them: an encoder makes none."""

    def on_embedded(self, embedded: Embedded) -> None:
        """Route vectors to their request."""
        self._queue.on_embedded(embedded)

    def on_adapter(self, answer: AdapterLoaded | AdapterFailed) -> None:
        """Ignore it: an encoder is never told to load an adapter."""

    def on_unresponsive(self) -> None:
        """Fail every live request now."""
        self._queue.on_unresponsive()

    def on_lost(self) -> None:
        """Fail every live request: the worker that ran them is gone."""
        self._queue.on_lost()

    def on_close(self) -> None:
        """Fail every live request: the service ends."""
        self._queue.on_close()

    def _ready_tokenizer(self) -> EncoderTokenizer:
        if self._tokenizer is None:
            raise not_ready(self._worker)
        return self._tokenizer


def _spec(config: EmbeddingsConfig) -> ModelSpec:
    return ModelSpec(
        name=config.model,
        source=config.source,
        device=config.device,
        dtype=config.dtype,
        revision=config.revision,
        max_model_len=config.max_tokens,
        threads=config.threads,
        task="embed",
        max_batch_tokens=config.max_batch_tokens,
        matryoshka=config.matryoshka,
    )
