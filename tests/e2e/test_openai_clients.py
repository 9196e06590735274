"""OpenAI's own clients in front of the embedded model, unchanged: nothing but a base URL and a key."""

import asyncio
import datetime
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from pydantic import BaseModel, Field

from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from tests.e2e.conftest import KEY, ROOT, Service
from tests.waiting import START_SECONDS, wait_for

pytestmark = pytest.mark.e2e

MODEL = "tiny-chat"
FRANCE: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story"}]


def content_of(answer: ChatCompletion) -> str:
    """Return the text of the first choice, which has to have one."""
    content = answer.choices[0].message.content
    assert content is not None
    return content


@pytest.fixture
def base_url(service: Service) -> str:
    return f"{service.url}/v1"


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=KEY, timeout=60) as client:
        yield client


@pytest.fixture
async def aclient(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=KEY, timeout=60) as client:
        yield client


def test_the_quick_start_prints_an_answer(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenAI's manual has it: base URL and key come from the environment."""
    monkeypatch.setenv("OPENAI_BASE_URL", base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with openai.OpenAI() as client:
        answer = client.chat.completions.create(model=MODEL, messages=FRANCE, temperature=0)

    assert "Paris" in content_of(answer)
    assert ("assistant", "stop", MODEL) == (
        answer.choices[0].message.role,
        answer.choices[0].finish_reason,
        answer.model,
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert str(answer.system_fingerprint).startswith("fp_")


def test_a_stream_prints_tokens_as_they_come(client: openai.OpenAI) -> None:
    """Role first, then text in many chunks, the end, and the usage of the very same answer."""
    uncached = {"Cache-Control": "no-cache"}
    whole = client.chat.completions.create(model=MODEL, messages=STORY, temperature=0, extra_headers=uncached)

    with client.chat.completions.create(
        model=MODEL,
        messages=STORY,
        temperature=0,
        extra_headers=uncached,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)

    assert "assistant" == chunks[0].choices[0].delta.role
    # Deltas that the reader had no time to fetch come as one, so a busy machine sends fewer.
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 2
    assert content_of(whole) == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [whole.choices[0].finish_reason] == [
        chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason
    ]
    assert [] == chunks[-1].choices
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens
    assert 1 == len({chunk.id for chunk in chunks})


def test_the_stream_helper_puts_the_same_answer_together(client: openai.OpenAI) -> None:
    """The package's own accumulator reads every chunk without complaint."""
    with client.chat.completions.stream(model=MODEL, messages=FRANCE, temperature=0) as stream:
        final = stream.get_final_completion()

    assert "Paris" in content_of(final)


def test_completions_continue_texts_and_tokens(client: openai.OpenAI) -> None:
    """Several prompts at once; a prompt as tokens gives what the same prompt as text gives."""
    tokenizer = HfTokenizer(ROOT / "models" / "tiny-chat")
    texts = ["The capital of France is", "The capital of Italy is"]
    tokens = [list(tokenizer.encode_text(text)) for text in texts]

    by_text = client.completions.create(model=MODEL, prompt=texts, max_tokens=4, temperature=0)
    by_token = client.completions.create(model=MODEL, prompt=tokens, max_tokens=4, temperature=0)
    echoed = client.completions.create(model=MODEL, prompt=tokens[0], max_tokens=4, temperature=0, echo=True)

    assert ["Paris" in by_text.choices[0].text, "Rome" in by_text.choices[1].text] == [True, True]
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_token.choices]
    assert texts[0] + by_text.choices[0].text == echoed.choices[0].text
    assert by_text.usage is not None
    assert by_token.usage is not None
    assert sum(map(len, tokens)) == by_token.usage.prompt_tokens == by_text.usage.prompt_tokens


def test_log_probabilities_come_in_both_shapes(client: openai.OpenAI) -> None:
    """The chat's with bytes, the completion's with offsets; both make up the text."""
    chat = client.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, logprobs=True, top_logprobs=2, max_completion_tokens=8
    )
    text = client.completions.create(model=MODEL, prompt="The capital", temperature=0, logprobs=2, max_tokens=8)

    of_chat, of_text = chat.choices[0].logprobs, text.choices[0].logprobs
    assert of_chat is not None
    assert of_text is not None
    content = of_chat.content or []
    assert content_of(chat) == b"".join(bytes(token.bytes or ()) for token in content).decode()
    assert all(2 == len(token.top_logprobs) for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in content)
    tokens, offsets = of_text.tokens or [], of_text.text_offset or []
    assert text.choices[0].text == "".join(tokens)
    for offset, token in zip(offsets, tokens, strict=True):
        assert text.choices[0].text[offset:].startswith(token)


def test_what_ended_an_answer_is_reported(client: openai.OpenAI) -> None:
    """`stop_reason` is the stop string, or the stop token of one's own, as vLLM names it."""
    end: int = json.loads((ROOT / "models" / "tiny-chat" / "generation_config.json").read_text())["eos_token_id"][0]
    fields: dict[str, Any] = {"model": MODEL, "messages": FRANCE, "temperature": 0}

    by_text: ChatCompletion = client.chat.completions.create(**fields, stop=["France"])
    by_token: ChatCompletion = client.chat.completions.create(**fields, extra_body={"stop_token_ids": [end]})
    by_itself: ChatCompletion = client.chat.completions.create(**fields)

    reasons = [each.choices[0].model_dump()["stop_reason"] for each in (by_text, by_token, by_itself)]
    assert ["France", end, None] == reasons
    assert ["stop"] * 3 == [each.choices[0].finish_reason for each in (by_text, by_token, by_itself)]


def test_the_last_message_is_continued(client: openai.OpenAI) -> None:
    """The answer is what follows the words that were put in the assistant's mouth."""
    messages: list[ChatCompletionMessageParam] = [*FRANCE, {"role": "assistant", "content": "The capital of"}]

    answer = client.chat.completions.create(
        model=MODEL,
        messages=messages,
        temperature=0,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )

    assert content_of(answer).startswith(" France is Paris")


def test_a_session_remembers_for_a_client_that_does_not(client: openai.OpenAI) -> None:
    """The name comes once; the second request holds only the question."""
    sessions: list[dict[str, Any]] = [
        {"extra_body": {"session_id": "sdk-1"}},
        {"extra_headers": {"X-Session-ID": "sdk-2"}},
    ]
    for session in sessions:
        _, answer = [
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": text}], temperature=0, **session
            )
            for text in ("My name is Tovin.", "What is my name?")
        ]
        assert "Tovin" in content_of(answer)


