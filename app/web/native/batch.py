"""POST /v1/generate/batch: completes many plain texts."""

from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.events import Event, Response
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, ErrorBody, as_app_error, envelope, error_responses
from app.web.http.json_body import GeneratingRoute
from app.web.http.sampling_params import MAX_PROMPTS, check_length
from app.web.http.several_prompts import generate_all
from app.web.native.generate import GenerateResponse, generate_response
from app.web.native.request_model import SamplingFields
from app.web.native.schemas import Logprobs, generate_encoded, json_response

router = APIRouter(prefix="/v1", tags=["generate"], route_class=GeneratingRoute)


def _refuse_stream(stream: bool | None) -> bool | None:
    if stream:
        raise ValueError("is not possible for a batch; send the prompts to /v1/generate one by one")
    return stream


class BatchRequest(SamplingFields):
    """Prompts, with the sampling parameters of all."""

    prompts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    stream: Annotated[bool | None, AfterValidator(_refuse_stream), WithJsonSchema({"enum": [None, False]})] = None

    @property
    def answers(self) -> int:
        return len(self.prompts) * super().answers


class FailedGeneration(TypedDict):
    """The error of one prompt, in place of its response."""

    error: ErrorBody


class BatchResponse(TypedDict):
    """The response or error of each prompt, in the order of the prompts."""

    results: list[GenerateResponse | FailedGeneration]
    request_id: str


@router.post("/generate/batch", response_model=BatchResponse, responses=error_responses(*GENERATION_ERRORS))
async def generate_batch(body: BatchRequest, context: RequestContextDep) -> HttpResponse:
    """Complete many texts at once; a text that fails has its error in place of its response."""
    check_length("prompts", sum(map(len, body.prompts)), context.max_prompt_chars)
    requests = [body.to_request(context, text=prompt) for prompt in body.prompts]
    encoded: dict[str, Logprobs] = {}

    def events(request: GenerationRequest) -> AsyncGenerator[Event, None]:
        events, encoded[request.id] = generate_encoded(context, request)
        return events

    outcomes = await generate_all(context, events, requests)
    results = [
        _result(outcome, request, context.request_id, encoded[request.id])
        for outcome, request in zip(outcomes, requests, strict=True)
    ]
    return json_response({"results": results, "request_id": context.request_id}, requests[0])


def _result(
    outcome: Response | Exception, request: GenerationRequest, request_id: str, logprobs: Logprobs
) -> Mapping[str, Any]:
    if isinstance(outcome, Response):
        return generate_response(outcome, request, request_id, logprobs)
    return {"error": envelope(as_app_error(outcome), request_id)}
