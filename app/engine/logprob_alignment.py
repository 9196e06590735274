"""Keep log-probabilities back until the text of their tokens is shown.

What stands between a model and its reader shows less text than there is: a stop string cuts it, a filter holds a tail
back.  Decides by character counts which tokens belong to the text that was let out; knows neither text nor reader.
"""

from collections import deque

from app.engine.base import Chunk
from app.types import TokenLogprob


class TokenSpans:
    """The tokens of one answer, each with the place in the whole text where it ends.

    A token may be shown once its last character is.  One without text (part of a character, a control token) ends
    where the next text does, or with the answer.
    """

    def __init__(self) -> None:
        self._made = 0
        """Characters of the whole text up to now."""
        self._shown = 0
        self._placed: deque[tuple[int, TokenLogprob]] = deque()
        self._textless: list[TokenLogprob] = []

    def add(self, text: str, token: TokenLogprob | None) -> None:
        """Take in the next token and the text that it completes; None takes in the text alone."""
        if token is not None:
            self._textless.append(token)
        if text:
            self._place(len(text))

    def finish(self, text: str = "") -> None:
        """Take in the rest of the whole text; no token follows."""
        self._place(len(text))

    def follow(self, chunk: Chunk) -> None:
        """Take in a piece whose tokens have been placed already."""
        self._placed.extend(
            (self._made + end, token) for end, token in zip(chunk.token_ends, chunk.logprobs, strict=True)
        )
        self._made += len(chunk.text)

    def show(self, characters: int) -> tuple[tuple[TokenLogprob, ...], tuple[int, ...]]:
        """Show the next so many characters.

        Returns: the tokens that may be shown with them, and for each how many of these characters it ends after.
        """
        before, self._shown = self._shown, self._shown + characters
        shown = []
        while self._placed and self._placed[0][0] <= self._shown:
            shown.append(self._placed.popleft())
        return tuple(token for _, token in shown), tuple(end - before for end, _ in shown)

    def _place(self, characters: int) -> None:
        self._made += characters
        self._placed.extend((self._made, token) for token in self._textless)
        self._textless.clear()
