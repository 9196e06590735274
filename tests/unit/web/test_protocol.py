"""What `app/web/http/protocol.py` takes from uvicorn beyond its documented interfaces is still there.

A failure here names the part that an upgrade of uvicorn or httptools changed; `tests/web` shows what it does.
"""

import inspect

import httptools
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.web.http.protocol import GuardedProtocol


@pytest.mark.parametrize(
    "name",
    [name for name, value in vars(GuardedProtocol).items() if callable(value) and name in vars(HttpToolsProtocol)],
)
def test_what_is_overridden_has_the_arguments_that_it_had(name):
    """An override whose base method got another signature would fail at a request, or never run."""
    ours, theirs = getattr(GuardedProtocol, name), getattr(HttpToolsProtocol, name)

    assert list(inspect.signature(theirs).parameters) == list(inspect.signature(ours).parameters)


@pytest.mark.parametrize("name", ["_start_asgi_task", "on_response_complete", "on_header", "data_received"])
def test_uvicorn_calls_what_is_overridden(name):
    assert name in vars(HttpToolsProtocol)
    assert name in vars(GuardedProtocol)


def test_a_cycle_has_the_state_that_a_connection_reads():
    source = inspect.getsource(RequestResponseCycle.__init__)

    for name in ("more_body", "disconnected", "message_event", "response_started", "response_complete"):
        assert f"self.{name}" in source


class Heads:
    """Counts what the parser reports."""

    def __init__(self):
        self.messages = 0
        self.headers = []

    def on_header(self, name, value):
        self.headers.append(name)

    def on_message_complete(self):
        self.messages += 1


def test_the_parser_reports_trailers_as_headers():
    """If it stops, dropping them is needed no longer."""
    heads = Heads()
    httptools.HttpRequestParser(heads).feed_data(
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-API-Key: k\r\n\r\n"
    )

    assert b"X-API-Key" in heads.headers


def test_the_parser_says_where_an_offered_protocol_would_begin_and_takes_no_body_before_it():
    heads = Heads()
    parser = httptools.HttpRequestParser(heads)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 4\r\n\r\n"

    with pytest.raises(httptools.HttpParserUpgrade) as offer:
        parser.feed_data(head + b"body")

    assert len(head) == offer.value.args[0]