def test_errors_are_the_packages_own_classes(client: openai.OpenAI, base_url: str) -> None:
    """Each with the code and the parameter that programs branch on."""
    with pytest.raises(openai.AuthenticationError) as wrong:
        client.with_options(api_key="wrong-key").models.list()
    assert "invalid_api_key" == wrong.value.code

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 3000}])
    assert ("context_length_exceeded", "messages") == (refused.value.code, refused.value.param)

    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="x", max_tokens=5000)
    assert ("context_length_exceeded", "prompt") == (refused.value.code, refused.value.param)

    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=FRANCE)
    assert ("model_not_found", "model") == (unknown.value.code, unknown.value.param)

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL, messages=FRANCE, tools=[{"type": "function", "function": {"name": "a name"}}]
        )
    assert ("invalid_request_error", "tools.0.function.name") == (refused.value.type, refused.value.param)


def test_raw_responses_show_the_headers(client: openai.OpenAI) -> None:
    """Request id and the cache's verdict; the second of two equal requests is not generated again."""
    replies = [
        client.chat.completions.with_raw_response.create(model=MODEL, messages=FRANCE, temperature=0, seed=77)
        for _ in range(2)
    ]

    assert ["MISS", "HIT"] == [reply.headers["x-cache"] for reply in replies]
    assert content_of(replies[0].parse()) == content_of(replies[1].parse())
    assert replies[0].parse()._request_id == replies[0].headers["x-request-id"]


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    (model,) = client.models.list()

    shown = model.model_dump()
    assert (MODEL, 2048, "loaded") == (model.id, shown["max_model_len"], shown["status"]["value"])
    assert model == client.models.retrieve(MODEL)


