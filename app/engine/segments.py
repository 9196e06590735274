"""Encodes what a chat template writes a segment at a time, and remembers the segments: the next turn of a conversation
brings little that is new.

A tokenizer cuts its text at added tokens before it does anything else, so that what stands from one of them to the next
has the same tokens in any text.  Decides which tokens are safe to cut at; knows no template and no message.
"""

import re
from array import array
from collections.abc import Iterable

from cachetools import TTLCache
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

REMEMBERED_TOKENS = 262_144
REMEMBERED_SECONDS = 600.0
"""Text of users is not kept for longer."""


class SegmentEncoder:
    """Gives each text the tokens that the tokenizer gives it whole; for one thread at a time."""

    def __init__(self, tokenizer: FastTokenizer, added: Iterable[AddedToken]) -> None:
        """Args: added: the tokenizer's own."""
        self._tokenizer = tokenizer
        borders = sorted(map(re.escape, borders_among(added)), key=len, reverse=True)
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
        return (
            [each.ids for each in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)] if texts else []
        )


def borders_among(added: Iterable[AddedToken]) -> list[str]:
    """Return the added tokens that are found wherever they are written, and take nothing from the text before them."""
    tokens = list(added)
    others = [token.content for token in tokens]
    return [
        token.content
        for token in tokens
        if not (token.lstrip or token.single_word or token.normalized)
        and not any(_begins_in(token.content, other) for other in others if other != token.content)
    ]


def _begins_in(token: str, other: str) -> bool:
    """Return whether `other` may be found where a token begins, or begins with more than it."""
    ends = any(other.endswith(token[:length]) for length in range(1, len(token)))
    return ends or token in other


def _size(ids: "array[int]") -> int:
    return len(ids) + 1
