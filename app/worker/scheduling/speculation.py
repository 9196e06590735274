"""Speculative decoding by prompt lookup: guess the next tokens from where the last ones stood before.

The guesses are computed in the same pass as the last token.  Behind each that proves to be the sampled token the next
one is sampled, as it would have been without guesses, so completions are the same, token for token.  That is the
rejection sampling of Leviathan et al., 2023 (arXiv:2211.17192), for guesses that are certain.  Source of the lookup:
Saxena, Prompt Lookup Decoding, 2023.
"""

from collections.abc import Sequence as TokenIds
from itertools import cycle, islice

NGRAM = 3
"""Tokens that must have stood together before; fewer guess more often and worse."""
MIN_DRAFT, MAX_DRAFT = 2, 10
"""Tokens of a guess: twice as many as before while all were right."""
MAX_PAUSE = 64
"""Tokens without a guess after many wrong ones, at most: text that repeats nothing costs next to nothing."""
STEP_DRAFTS = 16
"""Guessed tokens of all sequences in a step, at most: with more tokens in it, a step takes longer."""


class NgramDrafter:
    """The guesses for one sequence."""

    def __init__(self) -> None:
        self._follows: dict[tuple[int, ...], int] = {}
        """Three tokens -> the position behind their last occurrence but for the sequence's end."""
        self._indexed = NGRAM
        """Positions before this one are in it."""
        self._length = MIN_DRAFT
        self._misses = 0
        self._resume_at = 0
        """How long the sequence is when guesses begin again."""

    def propose(self, token_ids: TokenIds[int], limit: int) -> tuple[int, ...]:
        """Return what may follow, at most `limit` tokens; nothing where the last tokens are new."""
        for end in range(self._indexed, len(token_ids)):
            self._follows[tuple(token_ids[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(token_ids))
        if len(token_ids) < self._resume_at:
            return ()
        start = self._follows.get(tuple(token_ids[-NGRAM:]))
        if start is None:
            return ()
        # What repeats itself with so short a period that the end is reached is continued in the same way.
        period = token_ids[start:]
        return tuple(islice(cycle(period), min(self._length, limit)))

    def learn(self, *, proposed: int, accepted: int, length: int) -> None:
        """Guess more after what was right, and pause after what was wrong.

        Args:
            proposed: tokens of the last guess, >= 1.
            accepted: those that were right.
            length: tokens of the sequence now.
        """
        if accepted:
            self._misses = 0
            self._length = min(MAX_DRAFT, 2 * self._length) if accepted == proposed else max(MIN_DRAFT, accepted)
        else:
            self._misses += 1
            self._length = MIN_DRAFT
            self._resume_at = length + min(MAX_PAUSE, 2**self._misses)
