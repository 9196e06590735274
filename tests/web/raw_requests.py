"""Requests as bytes that a careless or hostile client may send, and what has to become of each.

Framing, smuggling, heads and versions: what is parsed differently by a proxy in front is refused, never guessed.
"""

import json
from dataclasses import dataclass

from tests.web.harness import KEY

BODY = json.dumps({"prompt": "hello"}).encode()
INNER = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request in a place where only a smuggler would put one."""
CHUNKED = b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY)
"""The body in one chunk, up to where trailers would stand."""


@dataclass(frozen=True)
class Case:
    """Bytes to send, and the responses to them."""

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    """Of all responses, in their order."""
    closes: bool = True
    """Whether the server closes the connection of its own accord."""
    reaches: int = 0
    """How many generations begin."""
    may_reset: bool = False
    """Whether the client goes on sending after it asked for the connection to be closed."""


def head(*lines: str, method: str = "POST", target: str = "/v1/generate", version: str = "HTTP/1.1") -> bytes:
    """Return a head with Host and key, and these lines."""
    all_lines = [f"{method} {target} {version}".rstrip(), "Host: x", f"X-API-Key: {KEY}", *lines, "", ""]
    return "\r\n".join(all_lines).encode("latin-1")


def post(*lines: str, body: bytes = BODY, **request: str) -> bytes:
    """Return a POST of JSON with these lines, that announce the body or not."""
    return head("Content-Type: application/json", *lines, **request) + body


def get(*lines: str, **request: str) -> bytes:
    return head(*lines, **{"method": "GET", "target": "/health", **request})


LENGTH = f"Content-Length: {len(BODY)}"
TE = "Transfer-Encoding: chunked"
TRAILED = head("Content-Type: application/json", TE)


def bare(*lines: bytes) -> bytes:
    """Return lines as they are, and the empty line."""
    return b"\r\n".join((*lines, b"", b""))


BODY_LENGTHS = [
    Case("exact length", post(LENGTH), (200,), closes=False, reaches=1),
    Case("length with leading zeros", post(f"Content-Length: 000{len(BODY)}"), (200,), closes=False, reaches=1),
    Case("a thousand zeros before the length", post(f"Content-Length: {'0' * 1000}{len(BODY)}"), (200,), False, 1),
    Case("too long, after leading zeros", post("Content-Length: 00000000000000000000000419430400"), (413,)),
    Case("too long", post("Content-Length: 419430400"), (413,)),
    Case("length of 40 digits", post("Content-Length: " + "9" * 40), (400,)),
    Case("length of 2^64 + the body", post(f"Content-Length: {2**64 + len(BODY)}"), (400,)),
    Case("signed length", post(f"Content-Length: +{len(BODY)}"), (400,)),
    Case("negative length", post("Content-Length: -1"), (400,)),
    Case("negative zero", post("Content-Length: -0"), (400,)),
    Case("hexadecimal length", post("Content-Length: 0x13"), (400,)),
    Case("fractional length", post("Content-Length: 19.0"), (400,)),
    Case("empty length", post("Content-Length:"), (400,)),
    Case("list of equal lengths", post(f"Content-Length: {len(BODY)}, {len(BODY)}"), (400,)),
    Case("length with a space in it", post("Content-Length: 1 9"), (400,)),
    Case("two equal lengths", post(LENGTH, LENGTH), (400,)),
    Case("two lengths", post(LENGTH, "Content-Length: 5"), (400,)),
    Case("length in other digits", post("Content-Length: \xb2"), (400,)),
    Case("no body announced", post(body=b""), (400,), closes=False),
    Case("length zero", post("Content-Length: 0", body=b""), (400,), closes=False),
    Case("body without a length", post(), (400, 400)),
]

CHUNKS = [
    Case("chunked", post(TE, body=CHUNKED + b"\r\n"), (200,), closes=False, reaches=1),
    Case("chunk extension", post(TE, body=CHUNKED.replace(b"\r\n", b";a=b\r\n", 1) + b"\r\n"), (200,), False, 1),
    Case("size with leading zeros", post(TE, body=b"0000" + CHUNKED + b"\r\n"), (200,), closes=False, reaches=1),
    Case("size that is no number", post(TE, body=b"zz\r\n"), (400,)),
    Case("signed size", post(TE, body=b"+" + CHUNKED), (400,)),
    Case("size with 0x", post(TE, body=b"0x" + CHUNKED), (400,)),
    Case("negative size", post(TE, body=b"-1\r\n"), (400,)),
    Case("size of 20 digits", post(TE, body=b"f" * 20 + b"\r\n"), (400,)),
    Case("chunk longer than its size", post(TE, body=b"5\r\n" + BODY + b"\r\n0\r\n\r\n"), (400,)),
    Case("chunk without its line end", post(TE, body=CHUNKED.replace(b"}\r\n", b"}") + b"\r\n"), (400,)),
    Case("bare LF after a size", post(TE, body=CHUNKED.replace(b"\r\n", b"\n", 1) + b"\r\n"), (400,)),
    Case("space after a size", post(TE, body=CHUNKED.replace(b"\r\n", b" \r\n", 1) + b"\r\n"), (400,)),
    Case("NUL in a size", post(TE, body=b"\0" + CHUNKED), (400,)),
    Case("trailers are dropped", TRAILED + CHUNKED + b"X-Request-ID: trailer\r\n\r\n", (200,), False, 1),
    Case("trailer that ends in NUL", TRAILED + CHUNKED + b"X-Any: a\0\r\n\r\n", (400,)),
]

SMUGGLING = [
    Case("length and encoding", post(LENGTH, TE, body=CHUNKED + b"\r\n"), (400,)),
    Case("encoding and length", post(TE, LENGTH, body=CHUNKED + b"\r\n"), (400,)),
    Case("encoding and length zero", post(TE, "Content-Length: 0", body=CHUNKED + b"\r\n" + INNER), (400,)),
    Case("encoding twice", post(TE, TE, body=CHUNKED + b"\r\n"), (400,)),
    Case("chunked twice in a list", post("Transfer-Encoding: chunked, chunked", body=CHUNKED + b"\r\n"), (400,)),
    Case("chunked, then identity", post("Transfer-Encoding: chunked, identity", body=CHUNKED + b"\r\n"), (400,)),
    Case("identity", post("Transfer-Encoding: identity"), (400,)),
    Case("gzip", post("Transfer-Encoding: gzip"), (400,)),
    Case("unknown encoding", post("Transfer-Encoding: xchunked", body=CHUNKED + b"\r\n"), (400,)),
    Case("quoted encoding", post('Transfer-Encoding: "chunked"', body=CHUNKED + b"\r\n"), (400,)),
    Case("empty encoding", post("Transfer-Encoding:", body=CHUNKED + b"\r\n"), (400,)),
    Case("space before the colon", post("Transfer-Encoding : chunked", body=CHUNKED + b"\r\n"), (400,)),
    Case("vertical tab before the value", post("Transfer-Encoding:\x0bchunked", body=CHUNKED + b"\r\n"), (400,)),
    Case("folded encoding", post("Transfer-Encoding:\r\n chunked", body=CHUNKED + b"\r\n"), (400,)),
    Case("folded header", get("X-Any: a\r\n b"), (400,)),
    Case("line that begins with a space", get(" X-Any: a"), (400,)),
    Case("bare LF between headers", get("X-Any: a\nX-Other: b"), (400,)),
    Case("bare LF ends the head", b"GET /health HTTP/1.1\nHost: x\n\n", (400,)),
    Case("bare CR in a header", get("X-Any: a\rX-Other: b"), (400,)),
    Case("NUL in a value", get("X-Any: a\0b"), (400,)),
    Case("NUL in a name", get("X-A\0ny: a"), (400,)),
    Case("header without a colon", get("X-Any"), (400,)),
    Case("header without a name", get(": a"), (400,)),
    Case("control character in a value", get("X-Any: a\x01b"), (400,)),
    Case("brackets in a name", get("X[0]: a"), (400,)),
    Case("a request as an unread body", head(f"Content-Length: {len(INNER)}", target="/nowhere") + INNER, (404,)),
    Case("a request as the body of a GET", get(f"Content-Length: {len(INNER)}") + INNER, (200,)),
    Case("a request after a chunked body", post(TE, body=CHUNKED + b"\r\n" + INNER), (200, 200), False, 1),
    Case("a request after `Connection: close`", get("Connection: close") + INNER, (200,), may_reset=True),
]

HEADS = [
    Case("HTTP/1.0", get(version="HTTP/1.0"), (200,)),
    Case("HTTP/1.0 without a host", bare(b"GET /health HTTP/1.0"), (200,)),
    Case("HTTP/0.9", b"GET /health\r\n\r\n", (505,)),
    Case("HTTP/0.9, named", get(version="HTTP/0.9"), (505,)),
    Case("HTTP/1.2", get(version="HTTP/1.2"), (400,)),
    Case("HTTP/2.0", get(version="HTTP/2.0"), (505,)),
    Case("HTTP/3.0", get(version="HTTP/3.0"), (400,)),
    Case("HTTP/11", get(version="HTTP/11"), (400,)),
    Case("lower-case version", get(version="http/1.1"), (400,)),
    Case("HTTP/2 with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    Case("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), (400,)),
    Case("noise", bytes(range(128, 256)), (400,)),
    Case("empty lines first", b"\r\n\r\n" + get(), (200,), closes=False),
    Case("no host", bare(b"GET /health HTTP/1.1"), (400,), closes=False),
    Case("two hosts", get("Host: y"), (400,), closes=False),
    Case("the same host twice", get("Host: x"), (400,), closes=False),
    Case("host with a path", bare(b"GET /health HTTP/1.1", b"Host: x/health?"), (400,), closes=False),
    Case("host with a user", bare(b"GET /health HTTP/1.1", b"Host: a@b"), (400,), closes=False),
    Case("list of hosts", bare(b"GET /health HTTP/1.1", b"Host: a, b"), (400,), closes=False),
    Case("host with a port", bare(b"GET /health HTTP/1.1", b"Host: my_service:8000"), (200,), closes=False),
    Case("IPv6 host", bare(b"GET /health HTTP/1.1", b"Host: [::1]:8000"), (200,), closes=False),
    Case("empty host", bare(b"GET /health HTTP/1.1", b"Host:"), (200,), closes=False),
    Case("absolute form", get(target="http://other/health"), (200,), closes=False),
    Case("authority form", get(target="x:80"), (400,)),
    Case("CONNECT", head(method="CONNECT", target="x:80"), (400,)),
    Case("TRACE", head(method="TRACE", target="/health"), (405,), closes=False),
    Case("unknown method", head(method="BREW", target="/health"), (400,)),
    Case("lower-case method", head(method="get", target="/health"), (400,)),
    Case("no path", bare(b"GET  HTTP/1.1", b"Host: x"), (400,)),
    Case("relative path", get(target="health"), (400,)),
    Case("space in a path", get(target="/hea lth"), (400,)),
    Case("tab in a path", get(target="/hea\tlth"), (400,)),
    Case("raw bytes in a path", get(target="/h\xe9alth"), (400,)),
    Case("half an escape in a path", get(target="/health%4"), (404,), closes=False),
    Case("NUL escaped in a path", get(target="/health%00"), (404,), closes=False),
    Case("escape that is no UTF-8", get(target="/%ff%fe"), (404,), closes=False),
    Case("escaped path", get(target="/%68ealth"), (200,), closes=False),
    Case("fragment in a path", get(target="/health#a"), (200,), closes=False),
    Case("long path", get(target="/" + "a" * 9000), (414,), closes=False),
    Case("long query", get(target="/health?" + "a" * 9000), (414,), closes=False),
    Case("very long path", get(target="/" + "a" * 2**20), (431,)),
    Case("long header", get("X-Any: " + "a" * 60_000), (200,), closes=False),
    Case("too long a header", get("X-Any: " + "a" * 70_000), (431,), closes=False),
    Case("very long header", get("X-Any: " + "a" * 2**20), (431,)),
    Case("long name of a header", get("a" * 70_000 + ": b"), (431,), closes=False),
    Case("many headers", get(*[f"X-{number}: a" for number in range(200)]), (431,), closes=False),
    Case("very many headers", get(*[f"X-{number}: a" for number in range(20_000)]), (431,)),
    Case("headers that do not end", get()[:-2] + b"X-Any: a\r\n" * 20_000, (431,)),
]

EXPECTATIONS = [
    Case(
        "offer of a websocket",
        get("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
        (200,),
        False,
    ),
    Case("offer of HTTP/2", get("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), (200,), closes=False),
    Case("a request after an offer", get("Connection: Upgrade", "Upgrade: h2c") + INNER, (200, 200), closes=False),
    Case("body with an offer", post("Connection: Upgrade", "Upgrade: h2c", LENGTH), (200,), closes=False, reaches=1),
    Case(
        "chunked body with an offer",
        post("Connection: Upgrade", "Upgrade: h2c", TE, body=CHUNKED + b"\r\n"),
        (200,),
        False,
        1,
    ),
    Case(
        "body with an offer, then a request",
        post("Connection: upgrade", "Upgrade: a", LENGTH) + INNER,
        (200, 200),
        False,
        1,
    ),
    Case("offer and `Connection: close`", get("Connection: close, Upgrade", "Upgrade: h2c"), (200,)),
    Case("continue", post("Expect: 100-continue", LENGTH), (100, 200), closes=False, reaches=1),
    Case("continue with too long a body", post("Expect: 100-continue", "Content-Length: 2000000", body=b""), (413,)),
    Case("another expectation", get("Expect: 200-maybe"), (200,), closes=False),
    Case("three requests at once", get() * 3, (200, 200, 200), closes=False),
    Case("garbage after a request", get() + b"\0\0\0\0", (200, 400)),
    Case("garbage after a request that closes", get("Connection: close") + b"\0\0\0\0", (200,), may_reset=True),
    Case("garbage after an unread body", head(TE, target="/nowhere") + CHUNKED + b"\r\n\0\0\0\0", (404,)),
    Case("garbage after a generation", post(LENGTH) + b"\0\0\0\0", (200, 400), reaches=1),
    Case("a thousand requests at once", get() * 1000, (200,) * 65 + (400,)),
]

CASES = [*BODY_LENGTHS, *CHUNKS, *SMUGGLING, *HEADS, *EXPECTATIONS]
