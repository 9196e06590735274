"""Everything the web layer takes from FastAPI, Starlette and sse-starlette beyond their documented interfaces.

An upgrade of these libraries can break only this module; `tests/unit/web/test_private_api.py` says which part of it.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import anyio
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Message, Scope, Send

__all__ = ["ParsedRequest", "SendTimeoutError", "SseResponse", "route_path", "served_methods", "takes_body"]


class SseResponse(EventSourceResponse):
    """An `EventSourceResponse` that a shutdown of the server does not cut off.

    The library polls for a shutdown twice a second and then cancels every stream.  Here the service drains: it lets
    generations finish, and ends those that do not with a last event.  A send is bounded by asyncio's own timer: one of
    anyio's cancel scopes for each costs as much as encoding ten events.
    """

    @staticmethod
    async def _listen_for_exit_signal() -> None:
        await anyio.sleep_forever()

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self.send_timeout):
                await send(message)
        except TimeoutError:
            raise SendTimeoutError from None


class ParsedRequest(Request):
    """A request whose body has been decoded; FastAPI's route handler calls `json()` and validates what it returns."""

    parsed: Any

    async def json(self) -> Any:
        return self.parsed


def takes_body(route: APIRoute) -> bool:
    """Return whether FastAPI reads a body for this route."""
    return route.body_field is not None


def route_path(scope: Scope) -> str | None:
    """Return the path template of the route that the router chose; None before it has, or if no route matched."""
    route = scope.get("route")
    return None if route is None else str(route.path)


def served_methods(app: FastAPI) -> Mapping[str, frozenset[str]]:
    """Return the path template of every route, those of included routers too, and the methods that it is served by.

    HEAD is among them wherever GET is: the middleware answers it by that route.
    """
    methods: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    for route in iter_route_contexts(app.routes):
        if route.path:
            methods[route.path] |= {*(route.methods or ()), *(["HEAD"] if "GET" in (route.methods or ()) else [])}
    return dict(methods)
