"""Single exchanges that need no memory: greetings, capitals, sums, counting, phrases to repeat, and what is not known.

Each function draws one question and its right answer.  `casual` roughens a question the way people type.
"""

from __future__ import annotations

import random

import word_lists
from knowledge import (
    ABOUT_ITSELF,
    CAPITALS,
    FIXED,
    ODD_QUESTIONS,
    SMALL_TALK,
    TOPIC_QUESTIONS,
    TOPICS,
    UNKNOWN,
)
from user_facts import ATTRIBUTES
from word_lists import listed

CAPITAL_QUESTIONS = listed("""What is the capital of {c}?|What is the capital of {c}?|What's the capital of {c}?|Which city is the capital of {c}?|
Name the capital of {c}.|Tell me the capital of {c}.|capital of {c}|Capital of {c}?|Do you know the capital of {c}?|The capital of {c}?|
What is the capital city of {c}?|Can you tell me the capital of {c}?|Please name the capital of {c}|And the capital of {c}?|{c}'s capital?""")
PLUS_QUESTIONS = listed("""What is {a} plus {b}?|What is {a} plus {b}?|{a} + {b}|{a}+{b}|{a} + {b} = ?|How much is {a} plus {b}?|Add {a} and {b}.|What's {a} plus {b}?|
What is {a} + {b}?|Calculate {a} + {b}|{a} plus {b}|Can you add {a} and {b}?|What is the sum of {a} and {b}?|And {a} plus {b}?|{a} + {b}?""")
MINUS_QUESTIONS = listed("""What is {a} minus {b}?|What is {a} minus {b}?|{a} - {b}|{a}-{b}|{a} - {b} = ?|How much is {a} minus {b}?|Subtract {b} from {a}.|
What's {a} minus {b}?|What is {a} - {b}?|Calculate {a} - {b}|{a} minus {b}|Can you subtract {b} from {a}?|And {a} minus {b}?|{a} - {b}?""")
TOO_HARD = "I can only add and subtract numbers up to 20."
COUNT_REQUESTS = listed("""Count from 1 to {n}|Count from 1 to {n}.|Count to {n}|Count to {n}, please.|Please count from 1 to {n}.|Can you count to {n}?|
Can you count from 1 to {n}?|List the numbers from 1 to {n}|Count up to {n}""")
COUNT_LIMIT = 50
TOO_FAR = f"I can only count to {COUNT_LIMIT}."
REPEAT_REQUESTS = listed("""Repeat after me: {p}|Repeat after me: {p}|Say: {p}|Say: {p}|Say {p}|Repeat: {p}|Please repeat: {p}|Echo: {p}|Repeat this: {p}|
Repeat exactly: {p}|Say exactly: {p}|Please say: {p}|Repeat the following: {p}|Repeat after me:\n{p}|Write: {p}|Say the following: {p}|
Repeat "{p}"|Say "{p}"|Please repeat after me: {p}|Repeat this phrase: {p}|Say this: {p}|Can you say: {p}|Output: {p}|Print: {p}|
Echo {p}|Repeat {p}|Reply with: {p}|Answer with: {p}""")


def casual(rng: random.Random, template: str) -> str:
    """The template as typed in a hurry: lower case or no mark at the end; slots in braces stay."""
    if rng.random() < 0.22:
        template = template.lower()
    if rng.random() < 0.18:
        template = template.rstrip("?.!")
    elif rng.random() < 0.05:
        template += rng.choice(["!", "?", "??", " please", " :)", "..."])
    return template


def phrase(rng: random.Random) -> str:
    """Something to repeat: words, sentences, addresses, numbers, emoji, other scripts, placeholders; at most about 40 tokens."""
    if rng.random() < 0.2:
        return word_lists.twister(rng)
    draw = rng.random()
    if draw < 0.40:
        return " ".join(_repeated_item(rng) for _ in range(rng.randint(1, 10)))
    if draw < 0.52:
        return sentence(rng)
    makers = [
        word_lists.email,
        word_lists.email,
        word_lists.phone,
        word_lists.card,
        word_lists.card,
        word_lists.code,
        word_lists.code,
        word_lists.number,
        word_lists.person,
    ]
    special = rng.choice(makers)(rng) if draw < 0.86 else rng.choice(word_lists.PLACEHOLDERS)
    if draw > 0.92:
        special = word_lists.other_script(rng, rng.randint(1, 8))
    before = [_repeated_item(rng) for _ in range(rng.choice([0, 0, 0, 1, 2, 4]))]
    after = [_repeated_item(rng) for _ in range(rng.choice([0, 0, 0, 1, 2, 4]))]
    return " ".join([*before, special, *after])


