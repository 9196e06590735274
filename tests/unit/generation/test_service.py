"""GenerationService: the steps in order, over the shipped fake engine."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from app.config import CacheConfig, ChatHistoryConfig
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.host import EngineRegistry
from app.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineBusy,
    InvalidRequest,
    ModelNotFound,
    PiiBlocked,
    ShuttingDown,
)
from app.generation.requests import ChatAsk, CompletionAsk, Delta, Finished, Sampling, Started, collect
from app.generation.service import GenerationService
from app.generation.sessions import MemorySessionStore
from app.langchain.chains import Chains
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.redactor import Redactor
from app.telemetry import Metrics
from app.types import FinishReason, Message, Principal, Role
from tests.unit.generation.free import free_accounts

Make = Callable[..., GenerationService]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Build a service as `create_app` does, with an echo engine of the given shape."""
    made: list[EngineRegistry] = []
    started: list[asyncio.Task[None]] = []

    def make(*, input_mode: str = "mask", waiting_seconds: float = 30, **engine: Any) -> GenerationService:
        redactor = Redactor()
        filtered = FilteredEngine(EchoEngine(**engine), redactor, lambda kind, count: None)
        cache = CachedEngine(filtered, CacheConfig(), scope=redactor.fingerprint)
        registry = EngineRegistry({"echo": cache})
        made.append(registry)
        started.append(asyncio.get_running_loop().create_task(registry.start()))
        return GenerationService(
            engines=registry,
            chains={"echo": Chains(cache, "echo")},
            input_filter=InputFilter(redactor, input_mode, lambda kind, count: None),  # type: ignore[arg-type]
            sessions=MemorySessionStore(ChatHistoryConfig()),
            system_prompt="sys",
            default_max_tokens=100,
            default_temperature=0,
            metrics=Metrics(["echo"]),
            accounts=free_accounts(),
            waiting_seconds=waiting_seconds,
            cache=cache,
        )

    yield make
    await asyncio.gather(*started)
    for registry in made:
        await registry.close()


ANNA, BERT = Principal("a", "anna"), Principal("b", "bert")
_ids = iter(range(10**9))


def complete(prompt: str | tuple[int, ...], **fields: Any) -> CompletionAsk:
    return CompletionAsk(id=f"r{next(_ids)}", caller=ANNA, prompt=prompt, **fields)


def chat(*texts: str, caller: Principal = ANNA, **fields: Any) -> ChatAsk:
    """Messages of user and assistant in turn, the last the user's."""
    roles = (Role.USER, Role.ASSISTANT)
    messages = tuple(Message(roles[index % 2], text) for index, text in enumerate(texts))
    return ChatAsk(id=f"r{next(_ids)}", caller=caller, messages=messages, **fields)


async def turns(service: GenerationService, caller: Principal, session_id: str) -> list[list[str]]:
    assert service.sessions is not None
    session = await service.sessions.read(caller.tenant, session_id)
    return [[message.content for message in turn.messages] for turn in session.turns] if session else []


async def test_an_answer_begins_with_started_and_ends_with_finished(make: Make) -> None:
    """One Started, deltas that are never empty, one Finished with the true usage."""
    events = [event async for event in make().complete(complete("hello"))]

    assert isinstance(events[0], Started)
    assert all(isinstance(event, Delta) and event.text for event in events[1:-1])
    assert isinstance(events[-1], Finished)
    assert (5, 5) == (events[-1].usage.prompt_tokens, events[-1].usage.completion_tokens)


async def test_a_session_goes_on_where_it_was_and_belongs_to_its_tenant(make: Make) -> None:
    """The second turn sees the first; another tenant's session of the same name is empty."""
    service = make()
    await collect(service.chat(chat("one", session_id="s")))

    second = await collect(service.chat(chat("two", session_id="s")))
    foreign = await collect(service.chat(chat("two", caller=BERT, session_id="s")))

    assert second.finished.context is not None
    assert foreign.finished.context is not None
    assert (1, 0) == (second.finished.context.turns_kept, foreign.finished.context.turns_kept)
    assert [["one", "one"], ["two", "two"]] == await turns(service, ANNA, "s")
    assert [["two", "two"]] == await turns(service, BERT, "s")


async def test_a_client_that_resends_the_whole_conversation_appends_nothing_twice(make: Make) -> None:
    """What the session holds already is recognised at the front of the request."""
    service = make()
    await collect(service.chat(chat("one", session_id="s")))

    await collect(service.chat(chat("one", "one", "two", session_id="s")))

    assert [["one", "one"], ["two", "two"]] == await turns(service, ANNA, "s")


async def test_only_complete_answers_enter_a_session(make: Make) -> None:
    """A client that leaves, an aborted answer and a refused one leave the session as it was."""
    service = make(token_delay_seconds=0.001)
    left = service.chat(chat("leaving", session_id="s"))
    await anext(left), await anext(left)
    await left.aclose()
    aborted = chat("aborted by us", session_id="s")
    stream = service.chat(aborted)
    await anext(stream)
    await service.engines.default.abort(aborted.id)
    ended = [event async for event in stream][-1]
    with pytest.raises(ContextLengthExceeded):
        await collect(service.chat(chat("x", session_id="s", sampling=Sampling(max_tokens=99_999))))

    assert isinstance(ended, Finished)
    assert FinishReason.ABORT == ended.finish_reason
    assert [] == await turns(service, ANNA, "s")


