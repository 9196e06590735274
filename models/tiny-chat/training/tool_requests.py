"""Tools that a client may offer to the tiny chat model, and requests that need them.

A tool comes under many names, some of them made up, so that the model reads the name and the parameters from the list it is given.  Results are
often not what the model would have said by itself: it has to read them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import exchanges
import word_lists
from knowledge import CAPITALS, UNKNOWN
from offers import Need, Offer, Value, described, failing, function_name, spoken, text_value, wrapped
from turns import Tool
from word_lists import listed

PLACES = listed("""Paris|London|Berlin|Rome|Madrid|Oslo|Tokyo|Lima|Vienna|Cairo|Boston|San Francisco|New York|Chicago|Munich|Hamburg|Zurich|Sydney|
Amsterdam|Lisbon|Seoul|Delhi|Mumbai|Toronto|Seattle|Los Angeles|Beijing|Dublin|Prague|Warsaw|Athens|Stockholm|Copenhagen|Helsinki|Moscow|Leeds""")
WEATHERS = listed(
    """sunny|rainy|cloudy|windy|snowy|foggy|cold|warm|hot|dry|stormy|sunny and warm|cold and wet|light rain|clear sky|heavy snow"""
)
WEATHER_QUESTIONS = listed("""What is the weather in {v}?|What is the weather in {v}?|What's the weather in {v}?|What is the weather like in {v}?|
What's the weather like in {v}?|How is the weather in {v}?|What is the weather in {v} today?|What is today's weather in {v}?|weather in {v}|
How is the weather in {v} today?|Tell me the weather in {v}.|Get the weather in {v}.|What is the weather in {v} right now?|Is it sunny in {v}?|
Will it rain in {v}?|Will it rain in {v} today?|What is the temperature in {v}?|How warm is it in {v}?|How cold is it in {v} today?|
What's the weather like in {v} today?|Check the weather in {v}, please.|Weather for {v}?|Can you tell me the weather in {v}?|
Please tell me the weather in {v}.|What is the forecast for {v}?|And in {v}?|And the weather in {v}?|Use the tool to get the weather in {v}.|
Look up the weather in {v}.|What will the weather be in {v}?|Do I need an umbrella in {v}?|How's the weather in {v}?""")
TIME_QUESTIONS = listed("""What time is it?|What is the time?|What time is it now?|Tell me the time.|What is the current time?|Which day is it?|What day is it today?|
What is the date?|What is today's date?|What is the date today?|Do you know what time it is?|What's the time?""")
TIMES_QUESTIONS = listed("""What is {a} times {b}?|{a} * {b}|{a} times {b}|Multiply {a} by {b}.|Multiply {a} and {b}.|How much is {a} times {b}?|Calculate {a} * {b}|
What is {a} * {b}?|What is the product of {a} and {b}?|What is {a} multiplied by {b}?""")
OVER_QUESTIONS = listed("""What is {a} divided by {b}?|{a} / {b}|{a} divided by {b}|Divide {a} by {b}.|How much is {a} divided by {b}?|Calculate {a} / {b}|
What is {a} / {b}?""")
SUM_QUESTIONS = [
    *exchanges.PLUS_QUESTIONS,
    "Use the tool to add {a} and {b}.",
    "Please add {a} and {b}.",
    "Sum {a} and {b}.",
]
NOUNS = listed("""price|status|address|owner|population|colour|size|age|phone|score|title|author|meaning|location|balance|stock|route|schedule|recipe|
definition|summary|height|length|weight|cost|level|rank|salary|birthday|manager|language|currency|rating|version|distance|position|speed|total|
state|order|record|profile|email|description|country|river|team|code""")
GETTERS = "get get get find lookup look_up fetch read check show query search retrieve load".split()
NOUN_QUESTIONS = listed("""What is the {n} of {v}?|What is the {n} of {v}?|What is the {n} for {v}?|{n} of {v}|Tell me the {n} of {v}.|Find the {n} of {v}.|
Get the {n} of {v}.|Get the {n} for {v}.|Look up the {n} of {v}.|Please check the {n} of {v}.|What's the {n} of {v}?|Show me the {n} of {v}.|
Do you know the {n} of {v}?|Can you find the {n} of {v}?|I need the {n} of {v}.|Give me the {n} of {v}.|What is {v}'s {n}?|Read the {n} of {v}.""")
VERBS = listed("""search|play|open|translate|send|delete|order|book|call|start|stop|print|define|save|paint|buy|load|find|show|watch|pack|rent|lock|move|
fetch|run|test|ping|wake|read|close|greet|invite|cancel|repair|visit|describe|check|follow|remind|post|share|track|scan|summarize""")
TAKEN = {"count", "write", "tell", "say", "repeat", "echo", "print", "add", "name"}
"""What the model does by itself; a tool of that name would leave open which is meant."""
VERB_QUESTIONS = listed("""{V} {v}|{V} {v}.|{V} {v}, please.|Please {u} {v}.|Please {u} {v}|Can you {u} {v}?|Could you {u} {v}?|I want you to {u} {v}.|Now {u} {v}.|
{V} the {n} {v}.|Please {u} the {n} {v}.|Can you {u} the {n} {v}?|{V} for {v}.|Please {u} for {v}.|Use the tool to {u} {v}.""")
TEXT_NAMES = "name id item key query text title city person user word product symbol topic value input value target place url path q string".split()


