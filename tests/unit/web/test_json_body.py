"""The strict reader against the standard one: the same values, or a refusal; nothing else."""

import json
import math
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
    """Halves of surrogate pairs, as escapes; two adjacent halves are one character.  NUL is a character."""
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


keys = st.sampled_from(["a", "\\u0061", "b", ":", "\\u003a", "\\u003A", "\\\\u003a", "\\n:", "é", ""])
literals = st.sampled_from(
    ["1", "-0", "1e-7", '"x:y"', '"\\u003a"', '"[{"', "null", "[]", "{}", str(2**64), "-" + "9" * 31]
)
objects = st.lists(st.tuples(keys, literals), max_size=4).map(
    lambda pairs: "{" + ", ".join(f'"{key}" : {value}' for key, value in pairs) + "}"
)


@given(st.lists(objects, max_size=3))
@settings(deadline=None)
def test_a_key_twice_is_refused_however_it_is_escaped_and_nothing_else_is(members: list[str]):
    """Colons in keys and values, escaped or not, neither hide a second key nor look like one."""
    text = "[" + ",".join(members) + "]"
    pairs: list[list[tuple[str, Any]]] = []

    def record(found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        pairs.append(found)
        return found

    json.loads(text, object_pairs_hook=record)
    ambiguous = any(len({key for key, _ in found}) < len(found) for found in pairs)

    if ambiguous:
        with pytest.raises(InvalidRequest, match="names a key twice"):
            parse(text.encode())
    else:
        assert repr(json.loads(text)) == repr(parse(text.encode()))


@pytest.mark.parametrize("others", ["", "[],{}," * MAX_DEPTH])
@pytest.mark.parametrize("brackets", ['"[{[{"', '"' + "[" * 100 + '"'])
def test_brackets_in_a_text_or_beside_one_another_are_no_depth(others: str, brackets: str):
    text = f"[{others}{brackets}]"

    assert json.loads(text) == parse(text.encode())


@pytest.mark.parametrize("body", [b'"' + b"[" * 50 + b'"', b"0", b"[" * MAX_DEPTH + b"]" * MAX_DEPTH])
def test_any_value_may_stand_alone(body: bytes):
    assert json.loads(body) == parse(body)


@pytest.mark.parametrize(("number", "refused"), [("9" * 32, False), ("9" * 33, True), ("-" + "9" * 32, True)])
def test_integers_are_exact_up_to_their_greatest_length(number: str, refused: bool):
    body = f'{{"a": [{number}]}}'.encode()

    if refused:
        with pytest.raises(InvalidRequest, match="too many digits"):
            parse(body)
    else:
        assert {"a": [int(number)]} == parse(body)


@given(st.lists(st.sampled_from(["d800", "dbff", "dc00", "dfff", "0041", "D83D", "de00", "003a"]), max_size=4))
@settings(deadline=None)
def test_escapes_are_read_as_the_standard_reader_reads_them_or_refused(units: list[str]):
    body = ('"' + "".join(f"\\u{unit}" for unit in units) + '"').encode()
    expected = json.loads(body)

    if any(0xD800 <= ord(character) <= 0xDFFF for character in expected):
        with pytest.raises(InvalidRequest, match="surrogate"):
            parse(body)
    else:
        assert expected == parse(body)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["r", ".3e", ".20f", ".40e"]))
@settings(deadline=None)
def test_floats_are_read_as_the_standard_reader_reads_them(number: float, form: str):
    text = repr(number) if form == "r" else format(number, form)
    if math.isfinite(float(text)):
        assert repr(json.loads(f"[{text}]")) == repr(parse(f"[{text}]".encode()))
