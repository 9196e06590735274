"""The strict reader against the standard one: the same values, or a refusal; nothing else."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.web.http.json_body import MAX_DEPTH, parse

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=30,
)


@given(values, st.booleans())
@settings(deadline=None)
def test_plain_values_are_read_as_they_were_written(value: Any, ascii_only: bool):
    assert value == parse(json.dumps(value, ensure_ascii=ascii_only).encode())


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes_are_read_like_the_standard_reader_does_or_refused(body: bytes):
    """Never another exception, and never a value that the standard reader would not give."""
    try:
        value = parse(body)
    except InvalidRequest:
        return
    assert value == json.loads(body.decode())


@given(st.text(st.characters(codec=None) | st.sampled_from("\x00\ud83d\ude00\udfff"), max_size=6), st.booleans())
@settings(deadline=None)
def test_texts_that_cannot_be_passed_on_are_refused_wherever_they_stand(text: str, as_key: bool):
    """Halves of surrogate pairs, as escapes; two halves that stand together are one character.  NUL is a character."""
    body = json.dumps([{text: 1}] if as_key else [{"key": [text]}]).encode()
    expected = json.loads(body)
    read = "".join(expected[0]) if as_key else expected[0]["key"][0]

    if any(0xD800 <= ord(character) <= 0xDFFF for character in read):
        with pytest.raises(InvalidRequest):
            parse(body)
    else:
        assert expected == parse(body)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_counted_to_the_last_level(opening: str, closing: str):
    assert parse((opening * MAX_DEPTH + "1" + closing * MAX_DEPTH).encode())
    with pytest.raises(InvalidRequest, match="deep"):
        parse((opening * (MAX_DEPTH + 1) + "1" + closing * (MAX_DEPTH + 1)).encode())


def test_surrogate_pairs_are_one_character():
    assert ["😀"] == parse(b'["\\ud83d\\ude00"]')


def test_errors_name_a_place_and_not_the_text():
    with pytest.raises(InvalidRequest) as raised:
        parse(b'{"a": secret}')

    assert "line 1, column 7" in raised.value.message
    assert "secret" not in raised.value.message + str(raised.value.details)
