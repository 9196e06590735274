"""What a tokenizer's files say about how the model's chats are written."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it takes a second to import
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that stands for exactly one text."""

    name: str
    token_id: int
    special: bool
    """Whether decoders hide it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTraits:
    """The chat templates, the added tokens, and transformers' description of how to parse what the model answers."""

    templates: str = ""
    """All chat templates, one after the other."""
    added_tokens: tuple[AddedToken, ...] = ()
    response_template: str = ""
    """As JSON; empty where the tokenizer brings none."""


def read_traits(tokenizer: "PreTrainedTokenizerFast") -> ChatTraits:
    """Return what a tokenizer's files say."""
    template = tokenizer.chat_template
    templates: Iterable[str] = template.values() if isinstance(template, dict) else [template or ""]
    response = getattr(tokenizer, "response_template", None)
    return ChatTraits(
        templates="\n".join(map(str, templates)),
        added_tokens=tuple(
            AddedToken(name=token.content, token_id=number, special=token.special)
            for number, token in tokenizer.added_tokens_decoder.items()
        ),
        response_template=json.dumps(response) if isinstance(response, dict) else "",
    )
