"""A text encoded by segments has the tokens of the whole, and a segment is encoded once."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer import segment_cache as segments
from app.engine.tokenizer.segment_cache import SegmentEncoder, borders_among
from tests.unit.tiny_models import chatml_tokenizer, gemma_tokenizer, llama_tokenizer

FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": chatml_tokenizer,
    "llama": llama_tokenizer,
    "gemma": gemma_tokenizer,
}
GREEDY = (
    AddedToken("<left>", lstrip=True, normalized=False),
    AddedToken("<right>", rstrip=True, normalized=False),
    AddedToken("<word>", single_word=True, normalized=False),
    AddedToken("<Normal>", normalized=True),
    AddedToken("<<", normalized=False),
    AddedToken("<a|", normalized=False),
    AddedToken("|b>", normalized=False),
    AddedToken("<plain>", normalized=False),
)
"""Tokens that take from their surroundings, or lie inside of others."""


class Counting:
    """A tokenizer that notes what it encodes."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self.seen: list[str] = []
        self._tokenizer = tokenizer

    def encode_batch_fast(self, texts: Sequence[str], **settings: Any) -> list[Encoding]:
        self.seen += texts
        return self._tokenizer.encode_batch_fast(texts, **settings)


def vocabulary(family: str, *, greedy: bool = False) -> tuple[FastTokenizer, list[AddedToken]]:
    tokenizer = FAMILIES[family]()
    if greedy:
        tokenizer.add_tokens(list(GREEDY))
    return tokenizer.backend_tokenizer, list(tokenizer.added_tokens_decoder.values())


VOCABULARIES = {(family, greedy): vocabulary(family, greedy=greedy) for family in FAMILIES for greedy in (False, True)}


@pytest.mark.parametrize(("family", "greedy"), VOCABULARIES)
@given(data=st.data())
def test_segments_have_the_tokens_of_the_whole_text(family: str, greedy: bool, data: st.DataObject) -> None:
    """Whatever stands around its control tokens, whatever they take from it, and when they are known already."""
    tokenizer, added = VOCABULARIES[family, greedy]
    words = [
        "a",
        "Hello",
        " ",
        "  ",
        "\n",
        "<",
        "<a",
        "|b>",
        "<n",
        ">",
        "é",
        "normal",
        *(each.content for each in added),
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=20)))
    encoder = SegmentEncoder(tokenizer, added, " ".join(each.content for each in added))

    expected = tokenizer.encode(text, add_special_tokens=False).ids

    assert expected == encoder.encode(text) == encoder.encode(text)


def test_the_next_turn_encodes_what_is_new() -> None:
    tokenizer, added = vocabulary("chatml")
    counting: Any = Counting(tokenizer)
    encoder = SegmentEncoder(counting, added, "<|im_end|>")
    turn = "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n"
    encoder.encode(turn)
    counting.seen.clear()

    encoder.encode(f"{turn}Two<|im_end|>\n<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n")

    assert [
        "<|im_end|>\n<|im_start|>assistant\nTwo",
        "<|im_end|>\n<|im_start|>user\nThree",
    ] == counting.seen


def test_a_text_too_long_to_be_kept_is_encoded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "REMEMBERED_TOKENS", 8)
    tokenizer, added = vocabulary("chatml")
    encoder = SegmentEncoder(tokenizer, added, "<|im_end|>")

    for text in ("word " * 20, "short", "word " * 20):
        assert tokenizer.encode(text, add_special_tokens=False).ids == encoder.encode(text)


def test_tokens_that_take_from_their_surroundings_are_no_borders() -> None:
    """Space before them, words that they must stand beside, a longer token that begins before; itself, one place on."""
    assert [] == borders_among(GREEDY)
    assert ["|b>", "<plain>"] == borders_among(
        [each for each in GREEDY if each.content in {"|b>", "<plain>", "<word>"}]
    )


def test_tokens_that_no_template_writes_are_no_borders() -> None:
    """Some vocabularies have thousands, and looking for all of them in a text would take longer than encoding it."""
    tokenizer, added = vocabulary("gemma")
    counting: Any = Counting(tokenizer)

    SegmentEncoder(counting, added, "<start_of_turn>").encode("<start_of_turn>a<end_of_turn><start_of_turn>b")

    assert ["<start_of_turn>a<end_of_turn>", "<start_of_turn>b"] == counting.seen
