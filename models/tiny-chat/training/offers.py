"""Describe a tool that the tiny chat model may be offered, and what may be asked of it: names, arguments, results and what is said of these."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import word_lists
from turns import Tool

Value = str | int


@dataclass(frozen=True)
class Need:
    """What one user asks of a tool: the words, the arguments, what the tool returns and what the model makes of it."""

    question: str
    arguments: dict[str, Value]
    result: str
    answer: str


@dataclass(frozen=True)
class Offer:
    """A tool and what may be asked of it."""

    tool: Tool
    topic: str
    """What it is about; a list holds one tool of a topic, and questions about it need the tool."""
    make_need: Callable[[random.Random], Need]
    join: str = ""
    """How two questions become one: a template with the values {v} and {w}; empty if they do not."""


def function_name(rng: random.Random, *choices: str) -> str:
    """One of the usual names, or one with a word of no meaning in it."""
    name = rng.choice(choices)
    draw = rng.random()
    if draw < 0.12:
        name = f"{name}_{rng.choice([word_lists.made_up_word(rng, most=2), rng.choice(word_lists.COMMON), 'tool', 'v2', 'now'])}"
    elif draw < 0.2:
        name = f"{rng.choice([word_lists.made_up_word(rng, most=2), 'my', 'the', 'do'])}_{name}"
    elif draw < 0.27:
        first, *rest = name.split("_")
        name = first + "".join(part.capitalize() for part in rest)
    return name


def described(rng: random.Random, *choices: str) -> str:
    """A description, at times none."""
    text = rng.choice(choices) if rng.random() < 0.85 else ""
    return text.rstrip(".") if rng.random() < 0.2 else text


def is_sentence(result: str) -> bool:
    """Whether a result can be the answer as it is."""
    return result.endswith((".", "!"))


def wrapped(rng: random.Random, result: str, *keys: str) -> str:
    """A result as functions return it: often in an object with one key."""
    if rng.random() < 0.75:
        return result
    value = int(result) if result.isdecimal() else result
    return json.dumps({rng.choice(keys): value}, ensure_ascii=False)


def spoken(frame: str, result: str) -> str:
    """What the model says about a result: a sentence as it is, the values of an object by their names, else the frame with it."""
    if is_sentence(result):
        return result
    if result.startswith("Error"):
        return f"That did not work. {result}"
    if result.startswith("{"):
        values = json.loads(result)
        if len(values) == 1:
            return frame.replace("{r}", str(next(iter(values.values()))))
        return frame.replace("{r}", ", ".join(f"{key} {value}" for key, value in values.items()))
    return frame.replace("{r}", result)


def failing(rng: random.Random, result: str) -> str:
    """The result, or now and then an error."""
    if rng.random() > 0.05:
        return result
    return f"Error: {rng.choice(['timeout', 'not found', 'no connection', 'invalid ' + rng.choice(word_lists.COMMON), 'unknown ' + rng.choice(word_lists.COMMON)])}"


def text_value(rng: random.Random) -> str:
    """What a function of one string is asked for: a name, a word, a number, an address, two words."""
    draw = rng.random()
    if draw < 0.35:
        return word_lists.made_up_name(rng)
    if draw < 0.6:
        return word_lists.made_up_word(rng) if rng.random() < 0.5 else rng.choice(word_lists.COMMON)
    if draw < 0.75:
        return " ".join(
            rng.choice([rng.choice(word_lists.COMMON), word_lists.made_up_word(rng)]) for _ in range(rng.randint(2, 4))
        )
    makers = [word_lists.email, word_lists.code, word_lists.number, word_lists.person]
    return rng.choice(makers)(rng)


def renamed(rng: random.Random, offer: Offer) -> Offer:
    """The same tool under a name and parameters that nobody would guess: they have to be read."""

    def word() -> str:
        return rng.choice(
            [
                rng.choice(word_lists.COMMON),
                word_lists.made_up_word(rng, most=2),
                f"{rng.choice('abcdefgpqrstuvwxyz')}{rng.randint(1, 9)}",
            ]
        )

    names: dict[str, str] = {}
    for old in offer.tool.parameters:
        new = word() if rng.random() < 0.6 else f"{old}_{word()}" if rng.random() < 0.5 else f"{word()}_{old}"
        names[old] = new if new not in names.values() else f"{new}_{old}"
    draw = rng.random()
    name = offer.tool.name
    name = (
        name
        if draw < 0.3
        else f"{name}_{word()}"
        if draw < 0.6
        else f"{word()}_{name}"
        if draw < 0.9
        else f"{word()}_{name}_{word()}"
    )
    tool = Tool(name, offer.tool.description, {names[old]: kind for old, kind in offer.tool.parameters.items()})

    def make_need(rng: random.Random) -> Need:
        need = offer.make_need(rng)
        return replace(need, arguments={names[old]: value for old, value in need.arguments.items()})

    return replace(offer, tool=tool, make_need=make_need)
