"""OpenAI's Responses API over the real application, mostly through OpenAI's own client."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from openai.types.responses import response_create_params as params

from app.errors import EngineFailed, ServiceUnavailable
from app.events import Delta, DetokenizedLogprob, Event, Finished, FinishedSample, Started, ToolCallDelta
from app.requests import GenerationRequest
from app.types import FinishReason, Grammar, Message, Principal, Role, Tenant, Tool, ToolCall, ToolChoice, Usage
from app.web.openai.responses.request_model import ResponseRequest
from tests.web.harness import KEY, MODEL, RecordingEngine, ScriptedService, Web, make_web

PATH = "/v1/responses"
ADD = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    "strict": True,
}


@dataclass
class EventService(ScriptedService):
    """Responds with given events instead of texts."""

    events: tuple[Delta | BaseException, ...] = ()
    reason: FinishReason = FinishReason.STOP

    async def generate(self, request: GenerationRequest, principal: Principal) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        yield Started(model=MODEL, prompt_tokens=3)
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event
        sample = FinishedSample(finish_reason=self.reason, completion_tokens=9, reasoning_tokens=4)
        yield Finished(model=MODEL, samples=(sample,), usage=Usage(3, 9, 1))


def thinks_and_calls(*, reason: FinishReason = FinishReason.TOOL_CALLS) -> EventService:
    """Return a service whose model thinks, speaks and calls two functions, the arguments of one in two parts."""
    return EventService(
        events=(
            Delta(reasoning="Let me "),
            Delta(reasoning="see."),
            Delta(text="I add."),
            Delta(tool_calls=(ToolCallDelta(position=0, id="call_1", name="add", arguments='{"a": 7'),)),
            Delta(tool_calls=(ToolCallDelta(position=0, arguments=', "b": 5}'),)),
            Delta(tool_calls=(ToolCallDelta(position=1, id="call_2", name="add", arguments="{}"),)),
        ),
        reason=reason,
    )


@asynccontextmanager
async def client_of(web: Web) -> AsyncIterator[Any]:
    """Give OpenAI's client; loosely typed, because its types know OpenAI's models and tools by name."""
    transport = httpx.ASGITransport(web.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport) as http:
        inner: Any = http
        yield openai.AsyncOpenAI(api_key=KEY, base_url="http://test/v1", http_client=inner, max_retries=0)


@asynccontextmanager
async def conversing(**sections: Any) -> AsyncIterator[tuple[Any, RecordingEngine, Web]]:
    """Run the real service over an engine that repeats the user and records what it was asked."""
    engine = RecordingEngine()
    web = await make_web(engines={MODEL: engine}, **sections)
    async with client_of(web) as client:
        yield client, engine, web


def texts(request: GenerationRequest) -> list[str]:
    return [message.content for message in request.messages if message.role is not Role.SYSTEM]


async def test_a_response_has_openais_shape():
    """The client parses it, and its text is where the client looks for it."""
    async with conversing() as (client, engine, _):
        response = await client.responses.create(
            model=MODEL, input="hello there", instructions="Be brief.", max_output_tokens=50, metadata={"a": "b"}
        )

    assert "hello there" == response.output_text
    assert ("completed", "response", "Be brief.", {"a": "b"}) == (
        response.status,
        response.object,
        response.instructions,
        response.metadata,
    )
    assert response.usage is not None
    assert (response.usage.total_tokens, 50) == (
        response.usage.input_tokens + response.usage.output_tokens,
        engine.requests[0].sampling.max_tokens,
    )
    assert (Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "hello there")) == engine.requests[0].messages


async def test_a_stream_has_openais_events_in_their_order():
    """Each item and each part begins, grows and ends; every event is numbered; the last has the whole response."""
    web = await make_web(thinks_and_calls())
    async with client_of(web) as client:
        stream = await client.responses.create(model=MODEL, input="7 + 5?", stream=True)
        events = [event async for event in stream]

    assert [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ] == [event.type for event in events]
    assert list(range(len(events))) == [event.sequence_number for event in events]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    last = events[-1]
    assert last.type == "response.completed"
    assert done == last.response.output
    assert ["reasoning", "message", "function_call", "function_call"] == [item.type for item in done]
    assert ('{"a": 7, "b": 5}', "call_1", "add") == (done[2].arguments, done[2].call_id, done[2].name)


async def test_a_stream_and_a_whole_response_say_the_same():
    """One builder makes both."""
    web = await make_web(thinks_and_calls())
    async with client_of(web) as client:
        whole = await client.responses.create(model=MODEL, input="7 + 5?")
        async with client.responses.stream(model=MODEL, input="7 + 5?") as stream:
            async for _ in stream:
                pass
            streamed = await stream.get_final_response()

    def said(response: Any) -> list[Any]:
        return [{**item.model_dump(), "id": None, "parsed_arguments": None} for item in response.output]

    assert [each["type"] for each in said(whole)] == [each["type"] for each in said(streamed)]
    assert [item.arguments for item in whole.output[2:]] == [item.arguments for item in streamed.output[2:]]
    assert whole.usage == streamed.usage
    assert whole.usage is not None
    assert 4 == whole.usage.output_tokens_details.reasoning_tokens


@pytest.mark.parametrize(
    ("reason", "status", "why"),
    [
        (FinishReason.STOP, "completed", None),
        (FinishReason.TOOL_CALLS, "completed", None),
        (FinishReason.LENGTH, "incomplete", "max_output_tokens"),
        (FinishReason.CONTENT_FILTER, "incomplete", "content_filter"),
    ],
)
async def test_a_response_says_how_it_ended(reason, status, why):
    """In the object, and in the name of the stream's last event."""
    web = await make_web(thinks_and_calls(reason=reason))
    async with client_of(web) as client:
        whole = await client.responses.create(model=MODEL, input="x")
        events = [event async for event in await client.responses.create(model=MODEL, input="x", stream=True)]

    assert status == whole.status
    assert why == (whole.incomplete_details and whole.incomplete_details.reason)
    assert f"response.{status}" == events[-1].type
    assert status == whole.output[-1].status
    assert "completed" == whole.output[0].status


