"""GET / for browsers, and the files of the chat page below /page/: a fixed table, read once from this package.

The page works without a network.  Its policy allows no script and no style but these files, none inline, and no request
to another host; markup that a script makes has to come from the sanitizer (trusted types).
"""

import time
from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any, NamedTuple

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import StringConstraints
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from app.access.bootstrap_key import bootstrap_key
from app.access.page_link import MAX_CODE_CHARS, use_code
from app.errors import NotFound, Unauthorized
from app.web.http.dependencies import ContainerDep
from app.web.http.json_body import StrictModel, StrictRoute

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
_TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "mjs": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}
"""Media types of the files that are served, by the ends of their names; no other file is."""
_FOLDERS = ("admin", "vendor")
_KEY_PATH = "/page/key"


class PageFile(NamedTuple):
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str


class BrowserRoute(APIRoute):
    """Matches only clients that ask for a document; all others get what the path has for programs."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        if match is not Match.NONE and not wants_document(Headers(scope=scope)):
            return Match.NONE, {}
        return match, child_scope


def wants_document(headers: Headers) -> bool:
    """Return whether a client names HTML among what it takes, as browsers do for a page, and programs do not."""
    kinds = (kind for line in headers.getlist("accept") for kind in line.split(","))
    return any(kind.partition(";")[0].strip().lower() == "text/html" for kind in kinds)


@cache
def page_files() -> dict[str, PageFile]:
    """Return the files by their names below /page/."""
    folder = files("app.web.page")
    found = [("", folder), *((f"{name}/", folder.joinpath(name)) for name in _FOLDERS)]
    return {f"{prefix}{each.name}": _read(each) for prefix, part in found for each in part.iterdir() if _type(each)}


def _type(file: Traversable) -> str | None:
    return _TYPES.get(file.name.rpartition(".")[2])


def _read(file: Traversable) -> PageFile:
    content = file.read_bytes()
    return PageFile(content, _type(file) or "", f'"{sha256(content).hexdigest()[:32]}"')


def public_paths() -> frozenset[str]:
    """Return the exact paths that need no key; the page itself is at /, which needs none anyway."""
    return frozenset([_KEY_PATH, *(f"/page/{name}" for name in page_files())])


router = APIRouter(include_in_schema=False)
_document_router = APIRouter(include_in_schema=False, route_class=BrowserRoute)
_key_router = APIRouter(include_in_schema=False, route_class=StrictRoute)


class CodeOfLink(StrictModel):
    """What a link to the page holds."""

    code: Annotated[str, StringConstraints(min_length=1, max_length=MAX_CODE_CHARS)]


class FirstKey(StrictModel):
    """What the page gets for it."""

    key: str


@_key_router.post(_KEY_PATH)
async def key_for_code(body: CodeOfLink, request: Request, container: ContainerDep) -> FirstKey:
    """Exchange the code of a one-time link for the key that the service made; a wrong one counts as a wrong key."""
    folder = container.settings.app.data_dir
    generated = container.settings.security.api_key is None
    if not generated or not await run_sync(use_code, folder, body.code, time.time()):
        container.metrics.auth_failed()
        await container.failed_keys.take_failure(request.scope)
        raise Unauthorized("This link was used already, or is too old. Enter the key, or start the service again.")
    return FirstKey(key=await run_sync(bootstrap_key, folder))


@_document_router.get("/")
async def page(request: Request) -> Response:
    """Show the chat page."""
    return _reply(page_files()["index.html"], request, {"Content-Security-Policy": _POLICY, "Vary": "Accept"})


@router.get("/page/{name:path}")
async def page_file(name: str, request: Request) -> Response:
    """Send one file of the page."""
    if (file := page_files().get(name)) is None:
        raise NotFound("There is no such file.")
    return _reply(file, request, {})


router.routes[:0] = [*_document_router.routes, *_key_router.routes]


def _reply(file: PageFile, request: Request, headers: dict[str, Any]) -> Response:
    """Return a file, or that the browser's copy of it is the right one."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache", **headers}
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
