"""Replaces personal data in whole texts and in streams of text.

Both use one left-to-right scan: the leftmost entity is taken, the longest of several at one position, and the scan
continues after it as if the text began there.  A decision depends on a bounded part of the text around its position,
so a stream is emitted up to where the rest is undecided (`first_open`), and its output equals the redacted whole.
`filters.py` applies the policy: mask, block or off.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Self

import phonenumbers
import stdnum

from app.privacy.credentials import key_rest, key_rule
from app.privacy.cut_text import cut_from
from app.privacy.emails import LOCAL_PART, email_around
from app.privacy.patterns import (
    LEFT_REACH,
    PATTERN_VERSION,
    PHONE_REGIONS,
    PRECEDENCE,
    Matchers,
    PiiKind,
    first_open,
    trigger_of,
)
from app.privacy.shadow_text import SPOKEN_AT, Shadow

__all__ = ["PiiKind", "PiiMatch", "Redaction", "Redactor", "StreamRedactor", "StreamState", "TooMuchWorkError"]


class TooMuchWorkError(Exception):
    """A scan would examine more places than its caller allows."""


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
class StreamState:
    """Everything that a stream remembers between two deltas, in plain values that can cross to another process."""

    buffer: str = ""
    """Text that is not decided yet."""
    context: str = ""
    """The left context of `buffer`: the end of the shadow before it, "]" for an entity."""
    invisible_before: int = 0
    open_key: str | None = None
    """Set while an already replaced key continues: the name of the rule by which its rest is dropped."""
    foreign: int = 0
    """Characters at the beginning of `buffer` that belong to the text before, and are never emitted."""
    counts: dict[PiiKind, int] = field(default_factory=dict)

    def as_list(self) -> list[Any]:
        return [self.buffer, self.context, self.invisible_before, self.open_key, self.foreign, self.counts]

    @classmethod
    def of_list(cls, values: list[Any]) -> Self:
        *rest, counts = values
        buffer, context, invisible_before, open_key, foreign = rest
        kinds = {PiiKind(kind): times for kind, times in counts.items()}
        return cls(buffer, context, invisible_before, open_key, foreign, kinds)


@dataclass(frozen=True, slots=True)
class _ScanResult:
    """The outcome of a scan."""

    matches: list[PiiMatch]
    """Offsets in the shadow."""
    decided: int
    """Start of the undecided rest, in the shadow."""
    open_key: str | None
    """Set if the last match is a key that reaches the end of the text: the rule by which its rest is found."""


class Redactor:
    """Finds personal data in texts and replaces it with placeholders such as "[EMAIL]".

    Immutable and thread-safe.  Redaction is idempotent.
    """

    def __init__(
        self, entities: Collection[PiiKind] = tuple(PiiKind), *, phone_regions: Collection[str] = PHONE_REGIONS
    ) -> None:
        """
        Args:
            entities: the kinds to detect.
            phone_regions: the regions whose national phone numbers are detected, two capital letters each (CLDR).
        Raises: ValueError: one of the phone regions, or of the entities, does not exist.
        """
        self.kinds = tuple(sorted({PiiKind(kind) for kind in entities}))
        self.phone_regions = tuple(sorted(set(phone_regions)))
        self._matchers = Matchers(frozenset(self.kinds), self.phone_regions)

    @property
    def fingerprint(self) -> str:
        """Identifies everything that affects what is found, for the keys of caches of filtered text."""
        libraries = f"phonenumbers/{phonenumbers.__version__};stdnum/{stdnum.__version__}"
        return f"pii/{PATTERN_VERSION};{','.join(self.kinds)};{','.join(self.phone_regions)};{libraries}"

    def find(self, text: str, *, max_attempts: int | None = None) -> list[PiiMatch]:
        """Return the entities in `text`, from left to right, without overlaps.

        Raises: TooMuchWorkError: more than `max_attempts` places would have to be examined.
        """
        shadow = Shadow.of(text)
        found = self.scan(shadow.text, 0, len(shadow.text), max_attempts).matches
        return [PiiMatch(match.kind, *shadow.span(match.start, match.end)) for match in found]

    def redact(self, text: str, *, max_attempts: int | None = None) -> Redaction:
        """Replace every entity in `text` by its placeholder.

        Raises: TooMuchWorkError: more than `max_attempts` places would have to be examined.
        """
        parts, counts, done = list[str](), dict[PiiKind, int](), 0
        for match in self.find(text, max_attempts=max_attempts):
            parts += text[done : match.start], _placeholder(match.kind)
            counts[match.kind] = counts.get(match.kind, 0) + 1
            done = match.end
        return Redaction("".join([*parts, text[done:]]), counts)

    def scan(
        self, shadow: str, begin: int, decided: int, max_attempts: int | None = None, *, final: bool = True
    ) -> _ScanResult:
        """Find the entities that begin in `shadow[begin:decided]`; used by `StreamRedactor`.

        Args:
            shadow: a shadow text, from at least `LEFT_REACH` characters before `begin` or from its own beginning.
            decided: the position from which on later text could change the outcome; the length at the end of the text.
            max_attempts: how many places may be examined; None is no limit.
            final: whether no text follows, so that a key at the end has no rest.
        Raises: TooMuchWorkError: they are more.
        """
        scan = _Scan(shadow, begin, decided, self._matchers, PiiKind.EMAIL in self.kinds, final=final)
        return scan.run(sys.maxsize if max_attempts is None else max_attempts)


def _placeholder(kind: PiiKind) -> str:
    """Return the replacement of an entity.  No pattern may match in or across it: "[" and "]" occur in no entity."""
    return f"[{kind.upper()}]"


class _Scan:
    """One pass over a shadow.  Every position is tried once, and again only if an entity ends there."""

    def __init__(self, shadow: str, begin: int, decided: int, kinds: Matchers, emails: bool, *, final: bool) -> None:
        self._final = final
        self._shadow, self._decided, self._matchers, self._emails = shadow, decided, kinds, emails
        self._trigger = trigger_of(shadow)
        self._spoken = SPOKEN_AT in shadow
        # Nothing before the floor is read: there a replaced entity ends, or the text begins.
        self._floor = 0
        self._begin = begin
        self._at = self._next_at(begin)
        self._email: tuple[int, int] | None = None
        self._matches: list[PiiMatch] = []
        self._position = begin
        self._attempts = 0

    def run(self, max_attempts: int) -> _ScanResult:
        trigger, ended = -1, False
        while True:
            if self._attempts > max_attempts:
                raise TooMuchWorkError(f"more than {max_attempts} places")
            if trigger < self._position:
                found = self._trigger.search(self._shadow, self._position)
                trigger = found.start() if found else len(self._shadow)
            # Right after an entity any kind may begin, although the trigger sees the entity's last letter there.
            start = self._earlier_email(min(self._position if ended else trigger, self._decided))
            if start >= self._decided:
                return _ScanResult(self._matches, self._decided, None)
            self._attempts += 1
            ended = self._take(start)
            if ended and (open_key := self._open_key()):
                return _ScanResult(self._matches, self._matches[-1].end, open_key)

    def _next_at(self, start: int) -> int:
        if not self._emails:
            return -1
        at = self._shadow.find("@", start)
        spoken = self._shadow.find(SPOKEN_AT, start) if self._spoken else -1
        return max(at, spoken) if at < 0 or spoken < 0 else min(at, spoken)

    def _earlier_email(self, start: int) -> int:
        """Return the start of an e-mail address that begins before `start`, else `start`."""
        # An "@" farther away cannot belong to an address that begins up to here; it is examined later, once.
        while self._email is None and 0 <= self._at <= start + LOCAL_PART:
            self._attempts += 1
            self._email = email_around(self._shadow, self._at, self._floor, self._begin, LEFT_REACH)
            if self._email is None:
                self._at = self._next_at(self._at + 1)
        return min(start, self._email[0]) if self._email else start

    def _take(self, start: int) -> bool:
        """Take the longest entity at `start` and move to its end; without one move by a character and return False."""
        left = self._shadow[max(self._floor, start - LEFT_REACH) : start]
        ends = self._matchers.ends(self._shadow, start, left)
        if self._email and self._email[0] == start:
            ends.append((self._email[1], PiiKind.EMAIL))
        if not ends:
            self._position = start + 1
            return False
        end = max(end for end, _ in ends)
        kind = min((kind for each, kind in ends if each == end), key=PRECEDENCE.index)
        self._matches.append(PiiMatch(kind, start, end))
        self._position = self._floor = end
        self._at, self._email = self._next_at(self._floor), None
        return True

    def _open_key(self) -> str | None:
        """Return the rule of the last match's rest, if it is a key that later text could extend."""
        last = self._matches[-1]
        if last.kind is not PiiKind.API_KEY or self._final:
            return None
        rule = key_rule(self._shadow, last.start)
        return rule if key_rest(rule, self._shadow, last.end).open else None


