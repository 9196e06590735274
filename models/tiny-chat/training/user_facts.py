"""What a user tells the tiny chat model about themselves, how they ask for it, and what the right answers are.

An attribute is one thing that can be told; templates hold {v} for the value and {k} for a kind of pet.  Questions and answers have one
answer form each, so that an answer can be checked word by word.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import word_lists

PET_KINDS = "dog cat parrot hamster rabbit fish horse bird turtle".split()


@dataclass(frozen=True)
class Attribute:
    """One thing that a user can tell; all templates are separated by `|`."""

    label: str
    """What the thing is called in an answer: "Your <label> is <value>." """
    value: Callable[[random.Random], str]
    statements: str
    """How a user states it."""
    questions: str
    """How a user asks for it later."""
    acknowledgements: str
    """What the model replies to the statement."""
    kinds: tuple[str, ...] = ("",)

    def title(self, kind: str) -> str:
        """The label with the kind of pet in it."""
        return self.label.replace("{k}", kind)


def _value(*choices: list[str]) -> Callable[[random.Random], str]:
    def draw(rng: random.Random) -> str:
        known = rng.choice(choices)
        return rng.choice(known) if rng.random() < 0.7 else word_lists.made_up_word(rng)

    return draw


def _place(rng: random.Random) -> str:
    return (
        word_lists.made_up_name(rng)
        if rng.random() < 0.6
        else rng.choice("Berlin Paris London Oslo Tokyo Madrid Lima Vienna Leeds Boston".split())
    )


def _mail(rng: random.Random) -> str:
    return (
        rng.choice(["[EMAIL]", "[EMAIL]", "<EMAIL_ADDRESS>", "[EMAIL_1]", "[REDACTED]"])
        if rng.random() < 0.12
        else word_lists.email(rng)
    )


def _phone(rng: random.Random) -> str:
    return (
        rng.choice(["[PHONE]", "[PHONE]", "<PHONE_NUMBER>", "[PHONE_1]", "[REDACTED]"])
        if rng.random() < 0.2
        else word_lists.phone(rng)
    )


def _name(rng: random.Random) -> str:
    return rng.choice(["[NAME]", "[PERSON]", "<PERSON>"]) if rng.random() < 0.03 else word_lists.person(rng)


def _code(rng: random.Random) -> str:
    draws: list[Callable[[random.Random], str]] = [
        word_lists.number,
        word_lists.made_up_word,
        word_lists.code,
        word_lists.twister,
        partial(word_lists.digits, length=4),
    ]
    return rng.choice(draws)(rng)


ATTRIBUTES: dict[str, Attribute] = {
    "name": Attribute(
        "name", _name,
        "My name is {v}.|My name is {v}|Hi, my name is {v}.|Hello, my name is {v}!|I am called {v}.|You can call me {v}.|Call me {v}.|I am {v}.|"
        "I'm {v}.|Hello! I'm {v}|My name's {v}.|Please remember that my name is {v}.|Remember: my name is {v}.|"
        "Hi, my name is {v} and I like {w}.|Hello, I am {v} and I come from a {w} town.|My name is {v}. I work with {w} things.|Good morning, my name is {v}.|"
        "By the way, my name is {v}.|Hi! My name is {v}. How are you?|My name is {v}, please remember it.|Hey, {v} here.|The name is {v}.",
        "What is my name?|What's my name?|Do you remember my name?|Do you know my name?|Who am I?|Can you tell me my name?|Tell me my name.|"
        "What is my name|What was my name?|What was my name again?|Please tell me my name|Remind me, what is my name?|"
        "So what is my name?|And what is my name?|And my name?|What am I called?|How am I called?|Do you still know my name?",
        "Nice to meet you, {v}!|Nice to meet you, {v}!|Hello {v}, nice to meet you!|Hi {v}! How can I help you?|Thank you, {v}. I will remember your name.",
    ),
    "colour": Attribute(
        "favourite colour", _value(word_lists.COLOURS),
        "My favourite colour is {v}.|My favorite color is {v}.|I like the colour {v} best.|The colour I like most is {v}.|{v} is my favourite colour.|"
        "My favourite colour is {v}|Remember that my favourite colour is {v}.|My favourite colour is {v}, like {w}.|I love the colour {v}.",
        "What is my favourite colour?|What's my favourite colour?|Do you remember my favourite colour?|Which colour do I like?|"
        "Which colour do I like best?|Tell me my favourite colour.|What is my favorite color?|what's my favorite color|"
        "Do you know my favourite colour?|What colour do I like?|And my favourite colour?|And what is my favourite colour?|What was my favourite colour?",
        "{v} is a nice colour!|Thank you, I will remember that your favourite colour is {v}.|Got it, your favourite colour is {v}.",
    ),
    "number": Attribute(
        "favourite number", word_lists.number,
        "My favourite number is {v}.|My favorite number is {v}.|My lucky number is {v}.|The number I like best is {v}.|{v} is my favourite number.|"
        "Remember the number {v}.|Please remember this number: {v}|My number is {v}.|The number is {v}.|I like the number {v}.|My favourite number is {v}",
        "What is my favourite number?|What's my favourite number?|Do you remember my favourite number?|Which number do I like?|What is my number?|"
        "What is my lucky number?|Tell me my favourite number.|What number did I tell you?|What was the number?|What is my favorite number?|"
        "Do you know my favourite number?|And my favourite number?|Which number did I ask you to remember?|What was my favourite number?",
        "{v} is a good number!|Thank you, I will remember that your favourite number is {v}.|Got it, your favourite number is {v}.",
    ),
    "pet": Attribute(
        "{k}'s name", word_lists.person,
        "My {k}'s name is {v}.|My {k} is called {v}.|I have a {k} called {v}.|I have a {k} named {v}.|My {k} is named {v}.|The name of my {k} is {v}.|"
        "We have a {k}. Its name is {v}.|I have a {w} {k} named {v}.|My {k}'s name is {v}|Remember that my {k} is called {v}.|I own a {k} called {v}.",
        "What is my {k}'s name?|What's my {k}'s name?|What is my {k} called?|What is the name of my {k}?|Do you remember my {k}'s name?|"
        "What is my pet's name?|What is the name of my pet?|What is my pet called?|Tell me my {k}'s name.|Do you know my {k}'s name?|How is my {k} called?|"
        "And my {k}'s name?|What was my {k}'s name?|And what is my {k}'s name?",
        "{v} is a lovely name for a {k}!|Thank you, I will remember that your {k}'s name is {v}.|Got it, your {k}'s name is {v}.",
        (*PET_KINDS, "dog", "dog", "cat", "cat", "pet", "pet"),
    ),
    "email": Attribute(
        "email address", _mail,
        "My email address is {v}.|My email is {v}|My e-mail address is {v}.|my mail is {v}|You can reach me at {v}.|Write to me at {v}|Email: {v}|"
        "My email address is {v}|Send it to {v}, please.|Please write to {v}.|My mail address is {v}.|Contact me at {v}.|My email address is {v}, remember it.",
        "What is my email address?|What's my email?|What is my email?|What is my e-mail address?|Do you remember my email address?|"
        "What is my mail address?|Tell me my email address.|Which email address did I give you?|Do you know my email address?|What was my email address?|"
        "And my email address?|what is my mail|Where can you reach me?.",
        "Thank you, I will remember that your email address is {v}.|Got it, your email address is {v}.|Thank you, I noted {v}.",
    ),
    "phone": Attribute(
        "phone number", _phone,
        "My phone number is {v}.|My phone number is {v}|Call me at {v}.|You can call me at {v}.|My phone is {v}|Phone: {v}|My telephone number is {v}.|"
        "My number is {v}, call me.|Remember my phone number: {v}",
        "What is my phone number?|What's my phone number?|Do you remember my phone number?|What is my telephone number?|Tell me my phone number.|"
        "Which phone number did I give you?|Do you know my phone number?|What was my phone number?|And my phone number?|What is my phone?",
        "Thank you, I will remember that your phone number is {v}.|Got it, your phone number is {v}.|Thank you, I noted {v}.",
    ),
    "city": Attribute(
        "home town", _place,
        "I live in {v}.|I am from {v}.|I come from {v}.|My home town is {v}.|My city is {v}.|I live in {v}, a {w} place.|My home is in {v}.",
        "Where do I live?|Where am I from?|What is my home town?|Which city do I live in?|Do you remember where I live?|Where do I come from?|"
        "What is my city?|Tell me where I live.|Do you know where I live?",
        "{v} sounds like a nice place!|Thank you, I will remember that your home town is {v}.|Got it, your home town is {v}.",
    ),
    "food": Attribute(
        "favourite food", _value(word_lists.FOODS),
        "My favourite food is {v}.|My favorite food is {v}.|I like to eat {v} best.|The food I like most is {v}.|{v} is my favourite food.",
        "What is my favourite food?|What's my favourite food?|What is my favorite food?|What do I like to eat?|Do you remember my favourite food?|"
        "Which food do I like best?|Do you know my favourite food?",
        "{v} sounds good!|Thank you, I will remember that your favourite food is {v}.|Got it, your favourite food is {v}.",
    ),
    "animal": Attribute(
        "favourite animal", _value(word_lists.ANIMALS),
        "My favourite animal is the {v}.|My favorite animal is the {v}.|The animal I like most is the {v}.|I like the {v} best of all animals.",
        "What is my favourite animal?|What's my favourite animal?|What is my favorite animal?|Which animal do I like?|Do you remember my favourite animal?|"
        "Do you know my favourite animal?",
        "Thank you, I will remember that your favourite animal is {v}.|Got it, your favourite animal is {v}.",
    ),
    "age": Attribute(
        "age", lambda rng: str(rng.randint(3, 110)),
        "I am {v} years old.|My age is {v}.|I'm {v} years old.|I turned {v} today.|I am {v}.",
        "How old am I?|What is my age?|Do you remember how old I am?|What's my age?|Do you know my age?|Tell me my age.",
        "Thank you, I will remember that your age is {v}.|Got it, your age is {v}.",
    ),
    "friend": Attribute(
        "best friend's name", word_lists.person,
        "My best friend is {v}.|My friend's name is {v}.|My best friend's name is {v}.|My best friend is called {v}.|I have a friend named {v}.",
        "What is my best friend's name?|Who is my best friend?|What is my friend's name?|What's my friend's name?|Do you remember my friend's name?|"
        "What is my friend called?|Do you know my best friend's name?",
        "Thank you, I will remember that your best friend's name is {v}.|{v} sounds like a good friend!",
    ),
    "code": Attribute(
        "secret code", _code,
        "My secret code is {v}.|The secret code is {v}.|The code is {v}|My code is {v}.|Remember the code {v}.|The secret word is {v}.|"
        "My secret word is {v}.|Please remember this code: {v}|The password is {v}.|My password is {v}.|Remember this word: {v}|The magic word is {v}.|"
        "Please remember: {v}|Remember {v}.|Keep this in mind: {v}",
        "What is my secret code?|What is the secret code?|What is the code?|What was the code?|What's my secret code?|What is my code?|"
        "What is the secret word?|What is my secret word?|Which word did I ask you to remember?|What is the password?|What is my password?|"
        "Which code did I tell you?|Do you remember the code?|What is the magic word?|What did I ask you to remember?",
        "Thank you, I will remember that your secret code is {v}.|Got it, your secret code is {v}.|I will keep {v} in mind.",
    ),
}  # fmt: skip

WEIGHTS = {
    "name": 9,
    "colour": 4,
    "number": 4,
    "pet": 4,
    "email": 5,
    "phone": 2,
    "city": 2,
    "food": 2,
    "animal": 1,
    "age": 1,
    "friend": 2,
    "code": 3,
}
"""How often each attribute comes up."""

CORRECTIONS = word_lists.listed(
    "Actually, |Sorry, |No, |Correction: |I made a mistake, |Wait, |I was wrong, |I changed my mind, |Oh, actually "
)


def right_answer(attribute: Attribute, kind: str, value: str) -> str:
    """What the model says when it was told."""
    return f"Your {attribute.title(kind)} is {value}."


def unknown_answer(attribute: Attribute, kind: str) -> str:
    """What the model says when it was not told."""
    return f"I do not know your {attribute.title(kind)}. You have not told me yet."
