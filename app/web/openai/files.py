"""/v1/files: files of requests for batches, and what batches have written.

Another tenant's file gives the same 404 as one that does not exist, so ids cannot be probed.
"""

import re
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response as HttpResponse
from starlette.responses import StreamingResponse
from typing_extensions import TypedDict

from app.access.files import FileStore
from app.batches import NewFile, Page, StoredFile
from app.errors import (
    ClientDisconnected,
    InternalError,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    StoreUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from app.web.http.dependencies import BatchesDep, CallerDep, ContainerDep
from app.web.http.errors import error_responses
from app.web.http.json_body import AdmittedRoute, StrictRoute, received
from app.web.http.multipart import UploadForm
from app.web.openai.errors import ERROR_FORMAT

PURPOSE = "batch"
JSON_LINES = "application/jsonl"
MAX_LISTED = 10_000
"""OpenAI's own limit."""
MIN_LIFETIME, MAX_LIFETIME = 3600, 30 * 24 * 3600
"""Seconds, OpenAI's own limits of `expires_after`."""

upload_router = APIRouter(prefix="/v1/files", tags=["openai"], route_class=AdmittedRoute)
router = APIRouter(prefix="/v1/files", tags=["openai"], route_class=StrictRoute)

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = frozenset(["purpose", _ANCHOR, _SECONDS])
_UNSHOWABLE = re.compile(r"[^\w .()+,=@~-]")
_ERRORS = error_responses(
    InvalidRequest, Unauthorized, NotFound, RateLimited, InternalError, StoreUnavailable, error_format=ERROR_FORMAT
)
UPLOAD_ERRORS = _ERRORS | error_responses(PayloadTooLarge, UnsupportedMediaType, error_format=ERROR_FORMAT)
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "dependentRequired": {_ANCHOR: [_SECONDS], _SECONDS: [_ANCHOR]},
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "One request in each line."},
                        "purpose": {"type": "string", "const": PURPOSE},
                        _ANCHOR: {"type": "string", "const": "created_at"},
                        _SECONDS: {"type": "integer", "minimum": MIN_LIFETIME, "maximum": MAX_LIFETIME},
                    },
                }
            }
        },
    }
}
FileId = Annotated[str, Path(max_length=64)]


class FileObject(TypedDict):
    """OpenAI's file object."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FileList(TypedDict):
    """A page of the caller's files."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(TypedDict):
    """Says that a file is deleted."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


def _object(file: StoredFile) -> FileObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created.timestamp()),
        "expires_at": int(file.expires.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


async def _files(container: ContainerDep, batches: BatchesDep) -> FileStore:
    return container.access.files


FilesDep = Annotated[FileStore, Depends(_files)]


@upload_router.post("", response_model=FileObject, responses=UPLOAD_ERRORS, openapi_extra=_FORM)
async def upload_file(request: Request, caller: CallerDep, files: FilesDep, container: ContainerDep) -> FileObject:
    """Upload a file of requests, as multipart/form-data."""
    form = UploadForm(request.headers.get("content-type", ""), connected(received(request)), fields=_FIELDS)
    days = container.settings.batches.retention_days
    return _object(await files.write(caller.tenant, form.content(), lambda created: _described(form, days, created)))


async def connected(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a body as it arrives.

    Raises: ClientDisconnected: the client hung up while it sent it.
    """
    try:
        async for part in body:
            yield part
    except ClientDisconnect:
        raise ClientDisconnected("The client hung up while it sent its body.") from None


def _described(form: UploadForm, retention_days: int, created: datetime) -> NewFile:
    """Raises: InvalidRequest: a field is wrong."""
    fields = form.fields
    if fields.get("purpose") != PURPOSE:
        raise InvalidRequest.of_field("purpose", f"must be {PURPOSE}: this service stores files for batches only")
    seconds = retention_days * 24 * 3600
    if _ANCHOR in fields or _SECONDS in fields:
        seconds = min(seconds, _lifetime(fields.get(_ANCHOR), fields.get(_SECONDS, "")))
    return NewFile(filename=_shown(form.filename), purpose=PURPOSE, expires=created + timedelta(seconds=seconds))


def _lifetime(anchor: str | None, seconds: str) -> int:
    if anchor != "created_at":
        raise InvalidRequest.of_field(_ANCHOR, "must be created_at")
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) < 9):
        raise InvalidRequest.of_field(_SECONDS, "must be a number")
    if not MIN_LIFETIME <= int(seconds) <= MAX_LIFETIME:
        raise InvalidRequest.of_field(_SECONDS, f"must be {MIN_LIFETIME} to {MAX_LIFETIME}")
    return int(seconds)


def _shown(filename: str | None) -> str:
    """Return a file's name without folders and characters that mean something elsewhere."""
    name = (filename or "").replace("\\", "/").rpartition("/")[2]
    return _UNSHOWABLE.sub("_", name)[-128:] or "file"


@router.get("", response_model=FileList, responses=_ERRORS)
async def list_files(
    caller: CallerDep,
    files: FilesDep,
    purpose: Annotated[str | None, Query(max_length=32)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """List the caller's files, the newest first."""
    page = Page(limit, after, ascending=order == "asc")
    found, has_more = await files.list(caller.tenant, page, purpose=purpose)
    data = [_object(each) for each in found]
    first, last = (found[0].id, found[-1].id) if found else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


@router.get("/{file_id}", response_model=FileObject, responses=_ERRORS)
async def read_file(file_id: FileId, caller: CallerDep, files: FilesDep) -> FileObject:
    """Describe a file."""
    return _object(await files.read(caller.tenant, file_id))


_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The content.", "content": {JSON_LINES: {"schema": {"type": "string"}}}}
}


class JsonLines(StreamingResponse):
    """Lines of JSON, sent as they are read."""

    media_type = JSON_LINES


@router.get("/{file_id}/content", response_class=HttpResponse, responses=_ERRORS | _CONTENT)
async def file_content(file_id: FileId, caller: CallerDep, files: FilesDep) -> JsonLines:
    """Return the content of a file."""
    await files.read(caller.tenant, file_id)
    return JsonLines(files.content(caller.tenant, file_id))


@router.delete("/{file_id}", response_model=DeletedFile, responses=_ERRORS)
async def delete_file(file_id: FileId, caller: CallerDep, files: FilesDep) -> DeletedFile:
    """Delete a file; a batch whose requests have been read from it goes on."""
    await files.delete(caller.tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}
