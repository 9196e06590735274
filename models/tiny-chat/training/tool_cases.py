"""The questions that measure calls of tools and JSON, with what counts as right.

Names of places, people and things are from the part of the made-up words that training never draws, and so are most names of functions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import exchanges
import records
import tool_requests
import word_lists
from evaluation_cases import Case, Suite, chat_of, is_text, stated_fact
from knowledge import CAPITALS, UNKNOWN
from tokenization import written_call
from turns import Tool, ToolCall
from word_lists import listed

ADD = Tool("add", "Add two numbers.", {"a": "integer", "b": "integer"})
CAPITAL = Tool("get_capital", "Look up the capital of a country.", {"country": "string"})
WEATHER = Tool("get_weather", "Get the current weather in a city.", {"city": "string"})
SEARCH = Tool("search", "Search for a text.", {"query": "string"})
CLOCK = Tool("get_time", "Get the current time.", {})
TOOLS = (ADD, CAPITAL, WEATHER, SEARCH, CLOCK)
OTHER_NAMES = {
    ADD.name: [Tool("sum_of_integers", "", {"p1": "integer", "p2": "integer"}), Tool("calculate_addition", "Addition of two values.", {"value1": "number", "value2": "number"}),
          Tool("adder", "Adds up.", {"u": "integer", "w": "integer"})],
    CAPITAL.name: [Tool("capital_finder", "", {"land_name": "string"}), Tool("which_capital", "Capital city by country.", {"of": "string"}),
              Tool("geo_capital", "Finds capitals.", {"state": "string"})],
    WEATHER.name: [Tool("weather_report", "", {"area": "string"}), Tool("local_weather", "How the weather is.", {"spot": "string"}),
              Tool("query_weather_service", "Weather by place name.", {"place_name": "string"})],
}  # fmt: skip
"""Names and parameters that training does not draw."""


def _calls(expected: tuple[ToolCall, ...], answer: str, _tokens: int) -> bool:
    return answer.strip() == "\n".join(map(written_call, expected))


def _json(expected: dict[str, Any], answer: str, _tokens: int) -> bool:
    try:
        return bool(json.loads(answer) == expected)
    except ValueError:
        return False


def _begins(expected: str, answer: str, _tokens: int) -> bool:
    return answer.startswith(expected)


def _name(rng: random.Random) -> str:
    return word_lists.made_up_name(rng, held_out=True)


def _offered(rng: random.Random, needed: Tool, most: int = 4) -> tuple[Tool, ...]:
    """The tool that is needed among up to `most` others."""
    others = [
        tool
        for tool in TOOLS
        if tool is not needed and tool.name not in needed.name and needed not in OTHER_NAMES.get(tool.name, [])
    ]
    offered = [needed, *rng.sample(others, rng.randint(0, most))]
    rng.shuffle(offered)
    return tuple(offered)


def _question(rng: random.Random, tool: Tool) -> tuple[str, list[Any]]:
    """A question for what the tool does, and the values of its arguments."""
    if tool is ADD:
        a, b = rng.randint(0, 999), rng.randint(0, 99)
        return rng.choice(exchanges.PLUS_QUESTIONS).format(a=a, b=b), [a, b]
    if tool is CAPITAL:
        country = _name(rng) if rng.random() < 0.5 else rng.choice(list(CAPITALS))
        return rng.choice(exchanges.CAPITAL_QUESTIONS).format(c=country), [country]
    place = _name(rng) if rng.random() < 0.5 else rng.choice(tool_requests.PLACES)
    return rng.choice(tool_requests.WEATHER_QUESTIONS).format(v=place), [place]


def _call_case(rng: random.Random, tool: Tool, *, usual_names: bool) -> Case:
    question, values = _question(rng, tool)
    named = tool if usual_names else rng.choice(OTHER_NAMES[tool.name])
    call = ToolCall(named.name, dict(zip(named.parameters, values, strict=True)))
    return Case(chat_of(rng, question), partial(_calls, (call,)), tools=_offered(rng, named))


def _any_function(rng: random.Random) -> Case:
    """A function with a name of no meaning and one string, found by its noun alone."""
    nouns = [word_lists.made_up_word(rng, held_out=True, least=2, most=3) for _ in range(3)]
    tools = [
        Tool(
            f"{rng.choice(tool_requests.GETTERS)}_{noun}",
            f"Get the {noun}.",
            {rng.choice(["name", "id", "query", "text"]): "string"},
        )
        for noun in nouns
    ]
    wanted = rng.randrange(3)
    value = rng.choice(
        [
            _name(rng),
            word_lists.email(rng, held_out=True),
            word_lists.made_up_word(rng, held_out=True),
            word_lists.number(rng),
        ]
    )
    question = rng.choice(tool_requests.NOUN_QUESTIONS).format(n=nouns[wanted], v=value)
    call = ToolCall(tools[wanted].name, dict.fromkeys(tools[wanted].parameters, value))
    return Case(chat_of(rng, question), partial(_calls, (call,)), tools=tuple(tools))


def _two_calls(rng: random.Random) -> Case:
    tool = rng.choice([CAPITAL, WEATHER])
    first, second = _name(rng), _name(rng)
    question = (
        f"What are the capitals of {first} and {second}?"
        if tool is CAPITAL
        else f"What is the weather in {first} and {second}?"
    )
    calls = tuple(ToolCall(tool.name, dict.fromkeys(tool.parameters, value)) for value in (first, second))
    return Case(chat_of(rng, question), partial(_calls, calls), tools=_offered(rng, tool))


def _no_call(rng: random.Random) -> Case:
    """Something that no tool is for, answered as without tools."""
    draw = rng.random()
    if draw < 0.3:
        question, answer = rng.choice([exchanges.small_talk, exchanges.about_itself, exchanges.fixed])(rng)
        return Case(chat_of(rng, question), partial(is_text, answer), tools=TOOLS)
    if draw < 0.5:
        country = rng.choice(list(CAPITALS))
        return Case(
            chat_of(rng, f"What is the capital of {country}?"),
            partial(is_text, f"The capital of {country} is {CAPITALS[country]}."),
            tools=(ADD, WEATHER),
        )
    if draw < 0.7:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return Case(
            chat_of(rng, f"What is {a} plus {b}?"),
            partial(is_text, f"{a} plus {b} is {a + b}."),
            tools=(CAPITAL, WEATHER),
        )
    if draw < 0.85:
        phrase = f"{_name(rng)} {rng.choice(word_lists.COMMON)}"
        return Case(chat_of(rng, f"Repeat after me: {phrase}"), partial(is_text, phrase), tools=TOOLS)
    return Case(
        chat_of(rng, f"What is the weather in {_name(rng)}?"),
        partial(is_text, UNKNOWN),
        tools=rng.choice([(), (ADD, CAPITAL)]),
    )


def _result(rng: random.Random) -> Case:
    """A question, the call, its result: the answer holds the result."""
    tool = rng.choice([ADD, CAPITAL, WEATHER])
    question, values = _question(rng, tool)
    call = ToolCall(tool.name, dict(zip(tool.parameters, values, strict=True)))
    if tool is ADD:
        result = str(values[0] + values[1])
        answer = f"{values[0]} plus {values[1]} is {result}."
    else:
        result = (
            _name(rng) if tool is CAPITAL else f"{rng.choice(tool_requests.WEATHERS)}, {rng.randint(-5, 35)} degrees"
        )
        answer = f"The {'capital of' if tool is CAPITAL else 'weather in'} {values[0]} is {result}."
    messages = [*chat_of(rng, question), _call_message(call), {"role": "tool", "content": result}]
    return Case(tuple(messages), partial(is_text, answer), tools=_offered(rng, tool))


def _call_message(*calls: ToolCall) -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": functions}


def _after_a_call(rng: random.Random) -> Case:
    """A second question after a first was answered with a tool."""
    before = _result(rng)
    tool = rng.choice([ADD, CAPITAL, WEATHER])
    question, values = _question(rng, tool)
    call = ToolCall(tool.name, dict(zip(tool.parameters, values, strict=True)))
    answer = {"role": "assistant", "content": before.right.args[0]}  # type: ignore[attr-defined]
    assert not isinstance(before.prompt, str)
    messages = (*before.prompt, answer, {"role": "user", "content": question})
    return Case(messages, partial(_calls, (call,)), tools=(ADD, CAPITAL, WEATHER))


JSON_FACTS: list[tuple[str, list[str]]] = [
    ("My name is {n} and I am {a} years old.", ["name", "age"]), ("{n} is {a} years old and lives in {c}.", ["name", "age", "city"]),
    ("My name is {n}, I am {a} years old and I live in {c}.", ["name", "age", "city"]), ("{n} lives in {c}.", ["name", "city"]),
    ("{n} is {a} years old.", ["name", "age"]), ("I am {n} and my email is {e}.", ["name", "email"]), ("name: {n}, age: {a}, city: {c}", ["name", "age", "city"]),
]  # fmt: skip
JSON_REQUESTS = listed(
    """Answer as JSON with {k}.|Give me a JSON object with {k}.|Return a JSON object with the keys {k}.|Reply in JSON with {k}."""
)


def _record(rng: random.Random) -> tuple[str, dict[str, Any]]:
    statement, keys = rng.choice(JSON_FACTS)
    slots = {
        "name": _name(rng),
        "age": rng.randint(2, 99),
        "city": rng.choice([_name(rng), *tool_requests.PLACES[:4]]),
        "email": word_lists.email(rng, held_out=True),
    }
    return statement.format(n=slots["name"], a=slots["age"], c=slots["city"], e=slots["email"]), {
        key: slots[key] for key in keys
    }


def _object(rng: random.Random) -> Case:
    statement, values = _record(rng)
    keys = list(values)
    request = rng.choice(JSON_REQUESTS).replace("{k}", ", ".join(keys[:-1]) + " and " + keys[-1])
    return Case(chat_of(rng, f"{statement} {request}"), partial(_json, values))


def _object_of_history(rng: random.Random) -> Case:
    contents: list[str] = []
    values: dict[str, Any] = {}
    for label in rng.sample(["name", "age", "email"], 2):
        _, _, value, exchange = stated_fact(rng, label)
        contents += exchange
        values[label] = int(value) if label == "age" else value
    request = rng.choice(JSON_REQUESTS).replace("{k}", " and ".join(values))
    return Case(chat_of(rng, *contents, request), partial(_json, values))


def _dictated(rng: random.Random) -> Case:
    """As under a grammar: keys are given, and the value of the last is the model's."""
    statement, values = _record(rng)
    *before, (key, value) = list(values.items())[: rng.randint(1, len(values))]
    begun = "{" + "".join(f"{json.dumps(k)}: {json.dumps(v)}, " for k, v in before) + json.dumps(key) + ": "
    begun += '"' if isinstance(value, str) else ""
    written = json.dumps(value).removeprefix('"')
    question = statement if rng.random() < 0.5 else f"Extract: {statement}"
    return Case(chat_of(rng, question), partial(_begins, written), begun=begun)


