"""GenerationService: the one path that every route takes from a request to its events."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import asdict, replace
from functools import partial
from itertools import takewhile
from typing import Any

from msgspec import structs

from app.engine.base import PreparedPrompt
from app.engine.host import ModelHost
from app.engine.served_model import ServedModel
from app.errors import DeadlineExceeded, InvalidRequest, ShuttingDown
from app.events import Delta, Event, Finished, Started, join_tool_calls
from app.generation.context_window import FittedPrompt, TokenBudget, fit_chat, fit_text, trimmable
from app.generation.metering import Admission, UsageRecorder
from app.generation.parallel_sampling import merge_samples
from app.generation.request_stats import RequestStats
from app.generation.sampling import resolve_params
from app.generation.sessions import (
    SessionStore,
    Turn,
    answered_turn,
    as_turns,
    new_messages,
    split_messages,
    turn_within,
    whole_turns,
)
from app.generation.template_options import resolve_template_options
from app.privacy.filters import InputFilter
from app.privacy.message_texts import map_texts
from app.requests import GenerationRequest
from app.telemetry import Metrics, ModelMetrics
from app.telemetry.tracing import NO_TRACER, GenerationOutcome, Tracer
from app.types import EngineState, Message, Principal, Role, Tenant


class GenerationService:
    """Requests in, events out; lives as long as the application."""

    def __init__(
        self,
        *,
        host: ModelHost,
        input_filter: InputFilter | None,
        storage_filter: InputFilter | None,
        sessions: SessionStore | None,
        metrics: Metrics,
        admission: Admission,
        usage: UsageRecorder,
        waiting_seconds: float = 30,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """Args:
        input_filter: None lets every text through.
        storage_filter: masks what a session stores, whatever the other filters let through; None stores it as it is.
        sessions: None refuses requests that name a session.
        admission: says what a caller may do, and takes tokens out of their limits.
        usage: charges each request to its caller and logs it.
        waiting_seconds: how long a request may wait for the turn before it in its session, for its preparation, and to
            store its own turn.
        tracer: measures the stages of a request.
        """
        self.host = host
        self.sessions = sessions
        self._input_filter = input_filter
        self._storage_filter = storage_filter
        self._metrics = metrics
        self._admission = admission
        self._usage = usage
        self._waiting_seconds = waiting_seconds
        self._tracer = tracer
        self._started = time.monotonic()

    def status(self) -> dict[str, Any]:
        """Return figures for people: the default model, its queue, the cache, the sessions, in plain values."""
        state = self.host.state
        model = None if state is None else self.host.default
        return {
            "status": "draining" if self.host.draining else state.value if state else "unloaded",
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "model": model.engine.info.as_dict() | {"defaults": asdict(model.defaults)}
            if model and state is EngineState.READY
            else {"model": self.host.default_name},
            "engine": asdict(model.engine.status()) if model else None,
            "cache": asdict(model.cache.stats()) if model and model.cache else None,
            "sessions": self.sessions.count() if self.sessions else None,
        }

    async def generate(self, request: GenerationRequest, principal: Principal) -> AsyncGenerator[Event, None]:
        """Prepare a request, run it, and yield its events: one Started, deltas with text, one Finished.

        Closing the generator cancels the request.

        Raises: AppError: in place of Started if the request is wrong or cannot be taken, later if it breaks.
        """
        with self._usage.record(request, principal) as record, self._lease(request, principal) as model:
            request = self.host.adapters.resolve(request)
            request = resolve_template_options(request, model.engine.info)
            self._check_rights(request, principal, model)
            budget = _budget(request, model)
            await self._admission.check_tokens(principal, budget.least_tokens(request.n))
            async with self._turn(request) as history:
                async with self._deadline("The prompt took too long to prepare."):
                    fitted = await self._fit(request, model, budget, history)
                metrics = self._metrics.model(model.name)
                run = _Run(fitted, model, metrics, keeps_text=self._tracer.wants_texts)
                record.begin(model.engine.info, fitted)
                count = partial(self._count, run) if fitted.is_upper_bound else None
                async with self._admission.reserve(principal, run.most_tokens, count) as reservation:
                    with record.charge(run.stats, reservation), self._traced(run):
                        async with aclosing(run.events()) as events:
                            async for event in events:
                                record.observe(event)
                                if run.take_prompt_count():
                                    await reservation.lower(run.most_tokens)
                                if isinstance(event, Started) and self.host.over:
                                    # It reached its engine after all live requests had been aborted.
                                    raise ShuttingDown()
                                if (visible := run.observe(event)) is not None:
                                    yield visible
                        if self._tracer.wants_texts:
                            await self._show_texts(run)
                finished = run.finished()
                if finished.finish_reason.is_complete:
                    async with self._deadline("The turn took too long to store."):
                        await self._store_turn(request, fitted.new, run.message)
            record.finish(finished)
            yield finished

    async def _count(self, run: "_Run") -> int:
        """Return the most tokens that a request can take whose prompt has not been counted yet, by counting it."""
        request = structs.replace(run.fitted.request, uncounted_tokens=0)
        async with self._deadline("The prompt took too long to prepare."):
            prepared = await run.model.engine.prepare(run.model.chain.render(request))
        return prepared.prompt_tokens + run.fitted.max_tokens

    def _traced(self, run: "_Run") -> AbstractContextManager[None]:
        return self._tracer.generation(run.name, run.samples, run.outcome)

    async def _show_texts(self, run: "_Run") -> None:
        """Let the span of a generation hold its prompt and its completion, as a session may store them."""
        prompt = run.fitted.new or [Message(Role.USER, run.fitted.request.text or "")]
        *before, answer = await self.storable(run.fitted.request.tenant, [*prompt, run.message])
        run.shown_texts = (_as_messages(before), _as_messages([answer]))

    def _lease(self, request: GenerationRequest, principal: Principal) -> AbstractContextManager[ServedModel]:
        return self.host.lease(request, allowed=principal.rights.models)

    def _check_rights(self, request: GenerationRequest, principal: Principal, model: ServedModel) -> None:
        ids = request.prompt_ids
        self._admission.check_rights(
            principal,
            model=request.adapter or model.name,
            logprobs=request.sampling.logprobs is not None or request.sampling.prompt_logprobs is not None,
            system_text=_system_text(request),
            control_tokens=ids is not None and model.engine.has_control_tokens(ids),
        )

    @asynccontextmanager
    async def _deadline(self, message: str) -> AsyncIterator[None]:
        """Raises: DeadlineExceeded: the block took longer than a request may wait."""
        deadline = asyncio.timeout(self._waiting_seconds)
        try:
            async with deadline:
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            raise DeadlineExceeded(message) from None

    async def _fit(
        self, request: GenerationRequest, model: ServedModel, budget: TokenBudget, history: Sequence[Turn]
    ) -> FittedPrompt:
        """Clean a prompt and encode as much of it as fits."""

        async def prepare(request: GenerationRequest) -> PreparedPrompt:
            with self._tracer.span("template"):
                return await model.engine.prepare(model.chain.render(request))

        if not request.is_chat:
            with self._filtering(model):
                request = await self._clean_text(request, model, budget)
            fitted = await fit_text(request, prepare, budget)
            return fitted if request.prompt_ids is not None else await _hide_own_words(fitted, model)
        with self._filtering(model):
            request = await self._cleaned_chat(request)
        # A session stores masked texts, so a conversation that a client sends again is recognised by its masked form.
        messages = list(request.messages)
        masked = await self._storable(request, messages) if request.session_id else messages
        stored = new_messages(history, masked)
        before, spoken = split_messages(messages, len(stored))
        if request.session_id:
            history, spoken = answered_turn(history, spoken)
        turns, new = trimmable(request, history, spoken)
        fitted = await fit_chat(structs.replace(request, messages=before), turns, new, prepare, budget)
        return await _hide_own_words(replace(fitted, new=stored), model)

    @contextmanager
    def _filtering(self, model: ServedModel) -> Iterator[None]:
        """Measure the block, in which the input filter works, if there is one."""
        if self._input_filter is None:
            yield
            return
        began = time.perf_counter()
        with self._tracer.span("pii in"):
            yield
        self._metrics.model(model.name).input_filtered(time.perf_counter() - began)

    async def _cleaned_chat(self, request: GenerationRequest) -> GenerationRequest:
        """Return a chat whose messages and tools have passed the input filter."""
        if self._input_filter is None:
            return request
        filtered = partial(self._input_filter.clean, request.tenant)
        return structs.replace(
            request,
            messages=tuple(await map_texts(request.messages, filtered)),
            tools=tuple(await map_texts(request.tools, filtered)),
        )

    async def _storable(self, request: GenerationRequest, messages: Sequence[Message]) -> list[Message]:
        """Return messages as a session may store them; those that the input filter has passed are clean already."""
        return list(messages) if self._input_filter is not None else await self.storable(request.tenant, messages)

    async def storable(self, tenant: Tenant, messages: Sequence[Message]) -> list[Message]:
        """Return messages as they may be stored: masked, whatever the filters let through.

        Raises: ServiceUnavailable: the filter itself failed.
        """
        if self._storage_filter is None:
            return list(messages)
        mask = partial(self._storage_filter.mask, tenant)

        async def masked(texts: list[str]) -> list[str]:
            return [await mask(text) for text in texts]

        return await map_texts(messages, masked)

    async def _clean_text(
        self, request: GenerationRequest, model: ServedModel, budget: TokenBudget
    ) -> GenerationRequest:
        """Clean a plain prompt; one that arrives as tokens stays as it is where nothing is filtered out.

        Raises: InvalidRequest: it names a token that the model does not have.
        """
        if (ids := request.prompt_ids) is None:
            (text,) = await self._clean(request, [request.text or ""])
            return structs.replace(request, text=text)
        if request.truncate_prompt is not None:
            ids = ids[-budget.most_prompt_tokens(request.truncate_prompt) :]
        model.engine.info.check_tokens("prompt", ids)
        budget.max_tokens(len(ids))  # raises before any work is done for a prompt that is far too long
        given = await model.engine.detokenize(ids)
        (text,) = await self._clean(request, [given])
        return structs.replace(request, text=text, prompt_ids=ids if text == given else None)

    async def _clean(self, request: GenerationRequest, texts: list[str]) -> list[str]:
        return texts if self._input_filter is None else await self._input_filter.clean(request.tenant, texts)

    def _turn(self, request: GenerationRequest) -> AbstractAsyncContextManager[Sequence[Turn]]:
        """Hold the session, one turn at a time, and return its history; without a session there is none."""
        return nullcontext(()) if request.session_id is None else self._session_turn(request, request.session_id)

    @asynccontextmanager
    async def _session_turn(self, request: GenerationRequest, session_id: str) -> AsyncIterator[Sequence[Turn]]:
        if request.n > 1:
            raise InvalidRequest.of_field("n", "must be 1 in a session, which goes on with one answer")
        if request.messages[-1].role not in (Role.USER, Role.TOOL):
            raise InvalidRequest.of_field("messages", "must end with the user's or a tool's in a session")
        if self.sessions is None:
            raise InvalidRequest("Session memory is switched off on this service; leave session_id out.")
        async with AsyncExitStack() as stack:
            with self._tracer.span("session"):
                turn = turn_within(self._waiting_seconds, self.sessions, request.tenant, session_id)
                await stack.enter_async_context(turn)
                if self.host.draining:
                    raise ShuttingDown()
                session = await self.sessions.read(request.tenant, session_id)
            yield whole_turns(session.turns) if session else ()

    async def _store_turn(self, request: GenerationRequest, new: Sequence[Message], completion: Message) -> None:
        if request.session_id is None or self.sessions is None:
            return
        with self._tracer.span("session"):
            # Where output is not filtered this still prevents personal data from being stored, and lets a client's
            # resent conversation, which is masked too before it is compared, be recognised.
            (stored,) = await self.storable(request.tenant, [completion])
            await self.sessions.append(request.tenant, request.session_id, *as_turns([*new, stored]))
        self._metrics.turn_stored()


def _as_messages(messages: Sequence[Message]) -> str:
    """Return messages as the conventions for GenAI write them into spans."""
    return json.dumps(
        [{"role": each.role.value, "parts": [{"type": "text", "content": each.all_text}]} for each in messages]
    )


def _system_text(request: GenerationRequest) -> str | None:
    """Return the field by which a request writes into the system message; None where none does."""
    if any(message.role is Role.SYSTEM for message in request.messages):
        return "messages"
    if request.tools:
        return "tools"
    texts = (name for name, value in request.template_kwargs if isinstance(value, str) and name != "reasoning_effort")
    return "chat_template_kwargs" if any(texts) else None


def _budget(request: GenerationRequest, model: ServedModel) -> TokenBudget:
    info = model.engine.info
    recommended = dict(info.recommended).get("max_tokens") if request.use_recommended else None
    default = request.default_max_tokens
    if default is None:
        default = model.defaults.max_tokens if recommended is None else int(recommended)
    return TokenBudget(limit=info.context_length, requested=request.max_tokens, default=default)


async def _hide_own_words(fitted: FittedPrompt, model: ServedModel) -> FittedPrompt:
    """Hide the beginning of a prompt that is to be shown, up to the last of what the service's templates add to it."""
    request = fitted.request
    if request.sampling.prompt_logprobs is None:
        return fitted
    plain = structs.replace(request, prompt_ids=None)
    rendered = model.chain.render(plain)
    if (rendered.messages, rendered.text) == (request.messages, request.text):
        return fitted
    ids = request.prompt_ids or ()
    try:
        own = (await model.engine.prepare(plain)).prompt_ids or ()
    except InvalidRequest:  # the chat template wants a system message
        own = ()
    pairs = zip(reversed(ids), reversed(own), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return replace(fitted, request=structs.replace(request, hidden_tokens=len(ids) - same))


class _Run:
    """A prepared request while it runs."""

    def __init__(self, fitted: FittedPrompt, model: ServedModel, metrics: ModelMetrics, *, keeps_text: bool) -> None:
        """Args: keeps_text: whether `message` is wanted where no session stores it.
        Raises: InvalidRequest: the model cannot honour a parameter.
        """
        info = model.engine.info
        request = resolve_params(fitted.request, info, model.defaults, max_tokens=fitted.max_tokens)
        info.capabilities.check(request)
        self._request = request
        self.fitted = fitted
        self.model = model
        self.name = request.adapter or model.name
        """That of the adapter where there is one."""
        self._keeps_text = keeps_text or request.session_id is not None
        self._keeps_reasoning = info.renders_reasoning
        self.samples = request.samples()
        self.shown_texts: tuple[str | None, str | None] = (None, None)
        """Prompt and completion, for the span of the generation."""
        self.stats = RequestStats(metrics, self.samples)
        self._bound = fitted.prompt_tokens
        """Upper bound of the prompt's tokens."""
        self._is_uncounted = fitted.is_upper_bound
        self._deltas: list[Delta] = []
        self._withheld_tokens = [0] * len(self.samples)
        """Tokens of each sample whose deltas were left out since the last one that was not."""
        self._finished: Finished | None = None

    @property
    def most_tokens(self) -> int:
        """Return an upper bound of the tokens that the request is charged with."""
        return self._bound + self.fitted.max_tokens * len(self.samples)

    def take_prompt_count(self) -> bool:
        """Take the engine's count of a prompt in place of its upper bound; return whether it is lower."""
        if not self._is_uncounted:
            return False
        counted = self.stats.prompt_tokens
        self._is_uncounted = not counted
        is_lower = 0 < counted < self._bound
        self._bound = counted or self._bound
        return is_lower

    @property
    def message(self) -> Message:
        """Return what the assistant has said, thought and called so far; of several samples, all of it as it came."""
        reasoning = "".join(delta.reasoning for delta in self._deltas) if self._keeps_reasoning else ""
        return Message(
            Role.ASSISTANT,
            "".join(delta.text for delta in self._deltas),
            tool_calls=join_tool_calls(part for delta in self._deltas for part in delta.tool_calls),
            reasoning=reasoning or None,
        )

    def events(self) -> AsyncGenerator[Event, None]:
        return merge_samples([self.model.chain.stream(sample) for sample in self.samples])

    def observe(self, event: Event) -> Event | None:
        """Count an event, and return it as the caller sees it; None for one without text and for the last."""
        match event:
            case Delta():
                self.stats.observe(event)
                if self._keeps_text:
                    self._deltas.append(event)
                if event.is_visible and not self._withheld_tokens[event.index]:
                    return event
                return self._visible(event)
            case Started():
                # The output filter has set one that it changed.
                prompt = None if self._request.is_chat else event.prompt or self._request.text
                return structs.replace(event, model=self.name, prompt=prompt)
            case Finished():
                self.stats.observe(event)
                self._finished = event
        return None

    def _visible(self, delta: Delta) -> Delta | None:
        """Return a delta with the tokens of those left out before it; None for one without text."""
        tokens = self._withheld_tokens[delta.index] + delta.tokens
        self._withheld_tokens[delta.index] = 0 if delta.is_visible else tokens
        if not delta.is_visible:
            return None
        return delta if tokens == delta.tokens else structs.replace(delta, tokens=tokens)

    def outcome(self) -> GenerationOutcome:
        """Return what the span of the generation says of its end."""
        shown, said = self.shown_texts
        return GenerationOutcome(
            prompt_tokens=self.stats.prompt_tokens if self.fitted.is_upper_bound else self.fitted.prompt_tokens,
            completion_tokens=self.stats.generated + self.stats.replayed,
            reasons=self.stats.reasons,
            input=shown,
            output=said,
        )

    def finished(self) -> Finished:
        """Return the last event, with all that is known of the request.

        Raises: RuntimeError: the engine broke its promise of a last event.
        """
        if self._finished is None:
            raise RuntimeError("the engine ended without its last event")
        context = self.fitted.context
        if context is not None and self.fitted.is_upper_bound:
            context = structs.replace(context, prompt_tokens=self._finished.usage.prompt_tokens)
        return structs.replace(
            self._finished,
            model=self.name,
            session_id=self._request.session_id,
            context=context,
        )
