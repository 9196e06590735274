import asyncio
import json

import pytest

from bench.overhead import LOADS, PROMPT, Figures, Load, Round, as_markdown, check, read_response


def figures(per_second: float) -> Figures:
    return Figures(per_second=per_second, p50_ms=1.0, cpu_ms=0.5, client_share=0.25)


def test_the_ratio_is_the_median_of_the_rounds_and_stands_beside_its_target():
    load = Load("whole, 1 client", 1, target=0.25)
    rounds = [Round(figures(ours), figures(1000)) for ours in (100, 300, 260)]

    table = as_markdown({load: rounds})

    assert "| 260 | 1.0 | 0.50 | 1000 | 1.0 | 0.50 | **0.26** | 0.10 to 0.30 | 0.25 met |" in table
    assert "25 %" in table


def test_a_ratio_below_its_target_is_reported_as_missed():
    table = as_markdown({Load("cached, 1 client", 1, cache=True, target=0.3): [Round(figures(29), figures(100))]})

    assert "0.30 missed" in table


def test_every_load_has_a_name_and_a_file_name_of_its_own():
    assert len(LOADS) == len({load.name for load in LOADS}) == len({load.slug for load in LOADS})


def test_a_server_that_returns_less_than_it_was_sent_is_refused():
    stream = "".join(f'event: delta\ndata: {{"content": "{character}"}}\n\n' for character in PROMPT)
    check(json.dumps({"generated_text": PROMPT}).encode(), stream=False)
    check(stream.encode() + b"event: done\ndata: {}\n\n", stream=True)

    with pytest.raises(RuntimeError):
        check(json.dumps({"generated_text": PROMPT[:-1]}).encode(), stream=False)
    with pytest.raises(RuntimeError):
        check(stream.encode()[:-40], stream=True)


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ],
)
async def test_a_response_is_read_to_its_end_however_it_is_framed(response: bytes):
    reader = asyncio.StreamReader()
    reader.feed_data(response + b"HTTP/1.1 ")

    assert b"hello" == await read_response(reader)
    assert b"HTTP/1.1 " == await reader.readexactly(9)
