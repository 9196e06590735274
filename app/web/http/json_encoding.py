"""Encodes responses and stream frames as compact JSON, non-ASCII characters unescaped but for three.

Many clients read a stream with a function of their language that ends lines at U+0085, U+2028 and U+2029 too, and would
cut a frame there.

The log-probabilities of a large response are megabytes of JSON from objects ten times as large.  `encode_logprobs`
encodes them while they are generated, and `SegmentedJsonResponse` sends them segment by segment, so that no response
holds up the event loop or more memory than its own bytes.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
import structlog
from msgspec import structs
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.errors import InvalidRequest
from app.events import Delta, DetokenizedLogprob, Event, PromptLogprob

TOKENS_AT_ONCE = 16
"""Log-probabilities encoded before the event loop runs: a millisecond or two with 20 alternatives each."""
MAX_PROMPT_LOGPROBS = 500_000
"""Log-probabilities of prompts, alternatives included, that one response may hold: tens of megabytes."""
_TOO_MANY = "The prompts have too many log-probabilities for one response: ask for fewer alternatives, or send fewer."
SEGMENT_BYTES = 64 * 1024
"""Size from which a segment of a response is sent; the transport buffers about as much before it waits."""
SEND_SECONDS = 15.0
MIN_BYTES_PER_SECOND = 128 * 1024
"""How fast a large response must be read, after `SEND_SECONDS`: as long as that it occupies memory."""

_log = structlog.get_logger("llm_service")


def _plain(value: Any) -> str:
    """Return the text of a `str` subclass, such as LangChain's; msgspec encodes exact types only."""
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encoder = msgspec.json.Encoder(enc_hook=_plain)

_LINE_ENDS = {"\x85".encode(): b"\\u0085", "\u2028".encode(): b"\\u2028", "\u2029".encode(): b"\\u2029"}
"""UTF-8 of what some clients take for the end of a line, which JSON has in strings only, and the escape of each."""


def encode_json(data: Any) -> bytes:
    """Encode plain data; a float in it that may be tiny, huge or not finite is to be wrapped in `exact_float`.

    Raises: UnicodeEncodeError: a string holds half of a surrogate pair.
    """
    return _without_line_ends(_encoder.encode(data))


def _without_line_ends(encoded: bytes) -> bytes:
    for line_end, escape in _LINE_ENDS.items():
        if line_end in encoded:
            encoded = encoded.replace(line_end, escape)
    return encoded


def exact_float(number: float) -> msgspec.Raw:
    """Return a number for `encode_json` with the digits of `repr`, as `json.dumps` writes it.

    msgspec by itself writes -2e-05 as -0.00002, 1e+16 as 1e16, and NaN as null.

    Raises: ValueError: the number is NaN or infinite, which JSON cannot express.
    """
    if not math.isfinite(number):
        raise ValueError("not a JSON number")
    return msgspec.Raw(repr(number).encode())


class EncodedJsonResponse(JSONResponse):
    """A JSON response encoded by `encode_json`."""

    def render(self, content: Any) -> bytes:
        return encode_json(content)


class JsonArray:
    """An array that is encoded while it grows."""

    def __init__(self) -> None:
        self._segments: list[bytes] = []

    def extend(self, items: list[Any]) -> None:
        """Encode and append items."""
        if items:
            encoded = encode_json(items)
            self._segments.append(b"%b%b" % (b"," if self._segments else b"[", encoded[1:-1]))

    def segments(self) -> list[bytes]:
        """Return the JSON of the whole array."""
        return [*self._segments, b"]"] if self._segments else [b"[]"]


_PLACE = msgspec.Raw(b"\0")
"""Stands for a `JsonArray`; a control character that JSON never holds unescaped."""


def encode_segments(data: Any) -> list[bytes]:
    """Encode plain data with `JsonArray`s in it; the segments together are the JSON."""
    arrays: list[JsonArray] = []

    def hook(value: Any) -> Any:
        if not isinstance(value, JsonArray):
            return _plain(value)
        arrays.append(value)
        return _PLACE

    between = _without_line_ends(msgspec.json.Encoder(enc_hook=hook).encode(data)).split(bytes(_PLACE))
    segments = [between[0]]
    for array, after in zip(arrays, between[1:], strict=True):
        segments += [*array.segments(), after]
    return segments


class SegmentedJsonResponse(Response):
    """A JSON response of `encode_segments`, sent as the client reads it and freed as it is sent."""

    media_type = "application/json"

    def __init__(self, content: Any, headers: Mapping[str, str] | None = None) -> None:
        self._segments = deque(encode_segments(content))
        self._size = sum(map(len, self._segments))
        super().__init__(headers={**(headers or {}), "Content-Length": str(self._size)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        seconds = SEND_SECONDS + self._size / MIN_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(seconds):
                for body in self._bodies():
                    await send({"type": "http.response.body", "body": body, "more_body": bool(self._segments)})
                    await asyncio.sleep(0)
        except TimeoutError:
            _log.warning("A client did not read its response and was cut off", seconds=round(seconds))

    def _bodies(self) -> Iterator[bytes]:
        while self._segments:
            ready, size = [], 0
            while self._segments and size < SEGMENT_BYTES:
                ready.append(self._segments.popleft())
                size += len(ready[-1])
            yield b"".join(ready)


class LogprobsEncoder(Protocol):
    """Encodes the log-probabilities of one sample, in a dialect's form, into `JsonArray`s."""

    def extend(self, tokens: Sequence[DetokenizedLogprob]) -> None:
        """Encode the next tokens."""

    def extend_prompt(self, tokens: Sequence[PromptLogprob]) -> None:
        """Encode the next tokens of the prompt, which come before; a dialect that shows none inherits this."""


async def encode_logprobs(
    events: AsyncGenerator[Event, None], encoders: Mapping[int, LogprobsEncoder]
) -> AsyncGenerator[Event, None]:
    """Yield the events without their log-probabilities, which the encoder of their sample takes.

    Args: encoders: by the index of the sample; a defaultdict, since samples are not known before.
    Raises: InvalidRequest: the prompts have more log-probabilities than one response may hold.
    """
    entries = 0
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta) and event.prompt_logprobs:
                entries += sum(1 + len(token.top) for token in event.prompt_logprobs)
                if entries > MAX_PROMPT_LOGPROBS:
                    raise InvalidRequest(_TOO_MANY)
                encoders[event.index].extend_prompt(event.prompt_logprobs)
                await asyncio.sleep(0)
                event = structs.replace(event, prompt_logprobs=())
            if isinstance(event, Delta) and event.logprobs:
                encoder = encoders[event.index]
                for start in range(0, len(event.logprobs), TOKENS_AT_ONCE):
                    if start:
                        await asyncio.sleep(0)
                    encoder.extend(event.logprobs[start : start + TOKENS_AT_ONCE])
                event = structs.replace(event, logprobs=(), token_ends=())
            yield event