async def test_parallel_turns_of_one_session_do_not_mix(make: Make) -> None:
    """Ten at once leave ten whole pairs, and each saw a whole number of turns."""
    service = make()
    replies = await asyncio.gather(*(collect(service.chat(chat(f"t{n}", session_id="s"))) for n in range(10)))

    assert {(f"t{n}",) * 2 for n in range(10)} == {tuple(turn) for turn in await turns(service, ANNA, "s")}
    assert list(range(10)) == sorted(r.finished.context.turns_kept for r in replies if r.finished.context)


async def test_old_turns_give_way_to_the_context_window_whole_and_are_reported(make: Make) -> None:
    """The model's window holds two of three turns; the session itself keeps all."""
    service = make(context_length=79)
    for text in ("a" * 10, "b" * 10, "c" * 10):
        last = await collect(service.chat(chat(text, session_id="s", sampling=Sampling(max_tokens=20))))
    context = last.finished.context

    assert context is not None
    assert (1, 1) == (context.turns_kept, context.turns_dropped)
    assert context.prompt_tokens + 20 <= context.limit == 79
    assert 3 == len(await turns(service, ANNA, "s"))


async def test_the_callers_system_text_takes_the_place_of_ours(make: Make) -> None:
    """It counts into the prompt, in front of the conversation, and is never stored."""
    service = make()
    messages = (Message(Role.SYSTEM, "be a pirate"), Message(Role.USER, "hi"))
    ask = ChatAsk(id="x", caller=ANNA, messages=messages, session_id="s")

    reply = await collect(service.chat(ask))

    assert len("be a pirate") + len("hi") + 3 == reply.finished.usage.prompt_tokens
    assert [["hi", "hi"]] == await turns(service, ANNA, "s")


async def test_personal_data_reaches_neither_model_session_nor_cache(make: Make) -> None:
    """The prompt shown back is the masked one, and so is everything kept."""
    service = make()
    generated = await collect(service.complete(complete("mail jane.doe@example.com")))
    chatted = await collect(service.chat(chat("mail jane.doe@example.com", session_id="s")))

    assert "mail [EMAIL]" == generated.prompt == generated.text == chatted.text
    assert [["mail [EMAIL]"] * 2] == await turns(service, ANNA, "s")


async def test_a_prompt_of_tokens_goes_to_the_model_as_it_is(make: Make) -> None:
    """Also tokens that no text makes; the prompt shown is what they say."""
    service = make()
    control = service.engines.default.tokenizer.encode_chat([Message(Role.ASSISTANT, "")])[0]
    tokens = (control, *map(ord, "hello"))

    reply = await collect(service.complete(complete(tokens)))

    assert ("hello", len(tokens)) == (reply.prompt, reply.finished.usage.prompt_tokens)


async def test_personal_data_in_a_prompt_of_tokens_is_filtered_too(make: Make) -> None:
    """Control tokens in the midst of it hide nothing; the model gets the clean text."""
    service = make()
    control = service.engines.default.tokenizer.encode_chat([Message(Role.ASSISTANT, "")])[0]
    tokens = (*map(ord, "mail jane"), control, *map(ord, ".doe@example.com"))

    reply = await collect(service.complete(complete(tokens)))

    assert "mail [EMAIL]" == reply.prompt == reply.text
    assert len("mail [EMAIL]") == reply.finished.usage.prompt_tokens
    with pytest.raises(PiiBlocked):
        await anext(make(input_mode="block").complete(complete(tokens)))


@pytest.mark.parametrize(
    ("tokens", "refusal"), [((5, 2**30), InvalidRequest), ((97,) * 100, ContextLengthExceeded), ((), InvalidRequest)]
)
async def test_tokens_that_the_model_cannot_take_are_refused(make: Make, tokens: tuple[int, ...], refusal: Any) -> None:
    """One that it does not have, more than it has room for, or none; the field is named."""
    with pytest.raises(refusal) as refused:
        await anext(make(context_length=50).complete(complete(tokens)))

    if refusal is InvalidRequest:
        assert "prompt" == refused.value.details["errors"][0]["field"]


async def test_a_message_that_goes_on_has_no_new_turn_in_front(make: Make) -> None:
    """The model sees one mark less than where it begins to speak anew."""
    service = make()
    begun = chat("hi", "well")

    anew = await collect(service.chat(begun))
    going_on = await collect(service.chat(replace(begun, id="on", go_on=True)))

    assert anew.finished.usage.prompt_tokens - 1 == going_on.finished.usage.prompt_tokens


async def test_a_session_goes_on_with_the_users_words_only(make: Make) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        await anext(make().chat(chat("hi", "well", session_id="s")))


