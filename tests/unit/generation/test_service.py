"""GenerationService: the steps in order, over the shipped fake engine."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, Literal

import pytest
from msgspec import structs

from app.config import CacheConfig
from app.engine.base import PreparedPrompt
from app.engine.cache import CachedEngine
from app.engine.echo import EchoEngine
from app.engine.served_model import SamplingDefaults
from app.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineBusy,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    PiiBlocked,
    QuotaExceeded,
    ShuttingDown,
)
from app.events import CacheStatus, Event, Started, collect
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.redactor import Redactor
from app.requests import GenerationRequest, Origin
from app.types import FinishReason, Message, Role, Tenant
from tests.unit.engine.scripted import ScriptedEngine
from tests.unit.event_streams import deltas_of, finished_of, read_into, started_of, text_of
from tests.unit.generation.services import ANNA, BERT, Service, chat, complete, serving
from tests.waiting import HANG_SECONDS

EMAIL = "jane.doe@example.com"


@asynccontextmanager
async def filtering(
    engine: EchoEngine, *, input_mode: Literal["mask", "block"] = "mask", **options: Any
) -> AsyncIterator[Service]:
    """Yield a service whose engine stands behind output filter and cache, as the application builds them."""
    redactor = Redactor()
    filtered = FilteredEngine(engine, redactor, lambda kind, count: None)
    cache = CachedEngine(filtered, CacheConfig(), scope=redactor.fingerprint)
    input_filter = InputFilter(redactor, input_mode, lambda kind, count: None)
    async with serving(cache, cache=cache, input_filter=input_filter, **options) as service:
        yield service


def echoing(**options: Any) -> AbstractAsyncContextManager[Service]:
    """Return a filtering service over an echo engine of the given shape."""
    service = {name: options.pop(name) for name in ("input_mode", "waiting_seconds", "sessions") if name in options}
    return filtering(EchoEngine(**options), **service)


@pytest.mark.parametrize("request_", [complete("hello"), chat("hello")], ids=["completion", "chat"])
async def test_a_response_begins_with_started_and_ends_with_finished(request_: GenerationRequest) -> None:
    """One Started, deltas that are never empty, one Finished with the true usage and the model's name."""
    async with echoing() as service:
        events = await service.read(request_)

    assert deltas_of(events) == events[1:-1]
    assert all(delta.text for delta in deltas_of(events))
    assert "hello" == text_of(events)
    assert ("echo", "echo") == (started_of(events).model, finished_of(events).model)
    assert started_of(events).prompt_tokens == finished_of(events).usage.prompt_tokens
    assert 5 == finished_of(events).usage.completion_tokens


async def test_a_session_continues_where_it_was_and_belongs_to_its_tenant() -> None:
    """The second turn sees the first; another tenant's session of the same name is empty."""
    async with echoing() as service:
        await service.read(chat("one", session_id="s"))

        second = finished_of(await service.read(chat("two", session_id="s")))
        foreign = finished_of(await service.read(chat("two", tenant=BERT.tenant, session_id="s")))

        assert second.context is not None
        assert foreign.context is not None
        assert (1, 0) == (second.context.turns_kept, foreign.context.turns_kept)
        assert ("s", "s") == (second.session_id, foreign.session_id)
        assert [["one", "one"], ["two", "two"]] == await service.turns(ANNA.tenant, "s")
        assert [["two", "two"]] == await service.turns(BERT.tenant, "s")


async def test_a_client_that_resends_the_whole_conversation_appends_nothing_twice() -> None:
    """What the session has already is recognised at the front of the request."""
    async with echoing() as service:
        await service.read(chat("one", session_id="s"))

        await service.read(chat("one", "one", "two", session_id="s"))

        assert [["one", "one"], ["two", "two"]] == await service.turns(ANNA.tenant, "s")


async def test_only_complete_responses_enter_a_session() -> None:
    """A client that leaves, an aborted response and a refused request leave the session as it was."""
    async with echoing(token_delay_seconds=0.001) as service:
        left = service.generate(chat("leaving", session_id="s"))
        await anext(left), await anext(left)
        await left.aclose()
        aborted = chat("aborted by us", session_id="s")
        stream = service.generate(aborted)
        await anext(stream)
        await service.engine.abort(aborted.id)
        ended = [event async for event in stream]
        with pytest.raises(ContextLengthExceeded):
            await service.read(chat("x", session_id="s", max_tokens=99_999))

        assert FinishReason.ABORT == finished_of(ended).finish_reason
        assert [] == await service.turns(ANNA.tenant, "s")


