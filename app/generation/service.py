"""GenerationService: the one path that every route takes from a prompt to text.

Knows the steps and their order, and nothing of HTTP, tensors or SQL.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from app.engine.base import Engine
from app.engine.cache import CachedEngine
from app.engine.host import EngineRegistry
from app.errors import DeadlineExceeded, InvalidRequest, ShuttingDown
from app.generation.context_window import Room, Window, fit_chat, fit_text
from app.generation.metering import Accounts, check_rights
from app.generation.parallel_sampling import Answers
from app.generation.request_stats import Meter
from app.generation.requests import ChatAsk, CompletionAsk, Context, Delta, Event, Sampling, Started
from app.generation.sampling import check_tokens, settle
from app.generation.sessions import SessionStore, Turn, as_turns, merge
from app.langchain.call import Call
from app.langchain.chains import Chains
from app.privacy.filters import InputFilter
from app.telemetry import Metrics
from app.types import EngineState, FinishReason, Message, Role

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)
"""Answers that ended by themselves; only these enter a conversation."""


class GenerationService:
    """Prompts and conversations in, answers out; lives as long as the application."""

    def __init__(
        self,
        *,
        engines: EngineRegistry,
        chains: Mapping[str, Chains],
        input_filter: InputFilter | None,
        sessions: SessionStore | None,
        system_prompt: str,
        default_max_tokens: int,
        default_temperature: float,
        metrics: Metrics,
        accounts: Accounts,
        waiting_seconds: float = 30,
        cache: CachedEngine | None = None,
    ) -> None:
        """Args:
        chains: by the same model names as `engines`.
        input_filter: None lets every text through.
        sessions: None refuses requests that name a session.
        accounts: what each ask costs its caller, and its row in the log.
        waiting_seconds: how long a request may wait for the turn before it in its session.
        cache: reported in `status()` only; it already stands in front of the engine.
        """
        self.engines = engines
        self.sessions = sessions
        self._chains = chains
        self._input_filter = input_filter
        self._system_prompt = system_prompt
        self._default_max_tokens = default_max_tokens
        self._default_temperature = default_temperature
        self._metrics = metrics
        self._accounts = accounts
        self._waiting_seconds = waiting_seconds
        self._cache = cache
        self._born = time.monotonic()

    async def status(self) -> dict[str, Any]:
        """Return figures for people: the model, its queue, the cache, the sessions, in plain values."""
        engine = self.engines.default
        now = engine.status()
        loaded = now.state is EngineState.READY
        return {
            "status": "draining" if self.engines.draining else now.state.value,
            "uptime_seconds": round(time.monotonic() - self._born, 1),
            "model": asdict(engine.info) if loaded else {"model": self.engines.default_name},
            "engine": asdict(now),
            "cache": asdict(self._cache.stats()) if self._cache else None,
            "sessions": self.sessions.count() if self.sessions else None,
        }

    async def complete(self, ask: CompletionAsk) -> AsyncGenerator[Event, None]:
        """Go on with a plain text.

        Raises: AppError: at the first `anext` if the request is wrong or cannot be taken, later if it breaks.
        """
        async with self._accounts.open(ask) as account, self._lease(ask) as engine:
            model = engine.info.model
            check_rights(self._accounts.admission, ask, model)
            meter = Meter(model, self._metrics, ask.sampling.n)
            room = self._room(engine, ask.sampling)
            prompt, prompt_ids = await self._prompt(ask.prompt, engine, room)
            prompt_tokens, max_tokens = await fit_text(engine.tokenizer, prompt, room, prompt_ids)
            account.begin(engine.info, meter, prompt_tokens, prompt)
            await account.reserve(max_tokens)
            answers = Answers(_ids(ask), engine, meter)
            calls = [replace(call, prompt_ids=prompt_ids) for call in self._calls(ask, engine, max_tokens, answers)]
            pieces = [self._chains[model].complete(prompt, call) for call in calls]
            started = Started(model=model, prompt=prompt, prompt_tokens=prompt_tokens)
            try:
                async with aclosing(answers.events(started, pieces)) as events:
                    async for event in events:
                        account.see(event)
                        yield event
            finally:
                meter.settle(prompt_tokens)
                await account.settle()
            yield account.finished(meter.finished())

    async def chat(self, ask: ChatAsk) -> AsyncGenerator[Event, None]:
        """Answer the last message of a conversation, and remember the turn if a session is named.

        Raises: AppError: at the first `anext` if the request is wrong or cannot be taken, later if it breaks.
        """
        if ask.session_id is not None and ask.sampling.n > 1:
            raise InvalidRequest.of_field("n", "must be 1 in a session, which goes on with one answer")
        if ask.session_id is not None and ask.messages[-1].role is not Role.USER:
            raise InvalidRequest.of_field("messages", "must end with the user's in a session")
        async with self._accounts.open(ask) as account, self._lease(ask) as engine:
            model = engine.info.model
            check_rights(self._accounts.admission, ask, model)
            meter = Meter(model, self._metrics, ask.sampling.n)
            texts = await self._clean([message.content for message in ask.messages])
            messages = [Message(message.role, text) for message, text in zip(ask.messages, texts, strict=True)]
            system, spoken = self._split_system(messages)
            async with self._turn(ask) as history:
                new = merge(history, spoken)
                room = self._room(engine, ask.sampling)
                window = await fit_chat(engine.tokenizer, system, history, new, room, go_on=ask.go_on)
                account.begin(engine.info, meter, window.prompt_tokens, *(message.content for message in new))
                await account.reserve(window.max_tokens)
                answers = Answers(_ids(ask), engine, meter)
                calls = [
                    replace(call, go_on=ask.go_on) for call in self._calls(ask, engine, window.max_tokens, answers)
                ]
                pieces = [self._chains[model].chat(system, window.conversation, call) for call in calls]
                started = Started(model=model, prompt_tokens=window.prompt_tokens)
                reply: list[str] = []
                try:
                    async with aclosing(answers.events(started, pieces)) as events:
                        async for event in events:
                            account.see(event)
                            if isinstance(event, Delta):
                                reply.append(event.text)
                            yield event
                finally:
                    meter.settle(window.prompt_tokens)
                    await account.settle()
                finished = meter.finished(session_id=ask.session_id, context=_context(window, engine))
                if finished.finish_reason in _COMPLETE:
                    await self._remember(ask, new, "".join(reply))
            yield account.finished(finished)

    async def _prompt(
        self, given: str | tuple[int, ...], engine: Engine, room: Room
    ) -> tuple[str, tuple[int, ...] | None]:
        """Return a prompt as clean text, and its tokens where it came as tokens and nothing was filtered out.

        Raises: InvalidRequest: it names a token that the model does not have.
        """
        if isinstance(given, str):
            (prompt,) = await self._clean([given])
            return prompt, None
        check_tokens("prompt", given, engine.info)
        room.max_tokens(len(given))  # raises before any work is done for a prompt that is far too long
        text = await asyncio.to_thread(_decode, engine, given)
        (prompt,) = await self._clean([text])
        return prompt, given if prompt == text else None

    async def _clean(self, texts: list[str]) -> list[str]:
        return texts if self._input_filter is None else await self._input_filter.clean(texts)

    def _split_system(self, messages: Sequence[Message]) -> tuple[str, tuple[Message, ...]]:
        """Return the caller's own system text, or else ours, and the rest of the messages."""
        own = "\n\n".join(message.content for message in messages if message.role is Role.SYSTEM)
        return own or self._system_prompt, tuple(m for m in messages if m.role is not Role.SYSTEM)

    @asynccontextmanager
    async def _turn(self, ask: ChatAsk) -> AsyncIterator[tuple[Turn, ...]]:
        """Hold the session, one turn at a time, and give its history; without a session there is none."""
        if ask.session_id is None:
            yield ()
            return
        if self.sessions is None:
            raise InvalidRequest("Session memory is switched off on this service; leave session_id out.")
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._waiting_seconds):
                    await held.enter_async_context(self.sessions.turn(ask.caller.tenant, ask.session_id))
            except TimeoutError:
                raise DeadlineExceeded("The turn before this one in the session takes too long.") from None
            if self.engines.draining:
                raise ShuttingDown()
            session = await self.sessions.read(ask.caller.tenant, ask.session_id)
            yield session.turns if session else ()

    async def _remember(self, ask: ChatAsk, new: Sequence[Message], reply: str) -> None:
        if ask.session_id is None or self.sessions is None:
            return
        if self._input_filter is not None:
            # Where output is not filtered this still keeps personal data out of the session, and lets a client's
            # resent conversation, which comes through the same filter, be recognised.
            reply = await self._input_filter.mask(reply)
        for turn in as_turns([*new, Message(Role.ASSISTANT, reply)]):
            await self.sessions.append(ask.caller.tenant, ask.session_id, turn)

    def _room(self, engine: Engine, sampling: Sampling) -> Room:
        return Room(limit=engine.info.context_length, asked=sampling.max_tokens, default=self._default_max_tokens)

    @asynccontextmanager
    async def _lease(self, ask: CompletionAsk | ChatAsk) -> AsyncIterator[Engine]:
        """Hold the engine once for each answer, so that none outlives the ask."""
        async with AsyncExitStack() as held:
            engines = [await held.enter_async_context(self.engines.lease(ask.model, each)) for each in _ids(ask)]
            yield engines[0]

    def _calls(self, ask: CompletionAsk | ChatAsk, engine: Engine, max_tokens: int, answers: Answers) -> list[Call]:
        """Return what goes to the engine beside the prompt, for each answer."""
        if self.engines.over:
            raise ShuttingDown()
        params = settle(ask.sampling, engine.info, max_tokens=max_tokens, default_temperature=self._default_temperature)
        return [
            Call(
                request_id=request_id,
                tenant=ask.caller.tenant,
                params=replace(params, sample=index),
                cache=ask.cache,
                opened=answers.opened,
                see=partial(answers.see, index),
            )
            for index, request_id in enumerate(_ids(ask))
        ]


def _decode(engine: Engine, token_ids: tuple[int, ...]) -> str:
    decoder = engine.tokenizer.decoder()
    return decoder.feed(token_ids) + decoder.finish()


def _ids(ask: CompletionAsk | ChatAsk) -> list[str]:
    """Return the engine's ids of the answers to an ask; the first is the ask's own."""
    return [ask.id, *(f"{ask.id}.{index}" for index in range(1, ask.sampling.n))]


def _context(window: Window, engine: Engine) -> Context:
    return Context(
        limit=engine.info.context_length,
        prompt_tokens=window.prompt_tokens,
        turns_kept=window.turns_kept,
        turns_dropped=window.turns_dropped,
    )
