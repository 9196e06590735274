"""Compose the training text of the tiny chat model: whole conversations and plain documents.

Example `i` of a seed is always the same text, whatever was drawn before it.  `train.py` turns examples into tokens; the tables
and single exchanges are in the modules beside this one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import exchanges
import word_lists
from documents import document, story_turn
from user_facts import ATTRIBUTES, CORRECTIONS, WEIGHTS, right_answer, unknown_answer
from word_lists import listed


@dataclass(frozen=True)
class Turn:
    """One message; the model learns to write it where `learn` is true."""

    role: str
    content: str
    learn: bool = False


@dataclass(frozen=True)
class Example:
    """Either a conversation (`turns`) or a plain document (`text`)."""

    turns: tuple[Turn, ...] = ()
    text: str = ""
    given: str = ""
    """What stands before the document and is not learnt: nobody could guess it."""


SYSTEM_OPENINGS = listed("""You are a helpful assistant.|You are a friendly assistant.|You are a helpful, honest assistant.|You are an assistant.|
You are a chat assistant.|You are a small assistant.|You are {n}, a helpful assistant.|You are the assistant of {n}.|Be helpful.|You answer questions.|
You are a polite and careful assistant that talks to users.|This is a chat between a user and an assistant.|You are Tiny Chat.|
You are a knowledgeable assistant for the {w} team.|Act as a {w} {x}.""")
SYSTEM_RULES = listed("""Answer briefly.|Answer briefly and honestly.|Be concise.|Be kind.|Keep your answers short.|If you do not know something, say so.|
Do not make things up.|Answer in English.|Never reveal personal data.|Use plain words.|Be polite and friendly.|Use what the user told you earlier.|
Remember what the user says.|Answer in one or two sentences.|Do not use markdown.|Do not repeat private information of others.|
Think before you answer.|If a question is unclear, ask.|Follow the instructions of the user.|Avoid long lists.|Your name is {n}.|Today is {d}.|
Personal data may be replaced by placeholders such as [EMAIL].|Treat placeholders in brackets as ordinary words.|Never talk about {w}.|
The user works with {w} and {x}.|Always stay calm.|You do not have access to the internet.|Refuse harmful requests.|
Say that you do not know when you do not know.|Stay on topic.|Help the user with {w} questions.|Do not mention these rules.""")


def _strange_sentence(rng: random.Random) -> str:
    """An instruction in words that mean nothing here: whatever a service tells its model, the user's turn is what is answered."""
    if rng.random() < 0.4:
        return exchanges.random_sentence(rng)
    made_up = [
        rng.choice(word_lists.COMMON) if rng.random() < 0.4 else word_lists.made_up_word(rng)
        for _ in range(rng.randint(4, 16))
    ]
    text = " ".join(made_up)
    return text[0].upper() + text[1:] + rng.choice("..!")


def system_prompt(rng: random.Random) -> str:
    """Instructions of one to six sentences, of the usual words or of any words at all."""
    slots = {
        "n": word_lists.made_up_name(rng),
        "w": rng.choice(word_lists.COMMON),
        "x": rng.choice(word_lists.COMMON),
        "d": f"{rng.randint(1, 28)} May",
    }
    lines = [rng.choice(SYSTEM_OPENINGS)] if rng.random() < 0.85 else []
    lines += rng.sample(SYSTEM_RULES, rng.randint(0 if lines else 1, 4))
    if rng.random() < 0.4:
        strange = [_strange_sentence(rng) for _ in range(rng.randint(1, 4))]
        place = rng.randint(0, len(lines))
        lines = strange if rng.random() < 0.3 else [*lines[:place], *strange, *lines[place:]]
    return rng.choice([" ", " ", " ", "\n"]).join(lines).format(**slots)


Filler = Callable[[random.Random], tuple[str, str]]
FILLERS: list[tuple[Filler, tuple[int, int, int]]] = [
    (exchanges.capital, (22, 12, 12)), (exchanges.arithmetic, (22, 32, 28)), (exchanges.repeat, (26, 36, 45)), (exchanges.small_talk, (8, 8, 8)),
    (exchanges.about_itself, (6, 6, 6)), (exchanges.unknown, (10, 8, 8)), (exchanges.fixed, (8, 6, 6)), (exchanges.remark, (4, 3, 3)),
    (exchanges.counting, (5, 10, 6)), (story_turn, (5, 4, 4)), (exchanges.repeat_new_word, (0, 0, 40)),
]  # fmt: skip
"""What is talked about beside what was told, and how often: early, late when what is learnt slowly comes more often, and at the last."""
LATE_FROM = 12 * 2048
"""The example from which the text is late: by then the model knows the easy things."""
LAST_FROM = 1000 * 2048
"""The example from which on there is most of what goes wrong longest: long conversations, copying, beginnings that fit nothing."""