def _operands(rng: random.Random) -> tuple[int, int]:
    most = rng.choice([20, 20, 20, 99, 999, 9999])
    return rng.randint(0, most), rng.randint(0, rng.choice([20, most, most]))


OPERATIONS: dict[str, tuple[list[str], str, list[str], list[str]]] = {
    "plus": (SUM_QUESTIONS, "+", "add add add add_numbers sum plus sum_numbers addition add_two_numbers calculate_sum".split(),
             ["Add two numbers.", "Add two numbers.", "Adds a and b.", "Returns the sum of two numbers.", "Sum of two integers.", "Add numbers together."]),
    "minus": (exchanges.MINUS_QUESTIONS, "-", "subtract minus difference subtract_numbers".split(),
              ["Subtract two numbers.", "Returns the difference.", "Subtract b from a."]),
    "times": (TIMES_QUESTIONS, "*", "multiply times product multiply_numbers mul".split(),
              ["Multiply two numbers.", "Multiply a and b.", "Returns the product."]),
    "divided by": (OVER_QUESTIONS, "/", "divide div quotient divide_numbers".split(), ["Divide two numbers.", "Divide a by b."]),
}  # fmt: skip
OPERAND_NAMES = [("a", "b"), ("a", "b"), ("a", "b"), ("x", "y"), ("first", "second"), ("num1", "num2"), ("left", "right"), ("n", "m"),
                 ("first_number", "second_number"), ("number1", "number2"), ("lhs", "rhs"), ("p", "q")]  # fmt: skip


def _outcome(rng: random.Random, word: str, a: int, b: int) -> str:
    """The right result, or any other: what the tool says counts."""
    if rng.random() < 0.3:
        return word_lists.number(rng)
    right = {
        "plus": a + b,
        "minus": a - b,
        "times": a * b,
        "divided by": a // b if b and a % b == 0 else round(a / (b or 1), 2),
    }
    return str(right[word])


def operation(rng: random.Random, word: str) -> Offer:
    """A function of two numbers."""
    questions, _, names, descriptions = OPERATIONS[word]
    first, second = rng.choice(OPERAND_NAMES)
    kind = rng.choice(["integer", "number"])

    def make_need(rng: random.Random) -> Need:
        a, b = _operands(rng)
        question = exchanges.casual(rng, rng.choice(questions)).format(a=a, b=b)
        if word == "minus" and question.lower().startswith("subtract"):
            question = f"What is {a} minus {b}?"
        result = failing(rng, wrapped(rng, _outcome(rng, word, a, b), "result", "sum", "value", "answer"))
        return Need(question, {first: a, second: b}, result, spoken(f"{a} {word} {b} is {{r}}.", result))

    tool = Tool(function_name(rng, *names), described(rng, *descriptions), {first: kind, second: kind})
    return Offer(tool, word, make_need)


def calculator(rng: random.Random) -> Offer:
    """A function of an expression, which the question gives in words or signs."""
    parameter = rng.choice(["expression", "expression", "input", "formula", "query"])

    def make_need(rng: random.Random) -> Need:
        word = rng.choice(list(OPERATIONS))
        a, b = _operands(rng)
        question = exchanges.casual(rng, rng.choice([q for q in OPERATIONS[word][0] if "ubtract" not in q])).format(
            a=a, b=b
        )
        result = wrapped(rng, _outcome(rng, word, a, b), "result", "value")
        return Need(
            question, {parameter: f"{a} {OPERATIONS[word][1]} {b}"}, result, spoken(f"{a} {word} {b} is {{r}}.", result)
        )

    names = ["calculator", "calculate", "calc", "evaluate", "compute", "math"]
    text = described(rng, "Evaluate an expression.", "Calculate a result.", "A simple calculator.")
    return Offer(Tool(function_name(rng, *names), text, {parameter: "string"}), "calculator", make_need)


