"""What becomes of the tokens of one request: log-probabilities with their text, deltas, and the count of them all."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from app.config import DeadlineConfig
from app.engine.live_request import LiveRequest
from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.errors import EngineFailed
from app.events import WITHHELD, Event
from app.ipc.messages import TokenEvent
from app.types import FinishReason, TokenLogprob, Usage
from tests.unit.engine.fake_worker import TOKENIZER, make_request, tokens
from tests.unit.event_streams import deltas_of, finished_of, logprobs_of, prompt_logprobs_of, read, text_of
from tests.unit.tiny_models import llama_tokenizer, save, token_id


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return HfTokenizer(save(TOKENIZER, tmp_path_factory.mktemp("tokenizer")))


def live_request(tokenizer: HfTokenizer, *, stream: bool = True, **sampling: Any) -> LiveRequest:
    request = make_request(prompt=(1, 2, 3), stream=stream, **{"logprobs": 0} | sampling)
    return LiveRequest(1, request, tokenizer, DeadlineConfig(), lambda _: None)


def event(*token_ids: int, finish: str | None = None, error: str | None = None, cached_tokens: int = 0) -> TokenEvent:
    """Each token as likely as its id says, so that none can be taken for another."""
    logprobs = tuple(TokenLogprob(each, -each / 1000) for each in token_ids)
    end_token = 0 if finish == "stop" else None
    return TokenEvent(1, token_ids, finish, error, logprobs, cached_tokens, end_token)  # type: ignore[arg-type]  # a word of the test


def ids_of(*events: Event) -> list[int]:
    assert all(len(delta.logprobs) == len(delta.token_ends) for delta in deltas_of(events))
    return [round(-1000 * token.logprob) for token in logprobs_of(events)]


async def step_by_step(live: LiveRequest, worker_events: list[TokenEvent]) -> list[Event]:
    """Read each delta before the next token comes."""
    reading = asyncio.create_task(read(live.events()))
    for each in worker_events:
        live.accept(each)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return await reading


async def test_each_token_comes_with_its_text(tokenizer: HfTokenizer):
    """One delta for each token that is read in time, with the place where it ends; none for the end token."""
    ids = tokens("hello world")

    events = await step_by_step(live_request(tokenizer), [event(), *map(event, ids), event(finish="stop")])

    *deltas, finished = events
    assert [[each] for each in ids] == [ids_of(delta) for delta in deltas]
    assert [(len(delta.text),) for delta in deltas_of(deltas)] == [delta.token_ends for delta in deltas_of(deltas)]
    assert [1] * len(ids) == [delta.tokens for delta in deltas_of(deltas)]
    assert len(ids) + 1 == finished_of([finished]).usage.completion_tokens


async def test_a_token_has_its_own_text_and_bytes(tokenizer: HfTokenizer):
    """Of each alternative too; the whole makes up the text."""
    live = live_request(tokenizer)
    live.accept(event(*tokens("hello world"), finish="length"))

    events = await read(live.events())

    assert "hello world" == "".join(token.text for token in logprobs_of(events)) == text_of(events)
    assert b"hello world" == b"".join(token.raw for token in logprobs_of(events))


async def test_a_slow_reader_gets_the_tokens_of_a_delta_in_order(tokenizer: HfTokenizer):
    """And where in its text each of them ends."""
    ids = tokens("hello world")
    live = live_request(tokenizer)
    live.accept(event(*ids, finish="length"))

    (first,) = deltas_of(await read(live.events()))

    assert "hello world" == first.text
    assert ids == ids_of(first)
    ends = [0, *first.token_ends]
    assert ids == [tokens(first.text[begin:end])[0] for begin, end in pairwise(ends)]


async def test_tokens_that_a_stop_string_cuts_off_are_not_shown(tokenizer: HfTokenizer):
    """A token that reaches into the stop string is one of them, whatever of it is shown."""
    ids = [*tokens("hello"), *tokens(" world"), *tokens("!")]
    live = live_request(tokenizer, stop=("orld",))
    live.accept(event(*ids))

    events = await read(live.events())

    beginnings = [tokenizer.decoder().feed(ids[:count]) for count in range(len(ids) + 1)]
    whole = max(count for count, text in enumerate(beginnings) if "hello w".startswith(text))
    assert "hello w" == text_of(events)
    assert FinishReason.STOP == finished_of(events).finish_reason
    assert ids[:whole] == ids_of(*events)


async def test_tokens_of_text_that_may_become_a_stop_string_wait_with_it(tokenizer: HfTokenizer):
    """They are shown when it is, at the end of the completion at the latest."""
    hello, bang = tokens("hello"), tokens("!")

    events = await step_by_step(
        live_request(tokenizer, stop=("!?",)), [event(*hello), event(*bang), event(finish="length")]
    )

    assert [hello, bang] == [ids_of(delta) for delta in deltas_of(events)]
    assert ["hello", "!"] == [delta.text for delta in deltas_of(events)]


async def test_the_tokens_of_one_character_come_together(tokenizer: HfTokenizer):
    """An unfinished one comes with its end, or with the end of the completion as U+FFFD."""
    first, second = tokens("é")

    events = await step_by_step(
        live_request(tokenizer), [event(first), event(second), event(first), event(finish="length")]
    )

    assert [("é", [first, second], 2), ("\ufffd", [first], 1)] == [
        (each.text, ids_of(each), each.tokens) for each in deltas_of(events)
    ]


async def test_a_token_without_text_at_the_end_comes_in_a_delta_of_its_own(tokenizer: HfTokenizer):
    """As a control token does that the model generated in the middle because it was to ignore its end."""
    control = token_id(TOKENIZER, "<|im_end|>")
    hello = tokens("hello")

    events = await step_by_step(live_request(tokenizer), [event(*hello), event(control), event(finish="length")])

    deltas = deltas_of(events)
    assert [("hello", hello), ("", [control])] == [(each.text, ids_of(each)) for each in deltas]
    assert (0,) == deltas[-1].token_ends
    assert FinishReason.LENGTH == finished_of(events).finish_reason


async def test_usage_counts_what_the_worker_did_not_compute_again(tokenizer: HfTokenizer):
    """The first event of a request says it."""
    live = live_request(tokenizer)
    live.accept(event(cached_tokens=2))
    live.accept(event(*tokens("a"), finish="length"))

    assert Usage(3, 1, cached_tokens=2) == finished_of(await read(live.events())).usage


STOP, BROKEN = "!", "é"
TEXTS = ["hello world, hello world", f"hello {BROKEN}", f"hello{STOP} more", BROKEN, "a"]


@pytest.mark.parametrize("finish", ["stop", "length", "abort"])
@pytest.mark.parametrize("text", TEXTS)
async def test_a_request_that_does_not_stream_gets_two_deltas_of_the_same_completion(
    tokenizer: HfTokenizer, text: str, finish: str
):
    """The first token and the rest at most, however they come; text, log-probabilities and usage are the same."""
    worker_events = [event(), *map(event, tokens(text)), event(finish=finish)]

    streamed, whole = [
        await step_by_step(live_request(tokenizer, stream=stream, stop=(STOP,)), worker_events)
        for stream in (True, False)
    ]

    assert len(deltas_of(whole)) <= 2
    assert text_of(streamed) == text_of(whole)
    assert logprobs_of(streamed) == logprobs_of(whole)
    assert finished_of(streamed) == finished_of(whole)
    assert all(deltas_of(events)[0].text for events in (streamed, whole))


async def test_the_first_token_of_a_request_that_does_not_stream_comes_at_once(tokenizer: HfTokenizer):
    """It says how long the model took to begin; what follows waits for the end."""
    live = live_request(tokenizer, stream=False)
    first, *rest = tokens("hello world")
    stream = live.events()
    live.accept(event(first))
    begun = deltas_of([await anext(stream)])[0]

    waiting = asyncio.ensure_future(anext(stream))
    for token in rest:
        live.accept(event(token))
        await asyncio.sleep(0)
    early = waiting.done()
    live.accept(event(finish="length"))
    ended = deltas_of([await waiting])[0]

    assert ([first], 1) == (ids_of(begun), begun.tokens)
    assert not early
    assert (rest, len(rest)) == (ids_of(ended), ended.tokens)
    await stream.aclose()


@pytest.mark.parametrize("stream", [True, False])
async def test_progress_counts_what_was_generated_whether_it_was_read_or_not(tokenizer: HfTokenizer, stream: bool):
    """At any moment, with the end token; what comes after the outcome counts nothing."""
    live = live_request(tokenizer, stream=stream)
    counts = []
    for each in [event(), event(*tokens("hello")), event(5, 6), event(finish="stop"), event(7)]:
        live.accept(each)
        counts.append(live.request.progress.generated)

    hello = len(tokens("hello"))
    assert [0, hello, hello + 2, hello + 3, hello + 3] == counts
    assert counts[-1] == finished_of(await read(live.events())).usage.completion_tokens


@pytest.mark.parametrize(
    "end",
    [lambda live: live.end(FinishReason.ABORT), lambda live: live.fail(EngineFailed("It failed."))],
    ids=["aborted", "failed"],
)
async def test_progress_stays_exact_when_a_request_is_ended_from_outside(
    tokenizer: HfTokenizer, end: Callable[[LiveRequest], None]
):
    """As at a hang-up in the middle of a completion of which nothing but its first token has been delivered."""
    live = live_request(tokenizer, stream=False)
    for token in tokens("hello world"):
        live.accept(event(token))
    end(live)
    live.accept(event(5))

    assert len(tokens("hello world")) == live.request.progress.generated


@pytest.mark.parametrize(("settings", "expected"), [({}, ("hello w", FinishReason.STOP)), ({"ignore_eos": True}, None)])
async def test_the_models_own_end_strings_end_a_completion_and_stay_in_it(
    tokenizer: HfTokenizer, settings: dict[str, Any], expected: tuple[str, FinishReason] | None
):
    """With the rest of the token that completes one; a request that ignores the model's end ignores them too."""
    request = make_request(prompt=(1, 2, 3), **settings)
    live = LiveRequest(1, request, tokenizer, DeadlineConfig(), lambda _: None, ["o w"])
    ids = [each for text in ("hell", "o", " w", "orld") for each in tokens(text)]

    for each in [event(), *map(event, ids), event(finish="length")]:
        live.accept(each)
    events = await read(live.events())

    finished = finished_of(events)
    assert (expected or ("hello world", FinishReason.LENGTH)) == (text_of(events), finished.finish_reason)
    assert finished.samples[0].stop_reason is None


