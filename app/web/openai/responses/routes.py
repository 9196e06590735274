"""POST /v1/responses, and the caller's own stored responses: to show, to list the input of, to delete, to continue.

Another tenant's response gives the same 404 as one that does not exist, so ids cannot be probed.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from uuid import uuid4

import msgspec
from fastapi import APIRouter, Path, Query
from pydantic import TypeAdapter, ValidationError
from starlette.responses import Response as HttpResponse

from app.errors import (
    InternalError,
    InvalidRequest,
    NotFound,
    PreviousResponseNotFound,
    RateLimited,
    SessionUnreadable,
    ShuttingDown,
    StoreUnavailable,
    Unauthorized,
)
from app.events import Event, Finished, Started
from app.generation.responses import ResponseStore, StoredResponse
from app.generation.sessions import as_turns
from app.requests import GenerationRequest
from app.types import Message, Role, Tenant, ToolCall
from app.web.http.dependencies import CallerDep, RequestContext, RequestContextDep, ResponsesDep, bind_end_user
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute, StrictRoute
from app.web.http.json_encoding import EncodedJsonResponse, SegmentedJsonResponse
from app.web.http.sampling_params import check_length
from app.web.http.sse import EventStream, collect_response, streamed
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.responses.builder import ResponseBuilder, ResponseStreamEncoder, masked_object
from app.web.openai.responses.items import InputItem, Item, input_items, resolved, to_messages
from app.web.openai.responses.objects import DeletedResponse, InputItemList, ResponseObject, described
from app.web.openai.responses.request_model import ResponseRequest

router = APIRouter(prefix="/v1/responses", tags=["openai"], route_class=GeneratingRoute)
stored_router = APIRouter(prefix="/v1/responses", tags=["openai"], route_class=StrictRoute)

_RESPONSE_ID = re.compile(r"resp_[0-9a-f]{32}")
_ITEM_ID = re.compile(r"(?:msg|rs|fco?)_([0-9a-f]{32})[0-9a-f]{3,}")
_ITEM: TypeAdapter[Item] = TypeAdapter(InputItem)
_EVENTS = (
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.reasoning_text.delta",
    "response.reasoning_text.done",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
    "response.incomplete",
    "response.failed",
)


_LABELS = ("instructions", "metadata", "tools", "text", "user", "safety_identifier", "prompt_cache_key")
"""Fields of the object that repeat texts of the request."""


@dataclass(frozen=True, slots=True)
class _Conversation:
    """What a request continues, and what is stored of it."""

    store: ResponseStore | None
    """None keeps nothing."""
    history: tuple[Message, ...]
    """The messages before the request's own, masked."""
    new: tuple[Message, ...]

    async def keep(self, builder: ResponseBuilder, context: RequestContext) -> None:
        """Store the response as it stands, masked whatever the filters let through."""
        if self.store is None:
            return
        tenant, service = context.caller.tenant, context.container.service
        document = builder.object()
        # The filter of calls' arguments masks within the strings of a JSON text.
        labels = msgspec.json.encode({name: document[name] for name in _LABELS}).decode()
        call = ToolCall("", "", labels)
        request = Message(Role.ASSISTANT, "", tool_calls=(call,))
        # The whole answer too: what no item shows by itself may be personal data where they are joined.
        masked = await service.storable(tenant, [*self.new, builder.message, request, *builder.messages])
        new, (answer, request, *items) = masked[: len(self.new)], masked[len(self.new) :]
        document |= msgspec.json.decode(request.tool_calls[0].arguments)
        stored = StoredResponse(
            id=builder.id,
            turns=tuple(as_turns([*self.history, *new, answer])),
            document=msgspec.json.encode(masked_object(document, items)),
            input_items=msgspec.json.encode(input_items(new, builder.new_id)),
        )
        await self.store.put(tenant, stored)


@router.post(
    "",
    response_model=ResponseObject,
    responses=error_responses(*GENERATION_ERRORS, error_format=ERROR_FORMAT) | streamed(*_EVENTS),
)
async def create_response(body: ResponseRequest, context: RequestContextDep) -> HttpResponse:
    """Respond to the input, and to the conversation that it continues; with `stream` as OpenAI's events."""
    bind_end_user(context.request, body.safety_identifier or body.user)
    body.check()
    conversation = await _conversation(body, context)
    request = _request(body, context, conversation)
    info = context.model_info(body.model, body.adapter)
    builder = ResponseBuilder(
        f"resp_{uuid4().hex}",
        described(body, model=info.model, stored=conversation.store is not None),
        with_logprobs=body.logprobs is not None,
    )
    events = _followed(context.events(request), builder, conversation, context)
    if body.stream:
        return EventStream(events, ResponseStreamEncoder(builder), headers=_cache, on_error=context.admitted.refuse)
    response = await collect_response(context.request, events)
    kind = EncodedJsonResponse if body.logprobs is None else SegmentedJsonResponse
    return kind(builder.object(lambda array: array), headers=_cache(response.finished))


async def _followed(
    events: AsyncGenerator[Event, None],
    builder: ResponseBuilder,
    conversation: _Conversation,
    context: RequestContext,
) -> AsyncGenerator[Event, None]:
    """Yield the events once the builder has taken them; the last one once the response is stored.

    Raises: ShuttingDown: the service aborted the generation.
    """
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                if not event.finish_reason.is_complete and event.finish_reason != "content_filter":
                    raise ShuttingDown()
                builder.feed(event)
                await conversation.keep(builder, context)
            else:
                builder.feed(event)
            yield event


