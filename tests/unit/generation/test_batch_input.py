"""The file of a batch: read line by line in whatever portions it comes, and refused with the lines that are wrong."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.batches import InputLine
from app.generation.batch_input import MAX_ERRORS, BatchInput, InvalidBatch, endpoint_of

CHAT = "/v1/chat/completions"


def line(custom_id: str = "a", **fields: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"n": 1}} | fields).encode()


async def portions(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def read(content: bytes, *, size: int = 64, max_lines: int = 100) -> list[InputLine]:
    reader = BatchInput(CHAT, max_lines=max_lines)
    return [each async for some in reader.lines(portions(content, size)) for each in some]


@given(size=st.integers(1, 300), end=st.sampled_from([b"", b"\n", b"\r\n", b"\n\n \n"]))
async def test_every_line_is_found_once_however_the_file_is_cut(size: int, end: bytes):
    """Empty lines are no requests, but counted, so that errors name the lines of an editor."""
    content = line("a") + b"\n\n" + line("b") + b"\r\n" + line("ä\u2028") + end
    found = await read(content, size=size)
    assert [(1, "a"), (3, "b"), (4, "ä\u2028")] == [(each.number, each.custom_id) for each in found]
    assert {b'{"n": 1}'} == {each.body for each in found}


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"\xff", "invalid_json_line"),
        (b"[" * 100_000, "invalid_line"),
        (b"[]", "invalid_line"),
        (b"{}", "invalid_line"),
        (line(extra=1), "invalid_line"),
        (line(custom_id=None), "invalid_line"),  # type: ignore[arg-type]
        (line(""), "invalid_custom_id"),
        (line("a" * 257), "invalid_custom_id"),
        (line("a\0"), "invalid_custom_id"),
        (line(method="GET"), "invalid_method"),
        (line(url="/v1/embeddings"), "mismatched_endpoint"),
        (line(body=[]), "invalid_request"),
        (line("first"), "duplicate_custom_id"),
    ],
)
async def test_a_line_that_is_no_request_is_named(wrong: bytes, code: str):
    with pytest.raises(InvalidBatch) as caught:
        await read(line("first") + b"\n" + wrong + b"\n" + line("last"))
    assert [(code, 2)] == [(error.code, error.line) for error in caught.value.errors]


async def test_no_more_errors_are_named_than_somebody_reads():
    with pytest.raises(InvalidBatch) as caught:
        await read(b"{\n" * 1000)
    assert MAX_ERRORS == len(caught.value.errors)


@pytest.mark.parametrize(("content", "code"), [(b"", "empty_file"), (b"\n \n", "empty_file")])
async def test_a_file_without_requests_is_refused(content: bytes, code: str):
    with pytest.raises(InvalidBatch) as caught:
        await read(content)
    assert [code] == [error.code for error in caught.value.errors]


async def test_a_file_of_too_many_requests_is_refused_before_it_is_read_to_its_end():
    lines = b"\n".join(line(str(number)) for number in range(12))
    assert 12 == len(await read(lines, max_lines=12))
    with pytest.raises(InvalidBatch) as caught:
        await read(lines + b"\n{", max_lines=11)
    assert ["too_many_requests"] == [error.code for error in caught.value.errors]


def test_the_endpoint_of_a_line_is_what_it_names():
    assert (CHAT, None, None) == (endpoint_of(line()), endpoint_of(b"{"), endpoint_of(b"{}"))
