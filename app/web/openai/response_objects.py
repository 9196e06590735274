"""The objects of OpenAI's answers, field by field, in the order in which OpenAI writes them.  Plain dicts: they go out
as they are.
"""

import codecs
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from app import __version__
from app.engine.base import EngineInfo
from app.engine.tokenizer.logprob_text import AnswerToken
from app.generation.requests import Ending
from app.types import Usage


def fingerprint(info: EngineInfo) -> str:
    """Name what makes the answers; another name means that the same seed may give another answer."""
    return "fp_" + hashlib.sha256(repr((__version__, asdict(info))).encode()).hexdigest()[:10]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all objects of one answer say of it."""

    id: str
    model: str
    system_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    service_tier: str | None = None
    """Named only where the request named one."""

    def object(self, kind: str, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        """Put an object together."""
        made = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": list(choices),
            "usage": usage,
            "system_fingerprint": self.system_fingerprint,
        }
        return made if self.service_tier is None else {**made, "service_tier": self.service_tier}


def tokens_object(usage: Usage) -> dict[str, Any]:
    """Return the counts of what there is so far."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    """Return the counts of a whole request; its answers share one prompt, and the tokens of all count."""
    return {
        **tokens_object(usage),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def ending_fields(ending: Ending) -> dict[str, Any]:
    """Return how a choice ended: the reason, and as vLLM names it the stop string or token that matched."""
    return {"finish_reason": ending.finish_reason.value, "stop_reason": ending.stopped_by}


def chat_logprobs(tokens: Sequence[AnswerToken]) -> dict[str, Any]:
    """Return the log-probabilities of a piece of a chat answer."""
    content = [{**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _chat_token(token: AnswerToken) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}


class TextLogprobs:
    """The log-probabilities of one plain completion, whole or piece by piece."""

    def __init__(self) -> None:
        self._offset = 0
        """Characters of the text before the next token; bytes of an unfinished one count with the last of them."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def told(self, tokens: Sequence[AnswerToken]) -> dict[str, Any]:
        """Return those of the next piece."""
        return {
            "text_offset": [self._place(token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "tokens": [token.text for token in tokens],
            # The token itself may not be among the likeliest, and is told all the same.
            "top_logprobs": [{each.text: each.logprob for each in (*token.top, token)} for token in tokens],
        }

    def _place(self, token: AnswerToken) -> int:
        before = self._offset
        self._offset += len(self._decoder.decode(token.raw))
        return before
