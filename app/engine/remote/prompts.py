"""Counts prompts: exactly by the model's own tokenizer, here or at the server, and safely where nobody has it.

A chat goes to its server as messages, so of its tokens only their number is wanted.
"""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from app.config import DeadlineConfig
from app.engine.base import PreparedPrompt
from app.engine.remote.pool import UpstreamPool
from app.engine.remote.upstream import Upstream
from app.engine.remote.wire import chat_messages, chat_tools
from app.engine.tokenizer.detokenize import detokenize
from app.engine.tokenizer.prepare import ModelTokenizer, PromptEncoder
from app.errors import EngineFailed, InvalidRequest
from app.requests import GenerationRequest
from app.types import Tenant

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""What is downloaded of a model whose weights are elsewhere."""
Decoded = TypeVar("Decoded")
TURN_TOKENS = 8
"""Tokens that a chat template writes around a message, or a tokenizer around a text."""
MOST_TURN_TOKENS = 64
"""More than any template writes around a message, a call, a tool or a variable, with the name of a speaker."""
TEMPLATE_TOKENS = 2048
"""More than a chat template that is not known here writes by itself, such as a system message of its own."""
_NORMALIZED_FACTOR = 3
"""By how much a normalizer can lengthen a text that is not ASCII: NFC's most over all of Unicode, in bytes."""