def test_a_client_that_waits_no_longer_frees_its_place(client: openai.OpenAI, service: Service) -> None:
    """A timeout is raised as the package's own, and the model stops."""
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3, max_retries=0).chat.completions.create(
            model=MODEL, messages=STORY, max_tokens=1500, extra_body={"ignore_eos": True}
        )

    wait_for(lambda: 0 == service.engine()["running"] + service.engine()["waiting"])


async def test_the_async_client_streams_and_hangs_up(aclient: openai.AsyncOpenAI, service: Service) -> None:
    """Many at once; a stream that is left frees its place."""
    answers = await asyncio.gather(
        *(aclient.chat.completions.create(model=MODEL, messages=FRANCE, seed=number) for number in range(8))
    )
    assert 8 == len({answer.id for answer in answers})

    stream = await aclient.chat.completions.create(
        model=MODEL, messages=STORY, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}
    )
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert 1 == service.engine()["running"]
    await stream.close()
    wait_for(lambda: 0 == service.engine()["running"])


def arguments(base_url: str) -> dict[str, Any]:
    """Return LangChain's arguments by the names that its users write; mypy has only those of the fields behind them."""
    return {"base_url": base_url, "api_key": KEY, "model": MODEL, "temperature": 0}


def test_langchains_chat_model_speaks_to_us(base_url: str) -> None:
    """invoke, stream, batch and the usage of all three."""
    llm = ChatOpenAI(**arguments(base_url), stream_usage=True)

    whole = llm.invoke([SystemMessage("Be brief."), HumanMessage("What is the capital of France?")])
    chunks = list(llm.stream("What is the capital of France?"))
    several = llm.batch(["What is the capital of France?", "What is the capital of Italy?"])

    assert "Paris" in whole.text
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 3
    assert whole.response_metadata["finish_reason"] == "stop"
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk
    assert isinstance(joined, AIMessageChunk)
    assert "Paris" in joined.text
    assert joined.usage_metadata is not None
    assert several[0].usage_metadata is not None
    assert joined.usage_metadata["output_tokens"] == several[0].usage_metadata["output_tokens"]
    assert "Rome" in several[1].text


def test_langchains_completion_model_speaks_to_us(base_url: str) -> None:
    """Its batch is one request with several prompts."""
    llm = OpenAI(**arguments(base_url), max_tokens=4)

    assert "Paris" in llm.invoke("The capital of France is")
    assert "Paris" in "".join(llm.stream("The capital of France is"))
    result = llm.generate(["The capital of France is", "The capital of Italy is"])
    assert ["Paris" in result.generations[0][0].text, "Rome" in result.generations[1][0].text] == [True, True]
    assert result.llm_output is not None
    assert 8 == result.llm_output["token_usage"]["completion_tokens"]


def test_curl_streams_to_the_end(base_url: str) -> None:
    body = json.dumps({"model": MODEL, "messages": FRANCE, "stream": True, "temperature": 0})
    command = ["/usr/bin/env", "curl", "-sSN", f"{base_url}/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*command, "-H", f"Authorization: Bearer {KEY}", "-d", body],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=True,
        env=dict(os.environ),
    )

    assert done.stdout.startswith(": keep-alive\n\ndata: {")
    assert done.stdout.endswith("data: [DONE]\n\n")
    assert "Paris" in done.stdout


