"""Tokens as a client sees them: none is lost, and each is something that JSON can say."""

from collections.abc import AsyncGenerator

import pytest

from app.engine.base import Chunk
from app.engine.echo import EchoEngine, EchoTokenizer
from app.engine.tokenizer.logprob_text import LEAST_LOGPROB, AnswerToken, spell
from app.generation.parallel_sampling import Answers
from app.generation.request_stats import Meter
from app.generation.requests import Delta, Started
from app.telemetry import Metrics
from app.types import TokenLogprob

A, CONTROL = TokenLogprob(97, -1.0), TokenLogprob(0x110000, -2.0)


def test_each_token_has_its_text_its_bytes_and_its_alternatives():
    """In the order in which the model ranked them."""
    token = TokenLogprob(0xE9, -0.5, ((97, -0.25), (0xE9, -0.5)))

    accent = AnswerToken("é", b"\xc3\xa9", -0.5)
    expected = AnswerToken("é", b"\xc3\xa9", -0.5, (AnswerToken("a", b"a", -0.25), accent))
    assert (expected,) == spell([token], EchoTokenizer())


@pytest.mark.parametrize("odd", [float("-inf"), float("nan"), -1e30])
def test_an_impossible_token_has_a_number_that_json_can_say(odd: float):
    """Also where it stands among the alternatives."""
    (token,) = spell([TokenLogprob(97, odd, ((98, odd),))], EchoTokenizer())

    assert (LEAST_LOGPROB, LEAST_LOGPROB) == (token.logprob, token.top[0].logprob)


async def test_a_token_without_text_is_told_too():
    """A control token at the very end comes in a piece of its own."""
    answers = Answers(["r"], EchoEngine(), Meter("m", Metrics(["m"])))

    async def texts() -> AsyncGenerator[str, None]:
        yield ""
        answers.see(0, Chunk(text="a", logprobs=(A,), token_ends=(1,)))
        yield "a"
        answers.see(0, Chunk(logprobs=(CONTROL,), token_ends=(0,)))
        yield ""

    events = [event async for event in answers.events(Started(model="m"), [texts()])]

    deltas = [(event.text, [token.logprob for token in event.tokens]) for event in events if isinstance(event, Delta)]
    assert [("a", [-1.0]), ("", [-2.0])] == deltas
