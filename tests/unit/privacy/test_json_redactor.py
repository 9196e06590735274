"""Personal data inside the strings of JSON is masked, and what was JSON stays JSON."""

import asyncio
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.privacy.json_redactor import JsonRedactor, TaggedRedactor, redact_json
from app.privacy.pool import RedactionPool
from app.privacy.redactor import PiiKind, Redactor

REDACTOR = Redactor()
POOL = RedactionPool(REDACTOR)
MAIL, CARD = "jane.doe@example.com", "4111 1111 1111 1111"

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [MAIL, CARD, f"to {MAIL}, now", '"', "\\", "\n", "é🙂", "\ud83d", f'"{MAIL}"', f"\\{MAIL}\\n", "[EMAIL]"]
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


async def redacted(text: str, sizes: tuple[int, ...] = (), *, cut: bool = False) -> str:
    """Feed the text in chunks of these sizes, over and over; without any, whole."""
    stream, parts, at = JsonRedactor(REDACTOR, POOL, "t"), list[str](), 0
    while at < len(text):
        size = sizes[len(parts) % len(sizes)] if sizes else len(text)
        parts.append(await stream.feed(text[at : at + size]))
        at += size
    return "".join([*parts, stream.finish(cut=cut)])


def strings(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case list():
            return [text for each in value for text in strings(each)]
        case dict():
            return [text for pair in value.items() for each in pair for text in strings(each)]
    return []


@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]), sizes=st.tuples(st.integers(1, 9)))
@example(value={"to": MAIL, "n": [4111111111111111, -1.5e3, True]}, ascii_only=True, indent=None, sizes=(1,))
@example(value=["jane.doe@", "example.com", f"{MAIL}\\"], ascii_only=False, indent=None, sizes=(3,))
def test_json_stays_json_however_it_comes(value: Any, ascii_only: bool, indent: int | None, sizes: tuple[int, ...]):
    """Numbers and structure are the model's own, no string shows an address, and every chunking gives the same."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    whole = asyncio.run(redacted(text))

    clean = json.loads(whole)
    assert MAIL not in whole
    assert len(strings(value)) == len(strings(clean)) or isinstance(value, dict)
    assert whole == asyncio.run(redacted(text, sizes))
    assert whole.encode()  # half of a surrogate pair would be none


@given(value=VALUES, sizes=st.tuples(st.integers(1, 9)), share=st.floats(0, 1), cut=st.booleans())
def test_a_text_that_breaks_off_is_redacted_the_same_however_it_comes(
    value: Any, sizes: tuple[int, ...], share: float, cut: bool
):
    text = json.dumps(value)
    text = text[: round(len(text) * share)]

    whole = asyncio.run(redacted(text, cut=cut))

    assert MAIL not in whole
    assert whole == asyncio.run(redacted(text, sizes, cut=cut))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'{{"to": "{MAIL}"}}', '{"to": "[EMAIL]"}'),
        ('{"to": "jane.doe\\u0040example.com"}', '{"to": "[EMAIL]"}'),
        (f'{{"{MAIL}": 1}}', '{"[EMAIL]": 1}'),
        (f'["a\\n{MAIL}\\"", "\\ud83d\\ude42\\/"]', '["a\\n[EMAIL]\\"", "🙂/"]'),
        ('{"card": 4111111111111111}', '{"card": 4111111111111111}'),
        (f'{{"card": "{CARD}"}}', '{"card": "[CARD]"}'),
        ('["jane.doe@", "example.com"]', '["jane.doe@", "example.com"]'),
        ('"a\\q"', '"a\\\\q"'),
    ],
)
async def test_only_what_a_string_stands_for_is_masked(text: str, expected: str):
    """Escapes are read before; numbers that are no strings pass, as does what is parted by quotes."""
    assert expected == await redacted(text)


@pytest.mark.parametrize(
    "text",
    [f"{{'to': '{MAIL}'}}", f"{{}} {MAIL}", f"to {MAIL}", f"[{MAIL}]", f'{{"a": 1}} 4 {CARD}', f'{{"a": x{MAIL}'],
)
@pytest.mark.parametrize("size", [1, 5, 100])
async def test_what_is_no_json_is_redacted_like_any_text(text: str, size: int):
    """So that no malformed call carries personal data past the filter."""
    clean = await redacted(text, (size,))

    assert MAIL not in clean
    assert CARD[5:] not in clean
    assert "[EMAIL]" in clean or "[CARD]" in clean


async def test_a_text_that_is_cut_shows_no_beginning_of_an_entity():
    """What may have begun an address in the last string is left out."""
    clean = await redacted('{"to": "Write. jane.doe@exa', cut=True)
    assert clean.startswith('{"to": "')
    assert "jane" not in clean
    assert '{"n": 12' == await redacted('{"n": 12', cut=True)


async def test_entities_are_counted_over_all_strings():
    found = await redact_json(POOL, REDACTOR, "t", f'["{MAIL}", {{"a": "{MAIL} {CARD}"}}]')

    assert {PiiKind.EMAIL: 2, PiiKind.CARD: 1} == found.counts


async def redacted_with_tags(text: str, size: int, *, cut: bool = False) -> str:
    stream = TaggedRedactor(REDACTOR, POOL, "t", ["<call>", "<call>id=", "<f="])
    parts = [await stream.feed(text[at : at + size]) for at in range(0, len(text), size)]
    return "".join([*parts, stream.finish(cut=cut)])


@given(values=st.lists(VALUES, min_size=1, max_size=3), size=st.integers(1, 9))
@example(values=[{"phone": 15550100999, "to": MAIL}, 15550100999], size=4)
@example(values=["<call>", {"a": '} </call> \\"'}], size=1)
def test_json_behind_a_mark_stays_json_and_the_text_around_it_is_redacted(values: list[Any], size: int):
    """The same for every chunking; a mark inside a string begins nothing."""
    text = "".join(f"I ask {MAIL}: <call>{json.dumps(value)}</call>\n" for value in values) + f"<cal {MAIL}"

    whole = asyncio.run(redacted_with_tags(text, len(text)))

    assert whole == asyncio.run(redacted_with_tags(text, size))
    assert MAIL not in whole
    decoder, rest = json.JSONDecoder(), whole
    for value in values:
        rest = rest.removeprefix("I ask [EMAIL]: <call>")
        found, end = decoder.raw_decode(rest)
        assert type(found) is type(value)
        rest = rest[end:].removeprefix("</call>\n")
    assert rest == "<cal [EMAIL]"


@pytest.mark.parametrize("size", [1, 3, 100])
async def test_the_longest_mark_that_fits_is_the_one(size: int):
    """A shorter one that begins like it waits for what comes."""
    assert (
        await redacted_with_tags('<call>id={"n": 15550100999} 555-010-0999', size)
        == '<call>id={"n": 15550100999} [PHONE]'
    )


@pytest.mark.parametrize("size", [1, 100])
async def test_tagged_json_that_is_cut_shows_no_beginning_of_an_entity(size: int):
    """Neither in the JSON nor behind it."""
    assert await redacted_with_tags('<f={"to": "jane.doe@exam', size, cut=True) == '<f={"to": "'
    assert await redacted_with_tags("<f=1> to jane.doe@exam", size, cut=True) == "<f=1> to "


async def test_entities_are_counted_in_the_text_and_in_its_json():
    """Those of earlier parts among them."""
    stream = TaggedRedactor(REDACTOR, POOL, "t", ["<f="])

    await stream.feed(f'{MAIL} <f=["{MAIL}"]> {MAIL} ')
    stream.finish()

    assert stream.counts == {PiiKind.EMAIL: 3}
