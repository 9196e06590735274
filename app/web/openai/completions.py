"""POST /v1/completions.  Translation only."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from app.errors import InvalidRequest
from app.generation.batch import answer_as_one
from app.generation.requests import Completion, CompletionAsk, Reply
from app.web.http.dependencies import Call, CallDep, PartsDep, note_end_user
from app.web.http.errors import document
from app.web.http.json_body import LimitedRoute
from app.web.http.sampling_params import check_length
from app.web.native.batch import MAX_PROMPTS
from app.web.native.schemas import GENERATION_ERRORS
from app.web.openai.request_model import OpenAIFields, Served, is_deterministic
from app.web.openai.respond import head, respond
from app.web.openai.response_objects import Head, TextLogprobs, ending_fields, usage_object
from app.web.openai.stream_encoder import ChunkStream, TextChoices
from app.web.openai.validators import Only, Prompts

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own, for this route alone."""

router = APIRouter(prefix="/v1", tags=["openai"], route_class=LimitedRoute)


class CompletionRequest(OpenAIFields):
    """OpenAI's fields and vLLM's extras."""

    prompt: Annotated[Prompts, Field(max_length=MAX_PROMPTS)]
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="Must be n: nothing is chosen.")
    echo: bool | None = Field(None, description="Put the prompt in front of each answer.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[Any, Only()] = None

    def to_asks(self, call: Call, served: Served) -> list[CompletionAsk]:
        """Raises: InvalidRequest: the prompts are too long together, or fields contradict each other."""
        self.check_stream_options()
        if self.best_of not in (None, self.n or 1):
            raise InvalidRequest.of_field("best_of", "must be n: this service returns all answers that it makes")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest.of_field("echo", "is not possible with logprobs: a prompt's are not computed")
        texts = [prompt for prompt in self.prompt if isinstance(prompt, str)]
        check_length("prompt", sum(map(len, texts)), call.max_prompt_chars)
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        sampling = self.sampling(served, max_tokens=max_tokens, logprobs=self.logprobs)
        return [
            CompletionAsk(
                id=f"{call.ask_id}-{number}",
                caller=call.caller,
                origin=call.origin,
                prompt=prompt,
                sampling=sampling,
                model=self.model,
                cache=call.may_cache and served.caches and is_deterministic(sampling),
            )
            for number, prompt in enumerate(self.prompt)
        ]


def _whole(reply: Reply, head: Head, body: CompletionRequest) -> dict[str, Any]:
    echoed = [prompt or "" for prompt in reply.prompts for _ in range(body.n or 1)] if body.echo else None
    choices = [
        _choice(index, completion, echoed[index] if echoed else "", body.logprobs is not None)
        for index, completion in enumerate(reply.completions)
    ]
    return head.object("text_completion", choices, usage_object(reply.finished.usage))


def _choice(index: int, completion: Completion, echoed: str, scored: bool) -> dict[str, Any]:
    return {
        "index": index,
        "text": echoed + completion.text,
        "logprobs": TextLogprobs().told(completion.tokens) if scored else None,
        **ending_fields(completion.ending),
    }


@router.post("/completions", responses=document(*GENERATION_ERRORS, speaks_openai=True))
async def completions(body: CompletionRequest, request: Request, call: CallDep, parts: PartsDep) -> Response:
    """Go on with one or several prompts as OpenAI does, whole or, with `stream`, as chunks."""
    note_end_user(request, body.user)
    served = Served.of(parts, body.model)
    asks = body.to_asks(call, served)
    about = head("cmpl", served)
    choices = TextChoices(asks[0].sampling, echo=bool(body.echo))
    chunks = ChunkStream(about, choices, answers=asks[0].sampling.n, usage_told=body.usage_told)
    return await respond(
        request,
        answer_as_one(parts.service.complete, asks),
        stream=chunks if body.stream else None,
        make=lambda reply: _whole(reply, about, body),
        may_be_stored=asks[0].cache,
    )
