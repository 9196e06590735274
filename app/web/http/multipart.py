"""Reads multipart/form-data as it arrives: one file as a stream, and a few short fields.

Strict where forms leave choices: nothing before the first part, no nested or encoded parts, each field once.
"""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from email.message import Message
from enum import Enum, auto

from app.errors import InvalidRequest, UnsupportedMediaType
from app.web.http.header_parameters import parameter

MAX_BOUNDARY_BYTES = 200
MAX_PART_HEAD_BYTES = 4096
MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16

_DISPOSITION, _ENCODING = "content-disposition", "content-transfer-encoding"
_UNENCODED = ("binary", "8bit", "7bit")


@dataclass(frozen=True, slots=True)
class PartStarted:
    """A part begins; its content follows, up to the next of these."""

    name: str
    filename: str | None
    """None: it is a field."""


class _State(Enum):
    START = auto()
    AFTER_DELIMITER = auto()
    HEAD = auto()
    CONTENT = auto()
    END = auto()


class MultipartParser:
    """Splits the bytes of a body, in whatever portions they come, into parts and their contents."""

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        # The first delimiter has no line before it, whose end would belong to it.
        self._buffer = bytearray(b"\r\n")
        self._state = _State.START

    def feed(self, data: bytes) -> Iterator[PartStarted | bytes]:
        """Yield what is complete.

        Raises: InvalidRequest: this is no form, or not one in this strict form.
        """
        if self._state is _State.END:
            return  # what follows the last delimiter means nothing
        self._buffer += data
        while (found := self._next()) is not None:
            if found:
                yield found

    def close(self) -> None:
        """Raises: InvalidRequest: the body ended too soon."""
        if self._state is not _State.END:
            raise _malformed("it ends before its last part does")

    def _next(self) -> PartStarted | bytes | None:
        """Take one step: what it yields, b"" for nothing, or None where more bytes are needed."""
        match self._state:
            case _State.START:
                return self._skip_first_delimiter()
            case _State.AFTER_DELIMITER:
                return self._after_delimiter()
            case _State.HEAD:
                return self._head()
            case _State.CONTENT:
                return self._content()
            case _State.END:
                return None

    def _skip_first_delimiter(self) -> bytes | None:
        if len(self._buffer) < len(self._delimiter):
            return None
        if not self._buffer.startswith(self._delimiter):
            raise _malformed("it does not begin with its boundary")
        del self._buffer[: len(self._delimiter)]
        self._state = _State.AFTER_DELIMITER
        return b""

    def _after_delimiter(self) -> bytes | None:
        if len(self._buffer) < 2:
            return None
        follows = bytes(self._buffer[:2])
        if follows not in (b"\r\n", b"--"):
            raise _malformed("a boundary is followed by something else than a part")
        del self._buffer[:2]
        self._state = _State.HEAD if follows == b"\r\n" else _State.END
        return b""

    def _head(self) -> PartStarted | None:
        end = self._buffer.find(b"\r\n\r\n")
        if max(end, len(self._buffer) if end < 0 else 0) > MAX_PART_HEAD_BYTES:
            raise _malformed("the headers of a part are too long")
        if end < 0:
            return None
        head = bytes(self._buffer[:end])
        del self._buffer[: end + 4]

        self._state = _State.CONTENT
        return _part(head)

    def _content(self) -> bytes | None:
        end = self._buffer.find(self._delimiter)
        if end >= 0:
            content = bytes(self._buffer[:end])
            del self._buffer[: end + len(self._delimiter)]
            self._state = _State.AFTER_DELIMITER
            return content
        ready = len(self._buffer) - len(self._delimiter) + 1
        if ready <= 0:
            return None
        content = bytes(self._buffer[:ready])
        del self._buffer[:ready]
        return content


class UploadForm:
    """The form of an upload: `content` reads the body, and the fields are known once it has ended."""

    def __init__(self, content_type: str, body: AsyncIterator[bytes], *, fields: frozenset[str]) -> None:
        """Args: fields: names of the fields that the form may have beside `file`.
        Raises: UnsupportedMediaType: the body is no form.
        """
        self._parser = MultipartParser(_boundary(content_type))
        self._body = body
        self._allowed = fields
        self._read: dict[str, bytearray] = {}
        self.filename: str | None = None

    async def content(self) -> AsyncIterator[bytes]:
        """Yield the file.

        Raises: InvalidRequest: the form is malformed, or has other parts than it should.
        """
        field: bytearray | None = None
        async for data in self._body:
            for found in self._parser.feed(data):
                if isinstance(found, PartStarted):
                    field = self._begin(found)
                elif field is None:
                    yield found
                else:
                    field += found
                    if len(field) > MAX_FIELD_BYTES:
                        raise _malformed("a field is too long")
        self._parser.close()
        if self.filename is None:
            raise InvalidRequest.of_field("file", "is missing")

    def _begin(self, part: PartStarted) -> bytearray | None:
        """Return where the content of a field goes; None for the file."""
        if part.name == "file":
            if part.filename is None or self.filename is not None:
                raise InvalidRequest.of_field("file", "must be one file, sent with its name")
            self.filename = part.filename
            return None
        if part.name not in self._allowed or part.filename is not None:
            raise _malformed(f"its fields are file, {', '.join(sorted(self._allowed))}, and nothing else")
        if part.name in self._read or len(self._read) == MAX_FIELDS:
            raise _malformed("a field comes twice")
        return self._read.setdefault(part.name, bytearray())

    @property
    def fields(self) -> dict[str, str]:
        """Return the fields.

        Raises: InvalidRequest: one is not UTF-8.
        """
        try:
            return {name: value.decode() for name, value in self._read.items()}
        except UnicodeDecodeError:
            raise _malformed("a field is not UTF-8") from None


def _boundary(content_type: str) -> bytes:
    message = Message()
    message["content-type"] = content_type
    try:
        boundary = parameter(message, "boundary")
    except ValueError:
        boundary = None
    if message.get_content_type() != "multipart/form-data" or not boundary:
        raise UnsupportedMediaType("Send the file as multipart/form-data.")
    if len(boundary) > MAX_BOUNDARY_BYTES or not boundary.isascii():
        raise _malformed("its boundary is too long, or not ASCII")
    return boundary.encode()


def _part(head: bytes) -> PartStarted:
    """Read the headers of a part."""
    message = Message()
    try:
        lines = head.decode().split("\r\n")
    except UnicodeDecodeError:
        raise _malformed("the headers of a part are not UTF-8") from None
    for line in lines:
        header, colon, value = line.partition(":")
        if not colon or header in message:
            raise _malformed("a part has a header twice, or one without a value")
        message[header] = value.strip()
    if message.get_content_disposition() != "form-data" or message.get(_ENCODING, "binary") not in _UNENCODED:
        raise _malformed("a part is none of a form, or encoded")
    try:
        name, filename = (parameter(message, each, header=_DISPOSITION) for each in ("name", "filename"))
    except ValueError:
        raise _malformed("the name of a part cannot be read") from None
    if name is None:
        raise _malformed("a part has no name")
    return PartStarted(name, filename)


def _malformed(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The body is not the form of an upload: {reason}.")
