"""One server: what a probe learns of it, and whether it gets requests."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from app.config.remote import RemoteConfig
from app.engine.base import UpstreamStatus
from app.engine.remote.breaker import UpstreamBreaker
from app.engine.remote.connections import Connections, UpstreamResponse
from app.engine.remote.failures import UpstreamError
from app.engine.remote.servers import SERVERS, Server, detect_server
from app.telemetry.tracing import NO_TRACER, Tracer

log = logging.getLogger(__name__)

PROBE_TIMEOUT_SECONDS = 5.0
_LISTLESS_STATUSES = frozenset([404, 405, 500, 501])
"""Of a server that has no list of models, or cannot make one: it is taken at its configured word."""


class ProbeRefusedError(Exception):
    """The server answers, and will not serve until somebody corrects something; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a probe has learned of a server."""

    model: str
    """The model's name there."""
    server: Server
    context_length: int | None
    tokenizes: bool
    """Whether its route /tokenize answers."""


class _Modalities(msgspec.Struct):
    output_modalities: list[str] | None = None


class _Meta(msgspec.Struct):
    n_ctx: int | None = None
    n_ctx_train: int | None = None


class _Card(msgspec.Struct):
    id: str
    owned_by: str | None = None
    max_model_len: int | None = None
    context_length: int | None = None
    context_window: int | None = None
    meta: _Meta | None = None
    architecture: _Modalities | None = None

    @property
    def generates(self) -> bool:
        kinds = self.architecture.output_modalities if self.architecture else None
        return kinds is None or "text" in kinds

    @property
    def longest(self) -> int | None:
        meta = self.meta or _Meta()
        given = (self.max_model_len, self.context_length, self.context_window, meta.n_ctx, meta.n_ctx_train)
        return next((each for each in given if each), None)


class _Cards(msgspec.Struct):
    data: list[_Card]


class Upstream:
    """Holds the connections to one server, and so belongs to one event loop."""

    def __init__(self, number: int, base_url: str, config: RemoteConfig, tracer: Tracer = NO_TRACER) -> None:
        """Args: number: its place among the configured ones, from 1: its name wherever its address is not shown."""
        self.number = number
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self.breaker = UpstreamBreaker()
        self.running = 0
        """Requests that it has now."""
        self.facts: Facts | None = None
        self.refuses = False
        """Whether the last probe was answered with a refusal."""
        self.error: str | None = None
        """What the last failure was; None since it serves."""
        self._config = config
        self._tracer = tracer
        self._connections = Connections(self.root, config, tracer)

    @property
    def is_ready(self) -> bool:
        return self.facts is not None and not self.breaker.is_open

    @property
    def address(self) -> str:
        """Return host and port, for the log."""
        return urlsplit(self.root).netloc

    def status(self) -> UpstreamStatus:
        return UpstreamStatus(
            number=self.number,
            ready=self.is_ready,
            running=self.running,
            failures=self.breaker.failures,
            error=self.error,
        )

    async def open(self) -> None:
        """Prepare to connect; nothing is connected yet."""
        await self._connections.open()

    async def close(self) -> None:
        await self._connections.close()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request while it runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> UpstreamResponse:
        """Send a request and return the response as soon as its headers are there; it has to be closed.

        Raises: UpstreamError: it cannot be reached, or hangs up before it answers.
        """
        return await self._connections.send(method, path, body)

    async def fetch(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """Return the status and the body of a response.

        Raises: UpstreamError: there is none, or it is too long.
        """
        response = await self.send(method, path, body)
        try:
            return response.status, await response.body()
        finally:
            response.close()

    async def probe(self, name: str) -> None:
        """Learn what the server is and whether it serves, and let requests through if it does.

        Args: name: the model's, if the configuration has no other for it there.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                with self._tracer.silence():
                    self.facts = await self._facts(name)
        except TimeoutError:
            # One that has requests may be too busy with them to answer.
            if not self.running:
                self._give_up("it did not answer in time")
            return
        except (UpstreamError, ProbeRefusedError) as error:
            self._give_up(str(error), refuses=isinstance(error, ProbeRefusedError))
            return
        except Exception as error:  # noqa: BLE001  # the probes of the others have to go on
            self._give_up(f"its probe failed ({type(error).__name__})")
            return
        if self.breaker.is_open:
            log.info("upstream %d (%s) serves: %s", self.number, self.address, self.facts.server.name)
        self.refuses, self.error = False, None
        self.breaker.close()

    def failed(self, reason: str, *, for_certain: bool = False) -> None:
        """Count a request that failed, and stop sending others where that is enough."""
        if self.breaker.failed(for_certain=for_certain):
            self._note(reason)
        else:
            self.error = reason

    def _give_up(self, reason: str, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self._note(reason)
        self.breaker.is_open = True

    def _note(self, reason: str) -> None:
        if reason != self.error or not self.breaker.is_open:
            log.warning("upstream %d (%s) gets no requests: %s", self.number, self.address, reason)
        self.error = reason

    async def _facts(self, name: str) -> Facts:
        status, content = await self.fetch("GET", "/v1/models")
        if status in (401, 403):
            raise ProbeRefusedError("it refuses the configured key")
        if self._config.model is not None and (status in _LISTLESS_STATUSES or (status == 200 and self._is_listless)):
            card = _Card(id=self._config.model)
        elif status == 200:
            card = self._card(_read_cards(content), name)
        else:
            raise UpstreamError(f"its list of models has status {status}")
        configured = self._config.server
        server = detect_server(card.owned_by) if configured == "auto" else SERVERS[configured]
        if self.is_ready and self.facts is not None and (card.id, server) == (self.facts.model, self.facts.server):
            # It has served all the time: the rest is known.
            return self.facts
        context_length = card.longest
        if server.name == "llama.cpp":
            context_length = await self._slot_length() or context_length
        tokenizes = self._config.tokenizer in ("auto", "server") and await self._tokenizes(server, card.id)
        return Facts(model=card.id, server=server, context_length=context_length, tokenizes=tokenizes)

    @property
    def _is_listless(self) -> bool:
        configured = self._config.server
        return configured != "auto" and not SERVERS[configured].lists_model

    def _card(self, cards: list[_Card], name: str) -> _Card:
        wanted = self._config.model
        found = next((card for card in cards if card.id == (wanted or name)), None)
        if found is None and wanted is None and len(cards) == 1:
            found = cards[0]
        if found is None:
            has = ", ".join(card.id for card in cards) or "none that generates text"
            raise ProbeRefusedError(f"it has no model {wanted or name}, but {has}")
        return found

    async def _slot_length(self) -> int | None:
        """Return the context length of one request of llama.cpp's server, which its list of models does not have."""
        status, content = await self.fetch("GET", "/props")
        if status != 200:
            return None
        try:
            return msgspec.json.decode(content, type=_Props).default_generation_settings.n_ctx
        except msgspec.MsgspecError:
            return None

    async def _tokenizes(self, server: Server, model: str) -> bool:
        if not server.tokenizes:
            return False
        status, _ = await self.fetch("POST", "/tokenize", {"model": model, "prompt": "a"})
        return status == 200


def _read_cards(content: bytes) -> list[_Card]:
    try:
        return [card for card in msgspec.json.decode(content, type=_Cards).data if card.generates]
    except msgspec.MsgspecError:
        raise UpstreamError("its list of models is none of OpenAI's") from None


class _Defaults(msgspec.Struct):
    n_ctx: int | None = None


class _Props(msgspec.Struct):
    default_generation_settings: _Defaults
