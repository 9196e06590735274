"""Examines the folders and files that the service writes: room, rights, and who else can read them."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from app.access.bootstrap_key import KEY_FILE
from app.access.key_format import id_of
from app.config import Settings
from app.doctor.findings import Finding, megabytes, ok, problem, warning

LITTLE_BYTES = 1_000_000_000
"""Less free space than this is worth a warning."""
TOO_LITTLE_BYTES = 50_000_000
"""The database and a rotated log file need about so much."""


def examine_storage(settings: Settings) -> Iterator[Finding]:
    yield from _folder("data folder", settings.app.data_dir, "name another as APP__DATA_DIR")
    yield from _key(settings)
    if settings.logging.file is not None:
        yield from _folder("log file", settings.logging.file.parent, "name another as LOGGING__FILE")
        yield from _private("log file", settings.logging.file)
    yield from _temporary(settings.app.data_dir)


def _folder(subject: str, folder: Path, other: str) -> Iterator[Finding]:
    """Yield whether a folder can be written, or created, and how much room its disk has."""
    place = _existing(folder)
    if not place.is_dir():
        yield problem(subject, f"{place} is no folder", f"move it away, or {other}")
        return
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        yield problem(subject, f"{place} cannot be written: {error.strerror}", f"make it writable, or {other}")
    else:
        yield ok(subject, f"{folder} is writable" if place == folder else f"{folder} will be created")
    yield from free_space(subject, place)
    if subject == "data folder" and place == folder and os.name == "posix" and folder.stat().st_mode & 0o022:
        yield warning(subject, f"others may change what is in {folder}", f"chmod go-w {folder}")


def free_space(subject: str, place: Path) -> Iterator[Finding]:
    """Yield how much room there is on the disk of a folder."""
    free = shutil.disk_usage(place).free
    text = f"its disk has {megabytes(free)} free"
    if free < TOO_LITTLE_BYTES:
        yield problem(subject, text, "make room: the service refuses what it cannot store")
    elif free < LITTLE_BYTES:
        yield warning(subject, text, "make room before it is full")
    else:
        yield ok(subject, text)
    if hasattr(os, "statvfs") and (volume := os.statvfs(place)).f_files and not volume.f_favail:
        yield problem(subject, "its disk has no room for another file (inodes)", "delete small files on it")


def _key(settings: Settings) -> Iterator[Finding]:
    path = settings.app.data_dir / KEY_FILE
    if settings.security.api_key is not None:
        yield ok("API key", "set by the configuration")
        return
    try:
        key = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        yield ok("API key", f"the first start creates one in {path}")
    except (OSError, UnicodeDecodeError):
        yield problem("API key", f"{path} cannot be read", "make it readable, or delete it to get a new one")
    else:
        if id_of(key) is None:
            yield problem("API key", f"{path} holds no key of this service", "delete it to get a new one")
        else:
            yield ok("API key", f"in {path}")
        yield from _private("API key", path)


def _private(subject: str, path: Path) -> Iterator[Finding]:
    """Yield a warning for a file that others on the machine can read."""
    if os.name == "posix" and path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield warning(subject, f"others on this machine can read {path}", f"chmod 600 {path}")


def _temporary(data_dir: Path) -> Iterator[Finding]:
    """The worker's socket lies there, and compiled code where the data folder does not take it."""
    folder = Path(tempfile.gettempdir())
    if not os.access(folder, os.W_OK):
        yield problem("temporary folder", f"{folder} cannot be written", "name another folder as TMPDIR")
    elif _executes_nothing(folder) and _executes_nothing(_existing(data_dir)):
        text = f"nothing in it ({folder}) or in the data folder may be executed, so models run slower"
        yield warning("temporary folder", text, "mount one of them without noexec, or name another as TMPDIR")
    else:
        yield ok("temporary folder", f"{folder} is writable")


def _executes_nothing(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0))


def _existing(folder: Path) -> Path:
    """Return a folder, or the one above it that exists."""
    return next((each for each in (folder, *folder.absolute().parents) if each.exists()), Path("/"))
