"""Ends a completion at a stop string of its answer; what it thinks and calls is not looked at."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from app.engine.parsing.output import Part
from app.engine.stop_strings import StopBuffer


class AnswerStops:
    """Lets parts through up to the first stop string in the text of the answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Take the stop strings, none of them empty."""
        self._stops = StopBuffer(stops)
        self._held: deque[Part] = deque()
        """Text that has not been released; the first may be released in part."""

    @property
    def matched(self) -> str | None:
        """Return the stop string that ended the answer; None before there is one."""
        return self._stops.matched

    def feed(self, parts: Iterable[Part]) -> list[Part]:
        """Return what is safe to show of more parts."""
        return list(self._feed(parts))

    def finish(self) -> list[Part]:
        """Return the text that has been held back, now that no more comes."""
        return list(self._release(len(self._stops.finish())))

    def _feed(self, parts: Iterable[Part]) -> Iterator[Part]:
        for part in parts:
            if self.matched is not None:
                return
            if part.text:
                self._held.append(part)
                yield from self._release(len(self._stops.feed(part.text)))
            else:
                # No stop string reaches over a thought or a call.
                yield from self._release(len(self._stops.finish()))
                if self.matched is None:
                    yield part

    def _release(self, characters: int) -> Iterator[Part]:
        while characters:
            part = self._held.popleft()
            shown, rest = part.text[:characters], part.text[characters:]
            characters -= len(shown)
            if rest:
                self._held.appendleft(replace(part, text=rest))
            yield replace(part, text=shown, end=part.end - len(rest))
