"""The types of embedding: the request, the description of a model that embeds, and its result."""

from dataclasses import dataclass
from typing import Literal

import msgspec

from app.errors import InputTooLong, InvalidRequest
from app.requests import Origin
from app.types import Tenant

FLOAT_BYTES = 4
"""Bytes of one number of a vector: little-endian float32."""

InputType = Literal["query", "document"]
PROMPTS_OF_TYPE: dict[InputType, tuple[str, ...]] = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}
"""Input type -> the names under which models have its prompt, the first that is there is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingInfo:
    """Description of how a model embeds texts."""

    dimension: int
    """Numbers of a vector."""
    max_tokens: int
    """Tokens of the longest text."""
    pooling: tuple[str, ...]
    """How the vectors of the tokens become one; several are put one after the other."""
    normalized: bool
    """Whether vectors have length 1."""
    dimensions: tuple[int, ...] | None = None
    """Shorter lengths that vectors may be cut to: () allows any, None none."""
    prompts: tuple[tuple[str, str], ...] = ()
    """Names and texts of what the model was trained to see in front of a text."""
    default_prompt: str | None = None
    """The name of the prompt in front of texts that name none."""
    pools_prompt: bool = True
    """Whether the tokens of the prompt are a part of what is pooled."""

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raises: InvalidRequest: vectors of this length are none of the model's."""
        if dimensions is None or dimensions == self.dimension:
            return
        if self.dimensions is None:
            raise InvalidRequest.of_field("dimensions", f"must be {self.dimension} or left out for this model")
        if dimensions > self.dimension or (self.dimensions and dimensions not in self.dimensions):
            allowed = ", ".join(map(str, self.dimensions)) or f"1 to {self.dimension}"
            raise InvalidRequest.of_field("dimensions", f"must be one of these for this model: {allowed}")

    def prompt(self, name: str | None, input_type: InputType | None) -> str:
        """Return the text to put in front of each text, empty for none.

        Raises: InvalidRequest: the model has no prompt of this name.
        """
        prompts = dict(self.prompts)
        if name is not None:
            if name not in prompts:
                known = ", ".join(prompts) or "none"
                raise InvalidRequest.of_field("prompt_name", f"is not a prompt of this model; it has: {known}")
            return prompts[name]
        typed = PROMPTS_OF_TYPE[input_type] if input_type is not None else ()
        chosen = next((each for each in typed if each in prompts), self.default_prompt)
        return prompts.get(chosen, "") if chosen is not None else ""


class EmbeddingProgress:
    """How far an engine has come with a request; written by the engine, read at any moment, even after a hang-up."""

    __slots__ = ("computed",)

    def __init__(self) -> None:
        self.computed = 0
        """Tokens of the texts that have been embedded."""


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request for the vectors of some texts, completed step by step from a dialect's body to the engine's input."""

    id: str
    """Unique among live requests."""
    tenant: Tenant
    inputs: tuple[str | tuple[int, ...], ...]
    """Texts, or texts as token ids, which are taken as they are."""
    dimensions: int | None = None
    """Length that the vectors are cut to; None leaves them as they are."""
    prompt_name: str | None = None
    input_type: InputType | None = None
    truncate_tokens: int | None = None
    """Cut texts to so many tokens; -1: to what the model takes; None refuses those that are longer than that."""
    model: str | None = None
    adapter: str | None = None
    priority: int = 0
    """Lower is served first."""
    origin: Origin = Origin()
    progress: EmbeddingProgress = msgspec.field(default_factory=EmbeddingProgress)
    encoded: "EncodedInputs | None" = None
    """The inputs as the model reads them."""

    def most_tokens(self, info: EmbeddingInfo | None) -> int | None:
        """Return to how many tokens a text is cut, None for no cut."""
        limit = self.truncate_tokens
        most = None if info is None else info.max_tokens
        return limit if limit is None or most is None else most if limit < 0 else min(limit, most)


class EncodedInputs(msgspec.Struct, frozen=True, kw_only=True):
    """The texts of a request as the model reads them."""

    token_ids: tuple[tuple[int, ...], ...]
    prompt_tokens: int = 0
    """Tokens at the beginning of each that are its prompt and not pooled."""

    @property
    def tokens(self) -> int:
        """Return how many tokens all texts have together."""
        return sum(map(len, self.token_ids))

    def check(self, info: EmbeddingInfo, vocab_size: int | None) -> None:
        """Raises: InputTooLong, InvalidRequest: the model cannot embed one of the texts; its index is named."""
        for index, ids in enumerate(self.token_ids):
            if not ids:
                raise InvalidRequest.of_field(
                    "input", f"holds a text without any token for this model, at index {index}"
                )
            if len(ids) > info.max_tokens:
                raise InputTooLong(index=index, tokens=len(ids), limit=info.max_tokens)
            if vocab_size is not None and max(ids) >= vocab_size:
                raise InvalidRequest.of_field(
                    "input",
                    f"names a token at index {index} that the model does not have; its last is {vocab_size - 1}. "
                    "Token ids must be of this model's own tokenizer; send texts instead",
                )


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """The vectors of a request's texts, in their order."""

    vectors: tuple[bytes, ...]
    """Little-endian float32 numbers."""
    dimension: int
    prompt_tokens: int
    """Tokens of all texts."""
    model: str = ""
