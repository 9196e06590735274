"""An encoder without a model, for tests of what stands around one: a token is a word, a vector counts letters."""

import asyncio
import math
import struct
from collections.abc import Sequence

from app.embeddings import EmbeddingInfo, EmbeddingRequest, Embeddings, EncodedInputs
from app.engine.base import EngineInfo, EngineStatus
from app.errors import EngineNotReady, InvalidRequest, ShuttingDown
from app.types import EngineState

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :[]_"
INFO = EmbeddingInfo(
    dimension=len(LETTERS),
    max_tokens=40,
    pooling=("mean",),
    normalized=True,
    dimensions=(),
    prompts=(("query", "query: "),),
)


class WordEncoder:
    """An `EncoderEngine`; its token ids are letters, and it reads whole words."""

    def __init__(self, model: str, *, info: EmbeddingInfo | None = INFO, seconds: float = 0) -> None:
        """Args: seconds: that a request takes."""
        self.model = model
        self.seconds = seconds
        self.requests: list[EmbeddingRequest] = []
        self.live: dict[str, asyncio.Task[None]] = {}
        self._info = EngineInfo(model=model, engine="encoder", context_length=40, vocab_size=500, embedding=info)
        self._state = EngineState.LOADING

    @property
    def info(self) -> EngineInfo:
        if self._state is EngineState.LOADING:
            raise EngineNotReady("The model is still loading.")
        return self._info

    def status(self) -> EngineStatus:
        return EngineStatus(self._state, len(self.live), 0, 0)

    async def start(self) -> None:
        self._state = EngineState.READY

    async def wait_ready(self) -> None:
        return

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def prepare_embedding(self, request: EmbeddingRequest) -> EncodedInputs:
        """Encode each word as one token, the number of its letters."""
        embedding = self.info.embedding
        assert embedding is not None
        prompt, most = embedding.prompt(request.prompt_name, request.input_type), request.most_tokens(embedding)
        texts = [(prompt + each).split() if isinstance(each, str) else each for each in request.inputs]
        return EncodedInputs(token_ids=tuple(tuple(map(_token, words))[:most] for words in texts))

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        embedding, encoded = self.info.embedding, request.encoded
        if embedding is None or encoded is None:
            raise InvalidRequest("This model does not embed texts.")
        embedding.check_dimensions(request.dimensions)
        encoded.check(embedding, self.info.vocab_size)
        self.requests.append(request)
        self.live[request.id] = asyncio.create_task(asyncio.sleep(self.seconds))
        try:
            await asyncio.wait([self.live[request.id]])
            if self.live[request.id].cancelled():
                raise ShuttingDown()
        finally:
            self.live.pop(request.id).cancel()
        request.progress.computed = encoded.tokens
        length = request.dimensions or embedding.dimension
        prompt = embedding.prompt(request.prompt_name, request.input_type)
        return Embeddings(
            vectors=tuple(_vector(_text(each, prompt), length) for each in request.inputs),
            dimension=length,
            prompt_tokens=encoded.tokens,
            model=self.model,
        )

    async def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self.live[request_id].cancel()

    async def close(self) -> None:
        self._state = EngineState.CLOSED
        for each in tuple(self.live.values()):
            each.cancel()


def _token(word: str | int) -> int:
    return word if isinstance(word, int) else len(word)


def _text(given: str | tuple[int, ...], prompt: str) -> str:
    return prompt + given if isinstance(given, str) else "".join(map(chr, given))


def _vector(text: str, length: int) -> bytes:
    counts = [text.lower().count(letter) + 0.1 for letter in LETTERS[:length]]
    return struct.pack(f"<{length}f", *(count / math.hypot(*counts) for count in counts))
