"""The marks of a family's format as they stand in a completion's text."""

from collections.abc import Iterable

from app.engine.tokenizer.shown_tokens import hide_tokens, show_token

__all__ = ["Marks", "hide_tokens"]


class Marks:
    """Knows which marks are special tokens of the model's tokenizer, which a text shows in their own way."""

    def __init__(self, special: Iterable[str] = ()) -> None:
        """Args: special: the names of those tokens."""
        self._special = frozenset(special)

    def __call__(self, mark: str) -> str:
        """Return a mark as it stands in the text."""
        return show_token(mark) if mark in self._special else mark
