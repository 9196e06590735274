"""Turns token ids into what a client may see of them."""

from collections.abc import Sequence

from app.engine.base import Tokenizer
from app.events import DetokenizedLogprob
from app.types import TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for an impossible token, since JSON has no infinity; OpenAI's API uses the same number."""


def detokenize(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of all these tokens."""
    decoder = tokenizer.decoder()
    return decoder.feed(token_ids) + decoder.finish()


def detokenize_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> tuple[DetokenizedLogprob, ...]:
    """Return log-probabilities with the text of their tokens in place of the ids."""

    def detokenized(token_id: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> DetokenizedLogprob:
        return DetokenizedLogprob(
            text=tokenizer.token_text(token_id),
            raw=tokenizer.token_bytes(token_id),
            # In this order a NaN counts as impossible too.
            logprob=max(MIN_LOGPROB, logprob),
            top=tuple(detokenized(*other) for other in top),
            token_id=token_id,
        )

    return tuple(detokenized(token.token_id, token.logprob, token.top) for token in logprobs)
