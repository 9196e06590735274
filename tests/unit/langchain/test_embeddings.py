"""EngineEmbeddings is a HuggingFaceEmbeddings in anyone's code, and loads nothing into this process."""

import asyncio
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import HuggingFaceEmbeddings

from app.langchain.embeddings import EngineEmbeddings
from tests.web.word_encoder import LETTERS, WordEncoder

TEXTS = ["the cat sat", "zebras zoom"]


@pytest.fixture
async def encoder() -> AsyncIterator[WordEncoder]:
    encoder = WordEncoder("enc")
    await encoder.start()
    yield encoder
    await encoder.close()


async def test_it_is_what_its_name_says(encoder: WordEncoder):
    face = EngineEmbeddings(embedder=encoder, model="enc")
    assert isinstance(face, HuggingFaceEmbeddings)
    assert isinstance(face, Embeddings)
    assert "enc" == face.model_name


async def test_documents_and_queries_become_lists_of_numbers(encoder: WordEncoder):
    face = EngineEmbeddings(embedder=encoder, model="enc", query_encode_kwargs={"prompt_name": "query"})
    vectors = await face.aembed_documents(TEXTS)
    query = await face.aembed_query(TEXTS[0])

    assert [len(LETTERS)] * 2 == [len(vector) for vector in vectors]
    assert pytest.approx(1.0, abs=1e-6) == math.hypot(*vectors[0])
    assert [None, "query"] == [request.prompt_name for request in encoder.requests]
    assert query != vectors[0]
    assert [] == await face.aembed_documents([])


async def test_arguments_of_a_call_hold_for_queries_too_unless_they_have_their_own(encoder: WordEncoder):
    face = EngineEmbeddings(embedder=encoder, model="enc", encode_kwargs={"truncate_dim": 3})
    assert 3 == len(await face.aembed_query("a"))


async def test_the_sync_methods_work_from_another_thread(encoder: WordEncoder):
    face = EngineEmbeddings(embedder=encoder, model="enc", loop=asyncio.get_running_loop())
    assert await face.aembed_documents(TEXTS) == await asyncio.to_thread(face.embed_documents, TEXTS)
    assert await face.aembed_query("a") == await asyncio.to_thread(face.embed_query, "a")


async def test_a_sync_call_that_would_wait_for_itself_raises(encoder: WordEncoder):
    for loop in (None, asyncio.get_running_loop()):
        face = EngineEmbeddings(embedder=encoder, model="enc", loop=loop)
        with pytest.raises(RuntimeError, match="aembed_query"):
            face.embed_query("a")


@pytest.mark.parametrize(
    "arguments",
    [
        {"encode_kwargs": {"precision": "int8"}},
        {"query_encode_kwargs": {"prompt": "x"}},
        {"model_kwargs": {"device": "cuda"}},
        {"multi_process": True},
    ],
)
async def test_an_argument_that_nothing_would_honour_is_refused(arguments: dict[str, Any], encoder: WordEncoder):
    with pytest.raises(ValueError, match=r"does not take: (precision|prompt|model_kwargs|multi_process)"):
        EngineEmbeddings(embedder=encoder, model="enc", **arguments)


async def test_a_vector_store_finds_the_nearest_document(encoder: WordEncoder):
    store = InMemoryVectorStore(EngineEmbeddings(embedder=encoder, model="enc"))
    await store.aadd_documents([Document(text) for text in TEXTS])
    (nearest,) = await store.asimilarity_search("zz zebra", k=1)
    assert TEXTS[1] == nearest.page_content


def test_neither_torch_nor_sentence_transformers_is_imported():
    program = (
        "import sys; from app.langchain.embeddings import EngineEmbeddings; EngineEmbeddings(embedder=None, model='m');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'sentence_transformers')))"
    )
    assert 0 == subprocess.run([sys.executable, "-c", program], check=False).returncode