async def test_a_stop_string_that_names_a_hidden_token_is_reported_when_it_ends_the_completion(tokenizer: HfTokenizer):
    """The worker stops at the token; the caller reads what they asked for, and not its number."""
    control = token_id(TOKENIZER, "<|endoftext|>")
    request = make_request(prompt=(1, 2, 3), stop=("x", "<|endoftext|>"))
    live = LiveRequest(1, request, tokenizer, DeadlineConfig(), lambda _: None)
    live.accept(event(*tokens("hello")))
    live.accept(TokenEvent(1, finish="stop", end_token=control))

    events = await read(live.events())

    assert {control: "<|endoftext|>"} == live.hidden_stops
    assert ("hello", "<|endoftext|>") == (text_of(events), finished_of(events).samples[0].stop_reason)


async def test_a_completion_begins_with_the_space_behind_the_prompt(tmp_path: Path):
    """A stop string finds it there, and it is the first token's as it is the text's."""
    original = llama_tokenizer()
    words = HfTokenizer(save(original, tmp_path))
    prompt, answer = words.encode_text("a b"), tuple(original.encode("a b c", add_special_tokens=False)[2:])

    async def completed(**sampling: Any) -> list[Event]:
        request = make_request(prompt=prompt, logprobs=0, **sampling)
        live = LiveRequest(1, request, words, DeadlineConfig(), lambda _: None)
        live.accept(event(*answer, finish="length"))
        return await read(live.events())

    events = await completed()
    assert " c" == text_of(events) == "".join(token.text for token in logprobs_of(events))
    assert "" == text_of(await completed(stop=(" c",)))


