"""JSON as the service sends it: the bytes of the standard library's compact encoder."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.web.http.json_encoding import EncodedJsonResponse, encode_json, encode_segments, exact_float

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)


LINE_ENDS: dict[str, str | int | None] = {character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def standard(value: Any) -> bytes:
    encoded = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return encoded.translate(str.maketrans(LINE_ENDS)).encode()


@given(values)
@settings(deadline=None)
def test_plain_data_has_the_bytes_of_the_standard_encoder(value: Any):
    assert standard(value) == encode_json(value) == EncodedJsonResponse(value).body


@pytest.mark.parametrize("encode", [encode_json, lambda data: b"".join(encode_segments(data))])
def test_json_is_one_line_to_every_client(encode: Callable[[Any], bytes]):
    """Those too that end lines wherever Unicode does."""
    text = "".join(map(chr, range(0x3000)))

    encoded = encode({text: [text]})

    assert [encoded.decode()] == encoded.decode().splitlines()
    assert {text: [text]} == json.loads(encoded)


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_floats_have_the_digits_of_the_standard_encoder(number: float):
    assert standard({"a": [number]}) == encode_json({"a": [exact_float(number)]})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_json_number_is_refused(number: float):
    with pytest.raises(ValueError, match="not a JSON number"):
        exact_float(number)


def test_a_subclass_of_str_is_encoded_as_its_text():
    """LangChain's messages carry their text as one."""

    class Text(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "another text"

    assert standard({"content": "ä"}) == standard({"content": Text("ä")}) == encode_json({"content": Text("ä")})


def test_what_has_no_json_form_is_refused():
    with pytest.raises(TypeError, match="object has no JSON form"):
        encode_json({"a": object()})


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(UnicodeEncodeError):
        encode_json({"a": "\ud800"})
