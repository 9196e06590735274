"""Grammars are tried before anything is generated, where the worst of them harms nobody."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.engine import grammar_checker
from app.engine.grammar_checker import GrammarChecker
from app.errors import DeadlineExceeded, EngineFailed, EngineNotReady, InvalidRequest
from app.grammars.compiler import MAX_GRAMMAR_CHARS
from app.types import Grammar, Tenant
from tests.unit.tiny_models import chatml_tokenizer, save
from tests.waiting import HANG_SECONDS

TENANT = Tenant.owner("anna")


@pytest.fixture
async def checker(tmp_path: Path) -> AsyncIterator[GrammarChecker]:
    tokenizer = chatml_tokenizer()
    checker = GrammarChecker(str(save(tokenizer, tmp_path)), len(tokenizer))
    yield checker
    await checker.close()


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


HARD = schema({"properties": {f"p{number}": {"type": "string"} for number in range(1500)}})
"""Takes a quarter of a second of a processor to compile."""


async def reason(checker: GrammarChecker, grammar: Grammar) -> str | None:
    """Return why the grammar is refused; None if it is not."""
    try:
        await checker.check(grammar, TENANT)
    except InvalidRequest as error:
        ((field, why),) = [(each["field"], each["reason"]) for each in (error.details or {})["errors"]]
        assert "grammar" == field
        return str(why)
    return None


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (schema({"type": "array", "uniqueItems": True}), "uses `uniqueItems`, which"),
        (schema({"properties": {"a": {"not": {}, "if": True}}}), "uses `if`, `not`, which"),
        (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "`oneOf`"),
        (schema({"$ref": "https://example.com/x"}), "`$ref` to another document"),
        (schema({"$ref": "#/$defs/x"}), "`$ref` to a place"),
        (schema({"$ref": "#"}), "cannot be satisfied"),
        (schema({"enum": []}), "cannot be satisfied"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "cannot be satisfied"),
        (schema({"type": "text"}), "`type`"),
        (schema({"type": "string", "format": "regex"}), "`format` regex"),
        (schema({"minimum": 0, "exclusiveMinimum": True}), "`exclusiveMinimum` with a boolean"),
        (schema({"type": "object", "minProperties": 3}), "`minProperties`"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (schema({"type": "string", "pattern": "("}), "unclosed group"),
        (Grammar("json_schema", "{"), "not valid JSON"),
        (Grammar("regex", "a{2,1}"), "expression"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("lark", "start: rule"), "rule that it does not define (line 1, column 8)"),
        (Grammar("lark", "start: <|nobody|>"), "special token"),
        (Grammar("lark", "no grammar at all"), "Lark"),
    ],
)
async def test_what_cannot_be_enforced_is_refused_by_name(checker: GrammarChecker, grammar: Grammar, words: str):
    found = await reason(checker, grammar)

    assert found is not None
    assert words in found


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": "object", "x-guidance": {"lenient": True}, "unknown": 1}),
        schema({"type": "string", "format": "password"}),
        schema(True),
        Grammar("regex", "[a-z]+"),
        Grammar("lark", 'start: "a"+ <|im_end|>'),
        Grammar("lark", 'root ::= "a" | "b"'),
    ],
)
async def test_what_can_be_enforced_passes(checker: GrammarChecker, grammar: Grammar):
    assert await reason(checker, grammar) is None


async def test_options_of_the_compiler_are_not_the_clients_to_choose(checker: GrammarChecker):
    """Or a schema would be enforced in part only."""
    assert await reason(checker, schema({"x-guidance": {"lenient": True}, "not": {}})) is not None


def chain(depth: int) -> Grammar:
    links = {f"a{n}": {"type": "array", "items": {"$ref": f"#/$defs/a{n + 1}"}} for n in range(depth)}
    return schema({"$ref": "#/$defs/a0", "$defs": {**links, f"a{depth}": {"type": "string"}}})


@pytest.mark.parametrize(
    "grammar",
    [
        chain(1500),
        Grammar("lark", "start: a0\n" + "".join(f'a{n}: a{n + 1} "x"\n' for n in range(3000)) + 'a3000: "y"'),
        Grammar("regex", "(" * 20_000 + ")" * 20_000),
        Grammar("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
        Grammar("regex", "a" * (MAX_GRAMMAR_CHARS + 1)),
    ],
    ids=["references", "rules", "groups", "levels", "length"],
)
async def test_what_exhausts_the_compiler_is_refused_and_harms_nobody(checker: GrammarChecker, grammar: Grammar):
    """Those that end the process, too; the next grammar is tried in another one."""
    assert await reason(checker, grammar) is not None
    assert await reason(checker, Grammar("regex", "a")) is None


async def test_a_grammar_that_takes_too_long_is_refused_and_remembered(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
):
    """Another one does not have to wait for longer than that."""
    assert await reason(checker, Grammar("regex", "a")) is None
    monkeypatch.setattr(grammar_checker, "COMPILE_SECONDS", 0.02)
    assert "takes too long to compile" == await reason(checker, HARD)
    monkeypatch.undo()

    assert "takes too long to compile" == await reason(checker, HARD)  # for which there would now be time
    assert await reason(checker, schema({"enum": [f"x{number}" for number in range(8000)]})) is None
    assert await reason(checker, Grammar("regex", "b")) is None


async def test_a_grammar_that_only_a_busy_machine_holds_up_is_neither_refused_nor_remembered(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
):
    assert await reason(checker, Grammar("regex", "a")) is None
    monkeypatch.setattr(grammar_checker, "ANSWER_SECONDS", 0.001)
    with pytest.raises(EngineFailed, match="try again"):
        await checker.check(HARD, TENANT)
    monkeypatch.undo()

    assert await reason(checker, HARD) is None


async def test_a_known_grammar_needs_no_process(checker: GrammarChecker):
    await checker.check(Grammar("regex", "a"), TENANT)
    await checker.close()

    await checker.check(Grammar("regex", "a"), TENANT)
    with pytest.raises(EngineNotReady):
        await checker.check(Grammar("regex", "b"), TENANT)


async def test_whoever_hangs_up_leaves_no_answer_behind_for_the_next(checker: GrammarChecker):
    await checker.check(Grammar("regex", "a"), TENANT)
    impatient = asyncio.create_task(checker.check(schema({"not": {}}), TENANT))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)

    assert await reason(checker, Grammar("regex", "b")) is None


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.4])
async def test_whoever_hangs_up_while_the_process_starts_leaves_nothing_behind_either(
    checker: GrammarChecker, seconds: float
):
    """What the process says of itself is no answer to anybody's question."""
    impatient = asyncio.create_task(checker.check(schema({"not": {}}), TENANT))
    await asyncio.sleep(seconds)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)

    assert await reason(checker, Grammar("regex", "b")) is None
    assert "`not`" in str(await reason(checker, schema({"not": {}})))
    assert await reason(checker, Grammar("regex", "c")) is None