async def test_a_conversation_goes_on_from_any_response():
    """The model reads what was said before; instructions are those of the request alone."""
    async with conversing() as (client, engine, _):
        first = await client.responses.create(model=MODEL, input="one", instructions="Be brief.")
        left = await client.responses.create(model=MODEL, input="left", previous_response_id=first.id)
        await client.responses.create(model=MODEL, input="right", previous_response_id=first.id)
        await client.responses.create(model=MODEL, input="more", previous_response_id=left.id)

    assert [
        ["one"],
        ["one", "one", "left"],
        ["one", "one", "right"],
        ["one", "one", "left", "left", "more"],
    ] == [texts(request) for request in engine.requests]
    assert "Be brief." not in str(engine.requests[1].messages)
    assert first.id == left.previous_response_id


async def test_what_was_not_stored_cannot_be_continued():
    """Nor what was deleted, nor what never was: a 400 with OpenAI's code, which names the field."""
    async with conversing() as (client, engine, _):
        unstored = await client.responses.create(model=MODEL, input="one", store=False)
        deleted = await client.responses.create(model=MODEL, input="two")
        await client.responses.delete(deleted.id)
        for response_id in (unstored.id, deleted.id, "resp_" + "0" * 32, "nonsense"):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model=MODEL, input="x", previous_response_id=response_id)
            assert ("previous_response_not_found", "previous_response_id") == (refused.value.code, refused.value.param)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response_id)

    assert 2 == len(engine.requests)
    assert (False, True) == (unstored.store, deleted.store)


async def test_a_stored_response_is_shown_as_it_was_sent():
    """Calls, reasoning and usage included, and what was sent for it can be listed page by page."""
    web = await make_web(thinks_and_calls())
    async with client_of(web) as client:
        sent = await client.responses.create(
            model=MODEL,
            input=[
                {"role": "user", "content": "one"},
                {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "12"},
            ],
            tools=[ADD],
        )
        shown = await client.responses.retrieve(sent.id)
        pages = [page async for page in client.responses.input_items.list(sent.id, order="asc", limit=1)]

    assert sent == shown
    assert ["message", "function_call", "function_call_output"] == [item.type for item in pages]
    assert 3 == len({item.id for item in pages})


async def test_another_tenant_finds_nothing():
    """The same 404 and 400 as for what does not exist."""
    engine = RecordingEngine()
    web = await make_web(engines={MODEL: engine})
    store = web.container.responses
    assert store is not None
    async with client_of(web) as client:
        response = await client.responses.create(model=MODEL, input="one")
    tenant = engine.requests[0].tenant

    assert await store.read(tenant, response.id) is not None
    assert await store.read(type(tenant).owner("bob"), response.id) is None


