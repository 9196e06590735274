"""Personal data that an end cuts: that of a completion, by max_tokens or a stop string, or that of its prompt."""

import re
from collections.abc import AsyncGenerator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engine.echo import EchoEngine
from app.errors import InvalidRequest
from app.events import Event
from app.privacy.filters import FilteredEngine
from app.privacy.redactor import Redactor, StreamRedactor
from app.requests import GenerationRequest
from app.types import FinishReason, Message, Role, SamplingParams, Tenant, Usage
from tests.unit.event_streams import finished_of, logprobs_of, read, text_of

ENTITIES = {
    "SSN": "536-90-4390",
    "CARD": "4111 1111 1111 1111",
    "EMAIL": "jane.doe42@mail.example.com",
    "IBAN": "GB29 NWBK 6016 1331 9268 19",
    "PHONE": "+1 415 555 2671",
    "IP": "192.168.17.254",
    "API_KEY": "ghp_abcdefghijklmnopqrst",
}
REDACTOR = Redactor()
CONTROL_TOKEN = 0x110000
"""A token of the echo engine that is no text."""


async def completion(text: str, *, stream: bool = True, prompt: str = "", **sampling: object) -> list[Event]:
    """Return the filtered events of a model that says exactly this, one character in each token."""
    engine = EchoEngine(context_length=4000)
    await engine.start()
    params = SamplingParams(**{"max_tokens": 1000, **sampling})  # type: ignore[arg-type]
    filtered = FilteredEngine(engine, REDACTOR, lambda kind, count: None)
    request = GenerationRequest(
        id="r", tenant=Tenant.owner("t"), text=prompt, prompt_ids=tuple(map(ord, text)), sampling=params, stream=stream
    )
    events = await read(filtered.stream(request))
    assert 0 == engine.status().running
    await engine.close()
    return events


def shows_little(text: str) -> bool:
    """Return whether a text is a plain word or number, of which many texts have one."""
    digits = sum(map(str.isdigit, text))
    return "@" not in text and digits <= 4 and not re.search(r"\w[.+]\w{2}|_", text)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("kind", ENTITIES)
async def test_max_tokens_shows_nothing_of_an_entity_that_has_begun(kind: str, stream: bool) -> None:
    """Wherever it cuts: what has begun is masked or left out, except for a plain word or number at its beginning."""
    entity, before = ENTITIES[kind], "Here it is: "
    for size in range(1, len(entity) + 1):
        events = await completion(f"{before}{entity} ok", max_tokens=len(before) + size, stream=stream)

        shown = text_of(events).removeprefix(before)
        assert shown != text_of(events)
        shown = shown.replace("].", "]")  # the full stop of a domain, or of a sentence
        assert shown == f"[{kind}]" or (entity.startswith(shown) and shows_little(shown)), (size, shown)
        assert FinishReason.LENGTH is finished_of(events).finish_reason
        assert len(before) + size == finished_of(events).usage.completion_tokens


@pytest.mark.parametrize(
    "address",
    [
        "jane.doe [at] example [dot] com",
        "jane.doe(at)example(dot)com",
        "jane dot doe at example dot com",
        "jane.doe@\nexample.com",
        "jane.doe\n@example.com",
        "jane.doe&#64;example&#46;com",
        "jane.doe%40example.com",
        '"jane.doe"@example.com',
    ],
    ids=ascii,
)
def test_a_disguised_address_that_is_cut_shows_at_most_its_first_word(address: str) -> None:
    """The parts before the last sign are left out too, wherever the text is cut."""
    first = ("j", "ja", "jan", "jane", "jane.", "jane ", "jane d", "jane do")
    for cut in range(1, len(address)):
        stream = StreamRedactor(REDACTOR)
        shown = stream.feed(f"Write to {address[:cut]}") + stream.finish(cut=True)

        assert shown.removeprefix("Write to ").strip('"') in ("[EMAIL]", "", *first)


@pytest.mark.parametrize(
    "text",
    [
        "Yes",
        "No.",
        "The answer is 42",
        "in 2024",
        "It is well-known",
        "3.1",
        "(a)",
        "l'été",
        "x = [1, 2, 3]",
        "He is at home",
        "The dots are",
        'He said "hello wor',
        "a well-",
        "Meet me at noon. Jane",
    ],
)
async def test_words_and_numbers_at_the_end_of_a_cut_completion_are_kept(text: str) -> None:
    """Most completions that are cut end in one."""
    assert text == text_of(await completion(text + " and so on", max_tokens=len(text)))


async def test_a_completion_that_the_model_ended_keeps_its_end() -> None:
    """There is no more of it, so it is no entity."""
    text = "Ask jane.doe@"

    assert text == text_of(await completion(text))
    assert "Ask" == text_of(await completion(f"{text}example.com", max_tokens=len(text))).strip()


