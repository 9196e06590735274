"""What every Engine promises.  An engine joins by adding a factory to `ENGINES`."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from app.config import CacheConfig, DeadlineConfig, ModelConfig
from app.engine.base import Engine, PreparedPrompt
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.local import LocalEngine
from app.engine.parsing.parsed_engine import ParsedEngine
from app.engine.persistent_cache import PersistentCacheEngine
from app.errors import EngineNotReady, InvalidRequest
from app.events import Event, Started
from app.privacy.filters import FilteredEngine
from app.privacy.redactor import Redactor
from app.requests import GenerationRequest
from app.types import EngineState, FinishReason, Message, Role, SamplingParams, Tenant
from tests.unit.engine.stores import DictStore
from tests.unit.event_streams import deltas_of, finished_of, logprobs_of, prompt_logprobs_of, started_of, text_of
from tests.unit.event_streams import read as read_stream
from tests.unit.tiny_models import save_tiny_llama
from tests.waiting import START_SECONDS
from tests.web.chained import ChainedEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

Factory = Callable[[Path], Engine]
ENGINES: dict[str, Factory] = {
    "echo": lambda folder: EchoEngine(token_delay_seconds=0.001),
    "cached": lambda folder: CachedEngine(EchoEngine(token_delay_seconds=0.001), CacheConfig()),
    "persistent": lambda folder: PersistentCacheEngine(EchoEngine(token_delay_seconds=0.001), DictStore(), scope=""),
    "filtered": lambda folder: FilteredEngine(
        EchoEngine(token_delay_seconds=0.001), Redactor(), lambda kind, count: None
    ),
    "parsed": lambda folder: ParsedEngine(EchoEngine(token_delay_seconds=0.001)),
    "local": lambda folder: LocalEngine(ModelConfig(name=str(save_tiny_llama(folder))), DeadlineConfig()),
    "remote": lambda folder: ChainedEngine(
        LocalEngine(ModelConfig(name=str(save_tiny_llama(folder))), DeadlineConfig()), tokenizer=str(folder)
    ),
}
LONG_TEXT = "tell me a very long story about the end of the world, " * 4
SEEDS = count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES.values(), ids=ENGINES)
async def unclosed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """A loaded engine, shared by the tests of this module: a worker takes seconds to start."""
    engine: Engine = request.param(tmp_path_factory.mktemp("model"))
    with pytest.raises(EngineNotReady):
        await anext(engine.stream(GenerationRequest(id="early", tenant=Tenant.owner("t"), prompt_ids=(1,))))
    await engine.start()
    async with asyncio.timeout(START_SECONDS):
        await engine.wait_ready()
    yield engine
    await engine.close()


@pytest_asyncio.fixture(loop_scope="module")
async def engine(unclosed: Engine) -> AsyncIterator[Engine]:
    """The engine, which has to be idle again after each test."""
    yield unclosed
    status = unclosed.status()
    assert (EngineState.READY, 0, 0) == (status.state, status.running, status.waiting)


async def make_request(
    engine: Engine,
    name: str = "one",
    *,
    text: str = LONG_TEXT,
    cache: bool = True,
    stream: bool = True,
    **sampling: Any,
) -> GenerationRequest:
    """Return a request with its prompt encoded, of which no response is stored."""
    params = SamplingParams(**{"max_tokens": 30, "seed": next(SEEDS)} | sampling)
    request = GenerationRequest(
        id=name, tenant=Tenant.owner("tenant"), text=text, sampling=params, cache=cache, stream=stream
    )
    return await prepared(engine, request)


async def prepared(engine: Engine, request: GenerationRequest) -> GenerationRequest:
    prompt = await engine.prepare(request)
    return structs.replace(request, prompt_ids=prompt.prompt_ids, counted_tokens=prompt.prompt_tokens)


async def read(engine: Engine, request: GenerationRequest) -> list[Event]:
    return await read_stream(engine.stream(request))


async def generate(engine: Engine, name: str = "one", **fields: Any) -> list[Event]:
    return await read(engine, await make_request(engine, name, **fields))


async def first_character(engine: Engine, tokens: list[bytes]) -> tuple[int, int]:
    """Return the place and the id of the first token but one that is a character, which encodes as itself."""
    for at, raw in enumerate(tokens):
        text = raw.decode(errors="replace")
        ids = (await make_request(engine, text=text or "-")).prompt_ids or ()
        if at and len(text) == len(ids) == 1 and text != "\ufffd":
            return at, ids[0]
    raise AssertionError("the completion has no such token; take another prompt")


def shown(events: list[Event]) -> str:
    """Return the text of the tokens that have log-probabilities, with what is no whole character left out."""
    return b"".join(token.raw for token in logprobs_of(events)).decode(errors="replace")


def is_elsewhere(engine: Engine) -> bool:
    """Return whether another server encodes chats, and shows tokens of a plain completion as text only."""
    return engine.info.engine == "remote"


def with_single_marks(text: str) -> str:
    """Return a text in which however many parts of characters stand together are one."""
    return re.sub("\ufffd+", "\ufffd", text)


def needs(engine: Engine, *fields: str) -> None:
    """Skip what this engine says that it cannot do; a request that asks for it is refused."""
    if missing := set(fields) & set(engine.info.capabilities.unsupported):
        pytest.skip(f"{engine.info.engine} does not support {', '.join(sorted(missing))}")


async def test_a_stream_begins_with_started_and_ends_with_finished_once(engine: Engine):
    """Between them deltas, which count no more tokens than the usage does."""
    request = await make_request(engine)

    events = await read(engine, request)

    assert [Started] == [type(event) for event in events if event is events[0] or isinstance(event, Started)]
    assert deltas_of(events) == events[1:-1]
    finished = finished_of(events)
    assert FinishReason.LENGTH == finished.finish_reason
    assert request.prompt_tokens == finished.usage.prompt_tokens == started_of(events).prompt_tokens > 0
    assert 30 == finished.usage.completion_tokens == finished.samples[0].completion_tokens
    assert 30 == sum(delta.tokens for delta in deltas_of(events))
    assert [event.cache for event in (started_of(events), finished)] == [finished.cache] * 2


async def test_a_seed_and_a_request_give_the_same_completion(engine: Engine):
    """Also when the request is sampled."""
    texts = [text_of(await generate(engine, temperature=1.0, seed=5)) for _ in range(2)]

    assert texts[0] == texts[1]
    assert texts[0]


async def test_each_sample_of_a_seed_is_the_same_completion_every_time(engine: Engine):
    """Whichever of several samples it is."""
    for sample in (0, 3):
        fields: dict[str, Any] = {"temperature": 1.0, "seed": 5, "sample": sample, "cache": False}
        texts = [text_of(await generate(engine, **fields)) for _ in range(2)]
        assert texts[0] == texts[1]
        assert texts[0]


async def test_log_probabilities_come_with_each_token_that_is_shown(engine: Engine):
    """As many as there are tokens, each with its text, and with the alternatives that the request wants."""
    needs(engine, "logprobs")

    events = await generate(engine, logprobs=2)

    tokens = logprobs_of(events)
    assert 30 == len(tokens)
    if is_elsewhere(engine):
        assert with_single_marks(text_of(events)) == with_single_marks(shown(events))
    else:
        assert text_of(events) == shown(events)
    assert all(len(delta.logprobs) == len(delta.token_ends) for delta in deltas_of(events))
    assert all(0 <= end <= len(delta.text) for delta in deltas_of(events) for end in delta.token_ends)
    assert all(token.logprob <= 0 and 1 <= len(token.top) <= 2 for token in tokens)
    # Nothing but the most likely token is ever sampled here.
    assert [token.raw for token in tokens] == [token.top[0].raw for token in tokens]
    assert [token.logprob for token in tokens] == pytest.approx([token.top[0].logprob for token in tokens])
    assert all(list(token.top) == sorted(token.top, key=lambda other: -other.logprob) for token in tokens)


async def test_log_probabilities_come_only_where_the_request_wants_them(engine: Engine):
    """And with 0, without alternatives."""
    needs(engine, "logprobs")

    without, plain = [await generate(engine, logprobs=logprobs) for logprobs in (None, 0)]

    assert [] == [delta for delta in deltas_of(without) if delta.logprobs or delta.token_ends]
    assert [()] * 30 == [token.top for token in logprobs_of(plain)]


async def test_a_prompt_has_a_log_probability_for_each_token_but_the_first(engine: Engine):
    """All before any text, in the order of the prompt, a few at a time, and each with its place in the text."""
    needs(engine, "prompt_logprobs")

    request = await make_request(engine, prompt_logprobs=1, logprobs=0, max_tokens=5)
    events = await read(engine, request)

    scored, ids = prompt_logprobs_of(events), request.prompt_ids or ()
    assert list(ids) == [token.token_id for token in scored]
    assert [None] == [token.logprob for token in scored if token.logprob is None]
    assert all((token.logprob or 0) <= 0 and token.rank >= 1 and len(token.top) == 1 for token in scored[1:])
    assert (None, 0, ()) == (scored[0].logprob, scored[0].rank, scored[0].top)
    ends = [token.end for token in scored]
    assert (sorted(ends), len(LONG_TEXT)) == (ends, ends[-1])
    with_prompt = [bool(delta.prompt_logprobs) for delta in deltas_of(events)]
    assert sorted(with_prompt, reverse=True) == with_prompt
    assert not any(delta.prompt_logprobs and delta.text for delta in deltas_of(events))
    # A filter may hold some back, up to the end of a word.
    assert all(len(delta.prompt_logprobs) <= 64 for delta in deltas_of(events))
    assert text_of(await generate(engine, max_tokens=5)) == text_of(events)


async def test_a_prompt_may_be_read_without_a_token_to_follow(engine: Engine):
    """Its log-probabilities come, no text does, and the end says length; nothing else is needed for that."""
    needs(engine, "prompt_logprobs")

    events = await generate(engine, prompt_logprobs=0, max_tokens=0)
    plain = await generate(engine, max_tokens=0)

    assert ("", 0, FinishReason.LENGTH) == (
        text_of(events),
        finished_of(events).usage.completion_tokens,
        finished_of(events).finish_reason,
    )
    assert 10 < len(prompt_logprobs_of(events)) == finished_of(plain).usage.prompt_tokens
    assert ([], FinishReason.LENGTH) == (deltas_of(plain), finished_of(plain).finish_reason)


async def test_tokens_are_shown_one_by_one_and_joined(engine: Engine):
    """Those of a plain text joined are the text."""
    request = await make_request(engine, text="tell me a story")
    ids = request.prompt_ids or ()

    assert "tell me a story" == await engine.detokenize(ids)
    assert (await engine.detokenize(ids, control_tokens=True)).endswith("tell me a story")
    assert len(ids) == len(await engine.token_texts(ids))
    assert "".join(await engine.token_texts(ids)).strip().endswith("tell me a story")


async def test_log_probabilities_end_where_a_stop_string_cuts_the_text(engine: Engine):
    """Their tokens make up the text shown, but for the end of one that reaches into the stop string."""
    needs(engine, "logprobs")
    whole = text_of(await generate(engine))
    stop = whole[5:9]

    events = await generate(engine, stop=(stop,), logprobs=0)

    assert whole[: whole.index(stop)] == text_of(events)
    assert text_of(events).startswith(shown(events))


async def refuses_text_as_stop_token(engine: Engine, token_id: int) -> bool:
    """Return whether this engine filters what it sends, and says so of a stop token that is text."""
    if not isinstance(engine, FilteredEngine):
        return False
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        await generate(engine, stop_token_ids=(token_id,))
    return True


async def test_a_stop_token_ends_the_completion_and_is_counted_but_not_shown(engine: Engine):
    """At the first place where the model generates it; deltas may leave it to the usage."""
    needs(engine, "logprobs", "stop_token_ids")
    untouched = await generate(engine, logprobs=0)
    texts = [token.raw for token in logprobs_of(untouched)]
    at, end = await first_character(engine, texts)
    if await refuses_text_as_stop_token(engine, end):
        return

    events = await generate(engine, stop_token_ids=(end,), logprobs=0)

    before = texts[: texts.index(texts[at])]
    assert b"".join(before).decode(errors="replace") == text_of(events)
    assert before == [token.raw for token in logprobs_of(events)]
    finished = finished_of(events)
    assert (FinishReason.STOP, end) == (finished.finish_reason, finished.samples[0].stop_reason)
    assert len(before) + 1 == finished.usage.completion_tokens
    assert sum(delta.tokens for delta in deltas_of(events)) in (len(before), len(before) + 1)


async def test_a_completion_does_not_end_before_its_least_number_of_tokens(engine: Engine):
    """End tokens are not generated before."""
    needs(engine, "logprobs", "stop_token_ids", "min_tokens")
    untouched = await generate(engine, logprobs=0)
    at, end = await first_character(engine, [token.raw for token in logprobs_of(untouched)])
    assert at < 9
    if await refuses_text_as_stop_token(engine, end):
        return

    events = await generate(engine, stop_token_ids=(end,), min_tokens=10)

    assert finished_of(events).usage.completion_tokens >= 10


async def test_a_completion_reaches_its_limit_where_the_models_end_is_ignored(engine: Engine):
    """However short it would be."""
    needs(engine, "ignore_eos")

    events = await generate(engine, text="hi", max_tokens=40, ignore_eos=True)

    assert FinishReason.LENGTH == finished_of(events).finish_reason
    assert 40 == finished_of(events).usage.completion_tokens


async def test_a_completion_ends_before_its_stop_string(engine: Engine):
    """The text is cut before the first place where it stands, and the reason is STOP; Finished names it."""
    untouched = await generate(engine)
    whole = text_of(untouched)
    stop = whole[3:6]

    events = await generate(engine, stop=(stop,))

    assert whole[: whole.index(stop)] == text_of(events)
    assert (FinishReason.STOP, stop) == (finished_of(events).finish_reason, finished_of(events).samples[0].stop_reason)
    assert finished_of(untouched).samples[0].stop_reason is None


async def test_a_request_that_does_not_stream_gets_the_same_completion_in_two_deltas(engine: Engine):
    """Whatever stands around the engine may add what it withheld, as the output filter does."""
    streamed, whole = [
        await generate(engine, stream=stream, seed=5, max_tokens=200, ignore_eos=True, cache=False)
        for stream in (True, False)
    ]

    assert len(deltas_of(streamed)) > 3
    assert len([delta for delta in deltas_of(whole) if delta.text]) <= 2
    assert text_of(streamed) == text_of(whole)
    assert finished_of(streamed).usage.completion_tokens == finished_of(whole).usage.completion_tokens


async def test_a_request_that_does_not_stream_gets_its_logprobs_in_a_few_deltas_and_not_at_its_end(engine: Engine):
    """All of them at once would hold up whoever encodes them; how many come together depends on the reader."""
    needs(engine, "logprobs")
    streamed, whole = [
        await generate(engine, stream=stream, seed=5, logprobs=0, max_tokens=200, ignore_eos=True, cache=False)
        for stream in (True, False)
    ]

    assert len(deltas_of(whole)) <= 200 / 10
    assert max(len(delta.logprobs) for delta in deltas_of(whole)) < 190
    assert text_of(streamed) == text_of(whole)
    assert [token.raw for token in logprobs_of(streamed)] == [token.raw for token in logprobs_of(whole)]
    assert finished_of(streamed).usage.completion_tokens == finished_of(whole).usage.completion_tokens


async def test_closing_a_stream_early_frees_its_place(engine: Engine):
    """At once, and the id may be used again; the progress says what was generated."""
    request = await make_request(engine, "again", max_tokens=200)
    stream = engine.stream(request)
    for _ in range(2):
        await anext(stream)

    await stream.aclose()

    assert (0, 0) == (engine.status().running, engine.status().waiting)
    assert 0 < request.progress.generated < 200
    assert FinishReason.LENGTH == finished_of(await generate(engine, "again", max_tokens=2)).finish_reason


async def test_an_abort_ends_the_stream(engine: Engine):
    """Finished says ABORT and what was used; ids that are not live are ignored."""
    request = await make_request(engine, "mine", max_tokens=200)
    stream = engine.stream(request)
    await anext(stream)
    await engine.abort("nobody's")
    await engine.abort("mine")

    finished = finished_of([event async for event in stream])

    assert FinishReason.ABORT == finished.finish_reason
    assert finished.usage.completion_tokens < 200
    assert request.prompt_tokens == finished.usage.prompt_tokens


async def test_progress_counts_what_the_usage_counts(engine: Engine):
    """It is what a request is charged by, however it ends."""
    request = await make_request(engine, cache=False)

    events = await read(engine, request)

    assert 30 == request.progress.generated == finished_of(events).usage.completion_tokens


async def test_requests_at_once_each_get_their_own_completion(engine: Engine):
    """The same as each gets by itself."""
    texts = ["hello world", "the end of it", "who said hello"]
    single = [text_of(await generate(engine, text=text, max_tokens=8, seed=1)) for text in texts]

    at_once = await asyncio.gather(
        *(generate(engine, f"r{number}", text=text, max_tokens=8, seed=1) for number, text in enumerate(texts))
    )

    assert single == [text_of(events) for events in at_once]


async def test_a_chat_is_prepared_and_continued(engine: Engine):
    """The engine's tokenizer and its facts fit each other; a prompt of tokens stays as it is."""
    messages = (Message(Role.SYSTEM, "Be kind."), Message(Role.USER, LONG_TEXT))
    chat = GenerationRequest(
        id="chat", tenant=Tenant.owner("tenant"), messages=messages, sampling=SamplingParams(max_tokens=5)
    )

    encoded = await prepared(engine, chat)
    open_end = await prepared(engine, structs.replace(chat, continue_final_message=True))
    events = await read(engine, encoded)

    assert (encoded.prompt_ids is None) == is_elsewhere(engine)
    assert encoded.prompt_tokens < engine.info.context_length
    engine.info.check_tokens("prompt", encoded.prompt_ids or ())
    assert 0 < open_end.prompt_tokens < encoded.prompt_tokens
    assert PreparedPrompt(encoded.prompt_tokens, encoded.prompt_ids) == await engine.prepare(encoded)
    assert FinishReason.LENGTH == finished_of(events).finish_reason
    assert encoded.prompt_tokens == started_of(events).prompt_tokens == finished_of(events).usage.prompt_tokens


