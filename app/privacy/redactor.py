"""Replaces personal data in whole texts and in streams of text.

Both use one left-to-right scan: the leftmost entity is taken, the longest of several at one position, and the scan
continues after it as if the text began there.  A decision depends on a bounded part of the text around its position,
so a stream is emitted up to where the rest is undecided (`first_open`), and its output equals the redacted whole.
`filters.py` applies the policy: mask, block or off.
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
    PRECEDENCE,
    TRIGGER,
    PiiKind,
    email_around,
    first_open,
    key_tail,
    matchers,
    may_begin,
)
from app.privacy.shadow_text import Shadow

__all__ = ["PiiKind", "PiiMatch", "Redaction", "Redactor", "StreamRedactor"]

CONTINUED_CHARS = 1024
"""How much of the text that a stream continues is looked at: more than any open entity is long."""


@dataclass(frozen=True, slots=True)
class PiiMatch:
    """The kind and the span of an entity."""

    kind: PiiKind
    start: int
    """Offset in the original text, in characters."""
    end: int
    """One past the last character."""


@dataclass(frozen=True, slots=True)
class Redaction:
    """A redacted text, and how many entities of each kind were replaced (kinds without any are absent)."""

    text: str
    counts: dict[PiiKind, int]


@dataclass(frozen=True, slots=True)
class _ScanResult:
    """The outcome of a scan."""

    matches: list[PiiMatch]
    """Offsets in the shadow."""
    decided: int
    """Start of the undecided rest, in the shadow."""
    open_tail: re.Pattern[str] | None
    """Set if the last match is a key that reaches the end of the text: the pattern of its rest."""


class Redactor:
    """Finds personal data in texts and replaces it with placeholders such as "[EMAIL]".

    Immutable and thread-safe.  Redaction is idempotent.
    """

    def __init__(self, entities: Collection[PiiKind] = tuple(PiiKind), *, phone_region: str = "US") -> None:
        """
        Args:
            entities: the kinds to detect.
            phone_region: the region whose national phone numbers are detected, two capital letters (CLDR).
        Raises: ValueError: the phone region, or one of the entities, does not exist.
        """
        self._kinds = frozenset(PiiKind(kind) for kind in entities)
        self._matchers = matchers(self._kinds, phone_region)
        self._phone_region = phone_region

    @property
    def fingerprint(self) -> str:
        """Identifies everything that affects what is found, for the keys of caches of filtered text."""
        kinds = ",".join(sorted(self._kinds))
        libraries = f"phonenumbers/{phonenumbers.__version__};stdnum/{stdnum.__version__}"
        return f"pii/{PATTERN_VERSION};{kinds};{self._phone_region};{libraries}"

    def find(self, text: str) -> list[PiiMatch]:
        """Return the entities in `text`, from left to right, without overlaps."""
        shadow = Shadow.of(text)
        found = self.scan(shadow.text, 0, len(shadow.text)).matches
        return [PiiMatch(match.kind, *shadow.span(match.start, match.end)) for match in found]

    def redact(self, text: str) -> Redaction:
        """Replace every entity in `text` by its placeholder."""
        parts, counts, done = list[str](), dict[PiiKind, int](), 0
        for match in self.find(text):
            parts += text[done : match.start], _placeholder(match.kind)
            counts[match.kind] = counts.get(match.kind, 0) + 1
            done = match.end
        return Redaction("".join([*parts, text[done:]]), counts)

    def scan(self, shadow: str, begin: int, decided: int) -> _ScanResult:
        """Find the entities that begin in `shadow[begin:decided]`; used by `StreamRedactor`.

        Args:
            shadow: a shadow text, from at least `LEFT_REACH` characters before `begin` or from its own beginning.
            decided: the position from which on later text could change the outcome; the length at the end of the text.
        """
        return _Scan(shadow, begin, decided, self._matchers, PiiKind.EMAIL in self._kinds).run()


def _placeholder(kind: PiiKind) -> str:
    """Return the replacement of an entity.  No pattern may match in or across it: "[" and "]" occur in no entity."""
    return f"[{kind.upper()}]"


class _Scan:
    """One pass over a shadow.  Every position is tried once, and again only if an entity ends there."""

    def __init__(self, shadow: str, begin: int, decided: int, kinds: dict[PiiKind, Matcher], emails: bool) -> None:
        self._shadow, self._decided, self._matchers, self._emails = shadow, decided, kinds, emails
        # Nothing before the floor is read: there a replaced entity ends, or the text begins.
        self._floor = 0
        self._begin = begin
        self._at = self._next_at(begin)
        self._email: tuple[int, int] | None = None
        self._matches: list[PiiMatch] = []
        self._position = begin

    def run(self) -> _ScanResult:
        trigger, ended = -1, False
        while True:
            if trigger < self._position:
                found = TRIGGER.search(self._shadow, self._position)
                trigger = found.start() if found else len(self._shadow)
            # Right after an entity any kind may begin, although the trigger sees the entity's last letter there.
            start = self._earlier_email(min(self._position if ended else trigger, self._decided))
            if start >= self._decided:
                return _ScanResult(self._matches, self._decided, None)
            ended = self._take(start)
            if ended and (open_tail := self._open_tail()):
                return _ScanResult(self._matches, self._matches[-1].end, open_tail)

    def _next_at(self, start: int) -> int:
        return self._shadow.find("@", start) if self._emails else -1

    def _earlier_email(self, start: int) -> int:
        """Return the start of an e-mail address that begins before `start`, else `start`."""
        # An "@" farther away cannot belong to an address that begins up to here; it is examined later, once.
        while self._email is None and 0 <= self._at <= start + LOCAL_PART:
            self._email = email_around(self._shadow, self._at, self._floor, self._begin)
            if self._email is None:
                self._at = self._next_at(self._at + 1)
        return min(start, self._email[0]) if self._email else start

    def _take(self, start: int) -> bool:
        """Take the longest entity at `start` and move to its end; without one move by a character and return False."""
        left = self._shadow[max(self._floor, start - LEFT_REACH) : start]
        ends = {kind: matcher(self._shadow, start, left) for kind, matcher in self._matchers.items()}
        if self._email and self._email[0] == start:
            ends[PiiKind.EMAIL] = self._email[1]
        end = max(ends.values(), default=-1)
        if end < 0:
            self._position = start + 1
            return False
        kind = next(kind for kind in PRECEDENCE if ends.get(kind) == end)
        self._matches.append(PiiMatch(kind, start, end))
        self._position = self._floor = end
        self._at, self._email = self._next_at(self._floor), None
        return True

    def _open_tail(self) -> re.Pattern[str] | None:
        """Return the pattern of the last match's rest, if it is a key that later text could extend."""
        last = self._matches[-1]
        if last.kind is not PiiKind.API_KEY or self._shadow[last.end :] not in ("", "."):
            return None
        if self._decided == len(self._shadow):
            return None
        return key_tail(self._shadow, last.start)


