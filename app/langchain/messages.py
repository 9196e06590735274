"""Translates messages and events between the service's types and LangChain's.

LangChain's chunks carry the engine's event in one more field, so that nothing has to go round the chain.
"""

from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from pydantic import Field

from app.events import Delta, DetokenizedLogprob, Event, Finished
from app.types import Message, Role, Usage


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
        """Return the text and the event alone, as the service needs them."""
        return cls(content=event.text if isinstance(event, Delta) else "", event=event)

    @classmethod
    def described(cls, event: Event) -> "EventMessageChunk":
        """Return the text and the event with usage and position in LangChain's own places."""
        finished = isinstance(event, Finished)
        return cls(
            content=event.text if isinstance(event, Delta) else "",
            usage_metadata=usage_metadata(event.usage) if isinstance(event, Finished) else None,
            chunk_position="last" if finished else None,
            event=event,
        )


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
            return SystemMessage(message.content)
        case Role.USER:
            return HumanMessage(message.content)
        case Role.ASSISTANT:
            return AIMessage(message.content)
        case Role.TOOL:
            return ToolMessage(message.content, tool_call_id="")


def from_langchain(message: BaseMessage) -> Message:
    """Raises: ValueError: a kind of message that no chat template takes."""
    match message:
        case SystemMessage():
            return Message(Role.SYSTEM, message.text)
        case HumanMessage():
            return Message(Role.USER, message.text)
        case AIMessage():
            return Message(Role.ASSISTANT, message.text)
        case ToolMessage():
            return Message(Role.TOOL, message.text)
    raise ValueError(f"messages of type {message.type} are not supported")
