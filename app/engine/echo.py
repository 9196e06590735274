"""An engine without weights: it returns its prompt.  Deterministic, for tests and for trying the service.

A token is one Unicode character, and the engine is certain of each: no sampling parameter changes the text, and every
log-probability is 0.  It fulfils the contract of `Engine`; `bench/` uses it to measure the service itself.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import accumulate, cycle, islice

from msgspec import structs

from app.engine.base import Capabilities, EngineInfo, EngineStatus, PreparedPrompt
from app.errors import EngineBusy, EngineNotReady
from app.events import WITHHELD, Delta, DetokenizedLogprob, Event, Finished, PromptLogprob, Started, finish
from app.fair_share import fits_share
from app.requests import GenerationRequest, TemplateValue
from app.types import EngineState, FinishReason, Message, Role, SamplingParams, Tenant, Tool, Usage

_CONTROL = 0x110000
"""Token ids from here on are control tokens: no character of a text can be one."""
_TURN = {role: _CONTROL + number for number, role in enumerate(Role)}
_TOKENS_PER_TURN = 16
"""Without a delay so many tokens are ready at once; then the event loop gets its turn."""
_LOGPROBS_PER_DELTA = 16
"""Tokens with log-probabilities that are held back from a request that does not stream."""


class EchoDecoder:
    """Token ids to characters; nothing is ever incomplete."""

    def feed(self, token_ids: Sequence[int]) -> str:
        return _characters(token_ids)

    def finish(self) -> str:
        return ""


class EchoTokenizer:
    """Characters to token ids, and one control token in front of each message."""

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_kwargs: Sequence[tuple[str, TemplateValue]] = (),
        continue_final_message: bool = False,
        tenant: Tenant | None = None,
    ) -> tuple[int, ...]:
        ids = [token_id for message in messages for token_id in (_TURN[message.role], *map(ord, message.content))]
        return tuple(ids) if continue_final_message else (*ids, _TURN[Role.ASSISTANT])

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decoder(self, prompt_ids: Sequence[int] = ()) -> EchoDecoder:
        return EchoDecoder()

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return chr(token_id) if token_id < _CONTROL else ""

    def decode(self, token_ids: Sequence[int]) -> str:
        return _characters(token_ids)

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        return max(prompt_ids, default=0) >= _CONTROL

    def hidden_token(self, name: str) -> int | None:
        return None


class EchoEngine:
    """Echoes the last user message of a chat, or a plain prompt as it is."""

    def __init__(
        self,
        *,
        model: str = "echo",
        token_delay_seconds: float = 0.0,
        context_length: int = 8192,
        max_running: int = 1024,
    ) -> None:
        """Args: token_delay_seconds: pause before each token; max_running: of one tenant, while no other has any."""
        self.tokenizer = EchoTokenizer()
        self._info = EngineInfo(
            model=model,
            engine="echo",
            device="cpu",
            dtype="none",
            context_length=context_length,
            vocab_size=_CONTROL + len(_TURN),
            parameters=0,
            capabilities=Capabilities(unsupported=("grammar",)),
        )
        self._delay = token_delay_seconds
        self._max_running = max_running
        self._aborts: dict[str, asyncio.Event] = {}
        """An event for each live request, set when it is aborted."""
        self._tenants: Counter[Tenant] = Counter()
        """Live requests of each tenant."""
        self._state = EngineState.LOADING

    @property
    def info(self) -> EngineInfo:
        return self._info

    def status(self) -> EngineStatus:
        return EngineStatus(state=self._state, running=len(self._aborts), waiting=0, restarts=0)

    async def start(self) -> None:
        self._state = EngineState.READY

    async def wait_ready(self) -> None:
        return

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        ids = request.prompt_ids
        if ids is None and request.is_chat:
            chat = request.continue_final_message
            ids = self.tokenizer.encode_chat(request.messages, continue_final_message=chat)
        elif ids is None:
            ids = self.tokenizer.encode_text(request.text or "")
        return PreparedPrompt(prompt_tokens=len(ids), prompt_ids=ids)

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool = False) -> str:
        return self.tokenizer.decode(token_ids)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [_characters((token_id,)) for token_id in token_ids]

    def has_control_tokens(self, prompt_ids: Sequence[int]) -> bool:
        return self.tokenizer.has_control_tokens(prompt_ids)

    def hidden_token(self, name: str) -> int | None:
        return self.tokenizer.hidden_token(name)

    def prompt_end(self, prompt_ids: Sequence[int]) -> str:
        return ""

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        if self._state is not EngineState.READY:
            raise EngineNotReady("The model is not ready; try again in a moment.", retry_after=1)
        held = self._tenants[request.tenant]
        if not fits_share(1, held=held, total=len(self._aborts), most=self._max_running):
            raise EngineBusy("Too many requests are running; try again in a moment.", retry_after=1)
        self._info.capabilities.check(request)
        aborted = self._aborts[request.id] = asyncio.Event()
        self._tenants[request.tenant] += 1
        times = request.progress.times
        times.accepted = times.began = time.monotonic()
        try:
            yield Started(prompt_tokens=request.prompt_tokens)
            params = request.sampling
            request.progress.read_prompt = params.prompt_logprobs is not None or not params.max_tokens
            for prompt_logprobs in _prompt_logprobs(request):
                yield Delta(prompt_logprobs=prompt_logprobs)
                await asyncio.sleep(0)
            plan = _Plan(request)
            while plan.sent < plan.limit and not aborted.is_set():
                if self._delay or request.progress.generated % _TOKENS_PER_TURN == 0:
                    await asyncio.sleep(self._delay)
                ready = 1 if self._delay or request.stream or not plan.sent else _TOKENS_PER_TURN
                if (delta := plan.advance(ready, aborted.is_set())) is not None:
                    times.first_token = times.first_token or time.monotonic()
                    yield delta
            yield plan.finish(aborted.is_set())
        finally:
            times.ended = time.monotonic()
            del self._aborts[request.id]
            self._tenants -= Counter([request.tenant])

    async def abort(self, request_id: str) -> None:
        if request_id in self._aborts:
            self._aborts[request_id].set()

    async def close(self) -> None:
        self._state = EngineState.CLOSED
        for aborted in self._aborts.values():
            aborted.set()


class _Plan:
    """The characters to echo for one request, and how many of them have been sent."""

    def __init__(self, request: GenerationRequest) -> None:
        params = request.sampling
        self._request = request
        self._text = text = _long_enough(_echoed(request.prompt_ids or ()), params)
        ends = [chr(token_id) for token_id in params.stop_token_ids if token_id < _CONTROL]
        self._end_at = min(_places(text, ends, params.min_tokens), default=len(text))
        self._stop_at = min([*_places(text, params.stop), self._end_at])
        self.limit = min(self._stop_at, params.max_tokens)
        self.sent = 0

    def advance(self, tokens: int, last: bool) -> Delta | None:
        """Generate so many tokens, and return those that are sent now, if any."""
        request, progress = self._request, self._request.progress
        progress.generated = min(self.limit, progress.generated + tokens)
        many = request.sampling.logprobs is not None and progress.generated - self.sent >= _LOGPROBS_PER_DELTA
        if not (request.stream or self.sent == 0 or progress.generated == self.limit or last or many):
            return None
        text = self._text[self.sent : progress.generated]
        self.sent = progress.generated
        return _delta(text, request.sampling)

    def finish(self, aborted: bool) -> Finished:
        request, params = self._request, self._request.sampling
        reason = FinishReason.LENGTH if self.sent < self._stop_at else FinishReason.STOP
        if aborted:
            reason = FinishReason.ABORT
        # An end token counts, and has no text.
        request.progress.generated += int(self.sent == self._end_at < min(len(self._text), params.max_tokens))
        usage = Usage(prompt_tokens=request.prompt_tokens, completion_tokens=request.progress.generated)
        stopped = reason is FinishReason.STOP
        return finish(reason, usage, _stop_reason(self._text, self.sent, self._end_at, params) if stopped else None)


def _prompt_logprobs(request: GenerationRequest) -> Iterator[tuple[PromptLogprob, ...]]:
    """Yield what there is to say of the prompt's tokens, a few at a time; the first has no log-probability."""
    alternatives, ids = request.sampling.prompt_logprobs, request.prompt_ids or ()
    if alternatives is None:
        return
    texts = [_characters((token_id,)) for token_id in ids]
    ends = list(accumulate(map(len, texts)))
    for start in range(0, len(ids), _LOGPROBS_PER_DELTA):
        yield tuple(
            structs.replace(WITHHELD, end=ends[at])
            if at < request.hidden_tokens
            else _prompt_token(ids[at], texts[at], ends[at], alternatives if at else None)
            for at in range(start, min(start + _LOGPROBS_PER_DELTA, len(ids)))
        )


