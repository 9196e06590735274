"""Reads the file of a batch: one JSON object in each line, with an id of the caller's, an endpoint and a request.

The requests themselves are not looked at: each is validated when it is answered, as its route does.
"""

import unicodedata
from collections.abc import AsyncIterator, Collection
from hashlib import sha256
from typing import Any

import msgspec

from app.batches import BatchError, InputLine

MAX_ERRORS = 20
"""Errors that a failed batch names."""
MAX_ID_CHARS = 256


class InvalidBatch(Exception):
    """The file cannot be answered; `errors` says why."""

    def __init__(self, errors: Collection[BatchError]) -> None:
        super().__init__("the file of a batch cannot be answered")
        self.errors = tuple(errors)


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


_decoder = msgspec.json.Decoder(_Line)


class BatchInput:
    """Reads the lines of one file."""

    def __init__(self, endpoint: str, *, max_lines: int) -> None:
        self._endpoint = endpoint
        self._max_lines = max_lines
        self._seen: set[bytes] = set()
        self._errors: list[BatchError] = []

    async def lines(self, content: AsyncIterator[bytes]) -> AsyncIterator[list[InputLine]]:
        """Yield the requests, some at a time, as the content comes.

        Raises: InvalidBatch: once the file has been read, or has too many errors or lines.
        """
        number = 0
        async for raw in _split(content):
            parsed = []
            for line in raw:
                number += 1
                if not line.strip():
                    continue
                if (one := self._parsed(line, number)) is not None:
                    parsed.append(one)
                if len(self._seen) > self._max_lines:
                    message = f"The file has more than {self._max_lines} requests (batches.max_lines)."
                    raise InvalidBatch([*self._errors, BatchError("too_many_requests", message)])
            if parsed:
                yield parsed
        if not self._seen and not self._errors:
            self._errors.append(BatchError("empty_file", "The file holds no requests."))
        if self._errors:
            raise InvalidBatch(self._errors)

    def _parsed(self, line: bytes, number: int) -> InputLine | None:
        """Return a line's request, or note what is wrong with it.

        Raises: InvalidBatch: it is one of too many.
        """
        found = self._decoded(line)
        if isinstance(found, InputLine):
            return InputLine(number, found.custom_id, found.body)
        self._errors.append(BatchError(*found, number))
        if len(self._errors) >= MAX_ERRORS:
            raise InvalidBatch(self._errors)
        return None

    def _decoded(self, line: bytes) -> InputLine | tuple[str, str]:
        """Return the request, or code and message of what is wrong."""
        try:
            value = _decoder.decode(line)
        except msgspec.ValidationError:
            return "invalid_line", "The line needs custom_id, method and url as texts and body, and nothing else."
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return "invalid_json_line", "The line is not valid JSON."
        if not 0 < len(value.custom_id) <= MAX_ID_CHARS or _has_controls(value.custom_id):
            return "invalid_custom_id", f"custom_id must have 1 to {MAX_ID_CHARS} printable characters."
        if value.method != "POST":
            return "invalid_method", "method must be POST."
        if value.url != self._endpoint:
            return "mismatched_endpoint", "url must be the endpoint of the batch."
        if not bytes(value.body).lstrip().startswith(b"{"):
            return "invalid_request", "body must be an object."
        digest = sha256(value.custom_id.encode()).digest()
        if digest in self._seen:
            return "duplicate_custom_id", "custom_id must differ from those of the lines before."
        self._seen.add(digest)
        return InputLine(0, value.custom_id, bytes(value.body))


def endpoint_of(first_line: bytes) -> str | None:
    """Return the endpoint that a line names, None if it names none."""
    try:
        value: Any = _decoder.decode(first_line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return str(value.url)


def _has_controls(text: str) -> bool:
    return any(unicodedata.category(each) in ("Cc", "Cs") for each in text)


async def _split(content: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Yield the whole lines of each part of the content, without their ends; then the last one, if it has no end."""
    rest: list[bytes] = []
    async for part in content:
        first, *others = part.split(b"\n")
        rest.append(first)
        if others:
            *whole, last = [b"".join(rest), *others]
            yield whole
            rest = [last]
    yield [b"".join(rest)]
