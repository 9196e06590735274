"""Turns the tokens of one completion into text as they come, with Hugging Face's fast tokenizers.

Decides which part of the prompt has to be decoded with them: a decoder takes the space from the first word of whatever
it gets, so that a completion decoded by itself would lose it.
"""

from collections.abc import Callable, Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

CONTEXT_WIDTHS = (8, 32, 128, 512)
"""Last tokens of the prompt that are decoded with the completion: the first of these that hold any text."""
CHARACTER_TOKENS = 4
"""Most tokens, of one byte each, that make up a character of UTF-8."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class StreamDecoder:
    """Turns the tokens of one completion into text as they come.

    The texts joined are what decoding the prompt and all tokens at once gives behind the prompt's own text.  One case
    is better than that: where a tokenizer with byte fallback meets bytes that are not UTF-8, decoding at once gives up
    the whole run of bytes, and this one has already shown the characters before the damage.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        anchor: Sequence[int],
        prompt_ids: Sequence[int] = (),
        read_bytes: Callable[[int], bytes] = lambda token_id: b"",
    ) -> None:
        """Decode with `tokenizer`.

        Args:
            anchor: the tokens of some ordinary letter, for decoding in mid-text.
            prompt_ids: what the completion continues; a character that they break off comes with the completion.
            read_bytes: returns the bytes of a token, to tell a broken character from U+FFFD itself.
        """
        self._tokenizer = tokenizer
        self._anchor = list(anchor)
        self._read_bytes = read_bytes
        self._pending: list[int] = []
        self._context, broken = self._end_of(prompt_ids)
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=True)
        for token_id in broken:
            self._step(token_id)

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
            self._context = self._anchor
            text = self.finish()
            # A fresh stream would take the next token for the first of the text and drop its leading space.
            self._stream = DecodeStream(ids=self._anchor, skip_special_tokens=True)
        if not text:
            return ""
        self._pending.clear()
        self._context = self._anchor
        return text

    def _end_of(self, prompt_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the end of a prompt that begins and ends with whole characters, and the tokens that it breaks off."""
        end = self._visible_end(prompt_ids)
        if not self._decode(end).endswith(_INCOMPLETE):
            return end, []
        for count in range(1, min(CHARACTER_TOKENS, len(end) + 1)):
            context, broken = end[:-count], end[-count:]
            if not self._decode(context).endswith(_INCOMPLETE):
                return (context, broken) if self._is_broken(broken) else (self._anchor, [])
        return self._anchor, []

    def _visible_end(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the last tokens of a prompt that hold any text; as few as will do, all where none is found."""
        end: list[int] = []
        for width in CONTEXT_WIDTHS:
            # One byte further back, a character that was cut in the middle may be whole.
            for shift in range(CHARACTER_TOKENS):
                end = list(prompt_ids[-width - shift :])
                text = self._decode(end)
                if text and not text.startswith(_INCOMPLETE):
                    return end
            if width >= len(prompt_ids):
                return end
        # Nothing but special tokens, or nothing that is UTF-8, for so long.
        return self._anchor if self._decode(list(prompt_ids)) else end

    def _is_broken(self, token_ids: Sequence[int]) -> bool:
        try:
            b"".join(map(self._read_bytes, token_ids)).decode()
        except UnicodeDecodeError:
            return True
        return False

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))
