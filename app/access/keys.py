"""Decide whose API key this is, and make the first one.

Knows no HTTP and no framework.  Today there is one key, the configured or the generated one; `KeyRing.authenticate` is
all that the web layer sees, so a database of keys can stand behind the same method.
"""

import hashlib
import hmac
import os
import re
import secrets
import string
import zlib
from pathlib import Path

import structlog

from app.errors import ConfigError
from app.types import Principal

KEY_FILE = "api_key"

_BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_CHARS = 8
_SECRET_CHARS = 32
"""32 characters of base62 are 190 random bits."""
_CHECKSUM_CHARS = 6
"""The fewest base62 digits that hold a CRC-32."""
_KEY = re.compile(
    rf"llm_(?P<id>[0-9A-Za-z]{{{_ID_CHARS}}})_[0-9A-Za-z]{{{_SECRET_CHARS}}}(?P<checksum>[0-9A-Za-z]{{{_CHECKSUM_CHARS}}})"
)

_log = structlog.get_logger("llm_service")


class KeyRing:
    """The keys that are let in, as digests: the keys themselves are not kept."""

    def __init__(self, key: str) -> None:
        """Args:
        key: the one valid key.  One of our own form is known by the id in it, any other as "admin".
        """
        key_id = _id_of(key) or "admin"
        self._principal = Principal(key_id=key_id, tenant=key_id)
        self._digest = _digest(key.encode())

    def authenticate(self, presented: bytes) -> Principal | None:
        """Return the owner of a key, or None if no such key is valid.

        Takes the same time for every wrong key: digests are compared, so neither the length nor a common prefix shows.
        """
        return self._principal if hmac.compare_digest(_digest(presented), self._digest) else None


def new_key() -> str:
    """Make a key `llm_<id>_<secret><checksum>`: the prefix is easy to search for, the checksum sorts out look-alikes.

    Source: GitHub's token format, "Behind GitHub's new authentication token formats", 2021-04-05.
    """
    body = f"llm_{_random(_ID_CHARS)}_{_random(_SECRET_CHARS)}"
    return body + _checksum(body)


def first_key(data_dir: Path) -> str:
    """Return the key kept in `data_dir`, making it at the first start.

    Two processes that start at once get the same key.  A key file that others may read is closed to them.

    Raises: ConfigError: the folder cannot be written, or the file holds something else than a key.
    """
    path = data_dir / KEY_FILE
    try:
        if not path.exists():
            _create(path, new_key())
        _close_to_others(path)
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError(
            f"the API key cannot be kept in {path}: {error.strerror}; "
            "make that folder writable, name another as APP__DATA_DIR, or set SECURITY__API_KEY"
        ) from None
    except UnicodeDecodeError:
        key = ""
    if _id_of(key) is None:
        raise ConfigError(f"{path} does not hold a key made by this service; delete it to get a new one")
    return key


def _create(path: Path, key: str) -> None:
    """Write the file whole or not at all; a file that another process made meanwhile stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        # A link appears in one step and, unlike a rename, never replaces what is there.
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()


def _close_to_others(path: Path) -> None:
    # Windows keeps no such bits: there every file looks readable by all.
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o600)
        _log.warning("Others could read the API key file: closed to them now, but the key may be known", path=str(path))


def _id_of(key: str) -> str | None:
    match = _KEY.fullmatch(key)
    if match is None or match["checksum"] != _checksum(key[:-_CHECKSUM_CHARS]):
        return None
    return match["id"]


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CHECKSUM_CHARS):
        number, digit = divmod(number, len(_BASE62))
        digits = _BASE62[digit] + digits
    return digits


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))
