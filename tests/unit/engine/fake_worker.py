"""A worker without a process: the test says what it does, and reads what it was told."""

import asyncio
from pathlib import Path

from app.engine.channel import WorkerLostError
from app.engine.worker.messages import Cancel, FromWorker, Ready, Shutdown, Step, Submit, TokenEvent, ToWorker


class FakeLink:
    """One life of a worker.  Keeps the book that a real one keeps: what it was given and has not ended."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.heard: list[ToWorker] = []
        self.open: list[int] = []
        self.stopped = False
        self._said: asyncio.Queue[FromWorker | WorkerLostError] = asyncio.Queue()

    def send(self, message: ToWorker) -> None:
        self.heard.append(message)
        if isinstance(message, Submit):
            self.open.append(message.id)
        if isinstance(message, Shutdown):
            self.kill()

    async def receive(self) -> list[FromWorker]:
        said = await self._said.get()
        if isinstance(said, WorkerLostError):
            raise said
        return [said]

    def kill(self) -> None:
        self._said.put_nowait(WorkerLostError("The fake worker is gone."))

    async def stop(self, grace_seconds: float) -> None:
        self.stopped = True

    def say(self, message: FromWorker) -> None:
        self._said.put_nowait(message)

    def event(self, number: int, *token_ids: int, finish: str | None = None, error: str | None = None) -> None:
        """Tell what happened to one request."""
        if (finish or error) and number in self.open:
            self.open.remove(number)
        self.say(Step([TokenEvent(number, token_ids, finish, error)]))  # type: ignore[arg-type]  # a word of the test

    @property
    def cancelled(self) -> list[int]:
        return [message.id for message in self.heard if isinstance(message, Cancel)]


class FakeWorkers:
    """Starts fake workers one after another; each is ready at once unless told otherwise."""

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
