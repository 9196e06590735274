"""POST /v1/completions: completes one or several prompts."""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response as HttpResponse

from app.events import Completion, Response
from app.generation.batch import generate_as_one
from app.requests import GenerationRequest
from app.web.http.dependencies import RequestContext, RequestContextDep, bind_end_user
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute
from app.web.http.sampling_params import check_length
from app.web.http.sse import streamed
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.prompt_logprobs import TextSampleLogprobs
from app.web.openai.request_model import OpenAIFields
from app.web.openai.respond import new_metadata, respond
from app.web.openai.response_objects import (
    ObjectMetadata,
    TextCompletion,
    finish_fields,
    usage_object,
)
from app.web.openai.stream_encoder import ChunkStreamEncoder, TextChoiceEncoder
from app.web.openai.validators import NeutralOnly, Prompts

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this route."""

router = APIRouter(prefix="/v1", tags=["openai"], route_class=GeneratingRoute)


class CompletionRequest(OpenAIFields):
    """OpenAI's fields and vLLM's extensions."""

    prompt: Prompts
    echo: bool | None = Field(None, description="Prepend the prompt to each completion.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[Any, NeutralOnly("")] = None
    add_special_tokens: Annotated[Any, NeutralOnly(True)] = None

    @property
    def answers(self) -> int:
        return len(self.prompt) * super().answers

    @property
    def echoed_logprobs(self) -> int | None:
        """Alternatives to each token of the prompt in `logprobs`; None where the prompt is not in it."""
        return self.logprobs if self.echo else None

    def to_requests(self, context: RequestContext) -> list[GenerationRequest]:
        """Raises: InvalidRequest: the prompts exceed the limit in total, or fields contradict each other."""
        self.check_stream_options()
        texts = [prompt for prompt in self.prompt if isinstance(prompt, str)]
        check_length("prompt", sum(map(len, texts)), context.max_prompt_chars)
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        self.check_prompt_options(max_tokens=max_tokens, echo=bool(self.echo))
        scored = [count for count in (self.prompt_logprobs, self.echoed_logprobs) if count is not None]
        return [
            self.to_request(
                context,
                max_tokens=max_tokens,
                logprobs=self.logprobs,
                prompt_logprobs=max(scored, default=None),
                echo=bool(self.echo),
                **({"text": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}),
            )
            for prompt in self.prompt
        ]


def _response(
    response: Response,
    metadata: ObjectMetadata,
    body: CompletionRequest,
    logprobs: Mapping[int, TextSampleLogprobs] | None,
) -> dict[str, Any]:
    echoed = [prompt or "" for prompt in response.prompts for _ in range(body.n or 1)] if body.echo else None
    choices = [
        _choice(index, completion, echoed[index] if echoed else "", body, logprobs)
        for index, completion in enumerate(response.completions)
    ]
    return metadata.object("text_completion", choices, usage_object(response.finished))


def _choice(
    index: int,
    completion: Completion,
    echoed: str,
    body: CompletionRequest,
    logprobs: Mapping[int, TextSampleLogprobs] | None,
) -> dict[str, Any]:
    choice = {
        "index": index,
        "text": echoed + completion.text,
        "logprobs": None if logprobs is None or body.logprobs is None else logprobs[index].text.object(),
        **finish_fields(completion.end),
    }
    if logprobs is not None and (prompt := logprobs[index].prompt) is not None:
        choice["prompt_logprobs"] = prompt.positions
    return choice


@router.post(
    "/completions",
    response_model=TextCompletion,
    responses=error_responses(*GENERATION_ERRORS, error_format=ERROR_FORMAT) | streamed(),
)
async def completions(body: CompletionRequest, context: RequestContextDep) -> HttpResponse:
    """Complete one or several prompts as OpenAI does: as one response, or with `stream` as chunks."""
    bind_end_user(context.request, body.safety_identifier or body.user)
    metadata = new_metadata("cmpl", context, body.model, body.adapter)
    requests = body.to_requests(context)
    choices = TextChoiceEncoder(logprobs=body.logprobs, echo=bool(body.echo))
    chunks = ChunkStreamEncoder(metadata, choices, n=body.n or 1, stream_usage=body.stream_usage)
    scored = body.logprobs is not None or body.prompt_logprobs is not None
    encoder = partial(TextSampleLogprobs, prompt_logprobs=body.prompt_logprobs, echo=body.echoed_logprobs)
    logprobs = defaultdict[int, TextSampleLogprobs](encoder) if scored else None
    return await respond(
        context,
        generate_as_one(context.events, requests),
        stream=chunks if body.stream else None,
        logprobs=logprobs,
        build=lambda response: _response(response, metadata, body, logprobs),
    )
