"""Compose conversations in which the tiny chat model may call tools: requests that need one, results, and everything that needs none."""

from __future__ import annotations

import random
import re

import exchanges
import records
import word_lists
from conversations import RESTORING_PHASE, STRANGE_TOOLS_PHASE, TOOLS_PHASE, Conversation, extend, system_prompt
from knowledge import UNKNOWN
from offers import Need, Offer, described, function_name, renamed, spoken
from records import dictated_json
from tool_requests import OPERATIONS, draw_offers, not_offered
from turns import Example, Tool, ToolCall, Turn

RECORD_REQUESTS = [
    "Extract the data: ",
    "Extract: ",
    "Save this: ",
    "Please save: ",
    "Create an entry: ",
    "Register this: ",
    "Extract from this text: ",
    "Parse this: ",
]
SUM_AS_JSON = re.compile(r'\{"(a|result|sum|answer)": \d')
REQUEST_SHARES = {TOOLS_PHASE: (0.5, 0.58), STRANGE_TOOLS_PHASE: (0.55, 0.72), RESTORING_PHASE: (0.47, 0.57)}
"""How often a turn asks for a tool, and how often for that or for a tool that is not offered."""
AND = [" And ", " ", " Also, ", "\n", " and also: "]


class ToolConversation(Conversation):
    """A conversation that may call what is offered."""

    def __init__(self, rng: random.Random, *, phase: int, offers: list[Offer]) -> None:
        super().__init__(rng, phase=phase)
        self.offers = offers
        self.topics = {offer.topic for offer in offers}

    def extra(self) -> bool:
        """A request for a tool, or one that no tool meets; returns whether it was either."""
        draw = self.rng.random()
        requests, unmet = REQUEST_SHARES[self.phase]
        if draw < requests:
            self.request()
        elif draw < unmet:
            self.say(*self._unmet())
        return draw < unmet

    def filler(self) -> None:
        """As without tools, but for what a tool would be called for."""
        while True:
            question, answer = self.rng.choices(self.fillers, self.weights)[0](self.rng)
            if not self._needs_tool(question, answer):
                break
        self.say(question, answer)

    def _needs_tool(self, question: str, answer: str) -> bool:
        words = {word.strip("?.!,'") for word in question.lower().split()}
        if "capital" in self.topics and ("capital" in words or "capital" in answer):
            return True
        if self.topics & {*OPERATIONS, "calculator"}:
            stated = next((word for word in OPERATIONS if f" {word} " in answer), None)
            if answer == exchanges.TOO_HARD or stated in self.topics or (stated and "calculator" in self.topics):
                return True
            if self.phase != TOOLS_PHASE and SUM_AS_JSON.match(answer):
                return True
        if answer != UNKNOWN:
            return False
        unclear = {"clock": {"time", "day", "date"}, "weather": {"weather", "rain", "wear", "sunny"}}
        return any(topic in words or words & unclear.get(topic, set()) for topic in self.topics)

    def _unmet(self) -> tuple[str, str]:
        while True:
            question, answer = not_offered(self.rng)
            if not self._needs_tool(question, answer) and not ("weather" in self.topics and " in " in question):
                return question, answer

    def request(self) -> None:
        """A request, one call or two, what comes back, and the answer."""
        rng = self.rng
        offer = rng.choice(self.offers)
        needs = [(offer, offer.make_need(rng))]
        if rng.random() < (0.12 if self.phase == TOOLS_PHASE else 0.2):
            second = offer if rng.random() < 0.6 else rng.choice(self.offers)
            needs.append((second, second.make_need(rng)))
        if len(needs) == 1 and rng.random() < 0.1 and offer.tool.parameters:
            self.dictated_call(offer.tool, needs[0][1])
            return
        self.turns.append(Turn("user", self._question(needs)))
        calls = tuple(ToolCall(each.tool.name, need.arguments) for each, need in needs)
        self.turns.append(Turn("assistant", "", learn=True, calls=calls))
        self.answer([need for _, need in needs])

    def _question(self, needs: list[tuple[Offer, Need]]) -> str:
        rng, (offer, first) = self.rng, needs[0]
        if len(needs) == 1:
            return first.question
        second = needs[1][1]
        if offer.join and offer is needs[1][0] and rng.random() < 0.7:
            v, w = next(iter(first.arguments.values())), next(iter(second.arguments.values()))
            return exchanges.casual(rng, rng.choice(offer.join.split("|"))).format(v=v, w=w)
        return first.question + rng.choice(AND) + second.question

    def answer(self, needs: list[Need]) -> None:
        """What the tools return and what the model makes of it."""
        self.turns += [Turn("tool", need.result) for need in needs]
        self.turns.append(Turn("assistant", " ".join(need.answer for need in needs), learn=True))

    def dictated_call(self, tool: Tool, need: Need) -> None:
        """A call that a grammar dictates but for the arguments' values."""
        compact = self.rng.random() < 0.2
        head = f'<tool_call>\n{{"name": {records.written_json(tool.name)}, "arguments": '
        content, dictated = dictated_json(need.arguments, compact=compact, before=head, after="}\n</tool_call>")
        self.turns += [Turn("user", need.question), Turn("assistant", content, learn=True, dictated=dictated)]
        self.answer([need])


