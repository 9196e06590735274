"""Reads what a server sends: the lines of its stream, and the objects in them, in all the shapes that servers write."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from app.events import DetokenizedLogprob

MAX_LINE_BYTES = 1_048_576
"""A longer line is no chunk of a stream."""
DONE = b"[DONE]"


class UnreadableStreamError(Exception):
    """What a server sent is no stream of OpenAI's; the message says what it is instead, and repeats none of it."""


class FunctionPart(msgspec.Struct):
    """More of a call's function."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    """A part of their JSON text; some servers send the object."""


class CallPart(msgspec.Struct):
    """More of a call of a tool."""

    index: int | None = None
    id: str | None = None
    function: FunctionPart | None = None


class MessagePart(msgspec.Struct):
    """More of the assistant's message, or all of it."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallPart] | None = None


class TopToken(msgspec.Struct):
    """A token and how likely it is."""

    token: str = ""
    logprob: float | None = None
    bytes: list[int] | None = None


class ScoredToken(TopToken):
    """A token of the completion, and others that could have stood there."""

    top_logprobs: list[TopToken] | None = None


class Logprobs(msgspec.Struct):
    """A chat's have `content`, a plain completion's parallel lists."""

    content: list[ScoredToken] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class Choice(msgspec.Struct):
    """More of a completion."""

    delta: MessagePart | None = None
    message: MessagePart | None = None
    """In place of `delta` where the server does not stream."""
    text: str | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def part(self) -> MessagePart:
        return self.delta or self.message or MessagePart(content=self.text)


class TokenDetails(msgspec.Struct):
    """How tokens were used."""

    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class UsagePart(msgspec.Struct):
    """The tokens so far, or of all."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: TokenDetails | None = None
    completion_tokens_details: TokenDetails | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0

    @property
    def reasoning_tokens(self) -> int:
        return (self.completion_tokens_details and self.completion_tokens_details.reasoning_tokens) or 0


class Chunk(msgspec.Struct):
    """One object of a stream."""

    choices: list[Choice] | None = None
    usage: UsagePart | None = None
    error: Any = None
    """In place of the rest of the stream."""


_DECODER = msgspec.json.Decoder(Chunk, strict=False)


def read_chunk(data: bytes) -> Chunk:
    """Return the object of one line.

    Raises: UnreadableStreamError: it is no JSON, or not of this shape.
    """
    try:
        return _DECODER.decode(data)
    except msgspec.ValidationError:
        raise UnreadableStreamError("an object that is no chunk of OpenAI's") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UnreadableStreamError("a line that is no JSON") from None


class SseLines:
    """Splits a stream into the data of its lines, however the network cuts it."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, part: bytes) -> Iterator[bytes]:
        """Yield the data of the lines that this part completes; comments and other fields are left out.

        Lines end where bytes say so: text may hold other characters that break lines.

        Raises: UnreadableStreamError: a line is longer than any chunk.
        """
        end = part.rfind(b"\n") + 1
        whole = bytes(self._rest) + part[:end] if end else b""
        if end:
            self._rest = bytearray()
        self._rest += part[end:]
        for line in whole.split(b"\n"):
            _check_length(line)
            if line.startswith(b"data:") and (data := line[5:].strip()):
                yield data
        _check_length(self._rest)

    def finish(self) -> bytes:
        """Return the data of a last line that no line break ends; empty for none."""
        line, self._rest = bytes(self._rest), bytearray()
        return line[5:].strip() if line.startswith(b"data:") else b""


def _check_length(line: bytes | bytearray) -> None:
    """Raises: UnreadableStreamError: it is longer than any chunk."""
    if len(line) > MAX_LINE_BYTES:
        raise UnreadableStreamError(f"a line of more than {MAX_LINE_BYTES} bytes")


def logprobs_of(given: Logprobs | None, alternatives: int) -> tuple[DetokenizedLogprob, ...]:
    """Return the tokens of a choice with their log-probabilities, in either route's form.

    Args: alternatives: how many are wanted at each position; a plain completion has the token itself beside them.
    """
    if given is None:
        return ()
    if given.content is not None:
        return tuple(
            _token(
                each.token, each.bytes, each.logprob, _sorted(map(_top_token, each.top_logprobs or ()))[:alternatives]
            )
            for each in given.content
        )
    tokens, tops = given.tokens or [], given.top_logprobs or []
    scores = given.token_logprobs or []
    return tuple(
        _token(text, None, _at(scores, number), _alternatives(_at(tops, number))[:alternatives])
        for number, text in enumerate(tokens)
    )


def _at(items: Sequence[Any], number: int) -> Any:
    return items[number] if number < len(items) else None


def _alternatives(top: dict[str, float | None] | None) -> tuple[DetokenizedLogprob, ...]:
    return _sorted(_token(text, None, logprob) for text, logprob in (top or {}).items())


def _sorted(tokens: Any) -> tuple[DetokenizedLogprob, ...]:
    return tuple(sorted(tokens, key=lambda token: -token.logprob))


def _top_token(token: TopToken) -> DetokenizedLogprob:
    return _token(token.token, token.bytes, token.logprob)


def _token(
    text: str, raw: list[int] | None, logprob: float | None, top: tuple[DetokenizedLogprob, ...] = ()
) -> DetokenizedLogprob:
    """Return a token.  JSON has no infinity, so some servers write nothing for the score of an impossible one."""
    exact = bytes(raw) if raw and max(raw) < 256 and min(raw) >= 0 else text.encode()
    return DetokenizedLogprob(text=text, raw=exact, logprob=-9999.0 if logprob is None else logprob, top=top)


def argument_text(arguments: str | dict[str, Any] | None) -> str:
    """Return a part of a call's arguments as JSON text."""
    return arguments or "" if isinstance(arguments, str | None) else json.dumps(arguments, ensure_ascii=False)
