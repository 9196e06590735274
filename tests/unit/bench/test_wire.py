"""Reading a stream as the benchmark's client does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as some

from bench.wire import EventReader, Post, RequestFailed, StreamEvent, send

STREAM = (
    b': keep-alive\r\n\r\nevent: delta\r\ndata: {"a":\r\ndata: 1}\r\n\r\ndata: \xc3\xa9\n\ndata:[DONE]\n\nevent: x\n'
)
EVENTS = [("delta", '{"a":\n1}'), ("", "é"), ("", "[DONE]")]


@given(some.sets(some.integers(1, len(STREAM) - 1)))
def test_events_are_the_same_however_their_bytes_are_cut(cuts):
    """Both line ends, comments, several data lines, half a character at a cut; an unfinished event is kept back."""
    reader = EventReader()
    edges = [0, *sorted(cuts), len(STREAM)]

    events = [event for start, end in pairwise(edges) for event in reader.feed(STREAM[start:end])]

    assert EVENTS == events


@asynccontextmanager
async def answering(*portions: bytes) -> AsyncIterator[int]:
    """Listen on a port; who asks gets these bytes, a moment apart, and then the connection is closed."""
    done = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        for portion in portions:
            writer.write(portion)
            await asyncio.sleep(0.02)
        writer.close()
        done.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await done.wait()


def read(name: str, data: str) -> StreamEvent:
    return StreamEvent(usage=(3, 2)) if name == "done" else StreamEvent(text=data)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FIRST, SECOND = b"9\r\ndata: a\n\n\r\n", b"9\r\ndata: b\n\n\r\n"
LAST = b"15\r\nevent: done\ndata: 1\n\n\r\n0\r\n\r\n"
POST = Post("/", {"prompt": "hello"})


async def test_a_response_records_when_each_event_arrived_and_how_many_tokens_it_has():
    """The events arrived 20 ms apart, and the server's own count is taken."""
    async with answering(HEAD + FIRST, SECOND, LAST) as port:
        answer = await send(port, POST, read)

    assert ("ab", 3, 2) == (answer.text, answer.prompt_tokens, answer.completion_tokens)
    assert 1 == len(answer.gaps)
    assert 0.01 < answer.gaps[0] < answer.ended - answer.began


async def test_the_first_word_is_later_than_a_blank_before_it():
    """A filter may send the blank at once and keep the word until it knows where that ends."""
    blank = b"9\r\ndata:  \n\n\r\n"
    async with answering(HEAD + blank, FIRST, LAST) as port:
        answer = await send(port, POST, read)

    assert 0.01 < answer.first_word - answer.first_token < 1


@pytest.mark.parametrize(
    ("portions", "reason"),
    [
        ([b"HTTP/1.1 503 Service Unavailable\r\n\r\nfull"], "HTTP 503: full"),
        ([HEAD + FIRST], "the connection broke"),
        ([HEAD + FIRST + b"0\r\n\r\n"], "without a count"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"], "not a stream"),
    ],
)
async def test_half_an_answer_is_a_failure(portions, reason):
    """A server that refuses or breaks off is never measured as a fast one."""
    async with answering(*portions) as port:
        with pytest.raises(RequestFailed, match=reason):
            await send(port, POST, read)
