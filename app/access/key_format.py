"""The format of API keys: generating one, parsing it, and its digest."""

import hashlib
import re
import secrets
import string
import zlib

CONFIGURED_ID = "admin"
"""The id of the configured key, in counters, rate buckets and the log.  No key of the database can have it: their ids
have eight characters."""

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_CHARS = 8
_SECRET_CHARS = 32
"""32 characters of base62 are 190 random bits."""
_CHECKSUM_CHARS = 6
"""The fewest base62 digits that hold a CRC-32."""
_KEY = re.compile(
    rf"llm_(?P<id>[0-9A-Za-z]{{{_ID_CHARS}}})_[0-9A-Za-z]{{{_SECRET_CHARS}}}(?P<checksum>[0-9A-Za-z]{{{_CHECKSUM_CHARS}}})"
)


def new_key(key_id: str | None = None) -> str:
    """Generate a key `llm_<id>_<secret><checksum>`: a prefix to search for, a checksum against look-alikes.

    Args: key_id: of the key that gets a new secret; None generates an id too.
    Source: GitHub's token format, "Behind GitHub's new authentication token formats", 2021-04-05.
    """
    body = f"llm_{key_id or _random(_ID_CHARS)}_{_random(_SECRET_CHARS)}"
    return body + _checksum(body)


def id_of(key: str) -> str | None:
    """Return the public id in a key; None if it cannot be a key of ours."""
    match = _KEY.fullmatch(key)
    if match is None or match["checksum"] != _checksum(key[:-_CHECKSUM_CHARS]):
        return None
    return match["id"]


def digest_of(key: bytes) -> bytes:
    """Return the SHA-256 digest, which is stored.  190 random bits need no slow hash, as they cannot be tried out."""
    return hashlib.sha256(key).digest()


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CHECKSUM_CHARS):
        number, digit = divmod(number, len(_BASE62))
        digits = _BASE62[digit] + digits
    return digits


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))
