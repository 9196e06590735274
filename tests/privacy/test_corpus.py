"""What is found in a corpus of invented texts, and what is left alone, with the service's default settings."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stdnum import iban, luhn

from app.config import PiiConfig
from app.privacy.patterns import PHONE_REGIONS
from app.privacy.redactor import PiiKind, StreamRedactor
from tests.examples import examples
from tests.privacy.corpus import Sample, default_redactor, samples, table

PERSONAL, HARMLESS = samples("personal"), samples("harmless")
REDACTOR = default_redactor()
TEXTS = [sample.text for sample in [*PERSONAL, *HARMLESS]]


def test_the_corpus_is_large_enough_to_say_something() -> None:
    """A hundred texts of each sort, twelve languages, every kind five times or more."""
    kinds = [kind for sample in PERSONAL for kind, _ in sample.entities]

    assert min(len(PERSONAL), len(HARMLESS)) >= 100
    assert min(len({sample.language for sample in part}) for part in (PERSONAL, HARMLESS)) >= 12
    assert all(kinds.count(kind) >= 4 for kind in PiiKind)
    assert not any(sample.entities for sample in HARMLESS)


def test_the_corpus_has_valid_check_digits() -> None:
    """Cards and accounts are what they are said to be."""
    for kind, value in (entity for sample in PERSONAL for entity in sample.entities):
        if kind is PiiKind.CARD:
            assert luhn.is_valid("".join(str(int(character)) for character in value if character.isdigit())), value
        elif kind is PiiKind.IBAN:
            assert iban.is_valid("".join(value.split())), value


@pytest.mark.parametrize("sample", PERSONAL, ids=lambda sample: ascii(sample.text)[:60])
def test_no_personal_data_of_the_corpus_passes(sample: Sample) -> None:
    """Each is replaced by the placeholder of its kind, as a whole, and the text around it is not."""
    assert sample.expected == REDACTOR.redact(sample.text).text


def test_harmless_texts_of_the_corpus_pass_unchanged() -> None:
    """All but two in a hundred."""
    changed = [sample.text for sample in HARMLESS if REDACTOR.redact(sample.text).text != sample.text]

    assert len(changed) <= 0.02 * len(HARMLESS), changed


@examples(200)
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3), st.sampled_from(["\n", " ", ", ", ""]), st.integers())
def test_texts_of_the_corpus_streamed_in_any_chunks_equal_the_whole(texts: list[str], glue: str, seed: int) -> None:
    """Text and counts; the redacted text is not redacted any further."""
    text, chunks = glue.join(texts), random.Random(seed)
    expected = REDACTOR.redact(text)

    stream, output, at = StreamRedactor(REDACTOR), "", 0
    while at < len(text):
        size = chunks.choice((1, 1, 2, 3, 5, 8, 13, 40))
        output += stream.feed(text[at : at + size])
        at += size
    output += stream.finish()

    assert (expected.text, expected.counts) == (output, stream.counts)
    assert expected.text == REDACTOR.redact(expected.text).text


def test_the_documented_figures_are_those_of_the_corpus() -> None:
    """docs/privacy.md shows what `python -m tests.privacy.corpus` prints."""
    assert table() in (Path(__file__).parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")


def test_the_redactors_default_regions_are_the_settings() -> None:
    assert PHONE_REGIONS == PiiConfig().phone_regions