@pytest.mark.parametrize("started", [False, True])
async def test_a_check_that_is_under_way_when_the_model_goes_is_the_services_fault(
    checker: GrammarChecker, started: bool
):
    """Also while the process starts; and no process is started afterwards."""
    if started:
        await checker.check(Grammar("regex", "a"), TENANT)
    under_way = [
        asyncio.create_task(checker.check(each, TENANT)) for each in (HARD, schema({"type": "null"}), schema(True))
    ]
    await asyncio.sleep(0 if started else 0.01)

    await checker.close()

    outcomes = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), HANG_SECONDS)
    assert {EngineNotReady} == {type(each) for each in outcomes}
    with pytest.raises(EngineNotReady):
        await checker.check(Grammar("regex", "b"), TENANT)
    assert not checker._children


async def test_a_grammar_waits_no_longer_than_a_request_may(tmp_path: Path):
    """The process takes longer to start."""
    tokenizer = chatml_tokenizer()
    checker = GrammarChecker(str(save(tokenizer, tmp_path)), len(tokenizer), waiting_seconds=0.02)

    with pytest.raises(DeadlineExceeded, match="waited too long to be tried"):
        await checker.check(Grammar("regex", "a"), TENANT)

    await checker.close()


async def test_of_a_grammar_only_the_outcome_is_kept(checker: GrammarChecker):
    """A schema can hold personal data."""
    await checker.check(schema({"const": "anna@example.com"}), TENANT)

    assert "anna" not in repr(vars(checker))
