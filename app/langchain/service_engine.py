"""A model of a running service, reached through OpenAI's routes, as LangChain's classes need it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from app.engine.base import PreparedPrompt
from app.engine.remote.chunks import DONE, Chunk, SseLines, UnreadableStreamError, read_chunk
from app.engine.remote.wire import request_body, request_path
from app.errors import DeadlineExceeded, ModelNotFound, ServiceUnavailable, Unauthorized
from app.events import Event, Started
from app.langchain.service_wire import StreamReader, error_from
from app.requests import GenerationRequest

CONNECT_SECONDS = 10.0


class ServiceEngine:
    """Sends each request to a service and reads its stream; holds the connections, and so belongs to one event loop."""

    def __init__(self, base_url: str, key: str | None, *, model: str | None, timeout_seconds: float) -> None:
        """
        Args:
            base_url: of the service, with or without `/v1`.
            model: its name there; None takes the first that the service lists.
            timeout_seconds: longest silence of the service.
        Raises: ValueError: `base_url` is no address of HTTP, or `key` cannot be one.
        """
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError("base_url must be an address such as http://127.0.0.1:8000/v1")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError("key must be an API key: letters, digits and signs, without spaces or line breaks")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout = httpx.Timeout(timeout_seconds, connect=CONNECT_SECONDS)
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        limits = httpx.Limits(max_connections=None)
        # Importing certificates takes tens of milliseconds, which only the start may take.
        self._client = await asyncio.to_thread(
            lambda: httpx.AsyncClient(
                base_url=self.base_url, headers=self._headers, timeout=self._timeout, limits=limits
            )
        )

    async def wait_ready(self) -> None:
        """Find the model, and with it whether the service answers and takes the key.

        Raises: ServiceUnavailable: nothing answers.  Unauthorized: the key is wrong.  ModelNotFound.
        """
        with self._explained():
            response = await self._opened.get("/v1/models")
        if response.status_code != 200:
            raise self._error(response, response.content)
        names = [card["id"] for card in response.json()["data"] if _generates(card)]
        if not names or self.model not in ("", *names):
            has = f"it has {', '.join(names)}" if names else "it has none that generates text"
            raise ModelNotFound(f"The service at {self.base_url} has no model {self.model}; {has}.")
        self.model = self.model or names[0]

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Leave the prompt as it is: the service has the tokenizer."""
        return PreparedPrompt(prompt_tokens=0, prompt_ids=None)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate; closing this hangs up, and the service stops.

        Raises: AppError: what the service says of the request, or that it does not answer.
        """
        body = request_body(request, self.model)
        with self._explained():
            async with self._opened.stream("POST", request_path(request), json=body) as response:
                if response.status_code != 200:
                    raise self._error(response, await response.aread())
                yield Started(model=self.model)
                reader = StreamReader(cached=response.headers.get("x-cache") == "HIT")
                async for chunk in _chunks(response):
                    for delta in reader.read(chunk):
                        yield delta
                yield reader.finish()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    @property
    def _opened(self) -> httpx.AsyncClient:
        if self._client is None:
            raise ServiceUnavailable("The connection to the service is not open.")
        return self._client

    def _error(self, response: httpx.Response, content: bytes) -> Exception:
        try:
            body = httpx.Response(200, content=content).json()
        except ValueError:
            body = None
        error = error_from(response.status_code, body, response.headers)
        if isinstance(error, Unauthorized):
            return Unauthorized(f"The service at {self.base_url} refuses the key: {error.message}")
        return error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises: ServiceUnavailable, DeadlineExceeded: in place of what httpx and the reader of streams raise."""
        try:
            yield
        except httpx.ConnectError as error:
            raise ServiceUnavailable(
                f"No service answers at {self.base_url} ({error}). Is it running, and is that its address?"
            ) from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"The service at {self.base_url} did not answer in time.") from error
        except UnreadableStreamError as error:
            raise ServiceUnavailable(f"What answers at {self.base_url} sent {error} in place of an answer.") from error
        except httpx.HTTPError as error:
            raise ServiceUnavailable(f"The connection to {self.base_url} broke: {type(error).__name__}.") from error


def _generates(card: Mapping[str, Any]) -> bool:
    return "text" in card.get("architecture", {}).get("output_modalities", ["text"])


async def _chunks(response: httpx.Response) -> AsyncIterator[Chunk]:
    lines = SseLines()
    async for part in response.aiter_bytes():
        for data in lines.feed(part):
            if data != DONE:
                yield read_chunk(data)
