"""The reference of the configuration: made from the code, and complete."""

import re
from pathlib import Path

from app.config import Settings
from scripts.settings_page import page

ROOT = Path(__file__).parents[3]


def rows() -> list[list[str]]:
    return [re.split(r" \| ", line.strip("| ")) for line in page().splitlines() if line.startswith("| `")]


def test_the_page_is_made_from_the_code() -> None:
    """`python -m scripts.settings_page` gives the file that is in the repository."""
    assert page() == (ROOT / "docs" / "settings.md").read_text()


def test_every_setting_says_what_it_means() -> None:
    assert [] == [row for row in rows() if len(row) != 4 or not row[3].strip("| ")]


def test_every_setting_is_on_the_page() -> None:
    variables = set(re.findall(r"^# ([A-Z_0-9]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    named = set()
    for part in re.split(r"^## ", page(), flags=re.MULTILINE)[1:]:
        section = part[: part.index("\n")].strip("`")
        keys = re.findall(r"^\| `(\w+)`", part, re.MULTILINE)
        named |= {(f"{section}__{key}" if section in Settings.model_fields else key).upper() for key in keys}

    assert variables
    assert set() == variables - named - {"MODELS"}
