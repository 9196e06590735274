"""What a chunk says beside its text, as plain values under the names that LangChain's users know.

LangChain adds up what each piece of an answer brings: texts and lists are joined, so each piece tells only what is new.
"""

from typing import Any

from app.engine.base import Chunk, Engine
from app.engine.tokenizer.logprob_text import AnswerToken, spell
from app.types import Usage


def chunk_info(chunk: Chunk, model: str | None, engine: Engine) -> dict[str, Any] | None:
    """Return what a chunk says beside its text, as plain values for `generation_info`; None if it says no more."""
    info: dict[str, Any] = {}
    if chunk.logprobs:
        info["logprobs"] = {"content": [_token_dict(token) for token in spell(chunk.logprobs, engine.tokenizer)]}
    if chunk.finish_reason is not None:
        usage = chunk.usage or Usage(0, 0)
        info |= {
            "finish_reason": chunk.finish_reason.value,
            "model_name": model,
            "cached": chunk.cached,
            "token_usage": {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens},
        }
    return info or None


def _token_dict(token: AnswerToken) -> dict[str, Any]:
    """In the shape that langchain-openai gives them, which is OpenAI's."""
    return {
        "token": token.text,
        "bytes": list(token.raw),
        "logprob": token.logprob,
        "top_logprobs": [
            {"token": other.text, "bytes": list(other.raw), "logprob": other.logprob} for other in token.top
        ],
    }