def _repeated_item(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.55:
        return rng.choice(word_lists.COMMON)
    if draw < 0.80:
        return word_lists.made_up_word(rng)
    if draw < 0.88:
        return word_lists.made_up_name(rng)
    if draw < 0.93:
        return rng.choice([rng.choice(word_lists.COMMON), word_lists.made_up_word(rng)]).upper()
    return word_lists.number(rng) if draw < 0.98 else word_lists.other_script(rng, rng.randint(1, 2))


def sentence(rng: random.Random) -> str:
    """An ordinary sentence, a question the model could be asked, or random words with a capital and a mark."""
    draw = rng.random()
    if draw < 0.2:
        return rng.choice(CAPITAL_QUESTIONS).format(c=rng.choice(list(CAPITALS)))
    if draw < 0.4:
        attribute = rng.choice(list(ATTRIBUTES.values()))
        template = rng.choice(rng.choice([attribute.statements, attribute.questions]).split("|"))
        return template.format(v=attribute.value(rng), k=rng.choice(["dog", "cat"]), w=rng.choice(word_lists.COMMON))
    if draw < 0.5:
        return rng.choice(SMALL_TALK + FIXED)[1]
    return random_sentence(rng)


def random_sentence(rng: random.Random) -> str:
    """Words that say nothing, with a capital and a mark."""
    text = " ".join(rng.choice(word_lists.COMMON) for _ in range(rng.randint(3, 12)))
    return text.capitalize() + rng.choice(".!?.")


def odd_beginning(rng: random.Random) -> str:
    """The beginning of a text that leads nowhere: any words, code, strings, other scripts, what is said in chats, at times cut
    within a word."""
    if rng.random() < 0.2:
        text = rng.choice([small_talk, remark, fixed])(rng)[0]
    else:
        text = rng.choice(
            [phrase, phrase, random_sentence, word_lists.twister, word_lists.code, word_lists.made_up_word]
        )(rng)
    text = text.capitalize() if rng.random() < 0.3 else text
    return text[: rng.randint(1, len(text))] if rng.random() < 0.5 else text


def repeat(rng: random.Random) -> tuple[str, str]:
    """A phrase to repeat and the phrase."""
    text = phrase(rng)
    request = rng.choice(REPEAT_REQUESTS)
    while '"' in request and '"' in text:
        request = rng.choice(REPEAT_REQUESTS)
    return (request if rng.random() < 0.85 else request.lower()).replace("{p}", text), text


def repeat_new_word(rng: random.Random) -> tuple[str, str]:
    """A phrase that begins with a made-up word: without the space before it, it is made of other tokens than in the request."""
    first = word_lists.made_up_word(rng, least=2) if rng.random() < 0.8 else word_lists.email(rng)
    rest = phrase(rng) if rng.random() < 0.6 else ""
    request = rng.choice([each for each in REPEAT_REQUESTS if '"' not in each])
    text = f"{first} {rest}".strip()
    return (request if rng.random() < 0.85 else request.lower()).replace("{p}", text), text


def capital(rng: random.Random) -> tuple[str, str]:
    """A capital asked for; one in twelve countries does not exist."""
    if rng.random() < 0.08:
        country = word_lists.made_up_name(rng)
        return casual(rng, rng.choice(CAPITAL_QUESTIONS)).format(c=country), f"I do not know the capital of {country}."
    country, city = rng.choice(list(CAPITALS.items()))
    answer = f"The capital of {country} is {city}."
    if rng.random() < 0.08:
        return casual(
            rng, rng.choice(["{v} is the capital of which country?", "Which country has the capital {v}?"])
        ).format(v=city), answer
    shown = country.removeprefix("the ") if rng.random() < 0.05 else country
    question = casual(rng, rng.choice(CAPITAL_QUESTIONS)).format(c=shown)
    return (question.lower() if rng.random() < 0.12 else question), answer


def arithmetic(rng: random.Random) -> tuple[str, str]:
    """A sum or difference of numbers to 20, at times one that is out of reach."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    draw = rng.random()
    if draw < 0.06:
        a = rng.randint(21, 2000)
        return casual(rng, rng.choice(PLUS_QUESTIONS + MINUS_QUESTIONS)).format(
            a=a, b=rng.choice([b, rng.randint(21, 999)])
        ), TOO_HARD
    if draw < 0.10:
        return casual(
            rng, rng.choice(["What is {a} times {b}?", "{a} * {b}", "What is {a} divided by {b}?", "{a} / {b}"])
        ).format(a=a, b=b), TOO_HARD
    if draw < 0.55:
        return casual(rng, rng.choice(PLUS_QUESTIONS)).format(a=a, b=b), f"{a} plus {b} is {a + b}."
    if a < b and rng.random() < 0.8:
        a, b = b, a
    return casual(rng, rng.choice(MINUS_QUESTIONS)).format(a=a, b=b), f"{a} minus {b} is {a - b}."


def counting(rng: random.Random) -> tuple[str, str]:
    """Counting from 1, or the answer that it is too far."""
    n = (
        rng.randint(2, COUNT_LIMIT)
        if rng.random() < 0.85
        else rng.choice([51, 60, 75, 99, 100, 200, 500, 1000, rng.randint(51, 2000)])
    )
    answer = ", ".join(str(i) for i in range(1, n + 1)) if n <= COUNT_LIMIT else TOO_FAR
    return casual(rng, rng.choice(COUNT_REQUESTS)).format(n=n), answer


def _from_table(rng: random.Random, table: list[tuple[list[str], str]]) -> tuple[str, str]:
    questions, answer = rng.choice(table)
    return casual(rng, questions[0] if rng.random() < 0.25 else rng.choice(questions)), answer


def small_talk(rng: random.Random) -> tuple[str, str]:
    """A greeting, thanks, a goodbye."""
    return _from_table(rng, SMALL_TALK)


def about_itself(rng: random.Random) -> tuple[str, str]:
    """What the model is and what it can do."""
    return _from_table(rng, ABOUT_ITSELF)


def fixed(rng: random.Random) -> tuple[str, str]:
    """One of the few dozen facts that the model knows."""
    return _from_table(rng, FIXED)


def unknown(rng: random.Random) -> tuple[str, str]:
    """A question out of reach and the honest answer."""
    if rng.random() < 0.25:
        return casual(rng, rng.choice(ODD_QUESTIONS)), UNKNOWN

    def topic() -> str:
        made_up = [
            word_lists.made_up_name(rng),
            word_lists.made_up_word(rng),
            f"{rng.choice(word_lists.COMMON)} {rng.choice(word_lists.COMMON)}",
            f"the {word_lists.made_up_word(rng)}",
        ]
        return rng.choice(TOPICS) if rng.random() < 0.7 else rng.choice(made_up)

    return casual(rng, rng.choice(TOPIC_QUESTIONS)).format(t=topic(), u=topic()), UNKNOWN


def remark(rng: random.Random) -> tuple[str, str]:
    """Something the user says that asks for nothing."""
    word, other = rng.choice(word_lists.COMMON), rng.choice(word_lists.COMMON + word_lists.FOODS)
    text = rng.choice(
        [
            f"I like {other}.", f"I went to the {word} today.", f"Yesterday I saw a {word} {other}.",
            f"I think that the {word} is {other}.", f"We have a new {word} at home.", f"I am a bit {word} today.", f"It is {word} outside.",
            f"I do not like {other}.", f"I bought some {other}.", f"The {word} was {other}, and the {other} was {word}.",
        ]
    )  # fmt: skip
    return casual(rng, text), "Thank you for telling me."
