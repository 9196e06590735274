"""POST /v1/generate/batch: go on with many plain texts.  Translation only."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from app.errors import ModelNotFound, ServiceUnavailable
from app.generation.batch import answer_each
from app.generation.requests import CompletionAsk, Reply
from app.web.http.dependencies import Call, CallDep, ServiceDep
from app.web.http.errors import ErrorBody, as_app_error, document, envelope
from app.web.http.json_body import LimitedRoute
from app.web.http.sampling_params import SamplingFields, check_length
from app.web.http.sse import answer_unless_gone
from app.web.native.generate import GenerateReply
from app.web.native.schemas import GENERATION_ERRORS

MAX_PROMPTS = 64

router = APIRouter(prefix="/v1", tags=["generate"], route_class=LimitedRoute)


def _refuse_stream(stream: bool) -> bool:
    if stream:
        raise ValueError("is not possible for a batch; send the prompts to /v1/generate one by one")
    return stream


class BatchRequest(SamplingFields):
    """Prompts, and how to go on with each of them."""

    prompts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)
    ]
    stream: Annotated[bool, AfterValidator(_refuse_stream)] = False

    def to_asks(self, call: Call) -> list[CompletionAsk]:
        """Raises: InvalidRequest: the prompts are too long together, or two names of one field differ."""
        check_length("prompts", sum(map(len, self.prompts)), call.max_prompt_chars)
        sampling = self.sampling()
        return [
            CompletionAsk(
                id=f"{call.ask_id}-{number}",
                caller=call.caller,
                prompt=prompt,
                sampling=sampling,
                model=self.model,
                cache=self.cache and call.may_cache,
                origin=call.origin,
            )
            for number, prompt in enumerate(self.prompts)
        ]


class ErrorReply(BaseModel):
    """What stands in the place of an answer that could not be made."""

    error: ErrorBody


class BatchReply(BaseModel):
    """For each prompt, in their order, its answer or its error."""

    results: list[GenerateReply | ErrorReply]
    request_id: str


@router.post(
    "/generate/batch",
    response_model=BatchReply,
    response_model_exclude_unset=True,
    responses=document(*GENERATION_ERRORS),
)
async def generate_batch(body: BatchRequest, request: Request, call: CallDep, service: ServiceDep) -> BatchReply:
    """Go on with many texts at once; a text that cannot be answered has its error in place of an answer."""
    asks = body.to_asks(call)
    outcomes = await answer_unless_gone(request, answer_each(service.complete, asks))
    _raise_if_none_could_be_taken(outcomes)
    results = [_result(outcome, ask, call.request_id) for outcome, ask in zip(outcomes, asks, strict=True)]
    return BatchReply(results=results, request_id=call.request_id)


def _raise_if_none_could_be_taken(outcomes: Sequence[Reply | Exception]) -> None:
    """A service that takes no prompt at all says so with its status, so that clients and balancers try again."""
    first = outcomes[0]
    if isinstance(first, ServiceUnavailable | ModelNotFound) and all(type(first) is type(each) for each in outcomes):
        raise first


def _result(outcome: Reply | Exception, ask: CompletionAsk, request_id: str) -> GenerateReply | ErrorReply:
    if isinstance(outcome, Reply):
        return GenerateReply.of(outcome, ask.sampling, request_id)
    return ErrorReply(error=ErrorBody(**envelope(as_app_error(outcome), request_id)))
