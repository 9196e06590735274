"""The headers that every response has so that browsers neither guess its type, nor embed, nor store it.

A page of the service that loads scripts brings a policy of its own, and a file that may be cached its own rule.
"""

from collections.abc import Iterable

_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_UNLESS_GIVEN = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)


def security_headers(given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers to add to a response.  Args: given: those that it has, with names in lower case."""
    names = {name for name, _ in given}
    return [*_ALWAYS, *(header for header in _UNLESS_GIVEN if header[0] not in names)]
