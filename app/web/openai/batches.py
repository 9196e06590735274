"""/v1/batches: many requests in a file, answered when nobody else needs the model.

Another tenant's batch gives the same 404 as one that does not exist, so ids cannot be probed.
"""

from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field, StringConstraints, WithJsonSchema
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.access.batches import BatchStore
from app.batches import Batch, BatchStatus, BatchUsage, NewBatch, NewFile, Page, dumped
from app.errors import Conflict, FileNotFound, InvalidRequest, PayloadTooLarge, RateLimited
from app.generation.batch_input import endpoint_of
from app.types import Principal
from app.web.http.dependencies import BatchesDep, CallerDep, Container, ContainerDep
from app.web.http.errors import error_responses
from app.web.http.json_body import AdmittedRoute, StrictModel, StrictRoute, parse, received, require_json
from app.web.http.validation import validated
from app.web.openai.batch_routes import ENDPOINTS
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.files import (
    JSON_LINES,
    MAX_LIFETIME,
    MIN_LIFETIME,
    PURPOSE,
    UPLOAD_ERRORS,
    JsonLines,
    connected,
)
from app.web.openai.validators import Metadata

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
WINDOW = timedelta(hours=24)
MAX_LISTED = 100

creating_router = APIRouter(prefix="/v1/batches", tags=["openai"], route_class=AdmittedRoute)
router = APIRouter(prefix="/v1/batches", tags=["openai"], route_class=StrictRoute)

BatchId = Annotated[str, Path(max_length=64)]


class OutputExpiresAfter(StrictModel):
    """When the output and error files expire."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_LIFETIME, le=MAX_LIFETIME)]
    """From their creation, which is the end of the batch."""


# Written out: a reference inside of the schema of a body leads nowhere in the document of all routes.
_EXPIRES_SCHEMA = {"anyOf": [OutputExpiresAfter.model_json_schema(), {"type": "null"}], "default": None}


class BatchRequest(StrictModel):
    """OpenAI's fields."""

    input_file_id: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata = None
    output_expires_after: Annotated[OutputExpiresAfter | None, WithJsonSchema(_EXPIRES_SCHEMA)] = None


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": BatchRequest.model_json_schema()},
            JSON_LINES: {"schema": {"type": "string", "description": "The file itself; its lines name the endpoint."}},
        },
    }
}
_ERRORS = UPLOAD_ERRORS | error_responses(Conflict, error_format=ERROR_FORMAT)


class BatchErrorObject(TypedDict):
    """Why the batch, or a line of its file, cannot be answered."""

    code: str
    message: str
    line: int | None
    param: None


class BatchErrorList(TypedDict):
    """Why the batch failed."""

    object: Literal["list"]
    data: list[BatchErrorObject]


class RequestCounts(TypedDict):
    """How many requests are done."""

    total: int
    completed: int
    failed: int


class CachedTokens(TypedDict):
    """Of the input."""

    cached_tokens: int


class ReasoningTokens(TypedDict):
    """Of the output."""

    reasoning_tokens: int


