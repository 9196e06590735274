"""Requests that share one generation divide its tokens: each is charged once, to a request that was there for it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.config import CacheConfig
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.errors import EngineFailed
from app.events import CacheStatus, Delta, Event, Finished, Started, finish
from app.requests import GenerationRequest
from app.types import FinishReason, Usage
from tests.examples import examples
from tests.unit.engine.scripted import ScriptedEngine, make_request
from tests.unit.event_streams import finished_of

PROMPTS = ((1, 2, 3), (4, 5))
"""Two different requests; those of one prompt are identical."""


class SteppedEngine(EchoEngine):
    """Generates when it is told to: tokens that are sent at once, or withheld as a filter withholds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[GenerationRequest, asyncio.Queue[int | FinishReason | EngineFailed]]] = []
        self.requests: list[GenerationRequest] = []

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        commands: asyncio.Queue[int | FinishReason | EngineFailed] = asyncio.Queue()
        self.live.append((request, commands))
        withheld = 0
        try:
            yield Started(prompt_tokens=request.prompt_tokens)
            while True:
                match await commands.get():
                    case EngineFailed() as error:
                        raise error
                    case FinishReason() as reason:
                        request.progress.generated += 1  # the end token, which no delta counts
                        yield finish(reason, Usage(request.prompt_tokens, request.progress.generated))
                        return
                    case int() as shown:
                        request.progress.generated += 1
                        withheld += 1
                        if shown:
                            yield Delta(text="a", tokens=withheld)
                            withheld = 0
        finally:
            self.live.remove((request, commands))


@dataclass(eq=False)
class Reader:
    """One request: what it received, and what was generated while it was there."""

    request: GenerationRequest
    stream: AsyncGenerator[Event, None]
    received: int = 0
    was_there_for: int = 0
    over: bool = False
    events: list[Event] = field(default_factory=list)

    @property
    def charged(self) -> int:
        return self.request.progress.generated

    async def advance(self) -> None:
        """Read one event if there is one."""
        try:
            async with asyncio.timeout(0.001):
                event = await anext(self.stream)
        except TimeoutError:
            self.over = True  # a cancelled generator has ended
        except (StopAsyncIteration, EngineFailed):
            self.over = True
        else:
            self.events.append(event)
            self.received += event.tokens if isinstance(event, Delta) else 0
            self.over = isinstance(event, Finished)


@dataclass
class Cached:
    """A cache over an engine that is stepped, and the requests that read from it."""

    inner: SteppedEngine = field(default_factory=SteppedEngine)
    readers: list[Reader] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine = CachedEngine(self.inner, CacheConfig())

    @property
    def present(self) -> list[Reader]:
        return [reader for reader in self.readers if not reader.over]

    async def join(self, which: int) -> Reader:
        request = make_request(str(len(self.readers)), prompt_ids=PROMPTS[which % len(PROMPTS)])
        reader = Reader(request, self.engine.stream(request))
        self.readers.append(reader)
        reader.events.append(await anext(reader.stream))
        return reader

    async def generate(self, which: int, command: int | FinishReason | EngineFailed) -> None:
        if self.inner.live:
            request, commands = self.inner.live[which % len(self.inner.live)]
            commands.put_nowait(command)
            for _ in range(4):
                await asyncio.sleep(0)
            if not isinstance(command, EngineFailed):
                for reader in self.present:
                    reader.was_there_for += reader.request.prompt_ids == request.prompt_ids

    async def leave(self, reader: Reader) -> None:
        reader.over = True
        await reader.stream.aclose()

    async def end(self) -> None:
        for reader in self.readers:
            await self.leave(reader)
        await self.engine.close()


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["join", "token", "withheld", "read", "drain", "leave", "abort", "end", "fail"]),
              st.integers(0, 7)),
    max_size=40,
)  # fmt: skip


async def run(operations: list[tuple[str, int]]) -> Cached:
    cached = Cached()
    for name, which in operations:
        reader = cached.present[which % len(cached.present)] if cached.present else None
        match name:
            case "join":
                await cached.join(which)
            case "token" | "withheld":
                await cached.generate(which, int(name == "token"))
            case "end":
                await cached.generate(which, FinishReason.STOP)
            case "fail":
                await cached.generate(which, EngineFailed("It failed."))
            case _ if reader is None:
                pass
            case "read":
                await reader.advance()
            case "drain":
                while not reader.over:
                    await reader.advance()
            case "leave":
                await cached.leave(reader)
            case "abort":
                await cached.engine.abort(reader.request.id)
    await cached.end()
    return cached


