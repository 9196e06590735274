"""Where personal data is filtered, and that a broken filter lets nothing through."""

import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from app.engine.echo import EchoEngine
from app.errors import PiiBlocked, ServiceUnavailable
from app.events import Completion, Delta, DetokenizedLogprob, Event, Started, ToolCallDelta, collect, finish
from app.privacy.filters import FilteredEngine, InputFilter
from app.privacy.pool import INLINE_CHARS, RedactionPool
from app.privacy.redactor import PiiKind, Redactor, StreamRedactor
from app.requests import GenerationRequest
from app.types import FinishReason, Grammar, SamplingParams, Tenant, ToolCall, Usage
from app.web.http.structured_output import TaggedStructure, tag_grammar
from tests.unit.event_streams import deltas_of, finished_of, logprobs_of, read, text_of

CANARY = "jane.doe@example.com"


@pytest.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    engine = EchoEngine()
    await engine.start()
    yield engine
    await engine.close()


def make_request(text: str, *, stream: bool = True) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=1000)
    return GenerationRequest(
        id="r", tenant=Tenant.owner("t"), prompt_ids=tuple(map(ord, text)), sampling=sampling, stream=stream
    )


def counting() -> tuple[Counter[PiiKind], InputFilter, InputFilter]:
    found: Counter[PiiKind] = Counter()

    def count(kind: PiiKind, times: int) -> None:
        found[kind] += times

    redactor = Redactor()
    return found, InputFilter(redactor, "mask", count), InputFilter(redactor, "block", count)


