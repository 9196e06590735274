"""A worker without a process: the test scripts what it sends, and reads what it receives.  And engines on it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from app.config import DeadlineConfig, ModelConfig
from app.engine.local import LocalEngine
from app.events import Event
from app.ipc.liveness import Pulse
from app.ipc.messages import Cancel, FromWorker, Ready, Shutdown, Step, Submit, TokenEvent, ToWorker, encode
from app.ipc.worker_process import WorkerLostError
from app.requests import GenerationRequest
from app.types import SamplingParams, Tenant, TokenLogprob
from tests.unit import event_streams
from tests.unit.tiny_models import chatml_tokenizer
from tests.waiting import until

TOKENIZER = chatml_tokenizer()


class FakeLink:
    """One life of a worker.  Tracks what a real one tracks: the requests that were submitted and have not ended."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.heard: list[ToWorker] = []
        self.open: list[int] = []
        self.stopped = False
        self.suspended = False
        """Whether it shows no sign of life, as a process that the system has stopped."""
        self.ticks = 0
        """Progress that it shows besides its messages."""
        self._beats = 0
        self._sent: asyncio.Queue[FromWorker | WorkerLostError] = asyncio.Queue()

    def send(self, message: ToWorker) -> None:
        encode(message)  # which fails for what a real one could not be sent either
        self.heard.append(message)
        if isinstance(message, Submit):
            self.open.append(message.id)
        if isinstance(message, Shutdown):
            self.kill()

    async def receive(self) -> list[FromWorker]:
        sent = await self._sent.get()
        if isinstance(sent, WorkerLostError):
            raise sent
        return [sent]

    def pulse(self) -> Pulse:
        if not self.suspended:
            self._beats += 1
        return Pulse(self._beats, 0, self.ticks)

    def kill(self) -> None:
        self._sent.put_nowait(WorkerLostError("The fake worker is gone."))

    async def stop(self, grace_seconds: float) -> None:
        self.stopped = True

    def say(self, message: FromWorker) -> None:
        self.ticks += 1
        self._sent.put_nowait(message)

    def event(
        self,
        number: int,
        *token_ids: int,
        finish: str | None = None,
        error: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        """Send what happened to one request."""
        if (finish or error) and number in self.open:
            self.open.remove(number)
        end_token = 0 if finish == "stop" else None
        said = TokenEvent(number, token_ids, finish, error, logprobs, end_token=end_token)  # type: ignore[arg-type]  # a word of the test
        self.say(Step([said]))

    @property
    def cancelled(self) -> list[int]:
        return [message.id for message in self.heard if isinstance(message, Cancel)]


class FakeWorkers:
    """Starts fake workers one after another; each is ready at once unless the test wants otherwise."""

    def __init__(self, tokenizer_folder: Path, *, slots: int = 1, ready: bool = True) -> None:
        self.links: list[FakeLink] = []
        self.ready = ready
        self.message = Ready(
            tokenizer_folder=str(tokenizer_folder),
            runner="serial",
            slots=slots,
            revision=None,
            device="cpu",
            dtype="float32",
            context_length=64,
            vocab_size=300,
            parameters=1,
        )

    async def __call__(self) -> FakeLink:
        self.links.append(FakeLink())
        if self.ready:
            self.links[-1].say(self.message)
        return self.links[-1]

    @property
    def newest(self) -> FakeLink:
        return self.links[-1]


@asynccontextmanager
async def engine_on(
    workers: FakeWorkers, *, max_waiting: int = 8, deadlines: DeadlineConfig | None = None, **options: Any
) -> AsyncIterator[LocalEngine]:
    """Yield an engine that is ready, and close it at the end."""
    options = {"backoff_seconds": 0.0} | options
    engine = LocalEngine(ModelConfig(max_waiting=max_waiting), deadlines or DeadlineConfig(), launch=workers, **options)
    await engine.start()
    if workers.ready:
        await engine.wait_ready()
    try:
        yield engine
    finally:
        await engine.close()


def make_request(
    name: str = "one", *, prompt: tuple[int, ...] = (1, 2), stream: bool = True, **sampling: Any
) -> GenerationRequest:
    """Return a request of at most 50 tokens unless `sampling` wants otherwise."""
    params = SamplingParams(**{"max_tokens": 50} | sampling)
    return GenerationRequest(id=name, tenant=Tenant.owner("tenant"), prompt_ids=prompt, sampling=params, stream=stream)


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


async def read(engine: LocalEngine, request: GenerationRequest) -> list[Event]:
    return await event_streams.read(engine.stream(request))


async def begun(engine: LocalEngine, link: FakeLink, request: GenerationRequest) -> asyncio.Task[list[Event]]:
    """Start to read a completion, and let the worker begin on it."""
    before = len(link.open)
    task = asyncio.create_task(read(engine, request))
    await until(lambda: len(link.open) > before or task.done())
    link.event(link.open[-1])
    await until(lambda: engine.status().running > 0)
    return task