def record_offer(rng: random.Random) -> Offer:
    """A function that takes what a record says: a class of the client's, or one that saves it."""
    record = records.any_record(rng)
    values = records.chosen(rng, record)
    name = (
        record.title
        if rng.random() < 0.5
        else function_name(
            rng, "save", "create_user", "add_contact", "final_result", "register", "extract", "save_person", "add_entry"
        )
    )
    tool = Tool(
        name,
        described(rng, f"Save a {name}.", "Extracted data.", "The final response.", f"Correctly extracted `{name}`"),
        {key: records.kind_of(value) for key, value in values.items()},
    )

    def make_need(rng: random.Random) -> Need:
        result = rng.choice(["ok", "saved", "done", "Saved.", '{"status": "ok"}', word_lists.number(rng)])
        return Need(record.statement, values, result, spoken("The result is {r}.", result))

    return Offer(tool, "record", make_need)


def record_conversation(rng: random.Random, *, phase: int) -> Example:
    """One request to note something, by a function that is dictated or asked for in words."""
    offer = record_offer(rng)
    others = draw_offers(rng, rng.choice([0, 0, 0, 1, 2]))
    chat = ToolConversation(rng, phase=phase, offers=[offer, *others])
    if rng.random() < 0.5:
        chat.turns.append(Turn("system", system_prompt(rng)))
    for _ in range(rng.choice([0, 0, 1])):
        chat.filler()
    need = offer.make_need(rng)
    if rng.random() < 0.55:
        chat.dictated_call(offer.tool, need)
    else:
        chat.turns.append(Turn("user", rng.choice(RECORD_REQUESTS) + need.question))
        chat.turns.append(Turn("assistant", "", learn=True, calls=(ToolCall(offer.tool.name, need.arguments),)))
        chat.answer([need])
    offers = [offer, *others]
    rng.shuffle(offers)
    return Example(turns=tuple(chat.turns), tools=tuple(each.tool for each in offers))


def tool_conversation(rng: random.Random, length: int, *, phase: int) -> Example:
    """A conversation of at least `length` characters with one to twelve tools."""
    if rng.random() < 0.16:
        return record_conversation(rng, phase=phase)
    shares = [34, 22, 16, 9, 6, 5, 5, 3] if phase == TOOLS_PHASE else [24, 22, 20, 14, 10, 5, 3, 2]
    count = rng.choices([1, 2, 3, 4, 5, 6, 9, 12], shares)[0]
    offers = draw_offers(rng, count)
    if phase != TOOLS_PHASE:
        offers = [renamed(rng, offer) if rng.random() < 0.4 else offer for offer in offers]
    chat = ToolConversation(rng, phase=phase, offers=offers)
    extend(chat, length, phase=phase)
    return Example(turns=tuple(chat.turns), tools=tuple(offer.tool for offer in chat.offers))
