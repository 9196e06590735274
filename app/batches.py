"""Files and batches: requests that a caller sends in a file, and that are answered when nobody else needs the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from app.types import Tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFile:
    """What a caller says of a file."""

    filename: str
    purpose: str
    expires: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file without its content."""

    id: str
    filename: str
    purpose: str
    """`batch` for uploads, `batch_output` for what a batch has written."""
    size: int
    """Bytes of the content."""
    created: datetime
    expires: datetime


class BatchStatus(StrEnum):
    """OpenAI's words for how far a batch has come."""

    VALIDATING = "validating"
    FAILED = "failed"
    """Its file holds no requests that could be answered."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    """Its time is over; the lines without a response get their error."""
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (BatchStatus.FAILED, BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch, or a line of its file, cannot be answered."""

    code: str
    message: str
    line: int | None = None
    """The line's number, from 1; None concerns all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchUsage:
    """Tokens of the responses of a batch, as its routes counted them."""

    input_tokens: int = 0
    cached_tokens: int = 0
    """Of the input, what was in the KV cache."""
    output_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch as its owner sees it."""

    id: str
    tenant: str
    key_id: str
    """The key that created it, which is charged."""
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    status: BatchStatus
    created: datetime
    expires: datetime
    """When the lines without a response are given up."""
    started: datetime | None = None
    finalizing: datetime | None = None
    cancelling: datetime | None = None
    ended: datetime | None = None
    """When it reached its final status."""
    errors: tuple[BatchError, ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    model: str | None = None
    """Of the first response."""
    usage: BatchUsage = BatchUsage()
    output_lifetime: int | None = None
    """Seconds after which what it writes expires; None: when its retention ends."""
    output_file_id: str | None = None
    error_file_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a caller says of a batch."""

    tenant: Tenant
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    window: timedelta
    """From its creation until the lines without a response are given up."""
    output_lifetime: int | None = None


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request of a batch's file."""

    number: int
    """From 1."""
    custom_id: str
    body: bytes
    """The body of the request, JSON."""


@dataclass(frozen=True, slots=True)
class ClaimedLine:
    """A line that this process is to answer."""

    batch_id: str
    number: int
    custom_id: str
    body: bytes
    attempts: int
    """How often it has been claimed and not given back, this time included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LineResult:
    """A line of the output or error file."""

    content: bytes
    failed: bool = False
    """Whether it belongs in the error file."""
    model: str | None = None
    """The model that responded, where one did."""
    usage: BatchUsage = BatchUsage()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """What the store holds of batches, all tenants together."""

    batches: Mapping[str, int]
    """By status."""
    lines: Mapping[str, int]
    """`waiting` and `running` ones of batches in progress; `completed` and `failed` ones of all that are kept."""


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list a caller wants, newest first unless it says otherwise."""

    limit: int
    after: str | None = None
    ascending: bool = field(default=False)


def dumped(errors: tuple[BatchError, ...]) -> list[dict[str, Any]]:
    """Return errors as plain values, for JSON."""
    return [{"code": each.code, "message": each.message, "line": each.line, "param": None} for each in errors]
