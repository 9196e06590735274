"""How many tokens fit a request, as a model's config.json says.

Decides which of its fields names the context window, and how a scaled rotary embedding widens it.
"""

from typing import Any

from app.worker.loading.model_files import CONTEXT_FIELDS, LoadError

DEFAULT_CONTEXT_LENGTH = 2048
"""For models without a fixed window (ALiBi, recurrent) whose configuration names none."""
MIN_CONTEXT_LENGTH = 2
"""A prompt of one token, and one more."""
WIDENING = ("yarn", "linear", "dynamic")
"""Kinds of rotary scaling whose factor the field of the window does not include; that of the others it does."""


def derive_context_length(config: Any, limit: int | None) -> int:
    """Return how many tokens fit a request, `limit` at most.

    Raises: LoadError: too few for any.
    """
    text = config.get_text_config(decoder=True)
    name, length = next(
        ((name, int(value)) for name in CONTEXT_FIELDS if (value := getattr(text, name, None))),
        ("context length", DEFAULT_CONTEXT_LENGTH),
    )
    length = _widened(text, length)
    if length < MIN_CONTEXT_LENGTH:
        raise LoadError(f"config.json: {name} is {length}; a prompt and its answer need at least {MIN_CONTEXT_LENGTH}")
    return min(length, limit) if limit is not None else length


def _widened(text: Any, length: int) -> int:
    """Return the window with the factor of a scaled rotary embedding.

    Yarn's factor is of the window before it, which may not be the one that the field names.  Parameters for kinds of
    layers (Gemma 3) widen nothing: the field includes them.

    Source: vLLM, `_get_and_verify_max_len`.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if kind not in WIDENING or not isinstance(factor, int | float):
        return length
    return int((original if kind == "yarn" and isinstance(original, int) else length) * factor)