@given(OPERATIONS)
@example([("join", 0), ("withheld", 0), ("join", 0), ("end", 0), ("read", 1)])
@examples(150)
def test_whatever_joins_leaves_and_ends_each_token_is_charged_once(operations: list[tuple[str, int]]):
    """All that was generated, to nobody who was not there, and each prompt to one request."""
    cached = asyncio.run(run(operations))

    generated = [request.progress.generated for request in cached.inner.requests]
    assert sum(generated) == sum(reader.charged for reader in cached.readers)
    for reader in cached.readers:
        assert reader.charged <= reader.was_there_for + reader.received
    with_prompt = [each for each in cached.readers if each.charged and not each.request.progress.shares_prompt]
    assert sum(tokens > 0 for tokens in generated) == len(with_prompt)


async def test_who_joins_pays_for_what_it_receives_after_the_first_has_left():
    """The reported case: one begins and hangs up early, the other receives nearly all of it."""
    cached = Cached()
    starter, joiner = await cached.join(0), await cached.join(0)
    for _ in range(9):
        await cached.generate(0, 1)
        await starter.advance()
        await joiner.advance()
    await cached.leave(starter)
    for _ in range(30):
        await cached.generate(0, 1)
        await joiner.advance()
    await cached.generate(0, FinishReason.STOP)
    await joiner.advance()

    assert (9, 31) == (starter.charged, joiner.charged)
    assert (False, True) == (starter.request.progress.shares_prompt, joiner.request.progress.shares_prompt)
    assert CacheStatus.MISS is finished_of(joiner.events).cache
    await cached.end()


async def test_who_stays_to_the_end_pays_and_who_joined_does_not():
    """Joiners that leave early, or stay, share for nothing what the first pays for."""
    cached = Cached()
    readers = [await cached.join(0) for _ in range(3)]
    for _ in range(5):
        await cached.generate(0, 1)
        for reader in readers:
            await reader.advance()
    await cached.leave(readers[1])
    await cached.generate(0, FinishReason.LENGTH)
    for reader in (readers[0], readers[2]):
        await reader.advance()

    assert [6, 0, 0] == [reader.charged for reader in readers]
    assert CacheStatus.HIT is finished_of(readers[2].events).cache
    await cached.end()


@pytest.mark.parametrize("reads", [0, 4])
async def test_a_request_that_receives_nothing_pays_nothing_where_another_received_it(reads: int):
    """The first reads little or nothing, and leaves after the second has received all."""
    cached = Cached()
    starter, joiner = await cached.join(0), await cached.join(0)
    for number in range(10):
        await cached.generate(0, 1)
        if number < reads:
            await starter.advance()
        await joiner.advance()
    await cached.generate(0, FinishReason.STOP)
    await joiner.advance()
    await cached.leave(starter)

    assert (reads, 11 - reads) == (starter.charged, joiner.charged)
    await cached.end()


async def test_both_leave_in_the_middle_and_all_that_was_generated_is_paid():
    """Also what neither of them had received yet."""
    cached = Cached()
    starter, joiner = await cached.join(0), await cached.join(0)
    for _ in range(6):
        await cached.generate(0, 1)
    await starter.advance()
    await cached.leave(starter)
    await joiner.advance()
    await cached.generate(0, 0)
    await cached.leave(joiner)

    assert (1, 6) == (starter.charged, joiner.charged)
    assert 7 == cached.inner.requests[0].progress.generated
    await cached.end()


async def test_an_aborted_request_is_charged_when_it_has_ended():
    """A clean-up that takes a while, and a task that is cancelled meanwhile, lose no token."""
    inner = ScriptedEngine("a", "b", "c")
    engine = CachedEngine(inner, CacheConfig())
    request = make_request("1")
    stream = engine.stream(request)
    await anext(stream)
    inner.step(2)
    await asyncio.sleep(0.01)
    inner.may_clean_up.clear()
    leaving = asyncio.create_task(stream.aclose())
    await inner.cleaning_up.wait()
    leaving.cancel()
    with suppress(asyncio.CancelledError):
        await leaving
    inner.may_clean_up.set()

    assert 2 == request.progress.generated


async def test_who_pays_for_a_prompt_is_told_how_much_of_it_was_in_the_kv_cache():
    """And when its generation began; who joins is told neither, for it computed nothing."""
    cached = Cached()
    starter, joiner = await cached.join(0), await cached.join(0)
    generation = cached.inner.requests[0].progress
    generation.cached, generation.times.accepted = 2, 5.0
    await cached.generate(0, 1)
    await cached.generate(0, FinishReason.STOP)
    for reader in (starter, joiner):
        await reader.advance()
        await reader.advance()

    noted = [reader.request.progress for reader in (starter, joiner)]
    assert [(2, 5.0), (0, None)] == [(each.cached, each.times.accepted) for each in noted]
    await cached.end()
