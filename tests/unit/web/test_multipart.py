"""Forms of uploads: read the same however they are cut, and refused where they leave choices."""

import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import AppError, InvalidRequest, UnsupportedMediaType
from app.web.http.multipart import MAX_FIELD_BYTES, MAX_PART_HEAD_BYTES, MultipartParser, PartStarted, UploadForm

TYPE = "multipart/form-data; boundary=b0"
FIELD = b'--b0\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b0\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\nContent-Type: text/plain\r\n\r\n'
END = b"\r\n--b0--\r\n"
CONTENT = b'{"a": 1}\r\n--b\r\n\r\n--b1\r\n'
"""Bytes that begin as a boundary does."""


async def portions(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(*parts: bytes, content_type: str = TYPE) -> tuple[bytes, UploadForm]:
    form = UploadForm(content_type, portions(*parts), fields=frozenset(["purpose"]))
    return b"".join([part async for part in form.content()]), form


@given(content=st.binary(max_size=200) | st.just(CONTENT), cuts=st.lists(st.integers(0, 400), max_size=12))
def test_what_is_read_does_not_depend_on_how_the_body_is_cut(content: bytes, cuts: list[int]):
    """Nor on what the file holds, as long as it is not the boundary itself."""
    body = FIELD + FILE + content.replace(b"--b0", b"") + END + b"an epilogue"
    ends = sorted({min(cut, len(body)) for cut in cuts} | {len(body)})
    parser, found = MultipartParser(b"b0"), list[PartStarted | bytes]()
    for start, end in zip([0, *ends], ends, strict=False):
        found += parser.feed(body[start:end])
    parser.close()
    begins = [index for index, each in enumerate(found) if isinstance(each, PartStarted)]
    assert [PartStarted("purpose", None), PartStarted("file", "a.jsonl")] == [found[index] for index in begins]
    parts = found[begins[0] + 1 : begins[1]], found[begins[1] + 1 :]
    joined = [b"".join(each for each in part if isinstance(each, bytes)) for part in parts]
    assert [b"batch", content.replace(b"--b0", b"")] == joined


@pytest.mark.parametrize("order", [(FIELD, FILE + CONTENT + b"\r\n"), (FILE + CONTENT + b"\r\n", FIELD)])
async def test_fields_may_come_before_the_file_or_after_it(order: tuple[bytes, ...]):
    content, form = await read(*order, b"--b0--")
    assert (CONTENT, "a.jsonl", {"purpose": "batch"}) == (content, form.filename, form.fields)


async def test_an_empty_file_is_a_file():
    assert b"" == (await read(FILE + END))[0]


@pytest.mark.parametrize(
    "disposition",
    [b"form-data; name=\"file\"; filename*=UTF-8''%C3%A4.jsonl", 'form-data; name=file; filename="ä.jsonl"'.encode()],
)
async def test_names_of_files_come_in_the_forms_that_clients_write(disposition: bytes):
    _, form = await read(b"--b0\r\nContent-Disposition: " + disposition + b"\r\n\r\nx" + END)
    assert "ä.jsonl" == form.filename


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x" + FILE + END,
        FIELD + b"--b0--",
        FILE + b"never ends",
        FILE + b"x\r\n--b0-",
        FILE + b"x\r\n--b0x",
        FILE + b"x\r\n" + FILE + END,
        FIELD + FIELD + FILE + END,
        FIELD.replace(b"purpose", b"other") + FILE + END,
        FIELD.replace(b'"purpose"', b'"purpose"; filename="a"') + FILE + END,
        FIELD.replace(b"batch", b"b" * (MAX_FIELD_BYTES + 1)) + FILE + END,
        FILE.replace(b'; filename="a.jsonl"', b"") + END,
        FILE.replace(b"Content-Type: text/plain", b"Content-Transfer-Encoding: base64") + END,
        FILE.replace(b"Content-Type: text/plain", b"Content-Disposition: form-data") + END,
        FILE.replace(b"Content-Type: text/plain", b"no header") + END,
        FILE.replace(b"text/plain", b"t" * MAX_PART_HEAD_BYTES) + END,
        FILE.replace(b"text/plain", b"t" * MAX_PART_HEAD_BYTES)[:-4],
        FILE.replace(b"text/plain", b"\xff") + END,
        FILE.replace(b"form-data; ", b"attachment; ") + END,
        FILE.replace(b'name="file"; ', b"") + END,
        FILE.replace(b'name="file"', b"name*=file; name*0=file") + END,
        FILE.replace(b'name="file"', b"name*=idna''file") + END,
        FILE.replace(b'name="file"', b"name*=a\0b''file") + END,
        FILE.replace(b'filename="a.jsonl"', b"filename*=unicode_escape''%5Cud800") + END,
    ],
)
async def test_what_is_no_such_form_is_refused(body: bytes):
    with pytest.raises(InvalidRequest):
        await read(body)


async def test_a_field_that_is_not_utf8_is_refused():
    _, form = await read(FIELD.replace(b"batch", b"\xff") + FILE + END)
    with pytest.raises(InvalidRequest):
        _ = form.fields


@pytest.mark.parametrize(
    ("content_type", "error"),
    [
        ("", UnsupportedMediaType),
        ("application/json", UnsupportedMediaType),
        ("multipart/form-data", UnsupportedMediaType),
        ("multipart/mixed; boundary=b0", UnsupportedMediaType),
        ("multipart/form-data; boundary*=b0; boundary*0=b0", UnsupportedMediaType),
        (f"multipart/form-data; boundary={'b' * 300}", InvalidRequest),
    ],
)
async def test_a_body_of_another_type_is_refused(content_type: str, error: type[AppError]):
    with pytest.raises(error):
        await read(FILE + END, content_type=content_type)


def test_a_content_type_takes_no_longer_than_its_length_allows():
    """The reader of mail takes seconds for as many signs as a head may hold."""
    quoted = 'multipart/form-data; boundary="' + ";" * 60_000
    began = time.process_time()
    with pytest.raises(UnsupportedMediaType):
        UploadForm(quoted, portions(), fields=frozenset())
    assert time.process_time() - began < 0.2