class PromptCounter(Protocol):
    """Knows the length of prompts, and as much of their tokens as can be known."""

    @property
    def tokenizer(self) -> ModelTokenizer | None:
        """Return None where it is elsewhere, or nowhere."""

    def most_tokens(self, request: GenerationRequest) -> int | None:
        """Return more tokens than a chat has, without reading it; None where that costs as much as to count them."""

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        """Count the prompt of a request.  Raises: InvalidRequest: it cannot be encoded."""

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool) -> str:
        """Return the text of tokens.  Raises: InvalidRequest: that is not known."""

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token as text.  Raises: InvalidRequest: that is not known."""

    def close(self) -> None:
        """Free what counting needs."""


class LocalCounter:
    """Counts with a tokenizer that was loaded here."""

    def __init__(self, tokenizer: ModelTokenizer, deadlines: DeadlineConfig) -> None:
        self.tokenizer = tokenizer
        # How many of its tokens the model has is not known here; its server refuses one that it has not.
        self._encoder = PromptEncoder(tokenizer, vocab_size=sys.maxsize, seconds=deadlines.waiting_seconds)

    def most_tokens(self, request: GenerationRequest) -> int | None:
        if not self.tokenizer.length.is_bounded:
            return None
        return self.tokenizer.template_bytes + _most_tokens(request)

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        prepared = await self._encoder.encode(request)
        return _without_ids(prepared) if request.is_chat else prepared

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool) -> str:
        decode = self.tokenizer.decode if control_tokens else partial(detokenize, self.tokenizer)
        return await asyncio.to_thread(decode, token_ids)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        read = self.tokenizer.token_text
        return await asyncio.to_thread(lambda: [read(token_id) for token_id in token_ids])

    def close(self) -> None:
        self._encoder.close()
        self.tokenizer.close()


async def load_tokenizer(
    name: str, *, hub_token: str | None, deadlines: DeadlineConfig, context_length: int
) -> LocalCounter:
    """Load a tokenizer from a folder, or from the hub.

    Raises: EngineFailed: there is none, or it cannot be used.
    """

    def load() -> ModelTokenizer:
        # transformers takes a second to import, and not every remote model has its tokenizer here.
        from app.engine.tokenizer.hf_tokenizer import HfTokenizer

        folder = Path(name).expanduser()
        return HfTokenizer(folder if folder.is_dir() else _download(name, hub_token), context_length=context_length)

    try:
        return LocalCounter(await asyncio.to_thread(load), deadlines)
    except Exception as error:
        raise EngineFailed(f"The tokenizer of remote.tokenizer cannot be loaded: {type(error).__name__}.") from error


def _download(name: str, hub_token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, token=hub_token, allow_patterns=list(TOKENIZER_FILES), ignore_patterns=["*/*"]))


class _Tokens(msgspec.Struct):
    count: int
    tokens: tuple[int, ...] = ()


class _Text(msgspec.Struct):
    prompt: str


class ServerCounter:
    """Counts by the route /tokenize of the servers themselves."""

    tokenizer: ModelTokenizer | None = None

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool

    def most_tokens(self, request: GenerationRequest) -> int | None:
        return TEMPLATE_TOKENS + _most_tokens(request)

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        body = partial(_tokenize_body, request)
        found = await self._call(request, "/tokenize", body, _Tokens)
        prepared = PreparedPrompt(prompt_tokens=found.count, prompt_ids=found.tokens)
        return _without_ids(prepared) if request.is_chat else prepared

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool) -> str:
        nobody = GenerationRequest(id="", tenant=Tenant.program())
        tokens = list(token_ids)

        def body(upstream: Upstream) -> dict[str, Any]:
            return {"model": _model(upstream), "tokens": tokens}

        return (await self._call(nobody, "/detokenize", body, _Text)).prompt

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        raise InvalidRequest.of_field(
            "return_token_strs", "is not supported for this model: its tokenizer is elsewhere"
        )

    def close(self) -> None:
        return

    async def _call(
        self,
        request: GenerationRequest,
        path: str,
        body: Callable[[Upstream], Mapping[str, Any]],
        kind: type[Decoded],
    ) -> Decoded:
        content = await self._pool.fetch(request, path, body)
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.MsgspecError:
            raise EngineFailed("The model's server does not tokenize as vLLM's does.") from None


def _tokenize_body(request: GenerationRequest, upstream: Upstream) -> dict[str, Any]:
    body: dict[str, Any] = {"model": _model(upstream)}
    if not request.is_chat:
        return body | {"prompt": request.text or ""}
    body["messages"] = chat_messages(request)
    if request.tools:
        body["tools"] = chat_tools(request)
    if variables := {name: value for name, value in request.template_kwargs if value is not None}:
        body["chat_template_kwargs"] = variables
    if request.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def _model(upstream: Upstream) -> str:
    return upstream.facts.model if upstream.facts else ""


class ByteCounter:
    """Guesses by the bytes of a prompt, rather too many than too few."""

    tokenizer: ModelTokenizer | None = None

    def __init__(self, bytes_per_token: float) -> None:
        self._bytes_per_token = bytes_per_token

    def most_tokens(self, request: GenerationRequest) -> int | None:
        return None

    async def prepare(self, request: GenerationRequest) -> PreparedPrompt:
        if request.is_chat:
            texts = [message.all_text for message in request.messages]
            texts += [tool.name + (tool.description or "") + tool.parameters for tool in request.tools]
            tokens = TURN_TOKENS * (len(texts) + 1) + sum(map(self._estimate, texts))
        else:
            tokens = self._estimate(request.text) + TURN_TOKENS if request.text else 0
        return PreparedPrompt(prompt_tokens=tokens, prompt_ids=None, is_estimate=True)

    def _estimate(self, text: str) -> int:
        return int(len(text.encode("utf-8", "surrogatepass")) / self._bytes_per_token) + 1

    async def detokenize(self, token_ids: Sequence[int], *, control_tokens: bool) -> str:
        raise InvalidRequest("Tokens cannot be read for this model, whose tokenizer is elsewhere; send text.")

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        raise InvalidRequest("Tokens cannot be read for this model, whose tokenizer is elsewhere; send text.")

    def close(self) -> None:
        return


def _most_tokens(request: GenerationRequest) -> int:
    """Return more tokens than messages and tools of a chat have, for tokenizers whose tokens are a byte or longer."""
    texts = [message.all_text for message in request.messages]
    texts += [call.name + call.id for message in request.messages for call in message.tool_calls]
    texts += [tool.name + (tool.description or "") + tool.parameters for tool in request.tools]
    texts += [str(value) for _, value in request.template_kwargs]
    return MOST_TURN_TOKENS * (len(texts) + 1) + sum(map(_most_bytes, texts))


def _most_bytes(text: str) -> int:
    return len(text) if text.isascii() else _NORMALIZED_FACTOR * len(text.encode("utf-8", "surrogatepass"))


def _without_ids(prepared: PreparedPrompt) -> PreparedPrompt:
    return PreparedPrompt(prompt_tokens=prepared.prompt_tokens, prompt_ids=None, is_lower_bound=prepared.is_lower_bound)