async def test_parallel_turns_of_one_session_do_not_mix() -> None:
    """Ten at once leave ten whole pairs, and each saw a whole number of turns."""
    async with echoing() as service:
        responses = await asyncio.gather(*(service.read(chat(f"t{n}", session_id="s")) for n in range(10)))

        assert {(f"t{n}",) * 2 for n in range(10)} == {tuple(turn) for turn in await service.turns(ANNA.tenant, "s")}
    contexts = [finished_of(each).context for each in responses]
    assert list(range(10)) == sorted(context.turns_kept for context in contexts if context)


async def test_old_turns_give_way_to_the_context_window_whole_and_are_reported() -> None:
    """The model's window has room for two of three turns; the session itself has all."""
    async with echoing(context_length=79) as service:
        texts = ("a" * 10, "b" * 10, "c" * 10)
        responses = [await service.read(chat(text, session_id="s", max_tokens=20)) for text in texts]
        context = finished_of(responses[-1]).context

        assert context is not None
        assert (1, 1) == (context.turns_kept, context.turns_dropped)
        assert context.prompt_tokens + 20 <= context.limit == 79
        assert 3 == len(await service.turns(ANNA.tenant, "s"))


async def test_the_callers_system_text_takes_the_place_of_the_models() -> None:
    """It counts into the prompt, in front of the conversation, and is never stored."""
    async with echoing() as service:
        events = await service.read(chat("hi", system="be a pirate", session_id="s"))

        assert len("be a pirate") + len("hi") + 3 == finished_of(events).usage.prompt_tokens
        assert [["hi", "hi"]] == await service.turns(ANNA.tenant, "s")


async def test_personal_data_reaches_neither_model_session_nor_cache_nor_log() -> None:
    """The prompt that is reported is the masked one, and so is everything that is stored."""
    async with echoing() as service:
        completed = await collect(service.generate(complete(f"mail {EMAIL}")))
        chatted = await collect(service.generate(chat(f"mail {EMAIL}", session_id="s")))

        assert "mail [EMAIL]" == completed.prompt == completed.text == chatted.text
        assert [["mail [EMAIL]"] * 2] == await service.turns(ANNA.tenant, "s")
        assert [("mail [EMAIL]",) * 2] * 2 == [(record.prompt, record.answer) for record in service.log.records]


async def test_a_prompt_of_tokens_reaches_the_model_as_it_is() -> None:
    """Also tokens that no text encodes to; the prompt that is reported is their text."""
    async with echoing() as service:
        tokens = (await control_token(service), *map(ord, "hello"))

        response = await collect(service.generate(complete(tokens)))

        assert ("hello", len(tokens)) == (response.prompt, response.finished.usage.prompt_tokens)


async def control_token(service: Service) -> int:
    """Return a token that is no text."""
    silence = GenerationRequest(id="x", tenant=Tenant.owner("t"), messages=(Message(Role.ASSISTANT, ""),))
    prepared: PreparedPrompt = await service.engine.prepare(silence)
    return (prepared.prompt_ids or ())[0]


async def test_personal_data_in_a_prompt_of_tokens_is_filtered_too() -> None:
    """Control tokens in the midst of it hide nothing; the model gets the clean text."""
    async with echoing() as service:
        tokens = (*map(ord, "mail jane"), await control_token(service), *map(ord, ".doe@example.com"))

        response = await collect(service.generate(complete(tokens)))

        assert "mail [EMAIL]" == response.prompt == response.text
        assert len("mail [EMAIL]") == response.finished.usage.prompt_tokens
    async with echoing(input_mode="block") as service:
        with pytest.raises(PiiBlocked):
            await anext(service.generate(complete(tokens)))


@pytest.mark.parametrize(
    ("tokens", "refusal"), [((5, 2**30), InvalidRequest), ((97,) * 100, ContextLengthExceeded), ((), InvalidRequest)]
)
async def test_tokens_that_the_model_cannot_take_are_refused(tokens: tuple[int, ...], refusal: Any) -> None:
    """One that it does not have, more than fit, or none; the field is named."""
    async with echoing(context_length=50) as service:
        with pytest.raises(refusal) as refused:
            await anext(service.generate(complete(tokens)))

    if refusal is InvalidRequest:
        assert "prompt" == refused.value.details["errors"][0]["field"]


