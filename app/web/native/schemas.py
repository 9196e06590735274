"""Response schemas and the stream encoder that the native generating routes share."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, NotRequired

from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.errors import AppError
from app.events import Completion, ContextUsage, Delta, DetokenizedLogprob, Event, Finished, Response
from app.requests import GenerationRequest
from app.types import FinishReason, Usage
from app.web.http.dependencies import RequestContext
from app.web.http.errors import envelope
from app.web.http.json_encoding import (
    EncodedJsonResponse,
    JsonArray,
    LogprobsEncoder,
    SegmentedJsonResponse,
    encode_logprobs,
    exact_float,
)
from app.web.http.sse import EventStream, collect_response, frame
from app.web.http.tool_calls import tool_call_deltas

EVENTS = ("delta", "done", "error")
"""Names of a stream's events."""


class PromptTokensDetails(TypedDict):
    """How the prompt's tokens were computed."""

    cached_tokens: int
    """Tokens taken from the KV cache."""


class CompletionTokensDetails(TypedDict):
    """How the completions' tokens were used."""

    reasoning_tokens: int


class TokenUsage(TypedDict):
    """Token counts by the model's own tokenizer; all completions of a request share one prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]
    """Left out where the model did not reason."""


class CandidateToken(TypedDict):
    """A candidate token and its log-probability."""

    text: str
    logprob: float


class GeneratedToken(CandidateToken):
    """A generated token, and the most likely candidates at its position."""

    top: list[CandidateToken]


class CompletionChoice(TypedDict):
    """One of a request's completions."""

    text: str
    finish_reason: FinishReason
    tokens: NotRequired[list[GeneratedToken]]
    """Left out unless the request asked for log-probabilities."""


class CompletionEnd(TypedDict):
    """How one completion of a stream ended."""

    index: int
    finish_reason: FinishReason
    tokens_generated: int


class ContextFields(TypedDict):
    """How the conversation was fitted into the context window."""

    limit: int
    prompt_tokens: int
    turns_kept: int
    turns_dropped: int
    estimated: NotRequired[bool]
    """True where `prompt_tokens` is an estimate, since the model's tokenizer is not known here."""


class DoneFrame(TypedDict):
    """The last frame of a stream."""

    finish_reason: FinishReason
    usage: TokenUsage
    tokens_generated: int
    cached: bool
    session_id: str | None
    request_id: str
    model: str
    context: NotRequired[ContextFields]
    """Of a chat."""
    completions: NotRequired[list[CompletionEnd]]
    """Left out unless there are several."""


def token_usage(usage: Usage) -> TokenUsage:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finished_usage(finished: Finished) -> TokenUsage:
    """Return the token counts of a finished chat."""
    usage = token_usage(finished.usage)
    if reasoning_tokens := sum(each.reasoning_tokens for each in finished.samples):
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return usage


def context_fields(context: ContextUsage) -> ContextFields:
    """Return how a conversation was fitted into the context window."""
    fields: ContextFields = {
        "limit": context.limit,
        "prompt_tokens": context.prompt_tokens,
        "turns_kept": context.turns_kept,
        "turns_dropped": context.turns_dropped,
    }
    return {**fields, "estimated": True} if context.is_estimate else fields


class TokensEncoder(LogprobsEncoder):
    """Encodes the tokens of one whole completion."""

    def __init__(self) -> None:
        self.tokens = JsonArray()

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        self.tokens.extend(_tokens(tokens))


Logprobs = Mapping[int, TokensEncoder] | None
"""The encoded tokens of each completion; None if the request asks for none."""


def generate_encoded(
    context: RequestContext, request: GenerationRequest
) -> tuple[AsyncGenerator[Event, None], Logprobs]:
    """Generate for one whole response: return the events without log-probabilities, and what collects those."""
    events = context.events(request)
    if request.sampling.logprobs is None:
        return events, None
    logprobs = defaultdict[int, TokensEncoder](TokensEncoder)
    return encode_logprobs(events, logprobs), logprobs


def json_response(content: Mapping[str, Any], request: GenerationRequest) -> HttpResponse:
    """Return one response; with log-probabilities it may be large, and is sent in segments."""
    return EncodedJsonResponse(content) if request.sampling.logprobs is None else SegmentedJsonResponse(content)


def completion_choices(response: Response, logprobs: Logprobs) -> list[CompletionChoice]:
    """Return all completions, in their order."""
    return [_choice(each, index, logprobs) for index, each in enumerate(response.completions)]


def _choice(completion: Completion, index: int, logprobs: Logprobs) -> CompletionChoice:
    choice: CompletionChoice = {"text": completion.text, "finish_reason": completion.finish_reason}
    if logprobs is not None:
        encoded: Any = logprobs[index].tokens
        choice["tokens"] = encoded
    return choice


def _tokens(tokens: Sequence[DetokenizedLogprob]) -> list[GeneratedToken]:
    return [
        {"text": each.text, "logprob": _logprob(each), "top": [_candidate(other) for other in each.top]}
        for each in tokens
    ]


def _candidate(token: DetokenizedLogprob) -> CandidateToken:
    return {"text": token.text, "logprob": _logprob(token)}


def _logprob(token: DetokenizedLogprob) -> Any:
    """Return a float with the digits that it has everywhere in this API."""
    return exact_float(token.logprob)


async def respond(
    context: RequestContext,
    request: GenerationRequest,
    build: Callable[[Response, GenerationRequest, str, Logprobs], Mapping[str, Any]],
) -> HttpResponse:
    """Generate, and return a stream, or one response that `build` returns the body of.

    Raises: AppError: the generation was refused or failed before the response began; a stream raises it as it is sent.
    """
    if request.stream:
        events = context.events(request)
        encoder = NativeStreamEncoder(request, context.request_id)
        return EventStream(events, encoder, on_error=context.admitted.refuse)
    events, logprobs = generate_encoded(context, request)
    response = await collect_response(context.request, events)
    return json_response(build(response, request, context.request_id, logprobs), request)


class NativeStreamEncoder:
    """Encodes events as `delta`, `done` and `error` frames; `Started` produces no frame."""

    def __init__(self, request: GenerationRequest, request_id: str) -> None:
        """Args: request_id: the id that the client sees."""
        self._with_tokens = request.sampling.logprobs is not None
        self._with_index = request.n > 1
        self._request_id = request_id

    def encode(self, event: Event) -> bytes:
        match event:
            case Delta():
                return frame(self._delta(event), "delta")
            case Finished():
                return frame(self._done(event), "done")
        return b""

    def encode_error(self, error: AppError) -> bytes:
        return frame(envelope(error, self._request_id), "error")

    def _delta(self, delta: Delta) -> dict[str, Any]:
        data: dict[str, Any] = {"content": delta.text}
        if delta.reasoning:
            data["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            data["tool_calls"] = tool_call_deltas(delta.tool_calls)
        if self._with_index:
            data["index"] = delta.index
        if self._with_tokens:
            data["tokens"] = _tokens(delta.logprobs)
        return data

    def _done(self, finished: Finished) -> DoneFrame:
        done: DoneFrame = {
            "finish_reason": finished.finish_reason,
            "usage": finished_usage(finished),
            "tokens_generated": finished.usage.completion_tokens,
            "cached": finished.cached,
            "session_id": finished.session_id,
            "request_id": self._request_id,
            "model": finished.model,
        }
        if finished.context:
            done["context"] = context_fields(finished.context)
        if len(finished.samples) > 1:
            done["completions"] = [
                {"index": index, "finish_reason": each.finish_reason, "tokens_generated": each.completion_tokens}
                for index, each in enumerate(finished.samples)
            ]
        return done
