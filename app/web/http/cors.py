"""Lets the pages of listed origins call from a browser: which headers they may send, and which they may read.

A preflight is answered for whatever headers it asks for: what a client's library sends beside its key is its own
affair, and none of it is trusted.  There are no credentials in it: keys are sent in a header that the page sets itself.
"""

import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from app.web.http.rate_limits import RATE_HEADERS
from app.web.http.validation import IGNORED_FIELDS_HEADER

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
READABLE_HEADERS = (
    "Allow",
    "Retry-After",
    "WWW-Authenticate",
    "X-Cache",
    "X-Process-Time",
    "X-Request-ID",
    "X-Should-Retry",
    IGNORED_FIELDS_HEADER,
    *RATE_HEADERS,
)
"""Headers of responses for programs; a page sees no other but those that every page may read."""
PREFLIGHT_SECONDS = 7200
"""How long a browser need not ask again; Chromium takes no longer."""
MAX_REQUESTED_HEADERS = 64
_REQUESTED = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")


class CrossOriginAccess(CORSMiddleware):
    """Starlette's middleware, which lets an allowed origin send every header that it names."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str]) -> None:
        super().__init__(
            app,
            allow_origins=tuple(origins),
            allow_methods=METHODS,
            allow_headers=["*"],
            # A page of the open web may call a service in its visitor's own network where the operator lists it.
            allow_private_network=True,
            expose_headers=READABLE_HEADERS,
            max_age=PREFLIGHT_SECONDS,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Refuse names that are none, and write back the others."""
        requested = request_headers.get("access-control-request-headers")
        names = [name.strip() for name in (requested or "").split(",") if name.strip()]
        if len(names) > MAX_REQUESTED_HEADERS or not all(map(_REQUESTED.fullmatch, names)):
            return PlainTextResponse("Disallowed CORS headers", status_code=400, headers={"Vary": "Origin"})
        return super().preflight_response(request_headers)
