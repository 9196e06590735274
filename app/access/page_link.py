"""One-time codes that sign a browser in: a link shows one, and the first who sends it back gets the first key.

The file `page_link` in the data folder holds the digest of the latest code and its end.  So several API processes of
one machine know it, and its removal, which succeeds once, is its use.
"""

import hmac
import os
import secrets
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

LINK_FILE = "page_link"
VALID_SECONDS = 900
MAX_CODE_CHARS = 64
_PREFIX = "once_"


def new_code(data_dir: Path, now: float) -> str:
    """Return a new code; earlier codes are invalid from now on.

    Args: now: seconds since 1970.
    Raises: OSError: the folder cannot be written.
    """
    code = _PREFIX + secrets.token_urlsafe(24)
    path = data_dir / LINK_FILE
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{_digest(code)} {now + VALID_SECONDS:.0f}\n")
    draft.replace(path)
    return code


def use_code(data_dir: Path, code: str, now: float) -> bool:
    """Return whether this is the latest code, unused and not too old; from now on it is none."""
    path = data_dir / LINK_FILE
    try:
        digest, end = path.read_text(encoding="ascii").split()
        is_right = hmac.compare_digest(digest, _digest(code))
        is_old = now > float(end)
    except (OSError, ValueError):
        return False
    if is_right or is_old:
        # Of several that come at once only one removes it.
        with suppress(OSError):
            path.unlink()
            return is_right and not is_old
    return False


def _digest(code: str) -> str:
    return sha256(code.encode()).hexdigest()