async def test_what_began_and_what_ended_an_answer_is_told(make: Make) -> None:
    """Whether it comes from the cache is known from its first event, and the stop string from its last."""
    service = make()
    for cached in (False, True):
        ask = complete("one two three", sampling=Sampling(stop=("three", "two")))
        events = [event async for event in service.complete(ask)]
        assert Started(model="echo", prompt="one two three", prompt_tokens=13, cached=cached) == events[0]
        assert isinstance(events[-1], Finished)
        assert ("two", cached) == (events[-1].endings[0].stopped_by, events[-1].cached)


async def test_each_piece_tells_how_many_tokens_it_took(make: Make) -> None:
    """Also those that the filter held back for a while: together they are what the last event counts."""
    ask = complete("mail jane.doe@example.com or call", sampling=Sampling(n=2))

    events = [event async for event in make(input_mode="mask").complete(ask)]

    finished = events[-1]
    assert isinstance(finished, Finished)
    for index, ending in enumerate(finished.endings):
        pieces = [event for event in events if isinstance(event, Delta) and event.index == index]
        assert ending.tokens == sum(piece.made for piece in pieces)
        assert all(piece.text for piece in pieces)


async def test_blocked_personal_data_leaves_no_trace(make: Make) -> None:
    """The request is refused before the model, and the session is not made."""
    service = make(input_mode="block")

    with pytest.raises(PiiBlocked):
        await collect(service.chat(chat("mail jane.doe@example.com", session_id="s")))

    assert [] == await turns(service, ANNA, "s")


async def test_identical_requests_of_one_tenant_are_answered_once(make: Make) -> None:
    """The second is cached; another tenant's is not; cache=False asks the model."""
    service = make()
    first = await collect(service.chat(chat("hi")))
    again = await collect(service.chat(chat("hi")))
    foreign = await collect(service.chat(chat("hi", caller=BERT)))
    fresh = await collect(service.chat(chat("hi", cache=False)))

    cached = [reply.finished.cached for reply in (first, again, foreign, fresh)]
    assert [False, True, False, False] == cached
    assert {"hi"} == {reply.text for reply in (first, again, foreign, fresh)}


async def test_a_turn_waits_only_so_long_for_the_one_before_it(make: Make) -> None:
    """After that it is refused, and the one before it goes on undisturbed."""
    service = make(token_delay_seconds=0.02, waiting_seconds=0.05)
    first = asyncio.create_task(collect(service.chat(chat("a longer text", session_id="s"))))
    await asyncio.sleep(0.03)

    with pytest.raises(DeadlineExceeded):
        await collect(service.chat(chat("impatient", session_id="s")))

    assert "a longer text" == (await first).text
    assert [["a longer text"] * 2] == await turns(service, ANNA, "s")


async def test_a_turn_that_waited_while_the_service_began_to_drain_is_refused(make: Make) -> None:
    """The running one is ended after the grace period; the waiting one does not start after it."""
    service = make(token_delay_seconds=0.02)
    first = asyncio.create_task(collect(service.chat(chat("a longer text", session_id="s"))))
    await asyncio.sleep(0.03)
    second = asyncio.create_task(collect(service.chat(chat("later", session_id="s"))))
    await asyncio.sleep(0)

    await service.engines.drain(0.01)

    assert FinishReason.ABORT == (await first).finished.finish_reason
    with pytest.raises(ShuttingDown):
        await second


async def test_leaving_a_stream_frees_the_model_at_once(make: Make) -> None:
    """Closing the events closes the whole chain below."""
    service = make(token_delay_seconds=0.001)
    stream = service.complete(complete("a long text", cache=False))
    await anext(stream)
    assert 1 == service.engines.default.status().running

    await stream.aclose()

    for _ in range(20):
        await asyncio.sleep(0)
    assert 0 == service.engines.default.status().running


async def test_what_cannot_be_taken_is_refused_before_anything_starts(make: Make) -> None:
    """A full engine, an unknown model, a draining service, a session where there is no memory."""
    service = make(max_running=1, token_delay_seconds=0.01)
    running = service.complete(complete("x" * 10, cache=False))
    await anext(running)

    with pytest.raises(EngineBusy):
        await anext(service.complete(complete("y", cache=False)))
    with pytest.raises(ModelNotFound):
        await anext(service.complete(complete("y", model="other")))
    await running.aclose()
    service.sessions = None
    with pytest.raises(InvalidRequest, match="switched off"):
        await anext(service.chat(chat("y", session_id="s")))
    await service.engines.drain(0)
    with pytest.raises(ShuttingDown):
        await anext(service.complete(complete("y")))


async def test_the_status_shows_figures_and_no_texts(make: Make) -> None:
    """Model, queue, cache and sessions; nothing that anybody wrote."""
    service = make()
    await collect(service.chat(chat("canary", session_id="canary-session")))

    status = await service.status()

    assert ("ready", 1, 0) == (status["status"], status["sessions"], status["engine"]["running"])
    assert 1 == status["cache"]["misses"]
    assert "canary" not in str(status)
