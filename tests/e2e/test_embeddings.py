"""Embeddings of a real service: an encoder in a worker of its own beside the chat model; OpenAI's and LangChain's
clients."""

import asyncio
import base64
import json
import math
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr
from transformers import AutoModel, AutoTokenizer

from tests.e2e.conftest import KEY, Service, Start
from tests.unit.tiny_encoders import SIZE, save_tiny_encoder
from tests.waiting import START_SECONDS, wait_for

pytestmark = pytest.mark.e2e

ENCODER, CHAT = "tiny-encoder", "tiny-chat"
TEXTS = ["the cat sat on a mat", "a dog ran to the sea", "Paris"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("model") / ENCODER)


@pytest.fixture(scope="module")
def embedding(start: Start, folder: Path) -> Service:
    """The embedded model, which embeds too, and an encoder."""
    service = start(
        EMBEDDINGS__MODEL=str(folder),
        EMBEDDINGS__THREADS="1",
        MODEL__EMBEDDINGS="mean",
        EMBEDDINGS__MAX_BATCH_TOKENS="64",
    )
    wait_for(lambda: state(service) == "ready", START_SECONDS)
    return service


def state(service: Service) -> str:
    return str(service.get("/status").json()["embeddings"][ENCODER]["state"])


def figures(service: Service) -> dict[str, int]:
    found: dict[str, int] = service.get("/status").json()["embeddings"][ENCODER]
    return found


@pytest.fixture
def client(embedding: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedding.url}/v1", api_key=KEY, timeout=60, max_retries=0) as client:
        yield client


@torch.inference_mode()
def expected(folder: Path, texts: list[str]) -> list[list[float]]:
    """Return what transformers computes for each text by itself, pooled and normalized by hand."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in texts]
    return [[float(number) for number in vector / vector.norm()] for vector in vectors]


def test_openais_client_gets_the_models_own_vectors(client: openai.OpenAI, folder: Path):
    """It asks for base64 by itself, and for lists of numbers where it is told to."""
    by_default = client.embeddings.create(model=ENCODER, input=TEXTS)
    as_numbers = client.embeddings.create(model=ENCODER, input=TEXTS, encoding_format="float")

    for answer in (by_default, as_numbers):
        assert ([0, 1, 2], ENCODER) == ([each.index for each in answer.data], answer.model)
        for each, vector in zip(answer.data, expected(folder, TEXTS), strict=True):
            assert vector == pytest.approx(each.embedding, abs=1e-5)
    tokens = sum(map(len, AutoTokenizer.from_pretrained(folder)(TEXTS).input_ids))
    assert (tokens, tokens) == (by_default.usage.prompt_tokens, by_default.usage.total_tokens)


def test_token_ids_of_the_models_own_tokenizer_give_the_same_vectors(client: openai.OpenAI, folder: Path):
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS).input_ids
    by_ids = client.embeddings.create(model=ENCODER, input=ids)
    one = client.embeddings.create(model=ENCODER, input=ids[0])
    for each, vector in zip([*by_ids.data, *one.data], expected(folder, [*TEXTS, TEXTS[0]]), strict=True):
        assert vector == pytest.approx(each.embedding, abs=1e-5)


def test_a_prompt_stands_in_front_of_the_text(client: openai.OpenAI, folder: Path):
    answer = client.embeddings.create(model=ENCODER, input=TEXTS[0], extra_body={"input_type": "query"})
    (vector,) = expected(folder, [f"query: {TEXTS[0]}"])
    assert vector == pytest.approx(answer.data[0].embedding, abs=1e-5)


def test_the_chat_model_embeds_where_its_setting_says_so(client: openai.OpenAI, embedding: Service):
    answer = client.embeddings.create(model=CHAT, input=["What is the capital of France?", "Paris"])
    first, second = (each.embedding for each in answer.data)
    assert pytest.approx(1.0, abs=1e-4) == math.hypot(*first)
    assert len(first) == embedding.get(f"/v1/models/{CHAT}").json()["embedding"]["dimension"]
    assert first != pytest.approx(second, abs=1e-2)
    assert "Paris" in embedding.chat("What is the capital of France?")["message"]["content"]


def test_langchains_client_works_with_texts(embedding: Service, folder: Path):
    """`check_embedding_ctx_length=False`: by default it sends the ids of OpenAI's own tokenizer."""
    langchain = OpenAIEmbeddings(
        openai_api_base=f"{embedding.url}/v1",
        openai_api_key=SecretStr(KEY),
        model=ENCODER,
        check_embedding_ctx_length=False,
    )
    vectors = langchain.embed_documents(TEXTS)
    for ours, theirs in zip(expected(folder, TEXTS), vectors, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)

    async def embed() -> list[float]:
        # Closed in the loop that has opened it; LangChain leaves that to the garbage collector.
        async with langchain.async_client._client:
            return await langchain.aembed_query(TEXTS[0])

    assert vectors[0] == pytest.approx(asyncio.run(embed()), abs=1e-5)

    store = InMemoryVectorStore(langchain)
    store.add_texts(TEXTS)
    assert TEXTS[1] == store.similarity_search("a dog ran to the sea", k=1)[0].page_content


