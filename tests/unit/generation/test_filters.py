"""Where personal data is filtered, and that a broken filter lets nothing through."""

from collections import Counter
from collections.abc import AsyncIterator

import pytest

from app.engine.base import Chunk, GenerationRequest
from app.engine.echo import EchoEngine
from app.errors import PiiBlocked, ServiceUnavailable
from app.generation.filters import THREAD_CHARS, FilteredEngine, InputFilter
from app.generation.pii import PiiKind, Redactor, StreamRedactor
from app.types import FinishReason, Params

CANARY = "jane.doe@example.com"


@pytest.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    engine = EchoEngine()
    await engine.start()
    yield engine
    await engine.close()


def ask(text: str, max_tokens: int = 1000) -> GenerationRequest:
    return GenerationRequest("r", "t", tuple(map(ord, text)), Params(max_tokens=max_tokens))


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