class StreamRedactor:
    """Redacts a stream of text deltas; buffers an undecided tail, so that no entity is ever split.

    The joined output equals `Redactor.redact` of the whole text for every chunking.  The buffered tail is the
    unfinished word or number; it is bounded, because the length of an open entity is.
    """

    counts: dict[PiiKind, int]
    """Entities of each kind replaced so far; kinds without any are absent."""

    def __init__(self, redactor: Redactor, before: str = "") -> None:
        """Args: before: the text that the stream continues; of an entity that begins in it the rest is masked."""
        self.counts = {}
        self._redactor = redactor
        self._buffer = before[-CONTINUED_CHARS:]
        self._foreign = len(self._buffer)
        """Characters at the beginning of `_buffer` that belong to the text before, and are never emitted."""
        # The left context of `_buffer`: the end of the shadow before it, "]" for an entity.
        self._context = ""
        self._invisible_before = 0
        # Set while an already replaced key continues: its rest is dropped.
        self._open_key: re.Pattern[str] | None = None
        self._finished = False
        if before:
            self._release(final=False)

    def feed(self, delta: str) -> str:
        """Consume the next delta and return the text that may be sent now, often none.

        Raises: ValueError: the stream was already finished.
        """
        if self._finished:
            raise ValueError("the stream is finished; another text needs a StreamRedactor of its own")
        self._buffer += delta
        return self._release(final=False)

    def finish(self, *, cut: bool = False) -> str:
        """End the stream and return the buffered rest; a second call returns an empty text.

        Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
        """
        self._finished = True
        rest = self._release(final=False) if cut else ""
        rest += self._release(final=True, cut=cut)
        self._buffer = ""
        return rest

    def _release(self, *, final: bool, cut: bool = False) -> str:
        shadow = Shadow.of(self._buffer, self._invisible_before)
        if self._open_key is not None:
            shadow = self._drop_key_tail(shadow, self._open_key, final=final)
        if self._open_key is not None:
            return ""
        begin = len(self._context)
        seen = self._context + shadow.text
        decided = len(seen) if final else first_open(seen, begin)
        if decided == begin and not final:
            return ""
        return self._emit(shadow, seen, self._redactor.scan(seen, begin, decided), cut=cut)

    def _drop_key_tail(self, shadow: Shadow, tail: re.Pattern[str], *, final: bool) -> Shadow:
        """Drop the rest of the key that was replaced last, and return the shadow of the remaining text."""
        found = tail.match(shadow.text)
        end = found.end() if found else 0
        # Invisible characters after it are buffered with a full stop: they belong to the key if it continues.
        if final or shadow.text[end:] not in ("", "."):
            self._open_key = None
        if end == 0:
            return shadow
        self._remove(shadow.span(0, end)[1])
        self._invisible_before = 0
        return Shadow.of(self._buffer)

    def _remove(self, characters: int) -> None:
        self._buffer = self._buffer[characters:]
        self._foreign = max(0, self._foreign - characters)

    def _emit(self, shadow: Shadow, seen: str, result: _ScanResult, *, cut: bool) -> str:
        """Return the decided part of the buffer with its entities replaced, and remove it from the buffer.

        Args: cut: leave out what follows the last entity, if another may have begun there.
        """
        begin = len(self._context)
        parts, done, floor, decided = list[str](), 0, 0, result.decided
        for match in result.matches:
            start, end = shadow.span(match.start - begin, match.end - begin)
            parts.append(self._buffer[max(done, self._foreign) : start])
            if end > self._foreign:
                parts.append(_placeholder(match.kind))
                self.counts[match.kind] = self.counts.get(match.kind, 0) + 1
            done, floor, decided = end, match.end, max(decided, match.end)
        self._open_key = result.open_tail
        size, self._invisible_before = (done, 0) if self._open_key else shadow.cut(decided - begin)
        if not (cut and may_begin(seen[max(floor, begin) : decided], continues=bool(result.matches))):
            parts.append(self._buffer[max(done, self._foreign) : size])
        self._remove(size)
        known = "]" + seen[floor:decided] if result.matches else seen[:decided]
        self._context = known[-LEFT_REACH:]
        return "".join(parts)
