"""The bytes that one token of a vocabulary stands for, on its own.

Decides by the tokenizer's own description how its vocabulary encodes bytes.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes_reader(tokenizer: FastTokenizer, anchor: list[int]) -> Callable[[int], bytes]:
    """Return a function from a token to its bytes; safe to call from several threads.

    It remembers nothing: which tokens were read before would tell one caller of another's completions.

    Args: anchor: the tokens of some ordinary letter, since a token by itself would lose its leading space.
    """
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    added = {token["id"]: str(token["content"]) for token in spec["added_tokens"]}
    kinds = _decoder_kinds(spec["decoder"])
    alphabet = _byte_alphabet() if "ByteLevel" in kinds else {}
    to_latin_1 = {ord(character): byte for character, byte in alphabet.items()}
    before = len(tokenizer.decode(anchor, skip_special_tokens=False))

    def read(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id].encode()
        name = tokenizer.id_to_token(token_id)
        if name is None:  # models round their vocabulary up beyond the tokenizer's
            return b""
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(byte[1])
        if alphabet and alphabet.keys() >= set(name):
            return name.translate(to_latin_1).encode("latin-1")
        return str(tokenizer.decode([*anchor, token_id], skip_special_tokens=False))[before:].encode()

    return read


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    """Return the names of all steps of a decoder."""
    if decoder is None:
        return set()
    return {str(decoder["type"])}.union(*map(_decoder_kinds, decoder.get("decoders", ())))


def _byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level vocabularies write for bytes: itself where it shows, else from U+0100 on.

    Source: Radford et al. 2019, the byte-level BPE of GPT-2.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