def test_ids_of_another_tokenizer_are_refused_with_what_to_do(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model=ENCODER, input=[9, 21, 37])


def test_the_wrong_model_for_either_task_is_400(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="/v1/embeddings"):
        client.chat.completions.create(model=ENCODER, messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="absent", input="a")


def test_many_clients_at_once_each_get_their_own_vectors(embedding: Service, folder: Path):
    texts = [f"the cat and {number} dogs" for number in range(24)]

    async def embed_all() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{embedding.url}/v1", api_key=KEY, timeout=60) as client:
            answers = await asyncio.gather(*(client.embeddings.create(model=ENCODER, input=text) for text in texts))
            return [answer.data[0].embedding for answer in answers]

    for ours, theirs in zip(expected(folder, texts), asyncio.run(embed_all()), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_chat_streams_on_while_the_same_model_embeds(embedding: Service):
    """Passes over texts run between the steps of the chat."""
    ended: list[int] = []

    def embed() -> None:
        body = {"model": CHAT, "input": ["the old red house by the sea and a dog " * 8] * 60}
        ended.append(embedding.client.post("/v1/embeddings", json=body).status_code)

    single = embedding.chat("Tell me a story", max_tokens=60, cache=False)
    thread = threading.Thread(target=embed)
    thread.start()
    beside = embedding.chat("Tell me a story", max_tokens=60, cache=False)
    thread.join(60)

    assert [200] == ended
    assert single["message"] == beside["message"]


def test_a_client_that_hangs_up_frees_the_encoder_within_a_pass(embedding: Service):
    async def hang_up() -> None:
        async with openai.AsyncOpenAI(base_url=f"{embedding.url}/v1", api_key=KEY, max_retries=0) as client:
            sending = asyncio.create_task(client.embeddings.create(model=ENCODER, input=["the cat sat " * 10] * 2000))
            while not await asyncio.to_thread(lambda: figures(embedding)["running"]):  # no event
                assert not sending.done()
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    asyncio.run(hang_up())
    wait_for(lambda: not figures(embedding)["running"])


def test_many_texts_have_one_vector_each(embedding: Service):
    body = {"model": ENCODER, "input": [f"text {number}" for number in range(2048)], "encoding_format": "base64"}
    reply = embedding.client.post("/v1/embeddings", json=body)
    data = reply.json()["data"]
    assert list(range(2048)) == [each["index"] for each in data]
    assert {4 * SIZE} == {len(base64.b64decode(each["embedding"])) for each in data}
    assert not any(math.isnan(number) for number in struct.unpack(f"<{SIZE}f", base64.b64decode(data[0]["embedding"])))


def test_the_use_is_counted(embedding: Service):
    before = json.loads(embedding.get("/v1/usage").text)
    embedding.client.post("/v1/embeddings", json={"input": "the cat sat"})
    wait_for(lambda: json.loads(embedding.get("/v1/usage").text) != before)


def test_a_worker_that_dies_is_replaced_and_takes_the_chat_model_not_along(embedding: Service):
    """The last of this file: the encoder is another process afterwards."""
    chat, pid = embedding.engine()["worker_pid"], figures(embedding)["worker_pid"]
    psutil.Process(pid).kill()

    def is_replaced() -> bool:
        # Of one moment: between two answers it may die, as far as the service knows.
        found: dict[str, Any] = embedding.get("/status").json()["embeddings"][ENCODER]
        return (found["state"], found["restarts"]) == ("ready", 1)

    wait_for(is_replaced, START_SECONDS)

    assert chat == embedding.engine()["worker_pid"]
    assert 200 == embedding.client.post("/v1/embeddings", json={"input": "the cat sat"}).status_code
