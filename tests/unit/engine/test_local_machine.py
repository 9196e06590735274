"""Whatever happens in whatever order, each admitted request gets exactly one outcome and nothing is left behind."""

import asyncio
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.config import DeadlineConfig, ModelConfig
from app.engine.base import Chunk, GenerationRequest
from app.engine.local import LocalEngine
from app.errors import AppError, EngineBusy, EngineNotReady
from app.types import EngineState, FinishReason, SamplingParams
from tests.unit.engine.fake_worker import FakeWorkers
from tests.unit.tiny_models import chatml_tokenizer, save

NAMES = st.sampled_from("abcde")
PICK = st.integers(0, 4)
WAITING = 2


@cache
def tokenizer_folder() -> Path:
    return save(chatml_tokenizer(), Path(mkdtemp(prefix="tokenizer-")))


@dataclass
class Reader:
    """One client, and what it got."""

    chunks: list[Chunk] = field(default_factory=list)
    outcomes: list[object] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None

    @property
    def admitted(self) -> bool:
        return bool(self.chunks)

    async def read(self, engine: LocalEngine, request: GenerationRequest) -> None:
        try:
            async for chunk in engine.stream(request):
                self.chunks.append(chunk)
        except (AppError, asyncio.CancelledError) as error:
            self.outcomes.append(error)
        else:
            self.outcomes.append("end")


class EngineMachine(RuleBasedStateMachine):
    """Clients, a worker that may do anything, and the end of either at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.workers = FakeWorkers(tokenizer_folder(), slots=1)
        self.live: dict[str, Reader] = {}
        self.all: list[Reader] = []

    @initialize()
    def load(self) -> None:
        self.loop.run_until_complete(self._load())

    async def _load(self) -> None:
        self.engine = LocalEngine(
            ModelConfig(max_waiting=WAITING), DeadlineConfig(), backoff_seconds=0, launch=self.workers
        )
        await self.engine.start()
        await self.engine.wait_ready()

    def tick(self) -> None:
        """Let everything happen that can."""

        async def rest() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(rest())
        self.live = {name: reader for name, reader in self.live.items() if not reader.outcomes}

    def teardown(self) -> None:
        self.loop.run_until_complete(self.engine.close())
        self.tick()
        for reader in self.all:
            assert 1 == len(reader.outcomes)
        assert not asyncio.all_tasks(self.loop)
        assert all(link.stopped for link in self.workers.links)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    @rule(name=NAMES, stop=st.sampled_from([(), ("h",)]))
    def submit(self, name: str, stop: tuple[str, ...]) -> None:
        """A client asks; with no place, or no model, it is refused before its first chunk."""
        if name in self.live:
            return
        ready, full = self.engine.status().state is EngineState.READY, len(self.live) > WAITING
        reader = Reader()
        request = GenerationRequest(name, "t", (1, 2), SamplingParams(max_tokens=20, stop=stop))
        reader.task = self.loop.create_task(reader.read(self.engine, request))
        self.all.append(reader)
        self.live[name] = reader
        self.tick()
        assert reader.admitted == (ready and not full)
        if not reader.admitted:
            assert isinstance(reader.outcomes[0], EngineBusy if ready else EngineNotReady)

    @rule(which=PICK, token=st.integers(0, 280))
    def make_token(self, which: int, token: int) -> None:
        self._event(which, token)

    @rule(which=PICK)
    def begin(self, which: int) -> None:
        self._event(which)

    @rule(which=PICK, finish=st.sampled_from(["stop", "length", "abort"]))
    def finish(self, which: int, finish: str) -> None:
        self._event(which, finish=finish)

    @rule(which=PICK)
    def fail(self, which: int) -> None:
        self._event(which, error="It failed.")

    def _event(self, which: int, *token_ids: int, finish: str | None = None, error: str | None = None) -> None:
        link = self.workers.newest
        if link.open:
            link.event(link.open[which % len(link.open)], *token_ids, finish=finish, error=error)
            self.tick()

    @rule(number=st.integers(1, 30))
    def late_event(self, number: int) -> None:
        """A word about a request that has ended reaches nobody."""
        if number not in self.workers.newest.open:
            self.workers.newest.event(number, 5, finish="length")
            self.tick()

    @rule(name=NAMES)
    def hang_up(self, name: str) -> None:
        reader = self.live.get(name)
        if reader is not None and reader.task is not None:
            reader.task.cancel()
            self.tick()
            assert name not in self.live

    @rule(name=NAMES)
    def abort(self, name: str) -> None:
        reader = self.live.get(name)
        self.loop.run_until_complete(self.engine.abort(name))
        self.tick()
        if reader is not None:
            assert "end" == reader.outcomes[0]

    @rule(at_once=st.booleans())
    def die(self, at_once: bool) -> None:
        """The worker dies; the next one is ready now or later."""
        if self.engine.status().state is EngineState.READY:
            self.workers.ready = at_once
            self.workers.newest.kill()
            self.tick()
            assert {} == self.live
            if at_once:
                self.loop.run_until_complete(self.engine.wait_ready())

    @precondition(lambda self: self.engine.status().state is EngineState.RESTARTING)
    @rule()
    def come_back(self) -> None:
        self.workers.newest.say(self.workers.message)
        self.loop.run_until_complete(self.engine.wait_ready())

    @invariant()
    def the_book_agrees_with_the_clients(self) -> None:
        """As many live requests as clients that wait, never more than fit."""
        status = self.engine.status()
        assert len(self.live) == status.running + status.waiting <= WAITING + 1

    @invariant()
    def each_answer_is_well_formed(self) -> None:
        """Only the last chunk tells the end, and the tokens add up to the usage."""
        for reader in self.all:
            ended = [chunk for chunk in reader.chunks if chunk.finish_reason or chunk.usage]
            assert ended == reader.chunks[-1:] * (reader.outcomes == ["end"])
            for chunk in ended:
                assert isinstance(chunk.finish_reason, FinishReason)
                assert chunk.usage
                assert chunk.usage.completion_tokens == sum(piece.tokens for piece in reader.chunks)

    @invariant()
    def the_worker_is_told_of_every_end(self) -> None:
        """Nothing runs on for nobody: what the worker still has is live, or cancelled."""
        link = self.workers.newest
        assert len([number for number in link.open if number not in link.cancelled]) <= len(self.live)


def test_every_request_gets_exactly_one_outcome():
    """Random lives of clients and workers."""
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
