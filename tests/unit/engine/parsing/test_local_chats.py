"""Chats of a local engine: the format is found at load, and what the worker generates comes out as a message."""

from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from app.engine.parsing.parsed_engine import ParsedEngine
from app.events import Event, Response, collect
from app.ipc.messages import Submit
from app.requests import GenerationRequest
from app.types import FinishReason, Message, Role, SamplingParams, ToolChoice
from tests.unit.engine.fake_worker import FakeWorkers, engine_on, make_request
from tests.unit.engine.parsing.conversations import GOLDEN, TOOLS
from tests.unit.tiny_models import chatml_tokenizer, save

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MESSAGES = (Message(Role.USER, "hello [TOOL_CALLS]add[ARGS]{}"),)


def tokenizer_of(template: str, *special: str) -> PreTrainedTokenizerFast:
    tokenizer = chatml_tokenizer(template)
    names = [AddedToken(name, special=True, normalized=False) for name in special]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
    return tokenizer


async def complete(
    tokenizer: PreTrainedTokenizerFast, folder: Path, text: str, request: GenerationRequest, *, step: int = 1
) -> tuple[Response, Submit]:
    """Return what becomes of a completion that is this text, and what the worker was given."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    workers = FakeWorkers(save(tokenizer, folder))
    workers.message = structs.replace(workers.message, vocab_size=len(tokenizer), context_length=1000)
    async with engine_on(workers) as local:
        engine = ParsedEngine(local)
        prompt = await engine.prepare(structs.replace(request, prompt_ids=None))
        stream = engine.stream(structs.replace(request, prompt_ids=prompt.prompt_ids))
        started = await anext(stream)
        for at in range(0, len(ids), step):
            workers.newest.event(1, *ids[at : at + step])
        workers.newest.event(1, finish="stop")

        response = await collect(_rest(started, stream))
        submitted = next(each for each in workers.newest.heard if isinstance(each, Submit))
    return response, submitted


async def _rest(started: Event, stream: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    yield started
    async for event in stream:
        yield event


def chat() -> GenerationRequest:
    return structs.replace(make_request(), messages=MESSAGES, tools=TOOLS, sampling=SamplingParams(max_tokens=200))


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_marks_that_are_special_tokens_are_found_and_read(tmp_path: Path, step: int):
    """The template shows the family, the tokenizer which of its marks are tokens; a user's text is neither."""
    marks = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[INST]", "[/INST]")
    tokenizer = tokenizer_of((GOLDEN / "mistral_args.jinja").read_text(), *marks)
    text = '[THINK]the end[/THINK]hello[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'

    response, submitted = await complete(tokenizer, tmp_path, text, chat(), step=step)

    (completion,) = response.completions
    assert ("the end", "hello") == (completion.reasoning, completion.text)
    assert [("add", '{"a": 1, "b": 2}')] == [(call.name, call.arguments) for call in completion.tool_calls]
    assert FinishReason.TOOL_CALLS is completion.finish_reason
    assert len(tokenizer.encode("the end", add_special_tokens=False)) == completion.end.reasoning_tokens
    call = tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")
    assert call not in submitted.prompt_ids


@pytest.mark.parametrize("step", [1, 3, 1000])
async def test_a_template_that_begins_the_thoughts_is_recognised_by_its_prompt(tmp_path: Path, step: int):
    """The completion begins within them."""
    tokenizer = tokenizer_of(THINKING)

    response, _ = await complete(
        tokenizer, tmp_path, "the world\n</think>\n\nhello", structs.replace(chat(), tools=()), step=step
    )

    assert ("the world", "hello") == (response.completions[0].reasoning, response.text)
    assert (
        len(tokenizer.encode("the world\n", add_special_tokens=False)) == response.finished.samples[0].reasoning_tokens
    )


async def test_the_workers_grammar_names_marks_by_their_tokens(tmp_path: Path):
    """Text does not match a token, so that the grammar has its id."""
    tokenizer = tokenizer_of((GOLDEN / "mistral_args.jinja").read_text(), "[TOOL_CALLS]", "[ARGS]")
    request = structs.replace(chat(), tool_choice=ToolChoice("required", "add"))

    _, submitted = await complete(tokenizer, tmp_path, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}', request)

    grammar = submitted.params.grammar
    assert grammar is not None
    for mark in ("[TOOL_CALLS]", "[ARGS]"):
        assert f"<[{tokenizer.convert_tokens_to_ids(mark)}]>" in grammar.text


async def test_a_worker_that_does_not_parse_gets_the_request_as_it_was(tmp_path: Path):
    """Where nothing is parsed, special tokens stay hidden and stop strings are the engine's."""
    tokenizer = tokenizer_of(THINKING)
    plain = replace(make_request().sampling, stop=("world",))

    response, _ = await complete(
        tokenizer, tmp_path, "<think>hello world", structs.replace(make_request(), text="hello", sampling=plain)
    )

    assert "<think>hello " == response.text
    assert "world" == response.finished.samples[0].stop_reason
