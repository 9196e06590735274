"""What a token says on its own, in vocabularies of each kind."""

from pathlib import Path

import pytest

from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from tests.unit.tiny_models import chatml_tokenizer, gemma_tokenizer, llama_tokenizer, save, token_id

FAMILIES = {"chatml": chatml_tokenizer, "llama": llama_tokenizer, "gemma": gemma_tokenizer}


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return HfTokenizer(save(FAMILIES[request.param](), tmp_path_factory.mktemp(request.param)))


@pytest.mark.parametrize("text", ["hello world, who said hello", "née Ωmega 漢字 🙂", "tabs\tand\nlines  two spaces"])
def test_the_tokens_of_a_text_are_its_bytes(tokenizer: HfTokenizer, text: str):
    """Joined, nothing is missing and nothing added, but the space that some vocabularies put in front."""
    in_front = len(tokenizer.encode_text(""))
    ids = tokenizer.encode_text(text)[in_front:]

    joined = b"".join(map(tokenizer.token_bytes, ids))

    assert joined in (text.encode(), b" " + text.encode())


def test_a_part_of_a_character_is_its_byte_and_is_marked_in_text(tokenizer: HfTokenizer):
    """Each of the four tokens of an emoji has one byte."""
    ids = tokenizer.encode_text("🙂")[-4:]

    assert [bytes([byte]) for byte in "🙂".encode()] == [tokenizer.token_bytes(each) for each in ids]
    assert ["\ufffd"] * 4 == [tokenizer.token_text(each) for each in ids]


def test_a_token_keeps_its_leading_space(tokenizer: HfTokenizer):
    """As it stands in mid-text, where a decoder of the whole text would have left it."""
    texts = [tokenizer.token_text(each) for each in tokenizer.encode_text("a hello")]

    assert "".join(texts).endswith("a hello")


def test_a_control_token_says_its_name(tmp_path: Path):
    """Marked special or not; it is no text of a completion, but a reader of alternatives has to know it."""
    original = chatml_tokenizer()
    tokenizer = HfTokenizer(save(original, tmp_path))
    names = ["<|im_end|>", "<|im_start|>", "<think>"]

    assert names == [tokenizer.token_text(token_id(original, name)) for name in names]


def test_a_number_that_is_no_token_says_nothing(tokenizer: HfTokenizer):
    """Models round their vocabulary up; such a token can stand among the alternatives."""
    assert (b"", "") == (tokenizer.token_bytes(100_000), tokenizer.token_text(100_000))
