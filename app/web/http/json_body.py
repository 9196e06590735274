"""Decodes JSON bodies strictly, before any schema sees them, and orders the steps in which a route judges a request.

A body has one meaning or is refused, so that what is validated here is what is logged, cached and encoded later.
Messages never echo what was refused.
"""

import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from email.message import Message
from typing import Any, ClassVar, NoReturn, get_type_hints

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.access.admission import AdmissionControl, Admitted
from app.config import Settings
from app.errors import AppError, ClientDisconnected, InvalidRequest, UnsupportedMediaType
from app.web.http.dependencies import ADMITTED, RequestContext
from app.web.http.header_parameters import parameter
from app.web.http.private_api import ParsedRequest, takes_body
from app.web.http.rate_limits import LIMIT_STATES, show_limits
from app.web.http.validation import name_ignored, validated

MAX_DEPTH = 32
MAX_NUMBER_CHARS = 32
"""Far more digits than any field takes; Python's own bound on reading integers is 4,300."""

_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()
_integer_bound = msgspec.msgpack.Encoder()
"""Raises OverflowError for an integer of more than 64 bits; whether that is too long the exact decoder judges."""


class StrictModel(BaseModel):
    """Base of request schemas: no conversions between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)
    may_ignore_fields: ClassVar[bool] = False
    """Whether `openai.unknown_fields` decides about the fields that the service does not have or cannot honour."""

    @property
    def answers(self) -> int:
        """How many completions the request is to have."""
        return 1


class StrictRoute(APIRoute):
    """A route that reads its body as strict JSON, then validates; its responses say what is left of the rate limits."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        decode = takes_body(self)

        async def handle(request: Request) -> Response:
            show_limits(request.scope, request.app.state.container.admission)
            return await handler(await _decoded(request) if decode else request)

        return handle


class AdmittedRoute(APIRoute):
    """A route that admits its caller before it reads the body, as one request against the caller's rate limits.

    That costs a refused caller no work of ours, and lets even the response to a malformed body carry the rate headers.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # 405, which costs nothing
            return
        container = scope["app"].state.container
        control: AdmissionControl = container.admission
        show_limits(scope, control)
        most_bytes: int = container.settings.security.max_body_bytes
        async with control.admit(scope["state"]["principal"], _most_body_bytes(scope, most_bytes)) as request:
            scope["state"] |= {LIMIT_STATES: request.limits, ADMITTED: request}
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except AppError as error:
                admitted: Admitted = request.scope["state"][ADMITTED]
                admitted.refuse(error)
                raise

        return handle


class GeneratingRoute(AdmittedRoute):
    """A route that admits its caller, decodes and validates the body, and then calls `endpoint(body, context)`.

    FastAPI documents the route from the endpoint's signature; its dependencies are not solved for each request, which
    would cost as much as everything else at the edge together.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[..., Coroutine[Any, Any, Response]] = self.endpoint
        schema: type[StrictModel] = get_type_hints(endpoint)["body"]

        async def handle(request: Request) -> Response:
            require_json(request)
            admitted: Admitted = request.scope["state"][ADMITTED]
            try:
                body = _validated(schema, parse(await _read(request)), request)
                admitted.expect(body.answers)
                context = RequestContext(request, request.app.state.container)
                await context.ensure_model(getattr(body, "model", None), getattr(body, "adapter", None))
                return await endpoint(body, context)
            except ClientDisconnect:
                raise ClientDisconnected("The client hung up while it sent its body.") from None
            except AppError as error:
                admitted.refuse(error)
                raise

        return handle


