"""Builds a response object, and the events of its stream, from the events of one generation."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from app.errors import AppError
from app.events import Delta, DetokenizedLogprob, Event, Finished, FinishedSample, Started, ToolCallDelta
from app.types import FinishReason, Message, Role, ToolCall, Usage
from app.web.http.json_encoding import JsonArray
from app.web.http.sse import frame
from app.web.openai import errors
from app.web.openai.response_objects import chat_logprobs
from app.web.openai.responses.items import call_item, message_item, reasoning_item, text_part

PATH = "/v1/responses"
_INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.CONTENT_FILTER: "content_filter"}


def usage_object(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    """Return the token counts under the names of this API."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


class _OpenItem:
    """An item of the output while it grows."""

    def __init__(self, item_id: str, index: int) -> None:
        self.id = item_id
        self.index = index
        self.text: list[str] = []

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


class _TextItem(_OpenItem):
    """The message, or with `is_reasoning` what was thought before it."""

    def __init__(self, item_id: str, index: int, *, is_reasoning: bool) -> None:
        super().__init__(item_id, index)
        self.is_reasoning = is_reasoning
        self.logprobs = JsonArray()
        self.has_logprobs = False

    @property
    def event(self) -> str:
        return "response.reasoning_text" if self.is_reasoning else "response.output_text"

    @property
    def message(self) -> Message:
        text = "".join(self.text)
        return Message(Role.ASSISTANT, "", reasoning=text) if self.is_reasoning else Message(Role.ASSISTANT, text)

    def part(self, logprobs: Any = ()) -> dict[str, Any]:
        text = "".join(self.text)
        return {"type": "reasoning_text", "text": text} if self.is_reasoning else text_part(text, logprobs)

    def object(self, status: str, logprobs: Any = ()) -> dict[str, Any]:
        text = "".join(self.text)
        if self.is_reasoning:
            return reasoning_item(self.id, text, status)
        return message_item(self.id, text, status, logprobs=logprobs)


class _CallItem(_OpenItem):
    """A call of a function."""

    def __init__(self, item_id: str, index: int, part: ToolCallDelta) -> None:
        super().__init__(item_id, index)
        self.position = part.position
        self.call_id, self.name = part.id or "", part.name or ""

    @property
    def call(self) -> ToolCall:
        return ToolCall(self.call_id, self.name, "".join(self.text))

    @property
    def message(self) -> Message:
        return Message(Role.ASSISTANT, "", tool_calls=(self.call,))

    def object(self, status: str, logprobs: Any = ()) -> dict[str, Any]:
        return call_item(self.id, self.call, status)


