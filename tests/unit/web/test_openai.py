"""What the OpenAI dialect decides without a request: fingerprints, text offsets of tokens."""

import json
from dataclasses import replace

from app.engine.base import EngineInfo
from app.events import DetokenizedLogprob
from app.web.http.json_encoding import encode_json
from app.web.openai.response_objects import TextLogprobs, fingerprint

INFO = EngineInfo(
    model="m",
    revision=None,
    engine="batching",
    device="cpu",
    dtype="float32",
    context_length=99,
    vocab_size=9,
    parameters=1,
)


def test_another_model_or_another_machine_has_another_fingerprint():
    others = [replace(INFO, revision="abc"), replace(INFO, dtype="bfloat16"), replace(INFO, device="cuda")]

    assert 4 == len({fingerprint(each) for each in (INFO, *others)})
    assert fingerprint(INFO) == fingerprint(replace(INFO))


def test_offsets_are_places_in_the_text_also_where_a_character_has_several_tokens():
    """A character counts with the token that completes it; each delta continues where the one before ended."""
    parts = [b"a", "\u20ac".encode()[:1], "\u20ac".encode()[1:], b"bc", b"d"]
    tokens = [DetokenizedLogprob(part.decode(errors="replace"), part, -1.0) for part in parts]
    logprobs = TextLogprobs()

    assert [0, 1, 1] == logprobs.next_object(tokens[:3])["text_offset"]
    assert [2, 4] == logprobs.next_object(tokens[3:])["text_offset"]


def test_the_token_itself_is_always_among_the_likely_ones():
    token = DetokenizedLogprob("x", b"x", -3.0, (DetokenizedLogprob("y", b"y", -0.1),))

    encoded = json.loads(encode_json(TextLogprobs().next_object([token])))

    assert [{"y": -0.1, "x": -3.0}] == encoded["top_logprobs"]


def test_tokens_of_equal_text_are_as_many_entries():
    """The generated one keeps its text, by which clients find it; another has its bytes or its id for a name."""
    others = [(b"\xe2", 7), (b"\xe3", 8), (b"x", 9), (b"x", 10), (b"\xe2", 11)]
    top = tuple(
        DetokenizedLogprob(raw.decode(errors="replace"), raw, -float(number), token_id=number) for raw, number in others
    )
    token = DetokenizedLogprob("\ufffd", b"\xe3", -8.0, top, token_id=8)

    (encoded,) = json.loads(encode_json(TextLogprobs().next_object([token])))["top_logprobs"]

    expected = {"bytes:\\xe2": -7.0, "\ufffd": -8.0, "x": -9.0, "token_id:10": -10.0, "token_id:11": -11.0}
    assert expected == encoded
    assert [*expected] == [*encoded]
