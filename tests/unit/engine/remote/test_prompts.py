"""How long a prompt is, for a model whose tokenizer is elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs
from transformers import PreTrainedTokenizerFast

from app.engine.base import PreparedPrompt
from app.engine.remote.engine import RemoteEngine
from app.errors import EngineFailed, InvalidRequest
from app.types import Message, Role, Tool
from tests.unit.engine.remote.requests import make_request
from tests.unit.engine.remote.scripted_server import CARD, Reply, ScriptedServer, engine_on, make_engine, serving
from tests.unit.tiny_models import chatml_tokenizer, gemma_tokenizer, llama_tokenizer, save

VLLM = Reply.json({"data": [CARD | {"owned_by": "vllm"}]})
TOKENIZE = {
    "/tokenize": Reply.json({"count": 3, "max_model_len": 99, "tokens": [5, 6, 7]}),
    "/detokenize": Reply.json({"prompt": "text"}),
}
HELLO = (Message(Role.USER, "Hello"),)
TEXTS = ("a", "hello world, the end", "Ünïcödé ☃ 漢字", "x" * 1000, '{"a": [1, 2]}', "  \n\t ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(chatml_tokenizer(), tmp_path_factory.mktemp("tokenizer"))


async def test_a_server_that_tokenizes_is_asked():
    """Of a chat only the number is taken, since it goes to the server as messages."""
    server = ScriptedServer(models=VLLM, others=TOKENIZE)
    async with engine_on(server) as engine:
        text = await engine.prepare(make_request(messages=(), text="Once"))
        chat = await engine.prepare(make_request(tools=(Tool("f"),)))

        assert PreparedPrompt(3, (5, 6, 7)) == text
        assert PreparedPrompt(3, None) == chat
        assert "text" == await engine.detokenize((5, 6))
        assert engine.has_control_tokens((5, 6))
        assert engine.hidden_token("<|im_end|>") is None
        with pytest.raises(InvalidRequest):
            await engine.token_texts((5, 6))


async def test_a_tokenizer_that_is_here_is_exact(folder: Path):
    """For chats, texts and tokens, and knows which tokens are control tokens."""
    tokenizer = chatml_tokenizer()
    async with engine_on(ScriptedServer(models=VLLM), tokenizer=str(folder)) as engine:
        chat = await engine.prepare(make_request())
        text = await engine.prepare(make_request(messages=(), text="hello world"))
        ids = tuple(tokenizer.encode("hello world"))
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=False
        )

        assert PreparedPrompt(len(ids), ids) == text
        assert PreparedPrompt(len(rendered), None) == chat
        assert "hello world" == await engine.detokenize(ids) == "".join(await engine.token_texts(ids))
        assert not engine.has_control_tokens(ids)
        assert isinstance(engine.hidden_token("<|im_end|>"), int)
        assert "stop_token_ids" not in engine.info.capabilities.unsupported


async def test_a_server_that_takes_no_tokens_gets_text_and_the_count_stays_exact(folder: Path):
    async with engine_on(ScriptedServer(), tokenizer=str(folder)) as engine:
        text = await engine.prepare(make_request(messages=(), text="hello world"))

        assert (len(chatml_tokenizer().encode("hello world")), None, False) == (
            text.prompt_tokens,
            text.prompt_ids,
            text.is_estimate,
        )
        with pytest.raises(InvalidRequest, match="must be text"):
            await engine.prepare(make_request(messages=(), prompt_ids=(1, 2)))
        assert engine.hidden_token("<|im_end|>") is None


@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer, gemma_tokenizer])
async def test_an_estimate_that_is_to_be_safe_is_never_too_low(make: Callable[[], PreTrainedTokenizerFast]):
    """With one byte for a token, for tokenizers that work on bytes; it is marked as what it is."""
    tokenizer = make()
    async with engine_on(ScriptedServer(), bytes_per_token=1) as engine:
        for text in TEXTS:
            prepared = await engine.prepare(make_request(messages=(), text=text))
            assert (None, True) == (prepared.prompt_ids, prepared.is_estimate)
            assert prepared.prompt_tokens >= len(tokenizer.encode(text))


@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer, gemma_tokenizer])
async def test_a_bound_is_never_too_low_and_only_given_where_it_suffices(
    make: Callable[[], PreTrainedTokenizerFast], tmp_path: Path
):
    """Of chats, for a server that counts them itself, and a tokenizer here that loses nothing of a text."""
    tokenizer = make()
    tokenizer.chat_template = tokenizer.chat_template or chatml_tokenizer().chat_template
    folder = str(save(tokenizer, tmp_path))
    async with engine_on(ScriptedServer(models=VLLM), tokenizer=folder) as engine:
        for text in TEXTS:
            request = make_request(messages=(Message(Role.USER, text), Message(Role.ASSISTANT, ""), *HELLO))
            exact = await engine.prepare(request)
            bound = await engine.prepare(structs.replace(request, uncounted_tokens=10_000))
            too_long = await engine.prepare(structs.replace(request, uncounted_tokens=bound.prompt_tokens - 1))
            assert exact == too_long
            assert (False, True) == (exact.is_upper_bound, bound.is_upper_bound)
            assert exact.prompt_tokens <= bound.prompt_tokens
    async with engine_on(ScriptedServer(), tokenizer=folder) as engine:
        assert not (await engine.prepare(make_request(uncounted_tokens=10_000))).is_upper_bound


async def test_an_estimate_counts_everything_that_a_chat_has():
    """Tools, calls and what stands around each message."""

    async def length(engine: RemoteEngine, *messages: Message, tools: tuple[Tool, ...] = ()) -> int:
        return (await engine.prepare(make_request(messages=messages, tools=tools))).prompt_tokens

    one, long = Message(Role.USER, "Hello"), Message(Role.USER, "Hello" * 100)
    async with engine_on(ScriptedServer(), tokenizer="none") as engine:
        assert await length(engine, one) < await length(engine, one, one) < await length(engine, long)
        assert await length(engine, one, tools=(Tool("f", "x" * 200),)) > 100
        with pytest.raises(InvalidRequest, match="send text"):
            await engine.detokenize((1,))


@pytest.mark.parametrize("where", ["server", "/no/such/folder"])
async def test_a_tokenizer_that_is_missing_ends_the_start(where: str):
    server = ScriptedServer(models=VLLM)
    async with serving(server):
        engine = make_engine(server, tokenizer=where)
        await engine.start()
        with pytest.raises(EngineFailed, match=r"remote\.tokenizer"):
            await engine.wait_ready()
        await engine.close()


async def test_an_answer_of_tokenize_that_is_none_is_an_error():
    server = ScriptedServer(models=VLLM, others=TOKENIZE)
    async with engine_on(server) as engine:
        server.others = {"/tokenize": Reply.json({"tokens": "x"})}
        with pytest.raises(EngineFailed, match="tokenize"):
            await engine.prepare(make_request())