class ResponseBuilder:
    """Follows one generation: its events in, the frames of a stream out, and the response object at any moment."""

    def __init__(self, response_id: str, described: Mapping[str, Any], *, with_logprobs: bool = False) -> None:
        """Args: described: the fields of the object that are known before the generation."""
        self.id = response_id
        self._described = dict(described)
        self._created = int(time.time())
        self._with_logprobs = with_logprobs
        self._items: list[_TextItem | _CallItem] = []
        self._open: _TextItem | _CallItem | None = None
        self._frames: list[bytes] = []
        self._numbers = 0
        self._held_logprobs: tuple[DetokenizedLogprob, ...] = ()
        """Of tokens without text of their own, before the first item."""
        self._ids: defaultdict[str, int] = defaultdict(int)
        self._finished: Finished | None = None
        self._finished_at: int | None = None
        self._error: AppError | None = None

    def new_id(self, kind: str) -> str:
        """Return the id of the response's next item; it names the response, so that a reference finds it."""
        self._ids["item"] += 1
        return f"{kind}_{self.id.removeprefix('resp_')}{self._ids['item']:03x}"

    def feed(self, event: Event) -> None:
        """Take the next event of the generation."""
        match event:
            case Started():
                self._emit("response.created", response=self.object())
                self._emit("response.in_progress", response=self.object())
            case Delta():
                if event.reasoning:
                    self._write(event.reasoning, is_reasoning=True)
                self._answer(event)
                for part in event.tool_calls:
                    self._call(part)
            case Finished():
                self._finish(event)

    def fail(self, error: AppError) -> None:
        """End the response with an error, midway."""
        self._error = error
        self._open = None
        # Frames that nobody has taken would end the stream a first time, where the response could not be stored.
        self._numbers -= len(self._frames)
        self._frames.clear()
        self._emit("response.failed", response=self.object())

    def take_frames(self) -> bytes:
        """Return the frames of the events since the last call."""
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames

    @property
    def message(self) -> Message:
        """Return what the assistant has said, thought and called, as one message."""
        texts = [item for item in self._items if isinstance(item, _TextItem)]
        return Message(
            Role.ASSISTANT,
            "".join("".join(item.text) for item in texts if not item.is_reasoning),
            tool_calls=tuple(item.call for item in self._items if isinstance(item, _CallItem)),
            reasoning="".join("".join(item.text) for item in texts if item.is_reasoning) or None,
        )

    @property
    def messages(self) -> list[Message]:
        """Return each item of the output as a message of its own."""
        return [item.message for item in self._items]

    def object(self, logprobs: Callable[[JsonArray], Any] | None = None) -> dict[str, Any]:
        """Return the response as it stands.  Args: logprobs: how they are put in; by default they are left out."""
        status = self._status()
        sample = self._finished.samples[0] if self._finished else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": self._finished_at if status == "completed" else None,
            "status": status,
            "error": None if self._error is None else _error_object(self._error),
            "incomplete_details": _incomplete(sample),
            "output": [self._item_object(item, logprobs) for item in self._items],
            "usage": self._usage(),
            **self._described,
        }

    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        if self._finished is None:
            return "in_progress"
        return "incomplete" if self._finished.finish_reason in _INCOMPLETE else "completed"

    def _usage(self) -> dict[str, Any] | None:
        if self._finished is None:
            return None
        return usage_object(self._finished.usage, self._finished.samples[0].reasoning_tokens)

    def _item_object(self, item: _TextItem | _CallItem, logprobs: Callable[[JsonArray], Any] | None) -> dict[str, Any]:
        status = "in_progress" if item is self._open else self._last_status(item)
        has_logprobs = isinstance(item, _TextItem) and item.has_logprobs
        shown = logprobs(item.logprobs) if has_logprobs and logprobs and isinstance(item, _TextItem) else ()
        return item.object(status, shown)

    def _last_status(self, item: _TextItem | _CallItem) -> str:
        """Return how an item that is over ended: the last one breaks off where the response does."""
        cut = self._status() in ("incomplete", "failed") and item is self._items[-1]
        return "incomplete" if cut else "completed"

    def _answer(self, delta: Delta) -> None:
        """Write the answer's part of a delta; tokens without text begin no message."""
        logprobs = self._held_logprobs + delta.logprobs
        if delta.text or (logprobs and self._is_open(is_reasoning=False)):
            self._write(delta.text, logprobs)
            self._held_logprobs = ()
        elif not self._items:
            self._held_logprobs = logprobs

    def _is_open(self, *, is_reasoning: bool) -> bool:
        return isinstance(self._open, _TextItem) and self._open.is_reasoning is is_reasoning

    def _write(self, text: str, logprobs: tuple[DetokenizedLogprob, ...] = (), *, is_reasoning: bool = False) -> None:
        item = self._text_item(is_reasoning=is_reasoning)
        item.text.append(text)
        fields: dict[str, Any] = {"content_index": 0, "delta": text}
        if not is_reasoning:
            tokens = chat_logprobs(logprobs)["content"] if self._with_logprobs else []
            item.logprobs.extend(tokens)
            item.has_logprobs = item.has_logprobs or bool(tokens)
            fields["logprobs"] = tokens
        self._emit(f"{item.event}.delta", **item.place, **fields)

    def _text_item(self, *, is_reasoning: bool) -> _TextItem:
        """Return the open item of this kind, or a new one behind all others."""
        if isinstance(self._open, _TextItem) and self._is_open(is_reasoning=is_reasoning):
            return self._open
        self._close()
        kind = "rs" if is_reasoning else "msg"
        item = _TextItem(self.new_id(kind), len(self._items), is_reasoning=is_reasoning)
        self._begin(item)
        self._emit("response.content_part.added", **item.place, content_index=0, part=item.part())
        return item

    def _call(self, part: ToolCallDelta) -> None:
        item = self._call_item(part)
        item.text.append(part.arguments)
        if part.arguments:
            self._emit("response.function_call_arguments.delta", **item.place, delta=part.arguments)

    def _call_item(self, part: ToolCallDelta) -> _CallItem:
        """Return the item that a part belongs to: a new one for a part with a name, else the last of its position."""
        calls = [item for item in self._items if isinstance(item, _CallItem) and item.position == part.position]
        if calls and part.name is None:
            if calls[-1] is not self._open:
                self._close()
                self._open = calls[-1]
            return calls[-1]
        self._close()
        item = _CallItem(self.new_id("fc"), len(self._items), part)
        self._begin(item)
        return item

    def _begin(self, item: _TextItem | _CallItem) -> None:
        self._items.append(item)
        self._open = item
        self._emit("response.output_item.added", output_index=item.index, item=item.object("in_progress"))

    def _close(self) -> None:
        item, self._open = self._open, None
        if item is None:
            return
        if isinstance(item, _CallItem):
            self._emit("response.function_call_arguments.done", **item.place, arguments=item.call.arguments)
        else:
            done: dict[str, Any] = {"content_index": 0, "text": "".join(item.text)}
            if not item.is_reasoning:
                done["logprobs"] = []
            self._emit(f"{item.event}.done", **item.place, **done)
            self._emit("response.content_part.done", **item.place, content_index=0, part=item.part())
        self._emit("response.output_item.done", output_index=item.index, item=item.object(self._last_status(item)))

    def _finish(self, finished: Finished) -> None:
        if not self._items:
            self._text_item(is_reasoning=False)
            self._answer(Delta())
        # Once: the object that is stored must not tell another second than the one that is sent.
        self._finished, self._finished_at = finished, int(time.time())
        self._close()
        name = "response.incomplete" if self._status() == "incomplete" else "response.completed"
        self._emit(name, response=self.object(lambda array: msgspec.Raw(b"".join(array.segments()))))

    def _emit(self, name: str, **fields: Any) -> None:
        self._frames.append(frame({"type": name, "sequence_number": self._numbers, **fields}, name))
        self._numbers += 1


