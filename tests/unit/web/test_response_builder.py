"""How the events of a generation become the items and the frames of a response."""

import itertools
import json
from typing import Any

import pytest

from app.errors import EngineFailed
from app.events import Delta, DetokenizedLogprob, Event, Finished, FinishedSample, Started, ToolCallDelta
from app.types import FinishReason, Message, Role, ToolCall, Usage
from app.web.openai.responses.builder import ResponseBuilder, masked_object

TOKEN = DetokenizedLogprob("x", b"x", -0.5)
BARE = Delta(logprobs=(TOKEN,), token_ends=(0,))
SAMPLE = FinishedSample(finish_reason=FinishReason.STOP, completion_tokens=1)
END = Finished(model="m", samples=(SAMPLE,), usage=Usage(1, 1))


def call(arguments: str = "", position: int = 0, name: str | None = None) -> Delta:
    part = ToolCallDelta(position=position, id=name and f"call_{name}", name=name, arguments=arguments)
    return Delta(tool_calls=(part,))


def built(*events: Event) -> tuple[ResponseBuilder, list[dict[str, Any]]]:
    """Return a builder that has taken the events, and its frames."""
    builder = ResponseBuilder("resp_" + "0" * 32, {}, with_logprobs=True)
    for event in events:
        builder.feed(event)
    return builder, frames(builder)


def frames(builder: ResponseBuilder) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in builder.take_frames().decode().splitlines() if line.startswith("data: ")]


def output(*events: Event) -> list[tuple[str, str]]:
    """Return the kind and the text of each item."""
    builder, _ = built(Started(), *events, END)
    return [
        (item["type"], item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        for item in builder.object()["output"]
    ]


def test_tokens_without_text_begin_no_message():
    """Not between the parts of a call or of reasoning, and not before them."""
    assert [("reasoning", "hm"), ("message", "Hi"), ("function_call", "{}")] == output(
        *(BARE, Delta(reasoning="h"), BARE, Delta(reasoning="m"), Delta(text="H"), BARE, Delta(text="i")),
        *(call("{", name="f"), BARE, call("}"), BARE),
    )


def test_tokens_without_text_are_sent_with_the_text_that_follows():
    """Such as the first part of a character; with the empty message where none follows."""
    for events in ([BARE, Delta(text="H", logprobs=(TOKEN,), token_ends=(1,)), BARE], [BARE, BARE, BARE]):
        _, sent = built(Started(), *events, END)
        assert 3 == sum(len(each["logprobs"]) for each in sent if each["type"] == "response.output_text.delta")


def test_a_part_without_a_name_continues_the_last_call_of_its_position():
    """Whatever came between; a part with a name begins a call."""
    assert [("function_call", "{}"), ("message", "so"), ("function_call", "[]"), ("function_call", "1")] == output(
        *(call("{", name="f"), Delta(text="so"), call("[", 1, name="g"), call("}"), call("]", 1), call("1", name="h")),
    )


def test_a_response_that_cannot_be_stored_fails_and_nothing_else():
    """Frames of its completion that nobody has seen are never sent, and the numbers go on without a gap."""
    builder, sent = built(Started(), Delta(text="Hi"))
    builder.feed(END)
    builder.fail(EngineFailed("The model's worker failed."))
    last = frames(builder)

    assert ["response.failed"] == [each["type"] for each in last]
    assert list(range(len(sent) + 1)) == [each["sequence_number"] for each in sent + last]
    assert "failed" == last[0]["response"]["status"]


def test_a_response_was_completed_in_one_second(monkeypatch: pytest.MonkeyPatch):
    """The same in the last frame, in the object that is sent and in the one that is stored, however late."""
    seconds = itertools.count(1_800_000_000)
    monkeypatch.setattr("app.web.openai.responses.builder.time.time", lambda: float(next(seconds)))
    builder, sent = built(Started(), Delta(text="Hi"), END)

    moments = [sent[-1]["response"]["completed_at"], builder.object()["completed_at"], builder.object()["completed_at"]]
    assert [1_800_000_001] * 3 == moments
    assert [None] * 2 == [each["response"]["completed_at"] for each in sent[:2]]


def test_each_item_is_masked_by_itself():
    """Two texts of one answer stay two."""
    events = (Delta(reasoning="a"), Delta(text="b"), call("1", name="f"), Delta(text="c"), call("2", 1, name="g"), END)
    builder, _ = built(*events)
    first, second = ToolCall("call_f", "f", "1"), ToolCall("call_g", "g", "2")
    document = builder.object()

    assert [
        Message(Role.ASSISTANT, "", reasoning="a"),
        Message(Role.ASSISTANT, "b"),
        Message(Role.ASSISTANT, "", tool_calls=(first,)),
        Message(Role.ASSISTANT, "c"),
        Message(Role.ASSISTANT, "", tool_calls=(second,)),
    ] == builder.messages
    assert document == masked_object(document, builder.messages)
