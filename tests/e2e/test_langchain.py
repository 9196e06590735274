"""LangChain's users in front of the embedded model: loaded for a program, and through a running service."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from langchain.agents import create_agent
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from app.errors import (
    EngineFailed,
    InvalidRequest,
    ModelNotFound,
    ServiceUnavailable,
    Unauthorized,
)
from app.langchain.models import EngineChat, EnginePipeline
from tests.e2e.conftest import KEY, ROOT, Service
from tests.ports import free_port
from tests.waiting import START_SECONDS, wait_for

pytestmark = pytest.mark.e2e

MODEL = ROOT / "models" / "tiny-chat"
FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
SMALL: dict[str, Any] = {"threads": 1, "compile": "none"}


class Verdict(BaseModel, extra="forbid"):
    """Whether it is right.  Where the schema allows other properties a small model writes them without end."""

    right: bool


class Switch(BaseModel, extra="forbid"):
    """Arguments of the tool."""

    on: bool


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class Tokens(BaseCallbackHandler):
    """Records the tokens that callbacks are told of."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.texts.append(str(token))


@pytest.fixture(scope="module")
def loaded() -> Iterator[EngineChat]:
    with EngineChat.from_model_id(str(MODEL), **SMALL) as chat:
        yield chat


@pytest.fixture(scope="module", params=["in process", "service"])
def chat(request: pytest.FixtureRequest) -> Iterator[EngineChat]:
    """The same model in both ways; what follows holds for either."""
    if request.param == "in process":
        yield request.getfixturevalue("loaded")
        return
    service: Service = request.getfixturevalue("service")
    with EngineChat.from_service(service.url, KEY, temperature=0) as chat:
        yield chat


async def test_a_chain_of_prompt_model_and_parser_answers_in_every_way(chat: EngineChat):
    """Whole, streamed and as a batch, sync and async."""
    chain = ChatPromptTemplate.from_template("What is the capital of {country}?") | chat | StrOutputParser()
    france, italy = {"country": "France"}, {"country": "Italy"}

    assert PARIS == await chain.ainvoke(france)
    assert PARIS == await asyncio.to_thread(chain.invoke, france)
    assert PARIS == "".join([part async for part in chain.astream(france)])
    assert PARIS == "".join(await asyncio.to_thread(lambda: list(chain.stream(france))))
    assert [PARIS, "The capital of Italy is Rome."] == await chain.abatch([france, italy])
    assert [PARIS, "The capital of Italy is Rome."] == await asyncio.to_thread(chain.batch, [france, italy])


async def test_plain_texts_are_continued(chat: EngineChat):
    """The pipeline below the chat model, with arguments under transformers' names."""
    pipeline: EnginePipeline = chat.llm
    chain = PromptTemplate.from_template("The capital of {country} is") | pipeline

    answer = await chain.ainvoke({"country": "France"}, max_new_tokens=8, do_sample=False, stop="\n")

    assert "Paris" in answer


async def test_usage_reason_and_log_probabilities_are_in_langchains_places(chat: EngineChat):
    message = await chat.ainvoke(FRANCE, logprobs=2, max_tokens=4)

    assert message.usage_metadata is not None
    assert 4 == message.usage_metadata["output_tokens"]
    assert message.usage_metadata["input_tokens"] > 10
    assert "length" == message.response_metadata["finish_reason"]
    tokens = message.response_metadata["logprobs"]["content"]
    assert message.content == b"".join(bytes(token["bytes"]) for token in tokens).decode()
    assert {2} == {len(token["top_logprobs"]) for token in tokens}
    texts = await chat.llm.agenerate(["The capital of France is"], logprobs=1, max_tokens=3)
    info = texts.generations[0][0].generation_info
    assert info is not None
    assert 3 == len(info["logprobs"]["content"]) == info["token_usage"]["completion_tokens"]


