"""The model's vocabulary as llguidance reads it: which bytes each token writes, and how a text is ids in tokens.

One more token, behind all of the tokenizer's, stands for the end of a completion.  Which tokens end one is a matter of
the request, so the model's own end tokens are ordinary ones here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llguidance import LLTokenizer
from tokenizers import Tokenizer

_END_NAME: Final = "<|the grammar allows the end|>"
_SPACE: Final = "\u2581"
"""The character that SentencePiece writes for a space."""
_SENTENCEPIECE: Final = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


class UnsupportedVocabularyError(ValueError):
    """No grammar can be enforced with this tokenizer; the message says why."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A vocabulary, and the number of the token that stands for the end."""

    tokens: LLTokenizer
    end: int

    @property
    def mask_bytes(self) -> int:
        """Return the length of a mask: a bit for each token, in whole words of 32."""
        return -(-self.tokens.vocab_size // 32) * 4


def load_vocabulary(folder: Path | str, vocab_size: int) -> Vocabulary:
    """Read `tokenizer.json`.

    Args: vocab_size: width of the model's logits, which may have more tokens than the tokenizer.
    Raises: UnsupportedVocabularyError: it is of a kind that cannot be read.
    """
    description = json.loads((Path(folder) / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer.from_str(json.dumps(description))
    end = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    try:
        if _writes_bytes(description["decoder"]):
            return Vocabulary(_from_description(description, end, vocab_size), end)
        return Vocabulary(_from_words(description, tokenizer, end), end)
    except ValueError as error:
        raise UnsupportedVocabularyError(str(error)[:200]) from error


def _writes_bytes(decoder: dict[str, Any] | None) -> bool:
    """Return whether each token has a text of its own, whatever stands beside it."""
    if decoder is None:
        return False
    kinds = {decoder["type"], *(each["type"] for each in decoder.get("decoders", ()))}
    return bool(kinds & {"ByteLevel", "ByteFallback", "Metaspace"})


def _from_description(description: dict[str, Any], end: int, vocab_size: int) -> LLTokenizer:
    decoder = description["decoder"]
    token = {"id": end, "content": _END_NAME, "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    changed = description | {
        "added_tokens": [*description["added_tokens"], token],
        # The library knows SentencePiece by its parts only.
        "decoder": _SENTENCEPIECE if decoder["type"] == "Metaspace" else decoder,
        "padding": None,
        "truncation": None,
    }
    return LLTokenizer(json.dumps(changed), n_vocab=max(end + 1, vocab_size), eos_token=end)


class _Words:
    """A vocabulary of words and their parts: a word writes a space in front of it, a part none."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self.tokens = [*tokens, _END_NAME.encode()]
        self.special_token_ids = [*special, end]
        self.eos_token_id = end
        names = {token: number for number, token in enumerate(tokens) if token and number not in special}
        self._names, self._longest = names, max(map(len, names), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Spell a text with the longest tokens first; it ends before what none of them spells."""
        raw = text.encode() if isinstance(text, str) else bytes(text)
        ids, start = list[int](), 0
        while start < len(raw):
            ends = range(min(len(raw), start + self._longest), start, -1)
            found = next((end for end in ends if raw[start:end] in self._names), None)
            if found is None:
                break
            ids.append(self._names[raw[start:found]])
            start = found
        return ids


def _from_words(description: dict[str, Any], tokenizer: Tokenizer, end: int) -> LLTokenizer:
    decoder = description["decoder"]
    prefix = decoder["prefix"] if decoder is not None and decoder["type"] == "WordPiece" else None
    if prefix is None:
        raise UnsupportedVocabularyError("its tokenizer does not say what a token writes")
    special = [token["id"] for token in description["added_tokens"]]
    tokens = [_word_bytes(tokenizer.id_to_token(number) or "", prefix) for number in range(end)]
    # A wrapped tokenizer has no padding: tokens that only the model has are not in the mask, and so not allowed.
    return LLTokenizer(_Words(tokens, special, end))  # type: ignore[arg-type]


def _word_bytes(name: str, prefix: str) -> bytes:
    return name.removeprefix(prefix).encode() if name.startswith(prefix) else f" {name}".encode()
