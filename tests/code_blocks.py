"""The code blocks of README and docs, found by Sybil: which are run, which not and why, and what they print."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from sybil import Document, Region, Sybil
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
RUN = ("sh", "python", "yaml")
"""Languages whose blocks are run; js is run by `make test-clients`, json and none are what a program prints."""
NOT_RUN = re.compile(r"<!-- not run here: (.+) -->\s*\Z")
ANY = "..."
"""Stands for any text in what a block prints."""


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A block of a page."""

    page: str
    line: int
    language: str
    code: str
    output: str | None
    """What stands below it as its output, if anything does."""
    not_run: str | None
    """Why the tests do not run it."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _fences(document: Document) -> Iterator[Region]:
    """Parse for Sybil: every fenced block is a region whose parsed value is its language and its text."""
    for region in FencedCodeBlockLexer(language=r"\w*")(document):
        region.parsed = (region.lexemes["language"], region.lexemes["source"])
        region.evaluator = None
        yield region


@cache
def blocks(page: str) -> list[CodeBlock]:
    """Return the blocks of a page that are no output, in their order."""
    document = Sybil(parsers=[_fences]).parse(ROOT / page)
    regions = sorted((region for _, region in document.regions), key=lambda region: region.start)
    found = []
    for region, after in pairwise([*regions, None]):
        assert region is not None
        language, source = region.parsed
        if language in ("", "json"):
            continue
        output = None
        if after is not None and after.parsed[0] in ("", "json"):
            output = after.parsed[1] if not document.text[region.end : after.start].strip() else None
        reason = NOT_RUN.search(document.text[: region.start])
        line = document.text.count("\n", 0, region.start) + 1
        found.append(CodeBlock(page, line, language, str(source), output, reason and reason[1]))
    return found


def matches(expected: str, printed: str) -> bool:
    """Return whether a text is what a page shows: `...` is any text, and a page may break lines where it likes."""
    parts = [r"\s*".join(map(re.escape, part.split())) for part in expected.split(ANY)]
    return re.fullmatch(r"\s*" + r".*?".join(parts) + r"\s*", printed, re.DOTALL) is not None
