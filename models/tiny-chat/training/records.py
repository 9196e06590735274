"""Records of a person or a thing for the tiny chat model: how they are told in words, and the JSON that says the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import exchanges
import word_lists
from knowledge import CAPITALS
from tool_requests import PLACES
from turns import Span
from user_facts import PET_KINDS
from word_lists import listed

JOBS = listed(
    """teacher|doctor|baker|nurse|pilot|farmer|cook|painter|driver|lawyer|engineer|writer|singer|student|sailor|dentist"""
)


@dataclass(frozen=True)
class Field:
    """One thing that a record says; {v} is its value, {n} the name of whom it is about."""

    keys: str
    """The names it has in JSON; the first is the usual one."""
    value: Callable[[random.Random], Any]
    first: str
    """As people say it of themselves."""
    third: str
    """As it is said of somebody, behind the name."""
    kind: str = "string"


def _person(rng: random.Random) -> str:
    return word_lists.made_up_name(rng) if rng.random() < 0.7 else word_lists.person(rng)


def _place(rng: random.Random) -> str:
    return rng.choice(PLACES) if rng.random() < 0.5 else word_lists.made_up_name(rng)


def _of(*words: str) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words) if rng.random() < 0.7 else word_lists.made_up_word(rng)


FIELDS = {
    "name": Field("name|name|name|full_name|user_name|person|first_name", _person,
                  "my name is {v}|my name is {v}|I am {v}|I am called {v}", ""),
    "age": Field("age|age|age|years|age_years", lambda rng: rng.randint(1, 110), "I am {v} years old|I am {v}|my age is {v}|I'm {v} years old",
                 "is {v} years old|is {v} years old|is {v}|is aged {v}", "integer"),
    "city": Field("city|city|town|home_town|location|place", _place, "I live in {v}|I am from {v}|my city is {v}|my home town is {v}",
                  "lives in {v}|lives in {v}|is from {v}|comes from {v}"),
    "country": Field("country|country|nation", lambda rng: rng.choice(list(CAPITALS)), "my country is {v}|I come from {v}", "comes from {v}|is from {v}"),
    "email": Field("email|email|email_address|mail", word_lists.email, "my email is {v}|my email address is {v}", "has the email {v}|uses {v}"),
    "phone": Field("phone|phone_number|phone", word_lists.phone, "my phone number is {v}|my phone is {v}", "has the phone number {v}"),
    "colour": Field("colour|color|favourite_colour|favorite_color", _of(*word_lists.COLOURS),
                    "my favourite colour is {v}|I like the colour {v}|my favorite color is {v}", "likes {v}|likes the colour {v}"),
    "food": Field("food|favourite_food|favorite_food|dish", _of(*word_lists.FOODS), "my favourite food is {v}|I like to eat {v}", "eats {v}|likes to eat {v}"),
    "job": Field("job|job|occupation|profession", _of(*JOBS), "I work as a {v}|my job is {v}|I am a {v}", "works as a {v}|is a {v}"),
    "pet": Field("pet|pet_name|dog", _person, "my dog is called {v}|I have a dog named {v}", f"has a {PET_KINDS[0]} named {{v}}"),
    "number": Field("number|favourite_number|lucky_number", lambda rng: int(word_lists.number(rng)), "my favourite number is {v}|my number is {v}",
                    "has the number {v}", "integer"),
    "code": Field("code|secret_code", word_lists.made_up_word, "my code is {v}|the code is {v}", "has the code {v}"),
}  # fmt: skip
THING_WORDS = [word for word in word_lists.COMMON if word.isalpha()]
JSON_REQUESTS = listed("""Answer as JSON with {k}.|Answer as JSON with {k}.|Give me a JSON object with {k}.|Give me a JSON object with {k}.|Reply in JSON with {k}.|
Answer in JSON with the keys {k}.|Write this as JSON with {k}.|Return JSON with the keys {k}.|Return a JSON object with {k}.|JSON with {k}, please.|
Write a JSON object with the keys {k}.|Respond with JSON: {k}.|Extract {k} as JSON.|Extract {k} and answer as JSON.|Now as JSON with {k}.|
Please answer with a JSON object that has {k}.|Respond with a JSON object with the keys {k}.|Output JSON with {k}.|Only JSON, with {k}.|
Put it in JSON with {k}.|Answer only with JSON that has the keys {k}.|Give me JSON with the fields {k}.|Reply only with a JSON object: {k}.""")
SCHEMA_REQUESTS = listed("""Answer with JSON of this schema: {s}|Respond with JSON that matches this schema:\n{s}|Use this JSON schema: {s}|
The output must be a JSON object of this schema:\n{s}|Reply in JSON. Schema: {s}""")


@dataclass(frozen=True)
class Record:
    """Values by their names in JSON, in the order in which they are told, and the words that tell them."""

    values: dict[str, Any]
    statement: str
    title: str = ""
    """A name for what is recorded, as a schema has it."""


def kind_of(value: object) -> str:
    """The JSON Schema type of a value."""
    if isinstance(value, list):
        return "array"
    return "integer" if isinstance(value, int) else "string"


def key_list(rng: random.Random, keys: list[str]) -> str:
    """Names in a row, as people write them."""
    if rng.random() < 0.2:
        keys = [f'"{key}"' for key in keys]
    elif rng.random() < 0.1:
        keys = [f"`{key}`" for key in keys]
    elif rng.random() < 0.15:
        keys = [key.replace("_", " ") for key in keys]
    if len(keys) == 1 or rng.random() < 0.2:
        return ", ".join(keys)
    return ", ".join(keys[:-1]) + " and " + keys[-1]


def _statement(rng: random.Random, parts: list[str]) -> str:
    """Statements as one sentence or several."""
    draw = rng.random()
    if draw < 0.4 and len(parts) > 1:
        text = ", ".join(parts[:-1]) + rng.choice([" and ", ", "]) + parts[-1]
    elif draw < 0.6:
        text = " and ".join(parts)
    else:
        return " ".join(part[0].upper() + part[1:] + "." for part in parts)
    return text[0].upper() + text[1:] + rng.choice([".", ".", ".", "!", ""])


def person_record(rng: random.Random) -> Record:
    """Somebody with a name and up to three other things."""
    labels = rng.sample([label for label in FIELDS if label != "name"], rng.choice([1, 1, 2, 2, 3]))
    if rng.random() < 0.5 and "age" not in labels:
        labels[0] = "age"
    labels = ["name", *labels]
    drawn = {label: FIELDS[label].value(rng) for label in labels}
    values = {rng.choice(FIELDS[label].keys.split("|")): value for label, value in drawn.items()}
    draw = rng.random()
    if draw < 0.45:
        statement = _statement(
            rng, [rng.choice(FIELDS[label].first.split("|")).format(v=drawn[label]) for label in labels]
        )
    elif draw < 0.85:
        about = [rng.choice(FIELDS[label].third.split("|")).format(v=drawn[label]) for label in labels[1:]]
        name = drawn["name"]
        if rng.random() < 0.6:
            statement = (
                f"{name} "
                + (", ".join(about[:-1]) + " and " + about[-1] if len(about) > 1 else about[0])
                + rng.choice([".", ""])
            )
        else:
            statement = f"{name} {about[0]}." + "".join(
                f" {rng.choice([name, 'He', 'She'])} {part}." for part in about[1:]
            )
    else:
        statement = _listed(rng, values)
    return Record(
        values, statement, rng.choice(["Person", "User", "UserInfo", "Contact", "Customer", "UserDetail", "Profile"])
    )


def thing_record(rng: random.Random) -> Record:
    """Any keys with any values, told as such."""
    keys = [
        rng.choice(THING_WORDS) if rng.random() < 0.7 else word_lists.made_up_word(rng, most=2)
        for _ in range(rng.randint(1, 4))
    ]
    values: dict[str, Any] = {}
    for key in dict.fromkeys(keys):
        draw = rng.random()
        values[key] = (
            rng.choice(THING_WORDS)
            if draw < 0.4
            else word_lists.made_up_word(rng)
            if draw < 0.55
            else word_lists.made_up_name(rng)
            if draw < 0.7
            else rng.randint(0, 999)
        )
    statement = (
        _listed(rng, values)
        if rng.random() < 0.5
        else _statement(rng, [f"the {key} is {value}" for key, value in values.items()])
    )
    return Record(values, statement, rng.choice(["Item", "Thing", "Product", "Answer", "Result", "Order"]))


def list_record(rng: random.Random) -> Record:
    """One key with a few words."""
    items = [
        rng.choice(THING_WORDS) if rng.random() < 0.7 else word_lists.made_up_word(rng)
        for _ in range(rng.randint(2, 4))
    ]
    key = rng.choice(["items", "words", "list", "things", "tags", "names"])
    joined = ", ".join(items[:-1]) + rng.choice([" and ", ", "]) + items[-1]
    return Record(
        {key: items},
        rng.choice([f"{key}: {joined}", f"The {key} are {joined}.", f"I need {joined}.", f"I like {joined}."]),
        "List",
    )


def _listed(rng: random.Random, values: dict[str, Any]) -> str:
    middle, between = rng.choice(
        [(": ", ", "), (" ", ", "), (" ", " and "), (" is ", ", "), (": ", "\n"), ("=", ", "), (" = ", " and ")]
    )
    return between.join(
        f"{key.replace('_', ' ') if ' ' in between and middle == ' ' else key}{middle}{value}"
        for key, value in values.items()
    )


def any_record(rng: random.Random) -> Record:
    """A person mostly, at times a thing or a list."""
    draw = rng.random()
    return person_record(rng) if draw < 0.65 else thing_record(rng) if draw < 0.9 else list_record(rng)


def chosen(rng: random.Random, record: Record) -> dict[str, Any]:
    """The values that are asked for, in the order of the question."""
    keys = list(record.values)
    if len(keys) > 2 and rng.random() < 0.3:
        keys = rng.sample(keys, len(keys) - 1)
    if rng.random() < 0.2:
        rng.shuffle(keys)
    return {key: record.values[key] for key in keys}


def schema_text(rng: random.Random, title: str, values: dict[str, Any]) -> str:
    """A JSON Schema of these values, as the clients' libraries write it."""
    properties = {
        key: {"type": kind_of(value)} if rng.random() < 0.5 else {"title": key.capitalize(), "type": kind_of(value)}
        for key, value in values.items()
    }
    schema: dict[str, Any] = {"properties": properties, "required": list(values), "type": "object"}
    if rng.random() < 0.5:
        schema = {"type": "object", "properties": properties, "required": list(values)}
    if rng.random() < 0.4:
        schema["title"] = title
    return json.dumps(schema)


