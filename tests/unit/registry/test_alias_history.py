"""The small file with the history of an alias."""

from pathlib import Path

import pytest

from app.errors import RegistryUnavailable
from app.registry.alias_history import AliasHistory, read_history, write_history
from app.registry.version import ModelVersion

HISTORY = AliasHistory(
    serving=ModelVersion(name="chat", version="3", metrics={"loss": 1.5}, tags={"team": "x"}), refused="4", reason="why"
)


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "chat" / "alias-production.json"

    write_history(path, HISTORY)

    assert HISTORY == read_history(path)
    assert ["alias-production.json"] == [each.name for each in path.parent.iterdir()]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"serving": 3}', b"\xff"])
def test_a_file_that_says_nothing_is_no_history(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "file").write_bytes(content)

    assert AliasHistory() == read_history(tmp_path / "file")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("no folder")

    with pytest.raises(RegistryUnavailable, match=r"alias-production\.json cannot be written"):
        write_history(tmp_path / "file" / "alias-production.json", HISTORY)
