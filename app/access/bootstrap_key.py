"""Creates the first API key of a service that has none configured, in a file where its owner finds it."""

import os
import secrets
from pathlib import Path

import structlog

from app.access.key_format import id_of, new_key
from app.errors import ConfigError

KEY_FILE = "api_key"

_log = structlog.get_logger("llm_service")


def bootstrap_key(data_dir: Path) -> str:
    """Return the key stored in `data_dir`, and create it at the first start.

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
            f"the API key cannot be stored in {path}: {error.strerror}; "
            "make that folder writable, name another as APP__DATA_DIR, or set SECURITY__API_KEY"
        ) from None
    except UnicodeDecodeError:
        key = ""
    if id_of(key) is None:
        raise ConfigError(f"{path} holds no key of this service; delete it to get a new one")
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
    # Windows has no such bits: there every file looks readable by all.
    if os.name == "posix" and path.stat().st_mode & 0o077:
        path.chmod(0o600)
        _log.warning("Others could read the API key file: closed to them now, but the key may be known", path=str(path))
