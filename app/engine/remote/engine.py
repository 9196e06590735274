"""The engine whose model runs in other servers with OpenAI's routes.

Decides what can be asked of them and refuses the rest by name; `pool.py` chooses a server for each request,
`live_stream.py` reads its response.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from msgspec import structs

from app.config import DeadlineConfig
from app.config.remote import RemoteConfig
from app.engine.base import Capabilities, EngineInfo, EngineStatus, PreparedPrompt
from app.engine.remote.live_stream import LiveStream
from app.engine.remote.pool import UpstreamPool
from app.engine.remote.prompts import ByteCounter, PromptCounter, ServerCounter, load_tokenizer
from app.engine.remote.servers import Server
from app.engine.remote.upstream import Facts, Upstream
from app.engine.remote.wire import request_body
from app.errors import AppError, EngineBusy, EngineFailed, EngineNotReady, InvalidRequest
from app.events import Event, Finished, Started
from app.fair_share import fits_share
from app.requests import GenerationRequest
from app.telemetry.tracing import NO_TRACER, Tracer
from app.types import EngineState

log = logging.getLogger(__name__)

UNKNOWN_CONTEXT_LENGTH: Final = 4096
"""Of a server that does not say, where the configuration does not either: what Ollama takes by default."""

COUNT_SECONDS = 2.0
"""How long a prompt may take to be counted while its completion waits."""


class RemoteEngine:
    """One model that one or several servers have."""

    def __init__(
        self,
        config: RemoteConfig,
        deadlines: DeadlineConfig,
        *,
        name: str,
        max_model_len: int | None = None,
        hub_token: str | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """Prepare; `start` begins to look for the servers.

        Args:
            name: the model's, as clients see it.
            max_model_len: of prompt and completion together, in tokens; by default what the servers say.
            hub_token: for a tokenizer of a gated model.
            tracer: tells the servers of the traces that their requests belong to.
        """
        self._config = config
        self._deadlines = deadlines
        self._name = name
        self._max_model_len = max_model_len
        self._hub_token = hub_token
        self._pool = UpstreamPool(config, name, tracer)
        self._counter: PromptCounter | None = None
        self._info: EngineInfo | None = None
        self._error: str | None = None
        """Why it cannot serve although servers do."""
        self._closed = False
        self._live: dict[str, LiveStream] = {}
        self._watching: asyncio.Task[None] | None = None
        self._probed = asyncio.Event()
        """Set, and replaced, after each round of probes."""

    @property
    def info(self) -> EngineInfo:
        """Raises: EngineNotReady: no server has been reached yet."""
        if self._info is None:
            raise self._not_ready()
        return self._info

    def status(self) -> EngineStatus:
        """Return where the engine stands now; never blocks and never raises."""
        running = sum(live.started for live in self._live.values())
        upstreams = tuple(each.status() for each in self._pool.upstreams)
        failed = next((f"upstream {each.number}: {each.error}" for each in upstreams if each.error), None)
        return EngineStatus(
            state=self._state,
            running=running,
            waiting=len(self._live) - running,
            restarts=0,
            error=self._error or failed,
            upstreams=upstreams,
        )

    @property
    def _state(self) -> EngineState:
        if self._closed:
            return EngineState.CLOSED
        if self._error is not None:
            return EngineState.FAILED
        if self._info is not None:
            return EngineState.READY if self._pool.ready else EngineState.UNRESPONSIVE
        refused = all(each.refuses for each in self._pool.upstreams)
        return EngineState.FAILED if refused else EngineState.LOADING

    async def start(self) -> None:
        """Begin to look for the servers and return at once; `wait_ready` reports when one serves."""
        if self._watching is None and not self._closed:
            await self._pool.open()
            self._watching = asyncio.create_task(self._pool.watch(self._on_probed))

    async def wait_ready(self) -> None:
        """Return as soon as requests can be served.

        Raises: EngineFailed: the servers refuse the key or do not have the model, or the engine is closed.
        """
        while (status := self.status()).state is not EngineState.READY:
            if status.state in (EngineState.FAILED, EngineState.CLOSED):
                raise EngineFailed(f"The model's servers cannot be used: {status.error or 'the engine is closed'}.")
            await self._probed.wait()

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Count the prompt; its tokens are handed on only where they are what the servers get.

        Where the length of a chat may become known later, and its server tells it with each chunk, it is only bounded.
        """
        counter = self._ready_counter()
        takes_tokens = all(server.takes_tokens for server in self._servers)
        if request.prompt_ids is not None:
            if not takes_tokens:
                raise InvalidRequest.of_field("prompt", "must be text: this model's server takes no token ids")
            return PreparedPrompt(prompt_tokens=len(request.prompt_ids), prompt_ids=request.prompt_ids)
        if request.uncounted_tokens and request.is_chat and all(server.counts_on for server in self._servers):
            most = counter.most_tokens(request)
            if most is not None and most <= request.uncounted_tokens:
                return PreparedPrompt(prompt_tokens=most, prompt_ids=None, is_upper_bound=True)
        prepared = await counter.prepare(request)
        if takes_tokens or prepared.prompt_ids is None:
            return prepared
        return PreparedPrompt(prompt_tokens=prepared.prompt_tokens, prompt_ids=None)

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool = False) -> str:
        """Return the text of a prompt that arrived as tokens.  Args: control_tokens: whether their names are in it."""
        return await self._ready_counter().detokenize(token_ids, control_tokens=control_tokens)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token on its own, where the tokenizer is here."""
        return await self._ready_counter().token_texts(token_ids)

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt holds control tokens; True where the tokenizer is elsewhere."""
        tokenizer = self._ready_counter().tokenizer
        return tokenizer is None or tokenizer.has_control_tokens(prompt_ids)

    def hidden_token(self, name: str) -> int | None:
        """Return the special token of this name where it can be a stop token of a request; otherwise None."""
        tokenizer = self._ready_counter().tokenizer
        if tokenizer is None or "stop_token_ids" in self.info.capabilities.unsupported:
            return None
        return tokenizer.hidden_token(name)

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        """Return nothing: the servers write the ends of prompts, and read what follows them."""
        self._ready_counter()
        return ""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Generate: Started once a server has taken the request, deltas, then exactly one Finished.

        Closing the generator early hangs up, and the server stops.

        Raises: EngineNotReady, EngineBusy, InvalidRequest, EngineFailed: in place of Started.
            EngineFailed, DeadlineExceeded: in place of Finished.
        """
        live = self._live[request.id] = self._admit(request)
        is_counted = bool(request.prompt_tokens)
        try:
            while True:
                event = await live.next()
                if not is_counted and not isinstance(event, Started):
                    is_counted = True
                    await self._count_unreported(request)
                if isinstance(event, Finished) and not event.usage.prompt_tokens:
                    event = structs.replace(event, usage=replace(event.usage, prompt_tokens=request.prompt_tokens))
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            del self._live[request.id]
            await live.close()

    async def _count_unreported(self, request: GenerationRequest) -> None:
        """Count a prompt whose length the server, against its kind, has not reported with the first token."""
        if request.progress.prompt:
            return
        with suppress(AppError, TimeoutError):
            async with asyncio.timeout(COUNT_SECONDS):
                prepared = await self._ready_counter().prepare(structs.replace(request, uncounted_tokens=0))
            request.progress.prompt = prepared.prompt_tokens

    async def abort(self, request_id: str) -> None:
        """End a request now: its stream closes with FinishReason.ABORT.  Unknown ids are ignored."""
        if (live := self._live.get(request_id)) is not None:
            live.abort()

    async def close(self) -> None:
        """Stop for good: live streams end with FinishReason.ABORT, and no connection or task is left."""
        self._closed = True
        for live in tuple(self._live.values()):
            live.abort()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        self._notify()
        await self._pool.close()
        if self._counter is not None:
            self._counter.close()

    def _admit(self, request: GenerationRequest) -> LiveStream:
        """Raises: EngineNotReady, EngineBusy, InvalidRequest: the request is not taken."""
        if self._state is not EngineState.READY:
            raise self._not_ready()
        if request.id in self._live:
            raise ValueError("a live request has this id already")
        self._refuse_misfit(request)
        held = sum(live.request.tenant == request.tenant for live in self._live.values())
        places = self._config.max_connections * len(self._pool.upstreams)
        if held and not fits_share(1, held=held, total=len(self._live), most=places):
            raise EngineBusy("The model has as many requests as it can take. Try again later.", retry_after=1)
        return LiveStream(
            request,
            self._pool,
            partial(self._body, request),
            names_stops=all(server.names_stops for server in self._servers),
            deadlines=self._deadlines,
            idle_seconds=self._config.idle_seconds,
        )

    def _body(self, request: GenerationRequest, upstream: Upstream) -> Mapping[str, Any]:
        facts = _facts(upstream)
        body = request_body(request, facts.model, facts.server)
        if facts.server.counts_on:
            body["stream_options"]["continuous_usage_stats"] = True
        return body

    @property
    def _servers(self) -> list[Server]:
        return [_facts(each).server for each in self._pool.ready]

    def _refuse_misfit(self, request: GenerationRequest) -> None:
        """Raises: InvalidRequest: the request asks for what the servers lack; the field is named."""
        self.info.capabilities.check(request)
        missing = "is not supported for this model"
        if request.tools and "tools" in self._config.unsupported:
            raise InvalidRequest.of_field("tools", missing)
        if (
            request.tools
            and request.tool_choice.mode != "auto"
            and not all(each.forces_tools for each in self._servers)
        ):
            raise InvalidRequest.of_field("tool_choice", "must be auto for this model")
        if request.continue_final_message and not all(server.continues for server in self._servers):
            raise InvalidRequest.of_field("continue_final_message", missing)
        if not request.sampling.max_tokens and not all(server.reads_prompts for server in self._servers):
            raise InvalidRequest.of_field("max_tokens", "must be at least 1 for this model")
        if (grammar := request.sampling.grammar) is None:
            return
        if not all(grammar.kind in server.grammars for server in self._servers):
            raise InvalidRequest.of_field("grammar", "is of a kind that this model's server does not follow")
        if not request.is_chat and any(server.structured != "structured_outputs" for server in self._servers):
            raise InvalidRequest.of_field("grammar", "is not supported for prompts of this model, only for chats")

    async def _on_probed(self) -> None:
        """Describe the model by the servers that serve, as far as they are known now."""
        try:
            if ready := self._pool.ready:
                await self._describe([_facts(each) for each in ready])
        except AppError as error:
            self._error = error.message
        except Exception as error:  # noqa: BLE001  # the probes have to go on
            log.error("the remote model cannot be described: %s", type(error).__name__)
        self._notify()

    async def _describe(self, facts: Sequence[Facts]) -> None:
        lengths = [each.context_length for each in facts if each.context_length]
        lengths += [self._max_model_len] if self._max_model_len else []
        context_length = min(lengths, default=UNKNOWN_CONTEXT_LENGTH)
        self._counter = await self._make_counter(facts, context_length)
        self._error = None
        servers = [each.server for each in facts]
        unsupported = {name for server in servers for name in server.unsupported} | set(self._config.unsupported)
        if self._counter.tokenizer is None:
            # A filter of personal data has to know which of them are text.
            unsupported.add("stop_token_ids")
        self._info = EngineInfo(
            model=self._name,
            # Another model behind the same name must not be mistaken for this one by a cache.
            revision=", ".join(sorted({each.model for each in facts})),
            engine="remote",
            context_length=context_length,
            capabilities=Capabilities(unsupported=tuple(sorted(unsupported - {"tools"}))),
            template_variables=None if all(server.template_kwargs for server in servers) else (),
        )

    async def _make_counter(self, facts: Sequence[Facts], context_length: int) -> PromptCounter:
        where = self._config.tokenizer
        if where == "none" or (where == "auto" and not all(each.tokenizes for each in facts)):
            return ByteCounter(self._config.bytes_per_token)
        if where in ("auto", "server"):
            if not all(each.tokenizes for each in facts):
                raise EngineFailed("remote.tokenizer is server, but its route /tokenize does not answer")
            return ServerCounter(self._pool)
        if self._counter is not None:
            return self._counter
        return await load_tokenizer(
            where, hub_token=self._hub_token, deadlines=self._deadlines, context_length=context_length
        )

    def _ready_counter(self) -> PromptCounter:
        if self._counter is None or self._info is None or self._closed:
            raise self._not_ready()
        return self._counter

    def _notify(self) -> None:
        self._probed.set()
        self._probed = asyncio.Event()

    def _not_ready(self) -> EngineNotReady:
        if self._closed:
            return EngineNotReady("The model is unloaded.")
        return EngineNotReady("No server of this model can be reached yet; try again in a moment.", retry_after=2)


def _facts(upstream: Upstream) -> Facts:
    if upstream.facts is None:
        raise RuntimeError("an upstream that serves has been probed")
    return upstream.facts
