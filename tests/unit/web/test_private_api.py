"""What the web layer takes from its libraries beyond their documented interfaces is still there, and still works.

A failure here names the library whose upgrade broke `app/web/http/private_api.py`.
"""

import asyncio
import inspect

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from app.errors import ClientDisconnected
from app.web.http.errors import ErrorRenderer
from app.web.http.private_api import (
    ParsedRequest,
    SendTimeoutError,
    SseResponse,
    route_path,
    served_methods,
    takes_body,
)
from tests.waiting import HANG_SECONDS


class Item(BaseModel):
    name: str


class PreparsingRoute(APIRoute):
    """Hands FastAPI a body that was decoded elsewhere."""

    def get_route_handler(self):
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            parsed = ParsedRequest(request.scope, request.receive)
            await parsed.body()
            parsed.parsed = {"name": "decoded elsewhere"}
            return await handler(parsed)

        return handle


async def get(app: FastAPI, path: str, **options) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request("POST" if options else "GET", path, **options)


async def test_sse_starlette_waits_for_a_shutdown_in_the_method_that_is_overridden():
    """Under another name the override would be dead code, and a shutdown would cut every stream."""
    assert inspect.iscoroutinefunction(EventSourceResponse._listen_for_exit_signal)
    called = asyncio.Event()

    class Watched(SseResponse):
        @staticmethod
        async def _listen_for_exit_signal() -> None:
            called.set()
            await SseResponse._listen_for_exit_signal()

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        await asyncio.sleep(0)

    async def frames():
        yield b"data: 1\n\n"
        await asyncio.sleep(0.01)

    async with asyncio.timeout(HANG_SECONDS):
        await Watched(frames())({"type": "http", "method": "GET"}, receive, send)

    assert called.is_set()


async def test_sse_starlette_sends_through_the_method_that_is_overridden():
    """Under another name the override would be dead code, and each send would cost a cancel scope of anyio."""
    sent: list[str] = []

    class Watched(SseResponse):
        async def _send_with_timeout(self, send, message):
            sent.append(message["type"])
            await super()._send_with_timeout(send, message)

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        await asyncio.sleep(0)

    async def frames():
        yield b"data: 1\n\n"

    async with asyncio.timeout(HANG_SECONDS):
        await Watched(frames())({"type": "http", "method": "GET"}, receive, send)

    assert "http.response.body" in sent


async def test_sse_starlette_raises_its_send_timeout_when_a_client_does_not_read():
    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def frames():
        yield b"data: 1\n\n"

    with pytest.raises(SendTimeoutError):
        async with asyncio.timeout(HANG_SECONDS):
            await SseResponse(frames(), send_timeout=0.01)({"type": "http", "method": "GET"}, receive, send)


async def test_fastapi_validates_the_body_that_json_returns():
    router = APIRouter(route_class=PreparsingRoute)

    @router.post("/items")
    async def create(item: Item) -> str:
        return item.name

    app = FastAPI()
    app.include_router(router)

    assert '"decoded elsewhere"' == (await get(app, "/items", json={"name": "sent"})).text


def test_fastapi_says_which_routes_take_a_body():
    router = APIRouter()

    @router.post("/with")
    async def with_body(item: Item) -> None: ...

    @router.get("/without")
    async def without_body(name: str) -> None: ...

    assert [True, False] == [takes_body(route) for route in router.routes if isinstance(route, APIRoute)]


async def test_the_router_puts_the_path_template_into_the_scope():
    """With the prefix of the router that was included, and for a refusal inside the route, too."""
    router = APIRouter(prefix="/v1")

    @router.get("/items/{name}")
    async def read(name: str, request: Request) -> str | None:
        return route_path(request.scope)

    app = FastAPI()
    app.include_router(router)

    assert '"/v1/items/{name}"' == (await get(app, "/v1/items/a")).text
    assert route_path({"type": "http"}) is None


def test_the_paths_of_included_routers_are_found_with_all_their_methods():
    """A path with two routes has the methods of both."""
    router = APIRouter(prefix="/v1")

    @router.get("/items")
    async def items() -> None: ...

    @router.get("/items/{name}")
    async def item(name: str) -> None: ...

    @router.delete("/items/{name}")
    async def delete_item(name: str) -> None: ...

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router)

    wanted = {"/v1/items": {"GET", "HEAD"}, "/v1/items/{name}": {"GET", "HEAD", "DELETE"}}
    assert wanted == served_methods(app)


async def test_starlette_sends_nothing_when_an_error_handler_returns_none():
    app = FastAPI()
    ErrorRenderer({}).register_handlers(app)

    @app.get("/")
    async def gone() -> None:
        raise ClientDisconnected("x")

    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [], "state": {}}
    await app(scope, receive, send)

    assert [] == sent
