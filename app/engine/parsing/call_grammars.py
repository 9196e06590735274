"""The grammar of each family's calls, in which the arguments follow the schema of the tool."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.engine.parsing.families import deepseek, gemma, hermes, mistral, phi
from app.engine.parsing.families.schema_values import types_of
from app.engine.parsing.gemma_grammar import gemma_arguments
from app.engine.parsing.lark import LarkGrammar, embedded_schema, escaped, quoted
from app.grammars.schemas import listed
from app.types import Tool

WriteCall = Callable[[LarkGrammar, Tool], str]


@dataclass(frozen=True, slots=True)
class CallShape:
    """How calls follow each other: trigger, opening, call, (separator, call)*, closing; texts are literal."""

    trigger: str
    """The mark that text before it ends at; empty where calls are all of the completion."""
    call: WriteCall
    opening: str = ""
    separator: tuple[str, ...] = ()
    """Marks and texts between two calls."""
    closing: tuple[str, ...] = ()

    def after_trigger(self, lark: LarkGrammar, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Return the expression of what follows the trigger."""
        calls = [lark.add("call", self.call(lark, tool)) for tool in tools]
        one = lark.add("calls", " | ".join(calls))
        between = " ".join(map(lark.mark, self.separator))
        more = f"({between} {one})*" if parallel else ""
        return " ".join([quoted(self.opening), one, more, *map(lark.mark, self.closing)])


def schema_of(tool: Tool) -> dict[str, Any]:
    """Return the JSON Schema of a tool's arguments, which are an object."""
    written = json.loads(tool.parameters or "{}")
    # Clients write null for what they leave out.
    given = {key: value for key, value in written.items() if value is not None} if isinstance(written, dict) else {}
    return {"type": "object", **given}


def arguments_of(tool: Tool) -> str:
    """Return a tool's arguments as JSON, in an expression.

    Keywords that the sampler does not know are refused for a strict tool and left out for others.
    """
    return embedded_schema(schema_of(tool), lenient=not tool.strict)


def _object(tool: Tool, key: str) -> str:
    """Return a call as a JSON object."""
    begin = quoted(f'{{"name": {json.dumps(tool.name)}, "{key}": ')
    return f"{begin} {arguments_of(tool)} {quoted('}')}"


def _hermes(lark: LarkGrammar, tool: Tool) -> str:
    return f"{quoted(chr(10))} {_object(tool, 'arguments')} {quoted(chr(10))} {lark.mark(hermes.END)}"


def _llama(lark: LarkGrammar, tool: Tool) -> str:
    return _object(tool, "parameters")


def _listed(lark: LarkGrammar, tool: Tool) -> str:
    return _object(tool, "arguments")


def _mistral_args(lark: LarkGrammar, tool: Tool) -> str:
    return f"{quoted(tool.name)} {lark.mark(mistral.ARGS)} {arguments_of(tool)}"


def _deepseek(lark: LarkGrammar, tool: Tool) -> str:
    begin, separator, end = map(lark.mark, (deepseek.BEGIN, deepseek.SEPARATOR, deepseek.END))
    name = quoted(f"{tool.name}\n```json\n")
    return f"{begin} {quoted('function')} {separator} {name} {arguments_of(tool)} {quoted(chr(10) + '```')} {end}"


def _deepseek_v31(lark: LarkGrammar, tool: Tool) -> str:
    begin, separator, end = map(lark.mark, (deepseek.BEGIN, deepseek.SEPARATOR, deepseek.END))
    return f"{begin} {quoted(tool.name)} {separator} {arguments_of(tool)} {end}"


def _gemma(marks: gemma.GemmaMarks) -> WriteCall:
    def call(lark: LarkGrammar, tool: Tool) -> str:
        arguments = gemma_arguments(lark, schema_of(tool), marks.quote)
        return f"{quoted(gemma.CALL + tool.name)} {arguments} {lark.mark(marks.end)}"

    return call


def _qwen_xml(lark: LarkGrammar, tool: Tool) -> str:
    schema = schema_of(tool)
    properties = schema.get("properties")
    needed = listed(schema, "required")
    parameters = [
        f"({_parameter(lark, name, each, schema, lenient=not tool.strict)}){'' if name in needed else '?'}"
        for name, each in (properties if isinstance(properties, dict) else {}).items()
    ]
    begin, end = quoted(f"\n{hermes.FUNCTION}{tool.name}>\n"), quoted(f"{hermes.FUNCTION_END}\n")
    return " ".join([begin, *parameters, end, lark.mark(hermes.END)])


def _parameter(lark: LarkGrammar, name: str, schema: Any, root: Mapping[str, Any], *, lenient: bool) -> str:
    begin, end = quoted(f"{hermes.PARAMETER}{name}>\n"), f"\n{hermes.PARAMETER_END}\n"
    if types_of(schema) == {"string"} and schema.get("enum") is not None:
        values = " | ".join(quoted(str(value)) for value in listed(schema, "enum"))
        return f"{begin} ({values}) {quoted(end)}"
    if types_of(schema) == {"string"}:
        return f"{begin} {lark.add('value', f'/(?s:.*){escaped(end)}/', options='[lazy]')}"
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    value = {**schema, **shared} if isinstance(schema, dict) else shared
    return f"{begin} {embedded_schema(value, lenient=lenient)} {quoted(end)}"


SHAPES: Mapping[str, CallShape] = {
    "hermes": CallShape(hermes.BEGIN, _hermes, separator=("\n", hermes.BEGIN)),
    "qwen_xml": CallShape(hermes.BEGIN, _qwen_xml, separator=("\n", hermes.BEGIN)),
    "llama": CallShape("", _llama, separator=("; ",)),
    "mistral": CallShape(mistral.CALLS, _listed, opening="[", separator=(", ",), closing=("]",)),
    "mistral_args": CallShape(mistral.CALLS, _mistral_args, separator=(mistral.CALLS,)),
    "deepseek": CallShape(deepseek.CALLS_BEGIN, _deepseek, separator=("\n",), closing=(deepseek.CALLS_END,)),
    "deepseek_v31": CallShape(deepseek.CALLS_BEGIN, _deepseek_v31, closing=(deepseek.CALLS_END,)),
    "gemma4": CallShape(gemma.GEMMA_4.begin, _gemma(gemma.GEMMA_4), separator=(gemma.GEMMA_4.begin,)),
    "function_gemma": CallShape(
        gemma.FUNCTION_GEMMA.begin, _gemma(gemma.FUNCTION_GEMMA), separator=(gemma.FUNCTION_GEMMA.begin,)
    ),
    "phi": CallShape(phi.BEGIN, _listed, opening="[", separator=(", ",), closing=("]", phi.END)),
}
"""The shape of each format's calls but harmony's, whose messages are a grammar of their own."""
