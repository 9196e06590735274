"""README and docs: what they name exists."""

import re
from pathlib import Path

import pytest

from app.config import Settings

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "models").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())

    assert [] == [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_make_target_that_is_named_exists(page: Path):
    code = re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)
    named = {name for parts in code for name in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", " ".join(parts))}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set() == named - targets


def test_every_page_of_docs_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text()

    assert [] == [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in navigation]


def test_every_promise_names_tests_that_exist():
    """A promise of the security page without its test would only be a wish."""
    text = (ROOT / "docs" / "security.md").read_text()
    promises = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| What")]
    missing = []
    for line in promises:
        named = re.findall(r"`([a-z0-9_/]+\.py)::(test_\w+)`", line)
        missing += [] if named else [line]
        missing += [f"{path}::{name}" for path, name in named if not _defines(ROOT / "tests" / path, name)]

    assert len(promises) > 60
    assert [] == missing


def _defines(path: Path, name: str) -> bool:
    return path.is_file() and re.search(rf"def {name}\(", path.read_text()) is not None


def test_the_readme_is_short_enough_to_be_read():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_section_of_the_configuration_has_its_page():
    text = (ROOT / "docs" / "configuration.md").read_text()
    sections = {name for name, field in Settings.model_fields.items() if not name.endswith(("_token", "_url"))}

    assert set() == {name for name in sections if f"`{name}`" not in text}


def test_every_variable_that_the_docs_set_is_one_of_the_settings():
    known = set(re.findall(r"^# ([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"\b([A-Z]+(?:_[A-Z]+)*__[A-Z_]+)=", page.read_text())}

    assert named
    assert set() == named - known - {"SECTION__KEY"}
