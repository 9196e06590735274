"""Find stop strings in a text that arrives in segments.

Decides what may be shown already and what must wait, for one sample.  A stop string that names a token which no text
shows is a stop token.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from app.types import SamplingParams


class HiddenTokens(Protocol):
    """Knows the special tokens of a model; its tokenizer and its engine do."""

    def hidden_token(self, name: str) -> int | None:
        """Return the special token of this name; None where there is none."""


def hidden_stops(sampling: SamplingParams, tokens: HiddenTokens) -> dict[int, str]:
    """Return the stop strings that name special tokens, by those tokens."""
    named = ((tokens.hidden_token(stop), stop) for stop in sampling.stop)
    return {token_id: stop for token_id, stop in named if token_id is not None}


def with_stop_tokens(sampling: SamplingParams, token_ids: Collection[int]) -> SamplingParams:
    """Return parameters by which these tokens end the completion, too."""
    if not token_ids:
        return sampling
    return replace(sampling, stop_token_ids=tuple(sorted({*sampling.stop_token_ids, *token_ids})))


class EndStrings:
    """Finds the texts by which a model ends its completions: they are part of the text, as in transformers."""

    def __init__(self, ends: Sequence[str]) -> None:
        """Take the texts, none of them empty."""
        self._ends = tuple(ends)
        self._longest = max(map(len, ends), default=0)
        self._tail = ""

    def feed(self, text: str) -> bool:
        """Take the next segment and return whether one of the texts ends in it."""
        if not text or not self._ends:
            return False
        start, seen = len(self._tail), self._tail + text
        self._tail = seen[max(0, len(seen) - self._longest + 1) :]
        return any(seen.find(end, max(0, start - len(end) + 1)) >= 0 for end in self._ends)


class StopBuffer:
    """Lets text through up to the first stop string, however the text is cut into segments.

    The first is the one that begins earliest; of those that begin together, the shortest.  Only the part that may
    still become a stop string is buffered.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Take the stop strings, none of them empty."""
        self._stops = tuple(sorted(stops, key=len))
        self._longest_partial = len(self._stops[-1]) - 1 if self._stops else 0
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text; None before there is one."""

    def feed(self, text: str) -> str:
        """Take the next segment and return what is safe to show; empty once a stop string matched."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        held = self._held + text
        wait_from = self._partial(held)
        found = self._first(held)
        if found is not None and found[0] <= wait_from:
            return self._end(held, found)
        # A match that begins after `wait_from` has to wait too: a longer stop string may turn out to begin before it.
        self._held = held[wait_from:]
        return held[:wait_from]

    def finish(self) -> str:
        """Return the buffered text, now that no more comes."""
        if self.matched is not None:
            return ""
        held, self._held = self._held, ""
        found = self._first(held)
        return held if found is None else self._end(held, found)

    def _end(self, held: str, found: tuple[int, str]) -> str:
        start, self.matched = found
        self._held = ""
        return held[:start]

    def _first(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        # `min` returns the first of equals, and the stop strings are sorted by length.
        return min(found, key=lambda item: item[0], default=None)

    def _partial(self, text: str) -> int:
        """Return where the longest end of `text` begins that a stop string could still complete."""
        for start in range(max(0, len(text) - self._longest_partial), len(text)):
            if any(len(stop) > len(text) - start and stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
