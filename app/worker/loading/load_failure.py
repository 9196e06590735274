"""Why a model cannot be loaded, as one line for the operator and as a word for programs."""

import httpx
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.ipc.messages import LoadFailed, LoadFailure
from app.worker.loading.model_files import LoadError, NoMemoryError, one_line

MAX_REASON_CHARS, MAX_DETAIL_CHARS = 700, 300
"""Of the line that says why a model cannot be loaded, and of a library's own words in it."""


def load_failure(error: Exception) -> LoadFailed:
    """Return what the parent is told of an error: one line that an operator can act on, and the reason in a word."""
    kind, reason = _reason(error)
    message = f"The model cannot be loaded: {reason}."
    if isinstance(error, NoMemoryError):
        return LoadFailed(message, kind, error.needed_bytes, error.free_bytes)
    return LoadFailed(message, kind)


def _reason(error: Exception) -> tuple[LoadFailure, str]:
    match error:
        case LoadError():
            return error.reason, one_line(error, MAX_REASON_CHARS).rstrip(". ")
        case torch.OutOfMemoryError() | MemoryError():
            return "no_memory", "it does not fit into memory"
        case GatedRepoError():
            return "gated", "it is gated: accept its terms on the hub and set HF_TOKEN"
        case RevisionNotFoundError():
            return "not_found", "the hub has no such revision of it"
        case RepositoryNotFoundError():
            return "not_found", "the hub has no such model, or it is private and HF_TOKEN is missing or has no access"
        case OfflineModeIsEnabled() | LocalEntryNotFoundError():
            return "unreachable", "the hub cannot be reached and the model has not been downloaded before"
        case HfHubHTTPError():
            return "unreachable", f"the hub answered with an error ({first_words(error)})"
        case httpx.HTTPError():
            return "unreachable", f"the download from the hub broke off ({first_words(error)})"
        case _:
            return "failed", f"{type(error).__name__}: {first_words(error)}"


def is_explained(error: Exception) -> bool:
    """Return whether the reason says all that there is to know; any other error is a defect, or a library's."""
    return isinstance(error, LoadError | torch.OutOfMemoryError | MemoryError | httpx.HTTPError | OSError)


def first_words(error: BaseException) -> str:
    """Return the beginning of a library's message as one line: of a long one whole sentences, if it has any."""
    line = one_line(error, MAX_DETAIL_CHARS + 1)
    if len(line) > MAX_DETAIL_CHARS:
        sentences, end, _ = line.rpartition(". ")
        line = sentences if end else line[:MAX_DETAIL_CHARS]
    return line.rstrip(". ")
