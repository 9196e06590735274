"""Knows the variables that the settings read, and finds those that somebody probably meant for them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import filterfalse
from pathlib import Path

from dotenv.parser import parse_stream

from app.config.older_names import OLDER_VARIABLES
from app.config.section import Section
from app.config.sections import Settings
from app.errors import is_plain_name

NOT_SHOWN = "(a name that is not shown)"


@dataclass(frozen=True, slots=True)
class UnreadVariable:
    """A variable that no setting is read from."""

    name: str
    where: str
    """The environment, or a line of the .env file."""
    meant: str | None
    """The variable that it was probably meant to be."""

    def __str__(self) -> str:
        advice = f"; if it is meant for the service, say {self.meant}" if self.meant else ""
        return f"the variable {self.name} in {self.where} is not read{advice}"


def may_be_shown(name: str) -> bool:
    """Return whether the name of a variable or key consists of words; anything else may be a secret."""
    return all(is_plain_name(word) for word in name.lower().split("__"))


@cache
def own_variables() -> frozenset[str]:
    """Return every variable that the settings read, those of older services included."""
    return frozenset([*_keys(joined="__"), *(name.upper() for name in _top_level()), *OLDER_VARIABLES])


def nearest_section(name: str) -> str | None:
    """Return the section that SECTION__KEY was probably meant for; None if it is another program's variable."""
    section, separator, key = name.lower().partition("__")
    if not separator or section in Settings.model_fields:
        return None
    for near in get_close_matches(section, Settings.model_fields, n=1, cutoff=0.75):
        return near
    return next((meant for meant, keys in _sections().items() if meant.startswith(section) and key in keys), None)


def unread_variables(environment: Mapping[str, str], env_file: Path | None) -> Iterator[UnreadVariable]:
    """Yield the variables that nobody reads: of the environment, which belongs to all programs, the likely mistakes;
    of .env every one."""
    of_environment = _keys(joined="_") | {"PORT": "APP__PORT"}
    near = [name.upper() for name in _top_level()]
    for name in filterfalse(_is_read, sorted(environment)):
        meant = of_environment.get(name.upper()) or next(iter(get_close_matches(name.upper(), near, 1, 0.85)), None)
        if meant:
            yield UnreadVariable(name, "the environment", meant)
    meanings = _meanings()
    for name, line in _lines(env_file):
        if not _is_read(name):
            shown = name if may_be_shown(name) else NOT_SHOWN
            yield UnreadVariable(shown, f"{env_file}, line {line}", meanings.get(name.upper()))


def names_in(env_file: Path | None) -> list[str]:
    """Return the names of the variables that a .env file sets."""
    return [name for name, _ in _lines(env_file)]


def _is_read(name: str) -> bool:
    """Return whether a setting is read from a variable; one of our sections' is, or it stops the start."""
    return name.upper() in own_variables() or name.lower().partition("__")[0] in _sections()


def _lines(env_file: Path | None) -> Iterable[tuple[str, int]]:
    if env_file is None or not env_file.is_file():
        return []
    with env_file.open(encoding="utf-8") as text:
        return [(item.key, item.original.line) for item in parse_stream(text) if item.key]


def _sections() -> dict[str, Iterable[str]]:
    """Return the sections and their keys."""
    kinds = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {
        name: kind.model_fields for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)
    }


def _top_level() -> list[str]:
    """Return the settings without a section."""
    sections = _sections()
    return [name for name in Settings.model_fields if name not in sections]


def _keys(*, joined: str) -> dict[str, str]:
    """Return the variable of each key, by its section and key joined in some way."""
    return {
        f"{section}{joined}{key}".upper(): f"{section}__{key}".upper()
        for section, keys in _sections().items()
        for key in keys
    }


def _meanings() -> dict[str, str]:
    """Return what names of .env mean that lack their section, or one of the two underscores."""
    sections = _sections()
    keys = [key for keys in sections.values() for key in keys]
    without_section = {
        key.upper(): f"{section}__{key}".upper()
        for section, keys_of in sections.items()
        for key in keys_of
        if keys.count(key) == 1 or section == "app"
    }
    return without_section | _keys(joined="_")
