"""POST /v1/embeddings: the vectors of one or several texts."""

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BeforeValidator, Field, StringConstraints
from starlette.responses import Response as HttpResponse
from typing_extensions import TypedDict

from app.embeddings import FLOAT_BYTES, EmbeddingRequest, Embeddings, InputType
from app.errors import InvalidRequest
from app.web.http.dependencies import RequestContext, RequestContextDep, bind_end_user
from app.web.http.errors import GENERATION_ERRORS, error_responses
from app.web.http.json_body import GeneratingRoute, StrictModel
from app.web.http.json_encoding import JsonArray, SegmentedJsonResponse
from app.web.http.sampling_params import MAX_TOKENS, TokenId, check_length
from app.web.http.sse import cancel_on_disconnect
from app.web.openai.errors import ERROR_FORMAT
from app.web.openai.request_model import Name
from app.web.openai.validators import prompts

MAX_INPUTS = 2048
"""OpenAI's own limit."""
INPUTS_PER_PLACE = 16
"""Texts of one request that occupy this process like one completion does."""
VECTORS_AT_ONCE = 64
"""Vectors that one part of the response holds."""
INPUT_TYPES: dict[str, InputType] = {
    "query": "query",
    "search_query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
}
"""The words of several services for the two kinds of texts."""

router = APIRouter(prefix="/v1", tags=["openai"], route_class=GeneratingRoute)

_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
_TokenLists = Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_INPUTS)]
Inputs = Annotated[
    tuple[str | tuple[int, ...], ...],
    Field(max_length=MAX_INPUTS),
    BeforeValidator(prompts, json_schema_input_type=str | _Texts | _TokenIds | _TokenLists),
]


class EmbeddingsRequest(StrictModel):
    """OpenAI's fields, and those that name the prompt of a text."""

    input: Inputs
    model: Name | None = Field(None, description="By default the embedding model of this service.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the numbers of each vector as little-endian float32."
    )
    dimensions: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="Numbers to cut each vector to, where the model is trained for that."
    )
    user: Annotated[str, StringConstraints(max_length=512)] | None = Field(
        None, description="The caller's end user; the log shows a hash of it."
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="vLLM's: tokens to cut each text to; -1 is what the model takes."
    )
    prompt_name: Annotated[str, StringConstraints(min_length=1, max_length=64)] | None = Field(
        None, description="The model's prompt to put in front of each text, by its name."
    )
    input_type: Literal["query", "search_query", "document", "passage", "search_document"] | None = Field(
        None, description="Takes the model's prompt for such texts, if it has one."
    )

    @property
    def answers(self) -> int:
        return -(-len(self.input) // INPUTS_PER_PLACE)

    def to_request(self, context: RequestContext) -> EmbeddingRequest:
        """Raises: InvalidRequest: a text is empty or too long, or fields contradict each other."""
        for index, each in enumerate(self.input):
            if each == "":
                raise InvalidRequest.of_field("input", f"must not hold an empty text, as it does at index {index}")
            if isinstance(each, str):
                check_length("input", len(each), context.max_prompt_chars)
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest.of_field("truncate_prompt_tokens", "must leave a token; -1 is what the model takes")
        if (self.prompt_name or self.input_type) and not all(isinstance(each, str) for each in self.input):
            field = "prompt_name" if self.prompt_name else "input_type"
            raise InvalidRequest.of_field(field, "needs texts: nothing is put in front of token ids")
        return context.embedding(
            inputs=self.input,
            model=self.model,
            dimensions=self.dimensions,
            prompt_name=self.prompt_name,
            input_type=None if self.input_type is None else INPUT_TYPES[self.input_type],
            truncate_tokens=self.truncate_prompt_tokens,
        )


class Embedding(TypedDict):
    """One vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(TypedDict):
    """The vectors in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def encode_vectors(vectors: Sequence[bytes], encoding: Literal["float", "base64"]) -> JsonArray:
    """Return OpenAI's objects as JSON; megabytes of numbers take a second, so this belongs in a thread."""
    encoded = JsonArray()
    for start in range(0, len(vectors), VECTORS_AT_ONCE):
        encoded.extend(
            [
                {"object": "embedding", "index": index, "embedding": _numbers(vector, encoding)}
                for index, vector in enumerate(vectors[start : start + VECTORS_AT_ONCE], start)
            ]
        )
    return encoded


def _numbers(vector: bytes, encoding: Literal["float", "base64"]) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector).decode()
    return list(struct.unpack(f"<{len(vector) // FLOAT_BYTES}f", vector))


async def _response(embedded: Embeddings, encoding: Literal["float", "base64"]) -> dict[str, Any]:
    tokens = embedded.prompt_tokens
    return {
        "object": "list",
        "data": await asyncio.to_thread(encode_vectors, embedded.vectors, encoding),
        "model": embedded.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


@router.post(
    "/embeddings",
    response_model=EmbeddingList,
    responses=error_responses(*GENERATION_ERRORS, error_format=ERROR_FORMAT),
)
async def embeddings(body: EmbeddingsRequest, context: RequestContextDep) -> HttpResponse:
    """Return the vectors of texts, as lists of numbers or as base64."""
    bind_end_user(context.request, body.user)
    request = body.to_request(context)
    work = context.container.embeddings.embed(request, context.caller)
    embedded = await cancel_on_disconnect(context.request, work)
    return SegmentedJsonResponse(await _response(embedded, body.encoding_format or "float"))