async def test_input_is_masked_and_counted_by_kind() -> None:
    """Short texts and long ones alike."""
    found, mask, _ = counting()
    padding = "word " * (INLINE_CHARS // 5)

    assert ["mail [EMAIL]", "hello"] == await mask.clean("t", [f"mail {CANARY}", "hello"])
    assert [f"{padding}[EMAIL]"] == await mask.clean("t", [padding + CANARY])
    assert {PiiKind.EMAIL: 2} == found


async def test_blocked_input_names_the_kinds_and_never_the_text() -> None:
    """Clean text passes unchanged; the rest is refused."""
    _, _, block = counting()

    assert ["hello"] == await block.clean("t", ["hello"])
    with pytest.raises(PiiBlocked) as refused:
        await block.clean("t", ["hello", f"mail {CANARY}"])

    assert {"kinds": ["email"]} == refused.value.details
    assert CANARY not in str(refused.value)


async def test_what_is_stored_is_masked_even_where_input_is_blocked_and_counts_as_no_match() -> None:
    """The completion that enters a session looks as it would if the client sent it back."""
    found, _, block = counting()

    assert "mail [EMAIL]" == await block.mask("t", f"mail {CANARY}")
    assert {} == found


async def test_a_broken_input_filter_refuses_and_does_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail closed: 503, without the text in message or cause."""
    _, mask, _ = counting()
    monkeypatch.setattr(Redactor, "redact", lambda self, text, **limits: 1 / 0)

    with pytest.raises(ServiceUnavailable) as refused:
        await mask.clean("t", [CANARY])

    assert refused.value.__cause__ is None
    assert CANARY not in str(refused.value)


async def test_output_is_masked_though_it_comes_in_single_characters(engine: EchoEngine) -> None:
    """No delta shows a part of it; usage and finish reason stay those of the model."""
    found: Counter[PiiKind] = Counter()
    filtered = FilteredEngine(engine, Redactor(), lambda kind, times: found.update({kind: times}))
    text = f"Write to {CANARY} or not."

    events = await read(filtered.stream(make_request(text)))

    assert "Write to [EMAIL] or not." == text_of(events)
    assert not any("@" in delta.text or "jane" in delta.text for delta in deltas_of(events))
    assert {PiiKind.EMAIL: 1} == found
    assert finish(FinishReason.STOP, Usage(len(text), len(text))) == events[-1]
    assert len(text) == sum(delta.tokens for delta in deltas_of(events))
    assert Started(prompt_tokens=len(text)) == events[0]


@pytest.mark.parametrize("text", [f"Write to {CANARY} or not.", CANARY, "a", f"{CANARY} {CANARY}"])
async def test_output_that_is_not_streamed_is_masked_just_as_well(engine: EchoEngine, text: str) -> None:
    """Whichever part of it the first token is."""
    filtered = FilteredEngine(engine, Redactor(), lambda kind, times: None)

    streamed, whole = [await read(filtered.stream(make_request(text, stream=stream))) for stream in (True, False)]

    assert Redactor().redact(text).text == text_of(streamed) == text_of(whole)
    assert len(deltas_of(whole)) <= 3
    assert finished_of(streamed) == finished_of(whole)


async def test_a_long_output_is_filtered_in_another_process() -> None:
    """A response that is not streamed arrives in one piece, and would hold up every other request."""
    engine = EchoEngine(context_length=5 * INLINE_CHARS)
    await engine.start()
    redactor = Redactor()
    pool = RedactionPool(redactor, 1)
    filtered = FilteredEngine(engine, redactor, lambda kind, times: None, pool=pool)
    text = f"{CANARY} " + "1 23 " * (INLINE_CHARS // 4)
    request = make_request(text, stream=False)
    sampling = SamplingParams(max_tokens=len(text))
    events = await read(filtered.stream(structs.replace(request, sampling=sampling)))
    processes = len(pool.pids)
    await engine.close()
    await pool.close()

    assert redactor.redact(text).text == text_of(events)
    assert 1 == processes


async def test_leaving_filtered_output_closes_the_model_s(engine: EchoEngine) -> None:
    """And counts what was found until then."""
    found: Counter[PiiKind] = Counter()
    filtered = FilteredEngine(engine, Redactor(), lambda kind, times: found.update({kind: times}))
    stream = filtered.stream(make_request(f"{CANARY} and then some more"))
    while "[EMAIL]" not in text_of([await anext(stream)]):
        pass

    await stream.aclose()

    assert 0 == engine.status().running
    assert {PiiKind.EMAIL: 1} == found


async def test_a_broken_output_filter_ends_the_completion_with_content_filter(
    engine: EchoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing unfiltered is sent, the model is freed, and what it generated is still counted."""
    feed = StreamRedactor.feed

    def breaks_at_the_third(self: StreamRedactor, delta: str, **limits: int) -> str:
        if delta == "c":
            raise ValueError(delta)
        return feed(self, delta, **limits)

    monkeypatch.setattr(StreamRedactor, "feed", breaks_at_the_third)
    filtered = FilteredEngine(engine, Redactor(), lambda kind, times: None)

    events = await read(filtered.stream(make_request("a b c d")))

    assert "c" not in text_of(events)
    assert finish(FinishReason.CONTENT_FILTER, Usage(7, 5)) == events[-1]
    assert 0 == engine.status().running


class TokensEngine(EchoEngine):
    """Generates given tokens, so many in a delta as given, each with its number for a log-probability."""

    def __init__(self, tokens: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__()
        self.tokens, self.sizes = tokens, sizes

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started()
        begin = 0
        for size in [*self.sizes, len(self.tokens)]:
            texts = self.tokens[begin : begin + size]
            if not texts:
                break
            logprobs = tuple(
                DetokenizedLogprob(text, text.encode(), -float(begin + number)) for number, text in enumerate(texts)
            )
            ends = tuple(accumulate(map(len, texts)))
            yield Delta(text="".join(texts), tokens=len(texts), logprobs=logprobs, token_ends=ends)
            begin += len(texts)
        yield finish(FinishReason.STOP, Usage(1, len(self.tokens)))


async def filtered(tokens: Sequence[str], sizes: Sequence[int] = ()) -> list[Event]:
    """Return the events that the filter makes of these tokens."""
    engine = FilteredEngine(TokensEngine(tokens, sizes), Redactor(), lambda kind, times: None)
    sampling = SamplingParams(max_tokens=1000, logprobs=0)
    return await read(
        engine.stream(GenerationRequest(id="r", tenant=Tenant.owner("t"), prompt_ids=(1,), sampling=sampling))
    )


def numbers(events: Sequence[Event]) -> list[int]:
    return [-int(token.logprob) for token in logprobs_of(events)]


@pytest.mark.parametrize("sizes", [(), (1,) * 20, (2, 3, 1)], ids=["whole", "one by one", "a few at a time"])
async def test_log_probabilities_end_where_the_first_mask_begins(sizes: tuple[int, ...]) -> None:
    """The token that reaches into the address has none, nor has anything behind it; the text continues."""
    tokens = ["Write", " to", " jane", ".doe", "@", "example", ".com", " or", " call", "."]

    events = await filtered(tokens, sizes)

    assert "Write to [EMAIL] or call." == text_of(events)
    assert [0, 1] == numbers(events)


async def test_no_later_word_that_resembles_a_masked_one_brings_them_back() -> None:
    """The text continues with the very letters that were masked before."""
    tokens = ["to ", "jane", ".doe", "@example.com", " or ", "jane", " or ", "jane", " x"]

    assert [0] == numbers(await filtered(tokens, (1,) * 20))


async def test_log_probabilities_wait_for_text_that_is_withheld() -> None:
    """A delta has none of a token whose text it does not have yet, and a clean completion has all."""
    tokens = ["Ja", "ne", ".d", "oe", " is", " a", " na", "me"]

    deltas = deltas_of(await filtered(tokens, (1,) * 20))

    counts = list(accumulate(len(delta.logprobs) for delta in deltas))
    lengths = list(accumulate(len(delta.text) for delta in deltas))
    assert all(len("".join(tokens[:count])) <= length for count, length in zip(counts, lengths, strict=True))
    assert list(range(len(tokens))) == numbers(deltas)


WORDS = st.sampled_from(
    [CANARY, "192.168.17.4", "4111 1111 1111 1111", "hello ", " ", "\n", "call 5, ", "é", "[EMAIL]"]
)


@given(st.lists(WORDS, max_size=6), st.lists(st.integers(0, 6), max_size=60), st.lists(st.integers(1, 5), max_size=40))
@example(["hello ", CANARY], [3] * 20, [1] * 20)
async def test_log_probabilities_are_those_of_the_clean_beginning_however_tokens_come(
    words: list[str], cuts: list[int], sizes: list[int]
) -> None:
    """Exactly the tokens that end before the first difference between the model's text and the one that is released."""
    raw = "".join(words)
    places = [0, *(min(at, len(raw)) for at in accumulate(cuts)), len(raw)]
    tokens = [raw[begin:end] for begin, end in pairwise(places)]
    redaction = Redactor().redact(raw)
    pairs = zip(raw, redaction.text, strict=False)
    clean = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), len(raw))
    expected = sum(end <= clean for end in places[1:])

    events = await filtered(tokens, sizes)

    assert redaction.text == text_of(events)
    assert list(range(expected)) == numbers(events)
    assert [len(delta.logprobs) for delta in deltas_of(events)] == [
        len(delta.token_ends) for delta in deltas_of(events)
    ]


