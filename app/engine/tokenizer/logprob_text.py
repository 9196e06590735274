"""What a client may see of a token: its text in place of its number.  Knows no dialect."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.base import Tokenizer
from app.types import TokenLogprob

LEAST_LOGPROB = -9999.0
"""Stands for an impossible token, since JSON has no infinity; OpenAI's API says the same number."""


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A token and how likely the model found it."""

    text: str
    """What the token says on its own; an incomplete character is U+FFFD."""
    raw: bytes
    """The same, exact."""
    logprob: float
    top: tuple["AnswerToken", ...] = ()
    """The most likely tokens in this place, most likely first."""


def spell(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> tuple[AnswerToken, ...]:
    """Put text to the tokens of an answer."""

    def spelled(token_id: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> AnswerToken:
        return AnswerToken(
            text=tokenizer.token_text(token_id),
            raw=tokenizer.token_bytes(token_id),
            # This way round a NaN is taken for impossible too.
            logprob=max(LEAST_LOGPROB, logprob),
            top=tuple(spelled(*other) for other in top),
        )

    return tuple(spelled(token.token_id, token.logprob, token.top) for token in logprobs)
