"""The log-probabilities of one request's prompt, from the worker's token ids to what a client may see."""

from collections import deque
from collections.abc import Iterable

from msgspec import structs

from app.engine.base import Tokenizer
from app.engine.tokenizer.detokenize import MIN_LOGPROB
from app.events import WITHHELD, PromptLogprob
from app.requests import GenerationRequest
from app.types import TokenLogprob

TOKENS_AT_ONCE = 16
"""Tokens that become text before the event loop runs: a millisecond or so with 20 alternatives each."""


class PromptScores:
    """Collects log-probabilities as the prompt is computed, and hands them on a few at a time."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer) -> None:
        prompt_ids = request.prompt_ids or ()
        self._left = len(prompt_ids)
        self._hidden = request.hidden_tokens
        self._length = len(request.text or "")
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder()
        self._end = 0
        # Nothing stands before the first token, so it has no log-probability.
        self._pending: deque[int | TokenLogprob] = deque(prompt_ids[:1])

    def add(self, logprobs: Iterable[TokenLogprob]) -> None:
        """Append those of the next tokens, from the second on."""
        self._pending.extend(logprobs)

    def take(self) -> tuple[PromptLogprob, ...]:
        """Return the next few, or none where there are none yet."""
        count = min(TOKENS_AT_ONCE, len(self._pending))
        return tuple(self._detokenized(self._pending.popleft()) for _ in range(count))

    def _detokenized(self, token: int | TokenLogprob) -> PromptLogprob:
        if self._hidden:
            self._hidden -= 1
            return structs.replace(WITHHELD, end=self._advance(token if isinstance(token, int) else token.token_id))
        if isinstance(token, int):
            return self._entry(token, None, self._advance(token))
        top = tuple(self._entry(other, logprob, 0, place) for place, (other, logprob) in enumerate(token.top, 1))
        return self._entry(token.token_id, token.logprob, self._advance(token.token_id), token.rank, top)

    def _entry(
        self, token: int, logprob: float | None, end: int, rank: int = 0, top: tuple[PromptLogprob, ...] = ()
    ) -> PromptLogprob:
        return PromptLogprob(
            token_id=token,
            text=self._tokenizer.token_text(token),
            raw=self._tokenizer.token_bytes(token),
            logprob=None if logprob is None else max(MIN_LOGPROB, logprob),
            rank=rank,
            top=top,
            end=end,
        )

    def _advance(self, token: int) -> int:
        """Return how many characters of the prompt's text end with this token."""
        self._end = min(self._end + len(self._decoder.feed((token,))), self._length)
        # A tokenizer may have changed the text, and a character may have broken off.
        self._left -= 1
        return self._end if self._left else self._length