async def test_personal_data_is_masked_in_what_is_stored_whatever_the_filters_let_through():
    """With both filters off the caller sees it, and the store does not."""
    text = "write to ann@example.com"
    async with conversing(pii={"input": "off", "output": "off"}) as (client, engine, _):
        response = await client.responses.create(
            model=MODEL,
            input=text,
            instructions=text,
            metadata={"who": text},
            tools=[{**ADD, "description": text, "strict": False}],
        )
        shown = await client.responses.retrieve(response.id)
        items = await client.responses.input_items.list(response.id)
        await client.responses.create(model=MODEL, input="go on", previous_response_id=response.id)

    assert text == response.output_text
    assert ("write to [EMAIL]", "write to [EMAIL]") == (shown.output_text, shown.instructions)
    assert "ann@example.com" not in items.model_dump_json() + shown.model_dump_json()
    assert ["write to [EMAIL]", "write to [EMAIL]", "go on"] == texts(engine.requests[1])


async def test_a_conversation_is_the_callers_session():
    """`conversation` names it; it holds the history, and the response is not stored a second time."""
    async with conversing() as (client, engine, web):
        await client.responses.create(model=MODEL, input="one", conversation="chat-1")
        response = await client.responses.create(model=MODEL, input="two", conversation="chat-1")
        session = await web.sessions.read(engine.requests[0].tenant, "chat-1")
        with pytest.raises(openai.BadRequestError, match="conversation"):
            await client.responses.create(
                model=MODEL, input="x", conversation={"id": "chat-1"}, previous_response_id=response.id
            )

    assert ["one", "one", "two"] == texts(engine.requests[1])
    assert session is not None
    assert 2 == len(session.turns)
    assert response.conversation is not None
    assert "chat-1" == response.conversation.id
    assert response.store is False


async def test_without_session_memory_a_response_is_answered_and_not_stored():
    """The default of `store` is no reason to refuse."""
    async with conversing(chat_history={"enabled": False}) as (client, _, _):
        response = await client.responses.create(model=MODEL, input="one")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)

    assert "one" == response.output_text
    assert response.store is False


async def test_an_item_of_a_stored_response_may_be_sent_by_reference():
    """So AI SDK sends the calls that it answers."""
    service = thinks_and_calls()
    web = await make_web(service)
    async with client_of(web) as client:
        first = await client.responses.create(model=MODEL, input="7 + 5?")
        items: list[Any] = [{"type": "item_reference", "id": item.id} for item in first.output]
        await client.responses.create(
            model=MODEL,
            input=[
                {"role": "user", "content": "7 + 5?"},
                *items,
                {"type": "function_call_output", "call_id": "call_1", "output": "12"},
            ],
        )

    calls = (ToolCall("call_1", "add", '{"a": 7, "b": 5}'), ToolCall("call_2", "add", "{}"))
    assert (
        Message(Role.USER, "7 + 5?"),
        Message(Role.ASSISTANT, "I add.", tool_calls=calls, reasoning="Let me see."),
        Message(Role.TOOL, "12", tool_call_id="call_1", name="add"),
    ) == service.requests[1].messages