async def test_a_message_that_is_continued_has_no_new_turn_in_front() -> None:
    """The model sees one mark less than where it begins to speak anew."""
    async with echoing() as service:
        anew, continued = [
            finished_of(await service.read(chat("hi", "well", continue_final_message=flag))) for flag in (False, True)
        ]

    assert anew.usage.prompt_tokens - 1 == continued.usage.prompt_tokens


async def test_a_session_continues_with_the_users_words_only() -> None:
    """A message of the assistant's is the model's to write."""
    async with echoing() as service:
        with pytest.raises(InvalidRequest, match="messages"):
            await anext(service.generate(chat("hi", "well", session_id="s")))


async def test_the_first_event_says_where_a_response_comes_from_and_the_last_how_it_ended() -> None:
    """Whether it comes from the cache is known from Started, and the stop string from Finished."""
    async with echoing() as service:
        for status in (CacheStatus.MISS, CacheStatus.HIT):
            events = await service.read(complete("one two three", stop=("three", "two")))
            assert Started(model="echo", prompt="one two three", prompt_tokens=13, cache=status) == events[0]
            assert ("two", status) == (finished_of(events).samples[0].stop_reason, finished_of(events).cache)


@pytest.mark.parametrize("n", [1, 2])
async def test_each_delta_says_how_many_tokens_it_took(n: int) -> None:
    """Also those that the filter withheld for a while: together they are what the last event counts."""
    async with echoing() as service:
        events = await service.read(complete(f"mail {EMAIL} or call", n=n))

    for index, sample in enumerate(finished_of(events).samples):
        deltas = [delta for delta in deltas_of(events) if delta.index == index]
        assert sample.completion_tokens == sum(delta.tokens for delta in deltas)
        assert all(delta.text for delta in deltas)


async def test_blocked_personal_data_leaves_no_trace() -> None:
    """The request is refused before the model, and the session is not created."""
    async with echoing(input_mode="block") as service:
        with pytest.raises(PiiBlocked):
            await service.read(chat(f"mail {EMAIL}", session_id="s"))

        assert [] == await service.turns(ANNA.tenant, "s")
        assert [(400, None)] == [(record.status, record.prompt) for record in service.log.records]


async def test_identical_requests_of_one_tenant_are_generated_once() -> None:
    """The second is a hit; another tenant's is not; cache=False generates anew."""
    async with echoing() as service:
        responses = [
            await service.read(chat("hi", **fields)) for fields in ({}, {}, {"tenant": BERT.tenant}, {"cache": False})
        ]

    assert [False, True, False, False] == [finished_of(each).cached for each in responses]
    assert {"hi"} == {text_of(each) for each in responses}


async def test_a_turn_waits_only_so_long_for_the_one_before_it() -> None:
    """After that it is refused, and the one before it continues undisturbed."""
    async with echoing(token_delay_seconds=0.02, waiting_seconds=0.05) as service:
        first = asyncio.create_task(service.read(chat("a longer text", session_id="s")))
        await asyncio.sleep(0.03)

        with pytest.raises(DeadlineExceeded):
            await service.read(chat("impatient", session_id="s"))

        assert "a longer text" == text_of(await first)
        assert [["a longer text"] * 2] == await service.turns(ANNA.tenant, "s")


async def test_a_turn_that_waited_while_the_service_began_to_drain_is_refused() -> None:
    """The running one is ended after the grace period; the waiting one does not start after it."""
    async with echoing(token_delay_seconds=0.02) as service:
        first = asyncio.create_task(service.read(chat("a longer text", session_id="s")))
        await asyncio.sleep(0.03)
        second = asyncio.create_task(service.read(chat("later", session_id="s")))
        await asyncio.sleep(0)

        await service.host.drain(0.01)

        assert FinishReason.ABORT == finished_of(await first).finish_reason
        with pytest.raises(ShuttingDown):
            await second


async def test_what_cannot_be_taken_is_refused_before_anything_starts() -> None:
    """A full engine, an unknown model, a draining service, a session where there is no memory."""
    async with echoing(max_running=1, token_delay_seconds=0.01, sessions=False) as service:
        running = service.generate(complete("x" * 10, cache=False))
        await anext(running)

        with pytest.raises(EngineBusy):
            await anext(service.generate(complete("y", cache=False)))
        with pytest.raises(ModelNotFound):
            await anext(service.generate(complete("y", model="other")))
        await running.aclose()
        with pytest.raises(InvalidRequest, match="switched off"):
            await anext(service.generate(chat("y", session_id="s")))
        await service.host.drain(0)
        with pytest.raises(ShuttingDown):
            await anext(service.generate(complete("y")))


