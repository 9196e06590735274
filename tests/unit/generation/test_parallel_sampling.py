"""Several answers to one ask: made at once, merged, measured together, and ended together."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from app.config import CacheConfig, ChatHistoryConfig
from app.engine.base import Chunk, Engine, GenerationRequest
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.host import EngineRegistry
from app.errors import EngineBusy, EngineFailed, InvalidRequest
from app.generation.requests import ChatAsk, CompletionAsk, Delta, Finished, Sampling, Started, collect
from app.generation.service import GenerationService
from app.generation.sessions import MemorySessionStore
from app.langchain.chains import Chains
from app.telemetry import Metrics
from app.types import FinishReason, Message, Principal, Role, TokenLogprob, Usage
from tests.unit.generation.free import free_accounts

ANNA = Principal("a", "anna")
LONG, SOON = 60.0, 5.0
"""Seconds that an answer takes if nobody ends it, and that ending it may take on a busy machine."""
Make = Callable[..., GenerationService]


class SamplesEngine(EchoEngine):
    """Answer k is k + 2 letters long, and says what became of each request."""

    def __init__(self, *, failing: int | None = None, **settings: Any) -> None:
        """Args: failing: the answer that breaks as soon as it is admitted."""
        super().__init__(**settings)
        self.failing = failing
        self.asked: list[GenerationRequest] = []
        self.running = 0

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.asked.append(request)
        self.running += 1
        try:
            async with aclosing(super().stream(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    if request.params.sample == self.failing:
                        raise EngineFailed("This answer failed.")
        finally:
            self.running -= 1

    async def _speak(self, request: GenerationRequest, aborted: asyncio.Event) -> AsyncGenerator[Chunk, None]:
        sample, sent = request.params.sample, 0
        scores = (TokenLogprob(ord("a") + sample, -0.5),) if request.params.logprobs is not None else ()
        while sent < sample + 2 and not aborted.is_set():
            await asyncio.sleep(self._delay)
            sent += 1
            yield Chunk(text="abcdefgh"[sample], tokens=1, logprobs=scores, token_ends=(1,) * len(scores))
        reason = FinishReason.ABORT if aborted.is_set() else FinishReason.STOP
        usage = Usage(len(request.prompt_ids), sent, cached_tokens=sample)
        yield Chunk(finish_reason=reason, usage=usage)


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Build a service over an engine that is ready."""
    made: list[EngineRegistry] = []

    async def make(engine: Engine) -> GenerationService:
        registry = EngineRegistry({"echo": engine})
        made.append(registry)
        await registry.start()
        return GenerationService(
            engines=registry,
            chains={"echo": Chains(engine, "echo")},
            input_filter=None,
            sessions=MemorySessionStore(ChatHistoryConfig()),
            system_prompt="sys",
            default_max_tokens=100,
            default_temperature=0,
            metrics=Metrics(["echo"]),
            accounts=free_accounts(),
        )

    yield make
    for registry in made:
        await registry.close()


_ids = iter(range(10**9))


def complete(n: int, **fields: Any) -> CompletionAsk:
    return CompletionAsk(id=f"r{next(_ids)}", caller=ANNA, prompt="hello", sampling=Sampling(n=n, **fields))


def chat(n: int, **fields: Any) -> ChatAsk:
    return ChatAsk(
        id=f"r{next(_ids)}", caller=ANNA, messages=(Message(Role.USER, "hi"),), sampling=Sampling(n=n), **fields
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON):
        while not condition():  # noqa: ASYNC110  # what is waited for has no event
            await asyncio.sleep(0.001)


async def let_go(engine: SamplesEngine) -> None:
    await asyncio.sleep(0)
    assert 0 == engine.running == engine.status().running


async def test_each_answer_is_asked_for_with_a_number_and_an_id_of_its_own(make: Make) -> None:
    """One seed, n draws; nothing else differs, so that the engine can share the prompt."""
    engine = SamplesEngine()
    ask = complete(3, seed=7)

    await collect((await make(engine)).complete(ask))

    assert [0, 1, 2] == sorted(request.params.sample for request in engine.asked)
    assert 3 == len({request.id for request in engine.asked})
    assert {7} == {request.params.seed for request in engine.asked}
    assert 1 == len({request.prompt_ids for request in engine.asked})
    assert all(request.id.startswith(ask.id) for request in engine.asked)


@pytest.mark.parametrize("ask", [complete(3), chat(3)], ids=["complete", "chat"])
async def test_answers_are_merged_under_their_index(make: Make, ask: Any) -> None:
    """Started once, pieces of each answer in order, Finished once at the very end with every ending."""
    service = await make(SamplesEngine())
    events = [event async for event in (service.complete if isinstance(ask, CompletionAsk) else service.chat)(ask)]

    texts: defaultdict[int, str] = defaultdict(str)
    for event in events[1:-1]:
        assert isinstance(event, Delta)
        assert event.text
        texts[event.index] += event.text
    assert isinstance(events[0], Started)
    assert {0: "aa", 1: "bbb", 2: "cccc"} == texts
    assert isinstance(events[-1], Finished)
    assert [2, 3, 4] == [ending.tokens for ending in events[-1].endings]


async def test_answers_come_as_they_are_made_and_not_one_after_another(make: Make) -> None:
    """The second has begun before the first has ended."""
    service = await make(SamplesEngine(token_delay_seconds=0.002))

    indices = [event.index async for event in service.complete(complete(3)) if isinstance(event, Delta)]

    assert {0, 1, 2} == set(indices[:3])


