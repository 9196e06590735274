"""Texts to the ids that an encoder reads: what transformers' own tokenizer makes of them."""

from pathlib import Path

import pytest

from app.engine.tokenizer.encoder_tokenizer import EncoderTokenizer
from app.errors import InvalidRequest
from tests.unit.tiny_encoders import wordpiece_tokenizer
from tests.unit.tiny_models import llama_tokenizer, save

TOKENIZER = wordpiece_tokenizer()
TEXTS = ("The cat sat on a mat.", "", " ", "zebra [SEP] x [MASK]", "ünï ☃ 中文", "dog\nran")


@pytest.fixture
def tokenizer(tmp_path: Path) -> EncoderTokenizer:
    return EncoderTokenizer(save(TOKENIZER, tmp_path))


@pytest.mark.parametrize("most", [None, 64, 5, 3, 2])
def test_texts_are_encoded_and_cut_as_transformers_does(most: int | None, tokenizer: EncoderTokenizer):
    expected = TOKENIZER(list(TEXTS), truncation=most is not None, max_length=most).input_ids
    assert tuple(map(tuple, expected)) == tokenizer.encode(TEXTS, truncate=most).token_ids


def test_a_prompt_stands_in_front_of_each_text_and_its_tokens_are_counted(tokenizer: EncoderTokenizer):
    encoded = tokenizer.encode(["the cat"], prompt="query: ")
    assert tuple(TOKENIZER("query: the cat").input_ids) == encoded.token_ids[0]
    assert len(TOKENIZER("query: ").input_ids) - 1 == encoded.prompt_tokens


def test_the_tokenizers_own_ids_stay_as_they_are(tokenizer: EncoderTokenizer):
    given = tuple(TOKENIZER("the cat sat").input_ids)
    assert (given,) == tokenizer.encode([given]).token_ids


def test_cut_ids_end_as_every_text_does(tokenizer: EncoderTokenizer):
    given = tuple(TOKENIZER("the cat sat on a mat").input_ids)
    cut = tuple(TOKENIZER("the cat sat on a mat", truncation=True, max_length=4).input_ids)
    assert (cut,) == tokenizer.encode([given], truncate=4).token_ids


@pytest.mark.parametrize("given", [(7, 8, 9), (2, 7, 8), (7, 8, 3)])
def test_ids_of_another_tokenizer_are_refused_with_what_to_do(given: tuple[int, ...], tokenizer: EncoderTokenizer):
    """The vectors of such ids would look like any others."""
    with pytest.raises(InvalidRequest, match=r"at index 1 .* check_embedding_ctx_length=False"):
        tokenizer.encode(["the cat", given])


def test_a_tokenizer_without_special_tokens_around_a_text_takes_any_ids(tmp_path: Path):
    bare = llama_tokenizer()
    from tokenizers.processors import ByteLevel

    bare.backend_tokenizer.post_processor = ByteLevel()
    tokenizer = EncoderTokenizer(save(bare, tmp_path))
    assert ((7, 8),) == tokenizer.encode([(7, 8)]).token_ids


def test_decoding_leaves_special_tokens_out(tokenizer: EncoderTokenizer):
    assert "the cat" == tokenizer.decode(TOKENIZER("the cat").input_ids)


def test_a_text_that_cannot_be_encoded_is_the_clients_fault(tokenizer: EncoderTokenizer):
    with pytest.raises(InvalidRequest, match="cannot encode"):
        tokenizer.encode(["half a pair \ud800"])