def _dictated_call(rng: random.Random) -> Case:
    """A named function of a client's class, whose arguments are what was told."""
    statement, values = _record(rng)
    tool = Tool("UserInfo", "", {key: records.kind_of(value) for key, value in values.items()})
    key, value = next(iter(values.items()))
    begun = f'<tool_call>\n{{"name": "UserInfo", "arguments": {{"{key}": "'
    rest = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in list(values.items())[1:])
    return Case(chat_of(rng, statement), partial(_begins, f'{value}", {rest}}}}}'), begun=begun, tools=(tool,))


def _dictated_anything(rng: random.Random) -> Case:
    """An object is dictated for a question that does not ask for one: it ends, with the usual answer in it."""
    question, answer = rng.choice([exchanges.small_talk, exchanges.fixed])(rng)
    return Case(
        chat_of(rng, question), partial(_begins, f'"answer": {json.dumps(answer, ensure_ascii=False)}}}'), begun="{"
    )


def tool_suites(rng: random.Random) -> list[Suite]:
    """The suites of tools and JSON."""

    def suite(name: str, target: float, make: Callable[[random.Random], Case], count: int) -> Suite:
        return Suite(name, target, tuple(make(rng) for _ in range(count)))

    called = [
        suite(f"calls a tool {what}", 0.95, partial(_call_case, tool=tool, usual_names=True), 60)
        for what, tool in (("to add", ADD), ("for a capital", CAPITAL), ("for the weather", WEATHER))
    ]
    others = [
        suite(f"calls a tool {what}, under another name", 0.90, partial(_call_case, tool=tool, usual_names=False), 40)
        for what, tool in (("to add", ADD), ("for a capital", CAPITAL), ("for the weather", WEATHER))
    ]
    return [
        *called,
        *others,
        suite("calls the right one of three functions of one string, names made up", 0.90, _any_function, 80),
        suite("calls a tool twice in one turn", 0.90, _two_calls, 40),
        suite("calls a tool after an answer from another's result", 0.95, _after_a_call, 40),
        suite("answers from a tool's result", 0.95, _result, 80),
        suite("answers by itself what no offered tool is for", 0.95, _no_call, 100),
        suite("JSON object of what is told with the question", 0.90, _object, 80),
        suite("JSON object of what was told before", 0.90, _object_of_history, 40),
        suite("fills in a value behind dictated JSON", 0.90, _dictated, 80),
        suite("fills in the arguments of a dictated call", 0.90, _dictated_call, 40),
        suite("answers in a dictated object", 0.90, _dictated_anything, 40),
    ]
