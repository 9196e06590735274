"""Plain documents and stories for the tiny chat model, filled in from templates.

A story names its hero, thing and place once and keeps to them, has 60 to 200 tokens and an ending.  A document is a story or a short text
as a raw completion would continue it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import word_lists
from knowledge import CAPITALS, FIXED
from word_lists import listed

PLACES = listed(
    """forest|village|castle|garden|valley|harbour|mountain|desert|meadow|lighthouse|library|small town|island|farm|cave|river bank"""
)
THINGS = listed("""key|lamp|map|book|bell|stone|boat|coin|flute|letter|mirror|ring|seed|drum|kite|clock""")
QUALITIES = "small old brave quiet curious clever kind shy happy tired young gentle lonely friendly".split()
SHINE = "golden silver shiny broken heavy tiny strange blue red wooden magic forgotten".split()
OPENINGS = [
    "Once upon a time, a {q} {a} named {n} lived in a {p}.",
    "Once upon a time there was a {q} {a} called {n}, who lived near a {p}.",
    "Long ago, in a {p} far away, there lived a {q} {a} named {n}.",
    "There was once a {q} {a} whose name was {n}, and the {p} was its home.",
    "In a {p} by the sea lived {n}, a {q} {a}.",
    "One day a {q} {a} named {n} woke up in a {p}.",
]
FINDS = [
    "One morning {n} found a {s} {t} under a tree.",
    "One evening {n} saw a {s} {t} lying on the path.",
    "One day a friend gave {n} a {s} {t}.",
    "After the rain, {n} noticed a {s} {t} in the grass.",
]
WONDERS = [
    '"Who does this {t} belong to?" asked the {a}.',
    "Nobody knew where the {t} came from.",
    '"I will find the owner of the {t}," said {n}.',
    "The {a} had never seen such a {t} before.",
]
MEETS = [
    "So {n} took the {t} and walked all day, until the {a} met {m}, a {r} {b}.",
    "{n} carried the {t} across the hills and met a {r} {b} named {m}.",
    "On the way {n} met {m}, a {r} {b}, who was looking for something.",
    "At noon a {r} {b} named {m} came along and looked at the {t}.",
]
Name = Callable[[random.Random], str]
TALKS = [
    '"That is my {t}!" said the {b}. "I lost it when the wind was strong."',
    '"Please help me," said {m}. "I cannot find my way home without the {t}."',
    '"What a nice {t}," said {m}. "My grandmother had one just like it."',
    '"I know a secret about this {t}," said the {b}. "It only works for friends."',
]
DEEDS = [
    "{n} smiled and gave the {t} to {m}.",
    "Together they took the {t} back to the {p}.",
    "So {n} and {m} shared the {t} and played until the stars came out.",
    "They put the {t} on a high rock, and it began to shine.",
    "{n} was afraid at first, but {m} held the {t} and was not afraid at all.",
]
ENDS = [
    "From that day on, {n} and {m} were best friends.",
    "They laughed, ate some {f} and told stories all night. The end.",
    "And {n} was never lonely again.",
    "And so the {p} was a happy place for many years. The end.",
    "That night {n} slept well and dreamed of the {t}.",
]
STORY_REQUESTS = listed("""Tell me a story|Tell me a story.|Tell me a short story|Can you tell me a story?|Please tell me a story|I want to hear a story|Write a story|
Write a short story|Tell me another story|Tell a story|Do you know a story?|A story please|Make up a story|Tell me a bedtime story|
Write me a story|Story time!|Could you tell me a story, please?|Tell me a long story|Can you write a short story for me?""")
STORY_REQUESTS_ABOUT = listed("""Tell me a story about {x}|Write a story about {x}|Can you tell me a story about {x}?|Write a short story about {x}.|
Please tell me a story about {x}|Make up a story about {x}|I want a story about {x}""")


def _article(text: str) -> str:
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text


def story(rng: random.Random, animal: str | None = None, *, name: Name = word_lists.made_up_name) -> str:
    """A story of seven to nine sentences; `animal` is its hero where given, `name` makes the names."""
    hero = animal or rng.choice(word_lists.ANIMALS)
    slots = {
        "n": name(rng) if rng.random() < 0.7 else rng.choice(word_lists.FIRST_NAMES[:40]), "m": name(rng),
        "a": hero, "b": rng.choice([a for a in word_lists.ANIMALS if a != hero]), "p": rng.choice(PLACES), "t": rng.choice(THINGS),
        "q": rng.choice(QUALITIES), "r": rng.choice(QUALITIES), "s": rng.choice(SHINE), "f": rng.choice(word_lists.FOODS),
    }  # fmt: skip
    parts = [rng.choice(OPENINGS), rng.choice(FINDS), rng.choice(WONDERS), rng.choice(MEETS), rng.choice(TALKS)]
    parts += rng.sample(DEEDS, rng.randint(1, 2))
    parts.append(rng.choice(ENDS))
    return _article(" ".join(parts).format(**slots))


def story_turn(rng: random.Random) -> tuple[str, str]:
    """A request for a story and the story."""
    if rng.random() < 0.7:
        return rng.choice(STORY_REQUESTS), story(rng)
    animal = rng.choice(word_lists.ANIMALS)
    hero = rng.choice([f"a {animal}", f"a {rng.choice(QUALITIES)} {animal}"])
    return rng.choice(STORY_REQUESTS_ABOUT).format(x=_article(f" {hero}").strip()), story(rng, animal)


def _capital_lines(rng: random.Random, most: int = 5) -> str:
    lines = []
    for country in rng.sample(list(CAPITALS), rng.randint(1, most)):
        if rng.random() < 0.8:
            lines.append(f"The capital of {country} is {CAPITALS[country]}.")
        else:
            lines.append(f"{CAPITALS[country]} is the capital of {country}.")
    return " ".join(lines)


def _sums(rng: random.Random, most: int = 4) -> str:
    lines = []
    for _ in range(rng.randint(1, most)):
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        lines.append(
            rng.choice(
                [f"{a} plus {b} is {a + b}.", f"{max(a, b)} minus {min(a, b)} is {abs(a - b)}.", f"{a} + {b} = {a + b}"]
            )
        )
    return "\n".join(lines)


def _day(rng: random.Random, *, name: Name = word_lists.made_up_name) -> str:
    who = name(rng)
    food, colour, thing = rng.choice(word_lists.FOODS), rng.choice(word_lists.COLOURS), rng.choice(THINGS)
    lines = [
        f"Today {who} went to the market and bought some {food}.",
        f"The {colour} {thing} was still on the table.",
        f"In the afternoon it began to rain, so {who} stayed at home and read a book.",
        f"{who} likes {food} more than anything else.",
        f"The weather was {rng.choice(['cold', 'warm', 'fine', 'windy'])} and the streets were {rng.choice(['empty', 'full', 'quiet'])}.",
        f"Later a friend came and asked about the {thing}.",
        f"In the evening {who} cooked {food} and listened to music.",
    ]
    return " ".join(line for line in lines if rng.random() < 0.6) or lines[0]


def _letter(rng: random.Random, *, name: Name = word_lists.made_up_name) -> str:
    who, friend = name(rng), word_lists.person(rng) if name is word_lists.made_up_name else name(rng)
    middle = _day(rng, name=name).split(". ")[0].rstrip(".")
    return f"Dear {friend},\n\nthank you for your letter. {middle}. I hope to see you soon.\n\nBest wishes,\n{who}"


def _questions(rng: random.Random, most: int = 3) -> str:
    pairs = [(rng.choice(questions), answer) for questions, answer in rng.sample(FIXED, rng.randint(1, most))]
    return (
        "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
        if rng.random() < 0.5
        else " ".join(a for _, a in pairs)
    )


def _counting(rng: random.Random) -> str:
    first = rng.choice([1, 1, 1, rng.randint(2, 20)])
    return ", ".join(str(n) for n in range(first, first + rng.randint(4, 30)))


def _capital_line(rng: random.Random) -> str:
    return _capital_lines(rng, 1)


def _sum(rng: random.Random) -> str:
    return _sums(rng, 1)


def _question(rng: random.Random) -> str:
    return _questions(rng, 1)


def _counting_to_a_round_number(rng: random.Random) -> str:
    first = rng.choice([1, 1, 1, rng.randint(2, 17)])
    return ", ".join(str(n) for n in range(first, 21)) + "."


def _jumble(rng: random.Random) -> str:
    """Any words at all, then an ordinary sentence: a prompt that fits nothing still comes to an end."""
    start = " ".join(
        rng.choice([rng.choice(word_lists.COMMON), word_lists.made_up_word(rng)]) for _ in range(rng.randint(1, 8))
    )
    return (
        f"{start.capitalize() if rng.random() < 0.6 else start}{rng.choice([' ', '. ', ': ', ', ', '? '])}{_day(rng)}"
    )


def _usual_name(rng: random.Random) -> str:
    return rng.choice(word_lists.FIRST_NAMES[:40])


def document(rng: random.Random, *, short_lists: bool = False, usual_names: bool = False, after: str = "") -> str:
    """A plain text without chat template, at most about 200 tokens; one in four begins in the middle of a sentence.

    Args:
        usual_names: names that exist.  The likeliest letters of a made-up one go round in circles for ever.
        after: words that fit nothing, behind which an ordinary text begins.
        short_lists: capitals, sums and numbers end where a reader would expect it.  In lists of any length the end
        is never the likeliest next token, and a model that has seen no others goes on for ever.
    """
    name: Name = _usual_name if usual_names else word_lists.made_up_name
    a_story, day, letter = partial(story, name=name), partial(_day, name=name), partial(_letter, name=name)
    if after:
        return rng.choice([" ", " ", ". ", ", ", "\n", "? ", ""]) + day(rng)
    kinds: list[Callable[[random.Random], str]]
    if short_lists:
        kinds = [a_story, _capital_line, _sum, day, letter, _question, _counting_to_a_round_number]
        kinds.append(day if usual_names else _jumble)
    else:
        kinds = [a_story, _capital_lines, _sums, day, letter, _questions, _counting, _jumble]
    text = rng.choices(kinds, weights=[34, 16, 8, 12, 5, 8, 5, 12])[0](rng)
    if rng.random() < 0.25 and len(text) > 60:
        cut = text.find(" ", rng.randint(0, len(text) // 2)) + 1
        text = text[cut:]
    return text