async def test_every_item_may_be_named_and_a_response_is_read_once_for_all_of_them(monkeypatch: pytest.MonkeyPatch):
    """What a function returned too; an item named twice, or one that nobody could send, is refused."""
    call = ToolCallDelta(position=0, id="c", name="no name of a function", arguments="{}")
    service = EventService(events=(Delta(text="Hi"), Delta(tool_calls=(call,))))
    web = await make_web(service)
    store = web.container.responses
    assert store is not None
    reads = []
    read = store.read

    async def recorded(tenant: Tenant, response_id: str):
        reads.append(response_id)
        return await read(tenant, response_id)

    monkeypatch.setattr(store, "read", recorded)
    async with client_of(web) as client:
        sent = [
            {"type": "function_call", "call_id": "1", "name": "n" * 128, "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "12"},
        ]
        first = await client.responses.create(model=MODEL, input=sent)
        listed = (await client.responses.input_items.list(first.id, order="asc")).data
        said, called = ({"type": "item_reference", "id": item.id} for item in first.output)
        reads.clear()
        again = [{"type": "item_reference", "id": item.id} for item in listed]
        await client.responses.create(model=MODEL, input=[*again, said])
        before = list(reads)
        for wrong in ([said, said], [called]):
            with pytest.raises(openai.BadRequestError, match="input"):
                await client.responses.create(model=MODEL, input=wrong)

    assert [first.id] == before
    assert (
        Message(Role.ASSISTANT, "", tool_calls=(ToolCall("1", "n" * 128, "{}"),)),
        Message(Role.TOOL, "12", tool_call_id="1", name="n" * 128),
        Message(Role.ASSISTANT, "Hi"),
    ) == service.requests[1].messages


async def test_each_item_is_stored_with_its_own_text():
    """Two messages of one answer stay two."""
    call = ToolCallDelta(position=0, id="c", name="add", arguments="{}")
    web = await make_web(EventService(events=(Delta(text="one"), Delta(tool_calls=(call,)), Delta(text="two"))))
    async with client_of(web) as client:
        sent = await client.responses.create(model=MODEL, input="x")
        shown = await client.responses.retrieve(sent.id)

    assert sent == shown
    assert ["one", "two"] == [item.content[0].text for item in shown.output if item.type == "message"]


async def test_instructions_count_for_the_limit_of_a_prompt():
    async with conversing(security={"max_prompt_chars": 10}) as (client, _, _):
        await client.responses.create(model=MODEL, input="x" * 5, instructions="y" * 5)
        with pytest.raises(openai.APIStatusError, match="max_prompt_chars"):
            await client.responses.create(model=MODEL, input="x" * 5, instructions="y" * 6)


async def test_what_the_operator_says_in_the_input_is_listed_and_not_continued():
    """As instructions are not."""
    async with conversing() as (client, engine, _):
        items = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "one"}]
        first = await client.responses.create(model=MODEL, input=items)
        listed = await client.responses.input_items.list(first.id, order="asc")
        await client.responses.create(model=MODEL, input="two", previous_response_id=first.id)

    assert ["system", "user"] == [item.role for item in listed.data]
    assert Role.SYSTEM not in [message.role for message in engine.requests[1].messages]


async def test_a_stream_that_cannot_be_stored_ends_once(monkeypatch: pytest.MonkeyPatch):
    """With `response.failed`, and never with `response.completed` before it."""
    web = await make_web(thinks_and_calls())

    async def broken(tenant: Tenant, messages: Any) -> Any:
        raise ServiceUnavailable("The filter failed.")

    monkeypatch.setattr(web.service, "storable", broken)
    async with client_of(web) as client:
        events = [event async for event in await client.responses.create(model=MODEL, input="x", stream=True)]

    ends = {"response.failed", "response.completed", "response.incomplete"}
    assert ["response.failed"] == [event.type for event in events if event.type in ends]
    assert list(range(len(events))) == [event.sequence_number for event in events]


async def test_tools_and_format_reach_the_service():
    """Functions alone, under the names of the request."""
    web = await make_web(ScriptedService())
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with client_of(web) as client:
        await client.responses.create(
            model=MODEL,
            input="x",
            tools=[ADD, {**ADD, "name": "sub", "strict": None}],
            tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "add"}]},
            parallel_tool_calls=False,
            text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        )
        await client.responses.create(
            model=MODEL, input="x", tools=[ADD], tool_choice={"type": "function", "name": "add"}
        )
    first, second = web.service.requests

    assert (Tool("add", "Add two numbers.", json.dumps(ADD["parameters"]), True),) == first.tools == second.tools
    assert (ToolChoice("required"), ToolChoice("required", "add")) == (first.tool_choice, second.tool_choice)
    assert (False, True) == (first.parallel_tool_calls, second.parallel_tool_calls)
    assert Grammar("json_schema", json.dumps(schema, separators=(",", ":"))) == first.sampling.grammar


