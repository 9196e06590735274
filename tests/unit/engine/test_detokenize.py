"""Tokens as a client sees them: none is lost, and each is something that JSON can say."""

import pytest

from app.engine.echo import EchoTokenizer
from app.engine.tokenizer.detokenize import MIN_LOGPROB, detokenize, detokenize_logprobs
from app.events import DetokenizedLogprob
from app.types import TokenLogprob


def test_each_token_has_its_text_its_bytes_and_its_alternatives():
    """In the order in which the model ranked them."""
    token = TokenLogprob(0xE9, -0.5, ((97, -0.25), (0xE9, -0.5)))

    accent = DetokenizedLogprob("é", b"\xc3\xa9", -0.5, token_id=0xE9)
    expected = DetokenizedLogprob(
        "é", b"\xc3\xa9", -0.5, (DetokenizedLogprob("a", b"a", -0.25, token_id=97), accent), 0xE9
    )
    assert (expected,) == detokenize_logprobs([token], EchoTokenizer())


@pytest.mark.parametrize("odd", [float("-inf"), float("nan"), -1e30])
def test_an_impossible_token_has_a_number_that_json_can_say(odd: float):
    """Also where it stands among the alternatives."""
    (token,) = detokenize_logprobs([TokenLogprob(97, odd, ((98, odd),))], EchoTokenizer())

    assert (MIN_LOGPROB, MIN_LOGPROB) == (token.logprob, token.top[0].logprob)


def test_a_prompt_of_tokens_has_the_text_of_all_of_them():
    """A control token has none."""
    control = max(EchoTokenizer().encode_chat(()))

    assert "hié" == detokenize(EchoTokenizer(), (104, control, 105, 0xE9))
