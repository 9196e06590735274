"""The connections to one server: HTTP/1.1, kept open from one request to the next.

The one module that knows the HTTP client, and so the one that translates its errors.
"""

import asyncio
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import httpx

from app.config.remote import RemoteConfig
from app.engine.remote.failures import UpstreamError
from app.telemetry.tracing import NO_TRACER, Tracer

MAX_BODY_BYTES = 4_194_304
"""Of a response that is no stream; more is not read."""
KEEP_ALIVE_SECONDS = 4.0
"""How long a connection stays open without a request; uvicorn closes one after 5 seconds."""
LINGER_SECONDS = 1.0
"""How long the last bytes of a response may take after those that say that it is over."""


class UpstreamResponse:
    """A response whose headers have come; it has to be closed."""

    def __init__(self, response: aiohttp.ClientResponse, lingering: set["UpstreamResponse"]) -> None:
        """Args: lingering: the responses whose last bytes have a moment to come."""
        self._response = response
        self._lingering = lingering
        self._is_over = False

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Return the headers, whose names are the same in lower case."""
        return self._response.headers

    async def read(self) -> bytes:
        """Return what has come since the last call, as soon as there is anything; nothing at the end.

        Raises: UpstreamError: it breaks off.
        """
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError("its answer broke off") from error

    async def body(self) -> bytes:
        """Return the rest of a response that is no stream.

        Raises: UpstreamError: it is too long, or breaks off.
        """
        body = bytearray()
        while part := await self.read():
            body += part
            if len(body) > MAX_BODY_BYTES:
                raise UpstreamError("its answer is too long")
        return bytes(body)

    def end(self) -> None:
        """Note that nothing more is wanted, and that the response ends by itself: its connection may then be reused."""
        self._is_over = True

    def close(self) -> None:
        """Hang up, unless the response has ended or is about to."""
        if self._is_over and not self._response.closed:
            self._lingering.add(self)
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self.hang_up)
        else:
            self._response.close()

    def hang_up(self) -> None:
        """Close the connection; one that has another request is no longer this response's."""
        self._lingering.discard(self)
        self._response.close()


class Connections:
    """Sends requests to one server; belongs to one event loop."""

    def __init__(self, root: str, config: RemoteConfig, tracer: Tracer = NO_TRACER) -> None:
        """Args: root: the server's address, without /v1."""
        self._root = root
        self._config = config
        self._tracer = tracer
        self._session: aiohttp.ClientSession | None = None
        self._lingering: set[UpstreamResponse] = set()

    async def open(self) -> None:
        """Prepare; nothing is connected yet."""
        if self._session is not None:
            return
        # Reading certificates takes tens of milliseconds, which must not hold up the event loop.
        context = await asyncio.to_thread(_certificates, self._root)
        config = self._config
        # An answer that was packed would be unpacked whatever its size.
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers |= {name: value.get_secret_value() for name, value in config.headers.items()}
        if config.api_key is not None:
            headers["Authorization"] = f"Bearer {config.api_key.get_secret_value()}"
        connector = aiohttp.TCPConnector(
            ssl=context, limit=config.max_connections, keepalive_timeout=KEEP_ALIVE_SECONDS
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(sock_connect=config.connect_seconds),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            proxy=_proxy(self._root),
            trace_configs=self._tracer.trace_configs(),
        )

    async def close(self) -> None:
        for response in tuple(self._lingering):
            response.hang_up()
        if self._session is not None:
            await self._session.close()

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> UpstreamResponse:
        """Send a request and return the response as soon as its headers are there; a redirect is not followed.

        Raises: UpstreamError: it cannot be reached, or hangs up before it answers.
        """
        if self._session is None:
            raise UpstreamError("it is not open")
        data = None if body is None else _encode(body)
        try:
            response = await self._session.request(method, self._root + path, data=data, allow_redirects=False)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise UpstreamError("it cannot be reached", for_certain=True) from error
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise UpstreamError("it hung up before it answered", may_have_moved=True) from error
        except aiohttp.ClientError as error:
            raise UpstreamError(f"it cannot be asked ({type(error).__name__})") from error
        return UpstreamResponse(response, self._lingering)


def _encode(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _certificates(root: str) -> ssl.SSLContext | bool:
    """Return the authorities that are trusted everywhere else in the service, too."""
    return httpx.create_ssl_context() if urlsplit(root).scheme == "https" else True


def _proxy(root: str) -> str | None:
    """Return the proxy of the environment, if there is one and it is not to be passed by for this server."""
    address = urlsplit(root)
    if address.hostname is None or proxy_bypass(address.netloc):
        return None
    proxies = getproxies()
    return proxies.get(address.scheme) or proxies.get("all")
