"""An engine without weights: it gives back what it was asked.  Deterministic, for tests and for trying the service.

A token is one Unicode character, and the engine is certain of each: no sampling setting changes what it says, and
every log-probability is 0.  Keeps every promise of `Engine`, so what works in front of it works in front of a
model; `bench/` uses it to measure what the service itself costs.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import cycle, islice

from app.engine.base import Chunk, EngineInfo, EngineStatus, GenerationRequest
from app.errors import EngineBusy, EngineNotReady
from app.types import EngineState, FinishReason, Message, Role, SamplingParams, TokenLogprob, Usage

_CONTROL = 0x110000
"""Token ids from here on are control tokens: no character of a text can be one."""
_TURN = {role: _CONTROL + number for number, role in enumerate(Role)}


class EchoDecoder:
    """Token ids to characters; nothing is ever incomplete."""

    def feed(self, token_ids: Sequence[int]) -> str:
        return _characters(token_ids)

    def finish(self) -> str:
        return ""


class EchoTokenizer:
    """Characters to token ids, and one control token in front of each message."""

    def encode_chat(self, messages: Sequence[Message], *, go_on: bool = False) -> tuple[int, ...]:
        ids = [token_id for message in messages for token_id in (_TURN[message.role], *map(ord, message.content))]
        return tuple(ids) if go_on else (*ids, _TURN[Role.ASSISTANT])

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def decoder(self) -> EchoDecoder:
        return EchoDecoder()

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return chr(token_id) if token_id < _CONTROL else ""


class EchoEngine:
    """Answers with the last user message of a chat, or with a plain prompt as it is."""

    def __init__(
        self,
        *,
        model: str = "echo",
        token_delay_seconds: float = 0.0,
        context_length: int = 8192,
        max_running: int = 1024,
    ) -> None:
        """Args: token_delay_seconds: pause before each token; max_running: one more is refused as busy."""
        self.tokenizer = EchoTokenizer()
        self._info = EngineInfo(
            model=model,
            revision=None,
            engine="echo",
            device="cpu",
            dtype="none",
            context_length=context_length,
            vocab_size=_CONTROL + len(_TURN),
            parameters=0,
        )
        self._delay = token_delay_seconds
        self._max_running = max_running
        self._live: dict[str, asyncio.Event] = {}
        self._state = EngineState.LOADING

    @property
    def info(self) -> EngineInfo:
        return self._info

    def status(self) -> EngineStatus:
        return EngineStatus(state=self._state, running=len(self._live), waiting=0, restarts=0)

    async def start(self) -> None:
        self._state = EngineState.READY

    async def wait_ready(self) -> None:
        return

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if self._state is not EngineState.READY:
            raise EngineNotReady("The model is not ready; try again in a moment.", retry_after=1)
        if len(self._live) >= self._max_running:
            raise EngineBusy("Too many requests are running; try again in a moment.", retry_after=1)
        aborted = self._live[request.id] = asyncio.Event()
        try:
            yield Chunk()
            async for chunk in self._speak(request, aborted):
                yield chunk
        finally:
            del self._live[request.id]

    async def abort(self, request_id: str) -> None:
        if request_id in self._live:
            self._live[request_id].set()

    async def close(self) -> None:
        self._state = EngineState.CLOSED
        for aborted in self._live.values():
            aborted.set()

    async def _speak(self, request: GenerationRequest, aborted: asyncio.Event) -> AsyncGenerator[Chunk, None]:
        params = request.params
        text = _long_enough(_answer(request.prompt_ids), params)
        ends = [chr(token_id) for token_id in params.stop_token_ids if token_id < _CONTROL]
        end_at = min(_places(text, ends, params.min_tokens), default=len(text))
        stop_at = min([*_places(text, params.stop), end_at])
        limit = min(stop_at, params.max_tokens)
        sent = 0
        while sent < limit and not aborted.is_set():
            await asyncio.sleep(self._delay)
            sent += 1
            yield _say(text[sent - 1], params)
        reason = FinishReason.LENGTH if sent < stop_at else FinishReason.STOP
        if aborted.is_set():
            reason = FinishReason.ABORT
        closing = int(sent == end_at < min(len(text), params.max_tokens))  # an end token counts, and is not shown
        usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=sent + closing)
        stopped_by = _stopped_by(text, sent, end_at, params) if reason is FinishReason.STOP else None
        yield Chunk(tokens=closing, finish_reason=reason, usage=usage, stopped_by=stopped_by)


def _say(character: str, params: SamplingParams) -> Chunk:
    if params.logprobs is None:
        return Chunk(text=character, tokens=1)
    certain = (ord(character), 0.0)
    token = TokenLogprob(*certain, top=(certain,) if params.logprobs else ())
    return Chunk(text=character, tokens=1, logprobs=(token,), token_ends=(1,))


def _stopped_by(text: str, at: int, end_at: int, params: SamplingParams) -> str | int | None:
    """Return which stop token or stop string begins where the answer ended; None where it ended by itself."""
    if at == end_at:
        return ord(text[at]) if at < len(text) and ord(text[at]) in params.stop_token_ids else None
    return min((stop for stop in params.stop if text.startswith(stop, at)), key=len, default=None)


def _places(text: str, wanted: Sequence[str], begin: int = 0) -> list[int]:
    """Return where each of the wanted texts that there are begins first."""
    return [at for at in (text.find(each, begin) for each in wanted) if at >= 0]


def _long_enough(text: str, params: SamplingParams) -> str:
    """Begin the text again until it has the characters asked for, or one more than may be sent if it must not end."""
    wanted = params.max_tokens + 1 if params.ignore_eos else params.min_tokens
    return text if len(text) >= wanted else "".join(islice(cycle(text), wanted))


def _answer(prompt_ids: tuple[int, ...]) -> str:
    """Return the text after the last user mark, or the whole prompt where there is none."""
    starts = [index for index, token_id in enumerate(prompt_ids) if token_id == _TURN[Role.USER]]
    spoken = prompt_ids[starts[-1] + 1 :] if starts else prompt_ids
    return _characters(spoken)


def _characters(token_ids: Sequence[int]) -> str:
    """Return the text of tokens; one that stands for half of a surrogate pair is U+FFFD."""
    text = "".join(chr(token_id) for token_id in token_ids if token_id < _CONTROL)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
