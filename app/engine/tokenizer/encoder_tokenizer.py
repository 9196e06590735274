"""The tokenizer of a model that embeds, in the API process: texts to the token ids that its encoder reads.

Encodes as transformers and sentence-transformers do, special tokens included: an encoder takes no orders from a control
token, so that one in a text is no more than a token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from app.embeddings import EncodedInputs
from app.errors import InvalidRequest


class EncoderTokenizer:
    """A fast tokenizer, safe to use from several threads: nothing in it changes."""

    def __init__(self, folder: Path | str) -> None:
        """Load `tokenizer.json` of a folder.

        Raises: Exception: the file is missing or damaged; tokenizers has no class of its own for it.
        """
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._before, self._behind = self._special_tokens()

    def encode(
        self, inputs: Sequence[str | tuple[int, ...]], *, prompt: str = "", truncate: int | None = None
    ) -> EncodedInputs:
        """Encode texts; those that arrive as token ids stay as they are.

        Args:
            prompt: is put in front of each text.
            truncate: tokens to cut to, special ones included; None cuts nothing.
        Raises: InvalidRequest: a text is not valid Unicode, or the tokenizer cannot encode it.
        """
        texts = [prompt + each for each in inputs if isinstance(each, str)]
        try:
            encodings = iter(self._tokenizer.encode_batch(texts, add_special_tokens=False) if texts else [])
        except BaseException as error:
            # The library has no classes of its own, and its panics are no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InvalidRequest.of_field("input", "holds a text that the model's tokenizer cannot encode") from None
        return EncodedInputs(
            token_ids=tuple(
                self._finish(next(encodings), truncate) if isinstance(each, str) else self._cut(index, each, truncate)
                for index, each in enumerate(inputs)
            ),
            prompt_tokens=self._length(prompt) if prompt else 0,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _finish(self, encoding: Any, truncate: int | None) -> tuple[int, ...]:
        """Return the ids of a text with the special tokens around it, which no cut removes."""
        if truncate is not None:
            encoding.truncate(max(0, truncate - len(self._before) - len(self._behind)))
        return tuple(self._tokenizer.post_process(encoding).ids)

    def _cut(self, index: int, token_ids: tuple[int, ...], truncate: int | None) -> tuple[int, ...]:
        """Return the ids of a text that arrived as ids, cut as a text is.

        Raises: InvalidRequest: they lack the special tokens, so another tokenizer has made them.  The vectors would
            look like any others and mean nothing; LangChain's OpenAIEmbeddings sends such ids by default.
        """
        before, behind = self._before, self._behind
        if token_ids[: len(before)] != before or token_ids[len(token_ids) - len(behind) :] != behind:
            raise InvalidRequest.of_field(
                "input",
                f"has token ids at index {index} that this model's own tokenizer did not make: it puts special tokens "
                "around each text. Send texts (in LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)",
            )
        if truncate is None or len(token_ids) <= truncate:
            return token_ids
        return (*token_ids[: max(len(before), truncate - len(behind))], *behind)

    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens in front of every text and those behind it."""
        encoding = self._tokenizer.encode("")
        ids, mask = encoding.ids, encoding.special_tokens_mask
        text = self._tokenizer.encode("a")
        first = next((place for place, special in enumerate(text.special_tokens_mask) if not special), len(ids))
        return tuple(ids[:first]), tuple(ids[first:]) if all(mask) else ()

    def _length(self, prompt: str) -> int:
        """Return how many tokens of a text are those of its prompt: without the special one at the end."""
        encoding = self._tokenizer.encode(prompt)
        return len(encoding.ids) - (encoding.special_tokens_mask[-1:] == [1])
