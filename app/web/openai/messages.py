"""The messages of a chat request as OpenAI's clients write them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from app.types import Message, Role
from app.web.http.json_body import StrictModel
from app.web.openai.validators import NeutralOnly

_ROLES = {"developer": Role.SYSTEM}
"""OpenAI's role -> the template's role, where they differ."""


class TextPart(StrictModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[Any, NeutralOnly()] = None


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


_Parts = Annotated[list[TextPart], Field(min_length=1)]


class ChatMessage(StrictModel):
    """One message; an assistant's may have the fields of this service's own responses."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[_Parts, BeforeValidator(_parts, json_schema_input_type=str | _Parts)]
    tool_call_id: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="Required of the role tool, and of no other."
    )
    name: Annotated[Any, NeutralOnly()] = None
    refusal: Annotated[Any, NeutralOnly()] = None
    audio: Annotated[Any, NeutralOnly()] = None
    function_call: Annotated[Any, NeutralOnly()] = None
    tool_calls: Annotated[Any, NeutralOnly([])] = None

    @model_validator(mode="after")
    def _has_tool_call_id(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to a message of the role tool, and to no other")
        return self

    def to_message(self) -> Message:
        """Return the message with its text parts joined by newlines."""
        return Message(_ROLES.get(self.role) or Role(self.role), "\n".join(part.text for part in self.content))
