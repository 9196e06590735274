"""LLM Server: POST /v1/stream, the same body as /v1/generate and always a stream."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response as HttpResponse

from app.errors import AppError
from app.events import Delta, Event, Finished
from app.web.compat.completion_fields import ModelName, Prompt, Temperature, check_prompt, completion_request
from app.web.http.dependencies import RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, envelope, error_responses
from app.web.http.json_body import GeneratingRoute, StrictModel
from app.web.http.sampling_params import AdapterField, StopTexts, TokenCount, TopP
from app.web.http.sse import EventStream, frame, streamed

_END = b"data: [DONE]\n\n"

router = APIRouter(prefix="/v1", tags=["compat"], route_class=GeneratingRoute)


class StreamRequest(StrictModel):
    """A prompt and its sampling parameters."""

    prompt: Prompt
    max_new_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    stop: StopTexts = None
    model: ModelName | None = None
    adapter: AdapterField = None


class NamelessStreamEncoder:
    """Encodes events as frames without a name, which a browser's EventSource hands to `onmessage`."""

    def __init__(self, request_id: str) -> None:
        """Args: request_id: the id that the client sees."""
        self._request_id = request_id

    def encode(self, event: Event) -> bytes:
        match event:
            case Delta():
                return frame({"text": event.text})
            case Finished():
                return frame(_summary(event)) + _END
        return b""

    def encode_error(self, error: AppError) -> bytes:
        return frame({"error": envelope(error, self._request_id)}) + _END


def _summary(finished: Finished) -> dict[str, Any]:
    return {
        "model": finished.model,
        "cached": finished.cached,
        "finish_reason": finished.finish_reason,
        "tokens_generated": finished.usage.completion_tokens,
    }


@router.post("/stream", response_class=HttpResponse, responses=error_responses(*GENERATION_ERRORS) | streamed())
async def stream(body: StreamRequest, context: RequestContextDep) -> HttpResponse:
    """Complete a text as a stream of events without a name.

    Each has the next `text`, the last but one says how it ended, and the last is `[DONE]`.
    """
    check_prompt(context, "prompt", body.prompt)
    request = completion_request(
        context,
        body.prompt,
        {
            "max_tokens": body.max_new_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": tuple(body.stop) if body.stop else None,
        },
        model=body.model,
        adapter=body.adapter,
        stream=True,
    )
    encoder = NamelessStreamEncoder(context.request_id)
    return EventStream(context.events(request), encoder, on_error=context.admitted.refuse)