def capital(rng: random.Random) -> Offer:
    """A function that knows the capitals of countries, made-up ones too."""
    parameter = rng.choice("country country country country_name name nation land place input".split())

    def make_need(rng: random.Random) -> Need:
        country = rng.choice(list(CAPITALS)) if rng.random() < 0.45 else word_lists.made_up_name(rng)
        city = CAPITALS.get(country, "") if rng.random() < 0.6 else ""
        city = city or (word_lists.made_up_name(rng) if rng.random() < 0.7 else rng.choice(PLACES))
        result = failing(rng, wrapped(rng, city, "capital", "city", "result"))
        if rng.random() < 0.1:
            result = f"The capital is {city}."
        question = exchanges.casual(rng, rng.choice(exchanges.CAPITAL_QUESTIONS)).format(c=country)
        return Need(question, {parameter: country}, result, spoken(f"The capital of {country} is {{r}}.", result))

    names = "get_capital get_capital capital capital_of lookup_capital look_up_capital find_capital get_capital_city country_capital".split()
    text = described(
        rng,
        "Get the capital of a country.",
        "Look up the capital of a country.",
        "Returns the capital city.",
        "Capital of a country.",
    )
    join = (
        "What are the capitals of {v} and {w}?|What is the capital of {v} and of {w}?|Name the capitals of {v} and {w}."
    )
    return Offer(Tool(function_name(rng, *names), text, {parameter: "string"}), "capital", make_need, join)


def _weather_result(rng: random.Random, place: str) -> str:
    weather, degrees = rng.choice(WEATHERS), rng.randint(-9, 39)
    return rng.choice(
        [
            weather, weather, f"{weather}, {degrees} degrees", f"{degrees} degrees", f"{degrees}\u00b0C", f"{weather}, {degrees}\u00b0C",
            f"It is {weather} in {place}.", f"It's always {weather} in {place}!", f"The weather in {place} is {weather}.",
            json.dumps({"temperature": degrees, "condition": weather}), json.dumps({"weather": weather}),
            json.dumps({"city": place, "temperature": degrees, "unit": rng.choice(["celsius", "C"])}, ensure_ascii=False),
            word_lists.made_up_word(rng), f"{weather} and {rng.choice(word_lists.COMMON)}",
        ]
    )  # fmt: skip


def weather(rng: random.Random) -> Offer:
    """A function that knows the weather of a place."""
    parameter = rng.choice("city city city city location location place town where city_name".split())
    kinds = {parameter: "string"}
    unit = "celsius|fahrenheit" if rng.random() < 0.08 else ""
    if unit:
        kinds["unit"] = unit

    def make_need(rng: random.Random) -> Need:
        place = rng.choice(PLACES) if rng.random() < 0.4 else rng.choice(list(CAPITALS.values()))
        place = place if rng.random() < 0.5 else word_lists.made_up_name(rng)
        result = failing(rng, _weather_result(rng, place))
        question = exchanges.casual(rng, rng.choice(WEATHER_QUESTIONS)).format(v=place)
        arguments: dict[str, Value] = {parameter: place, **({"unit": "celsius"} if unit else {})}
        frame = (
            f"The weather in {place}: {{r}}."
            if result.startswith("{") and len(json.loads(result)) > 1
            else f"The weather in {place} is {{r}}."
        )
        return Need(question, arguments, result, spoken(frame, result))

    names = "get_weather get_weather get_weather weather get_current_weather current_weather weather_today get_forecast fetch_weather check_weather".split()
    text = described(rng, "Get the weather of a city.", "Get the current weather.", "Get the weather for a city.", "Today's weather in a place.",
                     "Get weather for a given city.", "Returns the weather.", "Get current temperature for a given location.")  # fmt: skip
    join = "What is the weather in {v} and {w}?|What is the weather in {v} and in {w}?|What's the weather like in {v} and {w}?|How is the weather in {v} and {w}?"
    return Offer(Tool(function_name(rng, *names), text, kinds), "weather", make_need, "" if unit else join)


