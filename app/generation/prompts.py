"""Reads the prompt templates from prompts/ once, at start.  A file that cannot be used ends the start.

`prompts/<model>/<name>.txt`, with `--` for a slash in the model's name, stands before `prompts/<name>.txt`.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from string import Formatter

from app.errors import ConfigError


def read_template(
    folder: Path,
    name: str,
    variables: Collection[str],
    *,
    model: str = "",
    default: str | None = None,
    may_be_empty: bool = False,
) -> str:
    """Return the text of a template; `{variables}` in it are filled in by the chain.

    Args:
        variables: those that the chain knows.
        default: takes the place of a file that does not exist; without it the file has to.
        may_be_empty: whether an empty file means that there is no such text.
    Raises: ConfigError: the file is missing, not UTF-8, empty, or names a variable that is not known.
    """
    own = folder / model.replace("/", "--") / f"{name}.txt"
    path = own if model and _is_file(own) else folder / f"{name}.txt"
    if default is not None and not path.exists():
        return default
    try:
        template = path.read_text(encoding="utf-8").strip()
        fields = set(_fields(template))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt {path}: cannot be read as UTF-8 text ({type(error).__name__})") from None
    except ValueError as error:
        raise ConfigError(f"prompt {path}: {error}; write {{{{ and }}}} for plain braces") from None
    if not template and not may_be_empty:
        raise ConfigError(f"prompt {path}: the file is empty")
    if unknown := sorted(fields - set(variables)):
        known = ", ".join(sorted(variables))
        raise ConfigError(f"prompt {path}: unknown variable {', '.join(unknown)}; known: {known}")
    return template


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a model's name may be longer than that of a file
        return False


def _fields(template: str) -> Iterator[str]:
    """Yield the names of a template's variables, also of those in the format of another."""
    for _, field, format_spec, _ in Formatter().parse(template):
        if field is not None:
            yield field
            yield from _fields(format_spec or "")
