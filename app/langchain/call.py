"""What passes by a chain: LangChain carries prompts and texts, and this goes beside them."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from app.engine.base import Chunk
from app.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What one request of ours adds to the prompt; bound to the model for this request only."""

    request_id: str
    tenant: str
    params: SamplingParams
    cache: bool = True
    prompt_ids: tuple[int, ...] | None = None
    """The prompt, where it is tokens and no text."""
    go_on: bool = False
    """Whether the last message of the conversation is to be continued."""
    opened: Callable[[AsyncGenerator[Chunk, None]], None] | None = None
    """Given the engine's stream, to close it: a chain that is closed leaves it to the garbage collector."""
    see: Callable[[Chunk], None] | None = None
    """Shown every chunk as the engine made it: an LLM's stream hands out nothing but text."""
