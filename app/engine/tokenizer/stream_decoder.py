"""Turns the tokens of one completion into text as they come, with Hugging Face's fast tokenizers."""

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream


class StreamDecoder:
    """Turns the tokens of one completion into text as they come.

    The texts joined are what decoding all tokens at once gives.  One case is better than that: where a tokenizer
    with byte fallback meets bytes that are not UTF-8, decoding at once gives up the whole run of bytes, and this one
    has already shown the characters before the damage.
    """

    def __init__(self, tokenizer: FastTokenizer, anchor: Sequence[int]) -> None:
        """Decode with `tokenizer`; `anchor` are the tokens of some ordinary letter, for decoding in mid-text."""
        self._tokenizer = tokenizer
        self._anchor = list(anchor)
        self._context: list[int] = []
        self._pending: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; bytes of an unfinished character are buffered."""
        return "".join(map(self._step, token_ids))

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""
        text = self._decode(self._context + self._pending)[len(self._decode(self._context)) :]
        self._pending.clear()
        return text

    def _step(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # tokenizers has no class of its own for it
            if "Invalid prefix" not in str(error):
                raise
            text = self.finish()
            # A fresh stream would take the next token for the first of the text and drop its leading space.
            self._stream = DecodeStream(ids=self._anchor, skip_special_tokens=True)
        if not text:
            return ""
        self._pending.clear()
        self._context = self._anchor
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