class StreamRedactor:
    """Redacts a stream of text deltas; buffers an undecided tail, so that no entity is ever split.

    The joined output equals `Redactor.redact` of the whole text for every chunking.  The buffered tail is the
    unfinished word or number; it is bounded, because the length of an open entity is.
    """

    def __init__(self, redactor: Redactor, before: str = "", *, state: StreamState | None = None) -> None:
        """
        Args:
            before: the text that the stream continues; of an entity that begins in it the rest is masked.
            state: of a stream that this one continues.
        """
        self._redactor = redactor
        self._finished = False
        before = before[-CONTINUED_CHARS:]
        # It is scanned with the first delta, which may be done elsewhere.
        self.state = state or StreamState(buffer=before, foreign=len(before))

    @property
    def counts(self) -> dict[PiiKind, int]:
        """Return how many entities of each kind were replaced so far; kinds without any are absent."""
        return self._counts

    @property
    def state(self) -> StreamState:
        """What is remembered between deltas; another stream can continue from there."""
        return StreamState(
            *(self._buffer, self._context, self._invisible_before, self._open_key, self._foreign), dict(self._counts)
        )

    @state.setter
    def state(self, state: StreamState) -> None:
        self._buffer, self._context, self._invisible_before = state.buffer, state.context, state.invisible_before
        self._open_key, self._foreign, self._counts = state.open_key, state.foreign, dict(state.counts)

    def feed(self, delta: str, *, max_attempts: int | None = None) -> str:
        """Consume the next delta and return the text that may be sent now, often none.

        Raises:
            ValueError: the stream was already finished.
            TooMuchWorkError: more than `max_attempts` places would have to be examined; nothing was consumed.
        """
        if self._finished:
            raise ValueError("the stream is finished; another text needs a StreamRedactor of its own")
        before = self._buffer, self._invisible_before, self._open_key, self._foreign
        self._buffer += delta
        try:
            return self._release(final=False, max_attempts=max_attempts)
        except TooMuchWorkError:
            self._buffer, self._invisible_before, self._open_key, self._foreign = before
            raise

    def finish(self, *, cut: bool = False) -> str:
        """End the stream and return the buffered rest; a second call returns an empty text.

        Args: cut: whether the text breaks off: an entity that may have begun at its end is then left out.
        """
        self._finished = True
        rest = self._release(final=False) if cut else ""
        rest += self._release(final=True, cut=cut)
        self._buffer = ""
        return rest

    def _release(self, *, final: bool, cut: bool = False, max_attempts: int | None = None) -> str:
        shadow = Shadow.of(self._buffer, self._invisible_before)
        if self._open_key is not None:
            shadow = self._drop_key_rest(shadow, self._open_key, final=final)
        if self._open_key is not None:
            return ""
        begin = len(self._context)
        seen = self._context + shadow.text
        decided = len(seen) if final else first_open(seen, begin)
        if decided == begin and not final:
            return ""
        return self._emit(shadow, seen, self._redactor.scan(seen, begin, decided, max_attempts, final=final), cut=cut)

    def _drop_key_rest(self, shadow: Shadow, rule: str, *, final: bool) -> Shadow:
        """Drop the rest of the key that was replaced last, and return the shadow of the remaining text."""
        rest = key_rest(rule, shadow.text, 0)
        # Invisible characters after it are buffered with what may continue it: they belong to the key if it does.
        if final or not rest.open:
            self._open_key = None
        if rest.end == 0:
            return shadow
        self._remove(shadow.span(0, rest.end)[1])
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
                self._counts[match.kind] = self._counts.get(match.kind, 0) + 1
            done, floor, decided = end, match.end, max(decided, match.end)
        self._open_key = result.open_key
        size, self._invisible_before = (done, 0) if self._open_key else shadow.cut(decided - begin)
        shown = size
        if cut and not self._open_key:
            tail = max(floor, begin)
            shown, _ = shadow.cut(tail + cut_from(seen[tail:], continues=bool(result.matches)) - begin)
        parts.append(self._buffer[max(done, self._foreign) : shown])
        self._remove(size)
        known = "]" + seen[floor:decided] if result.matches else seen[:decided]
        self._context = known[-LEFT_REACH:]
        return "".join(parts)