def _prompt_token(token_id: int, text: str, end: int, alternatives: int | None) -> PromptLogprob:
    token = PromptLogprob(token_id=token_id, text=text, raw=text.encode(), end=end)
    if alternatives is None:
        return token
    token = structs.replace(token, logprob=0.0, rank=1)
    return structs.replace(token, top=(token,) if alternatives else ())


def _delta(text: str, params: SamplingParams) -> Delta:
    if params.logprobs is None:
        return Delta(text=text, tokens=len(text))
    certain = [DetokenizedLogprob(character, character.encode("utf-8", "replace"), 0.0) for character in text]
    logprobs = tuple(
        DetokenizedLogprob(each.text, each.raw, 0.0, (each,) if params.logprobs else ()) for each in certain
    )
    return Delta(text=text, tokens=len(text), logprobs=logprobs, token_ends=tuple(range(1, len(text) + 1)))


def _stop_reason(text: str, at: int, end_at: int, params: SamplingParams) -> str | int | None:
    """Return which stop token or stop string begins at the end of the completion; None if it ended by itself."""
    if at == end_at:
        return ord(text[at]) if at < len(text) and ord(text[at]) in params.stop_token_ids else None
    return min((stop for stop in params.stop if text.startswith(stop, at)), key=len, default=None)


def _places(text: str, wanted: Sequence[str], begin: int = 0) -> list[int]:
    """Return where each of the wanted texts that occur begins first."""
    return [at for at in (text.find(each, begin) for each in wanted) if at >= 0]


def _long_enough(text: str, params: SamplingParams) -> str:
    """Repeat the text up to the characters that must come, or one more than may be sent if it must not end."""
    wanted = params.max_tokens + 1 if params.ignore_eos else params.min_tokens
    return text if len(text) >= wanted else "".join(islice(cycle(text), wanted))


def _echoed(prompt_ids: tuple[int, ...]) -> str:
    """Return the text after the last user mark, or the whole prompt where there is none."""
    starts = [index for index, token_id in enumerate(prompt_ids) if token_id == _TURN[Role.USER]]
    return _characters(prompt_ids[starts[-1] + 1 :] if starts else prompt_ids)


def _characters(token_ids: Sequence[int]) -> str:
    """Return the text of tokens; one that stands for half of a surrogate pair is U+FFFD."""
    text = "".join(chr(token_id) for token_id in token_ids if token_id < _CONTROL)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
