"""Whatever happens in whatever order, each admitted request gets exactly one outcome and nothing is left behind."""

import asyncio
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
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
from app.engine.local import LocalEngine
from app.errors import AppError, EngineBusy, EngineNotReady
from app.events import Delta, Event, Finished
from app.requests import GenerationRequest
from app.types import EngineState
from tests.examples import examples
from tests.unit.engine.fake_worker import FakeWorkers, make_request
from tests.unit.event_streams import deltas_of, read_into
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

    request: GenerationRequest
    events: list[Event] = field(default_factory=list)
    outcomes: list[object] = field(default_factory=list)
    generated: int = 0
    """Tokens that the worker sent while the request lived."""
    task: "asyncio.Task[None] | None" = None

    @property
    def admitted(self) -> bool:
        return bool(self.events)

    async def read(self, engine: LocalEngine) -> None:
        try:
            await read_into(self.events, engine.stream(self.request))
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
        self.admitted: list[Reader] = []
        """In the order in which the engine numbers them, from 1."""

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

    @rule(name=NAMES, stop=st.sampled_from([(), ("h",)]), stream=st.booleans())
    def submit(self, name: str, stop: tuple[str, ...], stream: bool) -> None:
        """A client sends a request; with no slot free, or no model, it is refused before its first event."""
        if name in self.live:
            return
        ready, full = self.engine.status().state is EngineState.READY, len(self.live) > WAITING
        reader = Reader(make_request(name, max_tokens=20, stop=stop, stream=stream))
        reader.task = self.loop.create_task(reader.read(self.engine))
        self.all.append(reader)
        self.live[name] = reader
        self.tick()
        assert reader.admitted == (ready and not full)
        if reader.admitted:
            self.admitted.append(reader)
        else:
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
            number = link.open[which % len(link.open)]
            reader = self.admitted[number - 1]
            if not reader.outcomes:
                reader.generated += len(token_ids) + (finish == "stop")
            link.event(number, *token_ids, finish=finish, error=error)
            self.tick()

    @rule(number=st.integers(1, 30))
    def late_event(self, number: int) -> None:
        """An event of a request that has ended reaches nobody."""
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
    def the_status_agrees_with_the_clients(self) -> None:
        """As many live requests as clients that wait, never more than fit."""
        status = self.engine.status()
        assert len(self.live) == status.running + status.waiting <= WAITING + 1

    @invariant()
    def each_stream_is_well_formed(self) -> None:
        """Finished comes last and only once, the deltas count no more tokens than it does, and few wake the reader."""
        for reader in self.all:
            ended = [event for event in reader.events if isinstance(event, Finished)]
            assert ended == reader.events[-1:] * (reader.outcomes == ["end"])
            deltas = deltas_of(reader.events)
            assert all(isinstance(event, Delta) for event in reader.events[1 : len(reader.events) - len(ended)])
            assert reader.request.stream or len(deltas) <= 2
            for event in ended:
                assert sum(delta.tokens for delta in deltas) <= event.usage.completion_tokens == reader.generated

    @invariant()
    def progress_is_exact(self) -> None:
        """Whatever became of a request, it counts what the worker generated for it while it lived."""
        assert [reader.generated for reader in self.all] == [reader.request.progress.generated for reader in self.all]

    @invariant()
    def the_worker_learns_of_every_end(self) -> None:
        """Nothing runs on for nobody: what the worker still has is live, or cancelled."""
        link = self.workers.newest
        assert len([number for number in link.open if number not in link.cancelled]) <= len(self.live)


@pytest.mark.hypothesis
def test_every_request_gets_exactly_one_outcome():
    """Random lives of clients and workers."""
    run_state_machine_as_test(EngineMachine, settings=examples(60, stateful_step_count=40))