@given(st.sampled_from(sorted(ENTITIES.values())), st.data())
def test_a_cut_stream_shows_a_beginning_of_what_the_whole_one_shows(entity: str, data: st.DataObject) -> None:
    """Nothing appears in it that redacting the whole text would have hidden, but for a plain word or number."""
    text = f"Ask {entity} or {entity}"
    cut = data.draw(st.integers(0, len(text)))
    stream = StreamRedactor(REDACTOR)
    shown = stream.feed(text[:cut]) + stream.finish(cut=True)
    whole = REDACTOR.redact(text).text
    shared = next((i for i, c in enumerate(shown) if whole[i : i + 1] != c), len(shown))

    assert shows_little(shown[shared:])


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_stop_strings_cannot_ask_what_stands_under_a_mask(stream: bool) -> None:
    """No part of an entity as stop string changes anything that the client sees."""
    for entity in ENTITIES.values():
        text = f"It is {entity}, ok"
        plain = await completion(text, stream=stream)
        for size in (1, 2, len(entity) // 2, len(entity)):
            for start in range(0, len(entity) - size + 1, 3):
                stop = entity[start : start + size]
                if stop in REDACTOR.redact(text).text:
                    continue
                events = await completion(text, stream=stream, stop=(stop,))
                assert text_of(plain) == text_of(events)
                assert finished_of(plain) == finished_of(events)


async def test_only_control_tokens_can_be_stop_tokens() -> None:
    """One that is text would answer, by where it ends the completion, what stands under a mask."""
    text = f"It is {ENTITIES['SSN']}, ok"

    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        await completion(text, stop_token_ids=(ord("4"),))
    assert await completion(text) == await completion(text, stop_token_ids=(CONTROL_TOKEN,))


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_stop_string_ends_the_filtered_text_and_the_model(stream: bool) -> None:
    """Also where it begins right after a mask, and the tokens that were generated until then are counted."""
    text = f"Write to {ENTITIES['EMAIL']}.\nUser: and then very much more" + " more" * 20

    events = await completion(text, stream=stream, stop=("\nUser:",))

    assert "Write to [EMAIL]." == text_of(events)
    end = finished_of(events)
    assert (FinishReason.STOP, "\nUser:") == (end.finish_reason, end.samples[0].stop_reason)
    assert text.index("\nUser:") < end.usage.completion_tokens < text.index("more more")
    assert "Write to " == text_of(await completion(text, stop=("[EM",)))


async def test_a_stop_string_that_the_end_leaves_open_is_shown() -> None:
    """And one that only the end of the text completes still ends it."""
    assert "It is a" == text_of(await completion("It is a", stop=("abc",)))
    assert "It is a" == text_of(await completion("It is a b", stop=(" b",)))


async def test_log_probabilities_end_with_the_text_before_the_stop_string() -> None:
    """Tokens of the stop string have none, as without a filter."""
    events = await completion("one two three", stop=(" th",), logprobs=0)

    assert "one two" == text_of(events) == "".join(token.text for token in logprobs_of(events))


class Cached(EchoEngine):
    """An engine that took a part of each prompt from its cache."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        request.progress.cached = 3
        return super().stream(request)


async def test_usage_of_a_stopped_completion_says_what_was_cached() -> None:
    """Though the inner engine's own last event is never read."""
    engine = Cached()
    await engine.start()
    filtered = FilteredEngine(engine, REDACTOR, lambda kind, count: None)
    sampling = SamplingParams(max_tokens=99, stop=(".",))
    request = GenerationRequest(
        id="r", tenant=Tenant.owner("t"), prompt_ids=tuple(map(ord, "One. Two.")), sampling=sampling
    )

    end = finished_of(await read(filtered.stream(request)))

    assert Usage(9, end.usage.completion_tokens, 3) == end.usage


CONTINUED: Sequence[tuple[str, str]] = [
    (entity[:at], entity[at:]) for entity in ENTITIES.values() for at in range(1, len(entity))
]


@pytest.mark.parametrize(("prompt", "text"), CONTINUED)
async def test_an_entity_that_begins_in_the_prompt_is_masked_from_the_completion_on(prompt: str, text: str) -> None:
    """Who writes its beginning into a prompt that is continued does not get the rest."""
    (kind,) = REDACTOR.redact(prompt + text).counts
    expected = REDACTOR.redact(f"It is {prompt}{text} ok").text.removeprefix("It is ")
    if REDACTOR.redact(prompt).counts:  # the client has written a whole one already
        return

    events = await completion(f"{text} ok", prompt=f"It is {prompt}")

    assert expected == text_of(events), kind


async def test_what_a_prompt_holds_is_never_repeated_by_the_filter() -> None:
    """Only what the model says is shown, whole entities of the prompt included."""
    for prompt in (
        "Call 5",
        "mail jane@example.com",
        "the number is 536-90-4390",
        "jane",
        "1",
        "sk-abcdefghijABCDEFGHIJ01",
    ):
        assert " is it" == text_of(await completion(" is it", prompt=prompt))


async def test_only_a_turn_that_is_continued_is_looked_back_at() -> None:
    """The number at the end of a question has nothing to do with the answer's first digits."""
    engine = EchoEngine()
    await engine.start()
    filtered = FilteredEngine(engine, REDACTOR, lambda kind, count: None)

    async def answer(*, continued: bool) -> str:
        role = Role.ASSISTANT if continued else Role.USER
        return text_of(
            await read(
                filtered.stream(
                    GenerationRequest(
                        id="r",
                        tenant=Tenant.owner("t"),
                        messages=(Message(role, "It is 536-90-"),),
                        continue_final_message=continued,
                        prompt_ids=tuple(map(ord, "4390 ok")),
                        sampling=SamplingParams(max_tokens=99),
                    )
                )
            )
        )

    assert "[SSN] ok" == await answer(continued=True)
    assert "4390 ok" == await answer(continued=False)
