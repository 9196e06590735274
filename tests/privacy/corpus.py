"""The corpus of texts with and without personal data; `python -m tests.privacy.corpus` prints what is found in it."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.config import PiiConfig
from app.privacy.redactor import PiiKind, Redactor

_FOLDER = Path(__file__).parent
_MARKED = re.compile(r"\{\{([a-z_]+):(.*?)\}\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, and how it has to look with its personal data replaced."""

    language: str
    text: str
    expected: str
    entities: tuple[tuple[PiiKind, str], ...]


def default_redactor() -> Redactor:
    """Return the redactor that the service has by default."""
    pii = PiiConfig()
    return Redactor([PiiKind(name) for name in pii.entities], phone_regions=pii.phone_regions)


def samples(name: str) -> list[Sample]:
    """Read "personal" or "harmless"."""
    return list(_read((_FOLDER / f"{name}.txt").read_text(encoding="utf-8")))


def _read(lines: str) -> Iterator[Sample]:
    for line in lines.splitlines():
        if not line.startswith("#"):
            language, marked = line.split(" | ", 1)
            marked = marked.replace("⏎", "\n").replace("⇥", "\t")
            entities = tuple((PiiKind(kind), value) for kind, value in _MARKED.findall(marked))
            expected = _MARKED.sub(lambda found: f"[{found[1].upper()}]", marked)
            yield Sample(language, _MARKED.sub(r"\2", marked), expected, entities)


def table() -> str:
    """Return what is found of each kind, and how many harmless texts are changed, as a table in Markdown."""
    redactor = default_redactor()
    found, all_of = Counter[PiiKind](), Counter[PiiKind]()
    for sample in samples("personal"):
        counts = redactor.redact(sample.text).counts
        for kind, _ in sample.entities:
            all_of[kind] += 1
        for kind, count in counts.items():
            found[kind] += count
    rows = [f"| `{kind}` | {found[kind]} of {all_of[kind]} |" for kind in PiiKind]
    harmless = samples("harmless")
    changed = sum(redactor.redact(sample.text).text != sample.text for sample in harmless)
    rows.append(f"| harmless texts changed | {changed} of {len(harmless)} |")
    return "\n".join(["| kind | found |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())  # noqa: T201  # the command's output
