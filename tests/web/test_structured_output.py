"""What a completion must look like, in the words of both dialects."""

import json
from typing import Any

import pytest

from app.types import Grammar
from tests.web.harness import BATCH, CHAT, GENERATE, MODEL, RecordingEngine, make_web

OPENAI = {"/v1/chat/completions": CHAT, "/v1/completions": GENERATE}
NATIVE = {"/v1/chat": CHAT, "/v1/generate": GENERATE, "/v1/generate/batch": BATCH}
BODIES = OPENAI | NATIVE
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WRITTEN = '{"type":"object","properties":{"a":{"type":"integer"}}}'


def named(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": False}}


TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<"]}
FORMS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "json_object"}}, Grammar("json_schema", '{"type":"object"}')),
    ({"response_format": named(SCHEMA)}, Grammar("json_schema", WRITTEN)),
    ({"response_format": named(None)}, Grammar("json_schema", '{"type":"object"}')),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar("json_schema", WRITTEN)),
    ({"structured_outputs": {"json": f" {WRITTEN} "}}, Grammar("json_schema", WRITTEN)),
    ({"structured_outputs": {"json_object": True}}, Grammar("json_schema", '{"type":"object"}')),
    ({"structured_outputs": {"json_object": False, "regex": "a+"}}, Grammar("regex", "a+")),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, Grammar("lark", 'start: "yes" | "n\\"o"')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar("lark", 'root ::= "a"')),
]


@pytest.mark.parametrize("path", BODIES)
async def test_every_form_becomes_a_grammar(web, client, path):
    for fields, expected in FORMS:
        reply = await client.post(path, json={**BODIES[path], **fields})

        assert 200 == reply.status_code, reply.text
        assert expected == web.service.requests[-1].sampling.grammar, fields


@pytest.mark.parametrize("path", OPENAI)
async def test_a_structural_tag_is_text_with_json_behind_its_triggers(web, client, path):
    """In vLLM's two places; the grammar holds the schema."""
    text = json.dumps({"type": "structural_tag", **TAG})
    for fields in (
        {"response_format": {"type": "structural_tag", **TAG}},
        {"structured_outputs": {"structural_tag": text}},
    ):
        assert 200 == (await client.post(path, json={**OPENAI[path], **fields})).status_code

    one, other = [request.sampling.grammar for request in web.service.requests]
    assert one == other
    assert one is not None
    assert "lark" == one.kind
    assert '"f>"' in one.text
    assert '"</f>"' in one.text


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
     "response_format.json_schema.name", ""),
    ({"response_format": {"type": "structural_tag"}}, "response_format.structures", "triggers"),
    ({"response_format": {"type": "structural_tag", "structures": TAG["structures"], "triggers": ["x"]}},
     "response_format.structures.0.begin", "none of the triggers"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
     "structured_outputs.regex", "together with response_format"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}},
     "structured_outputs.choice", "together with structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json", "an object"),
    *(({"structured_outputs": {"structural_tag": tag}}, "structured_outputs.structural_tag", "triggers")
      for tag in ("{}", "{", "", "[" * 40)),
    ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs.whitespace_pattern", "no such field"),
    ({"response_format": named({"enum": ["x" * 100_001]})}, "response_format.json_schema.schema", "longer than"),
]  # fmt: skip


@pytest.mark.parametrize("path", OPENAI)
async def test_what_is_no_form_or_two_is_refused_by_name(web, client, path):
    """Under the path of the field, with the other one's name where there are two."""
    body = OPENAI[path]
    for fields, field, words in REFUSED:
        reply = await client.post(path, json={**body, **fields})
        assert (400, field) == (reply.status_code, reply.json()["error"]["param"]), reply.text
        assert words in reply.json()["error"]["message"]
    assert [] == web.service.requests


async def test_the_older_names_and_the_newer_ones_exclude_each_other(client):
    reply = await client.post("/v1/completions", json={**GENERATE, "guided_regex": "a", "guided_choice": ["a"]})

    assert (400, "guided_choice") == (reply.status_code, reply.json()["error"]["param"])
    assert "guided_regex" in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
async def test_an_engine_that_cannot_is_refused_under_the_fields_own_name(path):
    """The echo engine enforces none; nothing is generated, whole or streamed."""
    engine = RecordingEngine()
    web = await make_web(engines={MODEL: engine})
    cases = [
        ({"response_format": named({"not": {}})}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}, "stream": path != "/v1/generate/batch"}, "structured_outputs.regex"),
    ]
    async with web.client() as client:
        for fields, field in cases:
            reply = await client.post(path, json={**BODIES[path], **fields})

            assert (200 if path == "/v1/generate/batch" else 400) == reply.status_code
            assert f"{field} is not supported for this model" in reply.text
    assert [] == engine.requests


async def test_a_grammar_beside_a_tool_that_must_be_called_is_refused(web):
    """Whichever dialect made the request."""
    from app.errors import InvalidRequest
    from app.requests import GenerationRequest
    from app.types import SamplingParams, Tenant, Tool, ToolChoice
    from app.web.http.grammar_field import check_tools

    def request(mode: Any) -> GenerationRequest:
        sampling = SamplingParams(grammar=Grammar("regex", "a"))
        return GenerationRequest(
            id="1", tenant=Tenant.program(), tools=(Tool("f"),), tool_choice=ToolChoice(mode), sampling=sampling
        )

    check_tools(request("auto"), "response_format")
    with pytest.raises(InvalidRequest, match="response_format is not possible together with a tool_choice"):
        check_tools(request("required"), "response_format")
