"""What the sampler has to enforce in a chat: calls that are asked for, and the client's own grammar behind thoughts.

- `required` or one tool by name: reasoning, then calls whose arguments follow the tools' schemas, and nothing else.
- `auto` with a strict tool: any text, and from the mark that begins a call only what is one.
- A response format, and tools that may be called: either calls or what the format describes.
- A response format of a model that thinks: whatever it thinks, then what the format describes.
"""

import json
import re
from dataclasses import replace

from msgspec import structs

from app.engine.base import ChatFormat, EngineInfo
from app.engine.parsing.call_grammars import SHAPES, arguments_of
from app.engine.parsing.families import harmony
from app.engine.parsing.families.llama import TAG
from app.engine.parsing.lark import ANY_TEXT, LarkGrammar, embedded_schema, quoted
from app.engine.parsing.reasoning import THOUGHTS
from app.errors import InvalidRequest
from app.grammars.schemas import GrammarError
from app.requests import GenerationRequest
from app.types import Grammar, Tool

_START = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])*/|(?<![\w@.-])start(?![\w-])')
_NO_OBJECT = r"(\s*[^\s{](?s:.*))?"
"""Text that does not begin as Llama's calls do."""
_REGEX_SLASH = re.compile(r"\\.|/")


def with_grammar(request: GenerationRequest, info: EngineInfo, *, inside: bool) -> GenerationRequest:
    """Return a chat with the grammar that its tools, its response format and the model's reasoning make.

    Args: inside: whether the completion begins within the reasoning.
    Raises: InvalidRequest: the model cannot be held to it; the field is named.
    """
    tools = _callable(request)
    forced = bool(tools) and request.tool_choice.mode == "required"
    strict = forced or any(tool.strict for tool in tools)
    own = request.sampling.grammar
    if own is None and not strict:
        return request
    known = info.chat_format.is_harmony or info.chat_format.tools in SHAPES
    if strict and (not known or "grammar" in info.capabilities.unsupported):
        field, value = ("tool_choice", "required") if forced else ("tools", "strict")
        raise InvalidRequest.of_field(field, f"{value} is not supported for this model")
    if not info.chat_format.is_harmony and not (tools and known) and info.chat_format.reasoning not in THOUGHTS:
        return request
    try:
        text = _ChatGrammar(info.chat_format, tools, request, inside=inside).render(own, forced=forced)
    except RecursionError:
        raise InvalidRequest.of_field("tools", "have a schema that is nested too deeply") from None
    except GrammarError as error:
        if own is not None and not forced:
            raise InvalidRequest.of_field("grammar", str(error)) from None
        raise InvalidRequest.of_field("tools", f"have a schema that {error}") from None
    return structs.replace(request, sampling=replace(request.sampling, grammar=Grammar("lark", text)))


def _callable(request: GenerationRequest) -> tuple[Tool, ...]:
    choice = request.tool_choice
    if choice.mode == "none":
        return ()
    return tuple(tool for tool in request.tools if choice.name in (None, tool.name))


class _ChatGrammar:
    """Writes the grammar of one completion of a chat."""

    def __init__(
        self, chat_format: ChatFormat, tools: tuple[Tool, ...], request: GenerationRequest, *, inside: bool
    ) -> None:
        self._format = chat_format
        self._tools = tools if chat_format.is_harmony or chat_format.tools in SHAPES else ()
        self._parallel = request.parallel_tool_calls
        self._inside = inside
        self._lark = LarkGrammar((*chat_format.special_marks, *chat_format.added_marks))

    def render(self, own: Grammar | None, *, forced: bool) -> str:
        """Return the grammar.  Args: own: the client's; forced: whether there must be calls."""
        body = None if own is None or forced else self._client(own)
        if self._format.is_harmony:
            return self._lark.render(self._harmony(body, forced=forced))
        if not self._tools:
            answer = body or ANY_TEXT
        elif forced:
            answer = self._calls()
        elif body is not None:
            # Llama's calls have no mark of their own but the tag, which begins no JSON.
            calls = (
                self._calls() if SHAPES[self._format.tools or ""].trigger else f"{self._lark.mark(TAG)} {self._calls()}"
            )
            answer = f"({calls} | {body})"
        else:
            answer = self._free()
        return self._lark.render(f"{self._thoughts()} {answer}".strip())

    def _calls(self) -> str:
        shape = SHAPES[self._format.tools or ""]
        calls = shape.after_trigger(self._lark, self._tools, parallel=self._parallel)
        return self._lark.add("block", f"{self._lark.mark(shape.trigger)} {calls}".strip())

    def _free(self) -> str:
        """Return any text with calls in it that are whole and valid."""
        shape = SHAPES[self._format.tools or ""]
        calls = self._lark.add("block", shape.after_trigger(self._lark, self._tools, parallel=self._parallel))
        if not shape.trigger:
            tagged = f"{self._lark.text_up_to(TAG, _NO_OBJECT)} {calls}"
            return f"({calls} | {tagged} | /{_NO_OBJECT}/)"
        begun = f"{self._lark.text_up_to(shape.trigger)} {calls}"
        times = "*" if self._parallel else "?"
        return f"({begun}){times} {ANY_TEXT}"

    def _thoughts(self) -> str:
        thought = THOUGHTS.get(self._format.reasoning or "")
        if thought is None:
            return ""
        # Blank lines between the thoughts and what follows are the template's.
        end = f"{self._lark.text_up_to(thought.end)} /\\n*/"
        if self._inside:
            return end
        return f"({self._lark.mark(thought.begin)} {quoted(thought.word)} {end})?"

    def _harmony(self, body: str | None, *, forced: bool) -> str:
        start, channel, message, constrain = map(self._lark.mark, harmony.MARKS[:4])
        text = self._lark.text_up_to(harmony.END)
        thoughts = f'({channel} ("analysis" | "commentary") {message} {text} {start} "assistant")*'
        calls = [
            f"{channel} {quoted(f'commentary to=functions.{tool.name} ')} {constrain} "
            f'"json" {message} {arguments_of(tool)}'
            for tool in self._tools
        ]
        final = [] if forced else [f'{channel} "final" {message} {body or ANY_TEXT}']
        return f"{thoughts} ({' | '.join(self._lark.add('message', each) for each in (*calls, *final))})"

    def _client(self, own: Grammar) -> str:
        """Return the client's grammar as an expression."""
        match own.kind:
            case "json_schema":
                return embedded_schema(json.loads(own.text))
            case "regex":
                slashed = _REGEX_SLASH.sub(lambda found: r"\/" if found.group() == "/" else found.group(), own.text)
                return self._lark.add("body", f"/{slashed}/".replace("\n", "\\n"))
        rules = _START.sub(lambda found: "client_start" if found.group() == "start" else found.group(), own.text)
        self._lark.define("client_rules", f'""\n{rules}')
        return "client_start"
