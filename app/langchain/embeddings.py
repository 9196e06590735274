"""LangChain's face of a model that embeds: a HuggingFaceEmbeddings whose model runs behind `Embedder`.

The class is what its name says (isinstance holds) and works wherever LangChain takes embeddings, sync and async.
Nothing of sentence-transformers or torch is loaded into this process.
"""

import asyncio
import struct
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_huggingface import HuggingFaceEmbeddings
from msgspec import structs
from pydantic import BaseModel, ConfigDict

from app.embeddings import FLOAT_BYTES, EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.base import Embedder
from app.langchain.engine_loop import run
from app.types import Tenant

KNOWN_ARGUMENTS = frozenset(["prompt_name", "truncate_dim"])
"""Arguments of sentence-transformers' `encode` that are honoured; what else it takes concerns its own loop."""


class EngineEmbeddings(HuggingFaceEmbeddings):
    """A HuggingFaceEmbeddings whose model runs behind `Embedder`: batched with the requests of others, cancellable.

    Texts are embedded as they are, line breaks included, as by the HTTP route.

    Example: `await EngineEmbeddings(embedder=engine, model="my-encoder").aembed_query("Where is it?")`
    """

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, protected_namespaces=(), populate_by_name=True
    )

    embedder: Any
    """The `Embedder`; typed loosely because pydantic cannot check a Protocol without running its properties."""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop of the engine; the sync methods hand their work to it and raise where it is None."""

    def __init__(self, **kwargs: Any) -> None:
        """Raises: ValueError: an argument that nothing would honour."""
        # The inherited method would load the model into this process.
        BaseModel.__init__(self, **kwargs)
        unused = {"cache_folder", "model_kwargs", "multi_process", "show_progress"}.intersection(kwargs)
        arguments = {*self.encode_kwargs, *self.query_encode_kwargs}
        if unknown := sorted(unused | (arguments - KNOWN_ARGUMENTS)):
            raise ValueError(f"arguments that a served model does not take: {', '.join(unknown)}")

    async def prepare(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode the texts of a request."""
        embedder: Embedder = self.embedder
        return await embedder.prepare_embedding(request)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of an input that arrived as tokens."""
        embedder: Embedder = self.embedder
        return await embedder.detokenize(token_ids)

    async def run(self, request: EmbeddingRequest) -> Embeddings:
        """Embed prepared texts; the one place where LangChain's side meets the engine's."""
        embedder: Embedder = self.embedder
        return await embedder.embed(request)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of texts."""
        return await self._aembed(texts, self.encode_kwargs)

    async def aembed_query(self, text: str) -> list[float]:
        """Return the vector of a text that is looked for, behind the prompt that `query_encode_kwargs` names."""
        return (await self._aembed([text], self.query_encode_kwargs or self.encode_kwargs))[0]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the vectors of texts; not on the engine's own event loop."""
        vectors: list[list[float]] = run(self.aembed_documents(texts), self.loop)
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a text that is looked for; not on the engine's own event loop."""
        vector: list[float] = run(self.aembed_query(text), self.loop)
        return vector

    async def _aembed(self, texts: list[str], arguments: Mapping[str, Any]) -> list[list[float]]:
        if not texts:
            return []
        request = EmbeddingRequest(
            id=f"chain-{uuid.uuid4().hex}",
            tenant=Tenant.program(),
            inputs=tuple(texts),
            prompt_name=arguments.get("prompt_name"),
            dimensions=arguments.get("truncate_dim"),
            # As sentence-transformers does, which refuses no text for its length.
            truncate_tokens=-1,
        )
        embedded = await self.run(structs.replace(request, encoded=await self.prepare(request)))
        return [list(struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector)) for vector in embedded.vectors]