def _cache(event: Started | Finished) -> dict[str, str]:
    return {"X-Cache": event.cache.value.upper()}


class _StoredItems:
    """The items of a tenant's stored responses; a response is decoded once for all that name it."""

    def __init__(self, store: ResponseStore | None, tenant: Tenant) -> None:
        self._store, self._tenant = store, tenant
        self._decoded: dict[str, dict[str, Any]] = {}

    async def find(self, item_id: str) -> Item | None:
        """Return an item by its id; None where none of that id is stored, or none that could be sent."""
        found = _ITEM_ID.fullmatch(item_id)
        if found is None:
            return None
        response_id = f"resp_{found[1]}"
        if response_id not in self._decoded:
            self._decoded[response_id] = await self._decode(response_id)
        item = self._decoded[response_id].get(item_id)
        try:
            return None if item is None else _ITEM.validate_python(item)
        except ValidationError:  # such as a call by a name that no function may have
            return None

    async def _decode(self, response_id: str) -> dict[str, Any]:
        stored = None if self._store is None else await self._store.read(self._tenant, response_id)
        if stored is None:
            return {}
        await asyncio.sleep(0)  # so that a request that names many responses holds up nobody
        items = msgspec.json.decode(stored.document)["output"] + msgspec.json.decode(stored.input_items)
        return {item["id"]: item for item in items}


async def _conversation(body: ResponseRequest, context: RequestContext) -> _Conversation:
    """Raises: InvalidRequest, PreviousResponseNotFound: the request names something that is not stored."""
    store, tenant = context.container.responses, context.caller.tenant

    items = _StoredItems(store, tenant)
    new = tuple(to_messages(await resolved(body.input, items.find, context.max_prompt_chars)))
    history: tuple[Message, ...] = ()
    if body.previous_response_id is not None:
        previous = await _read(store, context, body.previous_response_id)
        if previous is None:
            raise PreviousResponseNotFound()
        history = previous.messages
    keeps = body.store is not False and body.conversation is None
    if keeps and store is not None:
        store.check()  # rather than after the generation
    return _Conversation(store if keeps else None, history, new)


async def _read(store: ResponseStore | None, context: RequestContext, response_id: str) -> StoredResponse | None:
    if store is None or not _RESPONSE_ID.fullmatch(response_id):
        return None
    return await store.read(context.caller.tenant, response_id)


def _request(body: ResponseRequest, context: RequestContext, conversation: _Conversation) -> GenerationRequest:
    """Raises: InvalidRequest: the messages exceed the limit in total."""
    system = () if body.instructions is None else (Message(Role.SYSTEM, body.instructions),)
    messages = (*system, *conversation.history, *conversation.new)
    chars = len(body.instructions or "") + sum(len(message.all_text) for message in conversation.new)
    check_length("input", chars, context.max_prompt_chars)
    context.remember_grammar("text.format", beside_required_tools=True)
    return context.generation(
        **body.sampling(),
        messages=messages,
        **body.offered(),
        reasoning_effort=body.reasoning and body.reasoning.effort,
        truncate_prompt=0 if body.truncation == "auto" else None,
        session_id=body.session_id,
        use_recommended=True,
        model=body.model,
        adapter=body.adapter,
        cache=context.may_cache,
        cache_random=False,
        stream=bool(body.stream),
    )


_ERRORS = error_responses(
    *(InvalidRequest, Unauthorized, NotFound, SessionUnreadable, RateLimited, InternalError, StoreUnavailable),
    error_format=ERROR_FORMAT,
)
ResponsePath = Annotated[str, Path(max_length=128)]


@stored_router.get("/{response_id}", response_model=ResponseObject, responses=_ERRORS)
async def read_response(
    response_id: ResponsePath,
    caller: CallerDep,
    responses: ResponsesDep,
    stream: Annotated[Literal["false", "true"], Query()] = "false",
) -> HttpResponse:
    """Show a stored response."""
    if stream == "true":
        raise InvalidRequest.of_field("stream", "is not possible here: a stored response is complete")
    stored = await _found(response_id, caller, responses)
    return HttpResponse(stored.document, media_type="application/json")


@stored_router.get("/{response_id}/input_items", response_model=InputItemList, responses=_ERRORS)
async def list_input_items(
    response_id: ResponsePath,
    caller: CallerDep,
    responses: ResponsesDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=128)] = None,
) -> HttpResponse:
    """List what the client sent for a stored response, the last item first."""
    stored = await _found(response_id, caller, responses)
    items = msgspec.json.decode(stored.input_items)
    return EncodedJsonResponse(_page(items if order == "asc" else items[::-1], limit, after))


def _page(items: Sequence[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """Raises: InvalidRequest: `after` names none of the items."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise InvalidRequest.of_field("after", "names no item of this response")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": start + limit < len(items),
    }


@stored_router.delete("/{response_id}", response_model=DeletedResponse, responses=_ERRORS)
async def delete_response(response_id: ResponsePath, caller: CallerDep, responses: ResponsesDep) -> DeletedResponse:
    """Forget a stored response; those that continue it stay."""
    if not (_RESPONSE_ID.fullmatch(response_id) and await responses.delete(caller.tenant, response_id)):
        raise _not_found()
    return DeletedResponse(id=response_id, object="response", deleted=True)


async def _found(response_id: str, caller: CallerDep, responses: ResponseStore) -> StoredResponse:
    stored = await responses.read(caller.tenant, response_id) if _RESPONSE_ID.fullmatch(response_id) else None
    if stored is None:
        raise _not_found()
    return stored


def _not_found() -> NotFound:
    return NotFound("You have no stored response of this id; it may have expired.")
