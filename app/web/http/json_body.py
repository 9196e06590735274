"""Decide what counts as a JSON body, before any model sees it, and in which order a route judges a request.

Stricter than `json.loads`: one meaning for each body or none, so that what is validated here is what is logged, cached
and encoded later.  Knows no field; never echoes what it refuses.
"""

import json
import math
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.access.admission import Admitted
from app.errors import ClientDisconnected, InvalidRequest, QuotaExceeded, RateLimited, UnsupportedMediaType
from app.web.http.rate_limits import admitted, show_limits

_ADMITTED = "admitted"
"""Key in the request's state."""

MAX_DEPTH = 32
MAX_NUMBER_CHARS = 32
"""Far more digits than any field holds; Python's own bound on reading integers is 4,300."""


class StrictModel(BaseModel):
    """A body's schema: no conversions between types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class StrictRoute(APIRoute):
    """A route that reads its body as strict JSON, then validates; its responses say what is left of the rate limits."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        takes_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            show_limits(request.scope, request.app.state.parts.admission)
            return await handler(await _JsonRequest.read(request) if takes_body else request)

        return handle


class LimitedRoute(StrictRoute):
    """A generating route: its caller is admitted first, then the body is read and validated.

    FastAPI itself reads a body before any dependency runs.  Admitting earlier costs a refused caller no work of ours,
    and lets even the response to a malformed body carry the rate headers.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in (self.methods or ()):
            await super().handle(scope, receive, send)  # 405, which costs nothing
            return
        async with admitted(scope, scope["app"].state.parts.admission) as request:
            scope["state"][_ADMITTED] = request
            await super().handle(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except (RateLimited, QuotaExceeded):
                admitted_request: Admitted = request.scope["state"][_ADMITTED]
                await admitted_request.refund()
                raise

        return handle


class _JsonRequest(Request):
    """A request whose body is already read; FastAPI asks it for `json()`."""

    @classmethod
    async def read(cls, request: Request) -> "_JsonRequest":
        _refuse_other_types(request)
        strict = cls(request.scope, request.receive)
        try:
            strict._parsed = parse(await strict.body())
        except ClientDisconnect:
            raise ClientDisconnected("The client hung up while it sent its body.") from None
        return strict

    _parsed: Any

    async def json(self) -> Any:
        return self._parsed


def _refuse_other_types(request: Request) -> None:
    types = request.headers.getlist("content-type")
    message = Message()
    message["content-type"] = types[0] if len(types) == 1 else ""
    charset = message.get_param("charset", "utf-8")
    if message.get_content_type() != "application/json" or str(charset).lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType("Send the body as application/json, in UTF-8.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("Send the body uncompressed.")


def parse(body: bytes) -> Any:
    """Read one JSON value.

    Raises: InvalidRequest: it is empty, not UTF-8, malformed, ambiguous (a key twice), nested deeper than `MAX_DEPTH`,
        or holds a number or a character that could not be passed on (NaN, infinities, half a surrogate pair).
    """
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
    """Look at the depth of every container and, if asked, at every text in it; without recursion."""
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
    made = dict(pairs)
    if len(made) != len(pairs):
        _refuse("The body names a key twice in one object.")
    return made


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
