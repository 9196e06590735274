"""Sends a generation in OpenAI's dialect, as one response or a stream; X-Cache says whether it came from the cache."""

from collections.abc import AsyncGenerator, Callable
from typing import Any
from uuid import uuid4

from fastapi import Request
from starlette.responses import Response

from app.errors import ShuttingDown
from app.generation.requests import Event, Reply
from app.web.http.json_encoding import EncodedJsonResponse
from app.web.http.sse import EventStream, collect_response, wait_for_start
from app.web.openai.request_model import ResolvedModel
from app.web.openai.response_objects import ObjectMetadata, fingerprint
from app.web.openai.stream_encoder import ChunkStreamEncoder, was_aborted


def new_metadata(prefix: str, resolved: ResolvedModel, *, service_tier: str | None = None) -> ObjectMetadata:
    """Return the metadata of a new response, with a fresh id."""
    return ObjectMetadata(
        id=f"{prefix}-{uuid4().hex}",
        model=resolved.info.model,
        system_fingerprint=fingerprint(resolved.info),
        service_tier=service_tier,
    )


async def respond(
    request: Request,
    events: AsyncGenerator[Event, None],
    *,
    stream: ChunkStreamEncoder | None,
    build: Callable[[Reply], dict[str, Any]],
    cacheable: bool,
) -> Response:
    """Return a stream, or one response if `stream` is None.

    Args:
        build: returns the response object of a finished generation.
        cacheable: whether the cache was looked up.
    Raises: AppError: the generation was refused or failed before the response began.
    """
    if stream is not None:
        started = await wait_for_start(request, events)
        return EventStream(started, events, stream, headers=_cache_header(cacheable, hit=started.cached))
    reply = await collect_response(request, events)
    if was_aborted(reply.finished):
        raise ShuttingDown()
    return EncodedJsonResponse(build(reply), headers=_cache_header(cacheable, hit=reply.finished.cached))


def _cache_header(cacheable: bool, *, hit: bool) -> dict[str, str]:
    return {"X-Cache": ("HIT" if hit else "MISS") if cacheable else "BYPASS"}
