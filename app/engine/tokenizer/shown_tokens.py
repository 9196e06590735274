"""How the text of a completion shows special tokens to who reads a model's format: between two noncharacters.

So a special token is never mistaken for ordinary text that looks like it, nor the text for the token.
"""

import re
from collections.abc import Sequence

from app.engine.base import TextDecoder, Tokenizer
from app.requests import GenerationRequest

BEGIN, END = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which are for use inside a program only."""
CONTEXT_TOKENS = 64
"""Last tokens before a special one that text behind it is decoded with."""
_SHOWN = re.compile(f"{BEGIN}[^{BEGIN}{END}]*{END}")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_RESERVED = str.maketrans({BEGIN: _INCOMPLETE, END: _INCOMPLETE})


def show_token(name: str) -> str:
    """Return how a text shows a special token of this name."""
    return f"{BEGIN}{name}{END}"


def hide_tokens(text: str) -> str:
    """Return a text without the special tokens that it shows, as a decoder writes it for everybody else."""
    return _SHOWN.sub("", text) if BEGIN in text else text


def completion_decoder(tokenizer: Tokenizer, request: GenerationRequest) -> TextDecoder:
    """Return the decoder of a request's completion, which shows the special tokens that the request names."""
    prompt_ids = request.prompt_ids or ()
    if request.shown_tokens is None:
        return tokenizer.decoder(prompt_ids)
    return ShownTokenDecoder(tokenizer, prompt_ids, request.shown_tokens)


class ShownTokenDecoder:
    """Turns the tokens of one completion into text, and shows some of the special ones."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], shown: Sequence[tuple[str, int]]) -> None:
        """Decode with `tokenizer`.  Args: prompt_ids: what the completion continues; shown: names and ids."""
        self._tokenizer = tokenizer
        self._shown = {token_id: show_token(name) for name, token_id in shown}
        self._recent = list(prompt_ids[-CONTEXT_TOKENS:])
        self._decoder = tokenizer.decoder(prompt_ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; bytes of an unfinished character are buffered."""
        return "".join(map(self._step, token_ids))

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD."""
        return self._decoder.finish().translate(_RESERVED)

    def _step(self, token_id: int) -> str:
        self._recent.append(token_id)
        if (mark := self._shown.get(token_id)) is None:
            return self._decoder.feed((token_id,)).translate(_RESERVED)
        rest = self.finish()
        # A character that breaks off has been shown as such, and does not go on behind the token.
        del self._recent[: -1 if rest.endswith(_INCOMPLETE) else -CONTEXT_TOKENS]
        # What follows stands in mid-text: a decoder of its own would take the space from its first word.
        self._decoder = self._tokenizer.decoder(self._recent)
        return rest + mark
