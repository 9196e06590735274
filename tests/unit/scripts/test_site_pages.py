"""The site: it is built of the pages as they are, without a dead link, and needs no other host."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OTHER_HOST = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """Run `make docs`' program on a checkout."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)],
        cwd=source,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, folder)
    assert 0 == built.returncode, built.stderr
    return folder


def test_every_page_is_built_and_every_decision_is_listed(site: Path):
    pages = [each.relative_to(ROOT / "docs").with_suffix(".html") for each in (ROOT / "docs").rglob("*.md")]
    listed = (site / "decisions" / "index.html").read_text()

    assert [] == [page.as_posix() for page in pages if not (site / page).is_file()]
    assert [] == [
        page.name for page in pages if page.match("decisions/0*.html") and f'href="{page.name}"' not in listed
    ]


def test_a_file_outside_of_docs_that_a_page_links_is_in_the_site(site: Path):
    page = (site / "configuration.html").read_text()
    shown = (site / "files" / "config.yml.page.html").read_text()

    assert 'href="files/config.yml.page.html"' in page
    assert "shutdown_grace_seconds" in shown


def test_no_page_loads_anything_from_another_host(site: Path):
    loads = {each for page in site.rglob("*.html") for each in OTHER_HOST.findall(page.read_text())}

    assert set() == {each for each in loads if 'rel="canonical"' not in each}


def test_the_search_knows_the_pages(site: Path):
    index = (site / "search" / "search_index.json").read_text()

    assert "quick-start.html" in index


def test_a_dead_link_fails_the_build(tmp_path: Path):
    """Of each kind, each by its name: to a page, to a heading, to a file outside of docs."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for each in ROOT.iterdir():
        if each.name != "docs":
            (tmp_path / each.name).symlink_to(each)
    with (tmp_path / "docs" / "glossary.md").open("a") as page:
        page.write("\n[dead](nowhere.md) [dead](access.md#no-heading) [dead](../nothing.yml)\n")

    built = build(tmp_path, tmp_path / "site")

    said = built.stdout + built.stderr
    assert 1 == built.returncode
    warnings = [line for line in said.splitlines() if line.startswith("WARNING")]
    assert 3 == len(warnings), said
    assert all(any(name in line for line in warnings) for name in ("nowhere.md", "no-heading", "nothing.yml")), said
