"""What every Engine promises.  An engine joins by adding a factory to `ENGINES`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio

from app.config import CacheConfig, DeadlineConfig, ModelConfig
from app.engine.base import Chunk, Engine, GenerationRequest
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.local import LocalEngine
from app.engine.persistent_cache import StoredEngine
from app.errors import EngineNotReady
from app.privacy.filters import FilteredEngine
from app.privacy.redactor import Redactor
from app.types import EngineState, FinishReason, Message, Role, SamplingParams
from tests.unit.engine.stores import DictStore
from tests.unit.tiny_models import save_tiny_llama

pytestmark = pytest.mark.asyncio(loop_scope="module")

Factory = Callable[[Path], Engine]
ENGINES: dict[str, Factory] = {
    "echo": lambda folder: EchoEngine(token_delay_seconds=0.001),
    "cached": lambda folder: CachedEngine(EchoEngine(token_delay_seconds=0.001), CacheConfig()),
    "stored": lambda folder: StoredEngine(EchoEngine(token_delay_seconds=0.001), DictStore(), scope=""),
    "filtered": lambda folder: FilteredEngine(
        EchoEngine(token_delay_seconds=0.001), Redactor(), lambda kind, count: None
    ),
    "local": lambda folder: LocalEngine(ModelConfig(name=str(save_tiny_llama(folder))), DeadlineConfig()),
}
LONG_TEXT = "tell me a very long story about the end of the world, " * 4
SEEDS = count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES.values(), ids=ENGINES)
async def unclosed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """A loaded engine, shared by the tests of this module: a worker takes seconds to start."""
    engine: Engine = request.param(tmp_path_factory.mktemp("model"))
    with pytest.raises(EngineNotReady):
        await anext(engine.stream(GenerationRequest("early", "t", (1,), SamplingParams(max_tokens=1))))
    await engine.start()
    async with asyncio.timeout(110):
        await engine.wait_ready()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(unclosed: Engine) -> AsyncIterator[Engine]:
    """The engine, which has to be idle again after each test."""
    yield unclosed
    status = unclosed.status()
    assert (EngineState.READY, 0, 0) == (status.state, status.running, status.waiting)


def ask(
    engine: Engine, name: str = "one", *, text: str = LONG_TEXT, max_tokens: int = 30, **params: object
) -> GenerationRequest:
    """A request of which no stored answer exists."""
    seed, cache = params.pop("seed", next(SEEDS)), bool(params.pop("cache", True))
    settings = SamplingParams(max_tokens=max_tokens, seed=seed, **params)  # type: ignore[arg-type]
    return GenerationRequest(name, "tenant", engine.tokenizer.encode_text(text), settings, cache)


async def read(engine: Engine, request: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in engine.stream(request)]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids_of(chunks: list[Chunk]) -> list[int]:
    """The tokens that log-probabilities were told of."""
    return [token.token_id for chunk in chunks for token in chunk.logprobs]


def decoded(engine: Engine, token_ids: list[int]) -> str:
    decoder = engine.tokenizer.decoder()
    return decoder.feed(token_ids) + decoder.finish()


def needs(engine: Engine, *fields: str) -> None:
    """Skip what this engine says that it cannot do; a request that asks for it is refused."""
    if missing := set(fields) & set(engine.info.unsupported):
        pytest.skip(f"{engine.info.engine} does not support {', '.join(sorted(missing))}")


async def test_an_answer_begins_empty_and_ends_once(engine: Engine):
    """The first chunk is empty; finish reason and usage stand in the last and only there."""
    request = ask(engine)

    chunks = await read(engine, request)

    assert "" == chunks[0].text
    assert [False] * (len(chunks) - 1) == [bool(chunk.finish_reason or chunk.usage) for chunk in chunks[:-1]]
    assert FinishReason.LENGTH == chunks[-1].finish_reason
    assert chunks[-1].usage is not None
    assert (len(request.prompt_ids), 30) == (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens)
    assert 30 == sum(chunk.tokens for chunk in chunks)


async def test_a_seed_and_a_request_give_the_same_answer(engine: Engine):
    """Also when the request is sampled."""
    answers = [text_of(await read(engine, ask(engine, temperature=1.0, seed=5))) for _ in range(2)]

    assert answers[0] == answers[1]
    assert answers[0]


async def test_each_sample_of_a_seed_is_the_same_answer_every_time(engine: Engine):
    """Whichever of several answers it is."""
    for sample in (0, 3):
        request = {"temperature": 1.0, "seed": 5, "sample": sample, "cache": False}
        answers = [text_of(await read(engine, ask(engine, **request))) for _ in range(2)]
        assert answers[0] == answers[1]
        assert answers[0]


async def test_log_probabilities_are_told_of_each_token_that_is_shown(engine: Engine):
    """As many as there are tokens, each with its text, and with the alternatives that were asked for."""
    needs(engine, "logprobs")

    chunks = await read(engine, ask(engine, logprobs=2))

    tokens = [token for chunk in chunks for token in chunk.logprobs]
    assert 30 == len(tokens)
    assert text_of(chunks) == decoded(engine, ids_of(chunks))
    assert all(len(chunk.logprobs) == len(chunk.token_ends) for chunk in chunks)
    assert all(0 <= end <= len(chunk.text) for chunk in chunks for end in chunk.token_ends)
    assert all(token.logprob <= 0 and 1 <= len(token.top) <= 2 for token in tokens)
    # Nothing but the most likely token is ever drawn here.
    assert [(token.token_id, pytest.approx(token.logprob)) for token in tokens] == [token.top[0] for token in tokens]
    assert all(list(token.top) == sorted(token.top, key=lambda other: -other[1]) for token in tokens)


async def test_no_log_probabilities_are_told_unasked(engine: Engine):
    """And with 0, no alternatives."""
    needs(engine, "logprobs")

    unasked, alone = [await read(engine, ask(engine, logprobs=logprobs)) for logprobs in (None, 0)]

    assert [] == [chunk for chunk in unasked if chunk.logprobs or chunk.token_ends]
    assert [()] * 30 == [token.top for chunk in alone for token in chunk.logprobs]


async def test_log_probabilities_end_where_a_stop_string_cuts_the_text(engine: Engine):
    """The tokens told of make up the text shown, but for the end of one that reaches into the stop string."""
    needs(engine, "logprobs")
    whole = text_of(await read(engine, ask(engine)))
    stop = whole[5:9]

    chunks = await read(engine, ask(engine, stop=(stop,), logprobs=0))

    shown = decoded(engine, ids_of(chunks))
    assert whole[: whole.index(stop)] == text_of(chunks)
    assert text_of(chunks).startswith(shown)


async def test_a_stop_token_ends_the_answer_and_is_counted_but_not_shown(engine: Engine):
    """At the first place where the model makes it."""
    needs(engine, "logprobs", "stop_token_ids")
    ids = ids_of(await read(engine, ask(engine, logprobs=0)))
    end = ids[4]

    chunks = await read(engine, ask(engine, stop_token_ids=(end,), logprobs=0))

    before = ids[: ids.index(end)]
    assert decoded(engine, before) == text_of(chunks)
    assert before == ids_of(chunks)
    assert (FinishReason.STOP, end) == (chunks[-1].finish_reason, chunks[-1].stopped_by)
    assert chunks[-1].usage is not None
    assert len(before) + 1 == chunks[-1].usage.completion_tokens == sum(chunk.tokens for chunk in chunks)


async def test_an_answer_does_not_end_before_its_least_number_of_tokens(engine: Engine):
    """End tokens are not made before."""
    needs(engine, "logprobs", "stop_token_ids", "min_tokens")
    end = ids_of(await read(engine, ask(engine, logprobs=0)))[1]

    chunks = await read(engine, ask(engine, stop_token_ids=(end,), min_tokens=10))

    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens >= 10


async def test_an_answer_goes_on_to_its_limit_where_the_models_end_is_ignored(engine: Engine):
    """However short it would be."""
    needs(engine, "ignore_eos")

    chunks = await read(engine, ask(engine, text="hi", max_tokens=40, ignore_eos=True))

    assert FinishReason.LENGTH == chunks[-1].finish_reason
    assert 40 == sum(chunk.tokens for chunk in chunks)


async def test_an_answer_ends_before_its_stop_string(engine: Engine):
    """The text is cut before the first place where it stands, and the reason is STOP; the last chunk names it."""
    untouched = await read(engine, ask(engine))
    whole = text_of(untouched)
    stop = whole[3:6]

    chunks = await read(engine, ask(engine, stop=(stop,)))

    assert whole[: whole.index(stop)] == text_of(chunks)
    assert (FinishReason.STOP, stop) == (chunks[-1].finish_reason, chunks[-1].stopped_by)
    assert [None] * len(untouched) == [chunk.stopped_by for chunk in untouched]


async def test_closing_a_stream_early_frees_its_place(engine: Engine):
    """At once, and the id may be used again."""
    stream = engine.stream(ask(engine, "again", max_tokens=200))
    for _ in range(2):
        await anext(stream)

    await stream.aclose()

    assert (0, 0) == (engine.status().running, engine.status().waiting)
    assert FinishReason.LENGTH == (await read(engine, ask(engine, "again", max_tokens=2)))[-1].finish_reason


async def test_an_abort_ends_the_stream(engine: Engine):
    """The last chunk says ABORT and what was used; ids that are not live are ignored."""
    request = ask(engine, "mine", max_tokens=200)
    stream = engine.stream(request)
    await anext(stream)
    await engine.abort("nobody's")
    await engine.abort("mine")

    last = [chunk async for chunk in stream][-1]

    assert FinishReason.ABORT == last.finish_reason
    assert last.usage is not None
    assert last.usage.completion_tokens < 200
    assert len(request.prompt_ids) == last.usage.prompt_tokens


async def test_requests_at_once_each_get_their_own_answer(engine: Engine):
    """What each says is what it says alone."""
    texts = ["hello world", "the end of it", "who said hello"]
    alone = [text_of(await read(engine, ask(engine, text=text, max_tokens=8, seed=1))) for text in texts]

    together = await asyncio.gather(
        *(read(engine, ask(engine, f"r{n}", text=text, max_tokens=8, seed=1)) for n, text in enumerate(texts))
    )

    assert alone == [text_of(chunks) for chunks in together]


async def test_a_conversation_is_encoded_and_answered(engine: Engine):
    """The engine's own tokenizer and its facts fit each other."""
    ids = engine.tokenizer.encode_chat([Message(Role.SYSTEM, "Be kind."), Message(Role.USER, LONG_TEXT)])
    assert 0 < len(ids) < engine.info.context_length
    assert max(ids) < engine.info.vocab_size

    chunks = await read(engine, GenerationRequest("chat", "tenant", ids, SamplingParams(max_tokens=5)))

    assert FinishReason.LENGTH == chunks[-1].finish_reason


@pytest.mark.parametrize("make", [ENGINES["echo"], ENGINES["cached"]], ids=["echo", "cached"])
async def test_closing_ends_live_streams(make: Factory, tmp_path: Path):
    """With ABORT; afterwards every request is refused.  (tests/e2e/test_worker.py does this with a process.)"""
    engine = make(tmp_path)
    await engine.start()
    await engine.wait_ready()
    stream = engine.stream(ask(engine, max_tokens=200))
    await anext(stream)

    await engine.close()
    await engine.close()

    assert FinishReason.ABORT == [chunk async for chunk in stream][-1].finish_reason
    assert EngineState.CLOSED == engine.status().state
    with pytest.raises(EngineNotReady):
        await anext(engine.stream(ask(engine)))
