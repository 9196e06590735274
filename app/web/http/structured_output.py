"""The request fields that say what a completion must look like, in OpenAI's words and in vLLM's, as one grammar."""

import json
from typing import Annotated, Any, Literal

from llguidance import StructTag
from pydantic import Field, StringConstraints

from app.errors import InvalidRequest
from app.grammars.compiler import MAX_GRAMMAR_CHARS
from app.types import Grammar
from app.web.http.dependencies import RequestContext
from app.web.http.json_body import MAX_DEPTH, StrictModel, parse

MAX_CHOICES = 1000
ANY_OBJECT: dict[str, Any] = {"type": "object"}

GrammarText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Choices = Annotated[list[GrammarText], Field(min_length=1, max_length=MAX_CHOICES)]
Schema = dict[str, Any] | GrammarText
"""A JSON Schema, as an object or as JSON text."""


class JsonSchemaFormat(StrictModel):
    """OpenAI's: a JSON Schema and its name."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    description: str | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema", description="Left out: any JSON object.")
    strict: bool | None = Field(None, description="The schema is enforced either way.")


class TaggedStructure(StrictModel):
    """vLLM's: what a tag begins with, what stands in it, and what it ends with."""

    begin: GrammarText
    definition: dict[str, Any] = Field(alias="schema")
    end: Annotated[str, StringConstraints(max_length=MAX_GRAMMAR_CHARS)]


class StructuralTag(StrictModel):
    """vLLM's: free text, in which each tag that begins is followed by JSON of its schema."""

    type: Literal["structural_tag"] = "structural_tag"
    structures: Annotated[list[TaggedStructure], Field(min_length=1, max_length=64)]
    triggers: Annotated[list[GrammarText], Field(min_length=1, max_length=64)]


class ResponseFormat(StrictModel):
    """OpenAI's `response_format`, with vLLM's structural tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[TaggedStructure] | None = Field(None, description="Of a structural tag.")
    triggers: list[GrammarText] | None = Field(None, description="Of a structural tag.")

    def grammar(self, field: str) -> tuple[str, Grammar] | None:
        """Return the grammar and the name of the field that it comes from; None for free text."""
        if self.type == "json_object":
            return field, json_grammar(field, ANY_OBJECT)
        if self.type == "json_schema":
            if self.json_schema is None:
                raise InvalidRequest.of_field(f"{field}.json_schema", "is required where type is json_schema")
            where = f"{field}.json_schema.schema"
            given = self.json_schema.definition
            return where, json_grammar(where, ANY_OBJECT if given is None else given)
        if self.type == "structural_tag":
            if not self.structures or not self.triggers:
                raise InvalidRequest.of_field(f"{field}.structures", "and triggers are required in a structural tag")
            return field, tag_grammar(field, self.structures, self.triggers)
        return None


class StructuredOutputs(StrictModel):
    """vLLM's `structured_outputs`: one of the first six."""

    definition: Schema | None = Field(None, alias="json", description="A JSON Schema, as an object or as JSON text.")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = Field(None, description="In Lark's form, or in the one that llama.cpp calls GBNF.")
    json_object: bool | None = None
    structural_tag: Annotated[str | None, Field(description="A structural tag as JSON text.")] = None
    disable_fallback: bool | None = Field(None, description="Changes nothing: there is one library.")
    disable_any_whitespace: bool | None = Field(None, description="Changes nothing.")

    def given(self, field: str) -> dict[str, Grammar]:
        """Return the grammars of all fields that are set, by name."""
        return _given(
            {
                f"{field}.json": self.definition,
                f"{field}.regex": self.regex,
                f"{field}.choice": self.choice,
                f"{field}.grammar": self.grammar,
                f"{field}.json_object": ANY_OBJECT if self.json_object else None,
                f"{field}.structural_tag": self.structural_tag,
            }
        )