async def load(url: str, path: str, body: dict[str, Any], places: asyncio.Semaphore) -> tuple[int, dict[str, int]]:
    """Send one request as public load generators do; return the chunks that have text, and the usage."""
    headers = {"Authorization": f"Bearer {KEY}"}
    chunks, usage, done = 0, {}, False
    async with (
        places,
        httpx.AsyncClient(timeout=120) as client,
        client.stream("POST", f"{url}{path}", json=body, headers=headers) as response,
    ):
        assert 200 == response.status_code, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                data = json.loads(line.removeprefix("data: "))
                if choices := data.get("choices"):
                    chunks += bool(choices[0].get("text") or choices[0].get("delta", {}).get("content"))
                elif data.get("usage"):
                    usage = data["usage"]
    assert done
    return chunks, usage


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_load_generator_has_no_failed_request_and_its_counts_match(service: Service, path: str) -> None:
    """What `vllm bench serve` sends with its backends openai and openai-chat, many at once."""
    common = {
        "model": MODEL,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    tokenizer = HfTokenizer(Path(ROOT / "models" / "tiny-chat"))
    prompts = [f"Number {number}: once upon a time there was a fox" for number in range(24)]
    places = asyncio.Semaphore(12)

    def body(prompt: str) -> dict[str, Any]:
        if path == "/v1/completions":
            return {**common, "prompt": prompt, "max_tokens": 16, "logprobs": None}
        return {
            **common,
            "messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}],
            "max_completion_tokens": 16,
        }

    answers = await asyncio.gather(*(load(service.url, path, body(prompt), places) for prompt in prompts))

    assert [16] * 24 == [usage["completion_tokens"] for _, usage in answers]
    assert all(chunks > 0 for chunks, _ in answers)
    if path == "/v1/completions":
        expected = [len(tokenizer.encode_text(prompt)) for prompt in prompts]
        assert expected == [usage["prompt_tokens"] for _, usage in answers]


class Town(BaseModel):
    """What a model of random skill is to answer with."""

    name: Annotated[str, Field(max_length=12)]
    kind: Literal["village", "city"]
    people: Annotated[int, Field(ge=0, le=9999)]
    twins: Annotated[list[Annotated[str, Field(max_length=6)]], Field(max_length=2)]
    founded: datetime.date | None


def test_a_schema_is_followed_by_a_model_that_never_saw_it(client: openai.OpenAI) -> None:
    """With the package's own parsing into a pydantic model, several samples, whole and streamed."""
    answer = client.chat.completions.parse(
        model=MODEL, messages=FRANCE, response_format=Town, n=3, max_tokens=400, temperature=1, seed=1
    )
    assert ["stop"] * 3 == [choice.finish_reason for choice in answer.choices]
    assert all(isinstance(choice.message.parsed, Town) for choice in answer.choices)

    with client.chat.completions.stream(model=MODEL, messages=FRANCE, response_format=Town, max_tokens=400) as stream:
        streamed = stream.get_final_completion()
    assert isinstance(streamed.choices[0].message.parsed, Town)


def test_vllms_forms_and_refusals_come_through_the_client(client: openai.OpenAI) -> None:
    """A choice, an expression, any object; what is cut says so, and an unsupported keyword is named."""

    def text(**fields: Any) -> tuple[str, str]:
        answer = client.chat.completions.create(model=MODEL, messages=FRANCE, extra_body=fields)
        return content_of(answer), str(answer.choices[0].finish_reason)

    assert text(guided_choice=["north", "south"])[0] in ("north", "south")
    assert re.fullmatch("[A-Z]{3}-[0-9]{2}", text(structured_outputs={"regex": "[A-Z]{3}-[0-9]{2}"})[0])
    assert "length" == text(guided_regex="[ab]{90}", max_tokens=5)[1]
    written, ending = text(response_format={"type": "json_object"}, max_tokens=60, seed=2)
    assert ending == "length" or isinstance(json.loads(written), dict)
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        text(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"uniqueItems": True}}})
    assert "response_format.json_schema.schema" == refused.value.param
