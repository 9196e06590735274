"""POST /v1/completions: completes one or several prompts."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.errors import InvalidRequest
from app.generation.batch import answer_as_one
from app.generation.requests import Completion, CompletionAsk, Reply
from app.web.http.dependencies import ContainerDep, RequestContext, RequestContextDep, bind_end_user
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import LimitedRoute
from app.web.http.sampling_params import MAX_PROMPTS, check_length
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.request_model import OpenAIFields, ResolvedModel, is_deterministic
from app.web.openai.respond import new_metadata, respond
from app.web.openai.response_objects import ObjectMetadata, TextLogprobs, ending_fields, usage_object
from app.web.openai.stream_encoder import ChunkStreamEncoder, TextChoiceEncoder
from app.web.openai.validators import NeutralOnly, Prompts

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this route."""

router = APIRouter(prefix="/v1", tags=["openai"], route_class=LimitedRoute)


class CompletionRequest(OpenAIFields):
    """OpenAI's fields and vLLM's extensions."""

    prompt: Annotated[Prompts, Field(max_length=MAX_PROMPTS)]
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Must equal n: all completions are returned.")
    echo: bool | None = Field(None, description="Prepend the prompt to each completion.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[Any, NeutralOnly()] = None

    def to_generation_requests(self, context: RequestContext, resolved: ResolvedModel) -> list[CompletionAsk]:
        """Raises: InvalidRequest: the prompts exceed the limit in total, or fields contradict each other."""
        self.check_stream_options()
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest.of_field("best_of", "must be n: this service returns all answers that it makes")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest.of_field("echo", "is not possible with logprobs: a prompt's are not computed")
        texts = [prompt for prompt in self.prompt if isinstance(prompt, str)]
        check_length("prompt", sum(map(len, texts)), context.max_prompt_chars)
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        sampling = self.sampling(resolved, max_tokens=max_tokens, logprobs=self.logprobs)
        return [
            CompletionAsk(
                id=f"{context.generation_id}-{number}",
                caller=context.caller,
                origin=context.origin,
                prompt=prompt,
                sampling=sampling,
                model=self.model,
                cache=context.may_cache and resolved.caches and is_deterministic(sampling),
            )
            for number, prompt in enumerate(self.prompt)
        ]


def _response(reply: Reply, metadata: ObjectMetadata, body: CompletionRequest) -> dict[str, Any]:
    echoed = [prompt or "" for prompt in reply.prompts for _ in range(body.n or 1)] if body.echo else None
    choices = [
        _choice(index, completion, echoed[index] if echoed else "", body.logprobs is not None)
        for index, completion in enumerate(reply.completions)
    ]
    return metadata.object("text_completion", choices, usage_object(reply.finished.usage))


def _choice(index: int, completion: Completion, echoed: str, with_logprobs: bool) -> dict[str, Any]:
    return {
        "index": index,
        "text": echoed + completion.text,
        "logprobs": TextLogprobs().next_object(completion.tokens) if with_logprobs else None,
        **ending_fields(completion.ending),
    }


@router.post("/completions", responses=error_responses(*GENERATION_ERRORS, error_format=ERROR_FORMAT))
async def completions(
    body: CompletionRequest, request: Request, context: RequestContextDep, container: ContainerDep
) -> Response:
    """Complete one or several prompts as OpenAI does: as one response, or with `stream` as chunks."""
    bind_end_user(request, body.user)
    resolved = ResolvedModel.of(container, body.model)
    generation_requests = body.to_generation_requests(context, resolved)
    metadata = new_metadata("cmpl", resolved)
    choices = TextChoiceEncoder(generation_requests[0].sampling, echo=bool(body.echo))
    chunks = ChunkStreamEncoder(metadata, choices, n=generation_requests[0].sampling.n, stream_usage=body.stream_usage)
    return await respond(
        request,
        answer_as_one(container.service.complete, generation_requests),
        stream=chunks if body.stream else None,
        build=lambda reply: _response(reply, metadata, body),
        cacheable=generation_requests[0].cache,
    )
