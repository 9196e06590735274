"""How much text one token can stand for, and what is refused or cut by it without encoding it whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from app.engine.tokenizer import hf_tokenizer
from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.engine.tokenizer.prepare import PromptEncoder
from app.engine.tokenizer.token_length import TokenLength, TooManyTokensError, longest_token_bytes
from app.requests import GenerationRequest
from app.types import Message, Role, Tenant
from tests.examples import examples
from tests.unit.tiny_models import chatml_tokenizer, llama_tokenizer, save

TINY_CHAT = Path(__file__).parents[3] / "models" / "tiny-chat"
ALPHABET = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def described(backend: Tokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def byte_level(**changes: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


@pytest.mark.parametrize("make", [chatml_tokenizer, llama_tokenizer], ids=["byte level", "byte fallback"])
@given(text=st.text(max_size=200))
@examples(60)
def test_no_text_has_fewer_tokens_than_its_bytes_say(make: Any, text: str) -> None:
    """So a refusal by this bound is never wrong."""
    backend = make().backend_tokenizer
    longest = longest_token_bytes(described(backend))

    assert longest is not None
    assert len(text.encode()) <= longest * len(backend.encode(text, add_special_tokens=False).ids)


def test_nfc_may_make_a_text_three_times_as_short() -> None:
    plain, composing = byte_level(), byte_level(normalizer=normalizers.NFC())

    assert 1 == longest_token_bytes(described(plain))
    assert 3 == longest_token_bytes(described(composing))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": normalizers.Strip()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Replace(" ", "")},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])},
        {"model": models.BPE(vocab={"a": 0}, merges=[])},
        {"model": models.WordLevel(vocab={"a": 0, "<unk>": 1}, unk_token="<unk>")},
    ],
)
def test_a_tokenizer_that_may_lose_text_has_no_bound(changes: dict[str, Any]) -> None:
    assert longest_token_bytes(described(byte_level(**changes))) is None


def test_an_added_token_that_takes_spaces_with_it_has_no_bound() -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<x>", lstrip=True)])

    assert longest_token_bytes(described(backend)) is None


def test_what_is_too_long_in_any_case_is_told_without_encoding() -> None:
    """At the boundary it is not; without a bound or a window nothing is."""
    length = TokenLength(4, 10)  # ten bytes a token, with the marks of control tokens

    length.check("x" * 100)
    with pytest.raises(TooManyTokensError) as refused:
        length.check("x" * 101)
    assert 11 == refused.value.least_tokens
    with pytest.raises(TooManyTokensError):
        length.check("é" * 51)
    for unknown in (TokenLength(None, 10), TokenLength(4, None)):
        unknown.check("x" * 10_000)


def prompt_of(**fields: Any) -> GenerationRequest:
    return GenerationRequest(id="1", tenant=Tenant.owner("t"), **fields)


async def test_a_prompt_far_too_long_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a text nor a conversation, which is measured as the template writes it; the bound is handed on."""
    tokenizer = HfTokenizer(TINY_CHAT, context_length=64)
    encoder = PromptEncoder(tokenizer, vocab_size=2**16, seconds=20)
    text = "The capital of France is Paris. " * 500

    def refuse(*arguments: Any) -> None:
        raise AssertionError("it is encoded")

    monkeypatch.setattr(tokenizer, "encode_text", refuse)
    monkeypatch.setattr(hf_tokenizer, "encode_marked_chat", refuse)
    prompts = [prompt_of(text=text), prompt_of(messages=(Message(Role.USER, text),))]
    for prepared in [await encoder.encode(each) for each in prompts]:
        assert (True, None) == (prepared.is_lower_bound, prepared.prompt_ids)
        assert 64 < prepared.prompt_tokens < 5000
    encoder.close()
    tokenizer.close()


async def test_of_a_text_that_is_to_be_cut_only_the_end_is_encoded(tmp_path: Path) -> None:
    """Its last tokens are those of the whole text."""
    tokenizer = HfTokenizer(save(chatml_tokenizer(), tmp_path), context_length=16)
    encoder = PromptEncoder(tokenizer, vocab_size=2**16, seconds=20)
    text = "hello world, the end of the world said hello. " * 400

    prepared = await encoder.encode(prompt_of(text=text, truncate_prompt=0))
    whole = tokenizer.encode_text(text)

    assert prepared.prompt_ids is not None
    assert 16 < len(prepared.prompt_ids) < len(whole) / 2
    assert whole[-16:] == prepared.prompt_ids[-16:]
    encoder.close()
    tokenizer.close()