async def test_a_name_that_is_no_special_token_names_none(engine: Engine):
    """A stop string of ordinary words is looked for in the text."""
    assert engine.hidden_token("hello") is None


async def test_a_chat_has_control_tokens_and_a_text_has_none(engine: Engine):
    """Those that the tokenizer itself puts in front of a text do not count."""
    messages = (Message(Role.SYSTEM, "Be kind."), Message(Role.USER, "Hello"))
    chat = await prepared(engine, GenerationRequest(id="chat", tenant=Tenant.owner("tenant"), messages=messages))
    text = await make_request(engine)

    assert is_elsewhere(engine) or engine.has_control_tokens(chat.prompt_ids or ())
    assert not engine.has_control_tokens(text.prompt_ids or ())


async def test_tokens_become_the_text_that_they_were_made_of(engine: Engine):
    """As a prompt of tokens is shown, and filtered."""
    request = await make_request(engine)

    assert LONG_TEXT == await engine.detokenize(request.prompt_ids or ())


async def test_what_an_engine_cannot_do_is_refused_by_name(engine: Engine):
    """In place of Started, as every parameter that it does not list is honoured."""
    request = structs.replace(await make_request(engine), adapter="legal")
    if engine.info.capabilities.adapters:
        pytest.skip("it has adapters")

    with pytest.raises(InvalidRequest) as refused:
        await anext(engine.stream(request))

    assert "adapter" == refused.value.details["errors"][0]["field"]


@pytest.mark.parametrize("make", [ENGINES["echo"], ENGINES["cached"]], ids=["echo", "cached"])
async def test_closing_ends_live_streams(make: Factory, tmp_path: Path):
    """With ABORT; afterwards every request is refused.  (tests/e2e/test_worker.py does this with a process.)"""
    engine = make(tmp_path)
    await engine.start()
    await engine.wait_ready()
    stream = engine.stream(await make_request(engine, max_tokens=200))
    await anext(stream)

    await engine.close()
    await engine.close()

    assert FinishReason.ABORT == finished_of([event async for event in stream]).finish_reason
    assert EngineState.CLOSED == engine.status().state
    with pytest.raises(EngineNotReady):
        await anext(engine.stream(await make_request(engine)))