class NamedTokens(EchoEngine):
    """Has a special token, records the parameters that it gets, and ends a completion at that token."""

    sampling: SamplingParams

    def hidden_token(self, name: str) -> int | None:
        return 0x110000 if name == "<|eot|>" else None

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.sampling = request.sampling
        yield Started()
        yield Delta(text="mail jane.doe@", tokens=1)
        yield finish(FinishReason.STOP, Usage(1, 2), 0x110000)


async def test_a_stop_string_that_names_a_special_token_is_the_models_to_find() -> None:
    """No text shows it, and no mask hides it; every other one is left to the filter."""
    inner = NamedTokens()
    await inner.start()
    filtered = FilteredEngine(inner, Redactor(), lambda kind, count: None)
    request = make_request("hello")
    sampling = SamplingParams(max_tokens=9, stop=("<|eot|>", "x"))

    events = await read(filtered.stream(structs.replace(request, sampling=sampling)))

    assert ((), (0x110000,)) == (inner.sampling.stop, inner.sampling.stop_token_ids)
    assert ("mail ", "<|eot|>") == (text_of(events)[:5], finished_of(events).samples[0].stop_reason)


class EventsEngine(EchoEngine):
    """Generates given deltas."""

    def __init__(self, *deltas: Delta) -> None:
        super().__init__()
        self.deltas = deltas

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        yield Started()
        for delta in self.deltas:
            yield delta
        yield finish(FinishReason.STOP, Usage(1, len(self.deltas)))


async def completion_of(*deltas: Delta, found: Counter[PiiKind] | None = None, **sampling: Any) -> Completion:
    """Return what the filter makes of a completion."""
    counts: Counter[PiiKind] = Counter() if found is None else found
    engine = FilteredEngine(EventsEngine(*deltas), Redactor(), lambda kind, times: counts.update({kind: times}))
    params = SamplingParams(max_tokens=1000, **sampling)
    request = GenerationRequest(id="r", tenant=Tenant.owner("t"), prompt_ids=(1,), sampling=params)
    return (await collect(engine.stream(request))).completions[0]


def call(arguments: str, position: int = 0, **first: Any) -> Delta:
    return Delta(tool_calls=(ToolCallDelta(position=position, arguments=arguments, **first),), tokens=1)


async def test_text_reasoning_and_the_arguments_of_each_call_are_masked() -> None:
    """Each by itself, and the arguments as JSON; ids and names pass as they are."""
    found: Counter[PiiKind] = Counter()
    completion = await completion_of(
        Delta(reasoning="ask jane.doe@", tokens=1),
        Delta(reasoning="example.com first", tokens=1),
        Delta(text=f"I write to {CANARY}", tokens=1),
        call('{"to": "jane.d', id="1", name="send"),
        call('oe@example.com", "n": 5}'),
        call(f'{{"cc": ["{CANARY}"]}}', 1, id="2", name="send"),
        found=found,
    )

    assert "ask [EMAIL] first" == completion.reasoning
    assert "I write to [EMAIL]" == completion.text
    assert completion.tool_calls == (
        ToolCall("1", "send", '{"to": "[EMAIL]", "n": 5}'),
        ToolCall("2", "send", '{"cc": ["[EMAIL]"]}'),
    )
    assert {PiiKind.EMAIL: 4} == found


