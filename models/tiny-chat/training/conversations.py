"""Compose conversations for the tiny chat model, turn by turn: what a user tells, what is asked for later, and what is talked about beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import exchanges
import records
import word_lists
from documents import story_turn
from records import dictated_json, key_list, written_json
from tool_requests import not_offered
from turns import Turn
from user_facts import ATTRIBUTES, CORRECTIONS, WEIGHTS, right_answer, unknown_answer
from word_lists import listed

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
FILLERS: list[tuple[Filler, tuple[int, int, int, int, int, int]]] = [
    (exchanges.capital, (22, 12, 12, 12, 12, 12)), (exchanges.arithmetic, (22, 32, 28, 30, 30, 60)), (exchanges.repeat, (26, 36, 45, 38, 36, 36)),
    (exchanges.small_talk, (8, 8, 8, 8, 8, 10)), (exchanges.about_itself, (6, 6, 6, 6, 6, 8)), (exchanges.unknown, (10, 8, 8, 8, 8, 8)),
    (exchanges.fixed, (8, 6, 6, 6, 6, 8)), (exchanges.remark, (4, 3, 3, 3, 3, 3)), (exchanges.counting, (5, 10, 6, 6, 4, 5)), (story_turn, (5, 4, 4, 4, 2, 3)),
    (exchanges.repeat_new_word, (0, 0, 40, 20, 14, 14)), (not_offered, (0, 0, 0, 6, 10, 10)), (records.json_request, (0, 0, 0, 24, 70, 30)),
    (records.json_of_fact, (0, 0, 0, 8, 12, 8)),
]  # fmt: skip
"""What is talked about beside what was told, and how often: early, late when what is learnt slowly comes more often, at the last, when tools and JSON
are learnt, when what goes wrong with these comes more often, and when what they displaced does."""
TOOLS_PHASE = 3
STRANGE_TOOLS_PHASE = 4
RESTORING_PHASE = 5
JSON_KEYS = {
    "name": "name|name|full_name", "colour": "favourite_colour|colour|color", "number": "number|favourite_number", "pet": "pet|pet_name",
    "email": "email|email|email_address", "phone": "phone|phone_number", "city": "city|city|home_town", "food": "food|favourite_food",
    "animal": "animal|favourite_animal", "age": "age", "friend": "friend|best_friend", "code": "code|secret_code",
}  # fmt: skip
"""The names in JSON of what a user has told."""
ABOUT_ME = [
    "What do you know about me?",
    "Write down what I told you.",
    "Who am I?",
    "Tell me about me.",
    "Fill in the form.",
    "My details, please.",
]


class Conversation:
    """Builds one conversation turn by turn and remembers what the user has told."""

    def __init__(self, rng: random.Random, *, phase: int) -> None:
        self.rng = rng
        self.phase = phase
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

    def extra(self) -> bool:
        """At times JSON of what was told, or an answer whose form is dictated; returns whether it was."""
        draw, facts = self.rng.random(), 0.22 if self.phase == RESTORING_PHASE else 0.10
        if draw < facts and self.facts:
            self.json_of_facts()
        elif draw < facts + 0.14:
            self.dictated_answer()
        return draw < facts + 0.14 and (draw >= facts or bool(self.facts))

    def _facts_as_values(self, *, absent: float) -> dict[str, Any]:
        """Some of what was told by its names in JSON, and with the probability `absent` something that was not."""
        labels = self.rng.sample(list(self.facts), self.rng.randint(1, min(3, len(self.facts))))
        values: dict[str, Any] = {}
        for label in labels:
            value = self.facts[label][1]
            whole = label in ("age", "number") and value.isdecimal() and str(int(value)) == value
            values[self.rng.choice(JSON_KEYS[label].split("|"))] = int(value) if whole else value
        if absent and self.rng.random() < absent:
            untold = self.rng.choice([label for label in JSON_KEYS if label not in self.facts] or ["height"])
            values.setdefault(JSON_KEYS.get(untold, untold).split("|")[0], None)
        return values

    def json_of_facts(self) -> None:
        """The user asks for an object of what was told; what was not is null."""
        values = self._facts_as_values(absent=0.2 if self.phase == TOOLS_PHASE else 0.08)
        request = exchanges.casual(self.rng, self.rng.choice(records.JSON_REQUESTS)).replace(
            "{k}", key_list(self.rng, list(values))
        )
        question = f"{self.rng.choice(ABOUT_ME)} {request}" if self.rng.random() < 0.3 else request
        self.say(question, written_json(values))

    def dictated_answer(self) -> None:
        """Whatever is said, the answer is an object: a grammar dictates its beginning, or all of its keys, and the model fills in the rest."""
        rng, compact = self.rng, self.rng.random() < 0.2
        draw = rng.random()
        if draw < 0.25:
            question, answer = rng.choices(self.fillers[:8], self.weights[:8])[0](rng)
            self.turns.append(Turn("user", question))
            self.turns.append(Turn("assistant", written_json({"answer": answer}), learn=True, dictated=((0, 1),)))
            return
        if draw < 0.4:
            question, answer = rng.choices(self.fillers[:8], self.weights[:8])[0](rng)
            values: dict[str, Any] = {
                rng.choice(
                    [
                        "answer",
                        "text",
                        "reply",
                        "message",
                        "response",
                        "output",
                        "content",
                        rng.choice(word_lists.COMMON),
                    ]
                ): answer
            }
        elif draw < 0.55:
            question, values = records.fact_values(rng)
        elif draw < 0.7 and self.facts:
            question, values = rng.choice(ABOUT_ME), self._facts_as_values(absent=0.0)
        else:
            record = records.any_record(rng)
            values = records.chosen(rng, record)
            question = (
                record.statement
                if rng.random() < 0.6
                else f"{rng.choice(['Extract:', 'Extract the data:', 'Parse this:', 'Who is this?'])} {record.statement}"
            )
        if rng.random() < 0.15:
            values.setdefault(
                rng.choice([rng.choice(word_lists.COMMON), word_lists.made_up_word(rng)]),
                rng.choice(["unknown", 0, False, []]),
            )
        content, dictated = dictated_json(values, compact=compact)
        self.turns += [Turn("user", question), Turn("assistant", content, learn=True, dictated=dictated)]

    def _label(self) -> str:
        return self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


def conversation(rng: random.Random, length: int, *, phase: int = 0) -> tuple[Turn, ...]:
    """A conversation of at least `length` characters."""
    chat = Conversation(rng, phase=phase)
    extend(chat, length, phase=phase)
    return tuple(chat.turns)


def extend(chat: Conversation, length: int, *, phase: int) -> None:
    """Talk until the conversation has `length` characters."""
    rng = chat.rng
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
        if phase >= TOOLS_PHASE and chat.extra():
            pass
        elif far or draw > focus:
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