async def test_the_status_has_figures_and_no_texts() -> None:
    """Model, queue, cache and sessions; nothing that anybody wrote."""
    async with echoing() as service:
        await service.read(chat("canary", session_id="canary-session"))

        status = service.service.status()

    assert ("ready", 1, 0) == (status["status"], status["sessions"], status["engine"]["running"])
    assert 1 == status["cache"]["misses"]
    assert "canary" not in str(status)


async def test_rights_are_checked_before_a_prompt_is_looked_at() -> None:
    """For the model that serves it, and for what the request itself uses of them; what is forbidden takes nothing."""
    async with echoing(input_mode="block") as service:
        uses = (
            complete("x", logprobs=0),
            chat("x", system="be brief"),
            chat("x"),
            complete((120,)),
            complete((0x110000, 120)),
        )
        for request in uses:
            await service.read(request)
        checks = list(service.admission.checks)
        service.admission.forbidden = Forbidden("Not for you.")
        with pytest.raises(Forbidden):
            await service.read(complete(f"mail {EMAIL}"))

        assert [
            ["logprobs"],
            ["system_text"],
            [],
            [],
            ["control_tokens"],
        ] == [[name for name, used in check.items() if used in (True, "messages")] for check in checks]
        assert {("echo", ANNA)} == {(check["model"], check["principal"]) for check in checks}
        assert len(uses) == len(service.admission.reservations)
        assert 403 == service.log.records[-1].status


async def test_a_request_reserves_what_it_may_cost_and_commits_what_it_did() -> None:
    """The prompt and every token that may follow it, before the engine starts."""
    engine = ScriptedEngine("a", "b").run_freely()
    async with serving(engine) as service:
        await service.read(complete("hello", max_tokens=7))
        (reservation,) = service.admission.reservations
        service.admission.exhausted = QuotaExceeded("Nothing is left.", retry_after=1)
        with pytest.raises(QuotaExceeded):
            await service.read(complete("hello", max_tokens=7))

        assert (5 + 7, 5 + 2, True) == (reservation.tokens, reservation.committed, reservation.released)
        assert 1 == len(engine.requests)
        assert [(7, 200), (0, 429)] == [(record.charged_tokens, record.status) for record in service.log.records]


@pytest.mark.parametrize(("cached_prompt", "cached_completion", "charged"), [(0, 0, 0), (1, 1, 10), (0.1, 0.5, 3)])
async def test_a_replayed_response_is_charged_at_its_own_rate(
    cached_prompt: float, cached_completion: float, charged: int
) -> None:
    """Rounded up; the record has the tokens that the caller got."""
    engine = CachedEngine(EchoEngine(), CacheConfig())
    async with serving(engine, cached_prompt=cached_prompt, cached_completion=cached_completion) as service:
        for _ in range(2):
            await service.read(complete("hello"))

        assert [10, charged] == [record.charged_tokens for record in service.log.records]
        assert [(5, False), (5, True)] == [(r.completion_tokens, r.cached) for r in service.log.records]


async def test_a_hang_up_in_a_response_that_is_not_streamed_is_charged_for_all_that_was_generated() -> None:
    """Of which the client has seen the first token only."""
    async with serving(EchoEngine(token_delay_seconds=0.001)) as service:
        request = complete("a long text that takes a while " * 3, stream=False)
        seen: list[Event] = []
        reading = asyncio.create_task(read_into(seen, service.generate(request)))
        async with asyncio.timeout(HANG_SECONDS):
            while request.progress.generated < 10:  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0.001)

        reading.cancel()
        await asyncio.wait([reading])

        generated = request.progress.generated
        await asyncio.sleep(0.01)
        (reservation,) = service.admission.reservations
        (record,) = service.log.records
    assert 1 == sum(delta.tokens for delta in deltas_of(seen))
    assert 10 <= generated == request.progress.generated < 93
    assert 93 + generated == reservation.committed == record.charged_tokens
    assert (generated, 499, None) == (record.completion_tokens, record.status, record.finish_reason)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_does_not_stream_has_the_same_response(stream: bool) -> None:
    """In two deltas instead of one for each token; the filter may add a third."""
    text = f"{'word ' * 10}{EMAIL} and on"
    async with echoing() as service:
        events = await service.read(complete(text, stream=stream))

    assert f"{'word ' * 10}[EMAIL] and on" == text_of(events)
    assert (len(deltas_of(events)) > 3) == stream
    assert finished_of(events).usage.completion_tokens == sum(delta.tokens for delta in deltas_of(events))