async def test_reasoning_comes_before_the_text_that_follows_it() -> None:
    """Its last word is not withheld any longer; if it goes on after all, an entity across the gap is masked."""
    engine = FilteredEngine(
        EventsEngine(Delta(reasoning="so jane.doe@"), Delta(text="Hello "), Delta(reasoning="example.com it is")),
        Redactor(),
        lambda kind, times: None,
    )

    deltas = deltas_of(await read(engine.stream(make_request("x"))))

    assert "Hello " == "".join(delta.text for delta in deltas)
    assert ["so ", "jane.doe@", "[EMAIL] it is"] == [
        "".join(delta.reasoning for delta in part) for part in (deltas[:1], deltas[1:2], deltas[2:])
    ]


async def deltas_after_filter(*deltas: Delta, stop: tuple[str, ...] = ()) -> list[Delta]:
    engine = FilteredEngine(EventsEngine(*deltas), Redactor(), lambda kind, times: None)
    request = make_request("x")
    request = structs.replace(request, sampling=replace(request.sampling, stop=stop))
    return deltas_of(await read(engine.stream(request)))


@example(["so ", "jane.doe@", "example.com"])
@example(["word", "EN"])
@given(
    st.lists(st.sampled_from(["so ", "jane.doe@", "example.com", " 4111 1111", " 1111 1111", "EN", "word"]), max_size=6)
)
async def test_text_comes_before_the_call_that_follows_it(parts: list[str]) -> None:
    """Nothing of it is withheld any longer, and it is masked as a whole text is."""
    texts = (Delta(text=part) for part in parts)
    deltas = await deltas_after_filter(*texts, call("{", name="f"), call("}"), stop=("END",))
    first = next(at for at, delta in enumerate(deltas) if delta.tool_calls)

    assert Redactor().redact("".join(parts)).text == "".join(delta.text for delta in deltas[: first + 1])
    assert not any(delta.text for delta in deltas[first + 1 :])


async def test_an_entity_that_goes_on_behind_a_call_is_masked_from_there() -> None:
    deltas = await deltas_after_filter(Delta(text="to jane.doe@"), call("{}", name="f"), Delta(text="example.com now"))

    assert "to jane.doe@[EMAIL] now" == "".join(delta.text for delta in deltas)


async def test_no_call_follows_a_stop_string_that_was_withheld() -> None:
    """The text ends the completion, though only the call shows that it is complete."""
    deltas = await deltas_after_filter(Delta(text="now END"), call("{}", name="f"), stop=("END",))

    assert ("now ", []) == ("".join(delta.text for delta in deltas), [delta for delta in deltas if delta.tool_calls])


async def test_json_that_a_grammar_demands_stays_json() -> None:
    """A card number that is a number passes; one in a string is masked, and no mask reaches over a quote."""
    text = '{"n": 4111111111111111, "s": "4111 1111 1111 1111", "m": "jane.doe@example.com"}'
    grammar = Grammar("json_schema", "{}")

    completion = await completion_of(*(Delta(text=mark, tokens=1) for mark in text), grammar=grammar)

    assert {"n": 4111111111111111, "s": "[CARD]", "m": "[EMAIL]"} == json.loads(completion.text)


async def test_json_behind_a_structural_tag_stays_json() -> None:
    """The free text around it is masked as any."""
    tags = [TaggedStructure(begin="<f>", schema={}, end="</f>")]
    text = 'To jane.doe@example.com: <f>{"n": 4111111111111111, "s": "4111 1111 1111 1111"}</f> 4111 1111 1111 1111'

    grammar = tag_grammar("response_format", tags, ["<f"])
    completion = await completion_of(*(Delta(text=mark, tokens=1) for mark in text), grammar=grammar)

    assert 'To [EMAIL]: <f>{"n": 4111111111111111, "s": "[CARD]"}</f> [CARD]' == completion.text


async def test_stop_strings_end_the_text_alone() -> None:
    completion = await completion_of(
        Delta(reasoning="END of it", tokens=1), call('{"a": "END"}', id="1", name="f"), Delta(text="now END or not"),
        stop=("END",),
    )  # fmt: skip

    assert ("END of it", "now ") == (completion.reasoning, completion.text)
    assert '{"a": "END"}' == completion.tool_calls[0].arguments


async def test_log_probabilities_of_reasoning_and_calls_are_not_told() -> None:
    """Those of its tokens would show what is masked there."""
    own = DetokenizedLogprob("x", b"x", -1.0)
    completion = await completion_of(
        Delta(reasoning=f"to {CANARY} ", tokens=1, logprobs=(own,), token_ends=(0,)),
        Delta(text="x", tokens=1, logprobs=(own,), token_ends=(1,)),
        logprobs=0,
    )

    assert (own,) == completion.logprobs
