"""The tools that a request offers to the model, and which of them it may or must call.

Decides what is a valid definition.  The dialects share it: both take OpenAI's objects.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from app.errors import InvalidRequest
from app.types import Tool, ToolChoice, ToolMode
from app.web.http.json_schema import check_parameters
from app.web.http.lenient import LenientModel

MAX_TOOLS = 128
"""OpenAI's own limit."""
MAX_TOOL_CHARS = 262_144
"""Of all definitions in sum; far more than a context window holds."""

ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class FunctionDefinition(LenientModel):
    """A function that the model may ask the client to call."""

    harmless: ClassVar[frozenset[str]] = frozenset(["cache_control"])

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(check_parameters)] | None = Field(
        None, description="JSON Schema of the arguments, an object; left out: there are none."
    )
    strict: bool | None = Field(None, description="The arguments of every call follow the schema.")


_BUILT_IN = frozenset(
    """apply_patch code_interpreter computer computer_use_preview custom file_search image_generation local_shell mcp
    namespace programmatic_tool_calling shell tool_search web_search web_search_preview""".split()
)
"""OpenAI's other types, which a message may repeat."""


def _function_only(value: Any) -> Any:
    if isinstance(value, str) and value in _BUILT_IN:
        raise ValueError(f"{value} tools are not supported by this service, which takes only function")
    return value


class ToolDefinition(LenientModel):
    """A tool; only functions are supported."""

    harmless: ClassVar[frozenset[str]] = frozenset(["cache_control"])

    type: Annotated[Literal["function"], BeforeValidator(_function_only, json_schema_input_type=Literal["function"])]
    function: FunctionDefinition


Tools = Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)]
Functions = Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS)]


@dataclass(frozen=True, slots=True)
class ChosenTools:
    """What a tool_choice says."""

    mode: ToolMode
    names: tuple[str, ...] | None = None
    """The functions that the model may call; None: all."""
    one: bool = False
    """Whether it names the one that must be called."""


_CHOICE_REASON = "must be none, auto, required, or an object of the type function or allowed_tools that names functions"


def _choice(value: Any) -> ChosenTools | None:
    """Return what the field says.  Raises: ValueError: it is no choice among functions."""
    match value:
        case None:
            return None
        case "none" | "auto" | "required":
            return ChosenTools(value)
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return ChosenTools("required", (name,), one=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}} | {
            "type": "allowed_tools",
            "mode": "auto" | "required" as mode,
            "tools": list(tools),
        }:
            return ChosenTools(mode, tuple(map(_allowed, tools)))
    raise ValueError(_CHOICE_REASON)


def _allowed(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise ValueError(_CHOICE_REASON)


def _old_choice(value: Any) -> ChosenTools | None:
    match value:
        case None:
            return None
        case "none" | "auto":
            return ChosenTools(value)
        case {"name": str(name)}:
            return ChosenTools("required", (name,), one=True)
    raise ValueError("must be none, auto, or an object that names a function")


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_NAMED = _object(type={"const": "function"}, function=_object(name={"type": "string"}))
_ALLOWED = _object(
    type={"const": "allowed_tools"},
    allowed_tools=_object(mode={"enum": ["auto", "required"]}, tools={"type": "array", "items": _NAMED}),
)
ToolChoiceField = Annotated[
    ChosenTools | None,
    PlainValidator(_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED, _ALLOWED, {"type": "null"}]}),
]
FunctionChoiceField = Annotated[
    ChosenTools | None,
    PlainValidator(_old_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto"]}, _object(name={"type": "string"}), {"type": "null"}]}),
]


def tool_fields(
    definitions: Sequence[FunctionDefinition],
    chosen: ChosenTools | None,
    *,
    parallel: bool,
    names: tuple[str, str] = ("tools", "tool_choice"),
    name_path: str = "function.name",
) -> dict[str, Any]:
    """Return the fields of a generation request that say what the model may call.

    Where it may call nothing, it is not told of the tools either.

    Args:
        names: of the two fields, for errors.
        name_path: where in a definition its name stands, for errors.
    Raises: InvalidRequest: two tools have one name, the choice names none of them, or all are too large.
    """
    field, choice_field = names
    tools = [_tool(each) for each in definitions]
    _check_tools(tools, field, name_path)
    chosen = chosen or ChosenTools("auto")
    known = {tool.name for tool in tools}
    if chosen.names is not None and not (chosen.names and known.issuperset(chosen.names)):
        raise InvalidRequest.of_field(choice_field, f"names a function that is not among {field}")
    if chosen.mode == "required" and not tools:
        raise InvalidRequest.of_field(choice_field, f"is only possible with {field}")
    if chosen.mode == "none" or not tools:
        return {}
    return {
        "tools": tuple(tool for tool in tools if chosen.names is None or chosen.one or tool.name in chosen.names),
        "tool_choice": ToolChoice(chosen.mode, chosen.names[0] if chosen.one and chosen.names else None),
        "parallel_tool_calls": parallel,
    }


def _tool(definition: FunctionDefinition) -> Tool:
    parameters = definition.parameters or {"type": "object", "properties": {}}
    return Tool(
        name=definition.name,
        description=definition.description,
        parameters=json.dumps(parameters, ensure_ascii=False),
        strict=bool(definition.strict),
    )


def _check_tools(tools: Iterable[Tool], field: str, name_path: str) -> None:
    """Raises: InvalidRequest."""
    seen: set[str] = set()
    chars = 0
    for place, tool in enumerate(tools):
        if tool.name in seen:
            raise InvalidRequest.of_field(f"{field}.{place}.{name_path}", "is the name of another one too")
        seen.add(tool.name)
        chars += len(tool.parameters) + len(tool.description or "")
    if chars > MAX_TOOL_CHARS:
        raise InvalidRequest.of_field(field, f"have {chars} characters; this service takes at most {MAX_TOOL_CHARS}")
