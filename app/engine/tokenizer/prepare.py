"""Encodes the prompt of a request: a short one on the event loop, a long one in a thread."""

import asyncio
from functools import partial

from app.engine.base import PreparedPrompt, Tokenizer
from app.requests import GenerationRequest

INLINE_CHARS = 1000
"""A shorter text takes less time to encode than to hand to a thread; a chat template takes a lock and may wait."""


async def encode_prompt(tokenizer: Tokenizer, request: GenerationRequest) -> PreparedPrompt:
    """Return the token ids of a request's prompt, encoded at most once.

    Raises: InvalidRequest: the chat template or the tokenizer refuses the prompt.
    """
    ids = request.prompt_ids
    if ids is None and request.is_chat:
        encode = partial(tokenizer.encode_chat, continue_final_message=request.continue_final_message)
        ids = await asyncio.to_thread(encode, request.messages)
    elif ids is None:
        text = request.text or ""
        short = len(text) < INLINE_CHARS
        ids = tokenizer.encode_text(text) if short else await asyncio.to_thread(tokenizer.encode_text, text)
    return PreparedPrompt(prompt_tokens=len(ids), prompt_ids=ids)