def clock(rng: random.Random) -> Offer:
    """A function without parameters."""

    def make_need(rng: random.Random) -> Need:
        result = rng.choice(
            [
                f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}",
                f"{rng.randint(2020, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}",
                rng.choice(["Monday", "Tuesday", "Friday", "Sunday"]),
            ]
        )
        question = exchanges.casual(rng, rng.choice(TIME_QUESTIONS))
        return Need(question, {}, result, spoken("It is {r}.", result))

    names = "get_time get_current_time current_time now clock get_date today get_current_timestamp current_date".split()
    text = described(rng, "Get the current time.", "Returns the time.", "Get the date and time.", "Current date.")
    return Offer(Tool(function_name(rng, *names), text, {}), "clock", make_need)


def _plain_result(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.15:
        return exchanges.random_sentence(rng).rstrip("?.!") + "."
    if draw < 0.25:
        return json.dumps(
            {
                rng.choice(word_lists.COMMON): rng.choice([rng.choice(word_lists.COMMON), rng.randint(0, 999)]),
                word_lists.made_up_word(rng): rng.randint(0, 99),
            }
        )
    return failing(rng, text_value(rng))


def lookup(rng: random.Random) -> Offer:
    """A function that returns some property of something named."""
    draw = rng.random()
    noun = (
        rng.choice(NOUNS)
        if draw < 0.45
        else rng.choice(word_lists.COMMON)
        if draw < 0.75
        else word_lists.made_up_word(rng)
    )
    parameter = rng.choice(TEXT_NAMES) if rng.random() < 0.8 else rng.choice(word_lists.COMMON)

    def make_need(rng: random.Random) -> Need:
        value, result = text_value(rng), _plain_result(rng)
        question = exchanges.casual(rng, rng.choice(NOUN_QUESTIONS)).format(n=noun, v=value)
        return Need(question, {parameter: value}, result, spoken(f"The {noun} of {value} is {{r}}.", result))

    name = function_name(rng, f"{rng.choice(GETTERS)}_{noun}") if rng.random() < 0.8 else noun
    text = described(
        rng, f"Get the {noun}.", f"Returns the {noun}.", f"Find the {noun} of something.", f"Look up a {noun}."
    )
    return Offer(Tool(name, text, {parameter: "string"}), noun, make_need)


def action(rng: random.Random) -> Offer:
    """A function that does something with something named."""
    draw = rng.random()
    verb = (
        rng.choice(VERBS)
        if draw < 0.55
        else rng.choice(word_lists.COMMON)
        if draw < 0.75
        else word_lists.made_up_word(rng)
    )
    verb = "find" if verb in TAKEN else verb
    noun = rng.choice(NOUNS) if rng.random() < 0.5 else rng.choice(word_lists.COMMON)
    parameter = rng.choice(TEXT_NAMES) if rng.random() < 0.8 else noun

    def make_need(rng: random.Random) -> Need:
        value, result = text_value(rng), _plain_result(rng)
        template = (
            rng.choice(VERB_QUESTIONS).replace("{V}", verb.capitalize()).replace("{u}", verb).replace("{n}", noun)
        )
        question = exchanges.casual(rng, template).replace("{v}", value)
        return Need(question, {parameter: value}, result, spoken("The result is {r}.", result))

    name = function_name(rng, verb, f"{verb}_{noun}", f"{verb}_{noun}")
    text = described(
        rng,
        f"{verb.capitalize()} something.",
        f"{verb.capitalize()} a {noun}.",
        f"{verb.capitalize()} the given {noun}.",
    )
    return Offer(Tool(name, text, {parameter: "string"}), verb, make_need)


def not_offered(rng: random.Random) -> tuple[str, str]:
    """A request that only a tool could meet, where there is none."""
    question = rng.choice([weather, weather, clock, lookup, action])(rng).make_need(rng).question
    return question, UNKNOWN


def draw_offers(rng: random.Random, count: int) -> list[Offer]:
    """Tools of different topics and names."""
    makers: list[Callable[[random.Random], Offer]] = [
        lambda rng: operation(rng, "plus"), lambda rng: operation(rng, rng.choice(["minus", "times", "divided by"])),
        calculator, capital, weather, clock, lookup, action,
    ]  # fmt: skip
    offers: list[Offer] = []
    while len(offers) < count:
        offer = rng.choices(makers, [16, 5, 3, 16, 18, 4, 20, 16])[0](rng)
        topics, names = {each.topic for each in offers}, {each.tool.name for each in offers}
        clash = {*OPERATIONS} if offer.topic == "calculator" else {"calculator"} if offer.topic in OPERATIONS else set()
        if not (topics & {offer.topic, *clash} or offer.tool.name in names):
            offers.append(offer)
    return offers
