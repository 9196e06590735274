"""The names of registered models, as MLflow writes them: `models:/chat/3`, `models:/chat@production`."""

import re
from dataclasses import dataclass
from typing import Literal

SCHEME = "models:"
_NAME = r"(?P<name>[A-Za-z0-9_][\w.-]*(?: [\w.-]+)*)"
_URI = re.compile(
    rf"models:/{_NAME}(?:/(?P<version>[1-9][0-9]{{0,8}})|/(?P<stage>Production|Staging|Archived)|@(?P<alias>[\w-]+))",
    re.ASCII,
)
MAX_CHARS = 256
FORMS = "models:/name/version, models:/name@alias or models:/name/Production"


@dataclass(frozen=True, slots=True)
class ModelUri:
    """A registered model, and which of its versions is meant."""

    name: str
    kind: Literal["version", "alias", "stage"]
    value: str

    @property
    def moves(self) -> bool:
        """Return whether it may mean another version tomorrow."""
        return self.kind != "version"

    def __str__(self) -> str:
        return f"{SCHEME}/{self.name}{'@' if self.kind == 'alias' else '/'}{self.value}"


def parse_model_uri(text: str) -> ModelUri:
    """Read the name of a registered model.

    Raises: ValueError: it has another form; the message says which, and does not repeat the name.
    """
    found = _URI.fullmatch(text) if len(text) <= MAX_CHARS else None
    if found is None or ".." in text:
        raise ValueError(f"must be {FORMS}, without an address, a path or signs of other kinds")
    if (version := found["version"]) is not None:
        return ModelUri(found["name"], "version", version)
    if (alias := found["alias"]) is not None:
        return ModelUri(found["name"], "alias", alias)
    return ModelUri(found["name"], "stage", found["stage"])
