"""Encodes the text of a chat template a segment at a time, and caches the segments of each tenant: the next turn of a
conversation has few new ones.

A tokenizer cuts its text at added tokens before it does anything else, so that the text between two of them has the
same tokens wherever it stands.  Decides which tokens are safe to cut at, in text that a template has rendered.
"""

import re
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeAlias

from cachetools import TTLCache
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from app.types import Tenant

REMEMBERED_TOKENS = 262_144
"""Of all tenants in sum."""
REMEMBERED_TENANTS = 256
"""Those that encoded last."""
REMEMBERED_SECONDS = 600.0
"""A segment that was encoded so long ago is forgotten when the next is."""

_Segments: TypeAlias = "TTLCache[str, array[int]]"


class TenantSegments:
    """The segments that each tenant has encoded, and none of another's: what a prompt costs must not depend on what
    others have sent.  For one thread at a time.

    Where there are too many tokens, the tenant that has most of them loses those that it used least recently; so one
    that has less than its share loses nothing, whatever the others do.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: clock: seconds that never go back."""
        self._clock = clock
        self._tenants: OrderedDict[Tenant, _Segments] = OrderedDict()
        """The one that encoded least recently first."""

    @property
    def tokens(self) -> int:
        """Return the size of what is remembered: its tokens, and one for each segment."""
        return sum(int(segments.currsize) for segments in self._tenants.values())

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """Return the tenants of which anything is remembered, the one that encoded least recently first."""
        return tuple(self._tenants)

    def of(self, tenant: Tenant) -> _Segments:
        """Return the segments of a tenant, who encodes now."""
        if tenant not in self._tenants:
            self._tenants[tenant] = TTLCache(REMEMBERED_TOKENS, REMEMBERED_SECONDS, self._clock, getsizeof=_size)
        self._tenants.move_to_end(tenant)
        return self._tenants[tenant]

    def trim(self) -> None:
        """Forget what is too old or too much."""
        for tenant, segments in list(self._tenants.items()):
            segments.expire()
            if not segments:
                del self._tenants[tenant]
        while len(self._tenants) > REMEMBERED_TENANTS:
            self._tenants.popitem(last=False)
        while self.tokens > REMEMBERED_TOKENS:
            max(self._tenants.values(), key=lambda segments: segments.currsize).popitem()


class SegmentEncoder:
    """Gives each text the tokens that the tokenizer gives it whole; for one thread at a time."""

    def __init__(self, tokenizer: FastTokenizer, added: Iterable[AddedToken], written: str) -> None:
        """Args:
        added: the tokenizer's own.
        written: in what texts are made of; a vocabulary may have thousands of tokens that are never in them.
        """
        self._tokenizer = tokenizer
        borders = [re.escape(token) for token in borders_among(added) if token in written]
        self._border = re.compile("|".join(borders) or "(?!)")
        self.remembered = TenantSegments()

    def encode(self, text: str, tenant: Tenant | None = None) -> list[int]:
        """Return the tokens of a text, without any that the tokenizer puts around a text.

        Args: tenant: whose text it is; nothing is remembered of None.
        """
        if tenant is None:
            return self._encode([text])[0]
        segments = self._segments(text)
        known = self.remembered.of(tenant)
        found = {segment: known.get(segment) for segment in segments}
        missing = [segment for segment, ids in found.items() if ids is None]
        for segment, encoding in zip(missing, self._encode(missing), strict=True):
            ids = found[segment] = array("I", encoding)
            if _size(ids) <= REMEMBERED_TOKENS // 4:
                known[segment] = ids
        if missing:
            self.remembered.trim()
        return [number for segment in segments for number in found[segment] or ()]

    def _segments(self, text: str) -> list[str]:
        starts = [0, *(match.start() for match in self._border.finditer(text) if match.start())]
        return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def forget_words(tokenizer: FastTokenizer) -> None:
    """Switch off the cache of words that the models BPE and Unigram have, which all callers would share.

    Not in the library's documentation; the other models have no such cache.
    """
    if (resize := getattr(tokenizer.model, "_resize_cache", None)) is not None:
        resize(0)


def borders_among(added: Iterable[AddedToken]) -> list[str]:
    """Return the added tokens that are found wherever they are written, and take nothing from the text before them."""
    tokens = list(added)
    contents = {token.content for token in tokens}
    ends = {content[start:] for content in contents for start in range(1, len(content))}
    ordered = sorted(ends | contents)

    def found_in_another(token: str) -> bool:
        """Return whether another token may match where this one begins, or is longer and begins with this one."""
        longer = bisect_right(ordered, token)
        begun = any(token[:length] in ends for length in range(1, len(token) + 1))
        return begun or (longer < len(ordered) and ordered[longer].startswith(token))

    return [
        token.content
        for token in tokens
        if not (token.lstrip or token.single_word or token.normalized or found_in_another(token.content))
    ]


def _size(ids: "array[int]") -> int:
    return len(ids) + 1
