"""Everything that can go wrong, as classes that carry their own HTTP status (a plain int).

`web/http/errors.py` renders them, in the format of the dialect that the path belongs to.

AppError
├── InvalidRequest            400  ├── ContextLengthExceeded ── InputTooLong  ├── PromptTooLong  ├── PiiBlocked
│                                  ├── PreviousResponseNotFound
├── Unauthorized              401
├── Forbidden                 403
├── NotFound                  404  ├── ModelNotFound  ├── AdapterNotFound  ├── SessionNotFound  ├── KeyNotFound
│                                  ├── RoleNotFound  ├── FileNotFound  ├── BatchNotFound
├── Conflict                  409  ├── SessionUnreadable
├── PayloadTooLarge           413  ├── StorageExceeded
├── UnsupportedMediaType      415
├── ModelLoadFailed           424  ├── ModelRefused
├── RateLimited               429
├── QuotaExceeded             429
├── ServiceUnavailable        503  ├── EngineNotReady  ├── EngineBusy  ├── EngineFailed  ├── ShuttingDown
│                                  ├── StoreUnavailable  ├── InsufficientMemory  ├── RegistryUnavailable
│                                  ├── SessionTakenOver
├── DeadlineExceeded          504
├── ClientDisconnected        499
└── InternalError             500
ConfigError (not a reply to a client: it ends the start)
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

_PLAIN_NAME = re.compile(r"[a-z_]+|[a-z]+(?:[A-Z][a-z]+)+")
MAX_NAME_CHARS = 40


def is_plain_name(name: str) -> bool:
    """Return whether a name that somebody else invented may be repeated in a message or a log line.

    Words, as in `max_tokens` and `maxTokens`; anything else may be a card number, an address or a key in the wrong
    place.
    """
    return len(name) <= MAX_NAME_CHARS and _PLAIN_NAME.fullmatch(name) is not None


class AppError(Exception):
    """An error that a client may see.  `message` says what the client can do; it never echoes input."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_server_error"
    usual_retry_after: ClassVar[float | None] = None
    """The default of `retry_after`, for errors raised without one."""

    def __init__(
        self, message: str, *, details: Mapping[str, Any] | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = dict(details or {})
        self.retry_after = self.usual_retry_after if retry_after is None else retry_after
        """Seconds until the same request may succeed; sent as Retry-After, rounded up."""


class InvalidRequest(AppError):
    """The request itself is wrong; `details["errors"]` names each field and reason."""

    status, code = 400, "validation_error"

    @staticmethod
    def of_field(field: str, reason: str) -> "InvalidRequest":
        """Return the error of one field; the message is the field's name followed by `reason`."""
        return InvalidRequest(f"{field} {reason}", details={"errors": [{"field": field, "reason": reason}]})


class ContextLengthExceeded(InvalidRequest):
    """Prompt and max_tokens together do not fit the model's context window."""

    code = "context_length_exceeded"

    def __init__(self, *, prompt_tokens: int, max_tokens: int, limit: int, counted: bool = True) -> None:
        """Args: counted: False where the prompt has at least so many tokens and was not encoded to count them all."""
        # Clients recognise the error by OpenAI's first words.
        least = "" if counted else "at least "
        super().__init__(
            f"This model's maximum context length is {limit} tokens, but the request needs "
            f"{least}{prompt_tokens + max_tokens}: {least}{prompt_tokens} for the prompt and {max_tokens} for the "
            "completion. Shorten the prompt, lower max_tokens, or let older turns go with truncation.",
            details={"prompt_tokens": prompt_tokens, "max_tokens": max_tokens, "limit": limit},
        )


class InputTooLong(ContextLengthExceeded):
    """A text to embed has more tokens than the model reads."""

    def __init__(self, *, index: int, tokens: int, limit: int) -> None:
        InvalidRequest.__init__(
            self,
            f"The text at index {index} has {tokens} tokens, and the model embeds at most {limit}. "
            "Shorten or split it, or let truncate_prompt_tokens: -1 cut it.",
            details={"index": index, "prompt_tokens": tokens, "limit": limit},
        )


class PromptTooLong(InvalidRequest):
    """More characters than `security.max_prompt_chars` allows, before any token is counted."""

    def __init__(self, field: str, *, length: int, limit: int) -> None:
        reason = f"has {length} characters; this service takes at most {limit} (security.max_prompt_chars)"
        super().__init__(f"{field} {reason}", details={"errors": [{"field": field, "reason": reason}]})


class PiiBlocked(InvalidRequest):
    """Personal data was found and the policy is to refuse, not to mask."""

    code = "pii_blocked"


class Unauthorized(AppError):
    """No API key, or one that is not valid."""

    status, code = 401, "unauthorized"


class Forbidden(AppError):
    """The key is valid, but its role does not allow this; `details["errors"]` names the field, if it is one."""

    status, code = 403, "forbidden"

    @staticmethod
    def of_field(field: str, reason: str) -> "Forbidden":
        """Return the error of one field; the message is the field's name followed by `reason`."""
        return Forbidden(f"{field} {reason}", details={"errors": [{"field": field, "reason": reason}]})


class NotFound(AppError):
    """Nothing is there for this caller."""

    status, code = 404, "not_found"


class ModelNotFound(NotFound):
    """The named model is not loaded."""


class AdapterNotFound(NotFound):
    """The named adapter is not loaded."""


class SessionNotFound(NotFound):
    """The caller has no session of this id."""


class PreviousResponseNotFound(InvalidRequest):
    """The caller has no stored response that a request could continue."""

    code = "previous_response_not_found"

    def __init__(self) -> None:
        reason = "names no stored response of yours; it may have expired, or was created with store: false"
        super().__init__(
            f"previous_response_id {reason}", details={"errors": [{"field": "previous_response_id", "reason": reason}]}
        )


class KeyNotFound(NotFound):
    """There is no API key of this id."""


class RoleNotFound(NotFound):
    """There is no role of this name."""


class FileNotFound(NotFound):
    """The caller has no file of this id."""


class BatchNotFound(NotFound):
    """The caller has no batch of this id."""


class Conflict(AppError):
    """What is there already does not allow this."""

    status, code = 409, "conflict"


class SessionUnreadable(Conflict):
    """A stored conversation is damaged, or encrypted with a key that this service does not have."""

    code = "session_unreadable"

    def __init__(self, what: str = "session") -> None:
        """Args: what: is stored; a session or a response."""
        super().__init__(f"The stored {what} cannot be read. Delete it, or begin a new one.")


class PayloadTooLarge(AppError):
    """The body is longer than the service reads."""

    status, code = 413, "payload_too_large"


class StorageExceeded(PayloadTooLarge):
    """The caller's stored files take as much as they may."""

    code = "storage_exceeded"

    def __init__(self, *, limit: int, stored: int) -> None:
        super().__init__(
            f"Your files take {stored} bytes, and may take {limit} (batches.max_stored_bytes). Delete some of them.",
            details={"limit": limit, "stored": stored},
        )


class UnsupportedMediaType(AppError):
    """The body is not application/json."""

    status, code = 415, "unsupported_media_type"


class ModelLoadFailed(AppError):
    """A model cannot be loaded, and trying again would not help; `details["reason"]` says why in a word."""

    status, code = 424, "model_load_failed"


class ModelRefused(ModelLoadFailed):
    """A registry has this model, but not in a form that this service loads."""

    def __init__(self, message: str) -> None:
        super().__init__(message, details={"reason": "unsupported"})


class RateLimited(AppError):
    """This caller sent too much too fast; `retry_after` says when to come back."""

    status, code = 429, "rate_limit_exceeded"


class QuotaExceeded(AppError):
    """The key's tokens of this month do not suffice; `details` says limit, used and when a new month begins."""

    status, code = 429, "quota_exceeded"


class ServiceUnavailable(AppError):
    """The service cannot do this now through no fault of the caller."""

    status, code = 503, "service_unavailable"
    usual_retry_after = 5.0


class EngineNotReady(ServiceUnavailable):
    """The model is still loading, or being started again."""


class InsufficientMemory(ServiceUnavailable):
    """A model does not fit into the memory that is free; `details` says how many bytes are needed and free."""

    code = "insufficient_memory"
    usual_retry_after = 30.0


class EngineBusy(ServiceUnavailable):
    """The waiting line is full; the same request may succeed later."""


class EngineFailed(ServiceUnavailable):
    """The model's worker failed or died during this request."""


class StoreUnavailable(ServiceUnavailable):
    """The database, or Redis, does not answer, or cannot be read or written."""

    def __init__(self, fault: str = "does not answer", *, store: str = "database") -> None:
        """Args: fault: what is wrong, as a continuation of the store's name."""
        super().__init__(f"The service's {store} {fault}; try again in a moment.", retry_after=2)


class RegistryUnavailable(ServiceUnavailable):
    """The registry of models cannot be reached, or answers with nothing that can be used."""

    def __init__(self, message: str) -> None:
        super().__init__(message, details={"reason": "unreachable"})


class SessionTakenOver(ServiceUnavailable):
    """This service did not get on with a turn for so long that another replica has taken the session."""

    def __init__(self) -> None:
        super().__init__(
            "Another request has taken over the session meanwhile, so this turn is not stored; send it again.",
            retry_after=1,
        )


class ShuttingDown(ServiceUnavailable):
    """The service is draining and takes no new work; a load balancer soon sends the request elsewhere."""

    def __init__(self) -> None:
        super().__init__("The service is shutting down; send the request to another replica.")


class DeadlineExceeded(AppError):
    """The request waited or ran longer than its deadline."""

    status, code = 504, "deadline_exceeded"


class ClientDisconnected(AppError):
    """The client hung up; nobody reads this answer, the access log does (nginx's status 499)."""

    status, code = 499, "client_disconnected"


class InternalError(AppError):
    """A defect of ours; the log holds the traceback under the request id."""


class ConfigError(Exception):
    """The configuration is wrong; the message names each key and reason and no secret."""