async def test_usage_counts_the_prompt_once_and_every_answer(make: Make) -> None:
    """Cached tokens are the first answer's: the others share what it computed."""
    reply = await collect((await make(SamplesEngine())).complete(complete(3)))

    assert Usage(prompt_tokens=5, completion_tokens=2 + 3 + 4, cached_tokens=0) == reply.finished.usage
    assert ["aa", "bbb", "cccc"] == [completion.text for completion in reply.completions]
    assert [FinishReason.STOP] * 3 == [completion.finish_reason for completion in reply.completions]
    assert "aa" == reply.text


async def test_log_probabilities_belong_to_their_answer(make: Make) -> None:
    """Each token with its text and bytes; none where they were not asked for."""
    service = await make(SamplesEngine())

    asked = await collect(service.complete(complete(2, logprobs=0)))
    unasked = await collect(service.complete(complete(2)))

    told = [[(token.text, token.raw, token.logprob) for token in each.tokens] for each in asked.completions]
    assert [[("a", b"a", -0.5)] * 2, [("b", b"b", -0.5)] * 3] == told
    assert [(), ()] == [each.tokens for each in unasked.completions]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_token_comes_with_its_own_piece_of_text(make: Make, n: int) -> None:
    """Not with an earlier one of its answer, however far ahead of the reader the engine is."""
    events = [event async for event in (await make(SamplesEngine())).complete(complete(n, logprobs=0))]

    pieces = [(event.text, [token.text for token in event.tokens]) for event in events if isinstance(event, Delta)]
    assert [(text, [text]) for text, _ in pieces] == pieces


async def test_an_answer_is_cached_only_if_all_its_parts_are(make: Make) -> None:
    """Three answers after two are one generation more; the same three again are none."""
    engine = SamplesEngine()
    service = await make(CachedEngine(engine, CacheConfig()))

    cached = [(await collect(service.complete(complete(n)))).finished.cached for n in (2, 3, 3)]

    assert [False, False, True] == cached
    assert 3 == len(engine.asked)


async def test_if_one_is_refused_all_are_and_nothing_begins(make: Make) -> None:
    """An engine with room for two refuses three, and both places are free again."""
    engine = SamplesEngine(max_running=2, token_delay_seconds=0.001)
    service = await make(engine)

    with pytest.raises(EngineBusy):
        await anext(service.complete(complete(3)))

    await let_go(engine)
    assert "aa" == (await collect(service.complete(complete(2)))).text


async def test_if_one_fails_the_others_are_cancelled(make: Make) -> None:
    """The error takes the place of Finished, and the model is free."""
    engine = SamplesEngine(failing=1, token_delay_seconds=LONG)

    async with asyncio.timeout(SOON):
        with pytest.raises(EngineFailed, match="This answer failed"):
            await collect((await make(engine)).complete(complete(3)))

    await let_go(engine)


@pytest.mark.parametrize("n", [1, 4])
async def test_leaving_early_cancels_all(make: Make, n: int) -> None:
    """However many answers are in the making."""
    engine = SamplesEngine(token_delay_seconds=LONG)
    stream = (await make(engine)).complete(complete(n))
    await anext(stream)
    assert n == engine.running

    async with asyncio.timeout(SOON):
        await stream.aclose()

    await let_go(engine)


@pytest.mark.parametrize("n", [1, 4])
async def test_being_cancelled_cancels_all(make: Make, n: int) -> None:
    """As when a client hangs up that waits for whole answers."""
    engine = SamplesEngine(token_delay_seconds=LONG)
    reading = asyncio.create_task(collect((await make(engine)).complete(complete(n))))
    await until(lambda: engine.running == n)

    reading.cancel()
    async with asyncio.timeout(SOON):
        with pytest.raises(asyncio.CancelledError):
            await reading

    await let_go(engine)


async def test_an_abort_of_the_request_ends_all_its_answers(make: Make) -> None:
    """By the ask's own id, with ABORT as the reason of each."""
    engine = SamplesEngine(token_delay_seconds=0.02)
    service, ask = await make(engine), complete(3)
    stream = service.complete(ask)
    await anext(stream)

    await engine.abort(ask.id)

    finished = [event async for event in stream][-1]
    assert isinstance(finished, Finished)
    assert [FinishReason.ABORT] * 3 == [ending.finish_reason for ending in finished.endings]


async def test_a_drain_ends_the_answers_that_are_left_after_the_grace_period(make: Make) -> None:
    """Also when the first of them, which has the ask's own id, is complete already."""
    engine = SamplesEngine(token_delay_seconds=0.05)
    service = await make(engine)
    reading = asyncio.create_task(collect(service.complete(complete(8))))
    await until(lambda: engine.running == 8)
    await until(lambda: engine.running < 8)

    await service.engines.drain(0)

    reasons = [each.finish_reason for each in (await reading).completions]
    assert (FinishReason.STOP, FinishReason.ABORT) == (reasons[0], reasons[-1])
    await let_go(engine)


async def test_a_session_goes_on_with_one_answer_only(make: Make) -> None:
    """Several are refused by name before anything starts, and the session is not made."""
    engine = SamplesEngine()
    service = await make(engine)

    with pytest.raises(InvalidRequest) as refused:
        await anext(service.chat(chat(2, session_id="s")))

    assert "n" == refused.value.details["errors"][0]["field"]
    assert [] == engine.asked
    assert service.sessions is not None
    assert await service.sessions.read("anna", "s") is None


async def test_what_the_model_cannot_do_is_refused_before_the_engine_is_asked(make: Make) -> None:
    """Here a token outside its vocabulary, for the second of the engine's requests as for the first."""
    engine = SamplesEngine()

    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        await anext((await make(engine)).complete(complete(2, stop_token_ids=(engine.info.vocab_size,))))

    assert [] == engine.asked
