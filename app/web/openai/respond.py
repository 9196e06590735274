"""Sends a generation in OpenAI's dialect, as one response or a stream; X-Cache says whether it came from the cache."""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any
from uuid import uuid4

from starlette.responses import Response as HttpResponse

from app.errors import ShuttingDown
from app.events import CacheStatus, Event, Response
from app.web.http.dependencies import RequestContext
from app.web.http.json_encoding import (
    EncodedJsonResponse,
    LogprobsEncoder,
    SegmentedJsonResponse,
    encode_logprobs,
)
from app.web.http.sse import EventStream, collect_response
from app.web.openai.response_objects import ObjectMetadata, fingerprint
from app.web.openai.stream_encoder import ChunkStreamEncoder, was_aborted


def new_metadata(
    prefix: str, context: RequestContext, model: str | None, adapter: str | None, *, service_tier: str | None = None
) -> ObjectMetadata:
    """Return the metadata of a new response, with a fresh id.

    Raises: as `RequestContext.model_info`.
    """
    info = context.model_info(model, adapter)
    return ObjectMetadata(
        id=f"{prefix}-{uuid4().hex}",
        model=info.model,
        system_fingerprint=fingerprint(info),
        service_tier=service_tier,
    )


async def respond(
    context: RequestContext,
    events: AsyncGenerator[Event, None],
    *,
    stream: ChunkStreamEncoder | None,
    logprobs: Mapping[int, LogprobsEncoder] | None,
    build: Callable[[Response], dict[str, Any]],
) -> HttpResponse:
    """Return a stream, or one response if `stream` is None.

    Args:
        logprobs: encoders of the samples' log-probabilities in one response; None if none are requested.
        build: returns the response object of a finished generation, which has no log-probabilities any more.
    Raises: AppError: the generation was refused or failed before the response began; a stream raises it as it is sent.
    """
    if stream is not None:
        return EventStream(
            events, stream, headers=lambda started: _cache_header(started.cache), on_error=context.admitted.refuse
        )
    if logprobs is not None:
        events = encode_logprobs(events, logprobs)
    response = await collect_response(context.request, events)
    if was_aborted(response.finished):
        raise ShuttingDown()
    kind = EncodedJsonResponse if logprobs is None else SegmentedJsonResponse
    return kind(build(response), headers=_cache_header(response.finished.cache))


def _cache_header(status: CacheStatus) -> dict[str, str]:
    return {"X-Cache": status.value.upper()}
