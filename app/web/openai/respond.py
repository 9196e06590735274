"""How an answer leaves in OpenAI's dialect: whole or as a stream, with what the cache had to do with it."""

from collections.abc import AsyncGenerator, Callable
from typing import Any
from uuid import uuid4

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from app.errors import ShuttingDown
from app.generation.requests import Event, Reply
from app.web.http.sse import EventStream, begin, whole
from app.web.openai.request_model import Served
from app.web.openai.response_objects import Head, fingerprint
from app.web.openai.stream_encoder import ChunkStream, is_cut_short


def head(prefix: str, served: Served, *, service_tier: str | None = None) -> Head:
    """Make what all objects of one answer say, with a fresh id."""
    return Head(
        id=f"{prefix}-{uuid4().hex}",
        model=served.info.model,
        system_fingerprint=fingerprint(served.info),
        service_tier=service_tier,
    )


async def respond(
    request: Request,
    events: AsyncGenerator[Event, None],
    *,
    stream: ChunkStream | None,
    make: Callable[[Reply], dict[str, Any]],
    may_be_stored: bool,
) -> Response:
    """Send an answer as it is made, or whole where `stream` is None.

    Args:
        make: puts the whole object together.
        may_be_stored: whether the cache was asked at all.
    Raises: AppError: whatever ended it before it was answered.
    """
    if stream is not None:
        started = await begin(request, events)
        return EventStream(started, events, stream, headers=_cache_header(may_be_stored, hit=started.cached))
    reply = await whole(request, events)
    if is_cut_short(reply.finished):
        raise ShuttingDown()
    return JSONResponse(make(reply), headers=_cache_header(may_be_stored, hit=reply.finished.cached))


def _cache_header(asked: bool, *, hit: bool) -> dict[str, str]:
    return {"X-Cache": ("HIT" if hit else "MISS") if asked else "BYPASS"}
