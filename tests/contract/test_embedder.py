"""What every Embedder promises.  One joins by adding a factory to `EMBEDDERS`."""

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
import pytest_asyncio
from msgspec import structs

from app.config import DeadlineConfig, EmbeddingsConfig, ModelConfig
from app.embeddings import EmbeddingRequest, Embeddings
from app.engine.base import Embedder, HostedEngine
from app.engine.encoder import LocalEncoder
from app.engine.local import LocalEngine
from app.errors import EngineNotReady, InputTooLong, InvalidRequest
from app.types import EngineState, Tenant
from tests.unit.tiny_encoders import save_tiny_encoder
from tests.unit.tiny_models import save_tiny_llama
from tests.waiting import START_SECONDS
from tests.web.word_encoder import WordEncoder

pytestmark = pytest.mark.asyncio(loop_scope="module")


class HostedEmbedder(HostedEngine, Embedder, Protocol):
    """An engine that embeds, whatever else it does."""


EMBEDDERS: dict[str, Callable[[Path], HostedEmbedder]] = {
    "encoder": lambda folder: LocalEncoder(
        EmbeddingsConfig(model=str(save_tiny_encoder(folder / "m")), matryoshka=True), DeadlineConfig()
    ),
    "chat model": lambda folder: LocalEngine(
        ModelConfig(name=str(save_tiny_llama(folder / "m")), embeddings="mean"), DeadlineConfig()
    ),
    "words": lambda folder: WordEncoder("m"),
}
TEXTS = ("the cat sat", "a dog ran to the sea", "the cat sat")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=EMBEDDERS.values(), ids=EMBEDDERS)
async def unclosed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[HostedEmbedder]:
    """A loaded engine, shared by the tests of this module: a worker takes seconds to start."""
    embedder: HostedEmbedder = request.param(tmp_path_factory.mktemp("model"))
    with pytest.raises(EngineNotReady):
        await embedder.prepare_embedding(request_for("early"))
    await embedder.start()
    async with asyncio.timeout(START_SECONDS):
        await embedder.wait_ready()
    yield embedder
    await embedder.close()


@pytest_asyncio.fixture(loop_scope="module")
async def embedder(unclosed: HostedEmbedder) -> AsyncIterator[HostedEmbedder]:
    """The engine, which has to be idle again after each test."""
    yield unclosed
    status = unclosed.status()
    assert (EngineState.READY, 0, 0) == (status.state, status.running, status.waiting)


def request_for(*inputs: str | tuple[int, ...], name: str = "one", **fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(id=name, tenant=Tenant.owner("t"), inputs=inputs, **fields)


async def embed(embedder: HostedEmbedder, request: EmbeddingRequest) -> Embeddings:
    return await embedder.embed(structs.replace(request, encoded=await embedder.prepare_embedding(request)))


def numbers(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


async def test_each_text_has_a_vector_of_length_one_and_the_same_text_the_same(embedder: HostedEmbedder):
    request = request_for(*TEXTS)
    embedded = await embed(embedder, request)
    info = embedder.info.embedding
    assert info is not None
    first, second, third = map(numbers, embedded.vectors)

    assert {info.dimension} == {len(first), len(second), embedded.dimension}
    assert pytest.approx(1.0, abs=1e-5) == math.hypot(*first)
    assert first == pytest.approx(third, abs=1e-5)
    assert first != pytest.approx(second, abs=1e-2)
    assert request.progress.computed == embedded.prompt_tokens > 0


async def test_a_text_has_the_same_vector_in_any_company(embedder: HostedEmbedder):
    (single,) = (await embed(embedder, request_for(TEXTS[0]))).vectors
    others = [f"the dog and the cat {number} ran" for number in range(40)]
    among = (await embed(embedder, request_for(*others, TEXTS[0]))).vectors[-1]
    assert numbers(single) == pytest.approx(numbers(among), abs=1e-5)


async def test_many_requests_at_once_each_get_their_own_vectors(embedder: HostedEmbedder):
    texts = [f"text {number} of the cat" for number in range(12)]
    single = [(await embed(embedder, request_for(text))).vectors[0] for text in texts]
    requests = [embed(embedder, request_for(text, name=f"r{number}")) for number, text in enumerate(texts)]
    at_once = [each.vectors[0] for each in await asyncio.gather(*requests)]
    for one, other in zip(single, at_once, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-5)


async def test_a_cancelled_request_leaves_nothing_behind(embedder: HostedEmbedder):
    working = asyncio.create_task(embed(embedder, request_for(*["the old red house by the sea"] * 2000)))
    while not embedder.status().running + embedder.status().waiting and not working.done():  # noqa: ASYNC110  # no event
        await asyncio.sleep(0.001)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert (await embed(embedder, request_for("the cat", name="two"))).vectors


async def test_a_text_longer_than_the_model_reads_is_refused_by_its_index_or_cut(embedder: HostedEmbedder):
    info = embedder.info.embedding
    assert info is not None
    long_text = "the cat sat " * info.max_tokens
    with pytest.raises(InputTooLong, match="at index 1"):
        await embed(embedder, request_for("a", long_text))
    cut = await embed(embedder, request_for(long_text, truncate_tokens=-1))
    assert info.max_tokens == cut.prompt_tokens


async def test_vectors_are_cut_where_the_model_allows_it_and_have_length_one_again(embedder: HostedEmbedder):
    info = embedder.info.embedding
    assert info is not None
    if info.dimensions is None:
        with pytest.raises(InvalidRequest, match="dimensions"):
            await embed(embedder, request_for("the cat", dimensions=2))
        return
    whole = numbers((await embed(embedder, request_for("the cat"))).vectors[0])
    cut = numbers((await embed(embedder, request_for("the cat", dimensions=2))).vectors[0])
    assert pytest.approx(cut, abs=1e-5) == [number / math.hypot(*whole[:2]) for number in whole[:2]]


async def test_a_prompt_that_the_model_does_not_have_is_refused(embedder: HostedEmbedder):
    with pytest.raises(InvalidRequest, match="prompt_name"):
        await embed(embedder, request_for("the cat", prompt_name="poem"))
