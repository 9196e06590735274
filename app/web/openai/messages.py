"""The messages of a chat request as OpenAI's clients write them."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, ValidationInfo, field_validator, model_validator

from app.types import Message, Role, ToolCall
from app.web.http.lenient import LenientModel
from app.web.http.tool_calls import AnsweredId, CalledFunction, Calls, to_calls
from app.web.openai.validators import NeutralOnly

_ROLES = {"developer": Role.SYSTEM, "function": Role.TOOL}
"""OpenAI's role -> the template's role, where they differ."""
_NEEDS_PARTS = ("system", "developer", "user")
"""Roles whose content has at least one part."""
_MAY_BE_NULL = ("assistant", "function")
"""Roles whose content may be null."""
_NOT_TEXT = frozenset(["image_url", "input_audio", "file", "video_url", "image", "audio", "input_image", "input_file"])


def _text_only(value: Any) -> Any:
    if isinstance(value, str) and value in _NOT_TEXT:
        raise ValueError(f"{value} parts are not supported by this service, which takes only text")
    return value


class TextPart(LenientModel):
    """A text part of a message, or the refusal of an assistant."""

    harmless: ClassVar[frozenset[str]] = frozenset(["annotations", "cache_control", "prompt_cache_breakpoint"])

    type: Annotated[
        Literal["text", "refusal"],
        BeforeValidator(_text_only, json_schema_input_type=Literal["text", "refusal"]),
    ]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _has_its_text(self) -> Self:
        if (self.text if self.type == "text" else self.refusal) is None:
            raise ValueError(f"a part of the type {self.type} needs the field {self.type}")
        return self

    def __str__(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Parts = list[TextPart]


class ChatMessage(LenientModel):
    """One message; an assistant's may have the fields of this service's own responses, and what clients add to them."""

    harmless: ClassVar[frozenset[str]] = frozenset(
        """annotations cache_control provider_specific_fields reasoning_details reasoning_signature thinking_blocks
        stop_reason""".split()
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[_Parts | None, BeforeValidator(_parts, json_schema_input_type=str | _Parts | None)] = Field(
        None, validate_default=True, description="May be null in a message of the assistant or a function."
    )
    tool_call_id: AnsweredId | None = Field(None, description="Required of the role tool, and of no other.")
    name: Annotated[str, StringConstraints(max_length=256)] | None = Field(
        None, description="Who speaks, or which function; the model sees it if its chat template shows it."
    )
    refusal: str | None = Field(None, description="What the assistant said in place of its content.")
    tool_calls: Calls | None = Field(None, description="What the assistant called; of no other role.")
    function_call: CalledFunction | None = Field(None, description="The older form of tool_calls.")
    reasoning_content: str | None = Field(None, description="What the assistant thought before.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    audio: Annotated[Any, NeutralOnly()] = None

    @field_validator("content", mode="after")
    @classmethod
    def _has_content(cls, content: _Parts | None, info: ValidationInfo) -> _Parts | None:
        role = info.data.get("role")
        if content is None and role not in (None, *_MAY_BE_NULL):
            raise ValueError("must be a text or a list of text parts")
        if content == [] and role in _NEEDS_PARTS:
            raise ValueError("must hold at least one part")
        return content

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to a message of the role tool, and to no other")
        if self.role != "assistant" and (self.tool_calls or self.function_call):
            raise ValueError("tool_calls and function_call belong to messages of the role assistant")
        if self.role == "function" and not self.name:
            raise ValueError("a message of the role function needs the name of the function")
        return self

    @property
    def text(self) -> str:
        """The text parts, joined by newlines."""
        if self.content is None and self.role == "assistant":
            return self.refusal or ""
        return "\n".join(map(str, self.content or ()))

    def to_message(self) -> Message:
        """Return the message as the service takes it, in the role that the model's template knows."""
        calls = to_calls(self.tool_calls or ())
        if self.function_call is not None:
            calls = (*calls, ToolCall("", self.function_call.name, self.function_call.arguments or ""))
        reasoning = self.reasoning_content or self.reasoning
        return Message(
            _ROLES.get(self.role) or Role(self.role),
            self.text,
            tool_calls=calls,
            tool_call_id=self.tool_call_id,
            reasoning=(reasoning or None) if self.role == "assistant" else None,
            name=self.name or None,
        )