async def test_a_prompts_log_probabilities_come_before_any_text(tokenizer: HfTokenizer):
    """A few tokens at a time, the first without one, each with the place where it ends in the text."""
    ids = tokens("hello world " * 12)
    request = structs.replace(make_request(prompt=tuple(ids), prompt_logprobs=1, logprobs=0), text="hello world " * 12)
    live = LiveRequest(1, request, tokenizer, DeadlineConfig(), lambda _: None)
    scores = tuple(TokenLogprob(each, -0.5, ((7, -0.25),), 2) for each in ids[1:])
    live.accept(event())
    live.accept(TokenEvent(1, prompt_logprobs=scores[:5]))
    live.accept(TokenEvent(1, prompt_logprobs=scores[5:]))
    live.accept(event(*tokens("hi"), finish="length"))

    events = await read(live.events())

    scored = prompt_logprobs_of(events)
    assert list(ids) == [token.token_id for token in scored]
    assert (None, [-0.5] * len(scores)) == (scored[0].logprob, [token.logprob for token in scored[1:]])
    assert [(2, -0.25, 1)] * len(scores) == [(each.rank, each.top[0].logprob, each.top[0].rank) for each in scored[1:]]
    assert "hello world " * 12 == "".join(
        ("hello world " * 12)[start:end] for start, end in pairwise([0, *(token.end for token in scored)])
    )
    assert [16] * (len(ids) // 16) == [len(delta.prompt_logprobs) for delta in deltas_of(events)][: len(ids) // 16]
    assert "hi" == text_of(events)
    assert live.request.progress.read_prompt


async def test_what_the_caller_may_not_see_of_a_prompt_keeps_its_place(tokenizer: HfTokenizer):
    """Neither its ids nor its text, nor what else could have stood there."""
    ids = tokens("hello world hello")
    request = structs.replace(make_request(prompt=tuple(ids), prompt_logprobs=1), hidden_tokens=2)
    live = LiveRequest(1, request, tokenizer, DeadlineConfig(), lambda _: None)
    live.accept(TokenEvent(1, prompt_logprobs=tuple(TokenLogprob(each, -0.5, ((7, -0.25),), 2) for each in ids[1:])))
    live.accept(event(finish="length"))

    scored = prompt_logprobs_of(await read(live.events()))
    hidden, shown = scored[:2], scored[2:]
    assert [WITHHELD] * 2 == [structs.replace(each, end=0) for each in hidden]
    assert list(ids[2:]) == [each.token_id for each in shown]


async def test_the_end_token_is_listed_where_the_prompt_is_scored(tokenizer: HfTokenizer):
    """Whoever counts entries finds one for each token of the usage; behind the last text, with no text of its own."""
    live = live_request(tokenizer, prompt_logprobs=0)
    live.accept(event(*tokens("hello")))
    live.accept(TokenEvent(1, finish="stop", end_token=2, logprobs=(TokenLogprob(2, -0.002),)))

    events = await read(live.events())

    assert [*tokens("hello"), 2] == ids_of(*events)
    assert finished_of(events).usage.completion_tokens == len(logprobs_of(events))
    assert "hello" == text_of(events)
