"""The engine of an encoder, over a worker whose words the test writes."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.config import DeadlineConfig, EmbeddingsConfig
from app.embeddings import EmbeddingInfo, EmbeddingRequest, Embeddings
from app.engine.encoder import LocalEncoder
from app.errors import (
    AppError,
    DeadlineExceeded,
    EngineBusy,
    EngineFailed,
    EngineNotReady,
    InputTooLong,
    InvalidRequest,
    ShuttingDown,
)
from app.ipc.messages import Embed, Embedded
from app.types import EngineState, Tenant
from tests.unit.engine.fake_worker import FakeWorkers
from tests.unit.tiny_encoders import wordpiece_tokenizer
from tests.unit.tiny_models import save
from tests.waiting import until

TOKENIZER = wordpiece_tokenizer()
INFO = EmbeddingInfo(
    dimension=2,
    max_tokens=16,
    pooling=("mean",),
    normalized=True,
    prompts=(("query", "query: "), ("passage", "passage: ")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TOKENIZER, tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def encoder_on(
    workers: FakeWorkers, *, info: EmbeddingInfo = INFO, deadlines: DeadlineConfig | None = None, **config: Any
) -> AsyncIterator[LocalEncoder]:
    """Yield an encoder that is ready, and close it at the end."""
    workers.message = structs.replace(
        workers.message, runner="encoder", context_length=16, vocab_size=len(TOKENIZER), embedding=info
    )
    settings = EmbeddingsConfig(model="models/enc", **config)
    encoder = LocalEncoder(settings, deadlines or DeadlineConfig(), launch=workers, backoff_seconds=0.0)
    await encoder.start()
    await encoder.wait_ready()
    try:
        yield encoder
    finally:
        await encoder.close()


def request_for(
    *inputs: str | tuple[int, ...], name: str = "one", tenant: str = "t", **fields: Any
) -> EmbeddingRequest:
    return EmbeddingRequest(id=name, tenant=Tenant.owner(tenant), inputs=inputs, **fields)


async def embed(encoder: LocalEncoder, request: EmbeddingRequest) -> Embeddings:
    return await encoder.embed(structs.replace(request, encoded=await encoder.prepare_embedding(request)))


async def sent(workers: FakeWorkers, count: int = 1) -> list[Embed]:
    """Wait until the worker has been given so many requests."""

    def given() -> list[Embed]:
        return [message for message in workers.newest.heard if isinstance(message, Embed)]

    await until(lambda: len(given()) >= count)
    return given()


def vector(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


async def test_texts_become_vectors_in_their_order(folder: Path):
    """However the worker orders them."""
    workers = FakeWorkers(folder)
    async with encoder_on(workers) as encoder:
        working = asyncio.create_task(embed(encoder, request_for("the cat", "a dog", tenant="anna")))
        (message,) = await sent(workers)
        assert ("owner:anna", tuple(TOKENIZER("the cat").input_ids)) == (message.tenant, message.inputs[0])
        assert (0, 1) == (encoder.status().running, encoder.status().waiting)
        workers.newest.event(message.id)
        await until(lambda: encoder.status().running == 1)
        workers.newest.say(Embedded(message.id, (1,), (vector(0, 1),)))
        workers.newest.say(Embedded(message.id, (0,), (vector(1, 0),)))
        workers.newest.event(message.id, finish="stop")
        embedded = await working

        assert ((vector(1, 0), vector(0, 1)), 2, "enc") == (embedded.vectors, embedded.dimension, embedded.model)
        assert embedded.prompt_tokens == sum(map(len, message.inputs))
        assert (0, 0) == (encoder.status().running, encoder.status().waiting)
        assert [] == workers.newest.cancelled


async def test_the_progress_counts_the_tokens_of_texts_that_were_embedded(folder: Path):
    workers = FakeWorkers(folder)
    async with encoder_on(workers) as encoder:
        request = request_for("the cat sat", "a")
        working = asyncio.create_task(embed(encoder, request))
        (message,) = await sent(workers)
        workers.newest.say(Embedded(message.id, (0,), (vector(1, 0),)))
        await until(lambda: request.progress.computed > 0)
        assert len(message.inputs[0]) == request.progress.computed
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert [message.id] == workers.newest.cancelled
        assert (0, 0) == (encoder.status().running, encoder.status().waiting)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, ""),
        ({"prompt_name": "query"}, "query: "),
        ({"input_type": "query"}, "query: "),
        ({"input_type": "document"}, "passage: "),
    ],
)
async def test_the_prompt_that_a_request_names_stands_in_front_of_its_texts(
    fields: dict[str, Any], prompt: str, folder: Path
):
    async with encoder_on(FakeWorkers(folder)) as encoder:
        encoded = await encoder.prepare_embedding(request_for("the cat", **fields))
        assert (tuple(TOKENIZER(f"{prompt}the cat").input_ids),) == encoded.token_ids
        assert 0 == encoded.prompt_tokens


async def test_a_default_prompt_stands_in_front_of_texts_that_name_none(folder: Path):
    info = EmbeddingInfo(**{name: getattr(INFO, name) for name in INFO.__slots__} | {"default_prompt": "passage"})
    async with encoder_on(FakeWorkers(folder), info=info) as encoder:
        encoded = await encoder.prepare_embedding(request_for("the cat"))
        assert (tuple(TOKENIZER("passage: the cat").input_ids),) == encoded.token_ids


async def test_the_worker_learns_how_much_of_a_prompt_is_not_pooled(folder: Path):
    info = EmbeddingInfo(**{name: getattr(INFO, name) for name in INFO.__slots__} | {"pools_prompt": False})
    workers = FakeWorkers(folder)
    async with encoder_on(workers, info=info) as encoder:
        working = asyncio.create_task(embed(encoder, request_for("the cat", prompt_name="query")))
        (message,) = await sent(workers)
        assert len(TOKENIZER("query: ").input_ids) - 1 == message.prompt_tokens
        working.cancel()


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (
            request_for("a", "the cat sat " * 9),
            InputTooLong,
            "at index 1 has 29 tokens, and the model embeds",
        ),
        (request_for((2, 999, 3)), InvalidRequest, "names a token at index 0 that the model does not have"),
        (request_for("a", prompt_name="code"), InvalidRequest, "it has: query, passage"),
        (request_for("a", dimensions=1), InvalidRequest, "dimensions must be 2 or left out"),
    ],
)
async def test_what_the_model_cannot_embed_is_refused_and_never_sent(
    request_: EmbeddingRequest, error: type[AppError], message: str, folder: Path
):
    workers = FakeWorkers(folder)
    async with encoder_on(workers) as encoder:
        with pytest.raises(error, match=message):
            await embed(encoder, request_)
        assert [] == workers.newest.heard


@pytest.mark.parametrize(("truncate", "tokens"), [(-1, 16), (5, 5), (99, 16)])
async def test_long_texts_are_cut_where_the_request_says_so(truncate: int, tokens: int, folder: Path):
    async with encoder_on(FakeWorkers(folder)) as encoder:
        encoded = await encoder.prepare_embedding(request_for("the cat sat " * 9, truncate_tokens=truncate))
        assert tokens == encoded.tokens


async def test_a_tenant_with_more_waiting_tokens_than_its_share_is_refused_and_no_other(folder: Path):
    """A tenant without any request may always have one."""
    workers = FakeWorkers(folder)
    async with encoder_on(workers, max_waiting_tokens=12) as encoder:
        working = [asyncio.create_task(embed(encoder, request_for("the cat sat " * 4)))]
        await sent(workers)
        with pytest.raises(EngineBusy):
            await embed(encoder, request_for("a", name="two"))
        working.append(asyncio.create_task(embed(encoder, request_for("a", name="three", tenant="other"))))
        assert 2 == len(await sent(workers, 2))
        for each in working:
            each.cancel()
        await asyncio.gather(*working, return_exceptions=True)


@pytest.mark.parametrize("begins", [False, True])
async def test_a_request_that_takes_too_long_is_given_up_and_cancelled(begins: bool, folder: Path):
    workers = FakeWorkers(folder)
    deadlines = DeadlineConfig(waiting_seconds=0.3, total_seconds=0.6)
    async with encoder_on(workers, deadlines=deadlines) as encoder:
        working = asyncio.create_task(embed(encoder, request_for("a")))
        (message,) = await sent(workers)
        if begins:
            workers.newest.event(message.id)
        with pytest.raises(DeadlineExceeded, match="took too long" if begins else "waited too long"):
            await working
        assert [message.id] == workers.newest.cancelled


@pytest.mark.parametrize(("invalid", "error"), [(True, InvalidRequest), (False, EngineFailed)])
async def test_an_error_of_the_worker_is_the_requests(invalid: bool, error: type[AppError], folder: Path):
    from app.ipc.messages import Step, TokenEvent

    workers = FakeWorkers(folder)
    async with encoder_on(workers) as encoder:
        working = asyncio.create_task(embed(encoder, request_for("a")))
        (message,) = await sent(workers)
        workers.newest.say(Step([TokenEvent(message.id, error="It failed.", invalid=invalid)]))
        with pytest.raises(error, match=r"It failed\."):
            await working


async def test_a_lost_worker_fails_its_requests_and_the_next_one_serves(folder: Path):
    workers = FakeWorkers(folder)
    async with encoder_on(workers) as encoder:
        working = asyncio.create_task(embed(encoder, request_for("a")))
        await sent(workers)
        workers.newest.kill()
        with pytest.raises(EngineFailed, match="failed during this request"):
            await working
        await until(lambda: len(workers.links) == 2)
        await encoder.wait_ready()
        again = asyncio.create_task(embed(encoder, request_for("a")))
        (message,) = await sent(workers)
        workers.newest.say(Embedded(message.id, (0,), (vector(1, 0),)))
        workers.newest.event(message.id, finish="stop")
        assert (vector(1, 0),) == (await again).vectors
        assert 1 == encoder.status().restarts


@pytest.mark.parametrize("how", ["abort", "close"])
async def test_an_aborted_request_ends_at_once(how: str, folder: Path):
    workers = FakeWorkers(folder)
    async with encoder_on(workers) as encoder:
        working = asyncio.create_task(embed(encoder, request_for("a")))
        await sent(workers)
        await (encoder.abort("one") if how == "abort" else encoder.close())
        with pytest.raises(ShuttingDown):
            await working


async def test_a_model_that_is_not_loaded_takes_nothing(folder: Path):
    encoder = LocalEncoder(EmbeddingsConfig(model="m"), DeadlineConfig(), launch=FakeWorkers(folder, ready=False))
    assert EngineState.LOADING is encoder.status().state
    with pytest.raises(EngineNotReady):
        await encoder.prepare_embedding(request_for("a"))
    with pytest.raises(EngineNotReady):
        _ = encoder.info
    await encoder.close()


async def test_a_tokenizer_that_cannot_be_read_is_no_model(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    encoder = LocalEncoder(EmbeddingsConfig(model="m"), DeadlineConfig(), launch=FakeWorkers(tmp_path))
    await encoder.start()
    with pytest.raises(EngineFailed, match="tokenizer cannot be loaded"):
        await encoder.wait_ready()
    await encoder.close()