class StructuredFields(StrictModel):
    """What every generating route takes."""

    response_format: ResponseFormat | None = Field(None, description="What the completion must look like.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's other form of response_format.")

    def grammars(self) -> dict[str, Grammar]:
        """Return the grammar of each field that asks for one, by the field's name."""
        found: dict[str, Grammar] = {}
        if self.response_format is not None and (named := self.response_format.grammar("response_format")) is not None:
            found |= [named]
        if self.structured_outputs is not None:
            found |= self.structured_outputs.given("structured_outputs")
        return found

    def grammar(self, context: RequestContext) -> Grammar | None:
        """Return the one grammar; the context remembers the name of its field, for what may refuse it later.

        Raises: InvalidRequest: several fields ask for one, or one is not well-formed.
        """
        found = self.grammars()
        if len(found) > 1:
            first, second, *_ = found
            raise InvalidRequest.of_field(second, f"is not possible together with {first}")
        for field, grammar in found.items():
            context.remember_grammar(field)
            return grammar
        return None


class GuidedFields(StructuredFields):
    """The older names of vLLM as well."""

    guided_json: Schema | None = Field(None, description="The older name of structured_outputs.json.")
    guided_regex: GrammarText | None = Field(None, description="The older name of structured_outputs.regex.")
    guided_choice: Choices | None = Field(None, description="The older name of structured_outputs.choice.")
    guided_grammar: GrammarText | None = Field(None, description="The older name of structured_outputs.grammar.")
    guided_decoding_backend: Annotated[str | None, Field(description="Changes nothing: there is one library.")] = None

    def grammars(self) -> dict[str, Grammar]:
        """Return the grammar of each field that asks for one, by the field's name."""
        named = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        return super().grammars() | _given({name: getattr(self, name) for name in named})


def _given(values: dict[str, Any]) -> dict[str, Grammar]:
    return {field: _grammar(field, value) for field, value in values.items() if value is not None}


def _grammar(field: str, value: Any) -> Grammar:
    match field.rpartition(".")[2].removeprefix("guided_"):
        case "regex":
            return Grammar("regex", value)
        case "choice":
            return choice_grammar(field, value)
        case "grammar":
            return Grammar("lark", value)
        case "structural_tag":
            tag = _structural_tag(field, value)
            return tag_grammar(field, tag.structures, tag.triggers)
        case _:
            return json_grammar(field, value)


def _structural_tag(field: str, text: str) -> StructuralTag:
    try:
        return StructuralTag.model_validate(parse(text.encode()))
    except (ValueError, InvalidRequest):
        raise InvalidRequest.of_field(
            field, "must be JSON with `structures` (begin, schema, end) and `triggers`"
        ) from None


def json_grammar(field: str, schema: dict[str, Any] | str) -> Grammar:
    """Return the grammar of a JSON Schema.

    Raises: InvalidRequest: it is a text that is not an object in JSON, or too long.
    """
    if isinstance(schema, str):
        try:
            schema = parse(schema.encode())
        except InvalidRequest:
            raise InvalidRequest.of_field(field, f"is not valid JSON of at most {MAX_DEPTH} levels") from None
        if not isinstance(schema, dict):
            raise InvalidRequest.of_field(field, "must be a JSON Schema, which is an object")
    return _bounded(field, Grammar("json_schema", _encoded(schema)))


def choice_grammar(field: str, choices: list[str]) -> Grammar:
    """Return the grammar of a choice among texts.  Raises: InvalidRequest: they are too long together."""
    return _bounded(field, Grammar("lark", "start: " + " | ".join(map(_encoded, choices))))


def tag_grammar(field: str, structures: list[TaggedStructure], triggers: list[str]) -> Grammar:
    """Return the grammar of free text in which tags are followed by JSON of their schemas.

    Raises: InvalidRequest: a structure begins with no trigger, or they are too long together.
    """
    tags = []
    for number, structure in enumerate(structures):
        trigger = next((each for each in triggers if structure.begin.startswith(each)), None)
        if trigger is None:
            raise InvalidRequest.of_field(f"{field}.structures.{number}.begin", "begins with none of the triggers")
        grammar = structure.definition
        tags.append(StructTag(trigger=trigger, begin=structure.begin, grammar=grammar, end=structure.end))
    marks = tuple(dict.fromkeys(structure.begin for structure in structures))
    return _bounded(field, Grammar("lark", StructTag.to_grammar(tags, assume_special=False), json_marks=marks))


def _encoded(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _bounded(field: str, grammar: Grammar) -> Grammar:
    if len(grammar.text) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest.of_field(field, f"is longer than {MAX_GRAMMAR_CHARS} characters")
    return grammar
