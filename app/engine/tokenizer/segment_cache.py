"""Encodes the text of a chat template a segment at a time, and caches the segments: the next turn of a conversation has
few new ones.

A tokenizer cuts its text at added tokens before it does anything else, so that the text between two of them has the
same tokens wherever it stands.  Decides which tokens are safe to cut at, in text that a template has rendered.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable

from cachetools import TTLCache
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

REMEMBERED_TOKENS = 262_144
REMEMBERED_SECONDS = 600.0
"""A segment that is not used for so long is forgotten when the next is encoded."""


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
        self._known: TTLCache[str, array[int]] = TTLCache(REMEMBERED_TOKENS, REMEMBERED_SECONDS, getsizeof=_size)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without any that the tokenizer puts around a text."""
        segments = self._segments(text)
        found = {segment: self._known.get(segment) for segment in segments}
        missing = [segment for segment, ids in found.items() if ids is None]
        for segment, encoding in zip(missing, self._encode(missing), strict=True):
            ids = found[segment] = array("I", encoding)
            if _size(ids) <= REMEMBERED_TOKENS // 4:
                self._known[segment] = ids
        return [number for segment in segments for number in found[segment] or ()]

    def _segments(self, text: str) -> list[str]:
        starts = [0, *(match.start() for match in self._border.finditer(text) if match.start())]
        return [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


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