async def test_callbacks_are_told_of_tokens(chat: EngineChat):
    tokens = Tokens()

    answer = [chunk async for chunk in chat.astream(FRANCE, config={"callbacks": [tokens]})]

    assert PARIS == "".join(tokens.texts) == "".join(str(chunk.content) for chunk in answer)


async def test_a_conversation_is_remembered_by_langgraphs_checkpoints(chat: EngineChat):
    """What took the place of LangChain's chat histories."""
    agent: Any = create_agent(chat, [], checkpointer=InMemorySaver())
    config = {"configurable": {"thread_id": "1"}}

    await agent.ainvoke({"messages": [("human", "My name is Tovin.")]}, config)
    state = await agent.ainvoke({"messages": [("human", "What is my name?")]}, config)

    assert "Tovin" in state["messages"][-1].content
    assert 4 == len(state["messages"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_structured_output_is_an_instance_of_the_schema(chat: EngineChat, method: Any):
    """The sampler allows nothing else, whatever the model knows."""

    structured = chat.with_structured_output(Verdict, method=method)

    assert isinstance(await structured.ainvoke(FRANCE), Verdict)
    assert isinstance(await asyncio.to_thread(structured.invoke, FRANCE), Verdict)


async def test_json_mode_is_any_object(chat: EngineChat):
    message = await chat.bind(response_format={"type": "json_object"}, max_tokens=100).ainvoke(FRANCE)

    assert str(message.content).lstrip().startswith("{")


async def test_a_tool_that_must_be_called_is_called(chat: EngineChat):
    """Its arguments follow the schema; the call goes back with its result."""

    @tool(args_schema=Switch)
    def switch(on: bool) -> str:
        """Switch the light."""
        return "done"

    model = chat.bind_tools([switch], tool_choice="any")

    called = await model.ainvoke("Switch the light on.")
    streamed: Any = None
    async for chunk in model.astream("Switch the light on."):
        streamed = chunk if streamed is None else streamed + chunk

    for message in (called, streamed):
        assert isinstance(message, AIMessage)
        (call,) = message.tool_calls
        assert ("switch", {"on"}, True) == (call["name"], set(call["args"]), bool(call["id"]))
    result = switch.invoke(called.tool_calls[0])
    await chat.bind_tools([switch]).ainvoke([("human", "Switch the light on."), called, result])


async def test_an_argument_that_nothing_honours_lists_those_that_are_known(chat: EngineChat):
    with pytest.raises(ValueError, match=r"beams; known: .*max_new_tokens.*max_tokens.*temperature"):
        await chat.ainvoke(FRANCE, beams=4)


async def test_a_request_that_cannot_be_answered_says_why(chat: EngineChat):
    """The exception is of the same class in process and through the service."""
    with pytest.raises(InvalidRequest, match="maximum context length is 2048 tokens"):
        await chat.ainvoke("word " * 5000)


async def test_a_program_may_send_as_many_prompts_as_it_likes(loaded: EngineChat):
    """More than the service lets one caller wait; nobody else is there."""
    assert 150 == len(await loaded.llm.abatch(["The capital of France is"] * 150, max_tokens=1))


def test_a_model_in_process_masks_nothing_unless_it_is_asked_to(loaded: EngineChat):
    """`filters=True` masks prompts and completions as the service does by default."""
    text = "My email address is jane.doe@example.com."

    assert "jane.doe@example.com" in str(loaded.invoke(text).content)
    with EngineChat.from_model_id(model=str(MODEL), filters=True, **SMALL) as filtered:
        answer = str(filtered.invoke(text).content)

    assert "[EMAIL]" in answer
    assert "jane.doe" not in answer


def test_what_is_wrong_with_a_service_is_said(service: Service):
    """Its address, the key, the model; nothing is left of the attempt."""
    nowhere = f"http://127.0.0.1:{free_port()}/v1"

    with pytest.raises(ServiceUnavailable, match="No service answers at http://127"):
        EngineChat.from_service(nowhere, KEY)
    with pytest.raises(Unauthorized, match="refuses the key"):
        EngineChat.from_service(service.url, "wrong-key-0123456789")
    with pytest.raises(ModelNotFound, match="no model gpt-4; it has tiny-chat"):
        EngineChat.from_service(service.url, KEY, model="gpt-4")
    with pytest.raises(ValueError, match="http://"):
        EngineChat.from_service("127.0.0.1:8000", KEY)
    with pytest.raises(ValueError, match="beams"):
        EnginePipeline.from_service(service.url, KEY, beams=4)


def test_what_is_wrong_with_a_model_is_said(tmp_path: Path):
    with pytest.raises(ValueError, match="no folder"):
        EngineChat.from_model_id("/nowhere/at/all")
    with pytest.raises(ValueError, match=r"holds no model \(no config.json\)"):
        EngineChat.from_model_id(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineFailed):
        EngineChat.from_model_id(str(tmp_path), **SMALL)


def test_a_request_to_the_service_that_is_left_early_ends_there(service: Service):
    with EngineChat.from_service(service.url, KEY) as chat:
        stream: Any = chat.stream("Tell me a story", temperature=1.5, ignore_eos=True, max_tokens=1500)
        next(stream), next(stream)
        stream.close()

        wait_for(lambda: not service.engine()["running"])


SCRIPT = """
import asyncio, sys
from app.langchain.models import EngineChat
chat = EngineChat.from_model_id(sys.argv[1], threads=1, compile="none")
print(chat.invoke("What is the capital of France?").content)
print(asyncio.run(chat.ainvoke("What is the capital of France?")).content)
print(chat.llm.engine.engine.status().worker_pid)
"""


def test_a_script_of_three_lines_works_and_ends_with_all_that_it_started():
    """Without closing anything, without a warning, and without a process that stays."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(MODEL)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS, check=False)

    *answers, worker = done.stdout.splitlines()
    assert (0, [PARIS, PARIS], "") == (done.returncode, answers, done.stderr)
    assert not psutil.pid_exists(int(worker))


@pytest.fixture
def chat_openai(service: Service) -> ChatOpenAI:
    fields: dict[str, Any] = {"base_url": f"{service.url}/v1", "api_key": KEY, "model": "tiny-chat", "temperature": 0}
    return ChatOpenAI(**fields)


def test_langchain_openai_binds_tools_and_schemas(chat_openai: ChatOpenAI):
    """LangChain's own class for OpenAI, unchanged."""
    (call,) = chat_openai.bind_tools([add]).invoke("What is 7 plus 5?").tool_calls
    assert ("add", {"a": 7, "b": 5}) == (call["name"], call["args"])
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat_openai.with_structured_output(Verdict, method=method).invoke(FRANCE), Verdict)


@tool
def get_weather(city: str) -> str:
    """Get the weather in a city."""
    return "foggy"


def check_round(state: Any) -> None:
    """Check that the model called the tool by itself, and that the answer says what came back."""
    _, called, result, answer = state["messages"]
    (call,) = called.tool_calls
    assert ("get_weather", {"city": "London"}) == (call["name"], call["args"])
    assert ("tool", call["id"], "foggy") == (result.type, result.tool_call_id, result.content)
    assert ("ai", [], "The weather in London is foggy.") == (answer.type, answer.tool_calls, answer.content)


WEATHER: Any = {"messages": [("human", "What is the weather in London?")]}


async def test_an_agent_calls_a_tool_and_continues_with_its_result(chat: EngineChat):
    """LangChain's agent, which runs on LangGraph, sync and async."""
    agent = create_agent(chat, [get_weather])

    check_round(await agent.ainvoke(WEATHER))
    check_round(await asyncio.to_thread(agent.invoke, WEATHER))


def test_the_same_agent_runs_with_langchain_openai(chat_openai: ChatOpenAI):
    check_round(create_agent(chat_openai, [get_weather]).invoke(WEATHER))
