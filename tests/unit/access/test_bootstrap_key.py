"""The first key: how it is made and kept."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from app.access.bootstrap_key import KEY_FILE, bootstrap_key
from app.errors import ConfigError


def test_the_first_key_is_created_once_and_only_its_owner_can_read_it(tmp_path: Path):
    folder = tmp_path / "deep" / "data"

    key = bootstrap_key(folder)

    assert key == bootstrap_key(folder) == (folder / KEY_FILE).read_text().strip()
    assert 0o600 == stat.S_IMODE((folder / KEY_FILE).stat().st_mode)
    assert 0o700 == stat.S_IMODE(folder.stat().st_mode)
    assert [KEY_FILE] == [path.name for path in folder.iterdir()]


def test_threads_that_start_at_once_get_one_key(tmp_path: Path):
    for round_ in range(20):
        folder = tmp_path / str(round_)
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(lambda _, folder=folder: bootstrap_key(folder), range(8)))
        assert 1 == len(keys)
        assert [KEY_FILE] == [path.name for path in folder.iterdir()]


def test_processes_that_start_at_once_get_one_key(tmp_path: Path):
    code = (
        "import sys, pathlib; from app.access.bootstrap_key import bootstrap_key;"
        "print(bootstrap_key(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]

    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    keys = {process.communicate(timeout=60)[0] for process in running}

    assert 1 == len(keys)
    assert keys.pop().startswith("llm_")


def test_a_key_file_that_others_may_read_is_closed_and_told_of(tmp_path: Path):
    key = bootstrap_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)

    with structlog.testing.capture_logs() as lines:
        again = bootstrap_key(tmp_path)

    assert key == again
    assert 0o600 == stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode)
    assert ["warning"] == [line["log_level"] for line in lines]
    assert key not in str(lines)


@pytest.mark.parametrize("content", [b"", b"not a key", b"\xff\xfe", b"llm_short_x"])
def test_a_file_that_holds_something_else_stops_the_start(tmp_path: Path, content: bytes):
    (tmp_path / KEY_FILE).write_bytes(content)

    with pytest.raises(ConfigError, match="delete it"):
        bootstrap_key(tmp_path)


def test_a_folder_that_cannot_be_written_stops_the_start_with_its_name(tmp_path: Path):
    occupied = tmp_path / "file"
    occupied.touch()

    with pytest.raises(ConfigError, match=str(occupied)):
        bootstrap_key(occupied / "data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_stops_the_start(tmp_path: Path):
    tmp_path.chmod(0o500)

    with pytest.raises(ConfigError, match="APP__DATA_DIR"):
        bootstrap_key(tmp_path)
