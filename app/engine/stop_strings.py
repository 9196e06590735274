"""Find stop strings in a text that arrives in segments.

Decides what may be shown already and what must wait.  Works on text alone, for one sample.
"""

from collections.abc import Sequence


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
