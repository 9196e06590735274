"""Decide which parts of a text are personal data, and replace them, in whole texts and in texts that arrive in pieces.

Both ways go through one left-to-right scan: the leftmost entity is taken, of several at one place the longest, and the
scan goes on behind it as if the text began there.  What the scan decides at a place depends on a bounded piece of text
around it, so a stream is cut where the rest is undecided (`first_open`) and yields exactly what the whole text would.
It does not know chat, HTTP or what to do when something is found: `filters.py` does.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import phonenumbers
import stdnum

from app.privacy.numbers import Matcher
from app.privacy.patterns import (
    LEFT_REACH,
    LOCAL_PART,
    PATTERN_VERSION,
    STRENGTH,
    TRIGGER,
    PiiKind,
    email_around,
    first_open,
    key_rest,
    matchers,
)
from app.privacy.shadow_text import Shadow

__all__ = ["PiiKind", "PiiMatch", "Redaction", "Redactor", "StreamRedactor"]


@dataclass(frozen=True, slots=True)
class PiiMatch:
    """An entity and where it stands."""

    kind: PiiKind
    start: int
    """Offset in the original text, in characters."""
    end: int
    """One past the last character."""


@dataclass(frozen=True, slots=True)
class Redaction:
    """A text without its entities, and how many of each kind there were (kinds that were not found are left out)."""

    text: str
    counts: dict[PiiKind, int]


@dataclass(frozen=True, slots=True)
class _Progress:
    """What a scan decided."""

    matches: list[PiiMatch]
    """Offsets in the shadow."""
    decided: int
    """Where the undecided rest begins, in the shadow."""
    growing: re.Pattern[str] | None
    """Set if the last match is a key that reaches the end: how it goes on."""


class Redactor:
    """Finds personal data in texts and replaces it with placeholders such as "[EMAIL]".

    Unchanging, so that threads may share one.  Redacting twice is the same as once.
    """

    def __init__(self, entities: Collection[PiiKind] = tuple(PiiKind), *, phone_region: str = "US") -> None:
        """
        Args:
            entities: what to look for.
            phone_region: whose national phone numbers are known, as two capital letters (CLDR).
        Raises: ValueError: the phone region, or one of the entities, does not exist.
        """
        self._kinds = frozenset(PiiKind(kind) for kind in entities)
        self._matchers = matchers(self._kinds, phone_region)
        self._phone_region = phone_region

    @property
    def fingerprint(self) -> str:
        """Names everything that decides what is found, for the keys of caches that hold filtered text."""
        kinds = ",".join(sorted(self._kinds))
        libraries = f"phonenumbers/{phonenumbers.__version__};stdnum/{stdnum.__version__}"
        return f"pii/{PATTERN_VERSION};{kinds};{self._phone_region};{libraries}"

    def find(self, text: str) -> list[PiiMatch]:
        """The entities in `text`, from left to right, none overlapping another."""
        shadow = Shadow.of(text)
        found = self.scan(shadow.text, 0, len(shadow.text)).matches
        return [PiiMatch(match.kind, *shadow.span(match.start, match.end)) for match in found]

    def redact(self, text: str) -> Redaction:
        """`text` with every entity replaced by its placeholder."""
        pieces, counts, done = list[str](), dict[PiiKind, int](), 0
        for match in self.find(text):
            pieces += text[done : match.start], _placeholder(match.kind)
            counts[match.kind] = counts.get(match.kind, 0) + 1
            done = match.end
        return Redaction("".join([*pieces, text[done:]]), counts)

    def scan(self, shadow: str, begin: int, decided: int) -> _Progress:
        """Find the entities that begin in `shadow[begin:decided]`; for this module.

        Args:
            shadow: a shadow text, from at least `LEFT_REACH` characters before `begin` or from its own beginning.
            decided: the place from which on more text could change the outcome; the length if there is no more.
        """
        return _Scan(shadow, begin, decided, self._matchers, PiiKind.EMAIL in self._kinds).run()


def _placeholder(kind: PiiKind) -> str:
    """What stands for an entity.  No pattern may match in or across it: "[" and "]" are part of no entity."""
    return f"[{kind.upper()}]"


class _Scan:
    """One pass over a shadow.  Every place is tried once, and again only if an entity ends there."""

    def __init__(self, shadow: str, begin: int, decided: int, each: dict[PiiKind, Matcher], emails: bool) -> None:
        self._shadow, self._decided, self._matchers, self._emails = shadow, decided, each, emails
        # Nothing before the floor is seen: there a replaced entity, or the text, begins.
        self._floor = 0
        self._begin = begin
        self._at = self._next_at(begin)
        self._email: tuple[int, int] | None = None
        self._matches: list[PiiMatch] = []
        self._place = begin

    def run(self) -> _Progress:
        trigger, ended = -1, False
        while True:
            if trigger < self._place:
                found = TRIGGER.search(self._shadow, self._place)
                trigger = found.start() if found else len(self._shadow)
            # Directly behind an entity anything may begin, although the trigger sees the entity's last letter there.
            start = self._earlier_email(min(self._place if ended else trigger, self._decided))
            if start >= self._decided:
                return _Progress(self._matches, self._decided, None)
            ended = self._take(start)
            if ended and (growing := self._growing()):
                return _Progress(self._matches, self._matches[-1].end, growing)

    def _next_at(self, start: int) -> int:
        return self._shadow.find("@", start) if self._emails else -1

    def _earlier_email(self, start: int) -> int:
        """`start`, or where an e-mail address begins before it."""
        # An "@" farther away cannot belong to an address that begins up to here: it is looked at later, once.
        while self._email is None and 0 <= self._at <= start + LOCAL_PART:
            self._email = email_around(self._shadow, self._at, self._floor, self._begin)
            if self._email is None:
                self._at = self._next_at(self._at + 1)
        return min(start, self._email[0]) if self._email else start

    def _take(self, start: int) -> bool:
        """Take the longest entity that begins at `start` and go on behind it; False, and one on, if there is none."""
        left = self._shadow[max(self._floor, start - LEFT_REACH) : start]
        ends = {kind: matcher(self._shadow, start, left) for kind, matcher in self._matchers.items()}
        if self._email and self._email[0] == start:
            ends[PiiKind.EMAIL] = self._email[1]
        end = max(ends.values(), default=-1)
        if end < 0:
            self._place = start + 1
            return False
        kind = next(kind for kind in STRENGTH if ends.get(kind) == end)
        self._matches.append(PiiMatch(kind, start, end))
        self._place = self._floor = end
        self._at, self._email = self._next_at(self._floor), None
        return True

    def _growing(self) -> re.Pattern[str] | None:
        """How the last match may go on, if it is a key with nothing behind it that ends it."""
        last = self._matches[-1]
        if last.kind is not PiiKind.API_KEY or self._shadow[last.end :] not in ("", "."):
            return None
        if self._decided == len(self._shadow):
            return None
        return key_rest(self._shadow, last.start)


class StreamRedactor:
    """Redacts one text that arrives in pieces, holding back a tail so that no entity is ever split.

    The pieces given out, joined, are what `Redactor.redact` makes of the whole text, however it was cut.  The tail is
    the unfinished word or number; it is bounded, because what may become an entity is.
    """

    counts: dict[PiiKind, int]
    """How many entities of each kind were replaced up to now; kinds that were not found are left out."""

    def __init__(self, redactor: Redactor) -> None:
        self.counts = {}
        self._redactor = redactor
        self._held = ""
        # What the patterns may see of the text before `_held`: the end of its shadow, "]" for an entity.
        self._context = ""
        self._invisible_before = 0
        # While a key that was already replaced goes on: what belongs to it is dropped.
        self._growing: re.Pattern[str] | None = None
        self._finished = False

    def feed(self, delta: str) -> str:
        """Take the next piece and return what may be sent now, often nothing.

        Raises: ValueError: the text was already finished.
        """
        if self._finished:
            raise ValueError("the text is finished; a new one needs a StreamRedactor of its own")
        self._held += delta
        return self._release(final=False)

    def finish(self) -> str:
        """End the text and return the rest of it; once more, and there is none."""
        self._finished = True
        rest = self._release(final=True)
        self._held = ""
        return rest

    def _release(self, *, final: bool) -> str:
        shadow = Shadow.of(self._held, self._invisible_before)
        if self._growing is not None:
            shadow = self._drop_grown(shadow, self._growing, final=final)
        if self._growing is not None:
            return ""
        begin = len(self._context)
        seen = self._context + shadow.text
        decided = len(seen) if final else first_open(seen, begin)
        if decided == begin and not final:
            return ""
        return self._give_out(shadow, seen, self._redactor.scan(seen, begin, decided))

    def _drop_grown(self, shadow: Shadow, rest: re.Pattern[str], *, final: bool) -> Shadow:
        """Drop what belongs to the key that was replaced last; the shadow of what is left."""
        more = rest.match(shadow.text)
        end = more.end() if more else 0
        # Invisible characters behind it are kept back with a full stop: they are the key's if it goes on.
        if final or shadow.text[end:] not in ("", "."):
            self._growing = None
        if end == 0:
            return shadow
        self._held = self._held[shadow.span(0, end)[1] :]
        self._invisible_before = 0
        return Shadow.of(self._held)

    def _give_out(self, shadow: Shadow, seen: str, progress: _Progress) -> str:
        """Replace what was found in `seen`, forget all up to where it is decided, and return that part."""
        begin = len(self._context)
        pieces, done, floor, decided = list[str](), 0, 0, progress.decided
        for match in progress.matches:
            start, end = shadow.span(match.start - begin, match.end - begin)
            pieces += self._held[done:start], _placeholder(match.kind)
            self.counts[match.kind] = self.counts.get(match.kind, 0) + 1
            done, floor, decided = end, match.end, max(decided, match.end)
        self._growing = progress.growing
        cut, self._invisible_before = (done, 0) if self._growing else shadow.cut(decided - begin)
        pieces.append(self._held[done:cut])
        self._held = self._held[cut:]
        known = "]" + seen[floor:decided] if progress.matches else seen[:decided]
        self._context = known[-LEFT_REACH:]
        return "".join(pieces)
