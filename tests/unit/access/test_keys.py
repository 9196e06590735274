"""Keys: which are let in, how the first one is made, and that it stays a secret."""

import hmac
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from app.access.keys import KEY_FILE, KeyRing, first_key, new_key
from app.errors import ConfigError


def test_the_one_key_is_let_in_and_no_other():
    """What is not the whole key, to the byte, is nobody."""
    ring = KeyRing("a-configured-key")

    assert ring.authenticate(b"a-configured-key") is not None
    for wrong in (b"", b"a-configured-ke", b"a-configured-key ", b"A-configured-key", b"\xff\x00", b"x" * 10_000):
        assert ring.authenticate(wrong) is None


def test_a_configured_key_belongs_to_admin_and_a_made_one_to_its_id():
    """The public name of a key is never the key."""
    made = new_key()

    assert "admin" == KeyRing("a-configured-key").authenticate(b"a-configured-key").key_id
    principal = KeyRing(made).authenticate(made.encode())
    assert made.split("_")[1] == principal.key_id == principal.tenant


def test_every_attempt_takes_the_same_path(monkeypatch):
    """Right, wrong and empty keys are each compared once, as digests of equal length."""
    seen = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
    ring = KeyRing("a-configured-key")

    for key in (b"a-configured-key", b"wrong", b""):
        ring.authenticate(key)

    assert [(32, 32)] * 3 == seen


def test_made_keys_have_a_checksum_that_finds_a_changed_character():
    key = new_key()
    changed = key[:20] + ("A" if key[20] != "A" else "B") + key[21:]

    assert "admin" != KeyRing(key)._principal.key_id
    assert "admin" == KeyRing(changed)._principal.key_id


def test_made_keys_differ():
    assert 100 == len({new_key() for _ in range(100)})


def test_the_first_key_is_made_once_and_kept_for_its_owner_alone(tmp_path: Path):
    folder = tmp_path / "deep" / "data"

    key = first_key(folder)

    assert key == first_key(folder) == (folder / KEY_FILE).read_text().strip()
    assert 0o600 == stat.S_IMODE((folder / KEY_FILE).stat().st_mode)
    assert 0o700 == stat.S_IMODE(folder.stat().st_mode)
    assert [KEY_FILE] == [path.name for path in folder.iterdir()]


def test_threads_that_start_at_once_get_one_key(tmp_path: Path):
    for round_ in range(20):
        folder = tmp_path / str(round_)
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(lambda _, folder=folder: first_key(folder), range(8)))
        assert 1 == len(keys)
        assert [KEY_FILE] == [path.name for path in folder.iterdir()]


def test_processes_that_start_at_once_get_one_key(tmp_path: Path):
    code = "import sys, pathlib; from app.access.keys import first_key; print(first_key(pathlib.Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path / "data")]

    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    keys = {process.communicate(timeout=60)[0] for process in running}

    assert 1 == len(keys)
    assert keys.pop().startswith("llm_")


def test_a_key_file_that_others_may_read_is_closed_and_told_of(tmp_path: Path):
    key = first_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)

    with structlog.testing.capture_logs() as lines:
        again = first_key(tmp_path)

    assert key == again
    assert 0o600 == stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode)
    assert ["warning"] == [line["log_level"] for line in lines]
    assert key not in str(lines)


@pytest.mark.parametrize("content", [b"", b"not a key", b"\xff\xfe", b"llm_short_x"])
def test_a_file_that_holds_something_else_stops_the_start(tmp_path: Path, content: bytes):
    (tmp_path / KEY_FILE).write_bytes(content)

    with pytest.raises(ConfigError, match="delete it"):
        first_key(tmp_path)


def test_a_folder_that_cannot_be_written_stops_the_start_with_its_name(tmp_path: Path):
    occupied = tmp_path / "file"
    occupied.touch()

    with pytest.raises(ConfigError, match=str(occupied)):
        first_key(occupied / "data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_stops_the_start(tmp_path: Path):
    tmp_path.chmod(0o500)

    with pytest.raises(ConfigError, match="APP__DATA_DIR"):
        first_key(tmp_path)


def test_no_key_is_in_a_repr():
    key = new_key()
    ring = KeyRing(key)

    assert key not in repr(ring) + str(vars(ring)) + repr(ring.authenticate(key.encode()))
