"""Translates tools, the choice among them and response formats from OpenAI's form, which LangChain's calls have."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.types import Grammar, Tool, ToolChoice

_CHAT_ARGUMENTS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs")


def split_chat_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a request that a chat's arguments stand for, and the other arguments.

    Raises: ValueError: one of them is not what it should be; the message names it.
    """
    given = {name: arguments[name] for name in _CHAT_ARGUMENTS if arguments.get(name) is not None}
    others = {name: value for name, value in arguments.items() if name not in _CHAT_ARGUMENTS}
    fields: dict[str, Any] = {}
    choice = to_choice(given.get("tool_choice"))
    if choice.mode != "none" and (tools := to_tools(given.get("tools", ()))):
        if choice.name is not None and choice.name not in {tool.name for tool in tools}:
            raise ValueError(f"tool_choice names {choice.name}, which is not among the tools")
        fields = {"tools": tools, "tool_choice": choice}
        fields["parallel_tool_calls"] = given.get("parallel_tool_calls", True)
    elif choice.mode == "required":
        raise ValueError("tool_choice requires a call, but there are no tools")
    if variables := given.get("chat_template_kwargs"):
        fields["template_kwargs"] = tuple(sorted(variables.items()))
    if (grammar := to_grammar(given.get("response_format"))) is not None:
        others["grammar"] = grammar
    return fields, others


def to_tools(tools: Sequence[Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Return tools from OpenAI's form, which `convert_to_openai_tool` makes.

    Raises: ValueError: one is no function.
    """
    return tuple(map(_tool, tools))


def _tool(tool: Mapping[str, Any]) -> Tool:
    if tool.get("type") != "function" or not isinstance(function := tool.get("function"), Mapping):
        raise ValueError("tools must be functions in OpenAI's form; bind_tools makes them of Python functions")
    return Tool(
        name=function["name"],
        description=function.get("description"),
        parameters=json.dumps(function.get("parameters") or {"type": "object", "properties": {}}, ensure_ascii=False),
        strict=bool(function.get("strict")),
    )


def to_choice(value: Any) -> ToolChoice:
    """Return a choice: LangChain's `any` and True mean that some tool must be called, a name that this one must.

    Raises: ValueError: it is nothing of the kind.
    """
    match value:
        case None | False | "auto":
            return ToolChoice()
        case "none":
            return ToolChoice("none")
        case True | "any" | "required":
            return ToolChoice("required")
        case str(name) | {"function": {"name": str(name)}}:
            return ToolChoice("required", name)
    raise ValueError("tool_choice must be auto, none, any, required, the name of a tool, or OpenAI's object")


def to_grammar(response_format: Any) -> Grammar | None:
    """Return the grammar of a response format in OpenAI's form.

    Raises: ValueError: it is of a kind that does not exist.
    """
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}} | {
            "type": "json_object" | "json_schema",
            "schema": dict(schema),
        }:
            return Grammar("json_schema", json.dumps(schema, ensure_ascii=False))
        case {"type": "json_object"}:
            return Grammar("json_schema", '{"type": "object"}')
    raise ValueError("response_format must be of the type text, json_object or json_schema, the last with its schema")