async def test_every_request_has_one_record_of_how_it_ended() -> None:
    """Complete, refused, failed, left, and left after its last event, which is no failure."""
    engine = ScriptedEngine("a").run_freely()
    async with serving(engine, store_text=False) as service:
        origin = Origin(request_id="seen by the client", route="/v1/generate")
        await service.read(complete("hello", origin=origin, adapter=None))
        engine.error, engine.texts = EngineBusy("Full."), ()
        with pytest.raises(EngineBusy):
            await service.read(complete("hello"))
        engine.error = RuntimeError("a defect")
        with pytest.raises(RuntimeError):
            await service.read(complete("hello"))
        engine.error, engine.texts = EngineFailed("It died."), ("a",)
        with pytest.raises(EngineFailed):
            await service.read(complete("hello"))
        engine.error = None
        for events in (1, 3):
            stream = service.generate(complete("hello"))
            for _ in range(events):
                await anext(stream)
            await stream.aclose()
        records = service.log.records

    assert [200, 503, 500, 503, 499, 200] == [record.status for record in records]
    assert ["stop", None, None, None, None, "stop"] == [record.finish_reason for record in records]
    assert ("seen by the client", "/v1/generate", "a") == (records[0].request_id, records[0].route, records[0].key_id)
    assert {None} == {record.prompt for record in records} == {record.answer for record in records}
    assert 6 == len(records)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_request_that_reaches_its_engine_after_the_grace_period_is_refused(n: int) -> None:
    """It was admitted before, and no abort could find it in the engine; it is neither generated nor charged."""
    begun, may_go_on = asyncio.Event(), asyncio.Event()

    class LateEngine(EchoEngine):
        async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
            begun.set()
            await may_go_on.wait()
            async with aclosing(super().stream(request)) as events:
                async for event in events:
                    yield event

    async with serving(LateEngine()) as service:
        reading = asyncio.create_task(service.read(complete("hello", n=n)))
        await begun.wait()
        await service.host.abort_all()
        may_go_on.set()
        with pytest.raises(ShuttingDown):
            await reading
        (record,) = service.log.records

    assert (503, 0) == (record.status, record.charged_tokens)
    assert 0 == service.engine.status().running


