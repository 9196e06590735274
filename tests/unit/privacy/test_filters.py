"""Where personal data is filtered, and that a broken filter lets nothing through."""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.engine.base import Chunk, GenerationRequest
from app.engine.echo import EchoEngine
from app.errors import PiiBlocked, ServiceUnavailable
from app.privacy.filters import THREAD_CHARS, FilteredEngine, InputFilter
from app.privacy.redactor import PiiKind, Redactor, StreamRedactor
from app.types import FinishReason, SamplingParams, TokenLogprob, Usage

CANARY = "jane.doe@example.com"


@pytest.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    engine = EchoEngine()
    await engine.start()
    yield engine
    await engine.close()


def ask(text: str, max_tokens: int = 1000) -> GenerationRequest:
    return GenerationRequest("r", "t", tuple(map(ord, text)), SamplingParams(max_tokens=max_tokens))


def counting() -> tuple[Counter[PiiKind], InputFilter, InputFilter]:
    found: Counter[PiiKind] = Counter()

    def count(kind: PiiKind, times: int) -> None:
        found[kind] += times

    redactor = Redactor()
    return found, InputFilter(redactor, "mask", count), InputFilter(redactor, "block", count)


async def test_input_is_masked_and_counted_by_kind() -> None:
    """Short texts and those worked on in a thread alike."""
    found, mask, _ = counting()
    padding = "word " * (THREAD_CHARS // 5)

    assert ["mail [EMAIL]", "hello"] == await mask.clean([f"mail {CANARY}", "hello"])
    assert [f"{padding}[EMAIL]"] == await mask.clean([padding + CANARY])
    assert {PiiKind.EMAIL: 2} == found


async def test_blocked_input_names_the_kinds_and_never_the_text() -> None:
    """Clean text passes unchanged; the rest is refused."""
    _, _, block = counting()

    assert ["hello"] == await block.clean(["hello"])
    with pytest.raises(PiiBlocked) as refused:
        await block.clean(["hello", f"mail {CANARY}"])

    assert {"kinds": ["email"]} == refused.value.details
    assert CANARY not in str(refused.value)


async def test_what_is_kept_is_masked_even_where_input_is_blocked_and_counts_as_no_match() -> None:
    """The reply that enters a session looks as it would if the client sent it back."""
    found, _, block = counting()

    assert "mail [EMAIL]" == await block.mask(f"mail {CANARY}")
    assert {} == found


async def test_a_broken_input_filter_refuses_and_does_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail closed: 503, without the text in message or cause."""
    _, mask, _ = counting()
    monkeypatch.setattr(Redactor, "redact", lambda self, text: 1 / 0)

    with pytest.raises(ServiceUnavailable) as refused:
        await mask.clean([CANARY])

    assert refused.value.__cause__ is None
    assert CANARY not in str(refused.value)


async def test_output_is_masked_though_it_comes_in_single_characters(engine: EchoEngine) -> None:
    """No chunk shows a part of it; usage and finish reason stay those of the model."""
    found: Counter[PiiKind] = Counter()
    filtered = FilteredEngine(engine, Redactor(), lambda kind, times: found.update({kind: times}))
    text = f"Write to {CANARY} or not."

    chunks = [chunk async for chunk in filtered.stream(ask(text))]

    assert "Write to [EMAIL] or not." == "".join(chunk.text for chunk in chunks)
    assert not any("@" in chunk.text or "jane" in chunk.text for chunk in chunks)
    assert {PiiKind.EMAIL: 1} == found
    usage = chunks[-1].usage
    assert usage is not None
    assert len(text) == usage.completion_tokens == sum(chunk.tokens for chunk in chunks)
    assert Chunk() == chunks[0]


async def test_a_broken_output_filter_ends_the_answer_with_content_filter(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing unfiltered is sent, the model is freed, and what it made is still counted."""
    fed = StreamRedactor.feed

    def breaks_at_the_third(self: StreamRedactor, delta: str) -> str:
        if delta == "c":
            raise ValueError(delta)
        return fed(self, delta)

    monkeypatch.setattr(StreamRedactor, "feed", breaks_at_the_third)
    filtered = FilteredEngine(engine, Redactor(), lambda kind, times: None)

    chunks = [chunk async for chunk in filtered.stream(ask("a b c d"))]

    assert FinishReason.CONTENT_FILTER == chunks[-1].finish_reason
    assert "c" not in "".join(chunk.text for chunk in chunks)
    assert chunks[-1].usage is not None
    assert 5 == chunks[-1].usage.completion_tokens
    assert 0 == engine.status().running


class SpeakingEngine(EchoEngine):
    """Says the given tokens, so many at once as told, each with its number for a log-probability."""

    def __init__(self, tokens: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__()
        self._tokens, self._sizes = tokens, sizes

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk()
        begin = 0
        for size in [*self._sizes, len(self._tokens)]:
            texts = self._tokens[begin : begin + size]
            if not texts:
                break
            logprobs = tuple(TokenLogprob(begin + number, 0.0) for number in range(len(texts)))
            ends = tuple(accumulate(map(len, texts)))
            yield Chunk(text="".join(texts), tokens=len(texts), logprobs=logprobs, token_ends=ends)
            begin += len(texts)
        yield Chunk(finish_reason=FinishReason.STOP, usage=Usage(1, len(self._tokens)))


async def shown(tokens: Sequence[str], sizes: Sequence[int] = ()) -> list[Chunk]:
    filtered = FilteredEngine(SpeakingEngine(tokens, sizes), Redactor(), lambda kind, times: None)
    request = GenerationRequest("r", "t", (1,), SamplingParams(max_tokens=1000, logprobs=0))
    return [chunk async for chunk in filtered.stream(request)]


def numbers(chunks: Sequence[Chunk]) -> list[int]:
    return [token.token_id for chunk in chunks for token in chunk.logprobs]


@pytest.mark.parametrize("sizes", [(), (1,) * 20, (2, 3, 1)], ids=["whole", "one by one", "in pieces"])
async def test_log_probabilities_end_where_the_first_mask_begins(sizes: tuple[int, ...]) -> None:
    """The token that reaches into the address is not told, nor is anything behind it; the text goes on."""
    tokens = ["Write", " to", " jane", ".doe", "@", "example", ".com", " or", " call", "."]

    chunks = await shown(tokens, sizes)

    assert "Write to [EMAIL] or call." == "".join(chunk.text for chunk in chunks)
    assert [0, 1] == numbers(chunks)


async def test_no_later_word_that_resembles_a_masked_one_brings_them_back() -> None:
    """The text goes on with the very letters that were masked before."""
    tokens = ["to ", "jane", ".doe", "@example.com", " or ", "jane", " or ", "jane", " x"]

    assert [0] == numbers(await shown(tokens, (1,) * 20))


async def test_log_probabilities_wait_for_text_that_is_held_back() -> None:
    """A chunk tells of no token whose text it does not hold yet, and all are told of a clean answer."""
    tokens = ["Ja", "ne", ".d", "oe", " is", " a", " na", "me"]

    chunks = await shown(tokens, (1,) * 20)

    told = list(accumulate(len(chunk.logprobs) for chunk in chunks))
    said = list(accumulate(len(chunk.text) for chunk in chunks))
    assert all(len("".join(tokens[:count])) <= length for count, length in zip(told, said, strict=True))
    assert list(range(len(tokens))) == numbers(chunks)


WORDS = st.sampled_from(
    [CANARY, "192.168.17.4", "4111 1111 1111 1111", "hello ", " ", "\n", "call 5, ", "é", "[EMAIL]"]
)


@given(st.lists(WORDS, max_size=6), st.lists(st.integers(0, 6), max_size=60), st.lists(st.integers(1, 5), max_size=40))
@example(["hello ", CANARY], [3] * 20, [1] * 20)
async def test_what_is_told_of_tokens_is_the_clean_beginning_however_they_come(
    words: list[str], cuts: list[int], sizes: list[int]
) -> None:
    """Exactly the tokens that end before the first difference between the model's text and the one let out."""
    raw = "".join(words)
    places = [0, *(min(at, len(raw)) for at in accumulate(cuts)), len(raw)]
    tokens = [raw[begin:end] for begin, end in pairwise(places)]
    redaction = Redactor().redact(raw)
    pairs = zip(raw, redaction.text, strict=False)
    clean = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), len(raw))
    expected = sum(end <= clean for end in places[1:])

    chunks = await shown(tokens, sizes)

    assert redaction.text == "".join(chunk.text for chunk in chunks)
    assert list(range(expected)) == numbers(chunks)
    assert [len(chunk.logprobs) for chunk in chunks] == [len(chunk.token_ends) for chunk in chunks]