async def test_log_probabilities_stand_in_the_deltas_and_in_the_response():
    """Where `include` asks for them; a stored response has none, since they would show what is masked."""
    token = DetokenizedLogprob("Hi", b"Hi", -0.5, (DetokenizedLogprob("Hi", b"Hi", -0.5),))
    web = await make_web(EventService(events=(Delta(text="Hi", logprobs=(token,), token_ends=(2,)),)))
    async with client_of(web) as client:
        body: dict[str, Any] = {"model": MODEL, "input": "x", "include": ["message.output_text.logprobs"]}
        whole = await client.responses.create(**body, top_logprobs=1)
        events = [event async for event in await client.responses.create(**body, stream=True)]
        stored = await client.responses.retrieve(whole.id)

    logprobs = whole.output[0].content[0].logprobs
    assert [("Hi", -0.5)] == [(each.token, each.logprob) for each in logprobs]
    assert ["Hi"] == [top.token for top in logprobs[0].top_logprobs]
    (delta,) = [event for event in events if event.type == "response.output_text.delta"]
    assert ["Hi"] == [each.token for each in delta.logprobs]
    assert logprobs == events[-1].response.output[0].content[0].logprobs
    assert [] == stored.output[0].content[0].logprobs


async def test_a_failure_midway_is_the_one_last_event():
    """`response.failed`, with what was said so far; whole responses are an error as anywhere."""
    service = EventService(events=(Delta(text="Hel"), EngineFailed("The model's worker failed.")))
    web = await make_web(service)
    async with client_of(web) as client:
        events = [event async for event in await client.responses.create(model=MODEL, input="x", stream=True)]
        with pytest.raises(openai.InternalServerError, match="worker failed"):
            await client.responses.create(model=MODEL, input="x")

    failed = events[-1]
    assert "response.failed" == failed.type
    assert failed.response.error is not None
    assert ("server_error", "failed", "Hel") == (
        failed.response.error.code,
        failed.response.status,
        failed.response.output_text,
    )
    assert 1 == sum(event.type in ("response.failed", "response.completed") for event in events)


REFUSED: dict[str, list[Any]] = {
    "background": [True],
    "tools": [[{"type": "web_search"}], [{"type": "mcp", "server_label": "x"}], [ADD, ADD]],
    "tool_choice": [{"type": "web_search"}, {"type": "function", "name": "other"}, "required"],
    "prompt": [{"id": "p"}],
    "moderation": [{"model": "m"}],
    "max_tool_calls": [3],
    "context_management": [[{"type": "compaction"}]],
    "image": [{"context_compression": "auto"}],
    "access_programs": [{"cyber": "standard"}],
    "include": [["web_search_call.results"]],
    "service_tier": ["priority"],
    "input": [
        [],
        "",
        [{"type": "web_search_call", "id": "1"}],
        [{"role": "user", "content": [{"type": "input_image"}]}],
    ],
    "stream_options": [{"include_obfuscation": True}, {}],
    "temperature": [3],
    "truncation": ["yes"],
    "verbosity": ["high"],
}


@pytest.mark.parametrize(("field", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
async def test_what_cannot_be_honoured_is_refused_by_name(web: Web, client: httpx.AsyncClient, field: str, value: Any):
    reply = await client.post(PATH, json={"input": "x", field: value})
    error = reply.json()["error"]

    assert (400, "invalid_request_error") == (reply.status_code, error["type"])
    assert field in (error["param"] or error["message"])
    assert [] == web.service.requests


def test_every_field_of_the_package_is_known():
    """A newer package with a new field fails here and not at a user's."""
    kinds = (params.ResponseCreateParamsNonStreaming, params.ResponseCreateParamsStreaming)
    fields = {name for kind in kinds for name in get_type_hints(kind)}

    assert set() == fields - ResponseRequest.model_fields.keys()


async def test_what_changes_nothing_is_accepted(web: Web, client: httpx.AsyncClient):
    """Fields that are labels, hints or OpenAI's own defaults."""
    reply = await client.post(
        PATH,
        json={
            "input": "x",
            "prompt_cache_key": "k",
            "prompt_cache_retention": "24h",
            "prompt_cache_options": {"mode": "implicit"},
            "service_tier": "auto",
            "background": False,
            "include": ["reasoning.encrypted_content"],
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "reasoning": {"effort": None, "summary": "auto"},
            "truncation": "disabled",
            "max_tool_calls": None,
            "user": "u",
        },
    )

    assert 200 == reply.status_code, reply.text
    assert (Message(Role.USER, "x"),) == web.service.requests[0].messages


async def test_a_stored_response_is_never_streamed_again(client: httpx.AsyncClient):
    reply = await client.get(f"{PATH}/resp_{'0' * 32}?stream=true")

    assert (400, "stream") == (reply.status_code, reply.json()["error"]["param"])
