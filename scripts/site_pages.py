"""Pages that the site has beside those of docs/: the list of decisions, and the linked files of the repository.

mkdocs calls the `on_` functions (`hooks` of mkdocs.yml).  A link from docs/ to a file outside of it, such as
`../config.yml`, is right where the repository is read; in the site it leads to a page that shows that file.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
SHOWN = "files"
"""Folder of the site with the files that lie outside docs/."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)#\s]+)(?=[)#])")
NOT_RUN = re.compile(r"<!-- not run here: (.+) -->")
"""What stands before a code block that no test runs; the site shows it."""
LANGUAGES = {".py": "python", ".mjs": "javascript", ".yml": "yaml", ".yaml": "yaml", ".conf": "nginx", ".sh": "sh"}


def on_config(config: MkDocsConfig) -> None:
    """Put every decision into the navigation, where its list stands."""
    if config.nav is not None:
        config.nav = [_with_decisions(each) for each in config.nav]


def _with_decisions(entry: object) -> object:
    if isinstance(entry, list):
        return [_with_decisions(each) for each in entry]
    if isinstance(entry, dict):
        return {
            title: ["decisions/index.md", *_decisions()] if below == "decisions" else _with_decisions(below)
            for title, below in entry.items()
        }
    return entry


def _decisions() -> list[str]:
    return [f"decisions/{each.name}" for each in sorted((ROOT / DOCS / "decisions").glob("[0-9]*.md"))]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the list of decisions, and a page for each linked file; such a page may link others."""
    files.append(File.generated(config, "decisions/index.md", content=decisions_page()))
    waiting = [
        (each.src_uri, Path(each.abs_src_path or "").read_text())
        for each in files.documentation_pages()
        if each.abs_src_path
    ]
    while waiting:
        uri, text = waiting.pop()
        for linked in _outside(uri, text):
            page = shown_as(linked)
            if files.get_file_from_path(page) is None:
                text = as_page(linked)
                files.append(File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
                waiting.append((page, text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/ to the pages of those files, and show which code blocks no test runs."""
    uri = page.file.src_uri

    def turned(link: re.Match[str]) -> str:
        target = target_of(uri, link[1])
        if target is None:
            return link[1]
        here = f"{DOCS}/{uri}"
        inside = target.removeprefix(f"{DOCS}/") if target.startswith(f"{DOCS}/") else shown_as(target)
        return os.path.relpath(f"{DOCS}/{inside}", PurePosixPath(here).parent)

    return NOT_RUN.sub(r"<small>Not run by the tests: \1.</small>", LINK.sub(turned, markdown))


def decisions_page() -> str:
    """Return the list of all decisions."""
    rows = []
    for uri in _decisions():
        number, _, title = (ROOT / DOCS / uri).read_text().splitlines()[0].removeprefix("# ").partition(". ")
        rows.append(f"| {number} | [{title}]({PurePosixPath(uri).name}) |\n")
    return (
        "# Decisions\n\nWhy the service is as it is: each page says what was decided, what follows from it, and what "
        f"else there was to choose from.\n\n| | |\n|---|---|\n{''.join(rows)}"
    )


def target_of(uri: str, link: str) -> str | None:
    """Return the path in the repository of what a page links; None if mkdocs finds it (or misses it) by itself."""
    written = written_at(uri)
    target = os.path.normpath(PurePosixPath(written).parent / link)
    path = ROOT / target
    if path.is_dir() and (path / "README.md").is_file():
        return f"{target}/README.md"
    if target == f"{DOCS}/decisions":
        return f"{target}/index.md"
    stays = written.startswith(f"{DOCS}/") and target.startswith(f"{DOCS}/")
    return target if path.is_file() and not stays else None


def written_at(uri: str) -> str:
    """Return where in the repository the text of a page stands, to which its links are relative."""
    if uri.startswith(f"{SHOWN}/"):
        return uri.removeprefix(f"{SHOWN}/").removesuffix(".page.md")
    return f"{DOCS}/{uri}"


def shown_as(path: str) -> str:
    """Return the page of the site that shows a file of the repository."""
    return f"{SHOWN}/{path}" if path.endswith(".md") else f"{SHOWN}/{path}.page.md"


def as_page(path: str) -> str:
    """Return a file of the repository as the text of a page."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f"# `{path}`\n\n`````{language}\n{text.rstrip() or '(empty)'}\n`````\n"


def _outside(uri: str, text: str) -> Iterator[str]:
    for link in LINK.findall(text):
        target = target_of(uri, link)
        if target is not None and not target.startswith(f"{DOCS}/"):
            yield target