def _most_body_bytes(scope: Scope, most: int) -> int:
    """Return how many bytes of a body may be read: as many as it announces, or the most where it does not."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    known = len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < MAX_NUMBER_CHARS
    return min(int(lengths[0]), most) if known else most


def _validated(schema: type[StrictModel], value: Any, request: Request) -> StrictModel:
    """Raises: RequestValidationError."""
    settings: Settings = request.app.state.container.settings
    may_ignore = schema.may_ignore_fields and settings.openai.unknown_fields == "ignore"
    ignored: list[str] = []
    try:
        return validated(schema, value, ignored=ignored if may_ignore else None)
    finally:
        name_ignored(request.scope, ignored)


async def _read(request: Request) -> bytes:
    """Read the body.

    Raises: ClientDisconnect: the client hung up while it sent it.
    """
    parts, more = [], True
    while more:
        part, more = await _next_part(request)
        parts.append(part)
    return b"".join(parts)


async def received(request: Request) -> AsyncIterator[bytes]:
    """Yield the body as it arrives.

    Raises: ClientDisconnect: the client hung up while it sent it.
    """
    more = True
    while more:
        part, more = await _next_part(request)
        yield part


async def _next_part(request: Request) -> tuple[bytes, bool]:
    """Return the next bytes of the body, and whether more follow.  Raises: ClientDisconnect."""
    message = await request.receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def _decoded(request: Request) -> ParsedRequest:
    require_json(request)
    decoded = ParsedRequest(request.scope, request.receive)
    try:
        decoded.parsed = parse(await decoded.body())
    except ClientDisconnect:
        raise ClientDisconnected("The client hung up while it sent its body.") from None
    return decoded


def require_json(request: Request) -> None:
    """Raises: UnsupportedMediaType: the body is not said to be JSON in UTF-8."""
    types = request.headers.getlist("content-type")
    if types != ["application/json"]:
        message = Message()
        message["content-type"] = types[0] if len(types) == 1 else ""
        try:
            charset = parameter(message, "charset") or "utf-8"
        except ValueError:
            charset = "unknown"
        if message.get_content_type() != "application/json" or charset.lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("Send the body as application/json, in UTF-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Send the body uncompressed.")


def parse(body: bytes) -> Any:
    """Decode one JSON value.

    msgspec decodes what is plainly valid.  Whatever it refuses, and whatever it might have decoded differently than
    the rules below, the standard library's slower decoder judges.

    Raises: InvalidRequest: the body is empty, not UTF-8, malformed, ambiguous (a key twice), nested deeper than
        `MAX_DEPTH`, or has a number or character that cannot be encoded again (NaN, infinities, lone surrogates).
    """
    try:
        value = _decoder.decode(body)
        if _has_every_key(value, body) and _is_shallow(value, body):
            _integer_bound.encode(value)
            return value
    except (msgspec.MsgspecError, UnicodeError, OverflowError, RecursionError):
        pass
    return _parse_exactly(body)


def _has_every_key(value: Any, body: bytes) -> bool:
    """Return True only if no object of the body names a key twice.

    Of equal keys msgspec takes the last.  An entry that got lost takes its colon with it, so the value encoded again
    has fewer colons than the body; unless colons are escaped, both counts are exact.
    """
    if b"\\" in body and b"\\u003" in body and (b"\\u003a" in body or b"\\u003A" in body):
        return False
    return body.count(b":") == _encoder.encode(value).count(b":")


def _is_shallow(value: Any, body: bytes) -> bool:
    """Return whether the value is nested no deeper than `MAX_DEPTH`."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return True
    level = [value] if type(value) in (dict, list) else []
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
        if not level:
            return True
    return False


def _parse_exactly(body: bytes) -> Any:
    if not body.strip():
        _refuse("The body is empty; send a JSON object.")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=lambda _: _refuse("NaN and infinities are not JSON numbers."),
        )
    except UnicodeDecodeError:
        _refuse("The body is not UTF-8.")
    except json.JSONDecodeError as error:
        _refuse(f"The body is not valid JSON: line {error.lineno}, column {error.colno}.")
    except RecursionError:
        _refuse_depth()
    # Only an escape can bring in what UTF-8 and JSON's grammar have not refused already.
    _check(value, texts=b"\\u" in body)
    return value


def _check(value: Any, texts: bool) -> None:
    """Check the depth of every container and, with `texts`, every string; iterative, so no depth can overflow it."""
    rest = [(value, 1)]
    while rest:
        item, depth = rest.pop()
        if depth > MAX_DEPTH:
            _refuse_depth()
        inner = [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else [item]
        for one in inner:
            if isinstance(one, (dict, list)):
                rest.append((one, depth + 1))
            elif texts and isinstance(one, str):
                _check_text(one)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse("The body holds half of a surrogate pair.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        _refuse("The body names a key twice in one object.")
    return members


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        _refuse("The body holds a number with too many digits.")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        _refuse("The body holds a number that is too large.")
    return number


def _refuse_depth() -> NoReturn:
    _refuse(f"The body is nested more than {MAX_DEPTH} deep.")


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest(message, details={"errors": [{"field": "body", "reason": message}]})