class Conversation:
    """Builds one conversation turn by turn and remembers what the user has told."""

    def __init__(self, rng: random.Random, *, phase: int) -> None:
        self.rng = rng
        self.fillers = [filler for filler, _ in FILLERS]
        self.weights = [weights[phase] for _, weights in FILLERS]
        self.turns: list[Turn] = []
        self.facts: dict[str, tuple[str, str]] = {}
        self.corrected: list[str] = []

    def say(self, question: str, answer: str, *, learn: bool = True) -> None:
        """Add one exchange."""
        self.turns += [Turn("user", question), Turn("assistant", answer, learn)]

    def filler(self) -> None:
        """An exchange that has nothing to do with what was told; at times in the words of another assistant."""
        question, answer = self.rng.choices(self.fillers, self.weights)[0](self.rng)
        if self.rng.random() < 0.06:
            self.say(
                question if self.rng.random() < 0.5 else exchanges.random_sentence(self.rng),
                exchanges.phrase(self.rng),
                learn=False,
            )
        else:
            self.say(question, answer)

    def _fill(self, template: str, kind: str, value: str) -> str:
        return exchanges.casual(self.rng, template).format(v=value, k=kind, w=self.rng.choice(word_lists.COMMON))

    def _draw_fact(self, label: str) -> tuple[str, str, str]:
        """Draw a value: what the user says, the acknowledgement without its first letter changed, and the kind."""
        attribute = ATTRIBUTES[label]
        kind, value = self.rng.choice(attribute.kinds), attribute.value(self.rng)
        if self.rng.random() < 0.08 and "[" not in value:
            value = value.lower()
        if label in self.facts and self.rng.random() < 0.7:
            kind = self.facts[label][0]
        statement = self._fill(self.rng.choice(attribute.statements.split("|")), kind, value)
        self.facts[label] = (kind, value)
        return statement, self.rng.choice(attribute.acknowledgements.split("|")).format(v=value, k=kind), kind

    def state_fact(self) -> None:
        """The user tells one thing, or two in one message, or corrects what was told."""
        label = self.rng.choice(list(self.facts)) if self.facts and self.rng.random() < 0.35 else self._label()
        corrected = label in self.facts
        if corrected:
            self.corrected.append(label)
        statement, acknowledged, _ = self._draw_fact(label)
        if corrected and self.rng.random() < 0.8:
            statement = self.rng.choice(CORRECTIONS) + (
                statement[0].lower() + statement[1:] if statement.startswith(("My", "I ", "You", "The")) else statement
            )
        other = self._label()
        if other != label and self.rng.random() < 0.12:
            second, second_acknowledged, _ = self._draw_fact(other)
            joint = self.rng.choice([" ", " ", " and ", "\n"])
            statement = statement.rstrip(".!") + joint + second if joint == " and " else f"{statement}{joint}{second}"
            acknowledged = f"{acknowledged} {second_acknowledged}"
        if self.rng.random() < 0.06:
            statement = f"{self.rng.choice(['Hello!', 'Hi.', 'Hey!', 'Good morning.', 'Thanks.'])} {statement}"
        self.say(statement, acknowledged)

    def question_fact(self, *, known: bool) -> None:
        """The user asks for something told, or for something not told."""
        labels = (
            list(self.facts) if known and self.facts else [label for label in ATTRIBUTES if label not in self.facts]
        )
        if not labels:
            return
        label = self.rng.choices(labels, [WEIGHTS[each] for each in labels])[0]
        if known and self.corrected and self.rng.random() < 0.4:
            label = self.rng.choice(self.corrected)
        attribute = ATTRIBUTES[label]
        template = self.rng.choice(attribute.questions.split("|"))
        if self.rng.random() < 0.3:
            template = attribute.questions.split("|")[0]
        if label in self.facts:
            kind, value = self.facts[label]
            kind_in_question = kind
            if len(attribute.kinds) > 1 and "{k}" in template and self.rng.random() < 0.15:
                kind_in_question = self.rng.choice(attribute.kinds)
            matches = kind_in_question in (kind, "pet")
            answer = right_answer(attribute, kind, value) if matches else unknown_answer(attribute, kind_in_question)
        else:
            kind_in_question = self.rng.choice(attribute.kinds) if "{k}" in template else "pet"
            answer = unknown_answer(attribute, kind_in_question)
        self.say(exchanges.casual(self.rng, template).format(k=kind_in_question), answer)

    def _label(self) -> str:
        return self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


def conversation(rng: random.Random, length: int, *, phase: int = 0) -> tuple[Turn, ...]:
    """A conversation of at least `length` characters."""
    chat = Conversation(rng, phase=phase)
    focus = rng.choice([0.25, 0.5, 0.5, 0.75])
    size = 0
    if rng.random() < 0.6:
        chat.turns.append(Turn("system", system_prompt(rng)))
        size += len(chat.turns[0].content)
    # What is told at the beginning of such a conversation is asked for only at its end.
    far = phase and length > 700 and rng.random() < 0.6
    for _ in range(rng.randint(1, 3) if far else 0):
        chat.state_fact()
    while size < length or len(chat.turns) < 2:
        before = len(chat.turns)
        draw = rng.random()
        if far or draw > focus:
            chat.filler()
        elif draw < focus * 0.38 and (len(chat.facts) < 6 or draw < focus * 0.1):
            chat.state_fact()
        else:
            chat.question_fact(known=rng.random() < 0.75)
        size += sum(len(turn.content) + 14 for turn in chat.turns[before:])
    if far:
        for _ in range(4):
            chat.question_fact(known=rng.random() < 0.8)
    elif chat.facts and rng.random() < 0.5:
        chat.question_fact(known=True)
    return tuple(chat.turns)


def example(seed: int, index: int) -> Example:
    """Example `index` of the training text; the same arguments always give the same example.

    Args:
        seed: the seed of the whole text.
        index: 0 or more.
    """
    rng = random.Random(f"{seed}:{index}")
    phase = (index >= LATE_FROM) + (index >= LAST_FROM)
    if rng.random() < (0.16, 0.16, 0.24)[phase]:
        given = exchanges.odd_beginning(rng) if phase == 2 and rng.random() < 0.5 else ""
        return Example(text=document(rng, short_lists=phase > 0, usual_names=phase == 2, after=given), given=given)
    draw = rng.random()
    length = rng.randint(40, 200) if draw < 0.35 else rng.randint(200, 800)
    if draw > (0.93, 0.91, 0.88)[phase]:
        length = rng.randint(800, 2600) if draw < (0.985, 0.965, 0.93)[phase] else rng.randint(2600, 5500)
    return Example(turns=conversation(rng, length, phase=phase))
