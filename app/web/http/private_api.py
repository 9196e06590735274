"""Everything the web layer takes from FastAPI and Starlette beyond their documented interfaces.

An upgrade of these libraries can break only this module; `tests/unit/web/test_private_api.py` says which part of it.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.requests import Request
from starlette.types import Scope


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
