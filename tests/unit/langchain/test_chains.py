"""LangChain's face of an engine, and the chains that the service runs."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
from langchain_core.messages import AIMessage, FunctionMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from msgspec import structs

from app.engine.echo import EchoEngine
from app.events import Event, Started, finish
from app.langchain.chains import ModelChains
from app.langchain.models import EngineChat, EnginePipeline
from app.requests import GenerationRequest
from app.types import FinishReason, Message, Role, SamplingParams, Tenant, Usage
from tests.unit.event_streams import finished_of, read, text_of


@pytest.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    engine = EchoEngine()
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def pipeline(engine: EchoEngine) -> EnginePipeline:
    return EnginePipeline(engine=engine, model_id="echo", loop=asyncio.get_running_loop())


async def test_both_classes_are_the_ones_their_users_know(pipeline: EnginePipeline) -> None:
    """A chain that checks for HuggingFacePipeline or ChatHuggingFace takes ours."""
    assert isinstance(pipeline, HuggingFacePipeline)
    assert isinstance(EngineChat(llm=pipeline), ChatHuggingFace)


async def test_a_response_carries_usage_and_finish_reason_in_langchains_places(pipeline: EnginePipeline) -> None:
    """usage_metadata and response_metadata on a message, generation_info on a generation."""
    message = await EngineChat(llm=pipeline).ainvoke([SystemMessage("s"), HumanMessage("hello")], max_tokens=3)
    result = await pipeline.agenerate(["abc"])

    assert ("hel", "length") == (message.content, message.response_metadata["finish_reason"])
    usage = {"input_tokens": 9, "output_tokens": 3, "total_tokens": 12, "input_token_details": {"cache_read": 0}}
    assert usage == message.usage_metadata
    info = result.generations[0][0].generation_info
    assert info is not None
    assert ("stop", {"prompt_tokens": 3, "completion_tokens": 3}) == (info["finish_reason"], info["token_usage"])


async def test_log_probabilities_are_where_langchains_users_look_for_them(pipeline: EnginePipeline) -> None:
    """In response_metadata and generation_info, in OpenAI's shape, each token once; nowhere if they are not wanted."""
    chat = EngineChat(llm=pipeline)
    letters = [(token, list(token.encode()), 0.0) for token in "né"]

    message = await chat.ainvoke("né", logprobs=1)
    chunks = [chunk async for chunk in chat.astream("né", logprobs=1)]
    result = (await pipeline.agenerate(["né"], logprobs=0)).generations[0][0]
    unwanted = await chat.ainvoke("né")

    infos = [message.response_metadata["logprobs"], sum(chunks[1:], chunks[0]).response_metadata["logprobs"]]
    for logprobs in infos:
        assert letters == [(token["token"], token["bytes"], token["logprob"]) for token in logprobs["content"]]
        assert letters == [tuple(token["top_logprobs"][0].values()) for token in logprobs["content"]]
    assert result.generation_info is not None
    assert [[], []] == [token["top_logprobs"] for token in result.generation_info["logprobs"]["content"]]
    assert "logprobs" not in unwanted.response_metadata


async def test_cached_prompt_tokens_are_counted_as_langchain_counts_them() -> None:
    """input_token_details.cache_read of usage_metadata."""

    class PrefixCachingEngine(EchoEngine):
        async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
            yield Started(prompt_tokens=9)
            yield finish(FinishReason.STOP, Usage(9, 0, cached_tokens=7))

    message = await EngineChat(llm=EnginePipeline(engine=PrefixCachingEngine(), model_id="echo")).ainvoke("hi")

    assert message.usage_metadata is not None
    assert {"cache_read": 7} == message.usage_metadata["input_token_details"]


async def test_stop_strings_and_sampling_arguments_reach_the_engine(pipeline: EnginePipeline) -> None:
    """What the plain pipeline ignores: stop and max_tokens, whole and streamed."""
    chat = EngineChat(llm=pipeline)

    assert "one " == (await chat.ainvoke("one two", stop=["two"])).content
    assert "on" == await pipeline.ainvoke("one two", max_tokens=2)
    assert ["", "o", "n", ""] == [text async for text in pipeline.astream("one two", max_tokens=2)]


async def test_an_argument_that_nothing_would_honour_is_refused(pipeline: EnginePipeline) -> None:
    """Unknown generation arguments raise instead of being dropped."""
    with pytest.raises(ValueError, match="beams"):
        await pipeline.ainvoke("x", beams=4)


async def test_the_sync_methods_work_from_any_other_thread(pipeline: EnginePipeline) -> None:
    """invoke, stream, batch and a chain of runnables, while the engine's loop runs."""
    chat = EngineChat(llm=pipeline)
    chain = PromptTemplate.from_template("<{text}>") | pipeline | StrOutputParser()

    assert "hi" == (await asyncio.to_thread(chat.invoke, "hi")).content
    assert "hi" == "".join(str(m.content) for m in await asyncio.to_thread(lambda: list(chat.stream("hi"))))
    assert ["<a>", "<b>"] == await asyncio.to_thread(chain.batch, [{"text": "a"}, {"text": "b"}])


async def test_a_sync_call_on_the_engines_own_loop_says_so_and_does_not_hang(pipeline: EnginePipeline) -> None:
    """It could only wait for itself."""
    with pytest.raises(RuntimeError, match="use ainvoke"):
        pipeline.invoke("x")


async def test_leaving_a_sync_stream_early_frees_the_engine(engine: EchoEngine, pipeline: EnginePipeline) -> None:
    """Closing the iterator closes the engine's stream."""

    def read_one() -> int:
        stream: Any = pipeline.stream("a long text")
        next(stream), next(stream)
        running = engine.status().running
        stream.close()
        return running

    assert 1 == await asyncio.to_thread(read_one)
    assert 0 == engine.status().running


async def test_a_message_of_an_unknown_kind_is_refused(pipeline: EnginePipeline) -> None:
    """What no template of ours knows is not rendered as somebody's words."""
    with pytest.raises(ValueError, match="function"):
        await EngineChat(llm=pipeline).ainvoke([AIMessage("x"), FunctionMessage(content="y", name="f")])


@pytest.mark.parametrize(
    "text", ['{"a": 1}', "{x}", "{{", "%s", "{q:>999999999}", "{0.__class__}", "{{7*7}}", "{% x %}"]
)
async def test_user_text_is_never_read_as_a_template(engine: EchoEngine, text: str) -> None:
    """Braces and the like reach the engine as they are, in prompts, messages and system text."""
    chains = ModelChains(engine, "echo", system="You are {model_name}.", completion="{prompt}")
    sampling = SamplingParams(max_tokens=100)
    messages = (Message(Role.SYSTEM, text), Message(Role.USER, text))

    for request in (
        GenerationRequest(id="1", tenant=Tenant.owner("t"), text=text, sampling=sampling),
        GenerationRequest(id="2", tenant=Tenant.owner("t"), messages=messages, sampling=sampling),
    ):
        prepared = await engine.prepare(chains.render(request))
        events = await read(chains.stream(structs.replace(request, prompt_ids=prepared.prompt_ids)))
        assert text == text_of(events)
        assert FinishReason.STOP is finished_of(events).finish_reason
