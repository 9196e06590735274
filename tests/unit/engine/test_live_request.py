"""What a request is told of its tokens: log-probabilities with their text, and what came for nothing."""

import asyncio
from itertools import pairwise

import pytest

from app.config import DeadlineConfig
from app.engine.base import Chunk, GenerationRequest
from app.engine.live_request import LiveRequest
from app.engine.tokenizer.hf_tokenizer import HfTokenizer
from app.ipc.messages import TokenEvent
from app.types import FinishReason, SamplingParams, TokenLogprob, Usage
from tests.unit.engine.fake_worker import TOKENIZER, tokens
from tests.unit.tiny_models import save


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return HfTokenizer(save(TOKENIZER, tmp_path_factory.mktemp("tokenizer")))


def ticket(tokenizer: HfTokenizer, **params: object) -> LiveRequest:
    request = GenerationRequest("one", "t", (1, 2, 3), SamplingParams(max_tokens=50, logprobs=0, **params))  # type: ignore[arg-type]
    return LiveRequest(1, request, tokenizer.decoder(), DeadlineConfig(), lambda _: None)


def event(*token_ids: int, finish: str | None = None, cached_tokens: int = 0) -> TokenEvent:
    """Each token as likely as its number says, so that none can be taken for another."""
    logprobs = tuple(TokenLogprob(each, -each / 1000) for each in token_ids)
    return TokenEvent(1, token_ids, finish, None, logprobs, cached_tokens)  # type: ignore[arg-type]  # a word of the test


async def said(ticket: LiveRequest) -> list[Chunk]:
    return [chunk async for chunk in ticket.chunks()]


def numbers(*chunks: Chunk) -> list[int]:
    assert all(len(chunk.logprobs) == len(chunk.token_ends) for chunk in chunks)
    return [token.token_id for chunk in chunks for token in chunk.logprobs]


async def step_by_step(ticket: LiveRequest, events: list[TokenEvent]) -> list[Chunk]:
    """Read each piece before the next token comes."""
    reading = asyncio.create_task(said(ticket))
    for each in events:
        ticket.accept(each)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return await reading


async def test_each_token_comes_with_its_text(tokenizer: HfTokenizer):
    """One piece for each token that is read in time, with the place where it ends; none for the end token."""
    ids = tokens("hello world")
    chunks = await step_by_step(ticket(tokenizer), [event(), *map(event, ids), event(finish="stop")])

    assert [[each] for each in ids] == [numbers(chunk) for chunk in chunks[:-1]]
    assert [(len(chunk.text),) for chunk in chunks[:-1]] == [chunk.token_ends for chunk in chunks[:-1]]
    assert [] == numbers(chunks[-1])
    assert [-each / 1000 for each in ids] == [token.logprob for chunk in chunks for token in chunk.logprobs]
    assert len(ids) + 1 == sum(chunk.tokens for chunk in chunks)


async def test_a_slow_reader_gets_the_tokens_of_a_piece_in_order(tokenizer: HfTokenizer):
    """And where in the piece each of them ends."""
    ids = tokens("hello world")
    one = ticket(tokenizer)
    one.accept(event(*ids, finish="length"))

    first, _ = await said(one)

    assert "hello world" == first.text
    assert ids == numbers(first)
    ends = [0, *first.token_ends]
    assert ids == [tokens(first.text[begin:end])[0] for begin, end in pairwise(ends)]


async def test_tokens_that_a_stop_string_cuts_off_are_not_shown(tokenizer: HfTokenizer):
    """A token that reaches into the stop string is one of them, whatever of it is shown."""
    ids = [*tokens("hello"), *tokens(" world"), *tokens("!")]
    inside = ticket(tokenizer, stop=("orld",))
    inside.accept(event(*ids))

    chunks = await said(inside)

    beginnings = [tokenizer.decoder().feed(ids[:count]) for count in range(len(ids) + 1)]
    whole = max(count for count, text in enumerate(beginnings) if "hello w".startswith(text))
    assert "hello w" == "".join(chunk.text for chunk in chunks)
    assert FinishReason.STOP == chunks[-1].finish_reason
    assert ids[:whole] == numbers(*chunks)


async def test_tokens_of_text_that_may_become_a_stop_string_wait_with_it(tokenizer: HfTokenizer):
    """They are shown when it is, at the end of the answer at the latest."""
    hello, bang = tokens("hello"), tokens("!")
    waiting = ticket(tokenizer, stop=("!?",))

    chunks = await step_by_step(waiting, [event(*hello), event(*bang), event(finish="length")])

    assert [hello, bang] == [numbers(chunk) for chunk in chunks if chunk.text]
    assert ["hello", "!"] == [chunk.text for chunk in chunks if chunk.text]


async def test_the_tokens_of_one_character_come_together(tokenizer: HfTokenizer):
    """An unfinished one comes with its end, or with the end of the answer as U+FFFD."""
    first, second = tokens("é")

    chunks = await step_by_step(ticket(tokenizer), [event(first), event(second), event(first), event(finish="length")])

    assert [("é", [first, second]), ("\ufffd", [first])] == [(each.text, numbers(each)) for each in chunks if each.text]


async def test_a_token_without_text_at_the_end_is_told_with_the_last_piece(tokenizer: HfTokenizer):
    """As a control token is that the model made in mid-answer because it was told to go on."""
    control = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    hello = tokens("hello")

    chunks = await step_by_step(ticket(tokenizer), [event(*hello), event(control), event(finish="length")])

    assert [("hello", hello), ("", [control])] == [(each.text, numbers(each)) for each in chunks]
    assert (0,) == chunks[-1].token_ends
    assert FinishReason.LENGTH == chunks[-1].finish_reason


async def test_usage_tells_what_the_worker_did_not_compute_again(tokenizer: HfTokenizer):
    """The first event of a request says it."""
    one = ticket(tokenizer)
    one.accept(event(cached_tokens=2))
    one.accept(event(*tokens("a"), finish="length"))

    assert Usage(3, 1, cached_tokens=2) == (await said(one))[-1].usage