@pytest.mark.parametrize("store_text", [False, True])
async def test_a_response_that_fails_after_its_last_token_is_no_success(
    store_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn cannot be stored: the client gets an error, and the record says so."""

    async def fail(tenant: str, text: str) -> str:
        raise RuntimeError("a defect")

    input_filter = InputFilter(Redactor(), "mask", lambda kind, count: None)
    monkeypatch.setattr(input_filter, "mask", fail)
    async with serving(ScriptedEngine("a").run_freely(), input_filter=input_filter, store_text=store_text) as service:
        with pytest.raises(RuntimeError, match="a defect"):
            await service.read(chat("hello", session_id="s"))
        (record,) = service.log.records

    assert (500, None) == (record.status, record.finish_reason)


async def test_a_session_masks_what_the_input_filter_lets_through_and_knows_it_again() -> None:
    """A client that sends the whole conversation again, unmasked as it has it, adds only what is new."""
    engine = ScriptedEngine("mail ", EMAIL, model="echo").run_freely()
    storage_filter = InputFilter(Redactor(), "mask", lambda kind, count: None)
    async with serving(engine, storage_filter=storage_filter) as service:
        await service.read(chat(f"I am {EMAIL}", session_id="s"))
        await service.read(chat(f"I am {EMAIL}", f"mail {EMAIL}", f"and {EMAIL}?", session_id="s"))
        turns = await service.turns(ANNA.tenant, "s")

    assert [["I am [EMAIL]", "mail [EMAIL]"], ["and [EMAIL]?", "mail [EMAIL]"]] == turns


async def test_what_is_unset_is_filled_in_before_the_engine_sees_it() -> None:
    """By the model's defaults; max_tokens gives way to the prompt."""
    engine = ScriptedEngine("a", model="echo").run_freely()
    async with serving(engine, defaults=SamplingDefaults(max_tokens=10_000, temperature=0.7)) as service:
        await service.read(complete("hello"))
        await service.read(complete("hello", temperature=0.2, max_tokens=3))

    limit = engine.info.context_length - len("hello")
    assert [(limit, 0.7), (3, 0.2)] == [(r.sampling.max_tokens, r.sampling.temperature) for r in engine.requests]
    assert [frozenset()] * 2 == [request.unset for request in engine.requests]


class CountingEngine(EchoEngine):
    """Counts what it encodes, and records the prompts that it generates from."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[tuple[int, ...] | None] = []
        self.prompts: list[tuple[int, ...] | None] = []
        encode_chat = self.tokenizer.encode_chat

        def counting(*messages: Any, **options: Any) -> tuple[int, ...]:
            ids = encode_chat(*messages, **options)
            self.encoded.append(ids)
            return ids

        self.tokenizer.encode_chat = counting  # type: ignore[method-assign]  # of this instance only

    def stream(self, request: GenerationRequest) -> Any:
        self.prompts.append(request.prompt_ids)
        return super().stream(request)


@pytest.mark.parametrize("turns", [0, 1, 3], ids=lambda turns: f"{turns} turns of history")
@pytest.mark.parametrize("n", [1, 3])
async def test_a_chat_is_encoded_once(turns: int, n: int) -> None:
    """Counted and generated from by the same ids, whatever stands between, and for all samples."""
    engine = CountingEngine()
    async with filtering(engine) as service:
        for number in range(turns):
            await service.read(chat(f"turn {number}", session_id="s"))
        engine.encoded.clear()
        engine.prompts.clear()

        request = chat("hi", session_id="s") if turns else chat("hi", n=n)
        context = finished_of(await service.read(request)).context

    assert context is not None
    assert turns == context.turns_kept
    assert 1 == len(engine.encoded)
    assert engine.encoded * (1 if turns else n) == engine.prompts


@pytest.mark.parametrize("request_", [complete("hello"), chat("hello", session_id="s"), complete("hello", n=3)])
@pytest.mark.parametrize("events", range(6))
async def test_leaving_a_stream_frees_everything_at_once(request_: GenerationRequest, events: int) -> None:
    """The engine's generator, the lease, the reservation, the session's lock: when the call returns, all are gone."""
    engine = ScriptedEngine("a", "b", "c").run_freely()
    async with serving(engine) as service:
        request = structs.replace(request_, id=f"{request_.id}.{events}")
        stream = service.generate(request)
        for _ in range(events):
            await anext(stream)
        await stream.aclose()

        assert [] == engine.live
        assert len(engine.requests) == len(engine.closed)
        assert 0 == service.admission.open
        assert service.sessions is not None
        assert 0 == service.sessions.locks
        assert (1 if events else 0) == len(service.log.records)
        # Nobody holds a lease: an unload with all the time in the world has nothing to wait for.
        await asyncio.wait_for(service.host.unload("echo", grace_seconds=600), HANG_SECONDS)


@pytest.mark.parametrize("request_", [complete("hello"), chat("hello", session_id="s"), complete("hello", n=3)])
async def test_being_cancelled_frees_everything_at_once(request_: GenerationRequest) -> None:
    """In the middle of waiting for a token, as when a client hangs up."""
    engine = ScriptedEngine("never")
    async with serving(engine) as service:
        reading = asyncio.create_task(service.read(structs.replace(request_, id=f"{request_.id}.cancelled")))
        async with asyncio.timeout(HANG_SECONDS):
            while len(engine.live) < request_.n:  # noqa: ASYNC110  # what is waited for has no event
                await asyncio.sleep(0)

        reading.cancel()
        await asyncio.wait([reading])

        assert [] == engine.live
        assert 0 == service.admission.open
        assert service.sessions is not None
        assert 0 == service.sessions.locks
        assert [499] == [record.status for record in service.log.records]
        await asyncio.wait_for(service.host.unload("echo", grace_seconds=600), HANG_SECONDS)


class StuckEngine(EchoEngine):
    """Never finishes preparing a prompt."""

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")


async def test_a_prompt_that_takes_too_long_to_prepare_is_refused() -> None:
    """Its session is free again, and nothing is reserved."""
    async with serving(StuckEngine(), waiting_seconds=0.02) as service:
        for _ in range(2):
            with pytest.raises(DeadlineExceeded):
                await asyncio.wait_for(service.read(chat("one", session_id="s")), HANG_SECONDS)

        assert [] == service.admission.reservations
        assert [504, 504] == [record.status for record in service.log.records]


async def test_a_request_is_checked_for_its_fewest_tokens_before_its_prompt_is_prepared() -> None:
    async with echoing() as service:
        await service.read(complete("hello", max_tokens=7, n=2))

    assert [15] == service.admission.least_tokens
