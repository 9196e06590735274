"""Request checks that every runner makes, and the client's message when a request fails later."""

from collections.abc import Container

import torch

from app.ipc.messages import Submit
from app.types import SamplingParams
from app.worker.loaded_model import LoadedModel

NO_MEMORY = ("out of memory", "ALLOC_FAILED", "allocate memory")


def check_request(request: Submit, model: LoadedModel, adapters: Container[str] = ()) -> None:
    """Repeat the checks of the API process: a bad token id would end every request in its batch.

    Args: adapters: the digests of those that are loaded.
    Raises: ValueError: the model cannot run it; the message is for the client.
    """
    prompt, params = request.prompt_ids, request.params
    if request.adapter is not None and request.adapter not in adapters:
        raise ValueError("The adapter of this request is no longer loaded.")
    if not prompt:
        raise ValueError("The prompt holds no token.")
    if not all(0 <= token < model.vocab_size for token in (*prompt, *params.stop_token_ids)):
        raise ValueError("The request holds a token outside the model's vocabulary.")
    if params.max_tokens < 0 or len(prompt) + params.max_tokens > model.context_length:
        raise ValueError(f"The prompt and its answer do not fit {model.context_length} tokens.")


def end_ids(params: SamplingParams, model: LoadedModel) -> frozenset[int]:
    """Return the tokens that end this request's completion."""
    return frozenset(params.stop_token_ids).union(() if params.ignore_eos else model.end_ids)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether there was no memory for what failed; libraries below torch say it in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def failure_reason(error: Exception) -> str:
    """Return the client's message for an error; it never contains the request's own words."""
    if is_out_of_memory(error):
        return "The model ran out of memory on this request. Try a shorter prompt."
    return f"The model failed on this request ({type(error).__name__})."
