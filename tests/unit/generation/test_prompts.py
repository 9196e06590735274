"""Our own words, read from files."""

from pathlib import Path

import pytest

from app.errors import ConfigError
from app.generation.prompts import read_prompt


def test_variables_are_filled_in_and_double_braces_stay_braces(tmp_path: Path) -> None:
    """{name} is replaced; {{ and }} are plain braces."""
    (tmp_path / "system.txt").write_text("You are {model_name}, not {{model_name}}.\n")

    assert "You are tiny, not {model_name}." == read_prompt(tmp_path, "system", {"model_name": "tiny"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Hello {nobody}", "unknown variable nobody; known: model_name"),
        (b"Hello {", "write {{ and }} for plain braces"),
        (b"  \n", "the file is empty"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_prompt_that_cannot_be_used_ends_the_start(tmp_path: Path, content: bytes | None, message: str) -> None:
    """The message names the file and the reason."""
    if content is not None:
        (tmp_path / "system.txt").write_bytes(content)

    with pytest.raises(ConfigError, match=r"system\.txt") as refused:
        read_prompt(tmp_path, "system", {"model_name": "tiny"})

    assert message in str(refused.value)
