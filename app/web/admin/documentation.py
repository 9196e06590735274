"""GET /docs and /redoc: the OpenAPI document in Swagger UI and Redoc, from files that are installed with the service.

The pages work without a network: fastapi-offline brings both programs.  Their policy allows no script but the files
below, none inline, and no request to another host.
"""

from functools import cache
from html import escape
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

OPENAPI_PATH = "/openapi.json"

_REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='",  # no text: a script adds the rules, which is allowed
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='",  # of its scroll bars
)
"""Hashes of the style elements that Redoc adds to the page."""
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        f"style-src 'self' {' '.join(_REDOC_STYLES)}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_CACHE = "public, max-age=3600"
_JS, _CSS, _PNG = "text/javascript", "text/css", "image/png"

_SWAGGER_START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null, persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout"
});
"""
# Redoc's search would start a worker from a blob, which the policy forbids.
_REDOC_START = """document.body.style.margin = "0";
Redoc.init("openapi.json", {disableSearch: true}, document.getElementById("page"));
"""
REDOC_LOGO = b"https://cdn.redoc.ly/redoc/logo-mini.svg"
"""An image beside the link to Redoc's own site, the only thing that either program loads from another host."""
_NO_LOGO = b"data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22/%3E"

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def swagger_ui(request: Request) -> HTMLResponse:
    """Show the document in Swagger UI, which can send requests too."""
    scripts = "docs/swagger-ui-bundle.js", "docs/start.js"
    return _page(request.app.title, *scripts, style="docs/swagger-ui.css")


@router.get("/redoc")
async def redoc(request: Request) -> HTMLResponse:
    """Show the document in Redoc, for reading."""
    return _page(request.app.title, "redoc/redoc.standalone.js", "redoc/start.js")


@router.get("/docs/swagger-ui-bundle.js")
async def swagger_ui_script() -> Response:
    return _file(_bundled("swagger-ui-bundle.js"), _JS)


@router.get("/docs/swagger-ui.css")
async def swagger_ui_style() -> Response:
    return _file(_bundled("swagger-ui.css"), _CSS)


@router.get("/docs/favicon.png")
async def favicon() -> Response:
    return _file(_bundled("favicon.png"), _PNG)


@router.get("/docs/start.js")
async def swagger_ui_start() -> Response:
    return _file(_SWAGGER_START.encode(), _JS)


@router.get("/redoc/redoc.standalone.js")
async def redoc_script() -> Response:
    return _file(_bundled("redoc.standalone.js").replace(REDOC_LOGO, _NO_LOGO), _JS)


@router.get("/redoc/start.js")
async def redoc_start() -> Response:
    return _file(_REDOC_START.encode(), _JS)


PUBLIC_PATHS = frozenset([OPENAPI_PATH, *(route.path for route in router.routes)])  # type: ignore[attr-defined]
"""Paths that need no key where the documentation is served."""


@cache
def _bundled(name: str) -> bytes:
    """Return a file of fastapi-offline."""
    return files("fastapi_offline").joinpath("static", name).read_bytes()


def _file(content: bytes, media_type: str) -> Response:
    return Response(content, media_type=media_type, headers={"Cache-Control": _CACHE})


def _page(title: str, *scripts: str, style: str | None = None) -> HTMLResponse:
    """Return a page; its addresses are relative, so that it works below a proxy's path too."""
    link = f'<link rel="stylesheet" href="{style}">\n' if style else ""
    loaded = "\n".join(f'<script src="{script}"></script>' for script in scripts)
    return HTMLResponse(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="docs/favicon.png">\n{link}</head>\n'
        f'<body>\n<div id="page"></div>\n{loaded}\n</body>\n</html>\n',
        headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"},
    )
