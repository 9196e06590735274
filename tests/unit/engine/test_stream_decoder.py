"""A completion is what the model wrote behind the prompt, with every space that stands between the two."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from tests.unit.tiny_models import (
    chatml_tokenizer,
    llama_tokenizer,
    metaspace_tokenizer,
    save,
    token_id,
    wordpiece_tokenizer,
)

KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": chatml_tokenizer,
    "byte fallback": llama_tokenizer,
    "metaspace": metaspace_tokenizer,
    "wordpiece": wordpiece_tokenizer,
}


class Kind:
    """A tokenizer as transformers builds it, and the same one loaded by the service."""

    def __init__(self, original: PreTrainedTokenizerFast, folder: Path) -> None:
        self.original = original
        self.backend: FastTokenizer = original.backend_tokenizer
        self.loaded = HfTokenizer(save(original, folder))

    def whole(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=True))

    def completed(self, prompt: list[int], answer: list[int]) -> str:
        decoder = self.loaded.decoder(prompt)
        return "".join([*(decoder.feed([number]) for number in answer), decoder.finish()])


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(KINDS[request.param](), tmp_path_factory.mktemp("kind"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(chatml_tokenizer(), tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(llama_tokenizer(), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", ["byte fallback", "metaspace", "wordpiece"])
def test_the_first_word_of_a_completion_keeps_its_space(name: str, tmp_path: Path):
    """Where a decoder takes it from the first word of a text, the first word is the prompt's."""
    kind = Kind(KINDS[name](), tmp_path)
    prompt = kind.backend.encode("once upon a", add_special_tokens=False).ids
    answer = kind.backend.encode("once upon a time there", add_special_tokens=False).ids[len(prompt) :]

    assert " time there" == kind.completed(prompt, answer)


@given(st.data())
def test_any_completion_is_the_whole_text_without_the_prompts(kind: Kind, data: st.DataObject):
    """Special tokens and spaces anywhere, prompts of any length: the two joined are what transformers decodes."""
    tokens = st.integers(0, len(kind.original) - 1).filter(
        lambda number: b"\xff" > kind.loaded.token_bytes(number)[:1] < b"\x80"
    )
    prompt = data.draw(st.lists(tokens, max_size=60))
    answer = data.draw(st.lists(tokens, max_size=12))

    assert kind.whole([*prompt, *answer]) == kind.whole(prompt) + kind.completed(prompt, answer)


@pytest.mark.parametrize("cut", range(1, 12))
@pytest.mark.parametrize("name", ["byte-level", "byte fallback"])
def test_a_character_that_the_prompt_breaks_off_comes_with_the_completion(name: str, cut: int, tmp_path: Path):
    """However many of its bytes the prompt has; every other character is in one of the two and whole."""
    kind = Kind(KINDS[name](), tmp_path)
    text = "a é 中😀 b"
    ids = kind.backend.encode(text, add_special_tokens=False).ids
    prompt, answer = ids[:cut], ids[cut:]
    shown = b"".join(map(kind.loaded.token_bytes, prompt)).decode(errors="ignore").lstrip()

    assert text == shown + kind.completed(prompt, answer)


def test_a_prompt_of_bytes_without_words_is_cut_at_a_character(llama: Kind):
    """A long run of them is decoded as one text, which must not begin in the middle of a character."""
    prompt = llama.backend.encode("é" * 300 + "中" * 101, add_special_tokens=False).ids

    assert "中!" == llama.completed(prompt, llama.backend.encode("a中!", add_special_tokens=False).ids[-4:])


def test_a_replacement_character_that_ends_a_prompt_stays_the_prompts(kind: Kind):
    """It is a character like others; only a broken one is left to the completion."""
    prompt = kind.backend.encode("a \ufffd", add_special_tokens=False).ids
    answer = kind.backend.encode("a time", add_special_tokens=False).ids[1:]

    assert kind.completed(kind.backend.encode("a a").ids, answer) == kind.completed(prompt, answer)


def test_a_prompt_without_a_visible_token_leaves_the_completion_first(llama: Kind):
    """The space is the decoder's to take then, as it is for the whole text."""
    begin, word = token_id(llama.original, "<s>"), token_id(llama.original, "▁a")

    assert "a a" == llama.completed([begin], [word, word])
    assert " a" == llama.completed([word, *[begin] * 600], [word])


def test_the_end_of_a_long_prompt_suffices(chatml: Kind):
    """A prompt of a whole context window is not decoded for every completion: that would take 50 ms."""
    prompt = chatml.backend.encode("hello world " * 50_000).ids

    def seconds() -> float:
        started = time.thread_time()
        chatml.loaded.decoder(prompt)
        return time.thread_time() - started

    assert min(seconds() for _ in range(5)) < 0.005