class ResponseStreamEncoder:
    """Sends the frames that a builder has made of a generation's events; a `StreamEncoder`."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder = builder

    def encode(self, event: Event) -> bytes:
        return self._builder.take_frames()

    def encode_error(self, error: AppError) -> bytes:
        self._builder.fail(error)
        return self._builder.take_frames()


def _incomplete(sample: FinishedSample | None) -> dict[str, Any] | None:
    reason = None if sample is None else _INCOMPLETE.get(sample.finish_reason)
    return None if reason is None else {"reason": reason}


def _error_object(error: AppError) -> dict[str, Any]:
    shown = errors.envelope(error, PATH)["error"]
    code = "server_error" if error.status >= 500 else "rate_limit_exceeded" if error.status == 429 else "invalid_prompt"
    return {"code": code, "message": shown["message"]}


def masked_object(document: Mapping[str, Any], messages: Sequence[Message]) -> dict[str, Any]:
    """Return a response object with masked texts in place of its own.  Args: messages: one for each of its items."""
    output = []
    for item, message in zip(document["output"], messages, strict=True):
        match item["type"]:
            case "reasoning":
                output.append({**item, "content": reasoning_item("", message.reasoning or "")["content"]})
            case "function_call":
                output.append({**item, "arguments": message.tool_calls[0].arguments})
            case _:
                output.append({**item, "content": [text_part(message.content)]})
    return {**document, "output": output}