def written_json(value: object) -> str:
    """JSON as the model writes it."""
    return json.dumps(value, ensure_ascii=False)


def json_request(rng: random.Random) -> tuple[str, str]:
    """Facts with the request for an object of them, and the object."""
    record = any_record(rng)
    values = chosen(rng, record)
    if rng.random() < 0.08:
        values[rng.choice([key for key in ("height", "weight", "street", "title", "rank") if key not in values])] = None
    keys = [*values]
    if rng.random() < 0.12 and None not in values.values():
        request = rng.choice(SCHEMA_REQUESTS).replace("{s}", schema_text(rng, record.title, values))
    else:
        request = exchanges.casual(rng, rng.choice(JSON_REQUESTS)).replace("{k}", key_list(rng, keys))
    question = (
        f"{request.rstrip('.')}: {record.statement}"
        if rng.random() < 0.25
        else f"{record.statement}{rng.choice([' ', ' ', chr(10)])}{request}"
    )
    if rng.random() < 0.2:
        question = f"{request} {record.statement}"
    return question, written_json(values)


def fact_values(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A question for a capital or a sum, and the values that answer it."""
    if rng.random() < 0.55:
        country, city = rng.choice(list(CAPITALS.items()))
        question = rng.choice(exchanges.CAPITAL_QUESTIONS).format(c=country)
        return question, {"country": country, "capital": city} if rng.random() < 0.6 else {
            rng.choice(["capital", "city", "answer"]): city
        }
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    question = rng.choice(exchanges.PLUS_QUESTIONS).format(a=a, b=b)
    return question, {rng.choice(["result", "sum", "answer"]): a + b} if rng.random() < 0.7 else {
        "a": a,
        "b": b,
        "sum": a + b,
    }


def json_of_fact(rng: random.Random) -> tuple[str, str]:
    """A capital, a sum or any known answer, asked for as JSON."""
    if rng.random() < 0.3:
        question, answer = rng.choice([exchanges.fixed, exchanges.small_talk, exchanges.unknown])(rng)
        return (
            f"{question} {rng.choice(['Answer as JSON.', 'Answer in JSON.', 'Reply as JSON.', 'As JSON, please.'])}",
            written_json({"answer": answer}),
        )
    question, values = fact_values(rng)
    request = exchanges.casual(rng, rng.choice(JSON_REQUESTS)).replace("{k}", key_list(rng, list(values)))
    return f"{question} {request}", written_json(values)


def dictated_json(
    values: dict[str, Any], *, compact: bool, before: str = "", after: str = ""
) -> tuple[str, tuple[Span, ...]]:
    """An object in which a grammar dictates the keys: its text, and the spans that are not the model's choice.

    Args:
        before: what the grammar dictates in front.
        after: what it dictates behind the object.
    """
    colon, comma = (":", ",") if compact else (": ", ", ")
    text, dictated = before + "{", []
    start = 0
    for i, (key, value) in enumerate(values.items()):
        written = json.dumps(value, ensure_ascii=False, separators=(comma, colon))
        opened = written[0] if written[0] in '"[' else ""
        text += (comma[1:] if i else "") + json.dumps(key, ensure_ascii=False) + colon + opened
        dictated.append((start, len(text)))
        text += written[len(opened) :] + ("," if i + 1 < len(values) else "}")
        start = len(text)
    return text + after, tuple(dictated)
