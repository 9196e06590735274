"""A text encoded by segments has the tokens of the whole, and a segment is encoded once."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Encoding, models
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer import segment_cache as segments
from app.engine.tokenizer.segment_cache import SegmentEncoder, TenantSegments, borders_among, forget_words
from app.types import Tenant
from tests.unit.tiny_models import chatml_tokenizer, gemma_tokenizer, llama_tokenizer

FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": chatml_tokenizer,
    "llama": llama_tokenizer,
    "gemma": gemma_tokenizer,
}
ANNA, BERT, CARLA = map(Tenant.owner, ("anna", "bert", "carla"))
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

    assert expected == encoder.encode(text, ANNA) == encoder.encode(text, ANNA) == encoder.encode(text)


def test_the_next_turn_encodes_what_is_new() -> None:
    tokenizer, added = vocabulary("chatml")
    counting: Any = Counting(tokenizer)
    encoder = SegmentEncoder(counting, added, "<|im_end|>")
    turn = "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\n"
    encoder.encode(turn, ANNA)
    counting.seen.clear()

    encoder.encode(f"{turn}Two<|im_end|>\n<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n", ANNA)

    assert [
        "<|im_end|>\n<|im_start|>assistant\nTwo",
        "<|im_end|>\n<|im_start|>user\nThree",
    ] == counting.seen


def test_a_text_too_long_to_be_kept_is_encoded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "REMEMBERED_TOKENS", 8)
    tokenizer, added = vocabulary("chatml")
    encoder = SegmentEncoder(tokenizer, added, "<|im_end|>")

    for text in ("word " * 20, "short", "word " * 20):
        assert tokenizer.encode(text, add_special_tokens=False).ids == encoder.encode(text, ANNA)


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

    SegmentEncoder(counting, added, "<start_of_turn>").encode("<start_of_turn>a<end_of_turn><start_of_turn>b", ANNA)

    assert ["<start_of_turn>a<end_of_turn>", "<start_of_turn>b"] == counting.seen


def test_what_one_tenant_has_sent_is_encoded_anew_for_another() -> None:
    """Also where their owners' names look like each other's ids; and a text of nobody's is never remembered."""
    tokenizer, added = vocabulary("chatml")
    counting: Any = Counting(tokenizer)
    encoder = SegmentEncoder(counting, added, "<|im_end|>")
    text = "<|im_start|>user\nMy word is swordfish<|im_end|>"

    for tenant in (ANNA, BERT, Tenant.key("anna"), None, None, ANNA, BERT):
        encoder.encode(text, tenant)

    whole = [seen for seen in counting.seen if "swordfish" in seen]
    assert 5 == len(whole)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def remember(remembered: TenantSegments, tenant: Tenant, name: str, tokens: int) -> None:
    """Let a tenant encode one segment of so many tokens."""
    remembered.of(tenant)[name] = array("I", range(tokens - 1))
    remembered.trim()


def test_a_tenant_below_its_share_loses_nothing_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many tokens, whoever has most of them loses what it used least recently."""
    monkeypatch.setattr(segments, "REMEMBERED_TOKENS", 100)
    remembered = TenantSegments()
    remember(remembered, ANNA, "hers", 30)
    for number in range(50):
        remember(remembered, BERT, f"flood {number}", 10)
        remember(remembered, CARLA, "hers", 20)

    assert remembered.tokens <= 100
    assert "hers" in remembered.of(ANNA)
    assert "hers" in remembered.of(CARLA)
    assert [f"flood {number}" for number in range(45, 50)] == list(remembered.of(BERT))


def test_the_number_of_tenants_and_their_tokens_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that encoded last stay."""
    monkeypatch.setattr(segments, "REMEMBERED_TENANTS", 3)
    monkeypatch.setattr(segments, "REMEMBERED_TOKENS", 50)
    remembered = TenantSegments()
    for number in range(20):
        remember(remembered, Tenant.key(str(number)), "text", 20)
        assert remembered.tokens <= 50

    assert {Tenant.key("18"), Tenant.key("19")} <= set(remembered.tenants)
    assert len(remembered.tenants) <= 3


def test_what_a_tenant_no_longer_sends_is_forgotten() -> None:
    """The texts too, which would stay in memory otherwise."""
    clock = Clock()
    remembered = TenantSegments(clock)
    remember(remembered, ANNA, "old", 10)
    clock.seconds = segments.REMEMBERED_SECONDS + 1
    remember(remembered, BERT, "new", 10)

    assert (BERT,) == remembered.tenants
    assert 10 == remembered.tokens


@pytest.mark.parametrize("kind", [models.BPE, models.Unigram])
def test_the_library_still_has_the_switch_for_its_cache_of_words(kind: Any) -> None:
    """It is not documented: a new version that renames it has to be looked at."""
    tokenizer = FastTokenizer(kind())
    forget_words(tokenizer)

    assert callable(tokenizer.model._resize_cache)
    assert not hasattr(FastTokenizer(models.WordLevel()).model, "_resize_cache")
