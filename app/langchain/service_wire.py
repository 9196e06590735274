"""Translates requests to OpenAI's wire and its streams and errors back, for a service that runs elsewhere."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from app.errors import (
    AppError,
    Conflict,
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    PiiBlocked,
    QuotaExceeded,
    RateLimited,
    ServiceUnavailable,
    Unauthorized,
    UnsupportedMediaType,
)
from app.events import CacheStatus, Delta, DetokenizedLogprob, Event, Finished, FinishedSample, ToolCallDelta
from app.requests import RESOLVABLE, GenerationRequest
from app.types import FinishReason, Grammar, Message, Role, SamplingParams, Tool, ToolChoice, Usage

_NEUTRAL = SamplingParams()
_BY_CODE: Mapping[str, type[AppError]] = {
    "model_not_found": ModelNotFound,
    "insufficient_quota": QuotaExceeded,
    "pii_blocked": PiiBlocked,
}
_BY_STATUS: Mapping[int, type[AppError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: PayloadTooLarge,
    415: UnsupportedMediaType,
    429: RateLimited,
    503: ServiceUnavailable,
    504: DeadlineExceeded,
}


def request_body(request: GenerationRequest, model: str) -> dict[str, Any]:
    """Return the body of a streamed request; what the caller left open stays open, for the service to decide."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if request.is_chat:
        body["messages"] = list(map(_message, request.messages))
        if request.tools:
            body["tools"] = list(map(_tool, request.tools))
            body["tool_choice"] = _choice(request.tool_choice)
            body["parallel_tool_calls"] = request.parallel_tool_calls
        if request.template_kwargs:
            body["chat_template_kwargs"] = dict(request.template_kwargs)
    else:
        body["prompt"] = request.text or ""
    return body | _sampling(request)


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    params = request.sampling
    fields = {name: getattr(params, name) for name in sorted(RESOLVABLE - request.unset)}
    for name in ("seed", "presence_penalty", "frequency_penalty", "ignore_eos"):
        if (value := getattr(params, name)) != getattr(_NEUTRAL, name):
            fields[name] = value
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.stop_token_ids:
        fields["stop_token_ids"] = list(params.stop_token_ids)
    if params.logit_bias:
        fields["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    if params.logprobs is not None:
        fields |= (
            {"logprobs": True, "top_logprobs": params.logprobs} if request.is_chat else {"logprobs": params.logprobs}
        )
    return fields | (_grammar(params.grammar) if params.grammar is not None else {})


def _grammar(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json_schema":
        return {"structured_outputs": {"json": json.loads(grammar.text)}}
    return {"structured_outputs": {"regex" if grammar.kind == "regex" else "grammar": grammar.text}}


def _message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.role is Role.TOOL and message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["content"] = message.content or None
        fields["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return fields


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": json.loads(tool.parameters)}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> Any:
    return choice.mode if choice.name is None else {"type": "function", "function": {"name": choice.name}}


class StreamReader:
    """Turns the chunks of one stream into events."""

    def __init__(self, *, cached: bool) -> None:
        """Args: cached: whether the service said that the response comes from its cache."""
        self._cache = CacheStatus.HIT if cached else CacheStatus.BYPASS
        self._reason: FinishReason | None = None
        self._stop_reason: str | int | None = None
        self._usage: Mapping[str, Any] = {}

    def read(self, chunk: Mapping[str, Any]) -> Iterator[Delta]:
        """Yield what a chunk says.

        Raises: AppError: it is an error, in place of the rest of the stream.
        """
        if (error := chunk.get("error")) is not None:
            raise error_from(_status_in_stream(error), {"error": error}, {})
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices", ()):
            if (reason := choice.get("finish_reason")) is not None:
                self._reason = FinishReason(reason)
                self._stop_reason = choice.get("stop_reason")
            delta = _delta(choice)
            if delta.is_visible:
                yield delta

    def finish(self) -> Finished:
        """Return the last event.

        Raises: ServiceUnavailable: the stream ended before the response did.
        """
        if self._reason is None:
            raise ServiceUnavailable("The service's stream ended before its answer did; try again.")
        details = self._usage.get("completion_tokens_details") or {}
        usage = Usage(
            self._usage.get("prompt_tokens", 0),
            self._usage.get("completion_tokens", 0),
            (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        )
        sample = FinishedSample(
            finish_reason=self._reason,
            completion_tokens=usage.completion_tokens,
            stop_reason=self._stop_reason,
            reasoning_tokens=details.get("reasoning_tokens") or 0,
        )
        return Finished(samples=(sample,), usage=usage, cache=self._cache)


def _status_in_stream(error: Mapping[str, Any]) -> int:
    """Return the status that an error would have had before the stream began."""
    by_code = {"service_unavailable": 503, "deadline_exceeded": 504, "internal_server_error": 500}
    return by_code.get(str(error.get("code")), 400)


def _delta(choice: Mapping[str, Any]) -> Delta:
    delta = choice.get("delta") or {"content": choice.get("text")}
    return Delta(
        text=delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        tool_calls=tuple(map(_call_delta, delta.get("tool_calls") or ())),
        logprobs=tuple(_logprobs(choice.get("logprobs") or {})),
    )


def _call_delta(part: Mapping[str, Any]) -> ToolCallDelta:
    function = part.get("function") or {}
    return ToolCallDelta(
        position=part["index"],
        id=part.get("id"),
        name=function.get("name"),
        arguments=function.get("arguments") or "",
    )


def _logprobs(logprobs: Mapping[str, Any]) -> Iterator[DetokenizedLogprob]:
    """Yield the tokens of either route's object: a chat's has `content`, a completion's parallel lists."""
    for token in logprobs.get("content") or ():
        yield _chat_logprob(token, tuple(_chat_logprob(top) for top in token.get("top_logprobs") or ()))
    tops = logprobs.get("top_logprobs") or ()
    for number, text in enumerate(logprobs.get("tokens") or ()):
        top = (tops[number] if number < len(tops) else None) or {}
        yield _text_logprob(
            text, logprobs["token_logprobs"][number], tuple(_text_logprob(*each) for each in top.items())
        )


def _chat_logprob(token: Mapping[str, Any], top: tuple[DetokenizedLogprob, ...] = ()) -> DetokenizedLogprob:
    raw = bytes(token.get("bytes") or token["token"].encode())
    return DetokenizedLogprob(text=token["token"], raw=raw, logprob=token["logprob"], top=top)


def _text_logprob(text: str, logprob: float, top: tuple[DetokenizedLogprob, ...] = ()) -> DetokenizedLogprob:
    return DetokenizedLogprob(text=text, raw=text.encode(), logprob=logprob, top=top)


def error_from(status: int, body: Any, headers: Mapping[str, str]) -> AppError:
    """Return the exception that stands for an error of the service, with the service's own message."""
    error = body.get("error") if isinstance(body, Mapping) else None
    if not isinstance(error, Mapping):
        return ServiceUnavailable(f"What answers there is not this service, or not in its way: status {status}.")
    message, field = str(error.get("message")), error.get("param")
    kind = _BY_CODE.get(str(error.get("code"))) or _BY_STATUS.get(status) or InternalError
    details: dict[str, Any] = {"code": error.get("code")}
    if field is not None:
        details["errors"] = [{"field": field, "reason": message}]
    wait = headers.get("retry-after", "")
    return kind(message, details=details, retry_after=float(wait) if wait.isdigit() else None)


def sse_data(line: bytes) -> Event | Any:
    """Return the JSON value of a line of a stream; None for what is no data, and for the end mark."""
    if not line.startswith(b"data:"):
        return None
    data = line.removeprefix(b"data:").strip()
    return None if data == b"[DONE]" else json.loads(data)