class UsageObject(TypedDict):
    """Tokens of all responses up to now."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class BatchObject(TypedDict):
    """OpenAI's batch object."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrorList | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    model: str | None
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: UsageObject
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    """A page of the caller's batches."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


def _seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def _object(batch: Batch) -> BatchObject:
    ended = {status: _seconds(batch.ended) if batch.status is status else None for status in BatchStatus}
    errors: Any = dumped(batch.errors)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "model": batch.model,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created.timestamp()),
        "in_progress_at": _seconds(batch.started),
        "expires_at": int(batch.expires.timestamp()),
        "finalizing_at": _seconds(batch.finalizing),
        "completed_at": ended[BatchStatus.COMPLETED],
        "failed_at": ended[BatchStatus.FAILED],
        "expired_at": ended[BatchStatus.EXPIRED],
        "cancelling_at": _seconds(batch.cancelling),
        "cancelled_at": ended[BatchStatus.CANCELLED],
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": _usage(batch.usage),
        "metadata": batch.metadata,
    }


def _usage(usage: BatchUsage) -> UsageObject:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


async def _store(container: ContainerDep, batches: BatchesDep) -> BatchStore:
    return container.access.batches


StoreDep = Annotated[BatchStore, Depends(_store)]


@creating_router.post("", response_model=BatchObject, responses=_ERRORS, openapi_extra=_BODY)
async def create_batch(
    request: Request, caller: CallerDep, store: StoreDep, batches: BatchesDep, container: ContainerDep
) -> BatchObject:
    """Create a batch of an uploaded file, or of the JSON Lines in the body."""
    most = container.settings.batches.max_unfinished
    await store.check_place(caller.tenant, most)  # rather than after a file has been received
    body = connected(received(request))
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if brings_file := content_type in (JSON_LINES, "application/x-ndjson", "application/x-jsonlines"):
        given = await _from_lines(body, caller, container)
    else:
        require_json(request)
        given = validated(BatchRequest, parse(await _whole(body, container)), ignored=None)
        await _require_input(given.input_file_id, caller, container)
    new = NewBatch(
        tenant=caller.tenant,
        key_id=caller.key_id,
        endpoint=given.endpoint,
        input_file_id=given.input_file_id,
        completion_window=given.completion_window,
        metadata=given.metadata,
        window=WINDOW,
        output_lifetime=given.output_expires_after.seconds if given.output_expires_after else None,
    )
    try:
        batch = await store.create(new, most=most)
    except RateLimited:
        # Another one of the caller's was created meanwhile.
        if brings_file:
            await container.access.files.delete(caller.tenant, given.input_file_id)
        raise
    batches.wake()
    return _object(batch)


async def _whole(body: AsyncIterator[bytes], container: Container) -> bytes:
    """Read a body of JSON.

    Raises: PayloadTooLarge: only files may be longer than other bodies.
    """
    limit = container.settings.security.max_body_bytes
    read = bytearray()
    async for part in body:
        read += part
        if len(read) > limit:
            raise PayloadTooLarge(f"The body is longer than {limit} bytes.", details={"limit": limit})
    return bytes(read)


async def _require_input(file_id: str, caller: Principal, container: Container) -> None:
    """Raises: InvalidRequest: this is no file for a batch."""
    try:
        file = await container.access.files.read(caller.tenant, file_id)
    except FileNotFound:
        raise InvalidRequest.of_field("input_file_id", "names no file of yours; it may have expired") from None
    if file.purpose != PURPOSE:
        raise InvalidRequest.of_field("input_file_id", f"must name a file of the purpose {PURPOSE}")


async def _from_lines(body: AsyncIterator[bytes], caller: Principal, container: Container) -> BatchRequest:
    """Store a body as a file, and return the request for a batch of it.

    Raises: InvalidRequest: its first line names no endpoint.
    """
    first = bytearray()
    async for part in body:
        first += part
        if b"\n" in part or len(first) > container.settings.security.max_body_bytes:
            break
    endpoint: Any = endpoint_of(bytes(first).partition(b"\n")[0])
    if endpoint not in ENDPOINTS:
        raise InvalidRequest(f"The url of the first line must be one of {', '.join(ENDPOINTS)}.")

    async def content() -> AsyncIterator[bytes]:
        yield bytes(first)
        async for part in body:
            yield part

    def described(created: datetime) -> NewFile:
        expires = created + timedelta(days=container.settings.batches.retention_days)
        return NewFile(filename="batch.jsonl", purpose=PURPOSE, expires=expires)

    file = await container.access.files.write(caller.tenant, content(), described)
    return BatchRequest(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


@router.get("", response_model=BatchList, responses=_ERRORS)
async def list_batches(
    caller: CallerDep,
    store: StoreDep,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> BatchList:
    """List the caller's batches, the newest first."""
    found, has_more = await store.list(caller.tenant, Page(limit, after))
    data = [_object(each) for each in found]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


@router.get("/{batch_id}", response_model=BatchObject, responses=_ERRORS)
async def read_batch(batch_id: BatchId, caller: CallerDep, store: StoreDep) -> BatchObject:
    """Describe a batch: how far it has come, and where its results are."""
    return _object(await store.read(caller.tenant, batch_id))


@router.post("/{batch_id}/cancel", response_model=BatchObject, responses=_ERRORS)
async def cancel_batch(batch_id: BatchId, caller: CallerDep, store: StoreDep, batches: BatchesDep) -> BatchObject:
    """Cancel a batch; the responses that there are stay."""
    batch = await store.cancel(caller.tenant, batch_id)
    batches.wake()
    return _object(batch)


_RESULTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "A line for each result.", "content": {JSON_LINES: {"schema": {"type": "string"}}}}
}


@router.get("/{batch_id}/results", response_class=HttpResponse, responses=_ERRORS | _RESULTS)
async def batch_results(batch_id: BatchId, caller: CallerDep, store: StoreDep, container: ContainerDep) -> JsonLines:
    """Return all results that there are, in the order of the requests, whether the batch has ended or not."""
    await store.read(caller.tenant, batch_id)
    return JsonLines(container.access.files.results(batch_id))
