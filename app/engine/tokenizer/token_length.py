"""Bounds how much text one token can stand for, so that a prompt far too long is refused without encoding it.

Knows the tokenizers that lose nothing of a text: byte-level BPE, and BPE with byte fallback in SentencePiece's manner.
Any other has no bound: a normalizer may shorten a text, and one unknown token may stand for a whole word.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_BYTES = 256
_NFC_FACTOR = 3
"""Bytes of a text that NFC may make one byte of, at most: measured over all of Unicode."""
_SPACE = "▁"
_LOSSLESS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation")
"""Pre-tokenizers that leave nothing out, unless their behavior is Removed."""

_MARK_BYTES = 6
"""Marks around a control token that a message spells; they are no text of the prompt."""
_SLACK_TOKENS = 64
"""Tokens at the beginning of a part of a text that may differ from those of the whole."""


class TooManyTokensError(Exception):
    """A text has more tokens than the context window, and was not encoded to count them."""

    def __init__(self, least_tokens: int) -> None:
        super().__init__()
        self.least_tokens = least_tokens


class TokenLength:
    """Tells whether a text is too long for a context window in any case."""

    def __init__(self, longest_token_bytes: int | None, context_length: int | None) -> None:
        """Args: context_length: in tokens; None lets every text pass, and so does a tokenizer without a bound."""
        known = longest_token_bytes is not None and context_length is not None
        self._bytes_per_token = (longest_token_bytes or 0) + _MARK_BYTES
        self._most_tokens = (context_length or 0) if known else None

    @property
    def is_bounded(self) -> bool:
        """Return whether the tokenizer loses nothing of a text, so that no token stands for less than a byte of it."""
        return self._most_tokens is not None

    def check(self, text: str) -> None:
        """Raises: TooManyTokensError: it is."""
        most = self._most_tokens
        if most is None or len(text) * 4 <= most * self._bytes_per_token:
            return  # no text of so few characters has more bytes
        least = -(-len(text.encode("utf-8", "surrogatepass")) // self._bytes_per_token)
        if least > most:
            raise TooManyTokensError(least)

    def end(self, text: str) -> str:
        """Return the end of a text, which holds more tokens than the window, or the whole."""
        return (
            text if self._most_tokens is None else text[-(self._most_tokens + _SLACK_TOKENS) * self._bytes_per_token :]
        )


def longest_token_bytes(tokenizer: Mapping[str, Any]) -> int | None:
    """Return the most bytes of text that one token stands for; None where there is no bound.

    Args: tokenizer: what `tokenizer.json` holds.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    added = tokenizer.get("added_tokens") or []
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return None  # it takes any number of spaces with it
    before = list(_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    if any(step["type"] not in _LOSSLESS or step.get("behavior") == "Removed" for step in before):
        return None
    factor = _shrinking(list(_steps(tokenizer.get("normalizer"), "normalizers")))
    if factor is None:
        return None
    vocab = model["vocab"]
    if any(step["type"] == "ByteLevel" for step in before):
        # One character of the vocabulary is one byte.
        if sum(len(token) == 1 for token in vocab) < _BYTES:
            return None
        longest = max(map(len, vocab))
    elif model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in range(_BYTES)):
        longest = max(len(token.replace(_SPACE, " ").encode()) for token in vocab)
    else:
        return None
    return factor * max(longest, *(len(token["content"].encode()) for token in added), 1)


def _steps(step: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """Yield a step, or those of a sequence."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for each in step[name]:
        yield from _steps(each, name)


def _shrinking(normalizers: list[Mapping[str, Any]]) -> int | None:
    """Return by which factor normalizers may shorten a text; None if by any."""
    factor = 1
    for step in normalizers:
        match step["type"]:
            case "NFC":
                factor *= _NFC_FACTOR
            case "Prepend":
                pass
            case "Replace" if step["pattern"] == {"String": " "} and step["content"] == _SPACE:
                pass
            case _:
                return None
    return factor
