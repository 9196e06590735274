"""Translates messages and events between the service's types and LangChain's.

LangChain's chunks carry the engine's event in one more field, so that nothing has to go round the chain.
"""

import json
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCallChunk,
    ToolMessage,
)
from langchain_core.messages import ToolCall as LangChainCall
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import invalid_tool_call as create_invalid_tool_call
from langchain_core.messages.tool import tool_call as create_tool_call
from langchain_core.messages.tool import tool_call_chunk as create_tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from pydantic import Field

from app.events import Delta, DetokenizedLogprob, Event, Finished, ToolCallDelta
from app.types import Message, Role, ToolCall, Usage

REASONING = "reasoning_content"
"""Where LangChain's messages of several providers have what the model thought, in `additional_kwargs`."""

_REPEATED = frozenset(["tool_use", "tool_call", "function_call"])
"""Content of other providers' answers that says again what stands in `tool_calls`."""


class EventText(str):
    """A text that carries the event it comes from: what an LLM streams is a str and nothing else."""

    __slots__ = ("event",)
    event: Event

    @classmethod
    def of(cls, event: Event) -> "EventText":
        text = cls(event.text if isinstance(event, Delta) else "")
        text.event = event
        return text


class EventGenerationChunk(GenerationChunk):
    """A generation chunk whose text carries its event."""

    @classmethod
    def of(cls, event: Event, model: str | None) -> "EventGenerationChunk":
        chunk = cls(text="", generation_info=generation_info(event, model) or None)
        # Past validation, which would make a plain str of it.
        chunk.text = EventText.of(event)
        return chunk


class EventMessageChunk(AIMessageChunk):
    """A message chunk that carries its event; the sum of several has none."""

    event: Any = Field(default=None, exclude=True, repr=False)

    @classmethod
    def of(cls, event: Event) -> "EventMessageChunk":
        """Return what the model wrote and the event alone, as the service needs them."""
        if isinstance(event, Delta) and (event.reasoning or event.tool_calls):
            return cls.described(event)
        return cls(content=event.text if isinstance(event, Delta) else "", event=event)

    @classmethod
    def described(cls, event: Event) -> "EventMessageChunk":
        """Return the event with text, reasoning, calls, usage and position in LangChain's own places."""
        if isinstance(event, Delta):
            return cls(
                content=event.text,
                tool_call_chunks=[_call_chunk(part) for part in event.tool_calls],
                additional_kwargs={REASONING: event.reasoning} if event.reasoning else {},
                event=event,
            )
        if isinstance(event, Finished):
            return cls(content="", usage_metadata=finished_usage(event), chunk_position="last", event=event)
        return cls(content="", event=event)


def chat_generation_chunk(event: Event, model: str | None) -> ChatGenerationChunk:
    """Return an event as LangChain's callers know it."""
    return ChatGenerationChunk(
        message=EventMessageChunk.described(event), generation_info=generation_info(event, model) or None
    )


def generation_info(event: Event, model: str | None) -> dict[str, Any]:
    """Return the metadata of an event beside its text, under the names that LangChain's users know.

    LangChain adds up the infos of all chunks: texts and lists are joined, so each one holds only what is new.
    """
    match event:
        case Delta() if event.logprobs:
            return {"logprobs": {"content": [_logprob(token) for token in event.logprobs]}}
        case Finished():
            return {
                "finish_reason": event.finish_reason.value,
                "model_name": model,
                "cached": event.cached,
                "token_usage": {
                    "prompt_tokens": event.usage.prompt_tokens,
                    "completion_tokens": event.usage.completion_tokens,
                },
            }
    return {}


def _logprob(token: DetokenizedLogprob) -> dict[str, Any]:
    """Return a token in the shape that langchain-openai uses, which is OpenAI's."""
    return {
        "token": token.text,
        "bytes": list(token.raw),
        "logprob": token.logprob,
        "top_logprobs": [
            {"token": other.text, "bytes": list(other.raw), "logprob": other.logprob} for other in token.top
        ],
    }


def _call_chunk(part: ToolCallDelta) -> ToolCallChunk:
    return create_tool_call_chunk(name=part.name, args=part.arguments, id=part.id, index=part.position)


def finished_usage(finished: Finished) -> UsageMetadata:
    """Return token counts in LangChain's type, with those of reasoning where there was any."""
    usage = usage_metadata(finished.usage)
    if reasoning := sum(sample.reasoning_tokens for sample in finished.samples):
        usage["output_token_details"] = OutputTokenDetails(reasoning=reasoning)
    return usage


def usage_metadata(usage: Usage) -> UsageMetadata:
    """Return token counts in LangChain's type."""
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def to_langchain(message: Message) -> BaseMessage:
    """Return the message object that stands for ours; content is data, whatever braces it holds."""
    match message.role:
        case Role.SYSTEM:
            return SystemMessage(message.content, name=message.name)
        case Role.USER:
            return HumanMessage(message.content, name=message.name)
        case Role.ASSISTANT:
            return _assistant(message)
        case Role.TOOL:
            return ToolMessage(message.content, tool_call_id=message.tool_call_id or "", name=message.name)


def _assistant(message: Message) -> AIMessage:
    valid: list[LangChainCall] = []
    invalid: list[InvalidToolCall] = []
    for call in message.tool_calls:
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict):
            valid.append(create_tool_call(name=call.name, args=arguments, id=call.id))
        else:
            invalid.append(create_invalid_tool_call(name=call.name, args=call.arguments, id=call.id, error=None))
    return AIMessage(
        message.content,
        name=message.name,
        tool_calls=valid,
        invalid_tool_calls=invalid,
        additional_kwargs={} if message.reasoning is None else {REASONING: message.reasoning},
    )


def from_langchain(message: BaseMessage) -> Message:
    """Raises: ValueError: a kind of message that no chat template takes, or content that is no text."""
    text = _text(message)
    match message:
        case SystemMessage():
            return Message(Role.SYSTEM, text, name=message.name)
        case HumanMessage():
            return Message(Role.USER, text, name=message.name)
        case AIMessage():
            return Message(
                Role.ASSISTANT,
                text,
                tool_calls=_calls(message),
                reasoning=message.additional_kwargs.get(REASONING),
                name=message.name,
            )
        case ToolMessage():
            return Message(Role.TOOL, text, tool_call_id=message.tool_call_id or None, name=message.name)
    raise ValueError(f"messages of type {message.type} are not supported")


def _text(message: BaseMessage) -> str:
    """Return the text of a message, of which LangChain itself would leave out what is none.

    Raises: ValueError: it holds something else.
    """
    for block in message.content if isinstance(message.content, list) else ():
        kind = "text" if isinstance(block, str) else block.get("type")
        if kind != "text" and not (isinstance(message, AIMessage) and kind in _REPEATED):
            raise ValueError(f"content of the type {kind} is not supported, only text")
    return str(message.text)


def _calls(message: AIMessage) -> tuple[ToolCall, ...]:
    valid = [
        ToolCall(call["id"] or "", call["name"], json.dumps(call["args"], ensure_ascii=False))
        for call in message.tool_calls
    ]
    broken = [ToolCall(call["id"] or "", call["name"] or "", call["args"] or "") for call in message.invalid_tool_calls]
    return (*valid, *broken)
