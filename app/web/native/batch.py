"""POST /v1/generate/batch: completes many plain texts."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from app.errors import ModelNotFound, ServiceUnavailable
from app.generation.batch import answer_each
from app.generation.requests import CompletionAsk, Reply
from app.web.http.dependencies import RequestContext, RequestContextDep, ServiceDep
from app.web.http.errors import GENERATION_ERRORS, ErrorBody, as_app_error, envelope, error_responses
from app.web.http.json_body import LimitedRoute
from app.web.http.sampling_params import MAX_PROMPTS, check_length
from app.web.http.sse import cancel_on_disconnect
from app.web.native.generate import GenerateResponse
from app.web.native.request_model import SamplingFields

router = APIRouter(prefix="/v1", tags=["generate"], route_class=LimitedRoute)


def _refuse_stream(stream: bool) -> bool:
    if stream:
        raise ValueError("is not possible for a batch; send the prompts to /v1/generate one by one")
    return stream


class BatchRequest(SamplingFields):
    """Prompts, with the sampling parameters of all."""

    prompts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    stream: Annotated[bool, AfterValidator(_refuse_stream)] = False

    def to_generation_requests(self, context: RequestContext) -> list[CompletionAsk]:
        """Raises: InvalidRequest: the prompts exceed the limit in total, or two synonyms have different values."""
        check_length("prompts", sum(map(len, self.prompts)), context.max_prompt_chars)
        sampling = self.sampling()
        return [
            CompletionAsk(
                id=f"{context.generation_id}-{number}",
                caller=context.caller,
                prompt=prompt,
                sampling=sampling,
                model=self.model,
                cache=self.cache and context.may_cache,
                origin=context.origin,
            )
            for number, prompt in enumerate(self.prompts)
        ]


class FailedGeneration(BaseModel):
    """The error of one prompt, in place of its response."""

    error: ErrorBody


class BatchResponse(BaseModel):
    """The response or error of each prompt, in the order of the prompts."""

    results: list[GenerateResponse | FailedGeneration]
    request_id: str


@router.post(
    "/generate/batch",
    response_model=BatchResponse,
    response_model_exclude_unset=True,
    responses=error_responses(*GENERATION_ERRORS),
)
async def generate_batch(
    body: BatchRequest, request: Request, context: RequestContextDep, service: ServiceDep
) -> BatchResponse:
    """Complete many texts at once; a text that fails has its error in place of its response."""
    generation_requests = body.to_generation_requests(context)
    outcomes = await cancel_on_disconnect(request, answer_each(service.complete, generation_requests))
    _raise_if_all_were_refused(outcomes)
    results = [
        _result(outcome, generation_request, context.request_id)
        for outcome, generation_request in zip(outcomes, generation_requests, strict=True)
    ]
    return BatchResponse(results=results, request_id=context.request_id)


def _raise_if_all_were_refused(outcomes: Sequence[Reply | Exception]) -> None:
    """Raise the error that refused every prompt, so that clients and load balancers see its status and retry."""
    first = outcomes[0]
    if isinstance(first, ServiceUnavailable | ModelNotFound) and all(type(first) is type(each) for each in outcomes):
        raise first


def _result(
    outcome: Reply | Exception, generation_request: CompletionAsk, request_id: str
) -> GenerateResponse | FailedGeneration:
    if isinstance(outcome, Reply):
        return GenerateResponse.of(outcome, generation_request.sampling, request_id)
    return FailedGeneration(error=ErrorBody(**envelope(as_app_error(outcome), request_id)))
