"""Answers the lines of batches by the routes that answer such requests live; the `LineRoutes` of the batch runner."""

from typing import Any
from uuid import uuid4

import msgspec

from app.batches import Batch, BatchUsage, ClaimedLine, LineResult
from app.errors import AppError, InvalidRequest, PayloadTooLarge
from app.generation.batch_ports import LineOutcome
from app.types import Principal
from app.web.http.in_process import InProcessResponse, post, refused
from app.web.http.json_encoding import encode_json
from app.web.http.openapi import DocumentedApp

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Routes that lines may name."""


class _Delivery(msgspec.Struct):
    """The part of a request that says how its response is sent."""

    stream: Any = None


class _Details(msgspec.Struct):
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class _Usage(msgspec.Struct):
    """Both sets of names that the routes have for the same counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None

    def counts(self) -> BatchUsage:
        read = self.prompt_tokens_details or self.input_tokens_details or _Details()
        written = self.completion_tokens_details or self.output_tokens_details or _Details()
        return BatchUsage(
            input_tokens=self.prompt_tokens + self.input_tokens,
            cached_tokens=read.cached_tokens,
            output_tokens=self.completion_tokens + self.output_tokens,
            reasoning_tokens=written.reasoning_tokens,
        )


class _Answer(msgspec.Struct):
    """The part of a response that a batch sums up."""

    model: str | None = None
    usage: _Usage | None = None


_answers = msgspec.json.Decoder(_Answer)
_delivery = msgspec.json.Decoder(_Delivery)


class BatchRoutes:
    """The routes of one application."""

    def __init__(self, app: DocumentedApp, *, max_body_bytes: int) -> None:
        """Args: max_body_bytes: of one request, as for a live one."""
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def answer(self, batch: Batch, line: ClaimedLine, principal: Principal) -> LineOutcome:
        """Answer a line; cancelling this ends the request.  Errors are outcomes, and never raised."""
        if (error := self._refusal(line.body)) is not None:
            return self.refused(batch, line, error)
        request_id = _new_id()
        response = await post(self._app, batch.endpoint, line.body, principal=principal, request_id=request_id)
        return _outcome(line, response, request_id)

    def refused(self, batch: Batch, line: ClaimedLine, error: AppError) -> LineOutcome:
        """Return the outcome of a line that was not sent to its route."""
        request_id = _new_id()
        return _outcome(line, refused(self._app, batch.endpoint, error, request_id=request_id), request_id)

    def expired(self, custom_id: str) -> LineResult:
        """Return the result of a line whose batch is over before it was answered."""
        message = "This request was not answered before the batch expired."
        error = {"code": "batch_expired", "message": message}
        return LineResult(content=_line(custom_id, _new_id(), None, error), failed=True)

    def _refusal(self, body: bytes) -> AppError | None:
        """Return what is wrong with a request that could be sent live, but not here."""
        if len(body) > self._max_body_bytes:
            limit = self._max_body_bytes
            return PayloadTooLarge(f"The body is longer than {limit} bytes.", details={"limit": limit})
        try:
            streams = _delivery.decode(body).stream
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None  # its route knows what to say of it
        return InvalidRequest.of_field("stream", "is not possible in a batch") if streams else None


def _new_id() -> str:
    return f"batch_req_{uuid4().hex}"


def _outcome(line: ClaimedLine, response: InProcessResponse, request_id: str) -> LineOutcome:
    body = {"status_code": response.status, "request_id": request_id, "body": msgspec.Raw(response.body)}
    content = _line(line.custom_id, request_id, body, None)
    if response.status != 200:
        return LineOutcome(LineResult(content=content, failed=True), response.error)
    answer = _answers.decode(response.body)
    result = LineResult(content=content, model=answer.model, usage=(answer.usage or _Usage()).counts())
    return LineOutcome(result, response.error)


def _line(custom_id: str, request_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bytes:
    fields = {"id": request_id, "custom_id": custom_id, "response": response, "error": error}
    return encode_json(fields) + b"\n"
