"""CustomLLM Inference API: POST /predict and POST /predict/batch."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.events import Response
from app.requests import GenerationRequest
from app.web.compat.completion_fields import Prompt, Temperature, check_most, check_prompt, completion_request
from app.web.http.dependencies import RequestContext, RequestContextDep
from app.web.http.errors import GENERATION_ERRORS, ErrorBody, as_app_error, envelope, error_responses
from app.web.http.json_body import GeneratingRoute, StrictModel
from app.web.http.json_encoding import EncodedJsonResponse
from app.web.http.sampling_params import MAX_PROMPTS, StopTexts, TokenCount, TopP
from app.web.http.several_prompts import generate_all
from app.web.http.sse import collect_response

UNVERSIONED = "unversioned"
"""The version of a model without a revision, such as one in a folder."""

router = APIRouter(prefix="/predict", tags=["compat"], route_class=GeneratingRoute)


class PredictFields(StrictModel):
    """Sampling parameters; what is left out is as `compat` and `model` configure it."""

    max_length: TokenCount | None = Field(None, description="New tokens.")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stop_tokens: StopTexts = Field(None, description="Texts at which the completion ends.")

    def to_request(self, context: RequestContext, prompt: str) -> GenerationRequest:
        """Raises: InvalidRequest: `max_length` is above the limit of the route."""
        limits = context.container.settings.compat
        check_most("max_length", self.max_length, limits.predict_most_length, "predict_most_length")
        return completion_request(
            context,
            prompt,
            {
                "max_tokens": self.max_length,
                "temperature": self.temperature,
                "top_p": limits.predict_top_p if self.top_p is None else self.top_p,
                "stop": tuple(self.stop_tokens) if self.stop_tokens else None,
            },
            default_max_tokens=limits.predict_max_length,
            most_prompt_tokens=limits.predict_most_prompt_tokens,
            stream=False,
        )


class InferenceRequest(PredictFields):
    """A prompt and its sampling parameters."""

    prompt: Prompt


class BatchInferenceRequest(PredictFields):
    """Prompts, with the sampling parameters of all."""

    prompts: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]

    @property
    def answers(self) -> int:
        return len(self.prompts)


class InferenceResponse(TypedDict):
    """The completion of one prompt."""

    generated_text: str
    prompt: str
    tokens_generated: int
    processing_time: float
    """Seconds."""
    model_name: str
    model_version: str
    timestamp: str


class FailedInference(TypedDict):
    """The error of one prompt, in place of its response."""

    error: ErrorBody


class BatchInferenceResponse(TypedDict):
    """The response or error of each prompt, in the order of the prompts."""

    results: list[InferenceResponse | FailedInference]
    processing_time: float
    """Seconds."""


@router.post("", response_model=InferenceResponse, responses=error_responses(*GENERATION_ERRORS))
async def predict(body: InferenceRequest, context: RequestContextDep) -> HttpResponse:
    """Complete a text."""
    began = time.perf_counter()
    check_prompt(context, "prompt", body.prompt)
    version = _version(context)
    response = await collect_response(context.request, context.events(body.to_request(context, body.prompt)))
    return EncodedJsonResponse(_inference(response, version, time.perf_counter() - began))


@router.post("/batch", response_model=BatchInferenceResponse, responses=error_responses(*GENERATION_ERRORS))
async def predict_batch(body: BatchInferenceRequest, context: RequestContextDep) -> HttpResponse:
    """Complete many texts at once; a text that fails has its error in place of its response."""
    began = time.perf_counter()
    check_prompt(context, "prompts", *body.prompts)
    version = _version(context)
    requests = [body.to_request(context, prompt) for prompt in body.prompts]
    outcomes = await generate_all(context, context.events, requests)
    seconds = time.perf_counter() - began
    results = [
        _inference(outcome, version, seconds)
        if isinstance(outcome, Response)
        else {"error": envelope(as_app_error(outcome), context.request_id)}
        for outcome in outcomes
    ]
    return EncodedJsonResponse({"results": results, "processing_time": round(seconds, 6)})


def _version(context: RequestContext) -> str:
    """Raises: as `RequestContext.model_info`."""
    return context.model_info(None).revision or UNVERSIONED


def _inference(response: Response, version: str, seconds: float) -> Mapping[str, Any]:
    return {
        "generated_text": response.text,
        "prompt": response.prompt or "",
        "tokens_generated": response.finished.usage.completion_tokens,
        "processing_time": round(seconds, 6),
        "model_name": response.finished.model,
        "model_version": version,
        "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
