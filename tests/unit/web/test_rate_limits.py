"""How callers are named, and how the headers are written."""

import pytest
from starlette.requests import Request

from app.web.http.rate_limits import caller_address, client_address, duration


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3:4:5:6", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::1", 1), "2001:db8:1:2::/64"),
        (("::1", 1), "::/64"),
        (("fe80::1%eth0", 1), "fe80::/64"),
        (("not an address", 0), "unknown"),
        (("", 0), "unknown"),
        (None, "unknown"),
    ],
)
def test_an_address_is_one_ipv4_or_a_whole_ipv6_site(client, expected):
    assert expected == client_address({"client": client})


def test_a_caller_without_an_address_has_a_name_all_the_same():
    assert "unknown" == caller_address(Request({"type": "http", "client": None, "headers": []}))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0s"), (0.1, "1s"), (6, "6s"), (59.5, "1m0s"), (90, "1m30s"), (3600, "1h0m0s"), (3725, "1h2m5s")],
)
def test_durations_are_written_as_openai_writes_them(seconds, expected):
    assert expected == duration(seconds)
